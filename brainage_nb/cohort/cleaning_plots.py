"""Pictures of a cohort and of what cleaning did with it. Decides nothing and shows nothing by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.volumes.scans import ScanError, load_scan, voxel_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008): told apart by people with any common form of colour blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
OUTCOME_COLOURS = {"kept": "#0072B2", "flagged": "#E69F00", "dropped": "#D55E00"}
UNKNOWN = "#999999"
WORDS = {"F": "women", "M": "men", "": "not known"}


def plot_reasons(ax: Axes, counts: pd.DataFrame) -> Axes:
    """Draw how many scans were kept, dropped and flagged, a bar a code.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    counts : DataFrame
        From `counts_by_reason`.

    Returns
    -------
    Axes
        The same `ax`.
    """
    names = [f"{row.outcome}: {row.code}" if row.code else row.outcome for row in counts.itertuples()]
    bars = ax.barh(names, counts["scans"], color=counts["outcome"].map(OUTCOME_COLOURS))
    ax.bar_label(bars, padding=3)
    ax.margins(x=0.12)
    ax.invert_yaxis()
    ax.set_xlabel("scans")
    scans = counts.loc[counts["outcome"].isin(["kept", "dropped"]), "scans"].sum()
    ax.set_title(f"What cleaning found (n = {scans} scans)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def age_histogram(ax: Axes, cohort: pd.DataFrame, by: str = "sex", *, bin_years: float = 5.0) -> Axes:
    """Draw ages (years), stacked by a column; a subject counts once, at the mean age of its scans.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    cohort : DataFrame
        With `subject_id`, `age` and the column named by `by`; rows without age are left out.
    by : str
        `sex`, `site` or another column of few values; beyond six the rarest are put together as `other`.
    bin_years : float
        Width of a bin [years].

    Returns
    -------
    Axes
        The same `ax`.
    """
    group = cohort[by].fillna("").astype(str) if by in cohort else pd.Series("", index=cohort.index)
    rows = cohort.assign(group=group)[lambda frame: np.isfinite(frame["age"].astype(float))]
    people = rows.groupby("subject_id").agg(age=("age", "mean"), group=("group", "first"))
    counts = people["group"].value_counts()
    named = [name for name in counts.index if name][:6]
    people["group"] = people["group"].where(people["group"].isin([*named, ""]), "other")
    rest = [name for name in ("other", "") if (people["group"] == name).any() and name not in named]
    names = [*named, *rest]
    low, high = np.floor(people["age"].min() / bin_years), np.floor(people["age"].max() / bin_years) + 1
    if len(people):
        ax.hist(
            [people.loc[people["group"] == name, "age"] for name in names],
            bins=bin_years * np.arange(low, high + 1),
            stacked=True,
            color=[UNKNOWN if not name else PALETTE[n % len(PALETTE)] for n, name in enumerate(names)],
            label=[f"{WORDS.get(name, name)} (n = {(people['group'] == name).sum()})" for name in names],
            edgecolor="white",
        )
        ax.legend(
            frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3
        )  # below, where it covers no bar
    ax.set_xlabel("age [years]")
    ax.set_ylabel("subjects")
    ax.set_title(f"Ages by {by} (n = {len(people)} subjects)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def flagged_montage(
    axes: np.ndarray | Axes, cleaning: pd.DataFrame, resolve: Callable[[str], Path], *, dropped: bool = True
) -> np.ndarray:
    """Draw a middle sagittal slice of flagged scans, and of dropped ones that can be read, one an Axes.

    Scans with rare findings come first, so that a finding every scan has does not fill the picture.

    Parameters
    ----------
    axes : array of Axes
        As many scans are drawn as there are Axes; unused ones are emptied.
    cleaning : DataFrame
        From `clean`.
    resolve : callable
        Turns an `image` cell into an absolute path.
    dropped : bool
        Whether dropped scans are drawn too.

    Returns
    -------
    array of Axes
        The same `axes`.
    """
    flat = list(np.atleast_1d(axes).ravel())
    pictures = _pictures(_rarest_first(cleaning, dropped), resolve)
    for ax in flat:
        ax.set_axis_off()
        found = next(pictures, None)
        if found is None:
            continue
        title, plane, aspect = found
        low, high = np.percentile(plane, [1, 99.5])
        ax.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, origin="lower")
        ax.set_title(title, fontsize="small")
    return axes


def _rarest_first(cleaning: pd.DataFrame, dropped: bool) -> pd.DataFrame:
    codes = cleaning["flags"].where(cleaning["kept"], cleaning["reason"])
    shown = cleaning.assign(codes=codes)[(codes != "") & (cleaning["kept"] | dropped)]
    often = shown["codes"].str.split(";").explode().value_counts()
    rarity = shown["codes"].map(lambda joined: min(often[code] for code in joined.split(";")))
    return shown.assign(rarity=rarity).sort_values("rarity", kind="stable")


def _pictures(shown: pd.DataFrame, resolve: Callable[[str], Path]):
    """Yield (title, slice with rows upwards and columns to the front, height of a pixel / its width)."""
    import nibabel as nib

    for row in shown.itertuples():
        try:
            image = nib.as_closest_canonical(load_scan(resolve(row.image)))
        except ScanError:
            continue  # nothing to draw
        array, size = np.asarray(image.dataobj), voxel_sizes(image.affine)
        verdict = "kept" if row.kept else "dropped"
        title = f"{row.scan_id}\n{verdict}: {row.codes.replace(';', ', ')}"
        yield title, array[array.shape[0] // 2].T, size[2] / size[1]
