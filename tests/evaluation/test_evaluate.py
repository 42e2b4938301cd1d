import numpy as np
import pytest

from brainage_nb.cohort.rules import CohortRules, apply_rules
from brainage_nb.evaluation.correction import ConformalInterval, EvaluationError
from brainage_nb.evaluation.evaluate import evaluate_run, evaluate_runs, headline_table
from brainage_nb.evaluation.report import other_splits
from brainage_nb.evaluation.runs import read_run
from brainage_nb.predict.saving import facts_of_run
from brainage_nb.workspace import MissingInput, read_csv, read_json, write_csv, write_json
from tests.evaluation.fake_workspace import (
    PREDICTION_COLUMNS,
    SPELLINGS,
    cohort_frame,
    simulated,
    write_folded_run,
    write_run,
    write_settings,
    write_workspace,
)

FEW = {"n_bootstrap": 100}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    scans = cohort_frame(300, twice=12, diagnosis=True)
    ws = write_workspace(tmp_path_factory.mktemp("demo"), scans, demo=True)
    write_run(ws, "resnet18", scans, simulated(scans))
    write_run(ws, "vgg16_svr", scans, simulated(scans, slope=0.6, offset=20, noise=7, seed=5), variant="late")
    return evaluate_runs(ws, **FEW)


def test_results_hold_each_run_and_split_with_value_and_interval(demo):
    results = demo.results
    assert [name for name in results if not name.startswith("_")] == ["resnet18", "vgg16_svr"]
    for run in ("resnet18", "vgg16_svr"):
        assert list(results[run]) == ["train", "val", "test"]
        wanted = {"n", "mae", "rmse", "r", "r2", "slope", "gap_age_r", "mean_predictor_mae"}
        assert wanted <= set(results[run]["test"]) and isinstance(results[run]["test"]["n"], int)
        assert set(results[run]["test"]["mae"]) == {"value", "low", "high"}


def test_raw_predictions_are_never_overwritten(demo):
    rows = demo.predictions
    raw = read_csv(demo.workspace.path("runs", "resnet18", "predictions.csv")).set_index("scan_id")[
        "predicted_age"
    ]
    ours = rows[rows["run"] == "resnet18"].set_index("scan_id")
    assert ours["predicted_age"].to_dict() == pytest.approx(raw.to_dict())
    assert (ours["corrected_age"] - ours["predicted_age"]).abs().max() > 1
    assert demo.results["resnet18"]["test"]["slope"]["value"] < 0.9
    assert demo.results["_age_free_corrected"]["resnet18"]["test"]["slope"]["value"] == pytest.approx(
        1, abs=0.1
    )


def test_the_correction_is_fitted_on_validation_controls_only(demo):
    found = demo.runs["resnet18"]
    val = found.rows[(found.rows["split"] == "val") & (found.rows["diagnosis"] == "control")]
    slope, intercept = np.polyfit(val["age"], val["predicted_age"], 1)
    fitted = found.calibration.corrector
    assert [fitted.slope_, fitted.intercept_] == pytest.approx([slope, intercept])


def test_planted_gaps_are_recovered_and_oracle_and_attainable_stand_beside_ours(demo):
    known = demo.results["_known_answers"]["resnet18"]
    errors = {name: figure["value"] for name, figure in known["mae"].items()}
    assert errors["oracle"] < errors["attainable"] < errors["ours"]
    recovered = {row["kind"]: row for row in known["recovered"]}
    assert recovered["gap adjusted by true age"]["r_low"] > 0.3
    assert len(recovered) == 3


def test_diagnoses_are_compared_where_there_are_enough(demo):
    assert demo.results["_diagnosis"]["resnet18"][0]["diagnosis"] == "AD"


def test_the_nearer_model_wins_the_paired_comparison(demo):
    table = demo.comparisons.set_index(["a", "b"])
    assert table.loc[("resnet18", "vgg16_svr"), "high"] < 0
    assert table.loc[("resnet18", "mean predictor"), "high"] < 0


def test_a_built_cohort_is_called_a_test_object_first(demo):
    assert demo.is_test_object and "no figure on this page says how accurate" in demo.warnings[0]


def test_the_headline_puts_each_error_beside_the_mean_predictors(demo):
    table = headline_table(demo.results)
    assert table.index.tolist() == ["resnet18, test", "vgg16_svr, test"]
    assert {"MAE [years]", "mean predictor's MAE [years]"} <= set(table)


