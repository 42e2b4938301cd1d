"""Volumes to VGG16 features: triplets of axial slices, extracted once a scan and kept in the workspace.

Knows no ages and no splits, so nothing here can leak; `vgg_svr` learns from what this leaves behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from brainage_nb.models.vgg_network import REDUCTION, Vgg16Features
from brainage_nb.workspace import read_json, write_json, writing

SLICES = 3
FORMAT = 1  # raise it when the arithmetic below changes, so that old caches are not read


class FeatureError(ValueError):
    """A volume from which no features can be computed, and why."""


class Volumes(Protocol):
    """What is asked of a volume store (`volumes.store.VolumeStore`)."""

    scan_ids: Sequence[str]
    fingerprint: str
    spacing_mm: float

    def __getitem__(self, scan_id: str) -> np.ndarray: ...


@dataclass(frozen=True)
class FeatureSettings:
    """How slices become images.

    Parameters
    ----------
    image_size : int
        Side of the images the network sees, pixels: 224 as published, giving 7 x 7 maps; 112 gives 3 x 3.
    window : (float, float)
        z-scores shown as black and white; what lies beyond is clipped. -1 lies below the background of a
        z-scored head, 4 above its brain.
    brain_depth_mm : float
        Deeper than this below the crown lies neck, not brain: such triplets are skipped.
    head_fraction : float
        Share of a slice that must be brighter than the volume's mean for the slice to hold head at all.
    """

    image_size: int = 224
    window: tuple[float, float] = (-1.0, 4.0)
    brain_depth_mm: float = 160.0
    head_fraction: float = 0.02

    def __post_init__(self):
        if self.image_size < REDUCTION:
            raise ValueError(
                f"image_size = {self.image_size} pixels: expected at least {REDUCTION} (224 as published)."
            )
        object.__setattr__(self, "window", tuple(float(value) for value in self.window))


# --- one volume -----------------------------------------------------------------------------------------


def triplets_with_brain(volume: np.ndarray, spacing_mm: float, settings: FeatureSettings) -> np.ndarray:
    """Positions of the triplets that show brain, ascending from the lowest.

    Position p is the slices 3p, 3p+1, 3p+2 of the last (inferior to superior) axis, so a position means the same
    height in every volume of a store. Slices left over at the top are not used.

    Parameters
    ----------
    volume : array, (size, size, size), RAS
        z-scored.
    spacing_mm : float
        Distance of neighbouring slices.
    """
    head = (volume > volume.mean(dtype=np.float64)).mean(axis=(0, 1)) >= settings.head_fraction
    if not head.any():
        return np.empty(0, dtype=int)
    crown = np.flatnonzero(head)[-1]
    middle = np.arange(volume.shape[2] // SLICES) * SLICES + 1
    return np.flatnonzero(head[middle] & ((crown - middle) * spacing_mm <= settings.brain_depth_mm))


def triplet_images(
    volume: np.ndarray | Tensor,
    positions: Sequence[int],
    settings: FeatureSettings,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Triplets as images (n, 3, image_size, image_size), values 0 to 1: anterior up, the person's left at the left."""
    low, high = settings.window
    whole = torch.as_tensor(volume).to(device)
    index = torch.as_tensor(np.asarray(positions)[:, None] * SLICES + np.arange(SLICES), device=whole.device)
    slices = whole[:, :, index.flatten()].permute(2, 1, 0).flip(1).float()
    slices = ((slices - low) / (high - low)).clamp(0, 1).unflatten(0, index.shape)
    size = (settings.image_size, settings.image_size)
    # Antialiasing matters only where images are made smaller than slices; it does nothing when enlarging.
    return functional.interpolate(slices, size=size, mode="bilinear", antialias=size[0] < slices.shape[-1])


