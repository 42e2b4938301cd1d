"""Splits: subjects stay whole, ages are spread, and nobody moves once dealt."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from brainage_nb.cohort.splits import (
    COLUMNS,
    check_splits,
    deal_everybody,
    deal_folds,
    deal_splits,
    plot_splits,
    site_table,
    split_table,
)
from brainage_nb.demo.cohort import draw_truth


def scans_of(n_subjects, *, seed=0, sessions=1, first=0):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(first, first + n_subjects):
        age = rng.uniform(20, 86)
        for session in range(sessions):
            scan = f"s{number:03d}_{session}"
            rows.append((scan, f"s{number:03d}", str(session), f"{scan}.nii.gz", age + session, "F", "A"))
    return pd.DataFrame(rows, columns=["scan_id", "subject_id", "session_id", "image", "age", "sex", "site"])


def split_of(splits):
    return splits.groupby("subject_id")["split"].first()


def test_hundred_subjects_are_dealt_70_15_15():
    counts = deal_splits(scans_of(100))["split"].value_counts()
    assert counts.to_dict() == {"train": 70, "val": 15, "test": 15}


def test_a_subject_with_two_sessions_is_in_one_split_and_one_fold():
    splits = deal_splits(scans_of(40, sessions=2), folds=5)
    by_subject = splits.groupby("subject_id")[["split", "fold"]].nunique()
    assert len(splits) == 80
    assert (by_subject == 1).all(axis=None)


def test_all_visits_of_a_followed_person_of_the_demo_are_in_one_split_and_one_fold():
    scans = draw_truth(80, 1, voxel_mm=2, followed=0.8, rate_sd=0.4)
    scans["image"] = scans["scan_id"] + ".nii.gz"
    assert scans.groupby("subject_id").size().max() == 4
    splits = deal_splits(scans, folds=5)
    assert len(splits) == len(scans)
    by_subject = splits.groupby("subject_id")[["split", "fold"]].nunique()
    assert (by_subject == 1).all(axis=None)


@pytest.mark.parametrize("seed", range(8))
def test_each_split_spans_the_age_range(seed):
    scans = scans_of(60)
    ages = deal_splits(scans, seed=seed).groupby("split")["age"]
    fifth = (scans["age"].max() - scans["age"].min()) / 5
    assert (ages.min() < scans["age"].min() + fifth).all()
    assert (ages.max() > scans["age"].max() - fifth).all()
    assert np.ptp(ages.mean()) < 8


def test_the_same_seed_deals_alike_whatever_the_order_of_rows_and_another_seed_deals_differently():
    scans = scans_of(50).round({"age": -1})  # many equal ages
    once = split_of(deal_splits(scans, seed=3))
    shuffled = split_of(deal_splits(scans.sample(frac=1, random_state=1), seed=3))
    pd.testing.assert_series_equal(once, shuffled)
    assert (once != split_of(deal_splits(scans, seed=4))).any()


def test_rows_keep_their_order_and_the_columns_of_the_table():
    scans = scans_of(30).drop(columns=["sex"]).sample(frac=1, random_state=0)
    splits = deal_splits(scans)
    assert list(splits) == list(COLUMNS)
    assert list(splits["scan_id"]) == list(scans["scan_id"])
    assert (splits["sex"] == "").all()


def test_equal_ages_are_dealt_too():
    splits = deal_splits(scans_of(20).assign(age=50.0))
    assert splits["split"].value_counts().to_dict() == {"train": 14, "val": 3, "test": 3}


def test_adding_ten_subjects_moves_nobody_and_keeps_the_shares():
    old = deal_splits(scans_of(90), folds=5, seed=1)
    new = deal_splits(
        pd.concat([scans_of(90), scans_of(10, seed=9, first=90)]), folds=5, seed=2, existing=old
    )
    kept = new[new["scan_id"].isin(old["scan_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, old)
    assert new["split"].value_counts().to_dict() == {"train": 70, "val": 15, "test": 15}


def test_subjects_added_one_by_one_do_not_all_end_in_training():
    splits = deal_splits(scans_of(20))
    for number in range(21, 41):
        splits = deal_splits(scans_of(number), existing=splits)
    assert splits["split"].value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}


def test_subjects_that_are_gone_are_left_out_and_the_rest_stay():
    old = deal_splits(scans_of(60))
    new = deal_splits(scans_of(60).iloc[10:], existing=old)
    assert len(new) == 50
    assert (split_of(new) == split_of(old)[split_of(new).index]).all()


def test_another_number_of_folds_deals_folds_anew_and_moves_no_split():
    old = deal_splits(scans_of(60), folds=5)
    new = deal_splits(scans_of(60), folds=3, existing=old)
    assert (new["split"] == old["split"]).all()
    assert set(new.loc[new["split"] != "test", "fold"]) == {0, 1, 2}


def test_folds_cover_train_and_val_evenly_and_never_test():
    splits = deal_splits(scans_of(100), folds=5)
    assert (splits.loc[splits["split"] == "test", "fold"] == -1).all()
    assert splits.loc[splits["split"] != "test", "fold"].value_counts().eq(17).all()
    assert np.ptp(splits[splits["fold"] >= 0].groupby("fold")["age"].mean()) < 5


def test_without_folds_the_fold_is_minus_one_everywhere():
    assert (deal_splits(scans_of(12))["fold"] == -1).all()
    with_folds = deal_splits(scans_of(12), folds=2)
    assert (deal_splits(scans_of(12), existing=with_folds)["fold"] == -1).all()


def test_folds_by_site_are_the_sites_and_never_test():
    scans = scans_of(60, sessions=2)
    scans["site"] = scans["subject_id"].str[-1].map(lambda last: "north" if last < "5" else "east")
    with pytest.raises(ValueError, match=r"at least 3 sites .* there are east 27, north 24"):
        deal_splits(scans, folds_by="site")
    scans.loc[scans["subject_id"] < "s020", "site"] = "a new one"
    splits = deal_splits(scans, folds_by="site", existing=deal_splits(scans, folds=5))
    dealt = splits[splits["split"] != "test"].groupby("site")["fold"].unique().map(list)
    assert dealt.to_dict() == {"a new one": [0], "east": [1], "north": [2]}
    assert (splits.loc[splits["split"] == "test", "fold"] == -1).all()
    with pytest.raises(ValueError, match="not known 1"):
        deal_splits(scans.assign(site=scans["site"].mask(scans["subject_id"] == "s030", "")), folds_by="site")


def test_sites_are_counted_by_age_and_people_once():
    scans = scans_of(30, sessions=2).assign(site="A")
    scans.loc[scans["subject_id"] < "s010", "site"] = ""
    table = site_table(scans)
    assert table["subjects"].to_dict() == {"A": 20, "not known": 10}
    decades = table.drop(columns=["subjects", "mean_age"])
    assert (decades.sum(axis=1) == table["subjects"]).all() and "20-29" in decades


def test_new_subjects_fill_the_smallest_folds():
    age = pd.Series([30.0, 40.0], index=["a", "b"])
    assert set(deal_folds(age, 3, sizes=np.array([5, 4, 4]))) == {1, 2}


def test_three_subjects_fill_three_splits_and_two_are_refused():
    assert sorted(deal_splits(scans_of(3))["split"]) == ["test", "train", "val"]
    with pytest.raises(ValueError, match="2 subjects leave test empty"):
        deal_splits(scans_of(2))


def test_more_folds_than_subjects_are_refused():
    with pytest.raises(ValueError, match="folds = 9: expected 0"):
        deal_splits(scans_of(6), folds=9)


def test_a_share_of_zero_gets_nobody():
    assert set(deal_splits(scans_of(20), fractions=(0.8, 0.2, 0.0))["split"]) == {"train", "val"}


def test_fractions_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        deal_splits(scans_of(20), fractions=(0.7, 0.2, 0.2))


def test_a_scan_without_age_is_refused_by_name():
    scans = scans_of(10)
    scans.loc[4, "age"] = np.nan
    with pytest.raises(ValueError, match="s004_0"):
        deal_splits(scans)


def test_a_table_with_a_subject_in_two_splits_is_refused_by_name():
    splits = deal_splits(scans_of(20, sessions=2))
    first = splits.index[splits["split"] == "train"][0]
    splits.loc[first, "split"] = "test"
    with pytest.raises(ValueError, match=splits.loc[first, "subject_id"]):
        check_splits(splits)
    with pytest.raises(ValueError, match="two splits"):
        deal_splits(scans_of(20, sessions=2), existing=splits)


def test_a_table_with_one_image_under_two_subjects_in_two_splits_is_refused():
    splits = deal_splits(scans_of(20))
    train, test = (splits.index[splits["split"] == name][0] for name in ("train", "test"))
    splits.loc[test, "image"] = splits.loc[train, "image"]
    with pytest.raises(ValueError, match="image files are in two splits"):
        check_splits(splits)


def edit(table, column, value, split="train"):
    """The table with another value in one row of a split."""
    table = table.astype({column: object})
    table.loc[table.index[table["split"] == split][0], column] = value
    return table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: edit(t, "split", "tarin"), "1 scans have a split other .*tarin"),
        (lambda t: edit(t, "split", np.nan), "1 scans have a split other"),
        (lambda t: t.drop(columns="fold"), "lacks the columns ..fold"),
        (lambda t: pd.concat([t, t.head(1)]), "1 scans stand twice: s000_0"),
        (lambda t: edit(t, "fold", 1.5), "fold that is no whole number"),
        (lambda t: edit(t, "fold", "x"), "fold that is no whole number"),
        (lambda t: edit(t, "fold", 0, split="test"), "in test and in a fold"),
        (lambda t: edit(t, "fold", 1), "have no fold, and others have one"),
        (lambda t: edit(t, "age", ""), "1 scans have no age"),
        (lambda t: t.assign(scan_id=t["scan_id"].replace("s003_0", "s003")), "1 of 10 .*: s003[.]"),
        (lambda t: t[t["split"] != "val"], "no scan in val"),
        (lambda t: t.head(0), "no scan in train and val"),
    ],
)
def test_an_edited_split_table_is_refused_with_the_file_and_the_notebook(change, said):
    splits = deal_splits(scans_of(10))
    check_splits(splits, splits["scan_id"])
    with pytest.raises(ValueError, match=said) as refused:
        check_splits(change(splits), splits["scan_id"])
    assert "splits.csv" in str(refused.value)
    assert re.search("run from 0[23]_|Run from 03_", str(refused.value))


def test_with_folds_nobody_needs_to_validate_and_a_run_is_told_to_train_again():
    splits = deal_splits(scans_of(10), folds=2).replace({"split": {"val": "train"}})
    assert check_splits(splits, splits["scan_id"]) is splits
    with pytest.raises(ValueError, match=r"runs/x/predictions.csv.*Run the training notebook"):
        check_splits(splits, splits["scan_id"][1:], "runs/x/predictions.csv")


def test_the_table_of_splits_counts_subjects_not_scans():
    table = split_table(deal_splits(scans_of(20, sessions=2)))
    assert table["subjects"].to_dict() == {"train": 14, "val": 3, "test": 3}
    assert table["scans"].sum() == 40
    assert (table["women_percent"] == 100).all()


def test_the_figure_shows_every_subject_once_and_names_its_axis():
    ax = plt.figure().subplots()
    plot_splits(ax, deal_splits(scans_of(20, sessions=2)))
    assert sum(len(points.get_offsets()) for points in ax.collections) == 20
    assert ax.get_xlabel() == "age [years]"
    assert "n = 20" in ax.get_title()
    plt.close("all")


def test_final_does_not_undo_folds_that_are_sites():
    scans = scans_of(60).assign(site=[f"site {n % 3}" for n in range(60)])
    with pytest.raises(ValueError, match=r"each fold is a site .* with folds = 3 in notebook 04"):
        deal_everybody(deal_splits(scans, folds_by="site"), 5)
    again = deal_splits(scans, folds=3, existing=deal_splits(scans, folds_by="site"))
    assert again[again["fold"] >= 0].groupby("fold")["site"].nunique().min() > 1  # as the sentence promises
    assert (deal_everybody(again, 5)["split"] == "train").all()
