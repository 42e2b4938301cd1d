"""Pictures of a cohort and of what cleaning found. Decides nothing and shows nothing by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.drawing import GREY, PALETTE, label_axes, legend_under
from brainage_nb.volumes.scans import ScanError, load_scan, voxel_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BIN_YEARS = 5.0
WORDS = {"F": "women", "M": "men", "": "not known"}


def age_histogram(ax: Axes, cohort: pd.DataFrame, by: str = "sex") -> Axes:
    """Draw ages (years), stacked by a column; a subject counts once, at the mean age of its scans.

    Parameters
    ----------
    ax : Axes
        Where to draw; it is returned.
    cohort : DataFrame
        With `subject_id`, `age` and the column named by `by`; rows without age are left out.
    by : str
        `sex`, `site` or another column of few values; beyond six the rarest are put together as `other`.

    Examples
    --------
    >>> age_histogram(plt.subplot(), cohort, by="site")  # doctest: +SKIP
    """
    group = cohort[by].fillna("").astype(str) if by in cohort else pd.Series("", index=cohort.index)
    rows = cohort.assign(group=group)[np.isfinite(cohort["age"].astype(float))]
    people = rows.groupby("subject_id").agg(age=("age", "mean"), group=("group", "first"))
    named = [name for name in people["group"].value_counts().index if name][:6]
    people["group"] = people["group"].where(people["group"].isin([*named, ""]), "other")
    parts = {name: people.loc[people["group"] == name, "age"] for name in [*named, "other", ""]}
    parts = {name: ages for name, ages in parts.items() if len(ages)}
    if parts:
        edges = np.floor(people["age"].min() / BIN_YEARS), np.floor(people["age"].max() / BIN_YEARS) + 2
        ax.hist(
            [*parts.values()],
            bins=BIN_YEARS * np.arange(*edges),
            stacked=True,
            color=[PALETTE[n] if name else GREY for n, name in enumerate(parts)],
            label=[f"{WORDS.get(name, name)} (n = {len(ages)})" for name, ages in parts.items()],
            edgecolor="white",
        )
        legend_under(ax)
    return label_axes(ax, f"Ages by {by} (n = {len(people)} subjects)", "age [years]", "subjects")


def flagged_montage(
    axes: np.ndarray | Axes, cleaning: pd.DataFrame, resolve: Callable[[str], Path]
) -> np.ndarray:
    """Draw a middle sagittal slice of flagged scans, and of dropped ones that can be read, one per Axes.

    Scans with rare findings come first, so that a finding every scan has does not fill the picture.

    Parameters
    ----------
    axes : array of Axes
        As many scans are drawn as there are Axes; unused ones are emptied. They are returned.
    cleaning : DataFrame
        From `clean`.
    resolve : callable
        Turns an `image` cell into an absolute path.

    Examples
    --------
    >>> figure, axes = plt.subplots(2, 6)  # doctest: +SKIP
    >>> flagged_montage(axes, cleaning, ws.resolve)  # doctest: +SKIP
    """
    slices = _read_slices(_sort_by_rarity(cleaning), resolve)
    for ax in np.atleast_1d(axes).ravel():
        ax.set_axis_off()
        if found := next(slices, None):
            title, plane, aspect = found
            low, high = np.percentile(plane, [1, 99.5])
            grey = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}
            ax.imshow(plane, aspect=aspect, origin="lower", **grey)
            ax.set_title(title, fontsize="small")
    return axes


def _sort_by_rarity(cleaning: pd.DataFrame) -> pd.DataFrame:
    codes = cleaning["flags"].where(cleaning["kept"], cleaning["reason"])
    shown = cleaning.assign(codes=codes)[codes != ""]
    often = shown["codes"].str.split(";").explode().value_counts()
    rarity = shown["codes"].map(lambda joined: min(often[code] for code in joined.split(";")))
    return shown.loc[rarity.sort_values(kind="stable").index]


def _read_slices(shown: pd.DataFrame, resolve: Callable[[str], Path]) -> Iterator[tuple]:
    """(title, slice with rows upwards and columns to the front, height of a pixel / its width) of each."""
    import nibabel as nib

    for row in shown.itertuples():
        try:
            image = nib.as_closest_canonical(load_scan(resolve(row.image)))
        except ScanError:
            continue  # nothing to draw
        array, size = np.asarray(image.dataobj), voxel_sizes(image.affine)
        title = f"{row.scan_id}\n{'kept' if row.kept else 'dropped'}: {row.codes.replace(';', ', ')}"
        yield title, array[array.shape[0] // 2].T, size[2] / size[1]
