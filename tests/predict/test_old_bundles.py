"""Bundles of release 0.1.0: `reference` predicts as it did then; `best`, whose steps changed, is refused.

`tests/data/bundle_0_1_0` was trained on forty invented heads. The expected ages were computed with 0.1.0.
"""

import json
import shutil
from pathlib import Path

import nibabel as nib
import pytest

from brainage_nb.bundle_format import BundleError
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import image_statistics
from tests.volumes.template_head import head, pose

DATA = Path(__file__).parents[1] / "data"
OLD = DATA / "bundle_0_1_0"


@pytest.mark.parametrize(
    ("degrees", "move_mm", "age", "correlation", "times"),
    [
        ((10, -8, 5), (0, 0, 0), 55.598267, 0.65033, 3.10695),
        ((0, 0, 0), (4, -3, 6), 55.826618, 0.66997, 3.19385),
    ],
)
def test_an_old_bundle_predicts_the_same_ages(degrees, move_mm, age, correlation, times, tmp_path):
    image, _ = head(pose(degrees, move_mm))
    nib.save(image, tmp_path / "scan.nii.gz")
    bundle = load_bundle(OLD)
    result = bundle.predict(tmp_path / "scan.nii.gz", 50)
    assert result.predicted_age == pytest.approx(age, abs=1e-4)
    assert result.gap == pytest.approx(age - 50, abs=1e-4)
    assert bundle.reference.correlation(result.volume) == pytest.approx(correlation, abs=1e-3)
    codes = [caution.code for caution in result.warnings]
    assert codes == ["unlike_training", "skull_not_as_in_training", "few_calibration_subjects"]
    statistics = image_statistics(result.volume)
    assert bundle.reference.distance.times_too_far(statistics) == pytest.approx(times, abs=0.01)
    assert result.do_not_use_because.startswith("After preprocessing this scan does not look like")
    assert bundle.is_test_object and "34 people" in bundle.title


def test_an_old_bundle_of_steps_that_changed_since_is_refused_in_words(tmp_path):
    bundle = shutil.copytree(OLD, tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["preprocessing"] = json.loads((DATA / "preprocessing_best_0_1_0.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=r"made by other steps .* than this version .* Use the version that made"
    ):
        load_bundle(bundle)
