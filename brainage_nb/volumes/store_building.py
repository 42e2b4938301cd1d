"""Fill the volume store: scans are preprocessed side by side, here or on a cluster, one process writes.

A scan that cannot be used is reported and left out; a build that is killed is gone on with by the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..cluster import ClusterError, in_order, open_cluster
from ..workspace import n_workers, read_json, sha256_of, write_json, write_text
from .preprocessing import PreprocessingSettings, ScanError, as_stored, load_scan, preprocess
from .scans import voxel_file
from .staging import StoreMirror
from .store import VolumeStore
from .store_files import StoreWriter

if TYPE_CHECKING:  # pandas is imported where it is used, so that worker processes start fast
    import pandas as pd

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
