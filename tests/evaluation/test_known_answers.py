import numpy as np
import pytest

from brainage_nb.demo.cohort import attainable_mae, oracle_mae
from brainage_nb.evaluation.runs import (
    add_truth,
    read_truth,
    recovered_gap,
    reference_errors,
)
from tests.evaluation.fake_workspace import cohort_frame, truth_of, write_workspace


@pytest.fixture
def scans():
    return cohort_frame(300, twice=12)


def test_the_truth_is_found_in_the_workspace_or_where_named(tmp_path, scans):
    ws = write_workspace(tmp_path, scans, demo=True)
    assert len(read_truth(ws)) == len(scans)
    elsewhere = tmp_path / "elsewhere.csv"
    (tmp_path / "demo" / "truth.csv").rename(elsewhere)
    assert read_truth(ws) is None
    assert len(read_truth(ws, elsewhere)) == len(scans)


def test_truth_is_matched_by_scan_or_else_by_subject_and_session(scans):
    truth = truth_of(scans)
    by_scan = add_truth(scans, truth)
    by_session = add_truth(scans, truth.assign(scan_id="other"))
    assert (
        by_scan["planted_gap"].tolist() == scans["gap_planted"].tolist() == by_session["planted_gap"].tolist()
    )


def test_a_gap_recovered_at_half_size_has_slope_one_half(scans):
    rng = np.random.default_rng(0)
    rows = add_truth(scans, truth_of(scans))
    rows["perfect"] = rows["planted_gap"]
    rows["half"] = 0.5 * rows["planted_gap"] + rng.normal(0, 0.5, len(rows))
    found = recovered_gap(rows, {"a": "perfect", "b": "half"}, n_bootstrap=300).set_index("kind")
    assert found.loc["a", ["r", "slope"]].tolist() == pytest.approx([1, 1])
    assert found.loc["b", "slope"] == pytest.approx(0.5, abs=0.03)
    assert found.loc["b", "slope_low"] < 0.5 < found.loc["b", "slope_high"] < 0.6


def test_oracle_and_attainable_are_those_of_notebook_01_on_the_cohort_and_on_any_part_of_it(tmp_path, scans):
    truth = read_truth(write_workspace(tmp_path, scans, demo=True))
    everybody = reference_errors(add_truth(scans, truth), n_bootstrap=100)
    assert everybody["oracle"]["value"] == pytest.approx(oracle_mae(truth))
    assert everybody["attainable"]["value"] == pytest.approx(attainable_mae(truth))
    assert everybody["oracle"]["value"] < everybody["attainable"]["value"] < 6
    test = add_truth(scans[scans["split"] == "test"], truth)
    assert test["attainable"].tolist() == pytest.approx(
        truth.set_index("scan_id").loc[test["scan_id"], "attainable"].tolist()
    )
    assert reference_errors(test, n_bootstrap=100)["attainable"]["n"] == len(test)


def test_a_cohort_too_small_for_the_regression_keeps_its_oracle(tmp_path):
    few = cohort_frame(12)
    truth = read_truth(write_workspace(tmp_path, few, demo=True))
    assert set(reference_errors(add_truth(few, truth), n_bootstrap=10)) == {"oracle"}
