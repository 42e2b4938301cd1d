"""Tables edited by hand after they were used: each edit is named with its file and what to run from."""

import numpy as np
import pandas as pd
import pytest

from brainage_nb.evaluation.evaluate import evaluate_runs
from brainage_nb.evaluation.runs import digest_tables, find_altered, read_run, read_splits
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json
from tests.evaluation.fake_workspace import (
    cohort_frame,
    simulated,
    write_folded_run,
    write_run,
    write_workspace,
)

PREDICTIONS = "runs/resnet18/predictions.csv"


@pytest.fixture
def ws(tmp_path):
    scans = cohort_frame(60)
    made = write_workspace(tmp_path, scans)
    write_run(made, "resnet18", scans, simulated(scans))
    return made


def edit(ws, name, change):
    """Rewrite a table of the workspace as somebody with a spreadsheet would."""
    path = ws.path(name)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


def put(column, value, row=7):
    def change(table):
        table.loc[row, column] = value

    return change


def without(table):
    return table.drop(index=7)


def doubled(table):
    return pd.concat([table, table.loc[[7]]])


def renamed(column):
    return lambda table: table.rename(columns={column: f"{column}_new"})


def add_years(table):
    table.loc[7, "age"] = str(float(table.loc[7, "age"]) + 5)


def move_subject(table):
    table.loc[7, "split"] = "test" if table.loc[7, "split"] == "train" else "train"


DEALT = {
    "age in cohort.csv": ("cohort.csv", add_years, "another age there.*run from 02_data_cleaning"),
    "age in splits.csv": ("splits.csv", add_years, "another age there.*run from 02_data_cleaning"),
    "row removed from cohort.csv": ("cohort.csv", without, "not in cohort.csv.*run from 02_data_cleaning"),
    "row doubled in cohort.csv": ("cohort.csv", doubled, "1 scans stand twice.*01_data_access"),
    "row doubled in splits.csv": ("splits.csv", doubled, "1 scans stand twice.*02_data_cleaning"),
    "split misspelt": ("splits.csv", put("split", "trian"), "split other than .*trian.*02_data_cleaning"),
    "column renamed in splits.csv": ("splits.csv", renamed("fold"), "lacks .*fold.*02_data_cleaning"),
    "fold that is none": ("splits.csv", put("fold", "0.5"), "fold that is no whole number"),
}
PREDICTED = {
    "row removed from splits.csv": ("splits.csv", without, "1 predicted scans are not in splits.csv"),
    "subject moved": ("splits.csv", move_subject, "1 predicted scans differ from splits.csv in split"),
    "prediction of 1e9": (PREDICTIONS, put("predicted_age", "1e9"), "1 scans .*beyond -100 to 250 years"),
    "prediction NaN": (PREDICTIONS, put("predicted_age", "NaN"), "1 scans have no predicted age"),
    "prediction blank": (PREDICTIONS, put("predicted_age", ""), "1 scans have no predicted age"),
    "prediction infinite": (PREDICTIONS, put("predicted_age", "inf"), "1 scans .*beyond -100 to 250 years"),
    "row doubled in predictions": (PREDICTIONS, doubled, "1 scans have the same row twice.*04 or 05"),
    "column renamed in predictions": (PREDICTIONS, renamed("predicted_age"), "no column predicted_age"),
    "true age edited": (PREDICTIONS, add_years, "1 predicted scans differ from splits.csv .* age"),
    "true age blank": (PREDICTIONS, put("age", ""), "1 scans have no age"),
    "split misspelt in predictions": (PREDICTIONS, put("split", "vla"), "split other than .*vla"),
    "fold given to one scan": (PREDICTIONS, put("fold", "3"), "fold"),
}


@pytest.mark.parametrize("name, change, said", DEALT.values(), ids=DEALT)
def test_04_05_and_06_refuse_tables_that_were_edited(ws, name, change, said):
    read_splits(ws), read_run(ws, "resnet18")
    edit(ws, name, change)
    for read in (lambda: read_splits(ws), lambda: read_run(ws, "resnet18")):
        with pytest.raises(ValueError, match=said) as error:
            read()
        assert name in str(error.value)


@pytest.mark.parametrize("name, change, said", PREDICTED.values(), ids=PREDICTED)
def test_06_refuses_what_does_not_fit_its_predictions(ws, name, change, said):
    edit(ws, name, change)
    with pytest.raises(ValueError, match=said) as error:
        read_run(ws, "resnet18")
    assert PREDICTIONS in str(error.value)


def without_a_validation_scan(table):
    return table.drop(index=table.index[table["split"] == "val"][0])


def of_another_run(table):
    table["predicted_age"] = np.linspace(30, 70, len(table)).astype(str)


@pytest.mark.parametrize(
    "change",
    [without_a_validation_scan, of_another_run, put("predicted_age", "41.5"), put("fold", "-1.0"), doubled],
)
def test_predictions_that_the_run_did_not_write_are_refused_whatever_was_edited(ws, change):
    folder = ws.run("resnet18")
    settings = read_json(folder / "settings.json")
    settings |= digest_tables(predictions=read_csv(folder / "predictions.csv"))
    write_json(settings, folder / "settings.json")
    assert find_altered(folder, settings) == [] and len(read_run(ws, "resnet18").predictions)
    edit(ws, PREDICTIONS, change)
    assert find_altered(folder, settings) == ["predictions.csv"]
    with pytest.raises(ValueError, match=r"predictions.csv is not as this run wrote it.*04 or 05"):
        read_run(ws, "resnet18")


def test_scans_without_a_prediction_are_counted_in_every_split(ws):
    edit(ws, PREDICTIONS, without_a_validation_scan)
    assert any(
        "1 of 9 val scans have no prediction" in text for text in evaluate_runs(ws, n_bootstrap=5).warnings
    )


def test_a_fold_changed_in_splits_after_training_is_noticed(tmp_path):
    scans = cohort_frame(60)
    ws = write_workspace(tmp_path, scans)
    write_folded_run(ws, "folded", scans, n_folds=3, mean_rows=True)
    folds = read_run(ws, "folded").predictions.set_index("scan_id")["fold"]
    dealt = scans.assign(fold=scans["scan_id"].map(folds))
    write_workspace(tmp_path, dealt)
    assert read_run(ws, "folded").folds
    edit(
        ws, "splits.csv", lambda table: put("fold", "1" if table.loc[0, "fold"] == "0" else "0", row=0)(table)
    )
    with pytest.raises(ValueError, match=r"1 predicted scans differ from splits\.csv in split, fold or age"):
        read_run(ws, "folded")


def test_splits_of_scans_without_a_volume_are_refused_unless_03_said_why(ws):
    scans = read_splits(ws)["scan_id"].tolist()
    with pytest.raises(ValueError, match=f"{scans[3]}.*03_preprocessing"):
        read_splits(ws, scans[:3] + scans[4:])
    write_csv(pd.DataFrame({"scan_id": [scans[3]]}), ws.path("scans_without_volume.csv"))
    assert len(read_splits(ws, scans[:3] + scans[4:])) == len(scans)
    with pytest.raises(ValueError, match=f"{scans[3]}.*03_preprocessing"):
        read_splits(ws, scans[:3] + scans[4:], "T2w")  # that of the T1w volumes excuses no other modality
    write_csv(pd.DataFrame({"scan_id": [scans[3]]}), ws.path("scans_without_volume_T2w.csv"))
    assert len(read_splits(ws, scans[:3] + scans[4:], "T2w")) == len(scans)
