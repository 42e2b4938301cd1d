"""Files from Google Drive (by gdown), Kaggle (by kagglehub) and OpenNeuro (its public bucket) into a folder.

None of the three was tried against its live servers here: tests run the real clients against a local one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import requests
from tqdm import tqdm

from brainage_nb.platforms import attached_dataset
from brainage_nb.sources.fetch import (
    PASSING,
    TIMEOUT_S,
    DownloadError,
    fetch,
    find_target,
    find_unpacked,
    hide_secrets,
    is_archive,
    open_session,
    read_notes,
    refuse_full_disk,
    split_addresses,
    unpack,
)
from brainage_nb.sources.folder import TERMS, SourceError, Terms
from brainage_nb.tables.participants import read_participants
from brainage_nb.workspace import CannotWrite, explain_write_errors, write_json

WAITS_S = (1, 4, 16, 60)  # pauses [s] between tries of gdown and kagglehub, which go on where the last ended
BUCKET = "https://s3.amazonaws.com/openneuro.org"

_SHARE = "In Drive choose Share > 'Anyone with the link', or download by hand and use source = folder"
_DRIVE_ADVICE = {
    "MaximumLimit": "this gdown lists folders of up to 50 files: put the scans into one archive, share that",
    "too many|quota": "its download quota is used up: wait some hours (up to a day, says Google), or make a "
    "copy in your own Drive",
    "byte range": "the file has changed: delete the folder .{identity} in the downloads, run the cell again",
}
_REMEDIES = {
    401: "Kaggle does not know you: make a token on kaggle.com (Settings > API) and put it into the "
    "platform's store, or into the file it is offered as",
    403: "you have no permission: open its page while logged in, accept its terms, or ask its owner",
    404: "there is no such data set: take owner/name from the address of its page",
}
# Of an OpenNeuro data set its tables are downloaded and, with their subject, its scans.
_TABLES = (
    r"participants\.(tsv|json)|dataset_description\.json|sessions\.json|dwi\.(bval|bvec)"
    r"|sub-[^/]+/sub-[^/]+_sessions\.(tsv|json)"
)
_SCANS = r"(?P<who>sub-[^/]+)/(ses-[^/]+/)?(anat|dwi|func)/sub-[^/]+_({})\.(nii(\.gz)?|bval|bvec)"


def _call_client(
    name: str, work: Callable[[Any], Any], folder: Path, explain: Callable[[Exception], tuple[str, bool]]
) -> Any:
    """Give a client's module to `work` until that returns.

    `explain` gives an error in words, and whether another try may help. Errors are not chained: the clients'
    own words may quote a request with a key.
    """
    try:
        client = importlib.import_module(name)
    except ImportError:
        raise DownloadError(f"{name} is not installed: pip install {name} (or brainage-nb[data]).") from None
    for wait in (*WAITS_S, None):
        try:
            with explain_write_errors(folder):
                return work(client)
        except (DownloadError, CannotWrite):
            raise
        except Exception as error:
            told, may_pass = explain(error)
        if wait is None or not may_pass:
            raise DownloadError(told)
        time.sleep(wait)


# --- Google Drive -----------------------------------------------------------------------------------------


def fetch_drive(folder: Path | str, links: str, *, keep_archives: bool = False) -> list[str]:
    """Download what share links name into one folder; archives are unpacked there.

    Parameters
    ----------
    folder : path
        Where everything goes.
    links : str
        Share links or ids of files, archives and folders (`folder:ID`), separated by blanks.
    keep_archives : bool
        Keep archives once they are unpacked.

    Returns
    -------
    list of str
        What was left out of archives, and why.

    Raises
    ------
    DownloadError
        Where something is not shared, over its quota, or cannot be fetched whole.
    """
    folder, left_out = Path(folder), []
    if not split_addresses(links):
        raise DownloadError("drive_links is empty: set it to share links of a folder, an archive or images.")
    for text in split_addresses(links):
        kind, identity = parse_drive_link(text)
        for item, place in _list_drive_folder(identity, folder) if kind == "folder" else [(identity, "")]:
            path = _fetch_drive_file(item, place, folder)
            if is_archive(path.name):
                left_out += unpack(path, _unpack_place(path), delete=not keep_archives)
    return left_out


def parse_drive_link(text: str) -> tuple[str, str]:
    """Kind (file or folder) and id of a share link of Drive, a bare id (a file's) or `folder:ID`.

    >>> parse_drive_link("https://drive.google.com/drive/folders/1AbCdEfGhIjK?usp=sharing")
    ('folder', '1AbCdEfGhIjK')

    Raises
    ------
    DownloadError
        Where it is none of these.
    """
    parts = urlsplit(text)
    if match := re.search(r"/folders/([-\w]+)", parts.path):
        return "folder", match[1]
    if match := re.search(r"/\w+/(?:u/\d+/)?d/([-\w]+)", parts.path):
        return "file", match[1]
    if parts.scheme in ("http", "https") and (named := parse_qs(parts.query).get("id")):
        return "folder" if "folder" in parts.path else "file", named[0]
    if match := re.fullmatch(r"(?:(file|folder):)?([-\w]{10,})", text):
        return match[1] or "file", match[2]
    raise DownloadError(
        f"drive_links: {hide_secrets(text) if '://' in text else repr(text)} is no share link of Google "
        "Drive. Take it from Share > Copy link, or give the id (folder:ID for a folder)."
    )


def _list_drive_folder(identity: str, folder: Path) -> list[tuple[str, str]]:
    """Id and path of each file in a shared folder."""
    how = {"id": identity, "output": str(folder), "skip_download": True, "quiet": True, "use_cookies": False}
    explain = partial(_explain_drive, identity)
    listed = _call_client("gdown", lambda gdown: gdown.download_folder(**how), folder, explain)
    if not listed:
        raise DownloadError(f"The Drive folder {identity} is empty or not shared. {_SHARE}.")
    return [(item.id, item.path) for item in listed]


def _fetch_drive_file(identity: str, place: str, folder: Path) -> Path:
    """Fetch one file, unless an earlier run did; `.drive.json` remembers the names of ids."""
    names: dict[str, str] = read_notes(folder / ".drive.json")
    if known := names.get(identity):
        path = folder / known
        if path.is_file() or find_unpacked(_unpack_place(path), path.name):
            return path
    incoming = folder / f".{identity}"  # one for each file: gdown goes on with the partial file it finds
    how = {"resume": True, "quiet": bool(place), "use_cookies": False, "timeout": TIMEOUT_S}

    def download(gdown: Any) -> str:
        incoming.mkdir(parents=True, exist_ok=True)
        known = {name: how[name] for name in how.keys() & inspect.signature(gdown.download).parameters.keys()}
        return gdown.download(id=identity, output=f"{incoming}{os.sep}", **known)

    came = _call_client("gdown", download, folder, partial(_explain_drive, identity))
    name = place or Path(came).name
    path = find_target(folder, f"{identity}_{name}" if name in names.values() else name)
    with explain_write_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(came, path)
        incoming.rmdir()
        write_json(names | {identity: path.relative_to(folder.resolve()).as_posix()}, folder / ".drive.json")
    return path


def _explain_drive(identity: str, error: Exception) -> tuple[str, bool]:
    said = f"{type(error).__name__}: {error}"
    advice = f"it is not shared, not there, or Drive is out of reach ({type(error).__name__}). {_SHARE}"
    for words, known in _DRIVE_ADVICE.items():
        if re.search(words, said, re.IGNORECASE):
            advice = known.format(identity=identity)
    network = isinstance(error, requests.exceptions.RequestException) and error.response is None
    told = f"Drive does not give {identity}: {advice}. What was received is kept for the next run."
    return told, network or "incomplete" in said


def _unpack_place(path: Path) -> Path:
    """A folder of the archive's name: two archives may hold files of the same name."""
    return path.parent / re.sub(r"(\.tar)?\.\w+$", "", path.name)


# --- Kaggle -----------------------------------------------------------------------------------------------


def fetch_kaggle(handle: str, folder: Path | str) -> Path:
    """The folder that holds the files of a Kaggle data set: attached to the session, else downloaded.

    kagglehub reads the key itself (its own file, its variables, the platform's store); it is never seen here.

    Parameters
    ----------
    handle : str
        As `owner/name`, or with `/versions/3`, or the address of its page.
    folder : path
        Where a download goes; an attached data set stays where it is.

    Raises
    ------
    DownloadError
        Says what to do: attach it, get a token, accept its terms, run again.
    """
    handle = re.sub(r"^https://(www\.)?kaggle\.com/(datasets/)?", "", handle.strip()).strip("/")
    if not re.fullmatch(r"[\w-]+/[\w-]+(/versions/\d+)?", handle):
        raise DownloadError(f"kaggle_dataset = {handle!r}: expected owner/name, the end of its address.")
    if (attached := attached_dataset(handle)) is not None:
        return attached
    folder, explain = Path(folder), partial(_explain_kaggle, handle)
    with _kaggle_cache(folder):
        return Path(_call_client("kagglehub", lambda hub: hub.dataset_download(handle), folder, explain))


def _explain_kaggle(handle: str, error: Exception) -> tuple[str, bool]:
    kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if "Unauthenticated" in kind or "Credential" in kind:
        status = 401
    remedy = _REMEDIES.get(status, "run the cell again later: what was received is kept")
    # connections and damaged archives (which kagglehub has deleted by now) may go better next time
    passing = status in PASSING or "Corruption" in kind or (status is None and isinstance(error, OSError))
    return (
        f"The Kaggle data set {handle} cannot be had ({status or kind}): {remedy}. Without internet, attach "
        "it to the session (Add input) before you start.",
        passing,
    )


@contextmanager
def _kaggle_cache(folder: Path) -> Iterator[None]:
    """Let kagglehub keep its files in `folder`, unless the person has chosen a place."""
    chosen = os.environ.setdefault("KAGGLEHUB_CACHE", str(folder))
    try:
        yield
    finally:
        if chosen == str(folder):
            del os.environ["KAGGLEHUB_CACHE"]


# --- OpenNeuro --------------------------------------------------------------------------------------------


def fetch_openneuro(
    folder: Path | str,
    accession: str,
    *,
    max_subjects: int = 0,
    base: str = BUCKET,
    columns: Mapping[str, str] | None = None,
    modalities: Sequence[str] = (),
) -> Path:
    """Download the tables and scans of an OpenNeuro data set, newest snapshot; its folder.

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
    columns : mapping
        As `match_scans` takes them: without ages in the table no scan is downloaded.
    modalities : sequence of str
        What is taken beside T1-weighted scans.

    Raises
    ------
    SourceError, TableError
        Where the number is none, or the data set has no ages or no scans.
    DownloadError
        Where a file cannot be had.
    """
    accession, base = accession.strip().lower(), base.rstrip("/")
    if not re.fullmatch(r"ds\d{6}", accession):
        raise SourceError(f"openneuro_id = {accession!r}: expected a number such as ds000001.")
    folder = Path(folder) / accession
    files = _list_once(folder, base, accession, ["T1w", *modalities])
    tables = [file for file in files if not file["subject"]]
    scans = [file for file in files if file["subject"]]
    if not any("_T1w." in scan["path"] for scan in scans) or not any(
        table["path"] == "participants.tsv" for table in tables
    ):
        raise SourceError(f"{accession} lacks T1-weighted scans or participants.tsv: choose another one.")
    _fetch_keys(tables, folder, base)
    read_participants(folder / "participants.tsv", folder, columns or {})  # no ages, no download of scans
    taken = sorted({scan["subject"] for scan in scans})[: max_subjects if max_subjects > 0 else None]
    missing = [scan for scan in scans if scan["subject"] in taken and not (folder / scan["path"]).is_file()]
    refuse_full_disk(folder, sum(scan["size"] for scan in missing), f"{accession} ({len(missing)} scans)")
    _fetch_keys(tqdm(missing, accession, unit="scan", disable=not missing), folder, base)
    return folder


def read_openneuro_terms(folder: Path) -> Terms:
    """The terms that a downloaded data set states itself, beside those of OpenNeuro."""
    try:
        stated = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        stated = {}
    keys = ("Name", "License", "DatasetDOI", "HowToAcknowledge")
    name, licence, doi, how = (str(stated.get(key, "")).strip(" .") for key in keys)
    own = TERMS["openneuro"].cite.removeprefix("the data set by its DOI, and ")
    facts = {
        "name": f"OpenNeuro {folder.name}: {name}" if name else "",
        "licence": f"{licence} (dataset_description.json)" if licence else "",
        "cite": ". ".join(filter(None, (doi, how, own))) if doi or how else "",
        "url": f"https://openneuro.org/datasets/{folder.name}",
    }
    return replace(TERMS["openneuro"], **{fact: text for fact, text in facts.items() if text})


def _list_once(folder: Path, base: str, accession: str, modalities: Sequence[str]) -> list[dict[str, Any]]:
    """Tables and scans, kept beside the data: a second run asks nothing and sees the same snapshot."""
    suffixes = list(dict.fromkeys(name.split("-")[0] for name in modalities))
    kept = folder / ".listing.json"
    notes = read_notes(kept)
    known = re.compile(f"{_TABLES}|{_SCANS.format('|'.join(suffixes))}")
    files = notes.get("files") if {*suffixes} <= {*notes.get("suffixes", ["T1w"])} else None
    if files is None:
        files = list(_list_bucket(base, accession, folder))
        if not files:
            raise SourceError(f"There is nothing under {accession} in the bucket {base}: check openneuro_id.")
        wanted = [(file, known.fullmatch(file["path"])) for file in files]
        files = [file | {"subject": match["who"] or ""} for file, match in wanted if match]
        write_json({"files": files, "suffixes": suffixes}, kept)
    return [file for file in files if known.fullmatch(file["path"])]


def _list_bucket(base: str, accession: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Path, size [bytes] and md5 of all files of a data set, by pages of a thousand keys."""
    address, page = f"{base}?list-type=2&prefix={accession}/&max-keys=1000", folder / ".listing.xml"
    token, more = "", True
    while more:
        page.unlink(missing_ok=True)
        fetch(f"{address}{token}", page, progress=False)
        try:
            root = ET.fromstring(page.read_bytes())
        except ET.ParseError as error:
            raise DownloadError(f"{base} answers no listing ({error}): check it, or try later.") from None
        finally:
            page.unlink()
        for entry in root.findall("{*}Contents"):
            path = entry.findtext("{*}Key", "").removeprefix(f"{accession}/")
            etag = entry.findtext("{*}ETag", "").strip('"')
            md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else ""  # of a file in pieces it is no md5
            yield {"path": path, "size": int(entry.findtext("{*}Size", "0")), "md5": md5}
        more = root.findtext("{*}IsTruncated") == "true"
        token = f"&continuation-token={quote(root.findtext('{*}NextContinuationToken', ''), safe='')}"


def _fetch_keys(files: Any, folder: Path, base: str) -> None:
    session = open_session()
    for file in files:
        url, target = f"{base}/{folder.name}/{quote(file['path'])}", find_target(folder, file["path"])
        how = {"size": file["size"], "checksum": f"md5:{file['md5']}" if file["md5"] else ""}
        try:
            fetch(url, target, session=session, progress=False, **how)
        except DownloadError as error:
            told = f"If it was revised meanwhile, delete {folder / '.listing.json'} first."
            raise DownloadError(f"{error} {told}") from None
