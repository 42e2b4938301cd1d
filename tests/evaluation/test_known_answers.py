import numpy as np
import pandas as pd
import pytest

from brainage_nb.demo.cohort import attainable_mae, oracle_mae
from brainage_nb.evaluation.runs import (
    icc,
    read_truth,
    recovered_gap,
    reference_errors,
    two_session_reliability,
    with_truth,
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
    by_scan = with_truth(scans, truth)
    by_session = with_truth(scans, truth.assign(scan_id="other"))
    assert (
        by_scan["planted_gap"].tolist() == scans["gap_planted"].tolist() == by_session["planted_gap"].tolist()
    )


def test_a_gap_recovered_at_half_size_has_slope_one_half(scans):
    rng = np.random.default_rng(0)
    rows = with_truth(scans, truth_of(scans))
    rows["perfect"] = rows["planted_gap"]
    rows["half"] = 0.5 * rows["planted_gap"] + rng.normal(0, 0.5, len(rows))
    found = recovered_gap(rows, {"a": "perfect", "b": "half"}, n_bootstrap=300).set_index("kind")
    assert found.loc["a", ["r", "slope"]].tolist() == pytest.approx([1, 1])
    assert found.loc["b", "slope"] == pytest.approx(0.5, abs=0.03)
    assert found.loc["b", "slope_low"] < 0.5 < found.loc["b", "slope_high"] < 0.6


def test_oracle_and_attainable_are_those_of_notebook_01_on_the_cohort_and_on_any_part_of_it(tmp_path, scans):
    truth = read_truth(write_workspace(tmp_path, scans, demo=True))
    everybody = reference_errors(with_truth(scans, truth), n_bootstrap=100)
    assert everybody["oracle"]["value"] == pytest.approx(oracle_mae(truth))
    assert everybody["attainable"]["value"] == pytest.approx(attainable_mae(truth))
    assert everybody["oracle"]["value"] < everybody["attainable"]["value"] < 6
    test = with_truth(scans[scans["split"] == "test"], truth)
    assert test["attainable"].tolist() == pytest.approx(
        truth.set_index("scan_id").loc[test["scan_id"], "attainable"].tolist()
    )
    assert reference_errors(test, n_bootstrap=100)["attainable"]["n"] == len(test)


def test_a_cohort_too_small_for_the_regression_keeps_its_oracle(tmp_path):
    few = cohort_frame(12)
    truth = read_truth(write_workspace(tmp_path, few, demo=True))
    assert set(reference_errors(with_truth(few, truth), n_bootstrap=10)) == {"oracle"}


def test_icc_equals_the_published_example():
    # Shrout & Fleiss 1979, table 2: six targets, four judges, ICC(2,1) = 0.29
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert icc(np.array(ratings, dtype=float)) == pytest.approx(0.29, abs=0.005)


def test_reliability_needs_ten_subjects_who_came_twice():
    rng = np.random.default_rng(1)
    person = np.repeat(rng.normal(0, 4, 30), 2)
    rows = pd.DataFrame(
        {
            "subject_id": np.repeat(np.arange(30), 2),
            "session_id": np.tile(["1", "2"], 30),
            "gap": person + rng.normal(0, 2, 60),
        }
    )
    found = two_session_reliability(rows, n_bootstrap=200)
    assert found["n_subjects"] == 30
    assert found["icc"]["low"] < 16 / 20 < found["icc"]["high"]
    assert two_session_reliability(rows.head(20), n_bootstrap=20)["n_subjects"] == 10
    assert two_session_reliability(rows.head(18)) is None
