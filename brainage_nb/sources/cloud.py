"""Files and folders that somebody shared on Google Drive, by link or id.

gdown knows Drive's pages: the one that asks for a confirmation before a large file, and the listing of a
folder; its two releases in use (5 and 6) agree on both calls. The bytes are fetched by `downloads`, because
gdown 5 (the one that Colab ships) waits for ever on a silent server, and appends a whole file to a half one
where the server ignores the range. Not tried against Google's live servers.

A Kaggle data set: attached to the session, or downloaded by kagglehub, which resumes, checks and caches.

kagglehub reads the key itself (its own file, its variables, the platform's store); it is never seen here, and
what its errors say is not passed on, since they may quote a request. Tried with the real client against a
local server (its own test environment), not against kaggle.com.

An OpenNeuro data set by its accession number: its tables and T1-weighted scans from the public S3 bucket.

The bucket answers plain HTTPS: `?list-type=2&prefix=…` lists keys in pages of a thousand, with size and, for
files stored in one piece, the md5 as ETag. It holds the newest snapshot. Not tried against the live server.
"""

from __future__ import annotations

import json
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from brainage_nb.platforms import attached_dataset
from brainage_nb.sources.fetch import (
    FULL_DISK,
    PASSING,
    ContentError,
    DownloadError,
    Patience,
    addresses,
    fetch,
    is_archive,
    refuse_full_disk,
    refuse_page,
    remedy,
    safe_target,
    shown,
    unpack,
    unpacked,
)
from brainage_nb.sources.folder import TERMS, FolderCohort, SourceError, Terms, folder_cohort
from brainage_nb.tables.participants import read_participants
from brainage_nb.workspace import read_json, write_json

if TYPE_CHECKING:
    import requests

DRIVE = "https://drive.google.com"
_ID = re.compile(r"[-\w]{10,}")
_DOCS = {"spreadsheets": "xlsx"}
_SHARE = "In Drive choose Share > 'Anyone with the link', or download by hand and use source = folder"
_PAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Shared:
    """What a share link names: `kind` is file, folder or spreadsheets."""

    kind: str
    id: str
    resource_key: str = ""


def parse_link(text: str) -> Shared:
    """Read a share link of Drive, a bare id (a file's) or `folder:ID`.

    Raises
    ------
    DownloadError
        Where it is none of these.
    """
    parts = urlsplit(text)
    query = parse_qs(parts.query)
    key = query.get("resourcekey", [""])[0]
    if match := re.search(r"/folders/([-\w]+)", parts.path):
        return Shared("folder", match[1], key)
    if match := re.search(r"/(file|spreadsheets)/(?:u/\d+/)?d/([-\w]+)", parts.path):
        return Shared(match[1], match[2], key)
    if parts.scheme in ("http", "https") and "id" in query:
        return Shared("folder" if "folder" in parts.path else "file", query["id"][0], key)
    kind, _, name = text.rpartition(":")
    if kind in ("", "file", "folder") and _ID.fullmatch(name):
        return Shared(kind or "file", name)
    told = shown(text) if "://" in text else repr(text)
    raise DownloadError(
        f"drive_links: {told} is no share link of Google Drive. Take it from Share > Copy link, or give "
        "the id (folder:ID for a folder)."
    )


def drive_folder(
    folder: Path | str,
    links: str,
    *,
    keep_archives: bool = False,
    drive: str = DRIVE,
    patience: Patience | None = None,
) -> list[str]:
    """Download what links name into one folder; archives are unpacked there.

    Parameters
    ----------
    folder : path
        Where everything goes.
    links : str
        Share links or ids, parted by blanks.
    keep_archives : bool
        Keep archives once they are unpacked.
    drive : str
        Address of Drive.
    patience : Patience, optional

    Returns
    -------
    list of str
        What was left out of archives, and why.

    Raises
    ------
    DownloadError
        Where something is not shared, over its quota, or cannot be fetched whole.
    """
    import requests

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not addresses(links):
        raise DownloadError("drive_links is empty: set it to share links of a folder, an archive or images.")
    left_out: list[str] = []
    with requests.Session() as session:
        for text in addresses(links):
            shared = parse_link(text)
            for item, place in _files_of(shared, folder):
                path = _fetched(item, place, folder, drive, session, patience)
                if is_archive(path.name):
                    left_out += _unpacked_here(path, keep_archives)
    return left_out


