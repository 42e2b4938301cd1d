"""Fetch a file over HTTP (resumed, retried, checked) and unpack archives safely. Knows no data set.

A file that is there is whole and the right one: what is on its way has a hidden name beside it.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from brainage_nb.workspace import explain_write_errors, hash_of, read_json, write_json, writing

TIMEOUT_S = (20.0, 60.0)  # longest wait [s] for a connection and for the next bytes
LONGEST_WAIT_S = 300.0  # a server that asks for a longer pause [s] is not waited for
# Status codes after which the same request may succeed later.
PASSING = (408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524)
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip", ".tar.bz2", ".tar.xz")
MOST_FILES = 500_000
MOST_TIMES_LARGER = 200  # NIfTI files shrink to a half or a tenth; a bomb to a thousandth
SMALL_BYTES = 256 << 20  # below this no ratio is judged: an empty label map may shrink a thousandfold

_BINARY = (*ARCHIVE_SUFFIXES, ".nii.gz", ".nii", ".mgz", ".mgh", ".xls", ".xlsx", ".xlsm", ".ods")
_CHUNK = 1 << 16
_SPARE_BYTES = 64 << 20
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
_REMEDIES = {
    401: "it asks for a login: download in a browser and use source = folder",
    403: "it gives no permission: accept the data set's terms on its site, or wait if a quota is used up",
    404: "there is no such file: check the address or the accession number, or name another mirror",
    410: "the file was taken away: name another mirror",
    **dict.fromkeys(PASSING, "run the cell again later, or name another mirror"),
}
_PAGE = (
    "instead of the file came a web page or an error message. Probably a download quota is used up (wait "
    "some hours, or make a copy of your own), the server asks for a login or consent to terms, or the file "
    "is gone. Open the address in a browser, name another mirror, or use source = folder."
)


class DownloadError(RuntimeError):
    """A file that could not be had whole and safely; the message says what to do."""


class _Retry(urllib3.Retry):
    """urllib3's retries, but a pause of an hour is reported instead of waited for."""

    def get_retry_after(self, response: Any) -> float | None:
        wait = super().get_retry_after(response)
        if wait is not None and wait > LONGEST_WAIT_S:
            when = f"in {wait / 60:.0f} min, as the server asks"
            raise DownloadError(f"the server answers {response.status}. Run the cell again {when}.")
        return wait


# Broken connections are left to `_receive_all`: urllib3 would log the whole address, which may hold a token.
RETRY = _Retry(5, connect=0, read=0, status_forcelist=PASSING, backoff_factor=1, raise_on_status=False)


