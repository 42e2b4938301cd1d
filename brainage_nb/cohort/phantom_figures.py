"""Pictures of the known-answer cohort: heads by age, and what each planted parameter does with age.

Only for this cohort: slices are found from the truth, which real scans do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd

from brainage_nb.cohort.phantom import image_path
from brainage_nb.cohort.phantom_scan import place_scan
from brainage_nb.cohort.phantom_subject import ANATOMY, OLDEST, YOUNGEST, planted_anatomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_MM = (4.0, -14.0, 14.0)  # MNI152 point whose three slices are shown: they cut the lateral ventricles
AXIS_LABELS = {
    "ventricle_mm": "ventricle widening [mm]",
    "sulcal_opening": "sulcal opening [share]",
    "grey_white_contrast": "grey-white contrast [ratio]",
    "lesions": "lesion extent [share]",
}
BLUE, BLACK = "#0072B2", "#000000"


@dataclass(frozen=True)
class ShownHead:
    """One head to draw: RAS array, voxel edges in mm, the voxel whose three slices are shown, a title."""

    image: np.ndarray
    voxel_size: np.ndarray
    centre: np.ndarray
    title: str


def heads_by_age(folder: Path | str, truth: pd.DataFrame, n: int = 5) -> list[ShownHead]:
    """Read n scans of a cohort, youngest to oldest, evenly spread over its scans.

    Parameters
    ----------
    folder : path
        Where `make_cohort` wrote.
    truth : DataFrame
        Its `truth.csv`.
    n : int
        Number of heads, at most one a scan.
    """
    ordered = truth.sort_values("age")
    chosen = ordered.iloc[np.linspace(0, len(ordered) - 1, min(n, len(ordered))).round().astype(int)]
    return [_shown(Path(folder), row) for row in chosen.to_dict("records")]


def _shown(folder: Path, row: dict[str, object]) -> ShownHead:
    image = nib.as_closest_canonical(nib.load(folder / image_path(row)))
    _, _, to_template = place_scan(row)
    centre = np.linalg.solve(to_template, [*SHOWN_MM, 1.0])[:3].round().astype(int)
    title = f"age {row['age']:.0f}, brain age {row['brain_age']:.0f}\nsite {row['site']}"
    return ShownHead(np.asanyarray(image.dataobj), np.array(image.header.get_zooms()), centre, title)


def plot_head(head: ShownHead, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Draw a head's axial, coronal and sagittal slice on three Axes, in mm, front or crown upwards."""
    brightest = np.percentile(head.image, 99.5)
    for ax, across in zip(axes, (2, 1, 0), strict=True):
        shown = [axis for axis in range(3) if axis != across]
        width, height = (head.image.shape[axis] * head.voxel_size[axis] for axis in shown)
        slice_ = np.take(head.image, head.centre[across], axis=across).T
        ax.imshow(slice_, origin="lower", cmap="gray", vmin=0, vmax=brightest, extent=(0, width, 0, height))
        ax.set_axis_off()
    axes[0].set_title(head.title, fontsize=9)
    return axes


def plot_planted(truth: pd.DataFrame, parameter: str, ax: Axes) -> Axes:
    """Draw one planted parameter against age: a point a scan, and the curve that a gap of zero follows."""
    age = np.linspace(YOUNGEST, OLDEST, 100)
    ax.scatter(truth["age"], truth[parameter], s=8, alpha=0.6, color=BLUE, linewidths=0)
    ax.plot(age, planted_anatomy(age)[parameter], color=BLACK, linewidth=1.5)
    ax.set_xlabel("age [years]")
    ax.set_ylabel(AXIS_LABELS[parameter].replace(" [", "\n["))
    return ax


def planted_figure(heads: Sequence[ShownHead], truth: pd.DataFrame, figure: Figure) -> Figure:
    """Heads by age in three planes over what each planted parameter does with age.

    Parameters
    ----------
    heads : sequence of ShownHead
        As `heads_by_age` gives them.
    truth : DataFrame
        The cohort's `truth.csv`.
    figure : Figure
        Empty, about 11 x 10 inches, with `layout="constrained"`; it is filled and returned.
    """
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    above.suptitle(f"Known-answer cohort: {len(heads)} of {len(truth)} invented heads, by age")
    for head, column in zip(heads, above.subplots(3, len(heads), squeeze=False).T, strict=True):
        plot_head(head, column)
    below.suptitle(f"What is planted (points: n = {len(truth)} scans; line: mean at brain age = age)")
    for parameter, ax in zip(ANATOMY, below.subplots(1, len(ANATOMY)), strict=True):
        plot_planted(truth, parameter, ax)
    return figure
