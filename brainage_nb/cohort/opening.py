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
from brainage_nb.cohort.sources import FolderCohort, SourceError, demo_cohort, find_table, folder_cohort
from brainage_nb.cohort.terms import TERMS, Terms
from brainage_nb.parameters import check_fields, pick_fields
from brainage_nb.platforms import local_disk_for

__all__ = ["OpenedSource", "SourceSettings", "open_source"]

_OWN_DATA = ("data_dir", "table", *COLUMN_PARAMETERS.values())
USED_BY = {
    "demo": ("n_subjects", "demo_voxel_mm"),
    "folder": _OWN_DATA,
    "gdown": ("drive_links", "drive_url", "keep_archives", "download_dir", *_OWN_DATA[1:]),
    "kaggle_dataset": ("kaggle_dataset", "download_dir", *_OWN_DATA[1:]),
    "ixi": (
        *("ixi_images_url", "ixi_table_url", "ixi_md5", "keep_archives", "download_dir"),
        *COLUMN_PARAMETERS.values(),
    ),
    "oasis1": _OWN_DATA,
    "oasis2": _OWN_DATA,
    "openneuro": (
        *("openneuro_id", "max_subjects", "openneuro_url", "download_dir"),
        *COLUMN_PARAMETERS.values(),
    ),
    "openbhb": _OWN_DATA,
    "adni": _OWN_DATA,
}
"""Source -> the fields of `SourceSettings` that it reads; every other one is refused beside it."""


@dataclass(frozen=True)
class SourceSettings:
    """Where the scans and their ages are.

    Attributes
    ----------
    source : str
        Where the scans come from, a key of `terms.TERMS`.
    data_dir : str
        Folder of scans, any nesting, or an archive of them.
    table : str
        Table of ages: CSV, TSV, XLS or XLSX, from here or from `data_dir`; empty: participants.tsv or the
        only table there.
    subject_column : str
        Column with the subject ids; empty: found by name.
    age_column : str
        Column with the age at the scan; empty: found by name.
    age_unit : {"auto", "years", "months", "weeks", "days"}
        Unit of the ages.
    sex_column : str
        Column with the sex; empty: found by name.
    site_column : str
        Column with the site or scanner; empty: found by name.
    session_column : str
        Column with the session or visit; empty: found by name.
    diagnosis_column : str
        Column with the diagnosis or group; empty: found by name.
    image_column : str
        Column with the file name or image id of the scan; empty: found by name.
    drive_links : str
        Share links or ids of files, archives or folders (folder:ID), parted by blanks (source gdown).
    drive_url : str
        Address of a server that answers like Google Drive; empty: Google's (source gdown).
    kaggle_dataset : str
        Owner/name of a data set that is attached, or else downloaded (source kaggle_dataset).
    openneuro_id : str
        Accession number such as ds000001 (source openneuro).
    max_subjects : int
        Subjects to download, in the order of their ids; 0: all (source openneuro).
    openneuro_url : str
        Address of the OpenNeuro bucket or a mirror of it; empty: the public one (source openneuro).
    ixi_images_url, ixi_table_url : str
        Addresses of IXI-T1.tar and IXI.xls, mirrors parted by blanks; empty: the publisher's (source ixi).
    ixi_md5 : str
        MD5 of IXI-T1.tar, or none; empty: the one on record for the publisher's (source ixi).
    download_dir : str
        Folder for downloads; empty: downloads in the workspace.
    keep_archives : bool
        Keep archives once they are unpacked.
    n_subjects : int
        People in the demo cohort (source demo).
    demo_voxel_mm : float
        Voxel size of the demo heads, mm: 2 (fast) or 1 (six seconds of a core each) (source demo).
    seed : int
        Seed of the demo cohort.

    Raises
    ------
    SourceError, FileNotFoundError
        The source is unknown, or reads none of what was given beside it; a folder or table is not there.
    """

    source: str = "demo"
    data_dir: str = ""
    table: str = ""
    subject_column: str = ""
    age_column: str = ""
    age_unit: str = "auto"
    sex_column: str = ""
    site_column: str = ""
    session_column: str = ""
    diagnosis_column: str = ""
    image_column: str = ""
    drive_links: str = ""
    drive_url: str = ""
    kaggle_dataset: str = ""
    openneuro_id: str = ""
    max_subjects: int = 0
    openneuro_url: str = ""
    ixi_images_url: str = ""
    ixi_table_url: str = ""
    ixi_md5: str = ""
    download_dir: str = ""
    keep_archives: bool = False
    n_subjects: int = 220
    demo_voxel_mm: float = 2.0
    seed: int = 1

    def __post_init__(self) -> None:
        if self.source not in USED_BY:
            raise SourceError(f"source = {self.source!r}: it is one of {', '.join(USED_BY)}.")
        check_fields(self)
        for item in fields(self):
            readers = [source for source, names in USED_BY.items() if item.name in names]
            if readers and self.source not in readers and getattr(self, item.name) != item.default:
                raise SourceError(
                    f"{item.name} = {getattr(self, item.name)!r} is not read with source = {self.source!r}. "
                    f"Set source to {' or '.join(readers)}, or leave {item.name} out."
                )
        if "data_dir" in USED_BY[self.source]:
            self._check_places()

    def _check_places(self) -> None:
        if not self.data_dir.strip():
            raise SourceError(
                f"data_dir is empty: set it to the folder or archive of the scans (source {self.source})."
            )
        folder = Path(self.data_dir).expanduser().absolute()
        if not folder.exists():
            raise FileNotFoundError(f"There is no folder {folder}. Set data_dir to the one with the scans.")
        table = find_table(folder, self.table) if self.table and folder.is_dir() else None
        if table and not (table.exists() or table.is_symlink()):  # a link may be an annex's, not fetched
            raise FileNotFoundError(
                f"There is no table {self.table}, neither here nor in {folder}. Set table to the ages."
            )


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
        What was set of `SourceSettings` and `CohortRules`.
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
    settings = SourceSettings(**pick_fields(parameters, SourceSettings) | {"source": source})
    print(TERMS[source].line())  # before anything is fetched
    rules = CohortRules(**pick_fields(parameters, CohortRules))
    parameters = vars(settings)
    named = parameters["download_dir"]
    downloads = Path(named).expanduser().absolute() if named else Path(root) / "downloads"
    columns = {role: parameters[name] for role, name in COLUMN_PARAMETERS.items()}
    found, terms = _OPENERS[source](parameters, downloads, columns, Path(root))
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
    place, table = Path(parameters["data_dir"]).expanduser(), parameters["table"]
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
        parameters["drive_links"],
        keep_archives=parameters["keep_archives"],
        drive=parameters["drive_url"] or DRIVE,
    )
    found = folder_cohort(folder, parameters["table"], columns=columns, root=root, source="gdown")
    found.notes.extend(left_out)
    return found, TERMS["gdown"]


