"""A trained model on another workspace: people it was trained on are refused, named controls calibrate."""

import pandas as pd
import pytest

from brainage_nb.bundle_format import hashed
from brainage_nb.evaluation.correction import EvaluationError
from brainage_nb.predict.bundle import apply_to_workspace, load_bundle, read_subject_ids
from brainage_nb.workspace import open_workspace, sha256_of, write_csv
from tests.models.tiny_bundle import noisy_head, write_scan, write_tiny_bundle

SALT = "00" * 16


@pytest.fixture
def other(tmp_path):
    """A workspace of eight kept scans, one dropped one and one that is broken."""
    ws = open_workspace(tmp_path / "other")
    names = [f"p{place}" for place in range(10)]
    for place, name in enumerate(names):
        write_scan(ws.path(f"{name}.nii"), place)
    ws.path("p8.nii").write_bytes(b"not a scan")
    cohort = pd.DataFrame(
        {"scan_id": names, "subject_id": names, "session_id": "", "image": [f"{n}.nii" for n in names]}
    )
    cohort["age"] = [30.0 + 5 * place for place in range(10)]
    write_csv(cohort.assign(sex="F", site="there", source="folder"), ws.path("cohort.csv"))
    write_csv(
        cohort.assign(kept=[name != "p9" for name in names], reason="", detail=""), ws.path("cleaning.csv")
    )
    return ws


def bundle_that_saw(tmp_path, **seen):
    known = {"salt": SALT, "subjects": [], "images": []} | seen
    return load_bundle(write_tiny_bundle(tmp_path / "bundle", seen=known))


def test_every_kept_scan_is_predicted_and_the_broken_one_is_named(tmp_path, other):
    bundle = bundle_that_saw(tmp_path)
    found = apply_to_workspace(bundle, other.root, n_bootstrap=50)
    assert found.predictions["scan_id"].tolist() == [f"p{place}" for place in range(8)]
    assert any("p8.nii" in line for line in found.warnings)
    expected = bundle.predict(other.path("p3.nii")).predicted_age
    assert found.predictions["predicted_age"][3] == pytest.approx(expected, abs=1e-4)


def test_scans_unlike_those_of_training_are_counted_in_words(tmp_path, other):
    for name in ("p1", "p4"):
        write_scan(other.path(f"{name}.nii"), array=noisy_head(40))
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle", n_scans=30))
    found = apply_to_workspace(bundle, other.root, n_bootstrap=50)
    assert found.warnings[0].startswith("2 of 9 scans: further from the training scans")
    assert "do not use their ages (`far_from_training`)" in found.warnings[0]
    unusable = found.predictions.set_index("scan_id")["do_not_use_because"] != ""
    assert unusable[unusable].index.tolist() == ["p1", "p4"]


def test_a_subject_or_a_file_of_the_training_set_is_refused(tmp_path, other):
    with pytest.raises(EvaluationError, match="p2"):
        apply_to_workspace(bundle_that_saw(tmp_path / "a", subjects=[hashed("p2", SALT)]), other.root)
    file_hash = hashed(sha256_of(other.path("p5.nii")), SALT)
    with pytest.raises(EvaluationError, match=r"p5\.nii"):
        apply_to_workspace(bundle_that_saw(tmp_path / "b", images=[file_hash]), other.root)


def test_calibration_uses_the_named_controls_and_is_reported_on_the_rest(tmp_path, other):
    listed = tmp_path / "controls.txt"
    listed.write_text("p0\np1\n\np2\n")
    names = read_subject_ids(str(listed))
    assert names == read_subject_ids("p0, p1,p2") == ["p0", "p1", "p2"]
    found = apply_to_workspace(bundle_that_saw(tmp_path), other.root, calibrate_on=names, n_bootstrap=50)
    assert found.calibration["n_subjects"] == 3
    assert set(found.rest["n"]) == {5}
