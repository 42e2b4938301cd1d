"""Data sets that a person downloads after agreeing to terms: OASIS-1, OASIS-2, OpenBHB, ADNI.

Their tables are told from others, and of several pictures of one session the one that suits is taken.
Downloads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from brainage_nb.cohort.cells import TableError, read_cells
from brainage_nb.cohort.columns import plain_name
from brainage_nb.cohort.sources import FolderCohort, SourceError, find_table, folder_cohort

_SAGITTAL = (
    "stored in sagittal slices under a header that does not say so: take the T88_111 image, or convert to "
    "NIfTI with the right affine (Clinica's oasis-to-bids)"
)
_ANOTHER = "another picture of this session: {taken} is taken"


@dataclass(frozen=True)
class LocalSet:
    """How to know a set's table, and which picture of a session to take.

    Attributes
    ----------
    columns : tuple of str
        Columns that its table has, in plain form, `|` between alternatives; where one is missing it is
        another table.
    table_name : str
        Pattern of the table's file name, to find it among several.
    preferred : tuple of str
        Patterns of image paths, the best first; of one session only the best is taken.
    refused : str
        Pattern of image paths that are never taken.
    refusal : str
        Why not.
    """

    columns: tuple[str, ...]
    table_name: str
    preferred: tuple[str, ...] = ()
    refused: str = ""
    refusal: str = ""


SETS = {
    "oasis1": LocalSet(
        ("id", "age", "cdr"),
        r"oasis.*cross",
        # averaged, in Talairach space, with the skull; then what was converted to NIfTI; then without skull
        (r"_t88_gfc\.(hdr|img)$", r"\.nii(\.gz)?$", r"_t88_masked_gfc\.(hdr|img)$"),
        r"(?:_sbj_111|_mpr-\d+_anon)\.(?:hdr|img)$",
        _SAGITTAL,
    ),
    "oasis2": LocalSet(
        ("subject_id", "mri_id", "age", "cdr"),
        r"oasis.*long",
        tuple(rf"mpr-{number}[._]" for number in range(1, 8)),
    ),
    "openbhb": LocalSet(
        ("participant_id", "age", "site"),
        r"^participants\.tsv$",
        (r"rawdata/.*_T1w\.nii(\.gz)?$", r"_T1w\.nii"),
    ),
    "adni": LocalSet(("subject|ptid", "age"), r"adni|idasearch|\d+_\d+_\d{4}"),
}


def local_set_cohort(
    source: str,
    data_dir: Path | str,
    table: Path | str = "",
    *,
    columns: Mapping[str, str] | None = None,
    root: Path | str | None = None,
) -> FolderCohort:
    """Put images and table of a local copy together.

    Parameters
    ----------
    source : {"oasis1", "oasis2", "openbhb", "adni"}
    data_dir : path
        Folder with the images, as unpacked.
    table : path
        The set's table; "" to find it in `data_dir`.
    columns, root
        As `folder_cohort` takes them.

    Returns
    -------
    FolderCohort
        One picture a session where the set has several; the others are listed with the reason.

    Raises
    ------
    SourceError, TableError
        Where the folder or the table is not that of the set.
    """
    known = SETS[source]
    data_dir = Path(data_dir).expanduser().absolute()
    path = _table_of(source, known, data_dir, table)
    _refuse_other_table(source, known, path, columns or {})
    if source == "openbhb" and not any(data_dir.rglob("*_T1w.nii*")) and any(data_dir.rglob("*_T1w.npy")):
        raise SourceError(
            f"{data_dir} holds OpenBHB's preprocessed arrays (.npy), which have no orientation. Download the "
            "folders rawdata (original T1-weighted scans, .nii.gz) as well."
        )
    found = folder_cohort(data_dir, path, columns=columns, root=root, source=source)
    return _one_a_session(found, known)


def _table_of(source: str, known: LocalSet, data_dir: Path, table: Path | str) -> Path:
    if str(table) or not data_dir.is_dir():
        return find_table(data_dir, table)
    by_name = sorted(
        path
        for path in [*data_dir.glob("*"), *data_dir.glob("*/*")]
        if path.suffix.lower() in (".csv", ".tsv", ".xls", ".xlsx")
        and re.search(known.table_name, path.name, re.I)
    )
    return by_name[0] if len(by_name) == 1 else find_table(data_dir)


def _refuse_other_table(source: str, known: LocalSet, path: Path, columns: Mapping[str, str]) -> None:
    if any(name for role, name in columns.items() if role != "age_unit"):
        return  # whoever names columns knows the table
    sheets, _ = read_cells(path)
    names = {plain_name(name) for cells in sheets.values() for name in cells}
    missing = [name for name in known.columns if not names & set(name.split("|"))]
    if missing:
        told = ", ".join(missing).replace("|", " or ")
        raise TableError(
            f"{path} is not the table of {source}: it has no column {told}. Set table to the publisher's, or "
            "use source = folder for a table of your own."
        )


def _one_a_session(found: FolderCohort, known: LocalSet) -> FolderCohort:
    """Take the preferred picture of each session; list the others."""
    cohort = found.cohort
    images = cohort["image"].str.replace("\\", "/")
    reasons = pd.Series("", index=cohort.index, dtype=str)
    if known.refused:
        reasons = reasons.mask(images.str.contains(known.refused, flags=re.I), known.refusal)
    rank = images.map(lambda image: _rank(image, known.preferred))
    if known.preferred:
        left = cohort[reasons == ""].assign(rank=rank).sort_values(["rank", "image"], kind="stable")
        best = left.groupby(["subject_id", "session_id"])["image"].transform("first")
        others = left.index[left["image"] != best]
        taken = best[others].map(lambda image: _ANOTHER.format(taken=Path(image).name))
        reasons = reasons.where(~reasons.index.isin(others), taken.reindex(reasons.index))
    kept = cohort[reasons == ""].reset_index(drop=True)
    if kept.empty:
        raise SourceError(f"None of the {len(cohort)} images can be taken: {reasons.iloc[0]}.")
    aside = pd.DataFrame({"image": cohort["image"], "reason": reasons})[reasons != ""]
    unmatched = pd.concat([found.unmatched_images, aside], ignore_index=True)
    note = f"Images that were set aside for a better one of their session, or refused: {len(aside)}."
    return replace(
        found,
        cohort=kept.assign(scan_id=_short_ids(kept)),
        unmatched_images=unmatched,
        notes=[*found.notes, *([note] if len(aside) else [])],
    )


def _rank(image: str, preferred: tuple[str, ...]) -> int:
    found = (number for number, pattern in enumerate(preferred) if re.search(pattern, image, re.IGNORECASE))
    return next(found, len(preferred))


def _short_ids(cohort: pd.DataFrame) -> pd.Series:
    """`subject_session` again where that has become unique; several pictures had made ids of file names."""
    short = cohort["subject_id"] + ("_" + cohort["session_id"]).where(cohort["session_id"] != "", "")
    clear = ~short.str.lower().duplicated(keep=False)
    return short.where(clear, cohort["scan_id"])
