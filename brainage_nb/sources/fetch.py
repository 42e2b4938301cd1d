"""What a web server's answer says, and what of an address may be shown. Sends nothing.

A file on its way: the half that has come, what is known of it, what the whole must be. Sends nothing.

Is a file what its name says, and is it whole? Judged by its bytes, before anything relies on it.

A server that refuses often answers with a web page under the name of the file; a cut file often opens.
Decodes no image: that is for cleaning.

Fetch a file over HTTP: it is whole and the right one, or absent. Resumed, retried, checked, then renamed.

Knows no data set. `requests` is what every platform has; `pooch` (hashes, mirrors) cannot go on with a half
file, and `tenacity` cannot start its count anew when bytes arrived, which a connection that drops every
gigabyte needs: so the loop is written here.

Unpack a tar or zip safely: nothing outside the folder, no links, no bombs, each file whole or absent.

Files that are there from an earlier, killed run are kept; a finished archive is not opened again.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from brainage_nb.workspace import hash_of, read_json, write_json

if TYPE_CHECKING:
    import requests

PASSING = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524}
"""Codes after which the same request may go through later."""
_REMEDIES = {
    401: "it asks for a login: download in a browser and use source = folder, or name an open address",
    403: "it gives no permission: accept the data set's terms on its site, share the file with 'Anyone with "
    "the link', or wait if a download quota is used up",
    404: "there is no such file: check the address or the accession number, or name another mirror",
    410: "the file was taken away: name another mirror",
    407: "a proxy asks for a login: check this machine's network",
}


def shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(an address that cannot be read)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}" + ("?…" if parts.query else "")


def addresses(text: str) -> list[str]:
    """Addresses parted by blanks or commas, as parameters hold mirrors."""
    return text.replace(",", " ").split()


def has_password(url: str) -> bool:
    """Whether an address carries a user or password: it would end up in logs and in the executed notebook."""
    return "@" in urlsplit(url).netloc


def remedy(status: int) -> str:
    """What helps against a refusal that will not pass."""
    return _REMEDIES.get(status, "check the address, or name another mirror")


def asked_wait(response: requests.Response) -> float | None:
    """Seconds that the server asks to wait (`Retry-After`, a number or a date), or None."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def length_of(response: requests.Response) -> int | None:
    """Bytes that the answer announces, or None."""
    text = response.headers.get("Content-Length", "")
    return (
        int(text)
        if text.isdigit() and "chunked" not in response.headers.get("Transfer-Encoding", "")
        else None
    )