def open_session() -> requests.Session:
    """A session that repeats requests as `RETRY` says, and waits as long as a server asks (Retry-After)."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=RETRY))
    return session


def split_addresses(text: str) -> list[str]:
    """Addresses separated by blanks or commas, as parameters hold mirrors."""
    return text.replace(",", " ").split()


def hide_secrets(url: str) -> str:
    """An address without what may be secret in it: user, password, query.

    >>> hide_secrets("https://me:word@example.org/a.tar?token=1")
    'https://example.org/a.tar?…'
    """
    return re.sub(r"\?.*", "?…", re.sub(r"//[^/]*@", "//", url))


# --- downloads --------------------------------------------------------------------------------------------


def fetch(
    urls: str | Sequence[str],
    path: Path | str,
    *,
    size: int | None = None,
    checksum: str = "",
    session: requests.Session | None = None,
    progress: bool = True,
) -> Path:
    """Bring a file from the first address that gives it whole; a file that is there already is left alone.

    What was received stays beside it as `.NAME.part`. The next call, also of another process, continues it
    where the server vouches that the file is still the same (ETag or date).

    Parameters
    ----------
    urls : str or sequence of str
        The address, or mirrors in the order to try.
    path : path
        Where it goes. Its ending says what content is expected.
    size : int, optional
        Bytes it must have.
    checksum : str
        "md5:…" or "sha256:…" that it must have; "" where none is known.
    session : requests.Session, optional
        One of `open_session`, to keep connections between files.
    progress : bool
        Show a bar, and say why a try failed.

    Raises
    ------
    DownloadError
        Says what the server did and what to do; no file of the name `path` is left then.
    CannotWrite
        The disk is full or cannot be written.

    >>> fetch("https://example.org/IXI.xls", "downloads/IXI.xls")  # doctest: +SKIP
    PosixPath('downloads/IXI.xls')
    """
    path = Path(path)
    if path.is_file() and (have := path.stat().st_size):  # one without content counts as not there
        if size not in (None, have):
            told = f"{path} has {have} bytes, the server's {size}: edited or torn"
            print(f"{told}. It is used as it is; delete it, and the next run downloads it again.")
        return path
    mirrors = [urls] if isinstance(urls, str) else list(urls)
    if any(re.match(r"\w+://[^/]*@", url) for url in mirrors):
        problem = f"The address of {path.name} holds a user or password, which notebook and logs would keep"
        raise DownloadError(f"{problem}. Download the file by hand and use source = folder.")
    part, failures = PartialDownload(path, size, checksum, progress), []
    for url in mirrors:
        try:
            with explain_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _receive_all(url, part, session or open_session())
                return part.finish()
        except DownloadError as error:
            failures.append(f"{path.name} from {hide_secrets(url)}: {error}")
        finally:
            if part.part.exists() and not part.received:
                part.discard()
    if part.received:
        failures.append(f"{part.received / 2**20:.1f} MiB are kept and it goes on from there.")
    raise DownloadError("\n".join(failures))


class PartialDownload:
    """A file on its way: `.NAME.part` beside it, and `.NAME.part.json` with what vouches for its bytes."""

    def __init__(self, path: Path, size: int | None, checksum: str, progress: bool) -> None:
        self.path, self.size, self.checksum, self.progress = path, size, checksum, progress
        self.part = path.with_name(f".{path.name}.part")
        self.notes = path.with_name(f".{path.name}.part.json")

    @property
    def received(self) -> int:
        """Bytes that have come."""
        return self.part.stat().st_size if self.part.exists() else 0

    def request_headers(self) -> dict[str, str]:
        """Ask for the rest, if the server vouches that it belongs to what is here, else for all."""
        headers = {"Accept-Encoding": "identity"}  # ranges count stored bytes
        validator = read_notes(self.notes).get("validator")
        if self.received and validator:
            headers |= {"Range": f"bytes={self.received}-", "If-Range": validator}
        return headers

    def continues(self, response: requests.Response) -> bool:
        """Whether an answer of 206 goes on with the bytes that are here: some servers ignore If-Range."""
        known, rest = read_notes(self.notes), response.headers.get("Content-Range")
        same = _read_validator(response) in ("", known["validator"])
        return same and rest == f"bytes {self.received}-{(known['total'] or 0) - 1}/{known['total']}"

    def finish(self) -> Path:
        """Give it its name, or refuse it and start from the beginning next time."""
        kind, _, expected = self.checksum.partition(":")
        problem = ""
        if self.received and _is_page(self.part, self.path.name):
            problem = _PAGE
        elif not self.received or self.received != (self.size or self.received):
            problem = f"{self.received} bytes came, expected were {self.size or 'some'}. It was not taken."
        elif kind and (found := hash_of(self.part, kind)) != expected.strip().lower():
            problem = (
                f"its {kind} is {found}, expected was {expected}. It was not taken: the publisher has "
                "replaced it, or it is another file. Compare with their page, name a mirror or the new hash."
            )
        if problem:
            self.discard()
            raise DownloadError(problem)
        os.replace(self.part, self.path)
        self.notes.unlink(missing_ok=True)
        return self.path

    def discard(self) -> None:
        """Start from the beginning."""
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


def _receive_all(url: str, part: PartialDownload, session: requests.Session) -> None:
    """Connect until all has come; give up after several tries that brought no new byte."""
    retry = fresh = RETRY.new(connect=None, read=None)
    while True:
        before = part.received
        try:
            return _receive(url, part, session)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            told = f"no connection ({type(error).__name__})"  # its own words hold the whole address
            try:
                retry = (fresh if part.received > before else retry).increment("GET", "", error=error)
            except urllib3.exceptions.MaxRetryError:
                raise DownloadError(f"{told}. Run the cell again later, or name another mirror.") from None
        except (requests.RequestException, ValueError) as error:
            raise DownloadError(f"this address leads nowhere ({type(error).__name__}). Check it.") from None
        if part.progress:
            print(f"{part.path.name}: {told}; trying again.")
        retry.sleep()


def _receive(url: str, part: PartialDownload, session: requests.Session) -> None:
    """One connection: ask for what is missing and append it."""
    headers = part.request_headers()
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        status, have = response.status_code, part.received if "Range" in headers else 0
        if have and status == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
            return
        if have and (status == 416 or (status == 206 and not part.continues(response))):
            part.discard()
            raise urllib3.exceptions.ProtocolError("the file on the server has changed")
        if status not in (200, 206):
            remedy = _REMEDIES.get(status, "check the address, or name another mirror")
            raise DownloadError(f"the server answers {status}: {remedy}.")
        have = have if status == 206 else 0  # 200 is the whole file: it changed, or there are no ranges here
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if part.size and total not in (None, part.size):
            problem = f"it has {total} bytes on the server, {part.size} were expected: it is another file"
            raise DownloadError(f"{problem}. Check the address, or name another mirror.")
        refuse_full_disk(part.path.parent, (total or 0) - have, part.path.name)
        write_json({"validator": _read_validator(response), "total": total}, part.notes)
        how = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "disable": not part.progress}
        bar = tqdm(total=total, initial=have, desc=part.path.name, **how)
        with bar, open(part.part, "ab" if have else "wb") as stream:
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                bar.update(stream.write(chunk))
    if total is not None and part.received != total:  # urllib3 before 2.0 lets a short body pass
        raise urllib3.exceptions.ProtocolError("the connection ended early")


def _is_page(path: Path, name: str) -> bool:
    """Whether a web page or an error message came in place of an archive, image or table."""
    with open(path, "rb") as stream:
        start = stream.read(512)
    head, name = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower(), name.lower()
    if name.endswith(_BINARY) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return True
    if name.endswith((*_BINARY, ".csv", ".tsv", ".txt")):
        return re.match(rb'<|[{\[]\s*["{}\]]', head) is not None
    return head.startswith((b"<!doctype html", b"<html", b"<head"))


def _read_validator(response: requests.Response) -> str:
    """What vouches that a file is still the same: its strong ETag, else its date, else ""."""
    etag = response.headers.get("ETag", "")
    # a weak ETag vouches for the meaning, not for the bytes (RFC 9110, 13.1.5)
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def read_notes(path: Path) -> dict[str, Any]:
    """What an earlier run noted beside a download; {} where nothing is, or what is there is torn."""
    with suppress(OSError, ValueError):
        return read_json(path)
    return {}


def refuse_full_disk(folder: Path, needed: int, what: str) -> None:
    """Raise `DownloadError` where `needed` bytes (and a little to spare) do not fit."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"{what} needs {needed / 2**30:.1f} GiB more, but {folder} has {free / 2**30:.1f} GiB left. Free "
            "some space or set download_dir (source = folder: workspace) to another disk and run again: what "
            "came is kept."
        )


