"""Pictures of cleaning show every scan or subject once and say what they show."""

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainage_nb.cohort.cleaning_plots import age_histogram, flagged_montage


@pytest.fixture
def ax():
    yield plt.figure().subplots()
    plt.close("all")


def people(n, **columns):
    ids = [f"s{number}" for number in range(n)]
    return pd.DataFrame({"subject_id": ids, "age": np.linspace(20, 79, n)}).assign(**columns)


def heights(ax):
    return sum(bar.get_height() for container in ax.containers for bar in container)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_subject_with_two_scans_counts_once_and_one_without_age_not_at_all(ax):
    cohort = pd.concat([people(10, sex="F"), people(10, sex="F")])
    cohort.loc[cohort["subject_id"] == "s3", "age"] = np.nan
    age_histogram(ax, cohort, by="sex")
    assert heights(ax) == 9
    assert labels(ax) == ["women (n = 9)"]
    assert (ax.get_xlabel(), ax.get_title()) == ("age [years]", "Ages by sex (n = 9 subjects)")


def test_stacked_ages_never_exceed_the_subjects_and_unknown_sex_is_said(ax):
    age_histogram(ax, people(9, sex=["F", "M", ""] * 3), by="sex")
    assert sorted(labels(ax)) == ["men (n = 3)", "not known (n = 3)", "women (n = 3)"]
    assert heights(ax) == 9


def test_many_sites_are_put_together(ax):
    age_histogram(ax, people(30, site=[f"site{n % 10}" for n in range(30)]), by="site")
    assert len(labels(ax)) == 7
    assert labels(ax)[-1] == "other (n = 12)"
    assert heights(ax) == 30


def test_a_cohort_without_the_column_or_without_ages_is_drawn_all_the_same(ax):
    age_histogram(ax, people(4), by="site")
    assert labels(ax) == ["not known (n = 4)"]
    ax.clear()
    age_histogram(ax, people(4, age=np.nan), by="site")
    assert "n = 0" in ax.get_title()


def test_the_montage_shows_rare_findings_first_and_skips_what_cannot_be_read(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        array = rng.normal(100, 10, (8, 9, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([1, 1, 2, 1])), tmp_path / f"{name}.nii")
    cleaning = pd.DataFrame(
        [
            ("a", True, "", "coarse"),
            ("b", True, "", "coarse"),
            ("c", True, "", ""),
            ("gone", False, "missing", ""),
            ("d", False, "label_map", ""),
        ],
        columns=["scan_id", "kept", "reason", "flags"],
    ).assign(image=lambda table: table["scan_id"] + ".nii")
    figure, axes = plt.subplots(1, 4)
    flagged_montage(axes, cleaning, lambda image: tmp_path / image)
    titles = [ax.get_title() for ax in axes]
    assert titles == ["d\ndropped: label_map", "a\nkept: coarse", "b\nkept: coarse", ""]
    assert axes[0].images[0].get_array().shape == (10, 9)
    assert axes[0].get_aspect() == 2
    plt.close(figure)
