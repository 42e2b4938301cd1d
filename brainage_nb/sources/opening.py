"""The one entry to all sources: a name and parameters in, a cohort with its terms and what rules left out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pandas as pd

from brainage_nb.cohort.rules import CohortRules, apply_rules
from brainage_nb.parameters import check_fields, pick_fields
from brainage_nb.platforms import hint_at_drive, local_disk_for
from brainage_nb.sources.cloud import BUCKET, fetch_drive, fetch_kaggle, fetch_openneuro, read_openneuro_terms
from brainage_nb.sources.fetch import (
    ARCHIVE_SUFFIXES,
    fetch,
    find_unpacked,
    is_archive,
    split_addresses,
    unpack,
)
from brainage_nb.sources.folder import (
    TERMS,
    FolderCohort,
    SourceError,
    Terms,
    check_names,
    find_table,
    list_tables,
    match_scans,
)
from brainage_nb.tables.columns import COLUMN_PARAMETERS, plain_name
from brainage_nb.tables.files import TABLE_SUFFIXES, TableError, read_cells
from brainage_nb.volumes.settings import check_modality

# Addresses and the archive's md5 are those of TorchIO's `torchio.datasets.IXI`, not tried against the live
# server here. The table has no hash on record, so it is taken by what it holds.
_IXI_HOST = "biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
IXI_IMAGES = tuple(f"{scheme}://{_IXI_HOST}/IXI-T1.tar" for scheme in ("https", "http"))
IXI_MORE = {  # the archives beside it, with their md5
    "T2w": ("IXI-T2.tar", "e3140d78730ecdd32ba92da48c0a9aaa"),
    "PDw": ("IXI-PD.tar", "88ecd9d1fa33cb4a2278183b42ffd749"),
}
IXI_TABLE = tuple(f"{scheme}://{_IXI_HOST}/IXI.xls" for scheme in ("https", "http"))
IXI_MD5 = "34901a0593b41dd19c1a1f746eac2d58"

SETS = tomllib.loads((files(__package__) / "sets.toml").read_text(encoding="utf-8"))
READS = {
    source: {*known["reads"], *(() if source == "demo" else COLUMN_PARAMETERS.values())}
    for source, known in SETS.items()
}
"""Source -> the fields of `SourceSettings` that it reads; others are refused beside it."""


@dataclass(frozen=True)
class SourceSettings:
    """Where the scans and their ages are.

    Attributes
    ----------
    source : str
        Where the scans come from, a key of `TERMS`.
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
        Share links or ids of files, archives or folders (folder:ID), separated by blanks (source gdown).
    kaggle_dataset : str
        Owner/name of a data set that is attached, or else downloaded (source kaggle_dataset).
    openneuro_id : str
        Accession number such as ds000001 (source openneuro).
    max_subjects : int
        Subjects to download, in the order of their ids; 0: all (source openneuro).
    openneuro_url : str
        Address of the OpenNeuro bucket or a mirror of it; empty: the public one (source openneuro).
    ixi_images_url, ixi_table_url : str
        Addresses of IXI-T1.tar and IXI.xls, mirrors separated by blanks; empty: the publisher's (source ixi).
    ixi_md5 : str
        MD5 of IXI-T1.tar, or none (of all archives); empty: the one on record for the publisher's
        (source ixi).
    download_dir : str
        Folder for downloads; empty: downloads in the workspace.
    keep_archives : bool
        Keep archives once they are unpacked.
    n_subjects : int
        People in the demo cohort (source demo).
    demo_voxel_mm : float
        Voxel size of the demo heads, mm: 2 (fast) or 1 (six seconds of a core each) (source demo).
    followed : float
        Share of the demo's people with two to four sessions over 2 to 9 years (source demo).
    rate_sd : float
        Spread of their planted rates of ageing, years a year (source demo).
    seed : int
        Seed of the demo cohort.
    modalities : texts
        What to take of each session, with commas: T1w, and beside it T2w, PDw, FLAIR, dwi-FA, dwi-MD or
        bold-fALFF. Each but T1w gets a column of its name in cohort.csv, and volumes of its own in 03.

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
    followed: float = 0.0
    rate_sd: float = 0.0
    seed: int = 1
    modalities: tuple[str, ...] = ("T1w",)

    @property
    def columns(self) -> dict[str, str]:
        """Names of columns by role, and `age_unit`, as `match_scans` takes them."""
        return {role: getattr(self, name) for role, name in COLUMN_PARAMETERS.items()}

    @property
    def further_modalities(self) -> list[str]:
        """All but T1w, each once."""
        return [name for name in dict.fromkeys(self.modalities) if name != "T1w"]

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise SourceError(f"source = {self.source!r}: it is one of {', '.join(SOURCES)}.")
        check_fields(self)
        for modality in self.modalities:
            check_modality(modality, "modalities")
        for item in fields(self):
            readers = [source for source, names in READS.items() if item.name in names]
            value = getattr(self, item.name)
            if readers and self.source not in readers and value != item.default:
                problem = f"{item.name} = {value!r} is not read with source = {self.source!r}"
                remedy = f"Set source to {' or '.join(readers)}, or leave {item.name} out."
                raise SourceError(f"{problem}. {remedy}")
        if "data_dir" in READS[self.source]:
            self._check_places()

    def _check_places(self) -> None:
        if not self.data_dir.strip():
            raise SourceError(f"data_dir is empty: set it to the folder or archive of scans ({self.source}).")
        folder = Path(self.data_dir).expanduser().absolute()
        if not folder.exists():
            remedy = hint_at_drive(self.data_dir) or "Set data_dir to the one with the scans."
            raise FileNotFoundError(f"There is no folder {folder}. {remedy}")
        if folder.is_file() and not is_archive(folder.name):
            problem = f"data_dir = {self.data_dir!r} is a file, and none of {', '.join(ARCHIVE_SUFFIXES)}"
            raise SourceError(f"{problem}. Set data_dir to the folder or archive of the scans.")
        table = find_table(folder, self.table) if self.table and folder.is_dir() else None
        if table and not (table.exists() or table.is_symlink()):  # a link may be an annex's, not fetched
            remedy = hint_at_drive(self.table) or "Set table to the ages."
            raise FileNotFoundError(f"There is no table {self.table}, neither here nor in {folder}. {remedy}")
        if table and table.is_dir():
            raise SourceError(f"table = {self.table!r} is a folder. Set table to the file with the ages.")
        if self.source == "folder" and folder.is_dir():
            check_names(folder, self.table)


