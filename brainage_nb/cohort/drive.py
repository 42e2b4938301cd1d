"""Files and folders that somebody shared on Google Drive, by link or id.

gdown knows Drive's pages: the one that asks for a confirmation before a large file, and the listing of a
folder; its two releases in use (5 and 6) agree on both calls. The bytes are fetched by `downloads`, because
gdown 5 (the one that Colab ships) waits for ever on a silent server, and appends a whole file to a half one
where the server ignores the range. Not tried against Google's live servers.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from brainage_nb.cohort.answers import addresses, remedy, shown
from brainage_nb.cohort.archives import is_archive, safe_target, unpack, unpacked
from brainage_nb.cohort.content import ContentError, refuse_page
from brainage_nb.cohort.downloads import DownloadError, Patience, fetch
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
