import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation.correction import EvaluationError
from brainage_nb.evaluation.external import evaluate_external, refuse_trained_on
from tests.evaluation.fake_workspace import SPELLINGS


def external(n=120, offset=6.0, seed=0):
    rng = np.random.default_rng(seed)
    age = rng.uniform(30, 80, n)
    return pd.DataFrame(
        {
            "scan_id": [f"x{i}" for i in range(n)],
            "subject_id": [f"x{i}" for i in range(n)],
            "age": age,
            "site": np.where(np.arange(n) % 2, "A", "B"),
            "diagnosis": np.where(np.arange(n) % 4 == 3, "AD", "control"),
            "predicted_age": age + offset + rng.normal(0, 3, n),
        }
    )


KNOWN = {"reference_age": 50.0, "trained_ages": (20.0, 86.0), "n_bootstrap": 100}


def test_raw_figures_and_site_offsets_come_without_any_calibration():
    found = evaluate_external(external(), **KNOWN)
    assert found.metrics["mean_gap"]["value"] == pytest.approx(6, abs=1)
    assert found.offsets["value"].to_numpy() == pytest.approx([6, 6], abs=1.2)
    assert found.offsets["n"].sum() == 90  # controls only
    assert found.calibration == {} and found.rest.empty and "calibrated_age" not in found.predictions


@pytest.mark.parametrize("n_named, kind", [(10, "offset"), (40, "line")])
def test_named_controls_calibrate_and_the_rest_is_reported_apart(n_named, kind):
    rows = external()
    named = rows.loc[rows["diagnosis"] == "control", "subject_id"].head(n_named).tolist()
    found = evaluate_external(rows, calibrate_on=named, **KNOWN)
    raw, calibrated = found.rest.to_dict("records")
    assert found.calibration["kind"] == kind and found.calibration["subjects"] == sorted(named)
    assert raw["n"] == calibrated["n"] == 120 - n_named
    assert abs(calibrated["mean_gap"]) < 1.5 < 4 < raw["mean_gap"]
    assert found.predictions["predicted_age"].tolist() == rows["predicted_age"].tolist()
    assert found.metrics["n"] == 120


def test_patients_and_strangers_cannot_calibrate():
    with pytest.raises(ValueError, match=r"not controls \(first: \['x3'\]\)"):
        evaluate_external(external(), calibrate_on=["x0", "x3"], **KNOWN)
    with pytest.raises(ValueError, match="not in this cohort"):
        evaluate_external(external(), calibrate_on=["y1"], **KNOWN)


def test_nobody_left_to_report_on_is_refused():
    rows = external().query("diagnosis == 'control'")
    with pytest.raises(ValueError, match="nobody is left"):
        evaluate_external(rows, calibrate_on=rows["subject_id"].tolist(), **KNOWN)


def test_ages_outside_training_are_warned_of_with_their_number():
    rows = external()
    rows.loc[:2, "age"] = [95.0, 12.0, 95.0]
    assert "3 of 120 scans" in evaluate_external(rows, **KNOWN).warnings[0]
    assert evaluate_external(external(), **KNOWN).warnings == []


def test_people_the_model_was_trained_on_are_refused_by_name():
    refuse_trained_on(["a", "b"], [False, False])
    with pytest.raises(EvaluationError, match=r"1 of 2 subjects .* \(first: \['b'\]\)"):
        refuse_trained_on(["a", "b"], [False, True])
    with pytest.raises(ValueError, match="shorter"):
        refuse_trained_on(["a", "b"], [True], "image files")


def test_all_spellings_of_controls_enter_the_offset_and_no_patient_does():
    rows = external()
    ill = rows["diagnosis"] == "AD"
    rows["diagnosis"] = np.where(ill, "AD", np.resize(SPELLINGS, len(rows)))
    rows.loc[ill, "predicted_age"] += 20
    found = evaluate_external(rows, **KNOWN)
    assert found.offsets["n"].sum() == 90 and found.offsets["value"].max() < 7.5


def test_without_a_known_word_for_controls_there_is_no_offset_and_no_calibration_but_the_figures():
    rows = external().replace({"diagnosis": {"control": "G1", "AD": "G2"}})
    found = evaluate_external(rows, calibrate_on=["x0", "x1"], **KNOWN)
    assert found.offsets.empty and not found.calibration and found.metrics["n"] == 120
    assert found.warnings[0].startswith("No site offset and no calibration. None of the diagnoses")
    assert "G1 90, G2 30" in found.warnings[0] and "control_words" in found.warnings[0]


def test_a_site_without_controls_is_named():
    rows = external()
    rows.loc[rows["site"] == "B", "diagnosis"] = "AD"
    assert evaluate_external(rows, **KNOWN).warnings == ["No offset of B: there are no controls."]
