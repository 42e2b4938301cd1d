"""A volume store on a slow file system (Drive) worked on through a copy on the machine's own disk.

Fetched once, checked row by row; sent back shard by shard, each copy read back before it counts. A session
that is cut loses at most what it made in its last minute.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..workspace import copy_verified, read_json, sha256_of, write_csv
from .store_files import HEADER_BYTES, read_index, shard_path

if TYPE_CHECKING:
    import pandas as pd

SEND_SECONDS = 60.0
ROW = ["scan_id", "shard", "row", "sha256"]


class StoreMirror:
    """The local copy of one store.

    Parameters
    ----------
    home : path
        `volumes/<fingerprint>` of the workspace: the store that lasts.
    scratch : path
        A folder on a fast disk; the copy is `scratch/volumes/<fingerprint>`.
    """

    def __init__(self, home: Path, scratch: Path) -> None:
        self.home = Path(home)
        self.local = Path(scratch) / "volumes" / self.home.name
        self._sizes: dict[int, int] = {}  # of the shards that the store is known to have whole, bytes
        self._sent = -float("inf")  # the first rows are sent at once, so that a full Drive shows early

    def fetch(self) -> int:
        """Bring the copy up to the store; returns the number of rows that were damaged and left out.

        A copy that has all that the store has is kept: it may be ahead, from a kernel that was killed.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        if not (self.home / "preprocessing.json").is_file():
            return 0
        copy_verified(self.home / "preprocessing.json", self.local / "preprocessing.json")
        index = read_index(self.home)
        damaged = 0
        if not _holds(read_index(self.local), index):
            index, damaged = self._copied(index)
        if not damaged:
            self._sizes = {shard: _bytes(shard_path(self.home, shard)) for shard in set(index["shard"])}
        return damaged

    def _copied(self, index: pd.DataFrame) -> tuple[pd.DataFrame, int]:
        (self.local / "index.csv").unlink(missing_ok=True)  # names no row while the shards are replaced
        for shard in sorted(set(index["shard"])):
            if shard_path(self.home, shard).is_file():
                shutil.copyfile(shard_path(self.home, shard), shard_path(self.local, shard))
        row_bytes = 2 * read_json(self.local / "preprocessing.json")["settings"]["size"] ** 3
        whole = [_is_whole(self.local, entry, row_bytes) for entry in index.itertuples()]
        if len(index):
            write_csv(index[whole], self.local / "index.csv")
        return index[whole], len(index) - sum(whole)

    def send(self) -> None:
        """Give the store all that the copy has: shards first, then the index that names their rows.

        Raises
        ------
        OSError
            Where a copy reads back with other content (Drive full or disconnected).
        """
        self.home.mkdir(parents=True, exist_ok=True)
        for shard in sorted(set(read_index(self.local)["shard"])):
            source = shard_path(self.local, shard)
            if self._sizes.get(shard) != _bytes(source):  # rows are only ever added
                copy_verified(source, shard_path(self.home, shard))
                self._sizes[shard] = _bytes(source)
        for name in ("preprocessing.json", "index.csv"):
            source, target = self.local / name, self.home / name
            if source.is_file() and not (target.is_file() and sha256_of(target) == sha256_of(source)):
                copy_verified(source, target)
        self._sent = time.monotonic()

    def send_now_and_then(self) -> None:
        """Send, unless that was done within the last minute."""
        if time.monotonic() - self._sent > SEND_SECONDS:
            self.send()


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _holds(copy: pd.DataFrame, index: pd.DataFrame) -> bool:
    """Whether the copy's index has every row of the store's, at its place and with its content."""
    rows = set(copy[ROW].itertuples(index=False, name=None))
    return rows.issuperset(index[ROW].itertuples(index=False, name=None))


def _is_whole(folder: Path, entry, row_bytes: int) -> bool:
    """Whether the bytes of a row have its checksum."""
    if not shard_path(folder, entry.shard).is_file():
        return False
    with open(shard_path(folder, entry.shard), "rb") as stream:
        stream.seek(HEADER_BYTES + entry.row * row_bytes)
        return hashlib.sha256(stream.read(row_bytes)).hexdigest() == entry.sha256
