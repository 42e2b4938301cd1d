"""How a volume store lies on disk: shards as plain `.npy` files, an index, and the one who appends to them.

A row is written and flushed before the index names it, and the index is replaced whole. A build that is
killed at any moment therefore leaves a store that is whole but shorter; the next build goes on from there.

A volume store on a slow file system (Drive) worked on through a copy on the machine's own disk.

Fetched once, checked row by row; sent back shard by shard, each copy read back before it counts. A session
that is cut loses at most what it made in its last minute.

The volume store: preprocessed scans as float16 rows of a few large files, each row with its checksum.

What is in a row is decided in preprocessing, how rows get there in `store_building`; who a scan belongs to is
not known here.

Fill the volume store: scans are preprocessed side by side, here or on a cluster, one process writes.

A scan that cannot be used is reported and left out; a build that is killed is gone on with by the next.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainage_nb.cluster import ClusterError, in_order, open_cluster
from brainage_nb.volumes.preprocessing import as_stored, preprocess
from brainage_nb.volumes.scans import ScanError, load_scan, voxel_file
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import (
    copy_verified,
    n_workers,
    read_csv,
    read_json,
    sha256_of,
    write_csv,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import pandas as pd

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


class VolumeStore:
    """Preprocessed volumes on disk, read through memory maps.

    Parameters
    ----------
    folder : path
        `volumes/<fingerprint>` of a workspace.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "preprocessing.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} is no volume store: preprocessing.json is missing. Run notebook 03 first."
            )
        self.settings = PreprocessingSettings.from_json(read_json(self.folder / "preprocessing.json"))
        self.index = read_index(self.folder)
        self._place = dict(zip(self.index["scan_id"], range(len(self.index)), strict=True))
        self._maps: dict[int, np.ndarray] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> VolumeStore:
        """Open the store in a folder; FileNotFoundError where there is none."""
        return cls(folder)

    @property
    def fingerprint(self) -> str:
        """Name of the preprocessing that made the volumes."""
        return self.settings.fingerprint

    @property
    def spacing_mm(self) -> float:
        """Edge of a voxel, mm."""
        return self.settings.spacing_mm

    @property
    def size(self) -> int:
        """Edge of a volume, voxels."""
        return self.settings.size

    @property
    def scan_ids(self) -> list[str]:
        """Scans in the store, in the order in which they were added."""
        return self.index["scan_id"].tolist()

    @property
    def shards(self) -> dict[int, np.ndarray]:
        """Memory maps (n, size, size, size) float16, read-only, by shard number; only of shards in use."""
        if self._maps is None:
            rows = self.index.groupby("shard")["row"].max() + 1
            self._maps = {
                int(shard): np.memmap(
                    shard_path(self.folder, shard),
                    np.float16,
                    "r",
                    HEADER_BYTES,
                    (int(count), self.size, self.size, self.size),
                )
                for shard, count in rows.items()
            }
        return self._maps

    def locate(self, scan_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row of each scan, two int arrays (n,); KeyError names what is missing."""
        places = self._places(scan_ids)
        columns = self.index[["shard", "row"]].to_numpy()[places]
        return columns[:, 0], columns[:, 1]

    def read(self, scan_ids: Sequence[str]) -> np.ndarray:
        """Volumes of several scans, float16 (n, size, size, size), in memory."""
        made = np.empty((len(scan_ids), self.size, self.size, self.size), np.float16)
        for place, (shard, row) in enumerate(zip(*self.locate(scan_ids), strict=True)):
            made[place] = self.shards[shard][row]
        return made

    def verify(self) -> pd.DataFrame:
        """Compare every row with its checksum; a row (scan_id, problem) for each that differs."""
        import pandas as pd

        bad = [
            (entry.scan_id, f"shard {entry.shard}, row {entry.row} is not what was written; build again")
            for entry in self.index.itertuples()
            if sha256_of_volume(self.shards[entry.shard][entry.row]) != entry.sha256
        ]
        return pd.DataFrame(bad, columns=["scan_id", "problem"])

    def __getitem__(self, scan_id: str) -> np.ndarray:
        return self.read([scan_id])[0]

    def __contains__(self, scan_id: str) -> bool:
        return scan_id in self._place

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}  # a worker maps the files itself

    def _places(self, scan_ids: Sequence[str]) -> list[int]:
        if missing := [scan_id for scan_id in scan_ids if scan_id not in self._place]:
            raise KeyError(
                f"{len(missing)} of {len(scan_ids)} scans are not in {self.folder} ({len(self)} volumes), "
                f"the first is {missing[0]!r}. Run notebook 03 on the cohort as it is now."
            )
        return [self._place[scan_id] for scan_id in scan_ids]


def current_store(volumes_folder: str | Path, scratch: Path | None = None) -> VolumeStore:
    """Open the store that `volumes/current` names; with `scratch`, a copy of it on that fast local disk."""
    name = Path(volumes_folder) / "current"
    if not name.is_file():
        raise FileNotFoundError(f"{name} is missing. Run notebook 03 first; it makes the volume store.")
    home = Path(volumes_folder) / name.read_text(encoding="utf-8").strip()
    if scratch is None:
        return VolumeStore.open(home)
    mirror = StoreMirror(home, scratch)
    if damaged := mirror.fetch():
        raise OSError(f"{damaged} volumes of {home} are damaged. Run notebook 03 again: it makes them anew.")
    return VolumeStore.open(mirror.local)


FAILED_COLUMNS = ["scan_id", "image", "code", "reason"]


@dataclass(frozen=True)
class StoreReport:
    """What a build did.

    Attributes
    ----------
    store : VolumeStore
    failed : DataFrame
        scan_id, image, code, reason of scans that gave no volume.
    n_new, n_present : int
        Volumes made now, and found made.
    seconds : float
    note : str
        One sentence to show.
    """

    store: VolumeStore
    failed: pd.DataFrame
    n_new: int
    n_present: int
    seconds: float
    note: str


def build_store(
    scans: pd.DataFrame,
    folder: str | Path,
    settings: PreprocessingSettings | None = None,
    resolve: Callable[[str], Path] = Path,
    n_jobs: int = 0,
    scratch: Path | None = None,
    cluster: str = "",
) -> StoreReport:
    """Preprocess scans into the store of these settings, add what is missing, and make it the current one.

    A scan is preprocessed again when its file's content changed: size and time are compared, and, where only
    the time differs, the content's hash. A scan whose file is gone keeps its volume. Scans no longer listed
    stay.

    Parameters
    ----------
    scans : DataFrame
        Columns scan_id and image; a row a scan.
    folder : path
        `volumes` of the workspace; the store is `folder/<fingerprint>`.
    settings : PreprocessingSettings, optional
        2 mm and 96 voxels where left out.
    resolve : callable
        From an `image` cell to a path (`Workspace.resolve`).
    n_jobs : int
        Processes; 0 takes all processors. The store is the same for any number.
    scratch : path, optional
        Fast local disk to work on where `folder` is slow (`Workspace.scratch`); the store is sent there
        while it grows, and the report's store is the local copy.
    cluster : str
        Dask workers to preprocess on instead of `n_jobs` processes here, see `open_cluster`; this process
        writes all rows. A scan whose worker dies is done by another.

    Returns
    -------
    StoreReport

    Raises
    ------
    ClusterError
        The cluster cannot be used as named.
    """
    import pandas as pd

    began = time.monotonic()
    settings = settings or PreprocessingSettings()
    _check_scans(scans)
    home = Path(folder) / settings.fingerprint
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "preprocessing.json").exists():
        write_json(settings.to_json(), home / "preprocessing.json")
    paths = {
        scan: voxel_file(resolve(image)) for scan, image in zip(scans["scan_id"], scans["image"], strict=True)
    }
    mirror = StoreMirror(home, scratch) if scratch else None
    if mirror is not None:
        mirror.fetch()
        home = mirror.local
    writer = StoreWriter(home, settings.size, mirror)
    todo = [scan for scan in paths if not writer.has(scan, paths[scan])]
    with _preprocessed([paths[scan] for scan in todo], settings, n_workers(n_jobs), cluster) as results:
        failed, notes = _fill(writer, todo, results)
    note = _note(Path(folder), settings, len(todo) - len(failed), len(paths) - len(todo), len(failed))
    note += f" Masks beside {len(notes)} scans were not taken, such as {notes[0]}" if notes else ""
    write_text(settings.fingerprint + "\n", Path(folder) / "current")
    table = pd.DataFrame(failed, columns=["scan_id", "code", "reason"])
    table.insert(1, "image", [str(paths[scan]) for scan in table["scan_id"]])
    return StoreReport(
        store=VolumeStore.open(home),
        failed=table[FAILED_COLUMNS],
        n_new=len(todo) - len(failed),
        n_present=len(paths) - len(todo),
        seconds=time.monotonic() - began,
        note=note,
    )


def _fill(
    writer: StoreWriter, todo: list[str], results: Iterable
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Write what was preprocessed, in the table's order; give (scan_id, code, reason) of what failed, and the
    notes on the others.
    """
    from tqdm import tqdm

    failed, notes = [], []
    try:
        bar = tqdm(zip(todo, results, strict=True), "preprocessing", len(todo), unit="scan", disable=not todo)
        for scan, result in bar:
            if isinstance(result, ScanError):
                failed.append((scan, result.code, result.sentence))
            elif isinstance(result, ClusterError):
                failed.append((scan, "lost", f"Not preprocessed: {result}. Run this again."))
            elif isinstance(result, Exception):
                raise result
            else:
                *row, note = result
                writer.add(scan, *row)
                notes += [f"{scan}: {note}"] if note else []
    finally:
        writer.close()
    return failed, notes


@contextmanager
def _preprocessed(
    paths: list[Path], settings: PreprocessingSettings, workers: int, cluster: str
) -> Iterator[Iterable]:
    """The result of `_one` for each path, in order; at most a few volumes wait in memory."""
    tasks = ((path, settings) for path in paths)
    if cluster and paths:
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        with open_cluster(cluster, folder) as client:
            yield in_order(client, _one, tasks)
    elif min(workers, len(paths)) < 2:
        yield (_one(*task) for task in tasks)
    else:
        from joblib import Parallel, delayed

        pool = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="3*n_jobs")
        yield pool(delayed(_one)(*task) for task in tasks)


