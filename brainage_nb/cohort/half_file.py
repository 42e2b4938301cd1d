"""A file on its way: the half that has come, what is known of it, what the whole must be. Sends nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brainage_nb.cohort.content import ContentError, check_whole
from brainage_nb.workspace import hash_of, read_json, write_json

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
