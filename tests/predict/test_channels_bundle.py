"""The bundle of a network that reads a T1w and a T2w scan together."""

import copy
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from brainage_nb.bundle_format import BundleError, open_bundle, zip_bundle
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.explain import age_group_maps, explain
from brainage_nb.predict.predictors import NetworkEnsemble
from brainage_nb.predict.saving import current_bundle, save_bundle
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.store import build_modalities, build_store
from brainage_nb.workspace import open_workspace, write_csv
from tests.models.tiny_bundle import ARCHITECTURE, SETTINGS, head_array, write_scan

SPLIT = ["train"] * 4 + ["val", "test"]
CHOSEN = TrainingSettings(
    epochs=2, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], device="cpu", processes=1,
    augmentation=None, learning_rate=1e-3, linear=True, keep="last", channels="T1w,T2w",
)  # fmt: skip


@pytest.fixture(scope="module")
def ws(tmp_path_factory):
    """A workspace of ten people with two scans each and a run that reads both."""
    ws = open_workspace(tmp_path_factory.mktemp("channels"))
    people = pd.DataFrame({"subject_id": [f"{k:03d}" for k in range(len(SPLIT))], "split": SPLIT})
    people = people.assign(scan_id=people["subject_id"], session_id="", fold=-1, sex="F", site="A")
    people["age"] = [40.0, 75, 25, 60, 50, 45]
    people["image"] = [str(write_scan(ws.path(f"{k}_t1.nii"), k)) for k in range(len(SPLIT))]
    people["T2w"] = [
        str(write_scan(ws.path(f"{k}_t2.nii"), array=(3 + k % 3) * (head_array(k + 50) // 4)))
        for k in range(len(SPLIT))
    ]
    cohort = people.drop(columns=["split", "fold"]).assign(source="folder")
    write_csv(cohort, ws.path("cohort.csv"))
    write_csv(people.drop(columns="T2w"), ws.path("splits.csv"))
    write_csv(people.assign(sha256="", voxel_mm="4 x 4 x 4", kept=True), ws.path("cleaning.csv"))
    first = build_store(people, ws.path("volumes"), SETTINGS, n_jobs=1).store
    second = build_modalities(cohort, people, ws.path("volumes"), SETTINGS, n_jobs=1)["T2w"].store
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it trains without a GPU
        train([first, second], people, ws.run("both"), CHOSEN)
    return ws


@pytest.fixture(scope="module")
def place(ws):
    return save_bundle(ws.run("both"))


@pytest.fixture(scope="module")
def bundle(place):
    return load_bundle(place)


def scans(ws):
    return ws.path("5_t1.nii"), {"T2w": ws.path("5_t2.nii")}


@pytest.fixture(scope="module")
def both(ws, bundle):
    """A prediction from both scans, by a bundle that has an interval."""
    scan, also = scans(ws)
    return with_interval(bundle).predict(scan, also=also)


@pytest.fixture(scope="module")
def alone(ws, bundle):
    """The same from the T1w scan alone."""
    return with_interval(bundle).predict(scans(ws)[0], 50.0)


def with_interval(bundle):
    calibrated = {"level": 0.9, "quantile": 8.0, "n_calibration": 50, "support": ""}
    return replace(bundle, manifest=bundle.manifest | {"interval": calibrated})


def codes(prediction):
    return [caution.code for caution in prediction.warnings]


def test_a_saved_network_of_two_scans_predicts_what_its_run_predicted(ws, place, bundle, both, tmp_path):
    expected = ws.read("runs/both/predictions.csv").set_index("scan_id")["predicted_age"]
    assert both.predicted_age == pytest.approx(expected["005"], abs=1e-2)
    assert "channel_left_empty" not in codes(both) and both.low > -np.inf
    assert list(load_bundle(zip_bundle(place, tmp_path / "both.zip")).channels) == ["T2w"]
    assert bundle.manifest["reproduced_within_years"] < 1e-2 and current_bundle(ws.run("both")) == place
    assert bundle.others == ("T2w",) and "on T1w and T2w scans of 5 people" in bundle.title
    assert "on T1w and T2w scans of 5" in (place / "README.md").read_text()
    assert "--also T2w=FILE" in (place / "README.md").read_text()


def test_without_the_second_scan_it_says_so_and_promises_no_interval(bundle, alone):
    (said,) = (caution.sentence for caution in alone.warnings if caution.code == "channel_left_empty")
    assert "Without a T2w scan the network read T1w alone" in said
    assert (alone.low, alone.corrected_age, alone.interval_title) == (-np.inf, None, "")
    assert np.array_equal(alone.stacked[0], alone.volume) and not alone.stacked[1].any()
    network = copy.deepcopy(bundle.model.networks[0])
    network.linear = None  # it has never seen an empty channel, so its age is not asked
    bare = NetworkEnsemble([network], flip_averaging=True).predict(alone.stacked)
    assert alone.predicted_age == pytest.approx(bare[0], abs=1e-4)


def test_a_network_that_never_did_without_asks_for_the_scan(ws, bundle):
    scan, _ = scans(ws)
    strict = replace(bundle, manifest=bundle.manifest | {"channel_dropout": 0.0})
    with pytest.raises(ScanError, match=r"5_t1.nii: .* reads the T2w scan of a session.*--also T2w=FILE"):
        strict.predict(scan)
    with pytest.raises(ValueError, match=r"FLAIR: .* takes T2w beside the T1w scan"):
        bundle.predict(scan, also={"FLAIR": scan})


def test_a_second_scan_unlike_those_of_training_is_refused(ws, bundle):
    mean = -bundle.channels["T2w"].mean
    other = replace(bundle, channels={"T2w": replace(bundle.channels["T2w"], mean=mean)})
    with pytest.raises(ScanError, match="does not look like the training scans") as refused:
        other.predict(scans(ws)[0], also=scans(ws)[1])
    assert refused.value.code == "other_scan_unlike"


@pytest.mark.parametrize("name", ["both", "alone"])
def test_a_map_adds_up_the_years_of_all_scans(bundle, name, request):
    found = request.getfixturevalue(name)
    explanation = explain(bundle, found)
    assert explanation.heat.shape == found.volume.shape and "could not be placed" not in explanation.words
    with pytest.raises(ValueError, match="expected one of integrated_gradients"):
        explain(bundle, found, "grad_cam")


def test_mean_maps_are_refused_in_words(ws, bundle):
    store = build_store(ws.read("splits.csv"), ws.path("volumes"), SETTINGS, n_jobs=1).store
    with pytest.raises(ValueError, match="mean maps are made of a model that reads one scan"):
        age_group_maps(bundle, store, ws.read("splits.csv"))


DAMAGES = {
    "the first is not the T1w scan": lambda said: said["channels"].reverse(),
    "not those of references": lambda said: said["references"].clear(),
    "channels: 2, and the network takes 1": lambda said: said["architecture"].pop("channels"),
    "'channel_dropout' is a dependency": lambda said: said.pop("channel_dropout"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_channels_that_do_not_fit_are_refused(place, tmp_path, sentence):
    changed = shutil.copytree(place, tmp_path / "bundle")
    said = json.loads((changed / "bundle.json").read_text())
    DAMAGES[sentence](said)
    (changed / "bundle.json").write_text(json.dumps(said))
    with pytest.raises(BundleError, match=sentence):
        open_bundle(changed)


def test_a_run_whose_scans_do_not_follow_from_the_t1w_scan_has_no_bundle(ws, tmp_path):
    copy = open_workspace(shutil.copytree(ws.root, tmp_path / "copy"))
    settings = copy.run("both") / "settings.json"
    said = json.loads(settings.read_text())
    said["identity"]["channel_2"] = "abc 123"
    settings.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"both reads T1w, T2w together: .* T2w volumes .*these are abc"):
        save_bundle(copy.run("both"))