@torch.inference_mode()
def volume_features(
    volume: np.ndarray,
    spacing_mm: float,
    network: Vgg16Features,
    settings: FeatureSettings,
    batch_size: int = 16,
) -> np.ndarray:
    """Features of all triplets of one volume: float16 (positions, features), NaN rows where there is no brain.

    Raises
    ------
    FeatureError
        The volume is not finite, shows no brain, or its features overflow.
    """
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise FeatureError(
            f"expected a finite 3-D volume, got shape {volume.shape} with missing or infinite values"
        )
    positions = triplets_with_brain(volume, spacing_mm, settings)
    if not len(positions):
        raise FeatureError("no triplet of slices holds brain: the volume is empty or far off centre")
    kind = network.mean
    batches = [
        network(images.to(kind.dtype).contiguous(memory_format=torch.channels_last))
        for images in triplet_images(volume, positions, settings, kind.device).split(batch_size)
    ]
    found = torch.cat(batches).to(torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        raise FeatureError("the network's output overflows half precision: intensities are not z-scores")
    rows = np.full((volume.shape[2] // SLICES, found.shape[1]), np.nan, dtype=np.float16)
    rows[positions] = found
    return rows


# --- the cache ------------------------------------------------------------------------------------------


@dataclass
class FeatureCache:
    """Features of many scans in one folder: `features.json` and, a scan, `<scan_id>.npy` as `volume_features` gives.

    Parameters
    ----------
    folder : Path
        `features/<fingerprint>`; opened with `FeatureCache(folder)`.
    """

    folder: Path
    facts: dict = field(init=False)
    _open: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.facts = read_json(self.folder / "features.json")

    @property
    def scan_ids(self) -> list[str]:
        """Scans whose features are here, sorted."""
        return sorted(unquote(path.name.removesuffix(".npy")) for path in self.folder.glob("*.npy"))

    @property
    def settings(self) -> FeatureSettings:
        """How the slices became images."""
        return FeatureSettings(**self.facts["settings"])

    def path(self, scan_id: str) -> Path:
        """Where one scan's features are, or will be."""
        return self.folder / f"{quote(scan_id, safe='')}.npy"

    def rows(self, scan_id: str) -> np.ndarray:
        """One scan's features, memory-mapped: float16 (positions, features), NaN rows where there is no brain."""
        if scan_id not in self._open:
            self._open[scan_id] = np.load(self.path(scan_id), mmap_mode="r")
        return self._open[scan_id]

    def has(self, scan_id: str) -> bool:
        """Whether one scan's features are here and whole."""
        try:
            return self.rows(scan_id).shape[1] == self.facts["n_features"]
        except (OSError, ValueError, EOFError):
            return False


def present(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Which triplets show brain: bool (scans, positions)."""
    return np.stack([np.isfinite(rows[:, 0]) for rows in scans])


def at_position(scans: Sequence[np.ndarray], position: int) -> np.ndarray:
    """Features of one triplet position: float32 (scans, features); a NaN row for a scan without brain there."""
    return np.stack([rows[position] for rows in scans]).astype(np.float32)


def mean_over_triplets(scans: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Mean over those of `positions` that show brain: float32 (scans, features); a NaN row where none does."""
    means = np.full((len(scans), scans[0].shape[1]), np.nan, dtype=np.float32)
    for mean, rows in zip(means, scans, strict=True):
        chosen = rows[positions].astype(np.float32)
        chosen = chosen[np.isfinite(chosen[:, 0])]
        if len(chosen):
            mean[:] = chosen.mean(axis=0)
    return means


@dataclass
class FeatureReport:
    """What an extraction did: the cache, scans left out (scan_id, reason), how many were computed and found."""

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
    """Features of every scan, each written as soon as it is computed; scans already in the cache are not redone.

    Parameters
    ----------
    store : VolumeStore
        z-scored volumes, RAS.
    folder : path
        The workspace's `features`; the cache is a folder in it, named after everything that shapes a feature
        (store, weights, pooling, settings), so other volumes or weights never meet old features.
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
    from tqdm.auto import tqdm

    settings = settings or FeatureSettings()
    cache = open_cache(store, folder, network, settings)
    wanted = list(store.scan_ids if scan_ids is None else scan_ids)
    missing = [scan_id for scan_id in wanted if not cache.has(scan_id)]
    failed, writes = [], []
    with ThreadPoolExecutor(max_workers=1) as writer:  # the disk works while the network does
        for scan_id in tqdm(missing, desc="VGG16 features", unit="scan", disable=not missing):
            try:
                rows = volume_features(
                    _volume(store, scan_id), store.spacing_mm, network, settings, batch_size
                )
            except (FeatureError, KeyError, OSError) as error:
                failed.append((scan_id, str(error.args[0] if error.args else error)))
                continue
            writes.append(writer.submit(_write, rows, cache.path(scan_id)))
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


def _write(rows: np.ndarray, path: Path) -> None:
    with writing(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, rows)


def _raise_failed(writes: list[Future], wait: bool = False) -> None:
    """Surface a failed write (a full disk) at once, and forget those that are done."""
    for done in [future for future in writes if wait or future.done()]:
        done.result()
        writes.remove(done)
