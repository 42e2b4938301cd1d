import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation.correction import CorrectionRefused, EvaluationError
from brainage_nb.evaluation.metrics import mean_training_age, metrics_by_split
from brainage_nb.evaluation.runs import headline_rows, list_runs, pick_controls, read_run
from brainage_nb.workspace import MissingInput, read_csv, write_csv
from tests.evaluation.fake_workspace import (
    cohort_frame,
    simulated,
    write_folded_run,
    write_run,
    write_settings,
    write_workspace,
)


@pytest.fixture
def scans():
    return cohort_frame(100, twice=4)


def test_a_run_is_read_with_ids_as_text_and_what_the_cohort_knows(tmp_path, scans):
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "resnet18", scans, simulated(scans))
    run = read_run(ws, "resnet18")
    assert list_runs(ws) == ["resnet18"] and run.splits() == ["train", "val", "test"] and not run.folds
    assert set(run.predictions["subject_id"]) == set(scans["subject_id"])
    assert {"sex", "site", "source"} <= set(run.predictions)
    assert run.reference_age == pytest.approx(scans.loc[scans["split"] == "train", "age"].mean())
    assert set(run.calibration_rows()["split"]) == {"val"}


def test_only_the_headline_variant_counts(tmp_path, scans):
    ws = write_workspace(tmp_path, scans)
    early = write_run(ws, "vgg", scans, np.full(len(scans), 1.0), variant="early")
    both = [pd.read_csv(early / "predictions.csv", dtype={"subject_id": str})]
    write_run(ws, "vgg", scans, np.full(len(scans), 2.0), variant="late")
    both.append(pd.read_csv(early / "predictions.csv", dtype={"subject_id": str}))
    write_csv(pd.concat(both), early / "predictions.csv")
    assert (read_run(ws, "vgg").predictions["predicted_age"] == 2).all()
    write_settings(ws, "vgg", "middle")
    with pytest.raises(EvaluationError, match=r"'middle'.*\['early', 'late'\]"):
        read_run(ws, "vgg")


def test_folds_give_out_of_fold_rows_and_the_mean_on_test(tmp_path, scans):
    ws = write_workspace(tmp_path, scans)
    write_folded_run(ws, "folded", scans, n_folds=4, mean_rows=True)
    run = read_run(ws, "folded")
    assert run.folds and run.splits() == ["train", "val", "out_of_fold", "test"]
    assert len(run.part("out_of_fold")) == (scans["split"] != "test").sum()
    assert set(run.calibration_rows()["split"]) == {"train", "val"}
    members = read_csv(ws.run("folded") / "predictions.csv").query("variant != 'mean'")
    expected = members[members["split"] == "test"].groupby("scan_id")["predicted_age"].mean()
    found = run.part("test").set_index("scan_id")["predicted_age"]
    assert found.to_dict() == pytest.approx(expected.to_dict())


def test_the_mean_is_taken_here_where_no_mean_row_was_written(tmp_path, scans):
    ws = write_workspace(tmp_path, scans)
    write_folded_run(ws, "with", scans, n_folds=4, mean_rows=True)
    write_folded_run(ws, "without", scans, n_folds=4, mean_rows=False)
    one, two = (
        read_run(ws, name).part("test").set_index("scan_id")["predicted_age"] for name in ("with", "without")
    )
    assert one.to_dict() == pytest.approx(two.to_dict())


def test_a_subject_in_two_splits_stops_the_evaluation(tmp_path, scans):
    scans.loc[scans.index[-1], "split"] = "train"  # the second session of a test subject
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "leaky", scans, simulated(scans))
    with pytest.raises(ValueError, match="1 subjects are in two splits"):
        read_run(ws, "leaky")


@pytest.mark.parametrize("column, value", [("split", "train"), ("age", 33.3)])
def test_a_run_that_disagrees_with_the_splits_is_refused(tmp_path, scans, column, value):
    ws = write_workspace(tmp_path, scans)
    changed = scans.copy()
    subject = scans.loc[scans["split"] == "val", "subject_id"].iloc[0]
    changed.loc[changed["subject_id"] == subject, column] = value
    write_run(ws, "stale", changed, simulated(scans))
    with pytest.raises(EvaluationError, match=r"differ from splits\.csv in"):
        read_run(ws, "stale")


def test_scans_dropped_after_training_are_refused(tmp_path, scans):
    ws = write_workspace(tmp_path, scans.drop(index=5))
    write_run(ws, "stale", scans, simulated(scans))
    with pytest.raises(EvaluationError, match=r"1 predicted scans are not in splits\.csv"):
        read_run(ws, "stale")


def test_a_missing_prediction_is_refused(scans):
    rows = scans.assign(predicted_age=50.0, seed=0, variant="single")
    rows.loc[3, "predicted_age"] = np.nan
    with pytest.raises(EvaluationError, match="1 scans have no predicted age"):
        headline_rows(rows, "single")


def test_a_missing_run_names_the_notebook_that_makes_it(tmp_path, scans):
    with pytest.raises(MissingInput, match="04_train_resnet18"):
        read_run(write_workspace(tmp_path, scans), "nothing")


def test_controls_are_those_of_the_cohort_rules_and_everybody_counts_without_diagnoses():
    rows = pd.DataFrame({"diagnosis": ["Control", "AD", "", "CTL"], "subject_id": list("abcd")})
    assert pick_controls(rows).index.tolist() == [0, 3]
    assert len(pick_controls(rows.assign(diagnosis=""))) == 4
    assert len(pick_controls(rows.drop(columns="diagnosis"))) == 4


def test_diagnoses_without_a_word_for_controls_are_refused_by_name():
    with pytest.raises(CorrectionRefused, match=r"G1 2, G2 1.*Set control_words .* notebook 01"):
        pick_controls(pd.DataFrame({"diagnosis": ["G1", "G2", "G1"], "subject_id": list("abc")}))


def test_the_mean_predictor_counts_a_subject_once(tmp_path):
    rows = pd.DataFrame({"subject_id": ["a", "a", "a", "b"], "age": [30.0, 30, 30, 60], "split": "train"})
    rows = rows.assign(fold=-1, scan_id=list("1234"), variant="single", predicted_age=45.0)
    assert mean_training_age(rows) == 45
    shown = metrics_by_split(rows, "single")["mean predictor's MAE [years]"]
    assert shown["train"].startswith("15.00")


def test_who_was_predicted_out_of_fold_is_not_called_train():
    rows = pd.DataFrame({"scan_id": list("123"), "subject_id": list("abc"), "age": [30.0, 50, 60]})
    rows = rows.assign(
        split=["train", "val", "test"], fold=[0, 1, -1], variant="ensemble", predicted_age=45.0
    )
    assert metrics_by_split(rows, "ensemble")["scans"].to_dict() == {"out of fold": 2, "test": 1}
