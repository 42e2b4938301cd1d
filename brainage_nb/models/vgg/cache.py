"""VGG16 features of many scans in the workspace: each is computed once, again only if inputs change.

Knows no ages and no splits, so nothing here can leak; `fusion` learns from what this leaves behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

import numpy as np
import pandas as pd

from brainage_nb.models.vgg.features import FeatureError, FeatureSettings, volume_features
from brainage_nb.models.vgg.network import Vgg16Features
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json, writing

if TYPE_CHECKING:
    from brainage_nb.volumes.recipes import PreprocessingSettings

FORMAT = 2  # raise it when the arithmetic of `features` changes, so that old caches are not read


class Volumes(Protocol):
    """What is asked of a volume store (`volumes.store.VolumeStore`); `index` has `scan_id` and `sha256`."""

    scan_ids: Sequence[str]
    index: pd.DataFrame
    fingerprint: str
    spacing_mm: float
    settings: PreprocessingSettings

    def __getitem__(self, scan_id: str) -> np.ndarray: ...


@dataclass
class FeatureCache:
    """Features of many scans in one folder: `features.json`, `index.csv` (which volume each scan's features
    come from: `scan_id, volume_sha256`) and `<scan_id>.npy` as `volume_features` gives.

    Parameters
    ----------
    folder : Path
        `features/<fingerprint>`; opened with `FeatureCache(folder)`.
    """

    folder: Path
    facts: dict = field(init=False)
    volume_sha256: dict[str, str] = field(init=False, repr=False)
    _open: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.facts = read_json(self.folder / "features.json")
        index = self.folder / "index.csv"
        rows = read_csv(index) if index.exists() else pd.DataFrame(columns=["scan_id", "volume_sha256"])
        self.volume_sha256 = dict(zip(rows["scan_id"], rows["volume_sha256"], strict=True))

    @property
    def scan_ids(self) -> list[str]:
        """Scans whose features are here, sorted."""
        return sorted(self.volume_sha256)

    @property
    def settings(self) -> FeatureSettings:
        """How the slices became images."""
        return FeatureSettings(**self.facts["settings"])

    def path(self, scan_id: str) -> Path:
        """Where one scan's features are, or will be."""
        return self.folder / f"{quote(scan_id, safe='')}.npy"

    def rows(self, scan_id: str) -> np.ndarray:
        """One scan's features, memory-mapped: float16 (positions, features), NaN where no brain is."""
        if scan_id not in self._open:
            self._open[scan_id] = np.load(self.path(scan_id), mmap_mode="r")
        return self._open[scan_id]

    def has(self, scan_id: str, volume_sha256: str = "") -> bool:
        """Whether one scan's features are here and whole, and, where it is given, from this very volume."""
        found = self.volume_sha256.get(scan_id)
        if found is None or (volume_sha256 and volume_sha256 != found):
            return False
        try:
            return self.rows(scan_id).shape[1] == self.facts["n_features"]
        except (OSError, ValueError, EOFError):
            return False

    def add(self, scan_id: str, rows: np.ndarray, volume_sha256: str) -> None:
        """Write one scan's features, then note their volume: what the index names is whole."""
        self.drop(scan_id)
        with writing(self.path(scan_id)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, rows)
        self.volume_sha256[scan_id] = volume_sha256
        self._write_index()

    def drop(self, scan_id: str) -> None:
        """Forget one scan's features, if any."""
        self._open.pop(scan_id, None)
        if self.volume_sha256.pop(scan_id, None) is not None:
            self._write_index()

    def _write_index(self) -> None:
        index = pd.DataFrame(sorted(self.volume_sha256.items()), columns=["scan_id", "volume_sha256"])
        write_csv(index, self.folder / "index.csv")


@dataclass
class FeatureReport:
    """What an extraction did: the cache, scans left out (scan_id, reason), scans computed and found."""

    cache: FeatureCache
    failed: pd.DataFrame
    computed: int
    reused: int


def extract_features(
    store: Volumes,
    folder: Path | str,
    network: Vgg16Features,
    *,
    settings: FeatureSettings | None = None,
    scan_ids: Sequence[str] | None = None,
    batch_size: int = 16,
) -> FeatureReport:
    """Features of every scan, each written once computed; scans already in the cache are not redone.

    Parameters
    ----------
    store : VolumeStore
        Preprocessed volumes, RAS.
    folder : path
        The workspace's `features`; the cache is a folder in it, named after everything that shapes a feature
        (preprocessing, weights, pooling, settings), so other volumes or weights never meet old features.
    network : Vgg16Features
        From `vgg16_features`, on its device.
    scan_ids : list of str, optional
        Default: every scan of the store.
    batch_size : int
        Triplets at once.

    Returns
    -------
    FeatureReport
        A scan that fails is listed in `failed` with its reason and has no features: never zeros.
    """
    from tqdm import tqdm

    settings = settings or FeatureSettings.for_volumes(store.settings)
    cache = open_cache(store, folder, network, settings)
    wanted = list(store.scan_ids if scan_ids is None else scan_ids)
    volumes = dict(zip(store.index["scan_id"], store.index["sha256"], strict=True))
    missing = [scan_id for scan_id in wanted if not cache.has(scan_id, volumes.get(scan_id, "absent"))]
    failed, writes = [], []
    with ThreadPoolExecutor(max_workers=1) as writer:  # the disk works while the network does
        for scan_id in tqdm(missing, desc="VGG16 features", unit="scan", disable=not missing):
            try:
                rows = volume_features(
                    _volume(store, scan_id), store.spacing_mm, network, settings, batch_size
                )
            except (FeatureError, KeyError, OSError) as error:
                failed.append((scan_id, str(error.args[0] if error.args else error)))
                writes.append(writer.submit(cache.drop, scan_id))
                continue
            writes.append(writer.submit(cache.add, scan_id, rows, volumes[scan_id]))
            _raise_failed(writes)
    _raise_failed(writes, wait=True)
    report = pd.DataFrame(failed, columns=["scan_id", "reason"])
    return FeatureReport(cache, report, len(missing) - len(failed), len(wanted) - len(missing))


def open_cache(
    store: Volumes, folder: Path | str, network: Vgg16Features, settings: FeatureSettings
) -> FeatureCache:
    """The cache for these volumes, weights and settings; made empty where it is not there."""
    facts = {
        "format": FORMAT,
        "volumes": store.fingerprint,
        "spacing_mm": float(store.spacing_mm),
        "weights": network.mode,
        "weights_sha256": network.weights_sha256,
        "pooling": network.pooling,
        "n_features": network.n_features(settings.image_size),
        "settings": asdict(settings),
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / fingerprint / "features.json"
    if not path.exists():
        write_json({"fingerprint": fingerprint, **facts}, path)
    return FeatureCache(path.parent)


def _volume(store: Volumes, scan_id: str) -> np.ndarray:
    try:
        return np.asarray(store[scan_id])
    except KeyError as error:
        raise FeatureError("not in the volume store: its preprocessing failed or it came later") from error


def _raise_failed(writes: list[Future], wait: bool = False) -> None:
    """Surface a failed write (a full disk) at once, and forget those that are done."""
    for done in [future for future in writes if wait or future.done()]:
        done.result()
        writes.remove(done)
