"""Which images of other modalities belong to the T1w scans of a cohort; names decide, none is opened.

In BIDS those of the same subject and session. Elsewhere those that are named as the T1w scan is but for the
words of contrast, in file and folders: `IXI012-HH-1211-T2` and `IXI012-HH-1211-T1`, `T2/001` and `T1/001`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.images import is_raw_bids
from brainage_nb.cohort.names import WORDS, parts_of

_WORDS = {name: set(words) for name, words in WORDS["modalities"].items()}
_CONTRASTS = set(WORDS["images"]["T1"]).union(*_WORDS.values())
_MAPS = {*WORDS["images"]["label"], *WORDS["images"]["map"]}
_SAY_WHAT = {*_CONTRASTS, "anat", "dwi", "func"}  # parts of names that say what was scanned, not of whom


def pair_modalities(
    cohort: pd.DataFrame, images: pd.DataFrame, modalities: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, str], list[str]]:
    """Give each T1w scan the images of other modalities of its session.

    Parameters
    ----------
    cohort : DataFrame
        One row per T1w scan, `image` its path.
    images : DataFrame
        All that lie in the folder, in the columns of `find_images`.
    modalities : sequence of str
        Of `MODALITIES`, without T1w.

    Returns
    -------
    cohort : DataFrame
        With a column per modality that somebody has: the path, or "" where a session has none, or several.
        Without rows whose image is of one of these modalities (`T2/001`, whose `T1/001` is missing).
    reasons : dict
        Each image of these modalities -> "" where it was taken, else why not.
    notes : list of str
    """
    rows = {row.image: row for row in images.itertuples()}
    suffixes = {modality: modality.split("-")[0] for modality in modalities}  # of BIDS
    is_other = [any(_is_of(rows[image], *one) for one in suffixes.items()) for image in cohort["image"]]
    cohort = cohort[~np.array(is_other, bool)].reset_index(drop=True)
    reasons, notes = {}, []
    for modality, suffix in suffixes.items():
        found = defaultdict(list)
        for image, row in rows.items():
            if _is_of(row, modality, suffix):
                found[_session_key(row, suffix)].append(image)
        keys = [_session_key(rows[image], "T1w") for image in cohort["image"]]
        taken = [found[key][0] if len(found.get(key, ())) == 1 else "" for key in keys]
        for key, several in found.items():
            reasons |= dict.fromkeys(several, _say_why(several, modality, key in keys))
        if n := sum(map(bool, taken)):
            cohort = cohort.assign(**{modality: taken})
            notes.append(f"{modality}: {n} of {len(cohort)} T1w scans have one of their session.")
        else:
            names = " or ".join(WORDS["modalities"][modality])
            notes.append(
                f"{modality}: none was found of a session of the {len(cohort)} T1w scans (in BIDS a name "
                f"that ends in _{suffix}, else the T1w scan's own with {names}). It goes on without."
            )
    return cohort, reasons, notes


def _say_why(images: list[str], modality: str, has_t1w: bool) -> str:
    """Why images of one session are not taken; "" for one that is."""
    if not has_t1w:
        return f"a {modality} scan, and no T1w scan of its session is taken"
    if len(images) > 1:
        names = ", ".join(sorted(Path(image).name for image in images))
        return f"{len(images)} {modality} scans are of one session ({names}): none taken, leave one there"
    return ""


def _is_of(row: Any, modality: str, suffix: str) -> bool:
    """Whether an image is of a modality, by its name, or, where that tells no contrast, by its folders."""
    if row.stem.startswith("sub-") and row.stem.endswith(f"_{suffix}"):
        return is_raw_bids(row.stem, row.folders)
    names = (set(parts_of(name.casefold())) for name in [row.stem, *reversed(row.folders.split("/"))])
    telling = next((parts for parts in names if parts & _CONTRASTS), set())
    return (
        bool(telling & _WORDS[modality])
        and not telling & _MAPS
        and ("flair" in telling) == (modality == "FLAIR")
    )


def _session_key(row: Any, suffix: str) -> Hashable:
    """What images of one session have in common, whatever their modality."""
    if row.stem.startswith("sub-") and row.stem.endswith(f"_{suffix}"):
        return re.split(r"(?:^|/)sub-", row.folders)[0], row.subject_hint, row.session_hint
    names = (parts_of(name.casefold()) for name in [*row.folders.split("/"), row.stem])
    return tuple(filter(None, (tuple(part for part in parts if part not in _SAY_WHAT) for parts in names)))