# --- archives ---------------------------------------------------------------------------------------------


def is_archive(name: str) -> bool:
    """Whether a name ends like an archive that `unpack` opens."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path | str, folder: Path | str, *, delete: bool = False) -> list[str]:
    """Unpack all regular files of a tar or zip, each whole or not at all; a killed run is continued.

    Parameters
    ----------
    archive : path
        `.tar`, `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz` or `.zip`; gone, if an earlier call deleted it.
    folder : path
        Where its files go; made where it is missing. `.NAME.unpacked.json` in it says what is done.
    delete : bool
        Delete the archive in the end.

    Returns
    -------
    list of str
        What was left out (links, devices), and why.

    Raises
    ------
    DownloadError
        Where a name leads outside the folder, the archive is damaged, encrypted or would grow beyond reason,
        or the disk is too small.
    CannotWrite
        As `fetch`.
    """
    archive, folder = Path(archive), Path(folder)
    done = find_unpacked(folder, archive.name)
    if done is None or archive.is_file():
        found = archive.stat()  # tells two archives of one name apart
        identity = f"{found.st_size}-{found.st_mtime_ns}"
        if done is None or done["identity"] != identity:
            with explain_write_errors(folder):
                done = _unpack(archive, folder, identity)
        if delete:
            archive.unlink()
    return done["left_out"]


def find_unpacked(folder: Path | str, archive: str) -> dict[str, Any] | None:
    """What an archive of this name left in `folder`, if it was unpacked to the end and nothing is missing."""
    done = read_notes(_mark(Path(folder), archive))
    whole = "files" in done and all((Path(folder) / name).is_file() for name in done["files"])
    return done if whole else None


def find_target(folder: Path, name: str) -> Path:
    """Where a member of an archive, a key of a bucket or a shared file goes; refused where that is outside.

    Python's own filter for tar archives judges, also by way of links that are there.
    """
    root = folder.resolve()
    try:
        inside = tarfile.data_filter(tarfile.TarInfo(name.replace("\\", "/")), str(root)).name
    except (tarfile.FilterError, ValueError):
        inside = ".."
    if ".." in Path(inside).parts or not Path(inside).parts:
        problem = f"'{name}' was not taken: it leads outside the folder {root}"
        raise DownloadError(f"{problem}. It is broken or hostile: get it from its publisher.")
    return root / inside


def _unpack(archive: Path, folder: Path, identity: str) -> dict[str, Any]:
    mark, names, left_out, total = _mark(folder, archive.name), [], [], 0
    begun = read_notes(mark).get("identity") == identity
    write_json({"identity": identity}, mark)
    try:
        for name, size, reason, open_member in tqdm(_read_members(archive), archive.name, unit="file"):
            if reason:
                left_out.append(f"{name}: {reason}, not unpacked")
                continue
            target = find_target(folder, name)
            total += size
            _refuse_bomb(archive, total, len(names))
            # a file gets its name only when it is whole, so one of this size from the same archive is done
            if not (begun and target.is_file() and target.stat().st_size == size):
                refuse_full_disk(folder, size, f"{name} of {archive.name}")
                with writing(target) as temporary, open_member() as source, open(temporary, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            names.append(target.relative_to(folder.resolve()).as_posix())
    except (*_DAMAGED, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk, not the content
        problem = f"{archive} is damaged ({type(error).__name__}: {error})"
        raise DownloadError(f"{problem}. Delete it and run the cell again; what is unpacked stays.") from None
    done = {"identity": identity, "files": names, "left_out": left_out}
    write_json(done, mark)
    return done


def _read_members(path: Path) -> Iterator[tuple[str, int, str, Callable[[], IO[bytes]]]]:
    """Files of a tar or zip as stored: name, size, why it is left out or "", and what opens it.

    The content decides which of the two it is, not the name.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise DownloadError(f"{path.name} needs a password: unpack by hand, use source = folder.")
                link = "a link" if stat.S_ISLNK(info.external_attr >> 16) else ""
                if not info.is_dir() and not _is_litter(info.filename):
                    yield info.filename, info.file_size, link, partial(archive.open, info)
        return
    with tarfile.open(path, "r:*") as archive:
        for info in archive:
            kind = "" if info.isreg() else "a link" if info.issym() or info.islnk() else "no regular file"
            if not info.isdir() and not _is_litter(info.name):
                yield info.name, info.size, kind, partial(archive.extractfile, info)
        # tarfile takes one that was cut between two files for a shorter one
        archive.fileobj.seek(archive.offset)
        if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the end mark is missing")


def _refuse_bomb(archive: Path, total: int, count: int) -> None:
    stored = archive.stat().st_size
    if count >= MOST_FILES or (total > SMALL_BYTES and total > MOST_TIMES_LARGER * stored):
        raise DownloadError(
            f"{archive.name} was not unpacked to the end: {stored / 2**20:.1f} MiB hold over "
            f"{total / 2**30:.1f} GiB in {count + 1} files, more than scans can. If it is right, unpack it "
            "by hand and use source = folder."
        )


def _is_litter(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in ("__MACOSX", ".DS_Store", "Thumbs.db") or part.startswith("._") for part in parts)


def _mark(folder: Path, archive: str) -> Path:
    return folder / f".{archive}.unpacked.json"
