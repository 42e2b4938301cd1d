"""The volume store: preprocessed scans as float16 rows of a few large `.npy` files, and how it is filled.

What is in a row is decided in preprocessing; who a scan belongs to is not known here.
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

from brainage_nb.cluster import ClusterError, in_order, open_cluster, process_pool
from brainage_nb.platforms import n_workers
from brainage_nb.volumes.preprocessing import as_stored, build_transforms, preprocess
from brainage_nb.volumes.scans import ScanError, errors_as_reason, load_scan, voxel_file
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import (
    copy_verified,
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
COMMIT_SECONDS = 1.0  # work lost at most when a build is killed
SEND_SECONDS = 60.0  # work lost at most when a session on Colab ends
ROW = ["scan_id", "shard", "row", "sha256"]
INDEX_COLUMNS = [*ROW, "source_bytes", "source_mtime_ns", "source_sha256"]
FAILED_COLUMNS = ["scan_id", "image", "code", "reason"]


class VolumeStore:
    """Preprocessed volumes on disk, read through memory maps: a torch `Dataset`, without needing torch.

    `store[0]` and `store["sub-01"]` are a volume, float16 (size, size, size), axes RAS, in the order of
    `scan_ids`.

    Parameters
    ----------
    folder : path
        `volumes/<fingerprint>` of a workspace.

    Examples
    --------
    >>> store = current_store("brainage_workspace/volumes")
    >>> for volumes in torch.utils.data.DataLoader(store, batch_size=8):
    ...     print(volumes.shape)  # (8, size, size, size)
    >>> some = torch.utils.data.Subset(store, ["sub-01", "sub-07"])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "preprocessing.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} is no volume store: preprocessing.json is missing. Run notebook 03 first."
            )
        self.settings = PreprocessingSettings.from_json(read_json(self.folder / "preprocessing.json"))
        self.fingerprint, self.spacing_mm = self.settings.fingerprint, self.settings.spacing_mm
        self.size = self.settings.size
        self.index = read_index(self.folder)
        self.scan_ids: list[str] = self.index["scan_id"].tolist()
        self._place = {scan_id: place for place, scan_id in enumerate(self.scan_ids)}
        self._maps: dict[int, np.ndarray] = {}

    @property
    def shards(self) -> dict[int, np.ndarray]:
        """Memory maps (n, size, size, size) float16, read-only, by shard number; only of shards in use."""
        if not self._maps:
            used = self.index["shard"].unique().tolist()
            self._maps = {shard: open_shard(self.folder, shard) for shard in used}
        return self._maps

    def locate(self, scan_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row of each scan, two int arrays (n,); KeyError names what is missing."""
        if missing := [scan_id for scan_id in scan_ids if scan_id not in self]:
            raise KeyError(
                f"{len(missing)} of {len(scan_ids)} scans are not in {self.folder} ({len(self)} volumes), "
                f"the first is {missing[0]!r}. Run notebook 03 on the cohort as it is now."
            )
        rows = self.index[["shard", "row"]].to_numpy()[[self._place[scan_id] for scan_id in scan_ids]]
        return rows[:, 0], rows[:, 1]

    def read(self, scan_ids: Sequence[str]) -> np.ndarray:
        """Volumes of several scans, float16 (n, size, size, size), in memory."""
        made = np.empty((len(scan_ids), *(self.size,) * 3), np.float16)
        for place, (shard, row) in enumerate(zip(*self.locate(scan_ids), strict=True)):
            made[place] = self.shards[shard][row]
        return made

    def __getitem__(self, scan: int | str) -> np.ndarray:
        return self.read([scan if isinstance(scan, str) else self.scan_ids[scan]])[0]

    def __contains__(self, scan_id: str) -> bool:
        return scan_id in self._place

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # a worker maps the files itself


def current_store(volumes_folder: str | Path, scratch: Path | None = None) -> VolumeStore:
    """Open the store that `volumes/current` names; with `scratch`, a copy of it on that fast local disk."""
    name = Path(volumes_folder) / "current"
    if not name.is_file():
        raise FileNotFoundError(f"{name} is missing. Run notebook 03 first; it makes the volume store.")
    home = Path(volumes_folder) / name.read_text(encoding="utf-8").strip()
    if scratch is None:
        return VolumeStore(home)
    mirror = StoreMirror(home, scratch)
    if damaged := mirror.fetch():
        raise OSError(f"{damaged} volumes of {home} are damaged. Run notebook 03 again: it makes them again.")
    return VolumeStore(mirror.local)


# --- on disk ----------------------------------------------------------------------------------------------


def read_index(folder: Path) -> pd.DataFrame:
    """The index of a store, empty where nothing was committed yet; ids are text."""
    import pandas as pd

    path = folder / "index.csv"
    return read_csv(path) if path.is_file() else pd.DataFrame(columns=INDEX_COLUMNS)


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"shard-{shard:04d}.npy"


def open_shard(folder: Path, shard: int) -> np.ndarray:
    """Memory map (n, size, size, size) float16 of one shard, read-only."""
    return np.lib.format.open_memmap(shard_path(folder, shard), mode="r")


def find_damaged(folder: Path, index: pd.DataFrame) -> list[str]:
    """Scans whose row is missing or has not the bytes that were written."""
    damaged = []
    for shard, entries in index.groupby("shard"):
        try:
            rows = open_shard(folder, shard)
        except (OSError, ValueError):  # missing, cut short, or its header is damaged
            rows = []
        damaged += [
            entry.scan_id
            for entry in entries.itertuples()
            if entry.row >= len(rows) or sha256_of_volume(rows[entry.row]) != entry.sha256
        ]
    return damaged


def sha256_of_volume(volume: np.ndarray) -> str:
    """Checksum of one row as it lies on disk."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()


def _bytes(folder: Path, shard: int) -> int:
    path = shard_path(folder, shard)
    return path.stat().st_size if path.is_file() else -1


def _header(rows: int, size: int) -> bytes:
    """A .npy header; NumPy pads it so that the number of rows may grow in place."""
    stream = io.BytesIO()
    shape = (rows, size, size, size)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return stream.getvalue()


class StoreWriter:
    """Appends rows; the only one that writes a store. Rows reach the disk before the index names them.

    A row is written and flushed before the index names it, and the index is replaced whole: a build that is
    killed at any moment leaves a store that is whole but shorter.
    """

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
            stream.seek(len(_header(row, self.size)) + row * self.row_bytes)
            stream.write(volume.tobytes())
        self.next += 1
        entry = {"scan_id": scan_id, "shard": shard, "row": row, "sha256": sha256_of_volume(volume)}
        self.pending.append(entry | source)
        if time.monotonic() - self.committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush the rows added since the last time, then let the index name them."""
        if not self.pending:
            return
        import pandas as pd

        rows = self.pending[-1]["row"] + 1
        with open(shard_path(self.folder, self.pending[-1]["shard"]), "r+b") as stream:
            header = _header(rows, self.size)
            stream.write(header)
            stream.truncate(len(header) + rows * self.row_bytes)
            stream.flush()
            os.fsync(stream.fileno())
        self.entries |= {entry["scan_id"]: entry for entry in self.pending}
        write_csv(pd.DataFrame(self.entries.values(), columns=INDEX_COLUMNS), self.folder / "index.csv")
        self.pending, self.committed = [], time.monotonic()
        if self.mirror is not None:
            self.mirror.send(SEND_SECONDS)

    def close(self) -> None:
        """Commit, and give the mirror's store all there is."""
        self.commit()
        if self.mirror is not None:
            self.mirror.send()


class StoreMirror:
    """The copy of a store on the machine's own disk, where the store lies on a slow one (Drive).

    Fetched once, checked row by row; sent back shard by shard, each copy read back before it counts.

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
        here = set(read_index(self.local)[ROW].itertuples(index=False, name=None))
        damaged: list[str] = []
        if not here.issuperset(index[ROW].itertuples(index=False, name=None)):
            damaged = self._copy(index)
        if not damaged:
            self._sizes = {shard: _bytes(self.home, shard) for shard in set(index["shard"])}
        return len(damaged)

    def _copy(self, index: pd.DataFrame) -> list[str]:
        (self.local / "index.csv").unlink(missing_ok=True)  # names no row while the shards are replaced
        for shard in set(index["shard"]):
            if _bytes(self.home, shard) > 0:
                shutil.copyfile(shard_path(self.home, shard), shard_path(self.local, shard))
        damaged = find_damaged(self.local, index)
        write_csv(index[~index["scan_id"].isin(damaged)], self.local / "index.csv")
        return damaged

    def send(self, after: float = 0.0) -> None:
        """Give the store all that the copy has: shards first, then the index that names their rows.

        Parameters
        ----------
        after : float
            Seconds since it was last sent below which nothing is done.

        Raises
        ------
        OSError
            Where a copy reads back with other content (Drive full or disconnected).
        """
        if time.monotonic() - self._sent <= after:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        for shard in sorted(set(read_index(self.local)["shard"])):
            size = _bytes(self.local, shard)
            if self._sizes.get(shard) != size:  # rows are only ever added
                copy_verified(shard_path(self.local, shard), shard_path(self.home, shard))
                self._sizes[shard] = size
        for name in ("preprocessing.json", "index.csv"):
            source, target = self.local / name, self.home / name
            if source.is_file() and not (target.is_file() and sha256_of(target) == sha256_of(source)):
                copy_verified(source, target)
        self._sent = time.monotonic()


# --- filling it -------------------------------------------------------------------------------------------


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
    note : str
        One sentence to show.
    """

    store: VolumeStore
    failed: pd.DataFrame
    n_new: int
    n_present: int
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
    stay. A scan that cannot be used is reported and left out; a build that was killed is completed by the
    next.

    Parameters
    ----------
    scans : DataFrame
        Columns scan_id and image; one row per scan.
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

    Examples
    --------
    >>> report = build_store(scans, "brainage_workspace/volumes", PreprocessingSettings.of_recipe("best"))
    >>> report.store["sub-01"].shape
    (96, 96, 96)
    """
    import pandas as pd

    settings = settings or PreprocessingSettings()
    _check_scans(scans)
    build_transforms(settings.extra)  # a wrong argument is told before any scan is opened
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
    new, present = len(todo) - len(failed), len(paths) - len(todo)
    note = f"{settings.fingerprint}: {new} volumes made, {present} were there, {len(failed)} failed."
    note += _changes(Path(folder), settings)
    note += f" Masks beside {len(notes)} scans were not taken, such as {notes[0]}" if notes else ""
    write_text(settings.fingerprint + "\n", Path(folder) / "current")
    rows = [(scan, str(paths[scan]), code, reason) for scan, code, reason in failed]
    table = pd.DataFrame(rows, columns=FAILED_COLUMNS)
    return StoreReport(VolumeStore(home), table, new, present, note)


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
    """The result of `_row` for each path, in order; at most a few volumes wait in memory."""
    tasks = ((path, settings) for path in paths)
    if cluster and paths:
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        with open_cluster(cluster, folder) as client:
            yield in_order(client, _row, tasks)
    elif min(workers, len(paths)) < 2:
        yield (_row(*task) for task in tasks)
    else:
        from joblib import delayed

        pool = process_pool(workers, return_as="generator", pre_dispatch="3*n_jobs")
        yield pool(delayed(_row)(*task) for task in tasks)


def _row(path: Path, settings: PreprocessingSettings) -> tuple[np.ndarray, dict, str] | ScanError:
    """One scan's row, what its file was and a note on it, or why there is none."""
    try:
        with errors_as_reason(path, "preprocessed"):
            found = path.stat()
            image = load_scan(path)
            volume = as_stored(preprocess(image, settings))
            source = {"source_bytes": found.st_size, "source_mtime_ns": found.st_mtime_ns}
            note = image.extra["flags"].get("mask_not_taken", "")
            return volume, source | {"source_sha256": sha256_of(path)}, note
    except ScanError as error:
        return error


def _changes(folder: Path, settings: PreprocessingSettings) -> str:
    """A sentence on the settings that were in use before, where they were others."""
    before = folder / "current"
    named = before.read_text(encoding="utf-8").strip() if before.is_file() else settings.fingerprint
    other = folder / named / "preprocessing.json"
    if named == settings.fingerprint or not other.is_file():
        return ""
    old, now = read_json(other)["settings"], settings.to_json()["settings"]
    differing = [key for key, value in now.items() if old.get(key, "") != value]
    changed = [f"{key} {old.get(key, '')} -> {now[key]}" for key in differing]
    return f" Before, {named} was in use; changed: {', '.join(changed) or 'the steps themselves'}."


def _check_scans(scans: pd.DataFrame) -> None:
    if missing := {"scan_id", "image"} - set(scans):
        raise ValueError(f"The table of scans lacks {sorted(missing)}; it has {list(scans)}.")
    twice = scans["scan_id"][scans["scan_id"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"{len(twice)} scan_ids stand in more than one row, the first is {twice[0]!r}.")