def _one(path: Path, settings: PreprocessingSettings) -> tuple[np.ndarray, dict, str] | ScanError:
    """One scan's row, what its file was and a note on it, or why there is none."""
    try:
        found = path.stat()
        image = load_scan(path)
        volume = as_stored(preprocess(image, settings))
        source = {"source_bytes": found.st_size, "source_mtime_ns": found.st_mtime_ns}
        note = image.extra["flags"].get("mask_not_taken", "")
        return volume, source | {"source_sha256": sha256_of(path)}, note
    except ScanError as error:
        return error
    except MemoryError:
        return ScanError("too_large", f"{path.name} does not fit into memory.")
    except OSError as error:
        return ScanError("missing", f"{path} cannot be read ({error.strerror or error}).")


def _note(folder: Path, settings: PreprocessingSettings, new: int, present: int, failed: int) -> str:
    note = f"{settings.fingerprint}: {new} volumes made, {present} were there, {failed} failed."
    before = folder / "current"
    named = before.read_text(encoding="utf-8").strip() if before.is_file() else settings.fingerprint
    other = folder / named / "preprocessing.json"
    if named == settings.fingerprint or not other.is_file():
        return note
    old, now = read_json(other)["settings"], settings.to_json()["settings"]
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in now.items() if old.get(key) != value]
    return f"{note} Before, {named} was in use; changed: {', '.join(changed) or 'the steps themselves'}."


def _check_scans(scans: pd.DataFrame) -> None:
    if missing := {"scan_id", "image"} - set(scans):
        raise ValueError(f"The table of scans lacks {sorted(missing)}; it has {list(scans)}.")
    twice = scans["scan_id"][scans["scan_id"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"{len(twice)} scan_ids stand in more than one row, the first is {twice[0]!r}.")
