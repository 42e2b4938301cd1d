"""Fetch a file over HTTP: it is whole and the right one, or absent. Resumed, retried, checked, then renamed.

Knows no data set. `requests` is what every platform has; `pooch` (hashes, mirrors) cannot go on with a half
file, and `tenacity` cannot start its count anew when bytes arrived, which a connection that drops every
gigabyte needs: so the loop is written here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainage_nb.cohort.answers import (
    PASSING,
    asked_wait,
    has_password,
    length_of,
    range_of,
    remedy,
    shown,
    validator_of,
)
from brainage_nb.cohort.content import ContentError, refuse_page
from brainage_nb.cohort.half_file import FULL_DISK, DownloadError, HalfFile, only_one, refuse_full_disk

if TYPE_CHECKING:
    import requests

__all__ = ["DownloadError", "Patience", "fetch"]

_CHUNK = 1 << 18
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
            while chunk := read(_CHUNK, decode_content=False):
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
