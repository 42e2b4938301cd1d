"""The one entry to all sources: a name and parameters in, a cohort with its terms and what rules left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from brainage_nb.cohort.archives import is_archive, unpack
from brainage_nb.cohort.columns import COLUMN_PARAMETERS
from brainage_nb.cohort.rules import CohortRules, apply_rules
from brainage_nb.cohort.sources import FolderCohort, SourceError, demo_cohort, folder_cohort
from brainage_nb.cohort.terms import TERMS, Terms
from brainage_nb.platforms import local_disk_for

__all__ = ["COLUMN_PARAMETERS", "OpenedSource", "open_source"]


@dataclass(frozen=True)
class OpenedSource:
    """A source's cohort after its rules.

    Attributes
    ----------
    cohort : DataFrame
        As `cohort.csv`.
    unmatched_images, unmatched_rows : DataFrame
        What found no partner, as in `FolderCohort`.
    notes : list of str
        What was resolved and by what rule.
    dropped : DataFrame
        Scans that the cohort rules left out: `scan_id, subject_id, session_id, rule, detail`.
    rules : DataFrame
        A row a rule, with what it left out.
    terms : Terms
        Licence and citation.
    """

    cohort: pd.DataFrame
    unmatched_images: pd.DataFrame
    unmatched_rows: pd.DataFrame
    notes: list[str]
    dropped: pd.DataFrame
    rules: pd.DataFrame
    terms: Terms


def open_source(source: str, parameters: Mapping[str, Any], root: Path | str) -> OpenedSource:
    """Open a source and apply the cohort rules; prints the terms first.

    Parameters
    ----------
    source : str
        A key of `terms.TERMS`.
    parameters : mapping
        The parameters of notebook 01; those that the source does not use are passed over.
    root : path
        The workspace. Downloads go to `download_dir`, else to `downloads` in it.

    Returns
    -------
    OpenedSource

    Raises
    ------
    SourceError, TableError, DownloadError
        The message says what to set or to do.
    """
    if source not in _OPENERS:
        raise SourceError(f"source = {source!r}: it is one of {', '.join(_OPENERS)}.")
    print(TERMS[source].line())  # before anything is fetched
    named = str(parameters.get("download_dir", ""))
    downloads = Path(named).expanduser().absolute() if named else Path(root) / "downloads"
    columns = {role: str(parameters.get(name, "")) for role, name in COLUMN_PARAMETERS.items()}
    columns["age_unit"] = columns["age_unit"] or "auto"
    found, terms = _OPENERS[source](parameters, downloads, columns, Path(root))
    rules = CohortRules(
        **{item.name: parameters.get(item.name, item.default) for item in fields(CohortRules)}
    )
    ruled = apply_rules(found.cohort, rules)
    if ruled.cohort.empty:
        shown = ruled.summary[["rule", "scans left out", "remark"]].to_string(index=False)
        raise SourceError(
            f"The cohort rules left out all {len(found.cohort)} scans:\n{shown}\nSet max_cdr = -1, "
            "controls_only = False or control_words, if these people are wanted."
        )
    return OpenedSource(
        ruled.cohort,
        found.unmatched_images,
        found.unmatched_rows,
        found.notes,
        ruled.dropped,
        ruled.summary,
        terms,
    )


_Opened = tuple[FolderCohort, Terms]
_Opener = Callable[[Mapping[str, Any], Path, dict[str, str], Path], _Opened]


def _demo(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    found = demo_cohort(
        root / "demo",
        parameters["n_subjects"],
        parameters["seed"],
        voxel_mm=parameters["demo_voxel_mm"],
        root=root,
    )
    return found, TERMS["demo"]


def _folder(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    if not str(parameters.get("data_dir", "")):
        raise SourceError("data_dir is empty: set it to the folder or archive that holds the scans.")
    place, table = Path(parameters["data_dir"]).expanduser(), str(parameters.get("table", ""))
    left_out: list[str] = []
    if place.is_file() and is_archive(place.name):
        # One large file is read from Drive at full speed, a thousand small ones are not.
        found = place.stat()  # another archive of the same name is another folder
        name = f"{place.name}-{found.st_size}-{found.st_mtime_ns}"
        folder = (local_disk_for(root) or root) / "unpacked" / name
        left_out = unpack(place, folder)
        table = str(place.parent / table) if table and (place.parent / table).is_file() else table
        place = folder
    found = folder_cohort(place, table, columns=columns, root=root)
    return replace(found, notes=[*left_out, *found.notes]), TERMS["folder"]


def _gdown(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    from brainage_nb.cohort.drive import DRIVE, drive_folder

    folder = downloads / "drive"
    left_out = drive_folder(
        folder,
        parameters.get("drive_links", ""),
        keep_archives=parameters.get("keep_archives", False),
        drive=parameters.get("drive_url", "") or DRIVE,
    )
    found = folder_cohort(folder, parameters.get("table", ""), columns=columns, root=root, source="gdown")
    found.notes.extend(left_out)
    return found, TERMS["gdown"]


def _kaggle(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    from brainage_nb.cohort.kaggle_set import kaggle_folder

    handle = str(parameters.get("kaggle_dataset", ""))
    folder = kaggle_folder(handle, downloads / "kaggle")
    found = folder_cohort(
        folder, parameters.get("table", ""), columns=columns, root=root, source=f"kaggle {handle}"
    )
    return found, TERMS["kaggle_dataset"].with_facts(url=f"https://www.kaggle.com/datasets/{handle}")


def _ixi(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    from brainage_nb.cohort.ixi import ixi_cohort

    found = ixi_cohort(
        downloads / "ixi",
        images_url=parameters.get("ixi_images_url", ""),
        table_url=parameters.get("ixi_table_url", ""),
        images_md5=parameters.get("ixi_md5", ""),
        keep_archives=parameters.get("keep_archives", False),
        columns=columns,
        root=root,
    )
    return found, TERMS["ixi"]


def _openneuro(
    parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path
) -> _Opened:
    from brainage_nb.cohort.openneuro import BUCKET, openneuro_cohort, openneuro_terms

    accession = str(parameters.get("openneuro_id", ""))
    folder = downloads / "openneuro"
    found = openneuro_cohort(
        folder,
        accession,
        max_subjects=parameters.get("max_subjects", 0),
        base=parameters.get("openneuro_url", "") or BUCKET,
        columns=columns,
        root=root,
    )
    return found, openneuro_terms(folder, accession)


def _local(source: str) -> _Opener:
    def opened(
        parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path
    ) -> _Opened:
        from brainage_nb.cohort.local_sets import local_set_cohort

        data_dir, table = parameters.get("data_dir", ""), parameters.get("table", "")
        return local_set_cohort(source, data_dir, table, columns=columns, root=root), TERMS[source]

    return opened


_OPENERS: dict[str, _Opener] = {
    "demo": _demo,
    "folder": _folder,
    "gdown": _gdown,
    "kaggle_dataset": _kaggle,
    "ixi": _ixi,
    "oasis1": _local("oasis1"),
    "oasis2": _local("oasis2"),
    "openneuro": _openneuro,
    "openbhb": _local("openbhb"),
    "adni": _local("adni"),
}