def _kaggle(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    from brainage_nb.cohort.kaggle_set import kaggle_folder

    handle = parameters["kaggle_dataset"]
    folder = kaggle_folder(handle, downloads / "kaggle")
    found = folder_cohort(folder, parameters["table"], columns=columns, root=root, source=f"kaggle {handle}")
    return found, TERMS["kaggle_dataset"].with_facts(url=f"https://www.kaggle.com/datasets/{handle}")


def _ixi(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:
    from brainage_nb.cohort.ixi import ixi_cohort

    found = ixi_cohort(
        downloads / "ixi",
        images_url=parameters["ixi_images_url"],
        table_url=parameters["ixi_table_url"],
        images_md5=parameters["ixi_md5"],
        keep_archives=parameters["keep_archives"],
        columns=columns,
        root=root,
    )
    return found, TERMS["ixi"]


def _openneuro(
    parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path
) -> _Opened:
    from brainage_nb.cohort.openneuro import BUCKET, openneuro_cohort, openneuro_terms

    accession = parameters["openneuro_id"]
    folder = downloads / "openneuro"
    found = openneuro_cohort(
        folder,
        accession,
        max_subjects=parameters["max_subjects"],
        base=parameters["openneuro_url"] or BUCKET,
        columns=columns,
        root=root,
    )
    return found, openneuro_terms(folder, accession)


def _local(source: str) -> _Opener:
    def opened(
        parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path
    ) -> _Opened:
        from brainage_nb.cohort.local_sets import local_set_cohort

        data_dir, table = parameters["data_dir"], parameters["table"]
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
