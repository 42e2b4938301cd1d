"""Pictures of the VGG16 + SVR baseline: arrays and tables in, an Axes back. Accuracy: evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.evaluation.plots import legend_under

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"  # Okabe-Ito, and a grey


def plot_triplet(image: np.ndarray, position: int, ax: Axes) -> Axes:
    """One triplet as the network sees it: (3, height, width), values 0 to 1, slices as red, green, blue."""
    ax.imshow(np.moveaxis(image, 0, -1), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"triplet {position}", fontsize=10)
    return ax


def plot_present(present: np.ndarray, used: np.ndarray, ax: Axes) -> Axes:
    """At how many scans each triplet position shows brain: `present` is bool (scans, positions)."""
    share = 100 * present.mean(axis=0)
    positions = np.arange(present.shape[1])
    colours = np.where(np.isin(positions, used), BLUE, "#BBBBBB")
    ax.bar(positions, share, color=colours)
    ax.set(xlabel="triplet position (0 is lowest)", ylabel="scans showing brain [%]", ylim=(0, 100))
    ax.set_title(f"Where the brain lies: {len(used)} positions in use (blue), n = {len(present)} scans")
    return ax


def plot_grid(grid: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Inner cross-validated MAE over C, a line an epsilon: `variant, C, epsilon, mae` (years)."""
    styles = {"early": (BLUE, "o"), "late": (ORANGE, "s")}
    dashes = ("-", "--", ":")
    for variant, (colour, marker) in styles.items():
        rows = grid[grid["variant"] == variant]
        for dash, (epsilon, line) in zip(dashes, rows.groupby("epsilon"), strict=False):
            label = f"{'one early SVR' if variant == 'early' else 'mean late SVR'}, epsilon {epsilon:g} y"
            ax.plot(line["C"], line["mae"], dash, color=colour, marker=marker, label=label)
    ax.set(
        xscale="log", xlabel="C (kernel with mean diagonal 1)", ylabel="MAE, inner cross-validation [years]"
    )
    legend_under(ax, ncols=2)
    ax.set_title(
        f"Choosing the SVR's C and epsilon (lowest is best) on training subjects\n{title}", fontsize=10
    )
    return ax


def plot_positions(by_position: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Validation score of each triplet's own SVR and its weight: `position, n_scans, mae, weight`."""
    ax.bar(by_position["position"], by_position["mae"], color=BLUE, label="MAE of this triplet alone")
    ax.set(xlabel="triplet position (0 is lowest)", ylabel="MAE, inner cross-validation [years]")
    weight = ax.twinx()
    weight.plot(by_position["position"], by_position["weight"], "s-", color=ORANGE, label="weight (right)")
    weight.set(ylabel="weight in the combined age", ylim=(0, max(0.05, 1.3 * by_position["weight"].max())))
    handles = [*ax.get_legend_handles_labels()[0], *weight.get_legend_handles_labels()[0]]
    legend_under(ax, handles)
    n_scans = int(by_position["n_scans"].max())
    ax.set_title(f"What each height knows about age, n = {n_scans} training scans\n{title}", fontsize=10)
    return ax


def plot_contributions(contributions: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Years each triplet adds to one scan's age: `position, years`."""
    years = contributions["years"]
    ax.barh(contributions["position"], years, color=np.where(years >= 0, ORANGE, BLUE))
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set(xlabel="contribution [years]", ylabel="triplet position (0 is lowest)", title=title)
    return ax
