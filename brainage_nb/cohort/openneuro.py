"""An OpenNeuro data set by its accession number: its tables and T1-weighted scans from the public S3 bucket.

The bucket answers plain HTTPS: `?list-type=2&prefix=…` lists keys in pages of a thousand, with size and, for
files stored in one piece, the md5 as ETag. It holds the newest snapshot. Not tried against the live server.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from brainage_nb.cohort.archives import safe_target
from brainage_nb.cohort.bids import read_participants
from brainage_nb.cohort.downloads import DownloadError, Patience, fetch
from brainage_nb.cohort.half_file import refuse_full_disk
from brainage_nb.cohort.sources import FolderCohort, SourceError, folder_cohort
from brainage_nb.cohort.terms import TERMS, Terms
from brainage_nb.workspace import read_json, write_json

BUCKET = "https://s3.amazonaws.com/openneuro.org"
_TABLES = re.compile(
    r"(participants\.(tsv|json)|dataset_description\.json|sessions\.json"
    r"|sub-[^/]+/sub-[^/]+_sessions\.(tsv|json))"
)
_T1W = re.compile(r"(sub-[^/]+)/(ses-[^/]+/)?anat/sub-[^/]+_T1w\.nii(\.gz)?")
_PAGES = 2000
_LISTING = ".listing.json"


@dataclass(frozen=True)
class Remote:
    """A file in the bucket: path in the data set, size [bytes], md5 where the listing has it."""

    path: str
    size: int
    md5: str

    def fetch_from(self, base: str, accession: str, folder: Path, **how) -> Path:
        """Download it to its place in `folder`."""
        return fetch(
            f"{base}/{accession}/{quote(self.path)}",
            safe_target(folder.resolve(), self.path, accession),
            size=self.size,
            checksum=f"md5:{self.md5}" if self.md5 else "",
            **how,
        )


def openneuro_cohort(
    folder: Path | str,
    accession: str,
    *,
    max_subjects: int = 0,
    base: str = BUCKET,
    columns: Mapping[str, str] | None = None,
    root: Path | str | None = None,
    patience: Patience | None = None,
) -> FolderCohort:
    """Download the T1-weighted scans of a data set and put them and their ages together.

    Parameters
    ----------
    folder : path
        Where data sets go; this one into a folder of its name.
    accession : str
        Such as `ds000001`.
    max_subjects : int
        Subjects whose scans are taken, in the order of their ids; 0 for all.
    base : str
        Address of the bucket.
    columns, root
        As `folder_cohort` takes them.
    patience : Patience, optional

    Returns
    -------
    FolderCohort

    Raises
    ------
    SourceError, TableError
        Where the number is none, or the data set has no ages or no scans; nothing large was downloaded then.
    DownloadError
        Where a file cannot be had.
    """
    accession = accession.strip().lower()
    if not re.fullmatch(r"ds\d{6}", accession):
        raise SourceError(f"openneuro_id = {accession!r}: expected a number such as ds000001.")
    folder = Path(folder) / accession
    base = base.rstrip("/")
    files = _listed_once(folder, base, accession, patience)
    tables = [file for file in files if _TABLES.fullmatch(file.path)]
    scans = _of_first_subjects([file for file in files if _T1W.fullmatch(file.path)], max_subjects)
    if not any(file.path == "participants.tsv" for file in tables) or not scans:
        raise SourceError(
            f"{accession} has {len(scans)} T1-weighted scans and "
            f"{'a' if any(file.path == 'participants.tsv' for file in tables) else 'no'} participants.tsv in "
            "the bucket: both are needed. Choose another data set."
        )
    for file in tables:
        file.fetch_from(base, accession, folder, patience=patience, progress=False)
    read_participants(folder / "participants.tsv", folder, columns or {})  # no ages, no download of scans
    _fetch_scans(scans, folder, base, accession, patience)
    return folder_cohort(
        folder, folder / "participants.tsv", columns=columns, root=root, source=f"openneuro {accession}"
    )


def openneuro_terms(folder: Path | str, accession: str) -> Terms:
    """The terms that a downloaded data set states itself, beside those of OpenNeuro."""
    accession = accession.strip().lower()
    try:
        text = (Path(folder) / accession / "dataset_description.json").read_text(encoding="utf-8-sig")
        said = json.loads(text)
    except (OSError, ValueError):
        said = {}
    doi, how = str(said.get("DatasetDOI", "")), str(said.get("HowToAcknowledge", ""))
    licence = str(said.get("License", ""))
    cite = ". ".join(part.strip().rstrip(".") for part in (doi, how) if part.strip())
    return TERMS["openneuro"].with_facts(
        name=f"OpenNeuro {accession}: {said['Name']}" if said.get("Name") else "",
        licence=f"{licence} (dataset_description.json)" if licence else "",
        cite=f"{cite}. OpenNeuro: {TERMS['openneuro'].cite.split('OpenNeuro: ')[1]}" if cite else "",
        url=f"https://openneuro.org/datasets/{accession}",
    )


def list_files(base: str, accession: str, folder: Path, patience: Patience | None = None) -> list[Remote]:
    """All files of a data set, page by page."""
    files, token = [], ""
    for number in range(_PAGES):
        url = f"{base}?list-type=2&prefix={accession}/&max-keys=1000"
        url += f"&continuation-token={quote(token, safe='')}" if token else ""
        page = folder / f".listing-{number}.xml"
        try:
            root = ET.fromstring(fetch(url, page, patience=patience, progress=False).read_bytes())
        except ET.ParseError as error:
            raise DownloadError(
                f"The bucket {base} does not answer with a listing ({error}): check it, or try later."
            ) from None
        finally:
            page.unlink(missing_ok=True)
        for entry in root.findall("{*}Contents"):
            path = entry.findtext("{*}Key", "").removeprefix(f"{accession}/")
            etag = entry.findtext("{*}ETag", "").strip('"')
            if path and not path.endswith("/"):
                md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else ""  # pieces: the tag is no md5
                files.append(Remote(path, int(entry.findtext("{*}Size", "0")), md5))
        token = root.findtext("{*}NextContinuationToken", "")
        if root.findtext("{*}IsTruncated", "false") != "true" or not token:
            return files
    raise DownloadError(f"{accession} lists more than {_PAGES} pages of files: no data set.")


def _listed_once(folder: Path, base: str, accession: str, patience: Patience | None) -> list[Remote]:
    """The listing, kept beside the data: a second run asks nothing and sees the same snapshot."""
    kept = folder / _LISTING
    if kept.exists():
        return [Remote(**entry) for entry in read_json(kept)]
    folder.mkdir(parents=True, exist_ok=True)
    files = list_files(base, accession, folder, patience)
    if not files:
        raise SourceError(f"There is nothing under {accession} in the bucket {base}: check openneuro_id.")
    wanted = [file for file in files if _TABLES.fullmatch(file.path) or _T1W.fullmatch(file.path)]
    write_json([vars(file) for file in wanted], kept)
    return wanted


def _of_first_subjects(scans: list[Remote], most: int) -> list[Remote]:
    subjects = sorted({_T1W.fullmatch(scan.path)[1] for scan in scans})
    taken = set(subjects[:most] if most > 0 else subjects)
    return [scan for scan in scans if _T1W.fullmatch(scan.path)[1] in taken]


def _fetch_scans(
    scans: list[Remote], folder: Path, base: str, accession: str, patience: Patience | None
) -> None:
    import requests
    from tqdm import tqdm

    missing = [scan for scan in scans if not (folder / scan.path).is_file()]
    refuse_full_disk(folder, sum(scan.size for scan in missing), f"{accession} ({len(missing)} scans)")
    with requests.Session() as session:
        for scan in tqdm(missing, desc=accession, unit="scan", disable=not missing):
            try:
                scan.fetch_from(base, accession, folder, patience=patience, session=session, progress=False)
            except DownloadError as error:
                raise DownloadError(
                    f"{error} If {accession} was revised meanwhile, delete {folder / _LISTING} first."
                ) from None
