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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brainage_nb.cluster import ClusterError, in_order, open_cluster, process_pool
from brainage_nb.platforms import n_workers
from brainage_nb.volumes.modalities import lay_onto_t1w
from brainage_nb.volumes.preprocessing import as_stored, build_transforms, preprocess
from brainage_nb.volumes.scans import ScanError, errors_as_reason, load_scan, voxel_file
from brainage_nb.volumes.settings import PreprocessingSettings, name_of_modality
from brainage_nb.workspace import (
    MAKERS,
    MODALITIES,
    MissingInput,
    copy_verified,
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
# What cells of the index look like, and those that are numbers.
CELLS = {"shard": r"\d{1,9}", "row": r"\d{1,9}", "source_bytes": r"\d{1,15}"} | {
    "source_mtime_ns": r"-?[0-8]?\d{1,18}",
    "sha256": r"[0-9a-f]{64}",
    "source_sha256": r"([0-9a-f]{64})?",
}
INTEGERS = ("shard", "row", "source_bytes", "source_mtime_ns")
INDEX_COLUMNS = [*ROW, "source_bytes", "source_mtime_ns", "source_sha256"]
FAILED_COLUMNS = ["scan_id", "image", "code", "reason"]
REMEDY = "Run notebook 03 again: it keeps what is whole and makes the rest again from the scans."


class StoreError(ValueError):
    """A file of a volume store is damaged; the message names it and what to do."""


class VolumeStore:
    """Preprocessed volumes on disk, read through memory maps: a torch `Dataset`, without needing torch.

    `store[0]` and `store["sub-01"]` are a volume, float16 (size, size, size), axes RAS, in the order of
    `scan_ids`.

    Parameters
    ----------
    folder : path
        `volumes/<fingerprint>` of a workspace.

    Raises
    ------
    MissingInput
        The folder is no store.
    StoreError
        `preprocessing.json` or `index.csv` is damaged; a shard only when `verify` or a volume is asked for.

    Examples
    --------
    >>> store = current_store("brainage_workspace/volumes")  # doctest: +SKIP
    >>> for volumes in torch.utils.data.DataLoader(store, batch_size=8):  # doctest: +SKIP
    ...     print(volumes.shape)  # (8, size, size, size)
    >>> some = torch.utils.data.Subset(store, ["sub-01", "sub-07"])  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.fingerprint, self.spacing_mm = self.settings.fingerprint, self.settings.spacing_mm
        self.size = self.settings.size
        self.index = read_index(self.folder)
        self.scan_ids: list[str] = self.index["scan_id"].tolist()
        self._place = {scan_id: place for place, scan_id in enumerate(self.scan_ids)}
        self._maps: dict[int, np.ndarray] = {}

    def verify(self) -> VolumeStore:
        """Compare every volume with the checksum that the index keeps of it; returns the store.

        One pass over the shards, about as fast as the disk.

        Raises
        ------
        StoreError
            Names the shards and the scans whose volumes have other content than was written; or there is no
            volume at all.
        """
        if not len(self):
            raise StoreError(f"{self.folder} holds no volume: index.csv is missing or empty. {REMEDY}")
        damaged = find_damaged(self.folder, self.index, self.size)
        if damaged:
            shards = sorted(set(self.index["shard"][self.index["scan_id"].isin(damaged)]))
            files = _name_some([shard_path(self.folder, shard).name for shard in shards])
            raise StoreError(
                f"{len(damaged)} of {len(self)} volumes in {self.folder} are damaged: missing, or not what "
                f"index.csv says was written ({files}; {_name_some(damaged)}). {REMEDY}"
            )
        self._maps = self._open_shards()
        return self

    @property
    def shards(self) -> dict[int, np.ndarray]:
        """Memory maps (n, size, size, size) float16, read-only, by shard number; only of shards in use."""
        self._maps = self._maps or self._open_shards()
        return self._maps

    def _open_shards(self) -> dict[int, np.ndarray]:
        rows = self.index.groupby("shard")["row"].max() + 1
        return {shard: open_shard(self.folder, shard, n, self.size) for shard, n in rows.items()}

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


def current_store(
    volumes_folder: str | Path, scratch: Path | None = None, modality: str = "T1w"
) -> VolumeStore:
    """Open the store that `volumes/current` names, every volume checked (`VolumeStore.verify`).

    Of another modality than T1w it is the one that `volumes/current_<modality>` names.

    With `scratch`, a copy of it on that fast local disk. Where the store is missing or damaged, notebook 03
    no longer counts as done in that workspace: the same `brainage-nb run` mends it first.
    """
    if modality != "T1w" and not (Path(volumes_folder) / name_of_modality("current", modality)).is_file():
        raise MissingInput(
            f"There are no {modality} volumes in {volumes_folder}. Notebook 03 makes them where notebook 01 "
            f"was given modalities=T1w,{modality} and found such scans."
        )
    try:
        store = VolumeStore(_current_folder(Path(volumes_folder), modality))
        check_name(store.folder, store.settings)
        if store.settings.modality != modality:
            raise StoreError(f"{store.folder} holds {store.settings.modality}, not {modality}. {REMEDY}")
        if scratch is not None:
            store = VolumeStore(StoreMirror(store.folder, scratch).fetch())
        return store.verify()
    except (StoreError, FileNotFoundError):
        result = Path(volumes_folder).parent / "results" / f"{MAKERS['volumes']}.json"
        with suppress(OSError):
            result.unlink()
        raise


# --- on disk ----------------------------------------------------------------------------------------------


def _current_folder(volumes_folder: Path, modality: str) -> Path:
    current = volumes_folder / name_of_modality("current", modality)
    if not current.is_file():
        raise MissingInput(f"{current} is missing. Run notebook 03 first; it makes the volume store.")
    name = current.read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name or not (volumes_folder / name).is_dir():
        raise StoreError(
            f"{current} names {name[:80]!r}, and there is no such store beside it. Run notebook 03 again: it "
            "names the store of its settings, and keeps the volumes that are there."
        )
    return volumes_folder / name


def read_settings(folder: Path) -> PreprocessingSettings:
    """How the volumes of a store were made; StoreError where `preprocessing.json` cannot be used."""
    path = folder / "preprocessing.json"
    if not path.is_file():
        raise MissingInput(
            f"{folder} is no volume store: preprocessing.json is missing. Run notebook 03 first."
        )
    try:
        return PreprocessingSettings.from_json(read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged or not of this version ({error}). {REMEDY}") from error


def read_index(folder: Path) -> pd.DataFrame:
    """The index of a store, empty where nothing was committed yet; ids are text. StoreError if damaged."""
    index, lost = salvage_index(folder)
    if lost:
        raise StoreError(f"{folder / 'index.csv'} is damaged: {lost}. {REMEDY}")
    return index


def salvage_index(folder: Path) -> tuple[pd.DataFrame, str]:
    """The rows of an index that are whole, and what is wrong with the others (empty: nothing)."""
    import pandas as pd

    path = folder / "index.csv"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines()
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, on_bad_lines="skip")
    except ValueError:  # nothing in it, or a quotation mark that is never closed
        table = pd.DataFrame()
    table = table.reindex(columns=INDEX_COLUMNS)
    whole = ~table["scan_id"].duplicated(keep=False)
    for column, cell in CELLS.items():
        whole &= table[column].astype(str).str.fullmatch(cell)
    table = table[whole].astype(dict.fromkeys(INTEGERS, "int64")).reset_index(drop=True)
    if path.is_file() and lines[:1] != [",".join(INDEX_COLUMNS)]:
        return table, "its first line does not name its columns"
    bad = max(0, len(lines) - 1) - len(table)
    return table, f"{bad} of its {len(lines) - 1} rows are torn or name a scan twice" if bad else ""


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"shard-{shard:04d}.npy"


def open_shard(folder: Path, shard: int, rows: int, size: int) -> np.ndarray:
    """Memory map (n, size, size, size) float16 of one shard, read-only; StoreError if it has fewer `rows`."""
    path = shard_path(folder, shard)
    try:
        volumes = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}). {REMEDY}") from error
    if volumes.dtype != np.float16 or volumes.shape[1:] != (size,) * 3 or len(volumes) < rows:
        found = f"{volumes.dtype} {volumes.shape}, expected {rows} float16 volumes of {size} voxels"
        raise StoreError(f"{path} is damaged: its header says {found}. {REMEDY}")
    return volumes


def find_damaged(folder: Path, index: pd.DataFrame, size: int) -> list[str]:
    """Scans whose row is missing or has not the bytes that were written, whatever a shard's header says."""
    damaged, first, row_bytes = [], len(_header(0, size)), 2 * size**3
    for shard, entries in index.sort_values(["shard", "row"]).groupby("shard"):
        path = shard_path(folder, shard)
        with open(path, "rb") if path.is_file() else io.BytesIO() as stream:
            for entry in entries.itertuples():
                stream.seek(first + entry.row * row_bytes)
                if hashlib.sha256(stream.read(row_bytes)).hexdigest() != entry.sha256:
                    damaged.append(entry.scan_id)
    return damaged


def _bytes(folder: Path, shard: int) -> int:
    path = shard_path(folder, shard)
    return path.stat().st_size if path.is_file() else -1


def _header(rows: int, size: int) -> bytes:
    """A .npy header; NumPy pads it so that the number of rows may grow in place."""
    stream = io.BytesIO()
    shape = (rows, size, size, size)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _seal(path: Path, rows: int, size: int) -> None:
    """Let a shard end after so many rows, its header say so, and the disk have it."""
    with open(path, "r+b") as stream:
        header = _header(rows, size)
        stream.write(header)
        stream.truncate(len(header) + rows * 2 * size**3)
        stream.flush()
        os.fsync(stream.fileno())


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_name(folder: Path, settings: PreprocessingSettings) -> None:
    """StoreError where a folder's name is not the fingerprint of the settings that lie in it."""
    if settings.fingerprint != folder.name:
        path = folder / "preprocessing.json"
        raise StoreError(
            f"{path} is of {settings.fingerprint}, which is not its folder's name. If the folder was "
            "renamed, give it that name; if this file was copied here, delete it. Then run notebook 03 again."
        )


class Source(NamedTuple):
    """The file of a scan and, of another modality than T1w, of the T1w scan that it is laid onto."""

    image: Path
    t1w: Path | None = None

    @property
    def files(self) -> list[Path]:
        """One, or both."""
        return [self.image] if self.t1w is None else [self.image, self.t1w]

    def exists(self) -> bool:
        """Whether all is there."""
        return all(file.exists() for file in self.files)

    def stamp(self) -> dict[str, int]:
        """Bytes together, and the later time."""
        found = [file.stat() for file in self.files]
        times = (one.st_mtime_ns for one in found)
        return {"source_bytes": sum(one.st_size for one in found), "source_mtime_ns": max(times)}

    def sha256(self) -> str:
        """Of the file; of two, that of their hashes."""
        hashes = [sha256_of(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class StoreWriter:
    """Appends rows; the only one that writes a store. Rows reach the disk before the index names them.

    A row is written and flushed before the index names it, and the index is replaced whole: a build that is
    killed at any moment leaves a store that is whole but shorter. Rows that are damaged are dropped at once,
    those whose content is what was written stay, even in a shard that was cut short.

    Attributes
    ----------
    damaged : list of str
        Scans whose rows were dropped.
    lost : str
        What was wrong with the index, empty where nothing was.
    mended : list of str
        Shards that could not be opened; whole rows in them are kept.
    """

    def __init__(self, folder: Path, size: int, mirror: StoreMirror | None = None) -> None:
        self.folder, self.size, self.mirror = folder, size, mirror
        self.row_bytes = 2 * size**3
        self.capacity = max(1, SHARD_BYTES // self.row_bytes)
        index, self.lost = salvage_index(folder)
        self.damaged = find_damaged(folder, index, size)
        index = index[~index["scan_id"].isin(self.damaged)]
        self.entries = {entry["scan_id"]: entry for entry in index.to_dict("records")}
        self.pending: list[dict] = []
        self.committed = time.monotonic()
        # Where a changed scan got a new row, its old one stays unused: readers may have it mapped.
        self.next = int((index["shard"] * self.capacity + index["row"] + 1).max()) if len(index) else 0
        if self.lost or self.damaged:
            self._write_index()
        self.mended = self._mend_shards(index)
        if mirror is not None and (self.mended or self.damaged):
            mirror.whole.clear()  # what lasts may have the same damage: send every shard again

    def _mend_shards(self, index: pd.DataFrame) -> list[str]:
        """Let shards whose header is damaged, or that were cut short, end after their last whole row."""
        mended = []
        for shard, rows in (index.groupby("shard")["row"].max() + 1).items():
            try:
                open_shard(self.folder, shard, rows, self.size)
            except StoreError:
                _seal(shard_path(self.folder, shard), rows, self.size)
                mended.append(shard_path(self.folder, shard).name)
        return mended

    def has(self, scan_id: str, source: Source) -> bool:
        """Whether the scan is stored and its file is what it was."""
        entry = self.entries.get(scan_id)
        if entry is None or not source.exists():
            return entry is not None
        found = source.stamp()
        if found["source_bytes"] != entry["source_bytes"]:
            return False
        same_time = found["source_mtime_ns"] == entry["source_mtime_ns"]
        return same_time or source.sha256() == entry["source_sha256"]

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
        checksum = hashlib.sha256(volume.tobytes()).hexdigest()
        self.pending.append({"scan_id": scan_id, "shard": shard, "row": row, "sha256": checksum} | source)
        if time.monotonic() - self.committed > COMMIT_SECONDS:
            self.commit()

    def drop(self, scan_id: str) -> None:
        """Forget the volume of a scan whose file has changed and gives none any more."""
        if self.entries.pop(scan_id, None):
            self._write_index()

    def commit(self) -> None:
        """Flush the rows added since the last time, then let the index name them."""
        if not self.pending:
            return
        last = self.pending[-1]
        _seal(shard_path(self.folder, last["shard"]), last["row"] + 1, self.size)
        self.entries |= {entry["scan_id"]: entry for entry in self.pending}
        self.pending = []
        self._write_index()
        if self.mirror is not None:
            self.mirror.send(SEND_SECONDS)

    def _write_index(self) -> None:
        import pandas as pd

        write_csv(pd.DataFrame(self.entries.values(), columns=INDEX_COLUMNS), self.folder / "index.csv")
        self.committed = time.monotonic()

    def close(self) -> None:
        """Commit, and give the mirror's store all there is."""
        self.commit()
        if self.mirror is not None:
            self.mirror.send()


class StoreMirror:
    """The copy of a store on the machine's own disk, where the store lies on a slow one (Drive).

    Fetched once; sent back shard by shard, each copy read back before it counts.

    Parameters
    ----------
    home : path
        `volumes/<fingerprint>` of the workspace: the store that lasts.
    scratch : path
        A folder on a fast disk; the copy is `scratch/volumes/<fingerprint>`.

    Attributes
    ----------
    whole : dict
        Bytes of the shards that the store has as the copy has them, by number.
    """

    def __init__(self, home: Path, scratch: Path) -> None:
        self.home = Path(home)
        self.local = Path(scratch) / "volumes" / self.home.name
        self.whole: dict[int, int] = {}
        self._sent = -float("inf")  # the first rows are sent at once, so that a full Drive shows early

    def fetch(self) -> Path:
        """Bring the copy up to the store and return its folder; nothing is verified yet.

        A copy that has all that the store has is kept: it may be ahead, from a kernel that was killed.
        """
        copy_verified(self.home / "preprocessing.json", self.local / "preprocessing.json")
        index, _ = salvage_index(self.home)
        here = set(salvage_index(self.local)[0][ROW].itertuples(index=False, name=None))
        self.whole = {shard: _bytes(self.home, shard) for shard in set(index["shard"])}
        if not here.issuperset(index[ROW].itertuples(index=False, name=None)):
            (self.local / "index.csv").unlink(missing_ok=True)  # names no row while shards are replaced
            for shard in self.whole:
                if self.whole[shard] >= 0:
                    shutil.copyfile(shard_path(self.home, shard), shard_path(self.local, shard))
            shutil.copyfile(self.home / "index.csv", self.local / "index.csv")
        return self.local

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
        for shard in sorted(set(read_index(self.local)["shard"])):
            size = _bytes(self.local, shard)
            if self.whole.get(shard) != size:  # rows are only ever added
                copy_verified(shard_path(self.local, shard), shard_path(self.home, shard))
                self.whole[shard] = size
        if (self.local / "index.csv").is_file():
            copy_verified(self.local / "index.csv", self.home / "index.csv")
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
    next. All volumes are compared with their checksums first; what is damaged is made again.

    Parameters
    ----------
    scans : DataFrame
        Columns scan_id and image, and, for another modality than T1w, t1w: the T1w scan of the same session
        that `image` is laid onto; one row per scan.
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
    StoreError
        The folder of these settings holds volumes of others.

    Examples
    --------
    >>> settings = PreprocessingSettings.of_recipe("best")
    >>> report = build_store(scans, "brainage_workspace/volumes", settings)  # doctest: +SKIP
    >>> report.store["sub-01"].shape  # doctest: +SKIP
    (96, 96, 96)
    """
    import pandas as pd

    settings = settings or PreprocessingSettings()
    _check_scans(scans)
    build_transforms(settings.extra)  # a wrong argument is told before any scan is opened
    home = Path(folder) / settings.fingerprint
    notes = [_claim(home, settings)]
    columns = [scans[name].map(resolve).map(voxel_file) for name in ("image", "t1w") if name in scans]
    paths = dict(zip(scans["scan_id"], map(Source, *columns), strict=True))
    mirror = StoreMirror(home, scratch) if scratch else None
    writer = StoreWriter(mirror.fetch() if mirror else home, settings.size, mirror)
    todo = {scan: path for scan, path in paths.items() if not writer.has(scan, path)}
    notes += _say_repairs(writer, todo)
    with _preprocessed(list(todo.values()), settings, n_workers(n_jobs), cluster) as results:
        failed, masks = _fill(writer, todo, results)
    new, present = len(todo) - len(failed), len(paths) - len(todo)
    made = f"{settings.fingerprint}: {new} volumes made, {present} were there, {len(failed)} failed."
    notes = [made, *notes, _say_changes(Path(folder), settings)]
    notes += [f"Masks beside {len(masks)} scans were not taken, such as {masks[0]}"] if masks else []
    write_text(settings.fingerprint + "\n", Path(folder) / name_of_modality("current", settings.modality))
    table = pd.DataFrame(failed, columns=FAILED_COLUMNS)
    return StoreReport(VolumeStore(writer.folder), table, new, present, " ".join(filter(None, notes)))


def _claim(home: Path, settings: PreprocessingSettings) -> str:
    """Write `preprocessing.json` where it is missing or damaged; a sentence where it was damaged."""
    path, note = home / "preprocessing.json", ""
    if path.is_file():
        try:
            found = read_settings(home)
        except StoreError:
            note = "preprocessing.json was damaged and is written again."
        else:
            check_name(home, found)
            return ""
    write_json(settings.to_json(), path)
    return note


def _say_repairs(writer: StoreWriter, todo: Iterable[str]) -> list[str]:
    """Sentences on the volumes that were there and are made again."""
    sentences = {
        "index.csv was damaged": [writer.lost] if writer.lost else [],
        "Mended": writer.mended,
        "Damaged, hence preprocessed anew": writer.damaged,
        "File replaced, hence preprocessed anew": [scan for scan in todo if scan in writer.entries],
    }
    return [f"{what}: {_name_some(which)}." for what, which in sentences.items() if which]


def _fill(writer: StoreWriter, todo: dict[str, Source], results: Iterable) -> tuple[list[tuple], list[str]]:
    """Write what was preprocessed, in the table's order; give rows of `FAILED_COLUMNS` and notes."""
    from tqdm import tqdm

    failed, notes = [], []
    try:
        bar = tqdm(zip(todo, results, strict=True), "preprocessing", len(todo), unit="scan", disable=not todo)
        for scan, result in bar:
            if isinstance(result, ClusterError):
                result = ScanError("lost", f"Not preprocessed: {result}. Run this again.")
            if isinstance(result, ScanError):
                failed.append((scan, str(todo[scan].image), result.code, result.sentence))
                writer.drop(scan)
                continue
            *row, note = result
            writer.add(scan, *row)
            notes += [f"{scan}: {note}"] if note else []
    finally:
        writer.close()
    return failed, notes


@contextmanager
def _preprocessed(
    paths: list[Source], settings: PreprocessingSettings, workers: int, cluster: str
) -> Iterator[Iterable]:
    """The result of `_row` for each path, in order; at most a few volumes wait in memory."""
    tasks = ((path, settings) for path in paths)
    if cluster and paths:
        folder = Path(os.path.commonpath([path.image.absolute().parent for path in paths]))
        with open_cluster(cluster, folder) as client:
            yield in_order(client, _row, tasks)
    elif min(workers, len(paths)) < 2:
        yield (_row(*task) for task in tasks)
    else:
        from joblib import delayed

        pool = process_pool(workers, return_as="generator", pre_dispatch="3*n_jobs")
        yield pool(delayed(_row)(*task) for task in tasks)


def _row(source: Source, settings: PreprocessingSettings) -> tuple[np.ndarray, dict, str] | ScanError:
    """One scan's row, what its file was and a note on it, or why there is none."""
    try:
        with errors_as_reason(source.image, "preprocessed"):
            found = source.stamp()
            image = load_scan(source.t1w or source.image)
            flags = image.extra["flags"]
            if source.t1w:
                image = lay_onto_t1w(source.image, image, settings.modality)
            volume = as_stored(preprocess(image, settings))
            return volume, found | {"source_sha256": source.sha256()}, flags.get("mask_not_taken", "")
    except ScanError as error:
        return error


def build_modalities(
    cohort: pd.DataFrame, scans: pd.DataFrame, folder: str | Path, settings: PreprocessingSettings, **how: Any
) -> dict[str, StoreReport]:
    """The stores of all modalities of a cohort but T1w, one after the other; the report of each by its name.

    A modality that the cohort does not name is no longer current; its volumes stay, for when it is again.

    Parameters
    ----------
    cohort : DataFrame
        `cohort.csv`: `scan_id`, `image` (the T1w scan) and a column per further modality, empty where a
        session has none.
    scans : DataFrame
        Those of the cohort to preprocess (`splits.csv`).
    settings : PreprocessingSettings
        Of the T1w volumes.
    folder, **how
        As in `build_store`.

    Returns
    -------
    dict of StoreReport
        `failed` holds the scans whose session has none as well (`none`), so that each scan is accounted for.
    """
    import pandas as pd

    known, reports = cohort[cohort["scan_id"].isin(scans["scan_id"])], {}
    for modality in {*MODALITIES[1:]} - {*cohort}:  # volumes of an earlier cohort must not train this one
        (Path(folder) / name_of_modality("current", modality)).unlink(missing_ok=True)
    for modality in (name for name in MODALITIES if name in cohort):
        there = known[modality] != ""
        pairs = known[there].assign(t1w=known["image"], image=known[modality])
        report = build_store(pairs, folder, settings.for_modality(modality), **how)
        without = [
            (scan, "", "none", f"no {modality} scan of this session") for scan in known["scan_id"][~there]
        ]
        failed = pd.concat([report.failed, pd.DataFrame(without, columns=FAILED_COLUMNS)], ignore_index=True)
        reports[modality] = replace(report, failed=failed, note=f"{modality}: {report.note}")
    return reports


def _say_changes(folder: Path, settings: PreprocessingSettings) -> str:
    """A sentence on the settings that were in use before, where they were others."""
    try:
        before = _current_folder(folder, settings.modality)
        old = asdict(PreprocessingSettings()) | read_json(before / "preprocessing.json")["settings"]
    except StoreError:
        return "volumes/current named no store; it names this one now."
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    if before.name == settings.fingerprint:
        return ""
    now = settings.to_json()["settings"]
    changed = [f"{key} {old.get(key, '')} -> {now[key]}" for key in now if old.get(key, "") != now[key]]
    return f"Before, {before.name} was in use; changed: {', '.join(changed) or 'the steps themselves'}."


def _check_scans(scans: pd.DataFrame) -> None:
    if missing := {"scan_id", "image"} - set(scans):
        raise ValueError(f"The table of scans lacks {sorted(missing)}; it has {list(scans)}.")
    twice = scans["scan_id"][scans["scan_id"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"{len(twice)} scan_ids stand in more than one row, the first is {twice[0]!r}.")
