"""Figures of volumes: three planes, one row per preprocessing step, a montage of a cohort, brains outlined.

All volumes are RAS and are shown as radiology workstations do: the head's left is on the picture's right,
front and crown are up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.volumes.brain import find_brain
from brainage_nb.volumes.preprocessing import grid_affine, preprocess
from brainage_nb.volumes.scans import ScanError, load_scan
from brainage_nb.volumes.settings import PreprocessingSettings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = ("sagittal", "coronal", "axial")
OUTLINE = "#56B4E9"
GREY_RANGE = (1.0, 99.5)  # percentiles shown as black and white


def plane(
    volume: np.ndarray, name: str, position: float = 0.5, voxel_size: Sequence[float] = (1, 1, 1)
) -> tuple[np.ndarray, float]:
    """Cut one slice, turned for display.

    Parameters
    ----------
    volume : (x, y, z) array
        RAS.
    name : str
        sagittal, coronal or axial.
    position : float
        Where along the cut axis, from 0 (left, back, bottom) to 1.
    voxel_size : three floats
        mm.

    Returns
    -------
    picture : 2-D array
        Rows from top to bottom. Coronal and axial: the head's left at the picture's right. Sagittal: front at
        the picture's left.
    aspect : float
        Height over width of a pixel, for `imshow`.
    """
    if name not in PLANES:
        raise ValueError(f"plane {name!r}: expected one of {', '.join(PLANES)}.")
    axis = PLANES.index(name)
    index = round(position * (volume.shape[axis] - 1))
    across, up = (size for other, size in enumerate(voxel_size) if other != axis)
    return np.take(volume, index, axis=axis)[::-1, ::-1].T, float(up / across)


def show_plane(
    volume: np.ndarray,
    name: str,
    ax: Axes,
    *,
    voxel_size: Sequence[float] = (1, 1, 1),
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw the middle slice in grey; `limits` are the values shown black and white, else percentiles."""
    low, high = limits or np.percentile(volume, GREY_RANGE)
    picture, aspect = plane(volume, name, voxel_size=voxel_size)
    ax.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def three_planes(
    volume: np.ndarray, axes: Sequence[Axes], *, voxel_size: Sequence[float] = (1, 1, 1), sides: bool = True
) -> Sequence[Axes]:
    """Draw the middle sagittal, coronal and axial slice of a RAS volume on three axes.

    Parameters
    ----------
    volume : (x, y, z) array
    axes : three Axes
    voxel_size : three floats
        mm.
    sides : bool
        Whether to mark the head's left and right.
    """
    limits = tuple(np.percentile(volume, GREY_RANGE))
    for name, ax in zip(PLANES, axes, strict=True):
        show_plane(volume, name, ax, voxel_size=voxel_size, limits=limits)
    for ax in axes[1:] if sides else ():
        for x, text, side in ((0.03, "R", "left"), (0.97, "L", "right")):
            ax.text(x, 0.5, text, transform=ax.transAxes, color="#E69F00", ha=side, va="center", fontsize=9)
    return axes


def steps_figure(steps: Sequence[tuple[str, np.ndarray, Sequence[float]]]) -> Figure:
    """One row per preprocessing step, three planes each, with shape and voxel size.

    Parameters
    ----------
    steps : sequence of (title, array, voxel_size)
        As `transforms.run_steps` gives them. The first is drawn as it lies in the file.
    """
    figure, axes = _figure(len(steps), 3, 2.83, 2.9)
    for index, (row, (name, array, voxel_size)) in enumerate(zip(axes, steps, strict=True)):
        three_planes(array, row, voxel_size=voxel_size, sides=index > 0)
        size = "{} x {} x {} voxels of {:.3g} x {:.3g} x {:.3g} mm".format(*array.shape, *voxel_size)
        row[0].set_title(f"{name}\n{size}", loc="left", fontsize=10)
        row[2].set_title(f"values {array.min():.3g} to {array.max():.3g}", loc="right", fontsize=9)
    return figure


def montage(
    volumes: Sequence[np.ndarray],
    titles: Sequence[str] = (),
    *,
    name: str = "sagittal",
    columns: int = 8,
    heading: str = "",
) -> Figure:
    """The middle slice of many volumes, one small picture each.

    Parameters
    ----------
    volumes : sequence of (x, y, z) arrays
        RAS.
    titles : sequence of str
        One for each volume, or none.
    name : str
        Plane: sagittal, coronal or axial.
    """
    if len(volumes) == 0:
        raise ValueError("A montage of no volumes: give at least one.")
    if titles and len(titles) != len(volumes):
        raise ValueError(f"{len(titles)} titles for {len(volumes)} volumes: give one each, or none.")
    columns = min(columns, len(volumes))
    figure, axes = _figure(-(-len(volumes) // columns), columns, 1.4, 1.65)
    for ax in axes.flat[len(volumes) :]:
        ax.set_axis_off()
    for ax, volume, title in zip(axes.flat, volumes, titles or [""] * len(volumes), strict=False):
        show_plane(np.asarray(volume, dtype=np.float32), name, ax)
        ax.set_title(title, fontsize=7)
    figure.suptitle(heading or f"middle {name} slice of {len(volumes)} volumes", fontsize=10)
    return figure


def brain_preview(
    scans: Mapping[str, str | Path], settings: PreprocessingSettings
) -> tuple[pd.DataFrame, Figure]:
    """Find the brain in a few scans and show it.

    Parameters
    ----------
    scans : mapping
        Title to file.
    settings : PreprocessingSettings
        For the grid and the masks beside scans; scans are drawn before anything outside of the brain is
        set to 0. A brain that cannot be trusted is not drawn: its row says why.

    Returns
    -------
    table : DataFrame
        One row per scan: quality (0 to 1), correlation, agreement, litres, where the mask is from, problems,
        and why a mask beside it was not taken.
    figure : Figure
        One row per plane, one column per scan.
    """
    import pandas as pd

    rows, drawn = [], []
    plain = replace(settings, brain_only=False, grey_matter=False, extra="")
    for title, path in scans.items():
        try:
            image = load_scan(path)
        except ScanError as error:
            rows.append({"scan": title, "problems": str(error)})
            continue
        brain = find_brain(image, found_masks=settings.found_masks)
        facts = {
            "scan": title,
            "quality": brain.quality,
            "correlation": brain.correlation,
            "agreement": brain.agreement,
            "litres": brain.volume_l,
            "mask": "template" if brain.source == "template" else Path(brain.source).name,
            "problems": "; ".join(brain.problems),
            "note": image.extra["flags"].get("mask_not_taken", ""),
        }
        rows.append(facts)
        if not brain.problems:
            inside = brain.mask_on(grid_affine(image, plain), (settings.size,) * 3)
            drawn.append((title, preprocess(image, plain), inside))
    figure, axes = _figure(len(PLANES), len(drawn), 1.5, 1.6)
    for column, (title, volume, inside) in zip(axes.T, drawn, strict=True):
        for name, ax in zip(PLANES, column, strict=True):
            outline(inside, name, show_plane(volume, name, ax))
        column[0].set_title(title, fontsize=8)
    return pd.DataFrame(rows), figure


def outline(inside: np.ndarray, name: str, ax: Axes) -> Axes:
    """Draw the outline of a RAS mask (x, y, z) over the middle slice that `show_plane` drew."""
    picture, _ = plane(inside.astype(np.float32), name)
    if 0 < picture.mean() < 1:
        ax.contour(picture, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    return ax


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each so many inches wide and high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * max(columns, 1) + 0.2, height * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False) if columns else np.empty((rows, 0), object)
    return figure, axes