def range_of(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total length that `Content-Range` states (`bytes 5-9/10`, `bytes */10`), else None."""
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None


def validator_of(response: requests.Response) -> str:
    """What vouches that a file is still the same: its strong ETag, else its date, else ""."""
    etag = response.headers.get("ETag", "")
    # a weak ETag vouches for the meaning, not for the bytes (RFC 9110, 13.1.5)
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SPARE = 64 << 20


class DownloadError(RuntimeError):
    """A file that could not be had whole; the message says what to do."""


class HalfFile:
    """`.NAME.part` and `.NAME.part.json` beside the file they will become.

    Parameters
    ----------
    path : Path
        The file in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}.part")
        self.notes = path.with_name(f".{path.name}.part.json")

    def received(self) -> int:
        """Bytes that have come."""
        return self.part.stat().st_size if self.part.exists() else 0

    def known(self) -> dict[str, Any]:
        """`url` (hashed), `validator` and `total` of what has come; {} where nothing is known."""
        try:
            return read_json(self.notes)
        except (OSError, ValueError):
            return {}

    def note(self, **facts: Any) -> None:
        """Add to what is known."""
        write_json(self.known() | facts, self.notes)

    def forget(self) -> None:
        """Start anew."""
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def problem(self, size: int | None, checksum: str) -> str:
        """What is wrong with the complete file and what to do, or ""."""
        length = self.received()
        if size and length != size:
            return f"{length} bytes came, {size} were expected. It was not taken: check the address."
        if checksum:
            kind, _, expected = checksum.partition(":")
            found = hash_of(self.part, kind)
            if found != expected.strip().lower():
                return (
                    f"its {kind} is {found}, expected was {expected}. It was not taken: the publisher has "
                    "replaced the file, or it is another one. Compare with the publisher's page, then name "
                    "another mirror or the new hash."
                )
        try:
            check_whole(self.part, self.path.name)
        except (ContentError, FileNotFoundError) as error:
            return f"{error} If that does not help, name another mirror."
        return ""

    def keep(self) -> Path:
        """Flush it to the disk and give it its name."""
        with open(self.part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(self.part, self.path)
        self.notes.unlink(missing_ok=True)
        return self.path


def refuse_full_disk(folder: Path, needed: int, what: str) -> None:
    """Raise `DownloadError` where `needed` bytes (and a little to spare) do not fit."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise DownloadError(
            f"{what} needs {needed / 2**30:.1f} GiB more, but {folder} has {free / 2**30:.1f} GiB left. Free "
            "some space or set download_dir to a larger disk, then run the cell again: what was received is "
            "kept."
        )


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold a lock while a file is fetched: two kernels must not append to one half file."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(
                f"{path.name} is being fetched by another process. Wait for it, or stop it, then run the "
                "cell again."
            ) from None
        except OSError:
            pass  # a mounted drive without locks
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip", ".tar.bz2", ".tar.xz")
_KINDS = {
    "archive": ARCHIVE_SUFFIXES,
    "image": (".nii.gz", ".nii", ".mgz", ".mgh"),
    "table": (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".xlsm", ".ods"),
}
_SPECIFIC = (".xlsx", ".xls", ".zip", ".tar", ".gz", ".tgz", ".mgz", ".nii", ".bz2", ".xz")
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".tgz": b"\x1f\x8b",
    ".mgz": b"\x1f\x8b",
    ".zip": b"PK",
    ".xlsx": b"PK",
    ".xls": b"\xd0\xcf\x11\xe0",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
}
# What servers say on the page they send instead of a file, and what helps.
_REFUSALS = (
    (
        r"quota exceeded|too many users|download limit|exceeded the limit",
        "the server's download quota is used up: wait some hours (Google says up to a day), make a copy of "
        "the file in your own Drive, or name another mirror",
    ),
    (
        r"\bnot found\b|no longer exists|does ?n.t exist|nosuchkey|\b404\b",
        "the file is not there (any more): check the address or name another mirror",
    ),
    (
        r"access ?denied|permission|forbidden|not authori[sz]ed|need access",
        "you have no permission: accept the data set's terms on its site, or let the owner share it with "
        "'Anyone with the link'",
    ),
    (
        r"sign[ -]?in|log[ -]?in|accounts\.google|password|authenticat",
        "the server asks for a login: download the file in a browser and use source = folder, or share it "
        "with 'Anyone with the link'",
    ),
)
_CHUNK = 1 << 20


class ContentError(ValueError):
    """A file that is not what its name says, or not whole; the message says what to do."""


def kind_of(name: str) -> str:
    """'archive', 'image', 'table' or '' by the ending of a name."""
    lower = name.lower()
    return next((kind for kind, endings in _KINDS.items() if lower.endswith(endings)), "")


def refuse_page(start: bytes, name: str) -> None:
    """Refuse a web page, a JSON or XML error or another file type in place of an archive, image or table.

    Parameters
    ----------
    start : bytes
        The first bytes of the content (a few hundred are enough).
    name : str
        The name that the content came under; endings it does not know are let through, except web pages.

    Raises
    ------
    ContentError
        With what the page says and what to do.
    """
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    page = head[:400].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<!-- html"))
    if kind_of(name):
        page = page or head[:1] == b"<" or (head[:1] in b"{[" and head[1:2] in b'"{ \r\n}]')
    if page:
        raise ContentError(f"Instead of {name} came {_page_in_words(head)}. {_advice(start)}.")
    if kind_of(name) in ("archive", "image") and _is_text(start):
        raise ContentError(f"Instead of {name} came plain text. {_advice(start)}.")
    magic = next((_MAGIC[end] for end in _MAGIC if name.lower().endswith(end)), b"")
    if magic and start and not start.startswith(magic[: len(start)]):
        raise ContentError(
            f"{name} does not begin like such a file (first bytes {start[:8].hex(' ')}): the address leads "
            "to something else. Check the address, or rename the file if only its ending is wrong."
        )


def check_whole(path: Path | str, name: str = "") -> None:
    """Read a file to its end and refuse it where it is cut or damaged.

    Archives: every header up to the end mark (zip: the directory; compressed tar: the checksum). Images: the
    checksum of `.nii.gz` and `.mgz`, and that all voxels the header claims are there. Others: not empty.

    Parameters
    ----------
    path : path
        The file.
    name : str
        Its final name, where `path` is a temporary one.

    Raises
    ------
    ContentError
        Where it is not whole.
    """
    path, name = Path(path), (name or Path(path).name)
    lower = name.lower()
    with open(path, "rb") as stream:
        start = stream.read(1024)
    if not start:
        raise ContentError(f"{name} is empty. Fetch it again; if it stays empty, the server's copy is.")
    refuse_page(start, name)
    try:
        if lower.endswith((".zip", ".xlsx")):
            with zipfile.ZipFile(path) as archive:
                archive.infolist()
        elif lower.endswith(".tar"):
            _walk_tar(path)
        elif start.startswith(_MAGIC[".gz"]):
            _check_gzip(path, name)
        elif lower.endswith(".nii"):
            _check_nifti(start, path.stat().st_size)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the content
        raise ContentError(
            f"{name} is cut or damaged ({type(error).__name__}: {error}; {path.stat().st_size} bytes). It "
            "was not taken: fetch it again."
        ) from None


def _is_text(start: bytes) -> bool:
    """Whether bytes are ASCII without a control character: no archive and no image begins like that."""
    return bool(start) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start[:512])


def _page_in_words(head: bytes) -> str:
    text = head[:4000].decode("utf-8", errors="replace")
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    if title and title[1].strip():
        return f"a web page titled '{' '.join(title[1].split())[:80]}'"
    if head[:1] in b"{[":
        return f"a JSON answer: {' '.join(_without_secrets(text).split())[:120]}"
    code = re.search(r"<Code>(\w+)</Code>", text)
    return f"an XML answer '{code[1]}'" if code else "a web page"


def _without_secrets(text: str) -> str:
    """JSON without the values of what looks like a secret: servers echo tokens in their errors."""
    return re.sub(r'("[^"]*(?:token|key|secret|password)[^"]*"\s*:\s*)"[^"]*"', r'\1"…"', text, flags=re.I)


def _advice(start: bytes) -> str:
    text = start.decode("utf-8", errors="replace")
    for pattern, remedy in _REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            return "Probably " + remedy
    return (
        "The server refuses (quota, login or permission) or the address is that of a page, not of the file: "
        "open it in a browser, name another mirror, or download by hand and use source = folder"
    )


def _walk_tar(path: Path) -> None:
    """Follow all headers of an uncompressed tar; after the last file a block of zeros has to stand."""
    size = path.stat().st_size
    end = 0
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            # a sparse file takes less room than its size says; links and folders take none
            stored = member.size if member.isreg() and not member.issparse() else 0
            end = member.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > size:
                raise tarfile.ReadError(f"'{member.name}' ends {end - size} bytes behind the end of the file")
    if end + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("the end mark is missing")


def _check_gzip(path: Path, name: str) -> None:
    """Decompress to the end (the checksum stands there); a NIfTI inside is as long as it says."""
    with gzip.open(path, "rb") as stream:
        start = stream.read(1024)
        length = len(start)
        while chunk := stream.read(_CHUNK):
            length += len(chunk)
    if name.lower().endswith(".nii.gz"):
        _check_nifti(start, length)


def _check_nifti(start: bytes, length: int) -> None:
    """Whether all bytes are there that a NIfTI header claims; other content is let through for cleaning."""
    for order in "<>":
        if start[344:348] == b"n+1\0" and struct.unpack(order + "i", start[:4])[0] == 348:
            dim = struct.unpack(order + "8h", start[40:56])
            bits = struct.unpack(order + "h", start[72:74])[0]
            offset = struct.unpack(order + "f", start[108:112])[0]
            voxels = 1
            for extent in dim[1 : 1 + max(0, min(dim[0], 7))]:
                voxels *= max(extent, 1)
            if length < offset + voxels * bits // 8:
                raise EOFError(f"the header claims {voxels} voxels of {bits} bits, {length} bytes are there")


_CHUNK_of_downloads = 1 << 18
_ENOUGH_TO_JUDGE = 1 << 12


class _Passing(Exception):
    """A failure that may pass: tried again after `wait` seconds (None: the usual back-off)."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long to put up with a server.

    Attributes
    ----------
    tries : int
        Tries in a row that bring no new byte before an address is given up.
    first_wait_s, longest_wait_s : float
        Pause after the first failed try [s], doubled each time up to the longest; where the server asks for a
        longer one, the address is given up with that word.
    connect_s, read_s : float
        Longest wait for a connection and for the next byte [s].
    slow_window_s, slow_bytes : float, int
        A connection that brings fewer than `slow_bytes` in `slow_window_s` is dropped and taken up again.
    """

    tries: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 300.0
    connect_s: float = 20.0
    read_s: float = 60.0
    slow_window_s: float = 60.0
    slow_bytes: int = 64 * 1024


def fetch(
    urls: str | Sequence[str],
    path: Path | str,
    *,
    size: int | None = None,
    checksum: str = "",
    identity: str = "",
    patience: Patience | None = None,
    session: requests.Session | None = None,
    progress: bool = True,
) -> Path:
    """Bring a file from the first address that gives it whole; a file that is there already is left alone.

    What was received stays beside it as `.NAME.part` and is continued by the next call, also by another
    process, if the server vouches that the file is still the same (ETag or date) or a checksum is known.

    Parameters
    ----------
    urls : str or sequence of str
        The address, or mirrors in the order to try.
    path : path
        Where it goes. Its ending says what content is expected (see `content`).
    size : int, optional
        Bytes it must have.
    checksum : str
        "md5:…" or "sha256:…" that it must have; "" where none is known.
    identity : str
        What names the file where its address differs from call to call; "" where the address does.
    patience : Patience, optional
    session : requests.Session, optional
        For cookies; made where absent.
    progress : bool
        Show a bar, and say why a try failed.

    Returns
    -------
    Path
        The file: complete, checked and flushed to the disk.

    Raises
    ------
    DownloadError
        Says what the server did and what to do; no file of the name `path` is left then.
    """
    import requests

    path = Path(path)
    if path.is_file():
        return path
    mirrors = [urls] if isinstance(urls, str) else list(urls)
    if any(has_password(url) for url in mirrors):
        raise DownloadError(
            f"The address of {path.name} holds a user or password, which would be kept in the executed "
            "notebook and in logs. Download the file by hand and use source = folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with only_one(path), session or requests.Session() as session:
        for url in mirrors:
            job = _Job(url, path, size, checksum, identity, patience or Patience(), session, progress)
            try:
                return job.run()
            except DownloadError as error:
                failures.append(str(error))
    raise DownloadError("\nNext address: ".join(failures))


class _Job:
    """One address and one file."""

    def __init__(
        self,
        url: str,
        path: Path,
        size: int | None,
        checksum: str,
        identity: str,
        patience: Patience,
        session: requests.Session,
        progress: bool,
    ) -> None:
        self.url, self.path, self.size, self.checksum = url, path, size, checksum
        self.identity = identity or url
        self.patience, self.session, self.progress = patience, session, progress
        self.half = HalfFile(path)
        self.name = f"{path.name} from {shown(url)}"
        self.doubtful = False

    def run(self) -> Path:
        """Try until it is whole; one fresh start where it was glued or its length was never told."""
        problem = ""
        for _ in range(2):
            self.doubtful = False
            self._until_complete()
            problem = self.half.problem(self.size, self.checksum)
            if not problem:
                return self.half.keep()
            self.half.forget()
            if not self.doubtful:
                break
        raise DownloadError(f"{self.name}: {problem}")

    def _until_complete(self) -> None:
        failed, wait = 0, self.patience.first_wait_s
        while True:
            before = self.half.received()
            try:
                return self._continue()
            except _Passing as error:
                if self.half.received() > before:
                    failed, wait = 0, self.patience.first_wait_s
                failed += 1
                pause = wait if error.wait is None else error.wait
                if failed >= self.patience.tries or pause > self.patience.longest_wait_s:
                    raise DownloadError(self._given_up(str(error), failed, pause)) from None
                if self.progress:
                    print(f"{self.name}: {error}; again in {pause:.0f} s.")
                time.sleep(pause)
                wait = min(2 * wait, self.patience.longest_wait_s)

    def _given_up(self, said: str, failed: int, pause: float) -> str:
        kept = self.half.received()
        asked = pause > self.patience.longest_wait_s
        when = f"in {pause / 60:.0f} min, as the server asks" if asked else "later"
        rest = f": {kept / 2**20:.1f} MiB are kept and it goes on from there" if kept else ""
        tries = f"{failed} tries in a row" if failed > 1 else "first try"
        return f"{self.name}: {said} ({tries}). Run the cell again {when}{rest}; or name another mirror."

    # --- one connection ---------------------------------------------------------------------------------

    def _continue(self) -> None:
        """Ask for what is missing and append it."""
        import requests

        known, have = self.half.known(), self.half.received()
        if have and not self._may_resume(known):
            self.half.forget()
            known, have = {}, 0
        if have and known.get("total") == have:
            return
        # ranges count stored bytes, so no compression on the way
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if known.get("validator") and known.get("url") == self._url_id():
                headers["If-Range"] = known["validator"]
        timeouts = (self.patience.connect_s, self.patience.read_s)
        try:
            with self.session.get(self.url, headers=headers, stream=True, timeout=timeouts) as response:
                self._take(response, have, known)
        # the library's own words hold the whole address, which may hold a token: they are not passed on
        except requests.exceptions.SSLError:
            problem = "the server's certificate is not valid. Check the address and this machine's clock"
        except requests.exceptions.Timeout:
            raise _Passing(f"no answer within {max(timeouts):g} s") from None
        except (ValueError, requests.exceptions.TooManyRedirects) as error:
            problem = f"this address leads nowhere ({type(error).__name__}). Check it"
        except requests.exceptions.RequestException as error:
            raise _Passing(f"no connection ({type(error).__name__})") from None
        else:
            return
        raise DownloadError(f"{self.name}: {problem}.")

    def _may_resume(self, known: dict[str, Any]) -> bool:
        """Whether the half that is here and the half still there are surely of one file."""
        if self.checksum:
            return True  # the whole is held against it in the end
        return bool(known.get("validator")) and known.get("url") == self._url_id()

    def _take(self, response: requests.Response, have: int, known: dict[str, Any]) -> None:
        status = response.status_code
        if status == 416 and have:
            return self._at_the_end(response, have)
        if status in PASSING:
            raise _Passing(f"the server answers {status}", asked_wait(response))
        if status not in (200, 206) or (status == 206 and not have):
            raise DownloadError(f"{self.name}: the server answers {status}: {remedy(status)}.")
        if status == 206:
            total = self._checked_range(response, have, known)
        else:  # the whole file again: it changed, or this server knows no ranges
            have, total = 0, length_of(response)
        if self.size and total not in (None, self.size):
            raise DownloadError(
                f"{self.name} has {total} bytes on the server, {self.size} were expected: it is another "
                "file. Check the address, or name another mirror."
            )
        refuse_full_disk(self.path.parent, (total or 0) - have, self.path.name)
        self._write(response, have, total)

    def _at_the_end(self, response: requests.Response, have: int) -> None:
        """The server has nothing behind byte `have`: either all is here, or the file has become shorter."""
        if range_of(response)[1] != have:
            self.half.forget()
            raise _Passing("the file on the server has changed; it starts anew", 0.0)
        self.half.note(total=have)

    def _checked_range(self, response: requests.Response, have: int, known: dict[str, Any]) -> int | None:
        first, total = range_of(response)
        same = known.get("total") in (None, total)
        if told := validator_of(response):
            same = same and known.get("validator") == told
        if first != have or not (same or self.checksum):
            self.half.forget()
            raise _Passing("the server does not continue this file; it starts anew", 0.0)
        return total

    def _write(self, response: requests.Response, have: int, total: int | None) -> None:
        got, self.doubtful = have, self.doubtful or have > 0 or total is None
        try:
            self.half.note(url=self._url_id(), validator=validator_of(response), total=total)
            with open(self.half.part, "ab" if have else "wb") as stream, self._bar(have, total) as bar:
                for chunk in self._chunks(response, judged=have > 0):
                    if got == 0:
                        refuse_page(chunk, self.path.name)
                    got += stream.write(chunk)
                    bar.update(len(chunk))
            if total is None:
                self.half.note(total=got)
        except ContentError as error:
            self.half.forget()
            raise DownloadError(f"{shown(self.url)}: {error}") from None
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise DownloadError(
                f"{self.path.name}: the disk of {self.path.parent} is full. Free some space or set "
                "download_dir to a larger disk. Run the cell again then: what was received is kept."
            ) from None
        if total is not None and got != total:  # urllib3 before 2.0 lets a short body pass
            raise _Passing(f"the connection ended at {got} of {total} bytes")

    def _chunks(self, response: requests.Response, judged: bool) -> Iterator[bytes]:
        """The body as it comes, undecoded; the first piece is long enough to judge the file by."""
        import urllib3

        patience, head = self.patience, b""
        # read1 gives what is there; read would wait until a whole chunk has trickled in
        read = getattr(response.raw, "read1", response.raw.read)
        begun, received = time.monotonic(), 0
        try:
            while chunk := read(_CHUNK_of_downloads, decode_content=False):
                received += len(chunk)
                head = head + chunk
                if judged or len(head) >= _ENOUGH_TO_JUDGE:
                    yield head
                    head, judged = b"", True
                if time.monotonic() - begun > patience.slow_window_s:
                    if received < patience.slow_bytes:
                        raise _Passing(f"only {received} bytes came in {patience.slow_window_s:g} s")
                    begun, received = time.monotonic(), 0
        except urllib3.exceptions.ReadTimeoutError:
            raise _Passing(f"the server went silent for {patience.read_s:g} s") from None
        except urllib3.exceptions.HTTPError as error:
            raise _Passing(f"the connection broke ({type(error).__name__})") from None
        if head:
            yield head

    def _url_id(self) -> str:
        """Tells addresses apart without keeping what may be secret in them."""
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def _bar(self, have: int, total: int | None) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, mininterval=1,
            desc=self.path.name, disable=not self.progress,
        )  # fmt: skip


MOST_FILES = 500_000
MOST_TIMES_LARGER = 200  # NIfTI heads shrink to a half or a tenth; a bomb to a thousandth
_SMALL = 256 << 20  # below this no ratio is judged: an empty label map may shrink a thousandfold
_CHUNK_of_archives = 1 << 20
_DAMAGED = (
    ContentError, tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
    EOFError, NotImplementedError,
)  # fmt: skip
_LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db")


class ArchiveError(DownloadError):
    """An archive that is damaged or not safe to unpack; the message says what to do."""


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its name, its size [bytes] and how to open it."""

    name: str
    size: int
    handle: Any


def is_archive(name: str) -> bool:
    """Whether a name ends like an archive that `unpack` opens."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path | str, folder: Path | str, *, progress: bool = True) -> list[str]:
    """Unpack all regular files of an archive.

    Parameters
    ----------
    archive : path
        `.tar`, `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz` or `.zip`.
    folder : path
        Where its files go; made where it is missing.
    progress : bool
        Show a bar.

    Returns
    -------
    list of str
        What was left out (links, devices), and why.

    Raises
    ------
    ArchiveError
        Where a name leads outside the folder, the archive is damaged, encrypted, or would grow beyond reason.
    DownloadError
        Where the disk is too small.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(archive)
    done = unpacked(folder, archive.name)
    if done is not None and done["identity"] == identity:
        return done["left_out"]
    begun = _begun(folder, archive.name)
    same = begun.get("identity") == identity
    write_json({"identity": identity}, _mark(folder, archive.name, "begun"))
    left_out: list[str] = []
    try:
        if archive.name.lower().endswith(".tar"):
            check_whole(archive)  # a tar cut between two files opens like a shorter one
        with _opened(archive) as members:
            names = _unpack_members(members, archive, folder, left_out, same, progress)
    except _DAMAGED as error:
        raise ArchiveError(
            f"{archive.name} is damaged ({type(error).__name__}: {error}). Delete it and run the cell again: "
            "it is fetched anew; files already unpacked are kept."
        ) from None
    result = {"identity": identity, "files": names, "left_out": left_out}
    write_json(result, _mark(folder, archive.name, "unpacked"))
    _mark(folder, archive.name, "begun").unlink(missing_ok=True)
    return left_out


def fetch_and_unpack(
    urls: Sequence[str],
    archive: Path | str,
    folder: Path | str,
    *,
    checksum: str = "",
    keep: bool = False,
    patience: Patience | None = None,
    progress: bool = True,
) -> list[str]:
    """Download an archive and unpack it; where that was done before, nothing is asked of the server.

    Parameters
    ----------
    urls, checksum, patience, progress
        As `downloads.fetch` takes them.
    archive : path
        Where the archive goes; deleted once it is unpacked, unless `keep`.
    folder : path
        Where its files go.

    Returns
    -------
    list of str
        What was left out of the archive, and why.

    Raises
    ------
    DownloadError
        As `fetch` and `unpack`.
    """
    archive = Path(archive)
    if done := unpacked(folder, archive.name):
        return done["left_out"]
    fetch(urls, archive, checksum=checksum, patience=patience, progress=progress)
    left_out = unpack(archive, folder, progress=progress)
    if not keep:
        archive.unlink()
    return left_out


def unpacked(folder: Path | str, archive: str) -> dict[str, Any] | None:
    """What an archive of this name left in `folder`, if it was unpacked to the end and nothing is missing."""
    try:
        done = read_json(_mark(Path(folder), archive, "unpacked"))
    except (OSError, ValueError):
        return None
    whole = all((Path(folder) / name).is_file() for name in done["files"])
    return done if whole else None


# --- members ----------------------------------------------------------------------------------------------


def _unpack_members(
    members: _Reader, archive: Path, folder: Path, left_out: list[str], same: bool, progress: bool
) -> list[str]:
    from tqdm import tqdm

    names: list[str] = []
    total = 0
    root = folder.resolve()
    files = tqdm(members.files(left_out), desc=f"unpack {archive.name}", unit="file", disable=not progress)
    for member in files:
        target = safe_target(root, member.name, archive.name)
        total += member.size
        _refuse_bomb(archive, total, len(names))
        # a file gets its name only when it is whole, so one of this size from the same archive is done
        if not (same and target.is_file() and target.stat().st_size == member.size):
            refuse_full_disk(folder, member.size, f"{member.name} of {archive.name}")
            _write_member(members, member, target)
        names.append(target.relative_to(root).as_posix())
    return names


def safe_target(root: Path, name: str, archive: str) -> Path:
    """Where a member goes; refused where that is not inside `root`, also by way of links that are there."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    outside = name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name) is not None
    if outside or not parts or "\0" in name:
        raise ArchiveError(
            f"{archive} was not unpacked: '{name}' leads outside the folder. Such an archive is broken or "
            "hostile: get it from its publisher."
        )
    target = root.joinpath(*parts)
    if not target.parent.resolve().is_relative_to(root) or target.is_symlink():
        raise ArchiveError(f"{archive} was not unpacked: '{name}' would go through a link out of {root}.")
    return target


def _refuse_bomb(archive: Path, total: int, count: int) -> None:
    stored = archive.stat().st_size
    if count >= MOST_FILES or (total > _SMALL and total > MOST_TIMES_LARGER * stored):
        raise ArchiveError(
            f"{archive.name} was not unpacked to the end: {stored / 2**20:.1f} MiB hold over "
            f"{total / 2**30:.1f} GiB in {count + 1} files, more than scans can. If it is right, unpack it "
            "by hand and use source = folder."
        )


def _write_member(members: _Reader, member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.unpacking")
    try:
        with members.open(member) as source, open(temporary, "wb") as sink:
            written = 0
            while chunk := source.read(min(_CHUNK_of_archives, member.size - written + 1)):
                written += sink.write(chunk)
                if written > member.size:
                    break
            sink.flush()
            os.fsync(sink.fileno())
        if written != member.size:
            raise EOFError(f"'{member.name}' has {written} bytes, the archive says {member.size}")
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DownloadError(
            f"The disk of {target.parent} is full. Free some space or set download_dir to a larger disk, "
            "then run the cell again: files already unpacked are kept."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# --- tar and zip alike ------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    # the content decides: a tar.gz renamed to .tar is common
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _ZipReader(archive)
    else:
        with tarfile.open(path, "r:*") as archive:
            yield _TarReader(archive)


class _TarReader:
    """Regular files of a tar, in the order they are stored: going back would decompress from the start."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self.archive = archive

    def files(self, left_out: list[str]) -> Iterator[_Member]:
        for info in self.archive:
            if info.isreg() and not _is_litter(info.name):
                yield _Member(info.name, info.size, info)
            elif not info.isdir() and not info.isreg():
                kind = "a link" if info.issym() or info.islnk() else "no regular file"
                left_out.append(f"{info.name}: {kind}, not unpacked")

    def open(self, member: _Member) -> IO[bytes]:
        return self.archive.extractfile(member.handle)


class _ZipReader:
    """Regular files of a zip."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def files(self, left_out: list[str]) -> Iterator[_Member]:
        for info in self.archive.infolist():
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise ArchiveError(
                    f"'{info.filename}' needs a password. Unpack by hand and use source = folder."
                )
            if mode and stat.S_ISLNK(mode):
                left_out.append(f"{info.filename}: a link, not unpacked")
            elif not info.is_dir() and not _is_litter(info.filename):
                yield _Member(info.filename, info.file_size, info)

    def open(self, member: _Member) -> IO[bytes]:
        return self.archive.open(member.handle)


_Reader = _TarReader | _ZipReader


def _is_litter(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in _LITTER or part.startswith("._") for part in parts)


def _identity(archive: Path) -> str:
    """Tells two archives of one name apart by size, first and last megabyte."""
    size = archive.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(archive, "rb") as stream:
        digest.update(stream.read(_CHUNK_of_archives))
        stream.seek(max(0, size - _CHUNK_of_archives))
        digest.update(stream.read(_CHUNK_of_archives))
    return digest.hexdigest()


def _mark(folder: Path, archive: str, state: str) -> Path:
    return folder / f".{archive}.{state}.json"


def _begun(folder: Path, archive: str) -> dict[str, Any]:
    try:
        return read_json(_mark(folder, archive, "begun"))
    except (OSError, ValueError):
        return {}