def _files_of(shared: Shared, folder: Path) -> list[tuple[Shared, str]]:
    """Files to fetch, each with its path in the folder ("" where only the download will tell its name)."""
    if shared.kind != "folder":
        return [(shared, "")]
    try:
        import gdown
    except ImportError:
        raise _no_gdown() from None
    try:
        listed = gdown.download_folder(
            id=shared.id, output=str(folder), skip_download=True, quiet=True, use_cookies=False
        )
    except Exception as error:  # gdown 5 raises RuntimeError and a limit of its own, gdown 6 DownloadError
        raise DownloadError(_about_listing(error, shared)) from None
    if not listed:
        raise DownloadError(f"The Drive folder {shared.id} is empty or not shared. {_SHARE}.")
    return [(Shared("file", item.id), item.path) for item in listed]


def _about_listing(error: Exception, shared: Shared) -> str:
    if "MaximumLimit" in type(error).__name__:
        return (
            f"The Drive folder {shared.id} has 50 files or more, and this gdown lists no more than 50. Put "
            "the scans into one archive (zip or tar) and share that."
        )
    return f"The Drive folder {shared.id} cannot be listed ({type(error).__name__}). {_SHARE}."


def _fetched(
    item: Shared, place: str, folder: Path, drive: str, session: requests.Session, patience: Patience | None
) -> Path:
    """Fetch one file, unless an earlier run did; `.drive.json` remembers the names of ids."""
    notes = folder / ".drive.json"
    names: dict[str, str] = read_json(notes) if notes.exists() else {}
    if known := names.get(item.id):
        path = folder / known
        if path.is_file() or unpacked(_unpack_place(path), path.name):
            return path
    if item.kind in _DOCS:
        url = (
            f"{drive.replace('//drive.', '//docs.')}/{item.kind}/d/{item.id}/export?format={_DOCS[item.kind]}"
        )
        name = f"{item.id}.{_DOCS[item.kind]}"
    else:
        url, name = _resolve(item, drive, session, patience or Patience())
    wanted = place or name
    if wanted in names.values() and names.get(item.id) != wanted:
        wanted = f"{item.id}_{wanted}"
    path = safe_target(folder.resolve(), wanted, "the shared folder")
    fetch(url, path, identity=f"drive {item.id}", patience=patience, session=session)
    write_json(names | {item.id: wanted}, notes)
    return path


def _resolve(item: Shared, drive: str, session: requests.Session, patience: Patience) -> tuple[str, str]:
    """The address that gives a file's bytes, and its name: through the page that asks for a confirmation."""
    import requests

    url = f"{drive}/uc?export=download&id={item.id}"
    url += f"&resourcekey={item.resource_key}" if item.resource_key else ""
    for _ in range(4):
        try:
            timeouts = (patience.connect_s, patience.read_s)
            with session.get(url, stream=True, timeout=timeouts) as answer:
                status, name = answer.status_code, _name_in(answer.headers.get("Content-Disposition", ""))
                page = b"" if name else answer.raw.read(_PAGE_BYTES, decode_content=True)
        except (requests.exceptions.RequestException, OSError) as error:
            raise DownloadError(
                f"Drive does not answer ({type(error).__name__}). Run the cell again later."
            ) from None
        if name and status == 200:
            return url, name
        if status != 200:
            _refuse_answer(item, status, page)
        url = _behind_confirmation(item, page)
    raise DownloadError(f"Drive asks for confirmation of {item.id} again and again. {_SHARE}.")


def _behind_confirmation(item: Shared, page: bytes) -> str:
    try:
        # `gdown.download` is a function and, in sys.modules, the module that holds this one
        from gdown.download import get_url_from_gdrive_confirmation
    except ImportError:
        raise _no_gdown() from None
    try:
        return get_url_from_gdrive_confirmation(page.decode("utf-8", errors="replace"))
    except Exception:
        _refuse_answer(item, 200, page)
        raise


