import numpy as np
import pandas as pd
import pytest

from brainage_nb.drawing import new_figure
from brainage_nb.evaluation import plots
from brainage_nb.evaluation.correction import coverage
from brainage_nb.evaluation.metrics import regression_metrics

LABELS = ("title", "x", "y")


@pytest.fixture
def ax():
    return new_figure()[1]


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 86, 40)
    return age, age + rng.normal(0, 5, 40)


def test_predicted_against_true_names_n_mae_and_r_and_draws_both_references(ax, made):
    age, predicted = made
    metrics = regression_metrics(age, predicted, reference_age=50.0, n_bootstrap=50)
    assert (
        plots.draw_predicted_vs_true(age, predicted, metrics, name="model", reference_age=50.0, ax=ax) is ax
    )
    title = ax.get_title()
    assert (
        "n = 40 scans of 40 subjects" in title
        and "MAE" in title
        and "r " in title
        and "mean predictor" in title
    )
    identity, mean = ax.get_lines()
    assert np.array_equal(identity.get_xdata(), identity.get_ydata())
    assert set(mean.get_ydata()) == {50.0}
    assert ax.get_xlabel() == "true age [years]" and ax.get_ylabel() == "predicted age [years]"


def test_intervals_are_drawn_inside_the_axes_and_left_out_where_infinite(ax, made):
    age, predicted = made
    metrics = regression_metrics(age, predicted, n_bootstrap=0)
    narrow = new_figure()[1]
    ends = (0 * predicted + 50 - 1, 0 * predicted + 50 + 1)
    plots.draw_predicted_vs_true(age, 0 * predicted + 50, metrics, interval=ends, level=0.7, ax=narrow)
    assert narrow.get_xlim()[0] < age.min() and narrow.get_xlim()[1] > age.max()  # nobody is cut off
    assert "70% interval" in [text.get_text() for text in narrow.get_legend().get_texts()]
    plots.draw_predicted_vs_true(age, predicted, metrics, interval=(predicted - 30, predicted + 30), ax=ax)
    assert ax.get_ylim()[1] > (predicted + 30).max() and len(ax.collections) == 2
    other = new_figure()[1]
    endless = np.full(40, np.inf)
    plots.draw_predicted_vs_true(age, predicted, metrics, interval=(-endless, endless), ax=other)
    assert len(other.collections) == 1 and np.isfinite(other.get_ylim()).all()


def test_the_line_through_gaps_has_their_slope(ax):
    age = np.linspace(20, 80, 30)
    plots.draw_points_and_line(
        age, 5 - 0.3 * (age - 50), words="{slope:+.2f} years per year of age", labels=LABELS, zero=True, ax=ax
    )
    assert "-0.30 years per year of age" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_training_curves_of_folds_are_one_legend_entry(ax):
    history = pd.DataFrame(
        {
            "epoch": [0, 1, 0, 1],
            "fold": [0, 0, 1, 1],
            "train_loss": [4.0, 3, 4, 2],
            "val_loss": [5.0, 4, 5, 3],
        }
    )
    plots.draw_training_curve(history, ["train_loss", "val_loss"], title="loss", ylabel="loss", ax=ax)
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [[1, 2]] * 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train loss", "val loss"]


def test_coverage_estimates_and_planted_gaps_are_drawn(made):
    age, predicted = made
    figure, axes = new_figure(3)
    inside, shares = coverage(age, predicted - 9, predicted + 9), ("coverage", "share inside")
    plots.draw_estimates(inside, "coverage", inside["group"], labels=shares, mark=0.9, ax=axes[0])
    assert axes[0].get_lines()[0].get_xdata().tolist() == inside["coverage"].tolist()
    assert set(axes[0].get_lines()[1].get_xdata()) == {0.9}
    table = pd.DataFrame({"mae": [1.0, 2], "mae_low": [0.5, np.nan], "mae_high": [2, np.nan]})
    plots.draw_estimates(table, "mae", ["a", "b"], labels=("two", "MAE [years]"), ax=axes[1])
    plots.draw_points_and_line(age - 50, 0.5 * (age - 50), labels=LABELS, ax=axes[2])
    assert [text.get_text() for text in axes[1].get_yticklabels()] == ["a", "b"]
    x, y = axes[2].get_lines()[1].get_data()
    assert np.diff(y) / np.diff(x) == pytest.approx(0.5)
    figure.draw_without_rendering()


def test_the_line_of_the_correction_lies_on_its_points(ax, made):
    age, _ = made
    words = "{intercept:.1f} + {slope:.2f} × age"
    plots.draw_points_and_line(age, 15 + 0.7 * age, line=(15.0, 0.7), words=words, labels=LABELS, ax=ax)
    points, (identity, line) = ax.collections[0].get_offsets(), ax.get_lines()
    assert np.array_equal(identity.get_xdata(), identity.get_ydata())
    assert np.interp(points[:, 0], *line.get_data()) == pytest.approx(points[:, 1])
    assert line.get_label() == "15.0 + 0.70 × age"


def test_a_figure_is_written_as_png(tmp_path, made):
    figure, ax = new_figure()
    plots.draw_points_and_line(*made, labels=LABELS, ax=ax)
    path = plots.ReportFigure("gap", "bias", figure, "").save(tmp_path / "figures")
    assert path.name == "gap.png" and path.read_bytes().startswith(b"\x89PNG")