def test_noise_is_said_to_be_no_better_than_the_mean_and_is_not_corrected(tmp_path):
    scans = cohort_frame(300)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "noise", scans, np.random.default_rng(0).normal(53, 8, len(scans)))
    found = evaluate_runs(ws, "noise", **FEW)
    test = found.results["noise"]["test"]
    assert test["mae"]["value"] > test["mean_predictor_mae"]["value"]
    assert test["r"]["low"] < 0 < test["r"]["high"]
    assert set(found.results["_age_free_corrected"]["noise"]) == {"refused"}
    assert found.predictions[["corrected_age", "adjusted_gap"]].isna().all(axis=None)
    assert any("not shown to be better" in text for text in found.warnings)
    assert any("no age-bias correction" in text for text in found.warnings)


@pytest.mark.parametrize("folds", [False, True])
def test_the_interval_whose_coverage_is_reported_is_the_one_that_the_bundle_saves(tmp_path, folds):
    scans = cohort_frame(120)
    ws = write_workspace(tmp_path, scans)
    if folds:
        write_folded_run(ws, "run", scans, n_folds=4, mean_rows=True)
    else:
        write_run(ws, "run", scans, simulated(scans))
    assert facts_of_run(read_run(ws, "run"), ws)["interval"]["level"] == 0.9  # before there is a report
    evaluation = evaluate_runs(ws, level=0.75, **FEW)
    write_json(evaluation.results, ws.path("evaluation", "results.json"))
    found = evaluation.runs["run"]
    kept = ConformalInterval.from_dict(facts_of_run(read_run(ws, "run"), ws)["interval"])
    test = found.rows[found.rows["split"] == "test"]
    assert np.array_equal(kept.predict(test["predicted_age"]), [test["low"], test["high"]])
    assert found.coverage["mean_width"].to_numpy() == pytest.approx(2 * kept.quantile_)
    n = int((scans["split"] != "test").sum() if folds else (scans["split"] == "val").sum())
    kind = "out-of-fold" if folds else "validation"
    assert kept.title.startswith(f"75% conformal interval, calibrated on {n} subjects ({kind}); by chance")
    assert found.calibration.corrector.n_subjects_ == n
    assert facts_of_run(read_run(ws, "run"), ws)["training"]["age_mean"] == found.run.reference_age


def test_all_spellings_of_controls_enter_the_correction_and_no_patient_does(tmp_path):
    scans = cohort_frame(300, diagnosis=True)
    ill = scans["diagnosis"] == "AD"
    scans["diagnosis"] = np.where(ill, "AD", np.random.default_rng(0).choice(SPELLINGS, len(scans)))
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "run", scans, simulated(scans))
    val = scans[(scans["split"] == "val") & ~ill]
    assert set(val["diagnosis"]) == set(SPELLINGS)
    assert read_run(ws, "run").calibration_rows()["scan_id"].tolist() == val["scan_id"].tolist()
    evaluation = evaluate_runs(ws, **FEW)
    (said,) = [text for text in evaluation.warnings if text.startswith("Controls are those")]
    counted, others = said.split("; the others (")
    assert all(spelling in counted for spelling in SPELLINGS) and others.startswith(f"AD {ill.sum()})")
    found = evaluation.runs["run"]
    assert found.calibration.corrector.n_subjects_ == len(val)
    (row,) = found.diagnosis.to_dict("records")
    assert row["diagnosis"] == "AD" and row["n_controls"] == ((scans["split"] == "test") & ~ill).sum()


def test_unknown_diagnoses_refuse_the_correction_until_the_cohort_says_who_is_a_control(tmp_path):
    scans = cohort_frame(200, diagnosis=True).replace({"diagnosis": {"control": "0", "AD": "1"}})
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "run", scans, simulated(scans))
    found = evaluate_runs(ws, **FEW)
    assert found.runs["run"].calibration.corrector is None
    (said,) = [text for text in found.warnings if "no age-bias correction" in text]
    assert "(0 23, 1 7)" in said and "Set control_words" in said
    assert found.runs["run"].calibration.interval and found.runs["run"].diagnosis.empty
    cohort = scans.assign(scan_id=scans["scan_id"], image="")
    ruled = apply_rules(cohort, CohortRules(controls_only=False, control_words="0"))
    write_csv(ruled.cohort, ws.path("cohort.csv"))
    rows = read_run(ws, "run").calibration_rows()
    assert set(rows["diagnosis"]) == {"0"} and set(rows["split"]) == {"val"}
    assert evaluate_runs(ws, **FEW).runs["run"].diagnosis["diagnosis"].tolist() == ["1"]