def _refuse_answer(item: Shared, status: int, page: bytes) -> None:
    """Raise with what Drive's page says: quota, login, permission."""
    name = f"the Drive file {item.id}"
    try:
        refuse_page(page, name)
    except ContentError as error:
        said = str(error)
    else:
        said = f"Drive answers {status} for {name}: {remedy(status)}. {_SHARE}."
    raise DownloadError(said) from None


def _name_in(disposition: str) -> str:
    """The file name in a Content-Disposition, without folders; "" where there is none."""
    message = Message()
    message["Content-Disposition"] = disposition
    name: Any = message.get_filename() if disposition else None
    return os.path.basename(str(name).replace("\\", "/")).lstrip(".") if name else ""


def _unpacked_here(path: Path, keep: bool) -> list[str]:
    """Unpack an archive beside itself, unless that is done and the archive is gone; what was left out."""
    if not path.is_file():
        return (unpacked(_unpack_place(path), path.name) or {}).get("left_out", [])
    left_out = unpack(path, _unpack_place(path))
    if not keep:
        path.unlink()
    return left_out


def _unpack_place(path: Path) -> Path:
    """Beside the archive, in a folder of its name: two archives may hold files of the same name."""
    return path.parent / re.sub(r"(\.tar)?\.\w+$", "", path.name)


def _no_gdown() -> DownloadError:
    return DownloadError("gdown is not installed: pip install 'gdown>=5.2' (or brainage-nb[data]).")


_HANDLE = re.compile(r"[\w-]+/[\w-]+(/versions/\d+)?")
_CACHE = "KAGGLEHUB_CACHE"
_REMEDIES = {
    401: "Kaggle does not know you: make a token on kaggle.com (Settings > API) and put it into the "
    "platform's store, or into the file it is offered as",
    403: "you have no permission: open its page while logged in, accept its terms, or ask its owner",
    404: "there is no such data set: take owner/name from the address of its page",
}


def kaggle_folder(handle: str, folder: Path | str, *, patience: Patience | None = None) -> Path:
    """The folder that holds a data set's files.

    Parameters
    ----------
    handle : str
        As `owner/name`, or with `/versions/3`.
    folder : path
        Where a download goes; an attached data set stays where it is.
    patience : Patience, optional
        Its tries and pauses.

    Raises
    ------
    DownloadError
        Says what to do: attach it, get a token, accept its terms, run again.
    """
    handle = re.sub(r"^https://(www\.)?kaggle\.com/(datasets/)?", "", handle.strip()).strip("/")
    if not _HANDLE.fullmatch(handle):
        raise DownloadError(
            f"kaggle_dataset = {handle!r}: expected owner/name, the end of its page's address."
        )
    if (attached := attached_dataset(handle)) is not None:
        return attached
    try:
        import kagglehub
    except ImportError:
        raise DownloadError(
            "kagglehub is not installed: pip install 'kagglehub>=0.3' (or brainage-nb[data])."
        ) from None
    patience = patience or Patience()
    wait = patience.first_wait_s
    with _cache_in(Path(folder)):
        for left in reversed(range(patience.tries)):
            try:
                return Path(kagglehub.dataset_download(handle))
            except Exception as error:  # kagglehub and requests raise many kinds
                message = _in_words(error, handle, last=left == 0)
            if message:
                raise DownloadError(message)
            time.sleep(wait)
            wait = min(2 * wait, patience.longest_wait_s)
    raise AssertionError("the last try returns or raises")


def _in_words(error: Exception, handle: str, *, last: bool) -> str:
    """What to do about an error; "" where another try may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "Unauthenticated" in type(error).__name__ or "Credential" in type(error).__name__:
        status = 401
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "The disk is full. Free some space or set download_dir to a larger disk, then run again."
    # connections and damaged archives (which kagglehub has deleted by now) may go better next time
    passing = status in PASSING or (status is None and isinstance(error, OSError))
    if (passing or "Corruption" in type(error).__name__) and not last:
        return ""
    remedy = _REMEDIES.get(status, "run the cell again later: what was received is kept")
    said = f"status {status}" if status else type(error).__name__
    return (
        f"The Kaggle data set {handle} cannot be had ({said}): {remedy}. Without internet, attach it to the "
        "session (Add input) before you start."
    )


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let kagglehub keep its files in `folder`, unless the person has chosen a place."""
    if _CACHE in os.environ:
        yield
        return
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_CACHE]


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
