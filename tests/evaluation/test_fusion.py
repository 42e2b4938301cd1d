import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation.correction import EvaluationError
from brainage_nb.evaluation.evaluate import evaluate_runs, headline_table
from brainage_nb.evaluation.fusion import Combination, fuse_runs
from brainage_nb.evaluation.report import fusion_tables, write_report
from brainage_nb.evaluation.runs import read_run
from brainage_nb.workspace import read_csv, read_json, write_csv
from tests.evaluation.fake_workspace import (
    cohort_frame,
    simulated,
    write_folded_run,
    write_run,
    write_workspace,
)

FEW = {"n_bootstrap": 100}
PAIR = ("resnet18", "resnet18_t2w")


def write_pair(ws, scans, second, keep=slice(None)):
    """A T1 run of everybody, and a second one of those in `keep`."""
    write_run(ws, PAIR[0], scans, simulated(scans, noise=5))
    write_run(ws, PAIR[1], scans.loc[keep], pd.Series(second, scans.index).loc[keep])


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """600 people, 200 of whom have no T2w."""
    scans = cohort_frame(600, twice=10)
    ws = write_workspace(tmp_path_factory.mktemp("partly"), scans, demo=True)
    lacks = scans["subject_id"].isin(sorted(scans["subject_id"])[:200])
    write_pair(ws, scans, simulated(scans, slope=0.6, offset=20, noise=5, seed=9), ~lacks)
    return scans, lacks, evaluate_runs(ws, fuse="resnet18, resnet18_t2w", **FEW)


def test_two_runs_fused_err_less_than_each_on_the_same_people(partly):
    table = partly[2].comparisons.set_index(["a", "b"])
    assert table.loc[("resnet18_t2w", "fused"), "low"] > 0
    same = {row["from"]: row for row in partly[2].results["_fusion"]["parts"]}
    assert same["resnet18"]["gain"]["low"] > 0 and same["resnet18_t2w"]["gain"]["low"] > 0
    assert same["resnet18 + resnet18_t2w"]["gain"]["value"] == 0
    assert headline_table(partly[2].results).index[-1] == "fused, test"


def test_who_lacks_a_scan_is_fused_from_the_rest_and_counted_apart(partly):
    scans, lacks, found = partly
    test = (scans["split"] == "test").to_numpy()
    people = {row["fused_from"]: row for row in found.results["_fusion"]["people"]}
    assert people["resnet18"]["n"] == (lacks & test).sum()
    assert people["resnet18 + resnet18_t2w"]["n"] == (~lacks & test).sum()
    assert people["resnet18"]["half_width"] > people["resnet18 + resnet18_t2w"]["half_width"]
    assert any(
        f"{lacks.sum()} of {len(scans)} scans are fused from resnet18 alone" in text
        for text in found.warnings
    )
    assert len(found.runs["fused"].rows) == len(scans)
    one = found.fusion.rows.query("fused_from == 'resnet18'")
    line = found.fusion.parts["resnet18"].combination
    raw = found.runs["resnet18"].rows.set_index("scan_id")["predicted_age"]
    chosen = one[one["split"] == "test"]
    assert chosen["predicted_age"].to_numpy() == pytest.approx(
        line.intercept + line.weights[0] * raw[chosen["scan_id"]]
    )


def test_each_fused_age_has_the_interval_of_people_like_it(partly):
    rows, parts = partly[2].runs["fused"].rows, partly[2].fusion.parts
    for name, own in rows.groupby("fused_from"):
        half = parts[name].calibration.interval.quantile_
        assert ((own["high"] - own["low"]) / 2).to_numpy() == pytest.approx(half)
    assert partly[2].runs["fused"].coverage.iloc[0]["coverage"] > 0.8


def test_report_card_and_table_name_the_weights_and_the_people(partly):
    folder = write_report(partly[2], [])[0].parent
    page, card = ((folder / name).read_text() for name in ("report.html", "model_card.md"))
    words = partly[2].fusion.whole.combination.words
    assert words.startswith("mean, 0.") and words in page and "Model card: fused" in card
    tables = fusion_tables(partly[2])
    assert {"n", "inside"} & set(tables["people"]) and len(tables["same"]) == 3
    assert read_json(folder / "results.json")["_fusion"]["runs"] == list(PAIR)
    assert set(read_csv(folder / "predictions.csv")["run"]) == {*PAIR, "fused"}


@pytest.mark.parametrize("kind", ["another person's", "of the first run", "noise"])
def test_a_second_run_that_knows_nothing_new_brings_nothing(tmp_path, kind):
    scans = cohort_frame(500)
    ws, rng = write_workspace(tmp_path, scans), np.random.default_rng(4)
    second = {
        "another person's": rng.permutation(simulated(scans, seed=9)),
        "of the first run": 30 + 0.5 * simulated(scans, noise=5),
        "noise": rng.normal(50, 8, len(scans)),
    }[kind]
    write_pair(ws, scans, second)
    found = fuse_runs({name: read_run(ws, name) for name in PAIR})
    alone = {row["from"]: row for row in found.compare_parts(**FEW)}["resnet18"]
    assert abs(alone["gain"]["value"]) < 0.15
    assert not alone["gain"]["low"] > 1e-6
    if kind != "of the first run":
        assert found.whole.combination.shares == (1.0, 0.0)
        assert any(text.startswith("resnet18_t2w takes no part") for text in found.notes)


