"""A fused bundle: one age from the scans of a session, from whatever of them is there and fits."""

import json
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainage_nb.bundle_format import BundleError, all_seen, open_bundle, zip_bundle
from brainage_nb.cli import main
from brainage_nb.evaluation.evaluate import evaluate_runs
from brainage_nb.models.network import list_training_people, load_pretrained
from brainage_nb.predict import bundle as predict
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Failure
from brainage_nb.predict.explain import explain
from brainage_nb.predict.saving import current_bundle, offer_fused_bundle, save_fused_bundle
from brainage_nb.volumes import heads
from brainage_nb.volumes.scan_statistics import measure_scan
from brainage_nb.volumes.scans import ScanError, load_scan
from brainage_nb.workspace import MissingInput
from tests.evaluation.fake_workspace import cohort_frame, simulated, write_run, write_workspace
from tests.models.tiny_bundle import (
    SETTINGS,
    head_array,
    networks,
    write_fused_bundle,
    write_scan,
    write_tiny_bundle,
)
from tests.volumes.template_head import head, pose


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_fused_bundle(tmp_path_factory.mktemp("fused") / "bundle")


@pytest.fixture(scope="module")
def bundle(place):
    return load_bundle(place)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A T1w and a T2w scan."""
    folder = tmp_path_factory.mktemp("scans")
    return write_scan(folder / "t1.nii", 41), write_scan(folder / "t2.nii", 42)


def codes(prediction):
    return [caution.code for caution in prediction.warnings]


def test_both_scans_are_fused_by_the_weights_of_the_bundle(bundle, scans):
    t1, t2 = scans
    found = bundle.predict(t1, 50.0, also={"T2w": t2})
    alone = [
        member.predict(t1, also=given).predicted_age
        for member, given in zip(bundle.members, ({}, {"T2w": t2}), strict=False)
    ]
    assert found.predicted_age == pytest.approx(1 + 0.7 * alone[0] + 0.3 * alone[1])
    assert found.members == pytest.approx(alone) and (found.high - found.low) / 2 == pytest.approx(8)
    assert found.gap == pytest.approx(found.predicted_age - 50) and "fused_from_fewer" not in codes(found)
    assert bundle.others == ("T2w",) and "tiny (T1w) and tiny_t2w (T2w)" in bundle.title


def test_without_the_second_scan_the_first_alone_speaks_with_its_own_interval(bundle, scans):
    found = bundle.predict(scans[0])
    assert found.predicted_age == pytest.approx(2 + 0.9 * bundle.members[0].predict(scans[0]).predicted_age)
    assert (found.high - found.low) / 2 == pytest.approx(11)
    (said,) = (caution.sentence for caution in found.warnings if caution.code == "fused_from_fewer")
    assert "Without a T2w scan" in said and "± 11.0 years; with all scans ± 8.0 years" in said


@pytest.mark.parametrize("kind", ["noise", "missing", "text"])
def test_a_second_scan_that_cannot_be_used_is_left_out_in_words(bundle, scans, tmp_path, kind):
    other = tmp_path / "other.nii"
    if kind == "noise":
        write_scan(
            other, array=np.random.default_rng(0).integers(0, 900, head_array().shape).astype(np.int16)
        )
    elif kind == "text":
        other.write_text("no scan")
    found = bundle.predict(scans[0], also={"T2w": other})
    assert found.predicted_age == bundle.predict(scans[0]).predicted_age
    assert any("The T2w scan other.nii was not used: " in caution.sentence for caution in found.warnings)


def test_a_model_of_brightness_takes_no_part_where_the_t1w_scan_is_stripped(bundle, scans, monkeypatch):
    t1, t2 = scans
    for member in bundle.members:
        training = member.manifest["training"] | {"skull_stripped": False}
        monkeypatch.setitem(member.manifest, "training", training)
    whole = heads.find_head(load_scan(t1))
    monkeypatch.setattr(heads, "find_head", lambda image: replace(whole, skull_stripped=True))
    found = bundle.predict(t1, also={"T2w": t2})
    assert found.predicted_age == bundle.predict(t1).predicted_age
    assert {"skull_not_as_in_training", "other_scan_not_used", "fused_from_fewer"} <= set(codes(found))


@pytest.mark.parametrize(("to_mni", "code"), [(True, "other_skull"), (False, "skull_not_as_in_training")])
def test_grey_matter_placed_by_the_crown_is_not_used_where_the_skull_is_gone(bundle, tmp_path, to_mni, code):
    nib.save(head(pose(), brain_only=True)[0], tmp_path / "t1.nii")
    member = bundle.members[0]
    training = member.manifest["training"] | {"skull_stripped": False}
    settings = replace(SETTINGS, grey_matter=True, to_mni=to_mni)
    model = replace(member, settings=settings, manifest=member.manifest | {"training": training})
    assert code in [caution.code for caution in model._prepare(tmp_path / "t1.nii")[-1]]


def test_a_scan_by_an_unknown_name_is_refused_with_the_choices(bundle, scans, place, capsys):
    with pytest.raises(ValueError, match=r"T2: Fused .* takes T2w beside the T1w scan"):
        bundle.predict(scans[0], also={"T2": scans[1]})
    with pytest.raises(ValueError, match=r"T2w: 3D ResNet-18 .* reads one scan only"):
        bundle.members[0].predict(scans[0], also={"T2w": scans[1]})
    t1, t2 = map(str, scans)
    assert main(["predict", t1, "--bundle", str(place), "--also", f"FLAIR={t2}"]) == 2
    assert main(["predict", t1, t1, "--bundle", str(place), "--also", f"T2w={t2}"]) == 2
    said = capsys.readouterr().err
    assert "FLAIR: Fused" in said and "2 scans are to be predicted" in said


def test_a_model_of_the_second_scan_alone_asks_for_it(bundle, scans):
    second = bundle.members[1]
    assert second.others == ("T2w",)
    with pytest.raises(ScanError, match=r"t1.nii: .* reads the T2w scan of a session. .*--also T2w=FILE"):
        second.predict(scans[0])


def test_a_second_scan_is_compared_by_its_volume_and_by_the_t1w_scan_that_training_was(
    bundle, scans, monkeypatch
):
    compared = []
    monkeypatch.setattr(predict, "find_likeness_cautions", lambda *given: compared.append(given[2]) or [])
    bundle.members[1].predict(scans[0], also={"T2w": scans[1]})
    assert np.array_equal(compared[0], measure_scan(load_scan(scans[0])))


def test_the_command_fuses_and_says_what_it_had_to_do_without(scans, place, capsys):
    t1, t2 = map(str, scans)
    assert main(["predict", t1, "--bundle", str(place), "--also", f"T2w={t2}"]) == 0
    both = capsys.readouterr().out
    assert main(["predict", t1, "--bundle", str(place)]) == 0
    one = capsys.readouterr().out
    assert "Without a T2w scan" in one and "Without a T2w scan" not in both
    assert "Fused from tiny (T1w) and tiny_t2w (T2w)" in both


def test_the_command_names_those_who_calibrated_the_interval_that_it_gives(scans, place, tmp_path, capsys):
    changed = shutil.copytree(place, tmp_path / "bundle")
    change(changed / "bundle.json", interval=None, correction=None)  # too few have all scans
    assert main(["predict", str(scans[0]), "--bundle", str(changed)]) == 0
    said = capsys.readouterr().out
    assert (
        "90% conformal interval, calibrated on 50 subjects" in said and "such ages err by 6.5 years" in said
    )


def test_a_failing_first_scan_is_a_failure_and_maps_explain_the_first_model(bundle, scans):
    found = list(bundle.predict_many(["nowhere.nii", scans[0]], also=[{}, {"T2w": scans[1]}], n_jobs=1))
    assert isinstance(found[0], Failure) and found[1].alone == found[1].members[0]
    words = explain(bundle, found[1]).words
    assert words.startswith("Of the T1w scan's age alone") and f"predicted {found[1].alone:.1f}" in words


def test_a_zip_opens_as_its_folder_does(place, scans, bundle, tmp_path):
    zipped = load_bundle(zip_bundle(place, tmp_path / "fused.zip"))
    assert zipped.predict(scans[0]).predicted_age == bundle.predict(scans[0]).predicted_age
    assert zipped.others == bundle.others


def shorten_weights(manifest):
    said = json.loads(manifest.read_text())
    del said["parts"][0]["weights"][1]
    manifest.write_text(json.dumps(said))


@pytest.fixture
def evaluated(tmp_path):
    """A workspace of two runs with bundles of their own, the second of T2w scans that a fifth lack."""
    people = cohort_frame(200)
    ws = write_workspace(tmp_path / "ws", people)
    lacks = people.index % 5 == 0
    for n, (name, rows) in enumerate({"resnet18": people, "resnet18_t2w": people[~lacks]}.items()):
        folder = write_run(ws, name, rows, simulated(rows, seed=n))
        if n:
            change(folder / "settings.json", modality="T2w")
        preparing = SETTINGS.for_modality("T2w" if n else "T1w").to_json()
        write_tiny_bundle(folder / "bundle", n=n + 1, preprocessing=preparing)
    return ws


def test_what_was_evaluated_is_what_the_saved_bundle_gives(evaluated, scans):
    found = evaluate_runs(evaluated, fuse="resnet18_t2w,resnet18", level=0.8, n_bootstrap=50)
    model, fusion = load_bundle(save_fused_bundle(found.fusion, evaluated)), found.fusion
    both, alone = model.predict(scans[0], also={"T2w": scans[1]}), model.predict(scans[0])
    ages = dict(zip(("resnet18", "resnet18_t2w"), both.members, strict=True))
    rows = pd.DataFrame([ages])
    assert both.predicted_age == pytest.approx(fusion.whole.combination.predict(rows)[0])
    assert alone.predicted_age == pytest.approx(fusion.parts["resnet18"].combination.predict(rows)[0])
    for prediction, part in ((both, fusion.whole), (alone, fusion.parts["resnet18"])):
        assert (prediction.high - prediction.low) / 2 == pytest.approx(part.calibration.interval.quantile_)
        assert prediction.level == 0.8
    assert fusion.whole.combination.words in (evaluated.run("fused") / "bundle" / "README.md").read_text()
    assert model.manifest["figures"]["test"]["n"] == found.results["fused"]["test"]["n"]


def test_a_fused_bundle_older_than_one_of_its_runs_is_not_offered(evaluated):
    fusion = evaluate_runs(evaluated, fuse=["resnet18", "resnet18_t2w"], n_bootstrap=5).fusion
    place = save_fused_bundle(fusion, evaluated)
    assert current_bundle(evaluated.run("fused")) == place
    later = place.stat().st_mtime + 60
    os.utime(evaluated.run("resnet18_t2w") / "predictions.csv", (later, later))
    with pytest.raises(MissingInput, match="Run notebook 06 with"):
        current_bundle(evaluated.run("fused"))


@pytest.mark.parametrize(
    ("modality", "why"),
    [
        ("FLAIR", "none of them gives ages that follow true age from the T1w scan"),
        ("T1w + FLAIR", "resnet18 reads T1w + FLAIR together, and only runs of one scan"),
    ],
)
def test_of_runs_that_cannot_be_fused_there_is_no_bundle_and_it_is_said(evaluated, modality, why):
    change(evaluated.run("resnet18") / "settings.json", modality=modality)
    fusion = evaluate_runs(evaluated, fuse=["resnet18", "resnet18_t2w"], n_bootstrap=5).fusion
    assert why in offer_fused_bundle(fusion, evaluated)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(manifest):
    manifest.write_text(manifest.read_text().replace('"tiny"', '"tinz"'))


DAMAGES = {
    "holds another model": lambda place: rename(place / "model-1" / "bundle.json"),
    "member-00.safetensors has no bytes": lambda place: shutil.copy(place / "model-0" / "bundle.json", place),
    r"model-1/bundle.json has no bytes": lambda place: shutil.rmtree(place / "model-1"),
    "is a link or a folder": lambda place: (place / "model-0" / "more").mkdir(),
    "holds 'code.pkl'": lambda place: (place / "model-1" / "code.pkl").write_text(""),
    "expected no. Copy": lambda place: shutil.copy(place / "model-0" / "member-00.safetensors", place),
    "weights do not fit": lambda place: shorten_weights(place / "bundle.json"),
    "In bundle.json, rates: ": lambda place: change(place / "bundle.json", rates={"slope": 0}),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_changed_fused_bundle_is_refused_in_words(place, tmp_path, sentence):
    changed = tmp_path / "bundle"
    shutil.copytree(place, changed)
    DAMAGES[sentence](changed)
    with pytest.raises(BundleError, match=sentence):
        open_bundle(changed)


def test_no_training_starts_from_it_but_its_people_are_known(place):
    assert len(list_training_people(place)) == 2 == len(all_seen(load_bundle(place).manifest))
    with pytest.raises(ValueError, match="no single network"):
        load_pretrained(networks()[0], place)
