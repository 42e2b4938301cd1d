"""Pictures of one prediction: slices with the heat map over them, and the age among the held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from brainage_nb.models.prediction import Prediction

BLUE, VERMILION, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"  # Okabe-Ito where coloured
PLANES = ("sagittal", "coronal", "axial")
ENDS = {"sagittal": "PA", "coronal": "LR", "axial": "LR"}  # what lies at the left and right border of a slice


def overlay_planes(
    axes: Sequence[Axes],
    volume: np.ndarray,
    heat: np.ndarray | None = None,
    at: Sequence[int] | None = None,
    *,
    opacity: float = 0.6,
    spacing_mm: float | None = None,
) -> Sequence[Axes]:
    """Sagittal, coronal and axial slice of a volume with a signed heat map over it.

    Parameters
    ----------
    axes : three Axes
    volume, heat : array (size, size, size)
        RAS. The left of the picture is the person's left. Vermilion raises the age, blue lowers it.
    at : three ints, optional
        Voxel shown; by default where the heat is strongest inside the head, without heat the centre.
    opacity : float
        Of the strongest heat, 0 to 1.
    spacing_mm : float, optional
        Voxel edge in mm, for the slices' positions in the titles.
    """
    at = strongest(volume, heat) if at is None else tuple(int(value) for value in at)
    low, high = np.percentile(volume, [1, 99.7])
    top = 1.0 if heat is None else max(float(np.percentile(np.abs(heat), 99.8)), 1e-12)
    for axis, (ax, plane) in enumerate(zip(axes, PLANES, strict=True)):
        ax.imshow(
            _slice(volume, axis, at),
            cmap="gray",
            vmin=low,
            vmax=high,
            origin="lower",
            interpolation="bilinear",
        )
        if heat is not None:
            ax.imshow(
                signed_colours(_slice(heat, axis, at) / top, opacity),
                origin="lower",
                interpolation="bilinear",
            )
        _label(ax, plane, at[axis], len(volume), spacing_mm)
    return axes


def strongest(volume: np.ndarray, heat: np.ndarray | None) -> tuple[int, int, int]:
    """Voxel of the strongest heat inside the head, away from the border; without heat the middle of the
    head.
    """
    head = np.asarray(volume, dtype=np.float32) > np.mean(volume, dtype=float)
    if heat is None or not np.abs(heat).max() > 0:
        places = np.argwhere(head)
        return (
            tuple(int(value) for value in np.median(places, axis=0))
            if len(places)
            else (len(volume) // 2,) * 3
        )
    return tuple(int(value) for value in np.unravel_index(np.argmax(np.abs(heat) * head), heat.shape))


def signed_colours(values: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """RGBA (..., 4) of values from -1 (blue) through 0 (clear) to 1 (vermilion)."""
    from matplotlib.colors import to_rgb

    values = np.clip(np.asarray(values, dtype=float), -1, 1)
    rgba = np.empty((*values.shape, 4))
    rgba[..., :3] = np.where(values[..., None] >= 0, to_rgb(VERMILION), to_rgb(BLUE))
    rgba[..., 3] = opacity * np.clip((np.abs(values) - 0.15) / 0.85, 0, 1)  # weak heat is left out
    return rgba


def age_among_held_out(ax: Axes, prediction: Prediction, position: Mapping[str, Any]) -> Axes:
    """Predicted against true age of people the model did not train on, and this scan among them.

    `position` is the bundle's entry of that name. Ages in years.
    """
    age, predicted = np.asarray(position["age"]), np.asarray(position["predicted_age"])
    ends = (min(age.min(), predicted.min()) - 3, max(age.max(), predicted.max()) + 3)
    ax.plot(ends, ends, color=GREY, lw=1, ls="--", label="predicted = true")
    ax.scatter(age, predicted, s=14, color=GREY, alpha=0.55, lw=0, label=f"held-out scans (n = {len(age)})")
    if np.isfinite(prediction.low) and np.isfinite(prediction.high):
        ax.axhspan(
            prediction.low,
            prediction.high,
            color=BLUE,
            alpha=0.12,
            lw=0,
            label=f"{prediction.level:.0%} interval",
        )
    ax.axhline(
        prediction.predicted_age, color=BLUE, lw=1.6, label=f"this scan: {prediction.predicted_age:.1f}"
    )
    if prediction.age is not None:
        ax.plot(
            prediction.age,
            prediction.predicted_age,
            "D",
            ms=9,
            color=VERMILION,
            mec="white",
            label="this scan at its true age",
        )
    ax.set(xlabel="True age [years]", ylabel="Predicted age [years]")
    ax.set_title("Where this scan lies among held-out scans", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def triplet_bars(ax: Axes, contributions: pd.DataFrame, spacing_mm: float) -> Axes:
    """Years each triplet of slices adds to the age (`VggSvr.contributions`), from the lowest slice up."""
    shown = contributions.dropna(subset=["years"])
    height = (shown["first_slice"] + shown["last_slice"] + 1) / 2 * spacing_mm
    colours = np.where(shown["years"] >= 0, VERMILION, BLUE)
    ax.barh(height, shown["years"], height=2.4 * spacing_mm, color=colours)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set(xlabel="Contribution to the age [years]", ylabel="Height in the volume [mm]")
    ax.set_title(f"What {len(shown)} triplets of axial slices add", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _slice(volume: np.ndarray, axis: int, at: Sequence[int]) -> np.ndarray:
    """One slice as an image: rows from low to high second axis, columns along the first."""
    return np.take(np.asarray(volume, dtype=np.float32), at[axis], axis=axis).T


def _label(ax: Axes, plane: str, index: int, size: int, spacing_mm: float | None) -> None:
    place = f"slice {index}" if spacing_mm is None else f"{index * spacing_mm:.0f} mm"
    ax.set_title(f"{plane}, {place}", fontsize=9)
    for x, end in zip((0.03, 0.97), ENDS[plane], strict=True):
        ax.text(x, 0.5, end, color="white", fontsize=9, ha="center", va="center", transform=ax.transAxes)
    ax.set_xlim(-0.5, size - 0.5)
    ax.set_axis_off()
