"""IXI from its publisher: the archive of T1-weighted scans and the table, to a cohort.

Addresses and the archive's md5 are those of TorchIO's `torchio.datasets.IXI`; they were not tried against the
live server here. The table has no hash on record, so it is taken by what it holds.

Data sets that a person downloads after agreeing to terms: OASIS-1, OASIS-2, OpenBHB, ADNI.

Their tables are told from others, and of several pictures of one session the one that suits is taken.
Downloads nothing.

What each source needs, under which terms its data stand, and what to cite. Reads no data.

Licences and citations were read from the publishers' papers and from public code and data cards; the
publishers' own pages may have changed since, and they are what counts.

The one entry to all sources: a name and parameters in, a cohort with its terms and what rules left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from brainage_nb.cohort.rules import CohortRules, apply_rules
from brainage_nb.parameters import check_fields, pick_fields
from brainage_nb.platforms import local_disk_for
from brainage_nb.sources.fetch import Patience, addresses, fetch, fetch_and_unpack, is_archive, unpack
from brainage_nb.sources.folder import (
    TERMS,
    FolderCohort,
    SourceError,
    Terms,
    demo_cohort,
    find_table,
    folder_cohort,
)
from brainage_nb.tables.columns import COLUMN_PARAMETERS, plain_name
from brainage_nb.tables.files import TABLE_SUFFIXES, TableError, read_cells

_HOST = "biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
IMAGES = (f"https://{_HOST}/IXI-T1.tar", f"http://{_HOST}/IXI-T1.tar")
TABLE = (f"https://{_HOST}/IXI.xls", f"http://{_HOST}/IXI.xls")
IMAGES_MD5 = "34901a0593b41dd19c1a1f746eac2d58"


def ixi_cohort(
    folder: Path | str,
    *,
    images_url: str = "",
    table_url: str = "",
    images_md5: str = "",
    keep_archives: bool = False,
    columns: Mapping[str, str] | None = None,
    root: Path | str | None = None,
    patience: Patience | None = None,
) -> FolderCohort:
    """Download IXI and put its scans and ages together.

    Parameters
    ----------
    folder : path
        Where it goes.
    images_url, table_url : str
        Mirrors of IXI-T1.tar and IXI.xls, parted by blanks; "" for the publisher's.
    images_md5 : str
        md5 of the archive, or "none"; "" for the one on record, if the archive comes from the publisher.
    keep_archives : bool
        Keep the archive once it is unpacked.
    columns, root
        As `folder_cohort` takes them.
    patience : Patience, optional

    Returns
    -------
    FolderCohort

    Raises
    ------
    DownloadError
        Where a file cannot be had; the message says what to do.
    """
    folder = Path(folder)
    md5 = images_md5 or ("" if images_url else IMAGES_MD5)
    # the table first: it is small, and without it the scans are of no use
    tables = addresses(table_url) or TABLE
    ending = Path(urlsplit(tables[0]).path).suffix.lower()
    name = f"IXI{ending if ending in TABLE_SUFFIXES else '.xls'}"  # a mirror may hold it as CSV
    table = fetch(tables, folder / name, patience=patience)
    left_out = fetch_and_unpack(
        addresses(images_url) or IMAGES,
        folder / "IXI-T1.tar",
        folder / "images",
        checksum=f"md5:{md5}" if md5 not in ("", "none") else "",
        keep=keep_archives,
        patience=patience,
    )
    found = folder_cohort(folder / "images", table, columns=columns, root=root, source="ixi")
    found.notes.extend(left_out)
    return found


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
    from brainage_nb.sources.cloud import DRIVE, drive_folder

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
    from brainage_nb.sources.cloud import kaggle_folder

    handle = parameters["kaggle_dataset"]
    folder = kaggle_folder(handle, downloads / "kaggle")
    found = folder_cohort(folder, parameters["table"], columns=columns, root=root, source=f"kaggle {handle}")
    return found, TERMS["kaggle_dataset"].with_facts(url=f"https://www.kaggle.com/datasets/{handle}")


def _ixi(parameters: Mapping[str, Any], downloads: Path, columns: dict[str, str], root: Path) -> _Opened:

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
    from brainage_nb.sources.cloud import BUCKET, openneuro_cohort, openneuro_terms

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
