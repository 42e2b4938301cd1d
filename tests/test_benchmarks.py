"""What the scripts of `benchmarks/` keep and count are facts their figures rest on."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from brainage_nb.demo.cohort import draw_truth, image_path
from brainage_nb.demo.scans import ANATOMY, SITES
from brainage_nb.volumes import tissues
from brainage_nb.workspace import open_workspace, read_csv, write_csv


@pytest.fixture
def script(monkeypatch):
    """Any script as a module, by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_predictions_of_other_preparation_or_settings_are_not_taken_for_these(script, tmp_path, monkeypatch):
    accuracy = script("accuracy_models")
    cohort = pd.DataFrame({"scan_id": list("abc"), "subject_id": list("abc"), "age": [20.0, 40.0, 60.0]})
    models = [*accuracy.NETWORKS, *accuracy.RIDGES, accuracy.MEAN, accuracy.REGIONS, accuracy.VGG]

    def files(**settings) -> dict[str, Path]:
        fits = accuracy.Models(cohort, tmp_path, tmp_path, **settings)
        return {model: fits._file(accuracy.Task(model, (0, 1), (2,))) for model in models}

    def changed(**settings) -> set[str]:
        return {model for model, file in files(**settings).items() if file != before[model]}

    before = files()
    assert changed(epochs=7) == set(accuracy.NETWORKS)
    assert changed(vgg_weights="imagenet") == {accuracy.VGG}
    assert changed(size=64) == {*models} - {accuracy.MEAN, accuracy.REGIONS}
    assert not changed()
    monkeypatch.setattr(tissues, "VERSION", "another")
    assert changed() == {"network on grey matter", "ridge on grey matter", accuracy.VGG}


def test_predictions_found_and_to_make_are_counted(script, tmp_path, capsys):
    accuracy = script("accuracy_models")
    cohort = pd.DataFrame({"scan_id": list("abc"), "subject_id": list("abc"), "age": [20.0, 40.0, 60.0]})
    fits = accuracy.Models(cohort, tmp_path, tmp_path)
    first, second = (accuracy.Task(accuracy.MEAN, (0, 1), (k,)) for k in (1, 2))
    fits.run([first])
    fits.run([first, second, second])
    assert f"Predictions: 1 found in {tmp_path}, 1 to make" in capsys.readouterr().out
    assert fits.predict(second) == [30.0]


def test_steadiness_is_judged_on_people_who_taught_nothing(script, tmp_path, monkeypatch):
    steadiness, taught = script("steadiness"), []

    def train(store, splits, folder, settings) -> SimpleNamespace:
        taught.append((settings.recipe, settings.final, set(splits["split"])))
        return SimpleNamespace(complete=True)

    stand_ins = {"train": train, "current_bundle": Path}
    stand_ins["build_store"] = lambda *given: SimpleNamespace(failed=(), store=None)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(steadiness, name, stand_in)
    ws = open_workspace(tmp_path)
    splits = pd.DataFrame({"scan_id": list("abc"), "subject_id": list("abc"), "age": 50.0})
    write_csv(splits.assign(split=["train", "val", "test"]), ws.path("splits.csv"))
    best = steadiness.trained_bundle(ws, "best", 3, final=True)
    assert best != steadiness.trained_bundle(ws, "best", 3, final=False)
    everybody = {"train", "val", "test"}  # of a single model the test split is predicted only
    assert taught == [("best", True, {"train", "val"}), ("best", False, everybody)]


def test_a_person_at_another_site_is_the_same_person(script, tmp_path, monkeypatch):
    known = script("known_answers")
    monkeypatch.setattr(known, "write_scan", lambda *given: None)
    monkeypatch.setattr(known, "template_anatomy", lambda voxel_mm: None)
    first = draw_truth(3, known.SEED, voxel_mm=known.VOXEL_MM).drop_duplicates("subject_id")
    again = read_csv(known.scan_at_every_site(tmp_path, first) / known.TRUTH)
    assert len(again) == 9 and again["scan_id"].is_unique
    person = ["age", "sex", "brain_age", "size_x", *ANATOMY]
    for subject, scans in again.groupby("subject_id"):
        assert (scans[person] == first.set_index("subject_id").loc[subject, person]).all(axis=None)
        assert set(scans["site"]) == set(SITES) and scans["pitch_deg"].nunique() == 3
    assert len({image_path(row) for row in again.to_dict("records")}) == 9


def test_changes_of_site_stand_beside_those_of_one_more_scan_at_the_same_site(script, capsys):
    known = script("known_answers")
    subjects, homes = ["a", "b", "c"], ["north", "south", "west"]
    rows = pd.DataFrame({"subject_id": subjects, "site": homes, "predicted_age": [50.0, 60.0, 70.0]})
    moved = {"north": 1.0, "south": 3.0, "west": -1.0}
    again = rows.drop(columns="site").merge(pd.DataFrame(moved.items(), columns=["site", "by"]), how="cross")
    again["predicted_age"] += again["by"]
    table = known.changes_of_site(rows, again)
    assert table.loc[known.SAME_SITE, ["value", "mean_change", "n"]].tolist() == pytest.approx([5 / 3, 1, 3])
    assert table.loc[known.OTHER_SITE, ["value", "mean_change", "n"]].tolist() == pytest.approx([5 / 3, 1, 6])
    assert table.loc["north to south", ["value", "mean_change", "n"]].tolist() == [2, 2, 3]
    assert table.loc["south to west", ["value", "mean_change", "largest"]].tolist() == [4, -4, 4]
    assert "3 people scanned again" in capsys.readouterr().out