def test_folded_runs_are_stacked_by_ridge_from_200_people_on(tmp_path):
    scans = cohort_frame(300)
    ws = write_workspace(tmp_path, scans)
    for seed, name in enumerate(PAIR):
        write_folded_run(ws, name, scans, n_folds=4, mean_rows=True, seed=seed)
    # folds may differ: each age out of fold is of models that had not seen the person
    found = fuse_runs({name: read_run(ws, name) for name in PAIR})
    combination = found.whole.combination
    assert combination.kind == "ridge" and combination.n_subjects == (scans["split"] != "test").sum()
    assert sum(combination.shares) == pytest.approx(1, abs=0.15)
    assert found.whole.calibration.interval.kind == "out-of-fold"


def test_of_those_who_calibrate_nobodys_own_age_fuses_their_age(tmp_path):
    scans = cohort_frame(200)
    ws = write_workspace(tmp_path, scans)
    for seed, name in enumerate(PAIR):
        write_folded_run(ws, name, scans, n_folds=4, mean_rows=True, seed=seed)
    runs = {name: read_run(ws, name) for name in PAIR}
    before = fuse_runs(runs).whole.run.part("out_of_fold").set_index("scan_id")
    person = before.index[0]
    for run in runs.values():
        run.predictions.loc[run.predictions["scan_id"] == person, "age"] += 30
    after = fuse_runs(runs).whole.run.part("out_of_fold").set_index("scan_id")
    moved = (after["predicted_age"] - before["predicted_age"]).abs()
    assert moved[person] < 1e-9 < moved.drop(person).max()


def test_another_split_is_refused_with_the_person_and_both_splits(tmp_path):
    scans = cohort_frame(100)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, PAIR[0], scans, simulated(scans))
    write_folded_run(ws, PAIR[1], scans, n_folds=4, mean_rows=True)
    with pytest.raises(
        EvaluationError, match=r"\d{4} is (train|val) in resnet18 and out of fold in resnet18_t2w"
    ):
        evaluate_runs(ws, fuse=PAIR, **FEW)


@pytest.mark.parametrize(
    ("fuse", "sentence"),
    [
        ("resnet18", "expected two to 6 different runs"),
        ("resnet18,resnet18", "expected two to 6 different runs"),
        (",".join(PAIR), r"2 people of the validation scans .* from all of resnet18 \+ resnet18_t2w"),
    ],
)
def test_what_cannot_be_fused_is_said(tmp_path, fuse, sentence):
    scans = cohort_frame(200)
    ws = write_workspace(tmp_path, scans)
    few = scans["split"].eq("val") & ~scans["subject_id"].isin(
        scans.query("split == 'val'")["subject_id"].head(2)
    )
    write_pair(ws, scans, simulated(scans, seed=9), ~few)
    with pytest.raises(EvaluationError, match=sentence):
        evaluate_runs(ws, fuse=fuse, **FEW)


def test_the_mean_weighs_by_what_each_run_errs_alone():
    rng, age = np.random.default_rng(0), pd.Series(np.linspace(20, 80, 150))
    ages = pd.DataFrame({"a": age + rng.normal(0, 4, 150), "b": age + rng.normal(0, 8, 150)})
    found = Combination.fit(ages, age)
    assert found.kind == "mean" and found.shares[0] == pytest.approx(0.8, abs=0.06)
    assert np.abs(found.predict(ages) - age).mean() < np.abs(ages["a"] - age).mean()


def test_a_scan_that_one_site_alone_has_is_fused_where_each_fold_is_a_site(tmp_path):
    scans = cohort_frame(300)
    scans["site"] = np.resize(["A", "B", "C"], len(scans))
    scans["fold"] = scans["site"].map({"A": 0, "B": 1, "C": 2}).where(scans["split"] != "test", -1)
    ws = write_workspace(tmp_path, scans)
    for seed, (name, rows) in enumerate(zip(PAIR, (scans, scans[scans["site"] == "A"]), strict=True)):
        write_run(ws, name, rows, simulated(rows, seed=seed))
        write_csv(
            read_csv(ws.run(name) / "predictions.csv").assign(fold=rows["fold"].to_numpy()),
            ws.run(name) / "predictions.csv",
        )
    found = fuse_runs({name: read_run(ws, name) for name in PAIR})
    assert found.whole.combination.n_subjects == (scans["site"].eq("A") & scans["split"].ne("test")).sum()
    assert found.rows["predicted_age"].notna().all()


def test_a_run_called_fused_is_not_overwritten(tmp_path):
    scans = cohort_frame(200)
    ws = write_workspace(tmp_path, scans)
    write_pair(ws, scans, simulated(scans, seed=9))
    write_run(ws, "fused", scans, simulated(scans, seed=5))
    with pytest.raises(EvaluationError, match="runs/fused is a training run, whose place and name"):
        evaluate_runs(ws, "resnet18", fuse=PAIR, **FEW)
