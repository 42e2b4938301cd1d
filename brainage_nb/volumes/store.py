"""The volume store: preprocessed scans as float16 rows of a few large files, each row with its checksum.

What is in a row is decided in preprocessing; who a scan belongs to is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..workspace import n_workers, read_json, sha256_of, write_json, write_text
from .preprocessing import PreprocessingSettings, ScanError, as_stored, preprocess
from .staging import StoreMirror
from .store_files import HEADER_BYTES, StoreWriter, read_index, sha256_of_volume, shard_path

if TYPE_CHECKING:  # pandas is imported where it is used, so that worker processes start fast
    import pandas as pd

FAILED_COLUMNS = ["scan_id", "image", "code", "reason"]


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
        self._maps: list[np.ndarray] | None = None

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
    def shards(self) -> list[np.ndarray]:
        """Memory maps (n, size, size, size) float16, read-only, one a shard file."""
        if self._maps is None:
            rows = self.index.groupby("shard")["row"].max() + 1
            last = int(rows.index.max()) if len(rows) else -1
            self._maps = [
                np.memmap(
                    shard_path(self.folder, shard),
                    np.float16,
                    "r",
                    HEADER_BYTES,
                    (int(rows.get(shard, 1)), self.size, self.size, self.size),
                )
                for shard in range(last + 1)
            ]
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


def build_store(
    scans: pd.DataFrame,
    folder: str | Path,
    settings: PreprocessingSettings | None = None,
    resolve: Callable[[str], Path] = Path,
    n_jobs: int = 0,
    scratch: Path | None = None,
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

    Returns
    -------
    StoreReport
    """
    import pandas as pd

    began = time.monotonic()
    settings = settings or PreprocessingSettings()
    _check_scans(scans)
    home = Path(folder) / settings.fingerprint
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "preprocessing.json").exists():
        write_json(settings.to_json(), home / "preprocessing.json")
    paths = {scan: Path(resolve(image)) for scan, image in zip(scans["scan_id"], scans["image"], strict=True)}
    mirror = StoreMirror(home, scratch) if scratch else None
    if mirror is not None:
        mirror.fetch()
        home = mirror.local
    writer = StoreWriter(home, settings.size, mirror)
    todo = [scan for scan in paths if not writer.has(scan, paths[scan])]
    failed = _fill(writer, todo, paths, settings, n_workers(n_jobs))
    note = _note(Path(folder), settings, len(todo) - len(failed), len(paths) - len(todo), len(failed))
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
    writer: StoreWriter,
    todo: list[str],
    paths: dict[str, Path],
    settings: PreprocessingSettings,
    workers: int,
) -> list[tuple[str, str, str]]:
    """Preprocess in parallel, write in the table's order; give (scan_id, code, reason) of what failed."""
    from tqdm import tqdm

    failed = []
    try:
        results = _results([paths[scan] for scan in todo], settings, workers)
        bar = tqdm(zip(todo, results, strict=True), "preprocessing", len(todo), unit="scan", disable=not todo)
        for scan, result in bar:
            if isinstance(result, ScanError):
                failed.append((scan, result.code, result.sentence))
            else:
                writer.add(scan, *result)
    finally:
        writer.close()
    return failed


def _results(paths: list[Path], settings: PreprocessingSettings, workers: int) -> Iterable:
    if min(workers, len(paths)) < 2:
        return (_one(path, settings) for path in paths)
    from joblib import Parallel, delayed

    # As a generator, so that at most a few volumes wait in memory.
    pool = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="3*n_jobs")
    return pool(delayed(_one)(path, settings) for path in paths)


def _one(path: Path, settings: PreprocessingSettings) -> tuple[np.ndarray, dict] | ScanError:
    """One scan's row and what its file was, or why there is none."""
    try:
        found = path.stat()
        volume = as_stored(preprocess(path, settings))
        source = {"source_bytes": found.st_size, "source_mtime_ns": found.st_mtime_ns}
        return volume, source | {"source_sha256": sha256_of(path)}
    except ScanError as error:
        return error
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
