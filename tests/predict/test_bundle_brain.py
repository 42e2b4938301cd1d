"""A bundle whose recipe looks for the brain does the same steps on a new scan, and refuses what has none."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import MedianSmooth

from brainage_nb.bundle_format import BundleError
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Failure
from brainage_nb.volumes.preprocessing import as_stored, preprocess
from brainage_nb.volumes.settings import PreprocessingSettings
from tests.models.tiny_bundle import SETTINGS, write_tiny_bundle
from tests.volumes.template_head import head, pose, shuffled


def test_a_bundle_takes_the_steps_of_its_recipe_and_refuses_a_scan_without_a_brain(tmp_path):
    best = PreprocessingSettings.of_recipe("best", spacing_mm=SETTINGS.spacing_mm, size=SETTINGS.size)
    said = {"preprocessing": best.to_json(), "volumes": best.fingerprint}
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle", **said))
    assert bundle.settings.recipe == "best"
    image, _ = head(pose((10, -8, 5)))
    nib.save(image, tmp_path / "good.nii.gz")
    nib.save(shuffled(image), tmp_path / "bad.nii.gz")
    good, bad = bundle.predict_many([tmp_path / "good.nii.gz", tmp_path / "bad.nii.gz"], n_jobs=1)
    assert np.array_equal(good.volume, as_stored(preprocess(tmp_path / "good.nii.gz", best)))
    assert (good.volume == 0).mean() > 0.4  # nothing but the brain
    assert isinstance(bad, Failure)
    assert bad.code == "brain_not_found"


def test_a_bundle_carries_further_transforms_of_monai_and_refuses_what_is_none(tmp_path):
    smoothed = replace(SETTINGS, extra="MedianSmooth(radius=1)")
    changes = {"preprocessing": smoothed.to_json(), "volumes": smoothed.fingerprint}
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle", **changes))
    nib.save(head(pose((10, -8, 5)))[0], tmp_path / "a.nii.gz")
    plain = preprocess(tmp_path / "a.nii.gz", SETTINGS)
    wanted = MedianSmooth(radius=1)(plain[None])[0].numpy()
    assert np.array_equal(bundle.predict(tmp_path / "a.nii.gz").volume, as_stored(wanted))
    changes["preprocessing"]["settings"]["extra"] = "Lambda(func='print')"
    with pytest.raises(BundleError, match="Lambda cannot be part of the chain"):
        load_bundle(write_tiny_bundle(tmp_path / "other", **changes))