@dataclass(frozen=True, kw_only=True)
class OpenedSource(FolderCohort):
    """A source's cohort after its rules.

    Attributes
    ----------
    dropped : DataFrame
        Scans that the cohort rules left out: `scan_id, subject_id, session_id, rule, detail`.
    rules : DataFrame
        One row per rule, with what it left out.
    terms : Terms
        Licence and citation.
    """

    dropped: pd.DataFrame
    rules: pd.DataFrame
    terms: Terms


def open_source(source: str, parameters: Mapping[str, Any], root: Path | str) -> OpenedSource:
    """Open a source and apply the cohort rules; prints the terms first.

    Parameters
    ----------
    source : str
        A key of `TERMS`.
    parameters : mapping
        What was set of `SourceSettings` and `CohortRules`.
    root : path
        The workspace. Downloads go to `download_dir`, else to `downloads` in it.

    Raises
    ------
    SourceError, TableError, DownloadError
        The message says what to set or to do.

    >>> found = open_source("folder", {"data_dir": "scans", "max_cdr": 0.0}, "workspace")  # doctest: +SKIP
    >>> found.cohort[["scan_id", "age"]]  # doctest: +SKIP
    """
    settings = SourceSettings(**pick_fields(parameters, SourceSettings) | {"source": source})
    terms = TERMS[source]
    print(f"{terms.name}. Terms of use: {terms.licence}. Cite: {terms.cite}.")  # before anything is fetched
    rules, root = CohortRules(**pick_fields(parameters, CohortRules)), Path(root)
    downloads = Path(settings.download_dir or root / "downloads").expanduser().absolute()
    try:
        place, columns = SOURCES[source](settings, downloads, root), settings.columns
        how = {"root": root, "source": place.label, "modalities": settings.further_modalities}
        found = match_scans(place.data_dir, place.table, columns=columns, **how)
    except TableError as error:
        if str(downloads) not in str(error):
            raise
        raise TableError(f"{error} If it came torn, delete it: the next run downloads it again.") from None
    if "columns" in SETS[source]:
        found = _take_one_per_session(found, SETS[source])
    ruled = apply_rules(found.cohort, rules)
    if ruled.cohort.empty:
        shown = ruled.summary[["rule", "scans left out", "remark"]].to_string(index=False)
        raise SourceError(
            f"The cohort rules left out all {len(found.cohort)} scans:\n{shown}\nSet max_cdr = -1, "
            "controls_only = False or control_words, if these people are wanted."
        )
    kept = vars(replace(found, cohort=ruled.cohort, notes=[*found.notes, *place.notes]))
    return OpenedSource(**kept, dropped=ruled.dropped, rules=ruled.summary, terms=place.terms or terms)