def test_out_of_fold_rows_are_not_called_seen_in_training(tmp_path):
    scans = cohort_frame(100)
    ws = write_workspace(tmp_path, scans)
    write_folded_run(ws, "folded", scans, n_folds=4, mean_rows=True)
    (words,) = other_splits(evaluate_runs(ws, **FEW))["split"]
    assert "did not see the subject" in words


def test_few_validation_subjects_give_warnings_and_infinite_intervals(tmp_path):
    scans = cohort_frame(40)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "small", scans, simulated(scans))
    found = evaluate_runs(ws, **FEW)
    text = " ".join(found.warnings)
    assert np.isinf(found.predictions["high"]).all()
    for part in ("fewer than 40", "nothing is promised", "only 6 subjects judge (test)", "final = True"):
        assert part in text


def test_identical_images_in_two_splits_are_named(tmp_path):
    scans = cohort_frame(100)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "leaky", scans, simulated(scans))
    cleaning = ws.read("cleaning.csv")
    one, other = (scans.loc[scans["split"] == split, "scan_id"].iloc[0] for split in ("train", "test"))
    cleaning.loc[cleaning["scan_id"].isin([one, other]), "sha256"] = "same"
    write_csv(cleaning, ws.path("cleaning.csv"))
    assert any("1 identical image files" in text for text in evaluate_runs(ws, **FEW).warnings)


def test_test_scans_without_prediction_are_counted(tmp_path):
    scans = cohort_frame(100)
    ws = write_workspace(tmp_path, scans)
    some = scans.drop(index=scans.index[scans["split"] == "test"][:4])
    write_run(ws, "partial", some, simulated(some))
    assert any("4 of 15 test scans have no prediction" in text for text in evaluate_runs(ws, **FEW).warnings)


def test_no_run_and_no_test_rows_are_said_plainly(tmp_path):
    scans = cohort_frame(60)
    ws = write_workspace(tmp_path, scans)
    with pytest.raises(MissingInput, match="Run notebook 04 or 05"):
        evaluate_runs(ws)
    untested = scans[scans["split"] != "test"]
    write_run(ws, "untested", untested, simulated(untested))
    with pytest.raises(EvaluationError, match="no test predictions"):
        evaluate_runs(ws, **FEW)


def test_validation_figures_are_too_good_only_where_validation_chose_the_epoch(tmp_path):
    scans = cohort_frame(120)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "chosen", scans, simulated(scans))
    write_run(ws, "last", scans, simulated(scans))
    for name, keep in (("chosen", "best"), ("last", "last")):
        path = ws.run(name) / "settings.json"
        write_json(read_json(path) | {"settings": {"keep": keep}}, path)
    said = [text.split(":")[0] for text in evaluate_runs(ws, **FEW).warnings if "a little too good" in text]
    assert said == ["chosen"]


def test_a_fold_is_calibrated_by_the_others_where_everybody_taught(tmp_path):
    scans = cohort_frame(60)
    ws = write_workspace(tmp_path, scans)
    taught = scans.assign(split="train", fold=np.arange(60) % 5)
    odd = simulated(taught, noise=1.0) + 40 * (taught["fold"] == 0)  # one fold's model is far off
    rows = taught.assign(predicted_age=odd, seed=0, variant="single")
    write_csv(rows[PREDICTION_COLUMNS], write_settings(ws, "final", "single") / "predictions.csv")
    path = ws.path("runs/final/settings.json")
    write_json(read_json(path) | {"final": True}, path)
    found = evaluate_run(read_run(ws, "final"), n_bootstrap=20)
    assert found.run.judged_on == "out_of_fold" and len(found.judged) == 60
    width = (found.rows["high"] - found.rows["low"]).groupby(found.rows["fold"]).first()
    assert width[0] < 30 < width[1]  # fold 0 says nothing about itself
    inside = found.coverage.set_index("group").loc["all", "coverage"]
    assert inside < 0.9 and found.calibration.interval.kind == "out-of-fold"
