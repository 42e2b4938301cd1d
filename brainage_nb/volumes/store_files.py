"""How a volume store lies on disk: shards as plain `.npy` files, an index, and the one who appends to them.

A row is written and flushed before the index names it, and the index is replaced whole. A build that is
killed at any moment therefore leaves a store that is whole but shorter; the next build goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..workspace import read_csv, sha256_of, write_csv

if TYPE_CHECKING:
    import pandas as pd

    from .staging import StoreMirror

SHARD_BYTES = 256 * 2**20
HEADER_BYTES = 128  # of a .npy file of version 1.0 with this shape and type
COMMIT_SECONDS = 1.0  # work lost at most when a build is killed
INDEX_COLUMNS = ["scan_id", "shard", "row", "sha256", "source_bytes", "source_mtime_ns", "source_sha256"]


class StoreWriter:
    """Appends rows; the only one that writes a store. Rows reach the disk before the index names them."""

    def __init__(self, folder: Path, size: int, mirror: StoreMirror | None = None) -> None:
        self.folder, self.size, self.mirror = folder, size, mirror
        self.row_bytes = 2 * size**3
        self.capacity = max(1, SHARD_BYTES // self.row_bytes)
        self.entries = {entry["scan_id"]: entry for entry in read_index(folder).to_dict("records")}
        # Where a changed scan got a new row, its old one stays unused: readers may have it mapped.
        self.next = max((e["shard"] * self.capacity + e["row"] + 1 for e in self.entries.values()), default=0)
        self.pending: list[dict] = []
        self.committed = time.monotonic()

    def has(self, scan_id: str, path: Path) -> bool:
        """Whether the scan is stored and its file is what it was."""
        entry = self.entries.get(scan_id)
        if entry is None or not path.exists():
            return entry is not None
        found = path.stat()
        if found.st_size != entry["source_bytes"]:
            return False
        return found.st_mtime_ns == entry["source_mtime_ns"] or sha256_of(path) == entry["source_sha256"]

    def add(self, scan_id: str, volume: np.ndarray, source: dict) -> None:
        """Append one volume."""
        shard, row = divmod(self.next, self.capacity)
        path = shard_path(self.folder, shard)
        if self.pending and self.pending[-1]["shard"] != shard:
            self.commit()
        with open(path, "r+b" if path.exists() else "w+b") as stream:
            stream.seek(HEADER_BYTES + row * self.row_bytes)
            stream.write(volume.tobytes())
        self.next += 1
        entry = {"scan_id": scan_id, "shard": shard, "row": row, "sha256": sha256_of_volume(volume)} | source
        self.pending.append(entry)
        if time.monotonic() - self.committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush the rows added since the last time, then let the index name them."""
        if not self.pending:
            return
        last = self.pending[-1]
        with open(shard_path(self.folder, last["shard"]), "r+b") as stream:
            stream.write(_header(last["row"] + 1, self.size))
            stream.truncate(HEADER_BYTES + (last["row"] + 1) * self.row_bytes)
            stream.flush()
            os.fsync(stream.fileno())
        self.entries |= {entry["scan_id"]: entry for entry in self.pending}
        import pandas as pd

        write_csv(pd.DataFrame(self.entries.values(), columns=INDEX_COLUMNS), self.folder / "index.csv")
        self.pending, self.committed = [], time.monotonic()
        if self.mirror is not None:
            self.mirror.send_now_and_then()

    def close(self) -> None:
        """Commit, and give the mirror's store all there is."""
        self.commit()
        if self.mirror is not None:
            self.mirror.send()


def read_index(folder: Path) -> pd.DataFrame:
    """The index of a store, empty where nothing was committed yet; ids are text."""
    import pandas as pd

    path = folder / "index.csv"
    return read_csv(path) if path.is_file() else pd.DataFrame(columns=INDEX_COLUMNS)


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"shard-{shard:04d}.npy"


def _header(rows: int, size: int) -> bytes:
    """A .npy header; NumPy pads it so that the number of rows may grow in place."""
    stream = io.BytesIO()
    shape = (rows, size, size, size)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
    if stream.tell() != HEADER_BYTES:
        raise RuntimeError(f"NumPy wrote a header of {stream.tell()} bytes; expected {HEADER_BYTES}.")
    return stream.getvalue()


def sha256_of_volume(volume: np.ndarray) -> str:
    """Checksum of one row as it lies on disk."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()