# --- one function per source brings scans and table here: settings, folder of downloads, workspace --------


class Place(NamedTuple):
    """Where scans and table lie, what the cohort's column `source` says, and what else is to be told."""

    data_dir: Path
    table: Path | str
    label: str
    notes: Sequence[str] = ()
    terms: Terms | None = None


def _bring_demo(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    from brainage_nb.demo.cohort import make_demo_cohort  # a second that no other source needs

    people, size = settings.n_subjects, settings.demo_voxel_mm
    visits = {"followed": settings.followed, "rate_sd": settings.rate_sd} if settings.followed else {}
    how = {"seed": settings.seed, "voxel_mm": size, "modalities": settings.modalities} | visits
    made = Path(make_demo_cohort(root / "demo", n_subjects=people, **how))
    return Place(made, made / "participants.tsv", "demo")


def _bring_folder(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    place, table = Path(settings.data_dir).expanduser(), settings.table
    if not (place.is_file() and is_archive(place.name)):
        return Place(place, table, "folder")
    # One large file is read from Drive at full speed, a thousand small ones are not.
    found = place.stat()  # another archive of the same name is another folder
    name = f"{place.name}-{found.st_size}-{found.st_mtime_ns}"
    folder = (local_disk_for(root) or root) / "unpacked" / name
    left_out = unpack(place, folder)
    table = str(place.parent / table) if table and (place.parent / table).is_file() else table
    return Place(folder, table, "folder", left_out)


def _bring_drive(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    folder = downloads / "drive"
    left_out = fetch_drive(folder, settings.drive_links, keep_archives=settings.keep_archives)
    return Place(folder, settings.table, "gdown", left_out)


def _bring_kaggle(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    handle = settings.kaggle_dataset.removeprefix("https://www.kaggle.com/datasets/")
    folder = fetch_kaggle(handle, downloads / "kaggle")
    terms = replace(TERMS["kaggle_dataset"], url=f"https://www.kaggle.com/datasets/{handle}")
    return Place(folder, settings.table, f"kaggle {handle}", terms=terms)


def _bring_ixi(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    folder = downloads / "ixi"
    # the table first: it is small, and without it the scans are of no use
    tables = split_addresses(settings.ixi_table_url) or IXI_TABLE
    ending = Path(urlsplit(tables[0]).path).suffix.lower()  # a mirror may hold it as CSV
    table = fetch(tables, folder / f"IXI{ending if ending in TABLE_SUFFIXES else '.xls'}")
    md5 = settings.ixi_md5 or ("" if settings.ixi_images_url else IXI_MD5)
    addresses, left_out = split_addresses(settings.ixi_images_url) or IXI_IMAGES, []
    archives = {"IXI-T1.tar": md5} | dict(
        IXI_MORE[name] for name in settings.further_modalities if name in IXI_MORE
    )
    for name, md5 in archives.items():
        archive = folder / name
        checksum = f"md5:{md5}" if md5 and settings.ixi_md5 != "none" else ""
        if not find_unpacked(folder / "images", name):
            fetch([url.replace("IXI-T1.tar", name) for url in addresses], archive, checksum=checksum)
        left_out += unpack(archive, folder / "images", delete=not settings.keep_archives)
    return Place(folder / "images", table, "ixi", left_out)


def _bring_openneuro(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    how = {"max_subjects": settings.max_subjects, "columns": settings.columns}
    how["modalities"] = settings.further_modalities
    base = settings.openneuro_url or BUCKET
    folder = fetch_openneuro(downloads / "openneuro", settings.openneuro_id, base=base, **how)
    table, label = folder / "participants.tsv", f"openneuro {folder.name}"
    return Place(folder, table, label, terms=read_openneuro_terms(folder))


# --- data sets that a person downloads after agreeing to terms ----------------------------------------------


def _find_local_set(settings: SourceSettings, downloads: Path, root: Path) -> Place:
    source, data_dir = settings.source, Path(settings.data_dir).expanduser().absolute()
    name = re.compile(SETS[source]["table_name"], re.IGNORECASE)
    by_name = [table for table in list_tables(data_dir) if name.search(table.name)]
    table = find_table(data_dir, settings.table or (by_name[0] if len(by_name) == 1 else ""))
    # whoever names columns knows the table
    if not any(name for role, name in settings.columns.items() if role != "age_unit"):
        _refuse_other_table(source, SETS[source]["columns"], table)
    if source == "openbhb" and not any(data_dir.rglob("*_T1w.nii*")) and any(data_dir.rglob("*_T1w.npy")):
        problem = f"{data_dir} holds OpenBHB's preprocessed arrays (.npy), which have no orientation"
        raise SourceError(f"{problem}. Download the original scans too (folders rawdata, .nii.gz).")
    return Place(data_dir, table, source)


def _refuse_other_table(source: str, columns: list[str], path: Path) -> None:
    names = {plain_name(name) for cells in read_cells(path).values() for name in cells}
    if missing := [name.replace("|", " or ") for name in columns if not names & set(name.split("|"))]:
        problem = f"{path} is not the table of {source}: it has no column {', '.join(missing)}"
        raise TableError(f"{problem}. Set table to the publisher's, or use source = folder with your own.")


def _take_one_per_session(found: FolderCohort, known: dict[str, Any]) -> FolderCohort:
    """Take the preferred picture of each session; list the others."""
    cohort, preferred = found.cohort, known.get("preferred", [])
    images = cohort["image"].str.replace("\\", "/")
    reasons = pd.Series("", index=cohort.index, dtype=str)
    if "refused" in known:
        reasons = reasons.mask(images.str.contains(known["refused"], case=False), known["refusal"])
    if preferred:
        fits = {n: images.str.contains(pattern, case=False) for n, pattern in enumerate(preferred)}
        rank = pd.DataFrame(fits | {len(fits): True}).idxmax(axis=1)
        left = cohort.assign(rank=rank)[reasons == ""].sort_values(["rank", "image"], kind="stable")
        best = left.groupby(["subject_id", "session_id"])["image"].transform("first")
        for index in left.index[left["image"] != best]:
            reasons[index] = f"another picture of this session: {Path(best[index]).name} is taken"
    kept = cohort[reasons == ""].reset_index(drop=True)
    if kept.empty:
        raise SourceError(f"None of the {len(cohort)} images can be taken: {reasons.iloc[0]}.")
    # `subject_session` where that has become unique; several pictures had made ids of file names
    short = kept["subject_id"] + ("_" + kept["session_id"]).where(kept["session_id"] != "", "")
    kept["scan_id"] = short.where(~short.str.lower().duplicated(keep=False), kept["scan_id"])
    aside = pd.DataFrame({"image": cohort["image"], "reason": reasons})[reasons != ""]
    note = f"Images that were set aside for a better one of their session, or refused: {len(aside)}."
    return replace(
        found,
        cohort=kept,
        unmatched_images=pd.concat([found.unmatched_images, aside], ignore_index=True),
        notes=[*found.notes, *([note] if len(aside) else [])],
    )


SOURCES: dict[str, Callable[[SourceSettings, Path, Path], Place]] = {
    "demo": _bring_demo,
    "folder": _bring_folder,
    "gdown": _bring_drive,
    "kaggle_dataset": _bring_kaggle,
    "ixi": _bring_ixi,
    "oasis1": _find_local_set,
    "oasis2": _find_local_set,
    "openneuro": _bring_openneuro,
    "openbhb": _find_local_set,
    "adni": _find_local_set,
}
"""Source -> what brings its scans and table here."""
