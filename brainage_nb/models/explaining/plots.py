"""Pictures of one prediction: slices with the heat map over them, and the age among the held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from brainage_nb.models.explaining.groups import brain_mask, template_grid
from brainage_nb.volumes.heads import head_in
from brainage_nb.volumes.pictures import PLANES, plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from brainage_nb.models.bundles.prediction import Prediction
    from brainage_nb.models.explaining.groups import GroupMap

BLUE, VERMILION, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"  # Okabe-Ito where coloured
# What lies at the left and right border of a slice.
ENDS = {"sagittal": "AP", "coronal": "RL", "axial": "RL"}


def overlay_planes(
    axes: Sequence[Axes],
    volume: np.ndarray,
    heat: np.ndarray | None = None,
    at: Sequence[int] | None = None,
    *,
    opacity: float = 0.6,
    spacing_mm: float = 1.0,
) -> Sequence[Axes]:
    """Sagittal, coronal and axial slice of a volume with a signed heat map over it.

    The head's left is on the picture's right, as on radiology workstations.

    Parameters
    ----------
    axes : three Axes
    volume, heat : array (x, y, z)
        RAS. Vermilion raises the age, blue lowers it.
    at : three ints, optional
        Voxel shown; by default where the heat is strongest inside the head, without heat the centre.
    opacity : float
        Of the strongest heat, 0 to 1.
    spacing_mm : float
        Voxel edge in mm, for the slices' positions in the titles.
    """
    at = strongest(volume, heat) if at is None else at
    low, high = np.percentile(volume, [1, 99.7])
    if heat is not None:
        shown = np.where(_near_head(volume), heat, 0.0)
        shown = shown / max(float(np.percentile(np.abs(shown), 99.8)), 1e-12)
    for axis, (ax, name) in enumerate(zip(axes, PLANES, strict=True)):
        position = at[axis] / max(volume.shape[axis] - 1, 1)
        picture, _ = plane(np.asarray(volume, np.float32), name, position)
        ax.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
        if heat is not None:
            picture, _ = plane(shown, name, position)
            ax.imshow(signed_colours(picture, opacity), interpolation="bilinear")
        ax.set_title(f"{name}, {at[axis] * spacing_mm:.0f} mm", fontsize=9)
        for x, end in zip((0.03, 0.97), ENDS[name], strict=True):
            ax.text(x, 0.5, end, color="white", fontsize=9, ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
    return axes


def strongest(volume: np.ndarray, heat: np.ndarray | None) -> tuple[int, int, int]:
    """Where the three planes meet that hold the most heat inside the head; without heat its middle.

    Whole planes are compared, not voxels: a map of slabs has its strongest voxel anywhere, often at the skin.
    """
    head = head_in(volume)
    if heat is None or not np.abs(heat).max() > 0:
        places = np.argwhere(head)
        return (
            tuple(int(value) for value in np.median(places, axis=0))
            if len(places)
            else (len(volume) // 2,) * 3
        )
    inside = np.abs(heat) * head
    return tuple(int(inside.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))


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
    # Below the axes, where it covers no scan and none of its marks can be taken for one.
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _near_head(volume: np.ndarray) -> np.ndarray:
    """Head and a voxel around it; heat in plain air only distracts."""
    from scipy import ndimage

    return ndimage.binary_dilation(ndimage.binary_fill_holes(head_in(volume)))


def group_panels(
    axes: Sequence[Axes], group: GroupMap, at_mm: Sequence[float] = (0, -20, 5)
) -> Sequence[Axes]:
    """Mean heat map of one age band over its mean brain, in template space; the head around it is not shown.

    `axes` are three; `at_mm` is the MNI152 position shown, mm.
    """
    from scipy import ndimage

    shape, affine = template_grid()
    at = np.round(np.linalg.solve(affine, [*at_mm, 1.0])[:3]).astype(int)
    at = [int(np.clip(index, 0, side - 1)) for index, side in zip(at, shape, strict=True)]
    brain = ndimage.binary_dilation(brain_mask())
    stripped = np.where(brain, group.volume, group.volume[brain].min())
    overlay_planes(axes, stripped, group.heat, at, spacing_mm=affine[0, 0])
    for ax, name, place in zip(axes, PLANES, at_mm, strict=True):
        ax.set_title(f"{name}, {'xyz'[PLANES.index(name)]} = {place:g} mm", fontsize=9)
    axes[0].text(
        -0.08,
        0.5,
        f"{group.low:g} to {group.high:g} years\nn = {group.n}",
        rotation=90,
        ha="center",
        va="center",
        fontsize=9,
        transform=axes[0].transAxes,
    )
    return axes
