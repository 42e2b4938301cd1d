"""VGG16 features of volumes: neighbouring axial slices as the colours of a photograph, kept in the workspace.

Knows no ages and no splits, so nothing here can leak; `svr` learns from what this leaves behind.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainage_nb.volumes.heads import head_in
from brainage_nb.workspace import sha256_of, write_json, writing

if TYPE_CHECKING:
    from brainage_nb.volumes.settings import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

IMAGENET, RANDOM_PROJECTION, AUTO = "imagenet", "random_projection", "auto"
IMAGENET_SHA256_START = "397923af"
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLINGS = ("maps", "mean")
CHANNELS = 512
REDUCTION = 32  # five poolings halve each side
SLICES = 3
GREY_WINDOW = (0.0, 1.0)
FORMAT = 2  # raise it when the arithmetic of features changes, so that old ones are not read


# --- the network ----------------------------------------------------------------------------------------


class WeightsError(RuntimeError):
    """VGG16 weights are absent, are not what they should be, or cannot be fetched."""


class Vgg16Features(nn.Module):
    """Images to feature vectors: ImageNet normalisation, VGG16's convolutional part, optional mean pooling.

    Parameters
    ----------
    layers : nn.Sequential
        `torchvision.models.vgg16().features`, up to and with the last pooling.
    mode : {"imagenet", "random_projection"}
        What the weights are.
    pooling : {"maps", "mean"}
        "maps" keeps the last pooling's 512 maps, flattened (512 x 7 x 7 = 25,088 at 224 px); "mean" averages
        each map (512).
    seed : int
        Of the random projection.
    """

    def __init__(self, layers: nn.Sequential, mode: str, pooling: str = "maps", seed: int = 0):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling = {pooling!r}; choose one of {', '.join(POOLINGS)}.")
        self.layers = layers.eval().requires_grad_(False)
        self.mode, self.pooling, self.seed, self.half = mode, pooling, seed, False
        self.weights_sha256 = hash_of_tensors(layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD).view(1, 3, 1, 1), persistent=False)

    @property
    def title(self) -> str:
        """The weights in words, for results and figure titles."""
        trained = "ImageNet weights" if self.mode == IMAGENET else "random projection (no trained weights)"
        return f"VGG16, {trained}"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, height, width) images of values 0 to 1 to (n, features)."""
        # Half precision leaves the weights in float32, so that they can be saved exactly.
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half):
            maps = self.layers((images - self.mean) / self.sd)
        return maps.mean(dim=(2, 3)) if self.pooling == "mean" else maps.flatten(1)

    def n_features(self, image_size: int) -> int:
        """Length of a feature vector at this image size (pixels per side)."""
        return CHANNELS * (1 if self.pooling == "mean" else (image_size // REDUCTION) ** 2)

    def place(self, device: torch.device | str = "") -> Vgg16Features:
        """Move to a device (default: the GPU, if any); half precision where it computes that natively."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return self.to(device=device, memory_format=torch.channels_last)


def vgg16_features(weights: str | Path = IMAGENET, *, pooling: str = "maps", seed: int = 0) -> Vgg16Features:
    """VGG16's convolutional part with the named weights, on the CPU in float32.

    Parameters
    ----------
    weights : {"imagenet", "random_projection", "auto"} or path
        "imagenet" downloads torchvision's file once (528 MB, hash checked); a path is that same file, brought
        along (hash checked too); "random_projection" draws He-initialised weights, and every result says so;
        "auto" is "imagenet" where it is there or can be fetched, else "random_projection" with a warning.
    pooling : {"maps", "mean"}
        See `Vgg16Features`.
    seed : int
        Of the random projection; ImageNet weights do not use it.

    Raises
    ------
    WeightsError
        The file is absent, cannot be fetched, or its hash is another. Only "auto" uses anything in its place.

    Examples
    --------
    >>> network = vgg16_features("random_projection", pooling="mean").place()
    >>> network.n_features(image_size=224)
    512
    """
    if str(weights) == AUTO:
        try:
            return vgg16_features(IMAGENET, pooling=pooling)
        except WeightsError as error:
            warnings.warn(f"RANDOM PROJECTION instead of ImageNet weights: {error}", stacklevel=2)
            weights = RANDOM_PROJECTION
    if str(weights) == RANDOM_PROJECTION:
        return Vgg16Features(_draw_layers(seed), RANDOM_PROJECTION, pooling, seed)
    layers, state = empty_layers(), _read_imagenet(weights)
    layers.load_state_dict({name: state[f"features.{name}"] for name in layers.state_dict()})
    return Vgg16Features(layers, IMAGENET, pooling)


def hash_of_tensors(layers: nn.Module) -> str:
    """SHA-256 over all weights in order, in hex: equal weights, equal hash, whatever file held them."""
    digest = hashlib.sha256()
    for name, tensor in layers.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def empty_layers() -> nn.Sequential:
    from torchvision.models import vgg

    # On the meta device first: nothing is drawn. The classifier (490 MB) is never needed.
    with torch.device("meta"):
        layers = vgg.make_layers(vgg.cfgs["D"])
    return layers.to_empty(device="cpu")


def _draw_layers(seed: int) -> nn.Sequential:
    layers, generator = empty_layers(), torch.Generator().manual_seed(seed)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            # He et al. 2015, eq. 10: keeps the variance of activations through ReLU layers.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return layers


def _read_imagenet(weights: str | Path) -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    published, path = VGG16_Weights.IMAGENET1K_V1, Path(weights).expanduser()
    try:
        if str(weights) == IMAGENET:
            return published.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        # torchvision publishes only the first eight hex digits of the file's SHA-256, in its name.
        if not (found := sha256_of(path)).startswith(IMAGENET_SHA256_START):
            raise WeightsError(f"it has SHA-256 {found[:8]}…, expected {IMAGENET_SHA256_START}…")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"The VGG16 weights {weights!s} cannot be had: {error}. Switch the internet on; or delete a "
            f"damaged copy (in {torch.hub.get_dir()}); or give the path of a copy of {published.url}; or "
            f'choose "{RANDOM_PROJECTION}": untrained filters, a weaker model, said in every result.'
        ) from error


# --- one volume -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSettings:
    """How slices become images.

    Parameters
    ----------
    image_size : int
        Side of the images the network sees, pixels: 224 as published, giving 7 x 7 maps; 112 gives 3 x 3.
    window : (float, float)
        Values shown as black and white; what lies beyond is clipped. -1 lies below the background of a
        z-scored head, 4 above its brain; `for_volumes` takes 0 to 1 for shares of grey matter.
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

    @classmethod
    def for_volumes(cls, preprocessing: PreprocessingSettings, **numbers: Any) -> FeatureSettings:
        """Settings whose window fits volumes of this preprocessing; `numbers` are any other settings."""
        return cls(**({"window": GREY_WINDOW} if preprocessing.grey_matter else {}) | numbers)


def triplets_with_brain(volume: np.ndarray, spacing_mm: float, settings: FeatureSettings) -> np.ndarray:
    """Positions of the triplets that show brain, ascending from the lowest.

    Position p is the slices 3p, 3p+1, 3p+2 of the last (inferior to superior) axis, so a position means the
    same height in every volume of a store. Slices left over at the top are not used.

    Parameters
    ----------
    volume : array, (size, size, size), RAS
        As stored.
    spacing_mm : float
        Distance of neighbouring slices.
    """
    head = head_in(volume).mean(axis=(0, 1)) >= settings.head_fraction
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
    """Triplets as images (n, 3, image_size, image_size), values 0 to 1; anterior up, left side at left."""
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
    """Features of all triplets of one volume: float16 (positions, features), NaN rows where no brain is.

    Raises
    ------
    ValueError
        The volume is not finite, shows no brain, or its features overflow.
    """
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise ValueError(
            f"expected a finite 3-D volume, got shape {volume.shape} with missing or infinite values"
        )
    positions = triplets_with_brain(volume, spacing_mm, settings)
    if not len(positions):
        raise ValueError("no triplet of slices holds brain: the volume is empty or far off centre")
    batches = [
        network(images.contiguous(memory_format=torch.channels_last))
        for images in triplet_images(volume, positions, settings, network.device).split(batch_size)
    ]
    found = torch.cat(batches).to(torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        raise ValueError("the network's output overflows half precision: the volume's values are too large")
    rows = np.full((volume.shape[2] // SLICES, found.shape[1]), np.nan, dtype=np.float16)
    rows[positions] = found
    return rows


# --- many scans -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Features of many scans, on disk; `features[scan_id]` is (positions, features), as `volume_features`.

    Attributes
    ----------
    folder : Path
        Named after everything that shapes a feature; `features.json` in it says what that is.
    facts : dict
        The content of `features.json`.
    files : dict
        Where each scan's features are; a file is named after the scan and the volume they come from.
    failed : DataFrame
        `scan_id, reason` of scans without features: they never get zeros.
    computed, reused : int
        Scans whose features were computed now, and found.
    """

    folder: Path
    facts: dict[str, Any]
    files: dict[str, Path]
    failed: pd.DataFrame
    computed: int
    reused: int

    def __getitem__(self, scan_id: str) -> np.ndarray:
        return np.load(self.files[scan_id], mmap_mode="r")

    @property
    def settings(self) -> FeatureSettings:
        """How the slices became images."""
        return FeatureSettings(**self.facts["settings"])


def extract_features(
    store: VolumeStore,
    folder: Path | str,
    network: Vgg16Features,
    *,
    settings: FeatureSettings | None = None,
    scan_ids: Sequence[str] | None = None,
    batch_size: int = 16,
) -> Features:
    """Features of every scan, each written as soon as it is computed and not computed again.

    Other weights, settings or preprocessing go to another folder, so volumes never meet foreign features;
    features of volumes that have changed or left the store are deleted.

    Parameters
    ----------
    store : VolumeStore
        Preprocessed volumes, RAS.
    folder : path
        The workspace's `features`.
    network : Vgg16Features
        From `vgg16_features`, on its device.
    scan_ids : list of str, optional
        Default: every scan of the store.
    batch_size : int
        Triplets at once.

    Examples
    --------
    >>> features = extract_features(store, ws.path("features"), network)  # doctest: +SKIP
    >>> features["sub-01"].shape  # doctest: +SKIP
    (32, 25088)
    """
    from tqdm import tqdm

    settings = settings or FeatureSettings.for_volumes(store.settings)
    facts = _facts_of(store, network, settings)
    folder = Path(folder) / facts["fingerprint"]
    write_json(facts, folder / "features.json")
    volumes = dict(zip(store.index["scan_id"], store.index["sha256"], strict=True))
    files = {
        scan_id: folder / f"{quote(scan_id, safe='')}@{sha256[:16]}.npy"
        for scan_id, sha256 in volumes.items()
    }
    for file in set(folder.glob("*.npy")) - set(files.values()):
        file.unlink()
    wanted = list(store.scan_ids if scan_ids is None else scan_ids)
    absent = "not in the volume store: its preprocessing failed or it came later"
    failed = {scan_id: absent for scan_id in wanted if scan_id not in volumes}
    missing = [scan_id for scan_id in wanted if scan_id in volumes and not _is_whole(files[scan_id])]
    for scan_id in tqdm(missing, desc="VGG16 features", unit="scan", disable=not missing):
        try:
            volume = np.asarray(store[scan_id])
            rows = volume_features(volume, store.spacing_mm, network, settings, batch_size)
        except (ValueError, OSError) as error:
            failed[scan_id] = str(error)
            continue
        with writing(files[scan_id]) as temporary, open(temporary, "wb") as stream:
            np.save(stream, rows)
    found = {scan_id: files[scan_id] for scan_id in wanted if scan_id not in failed}
    report = pd.DataFrame(failed.items(), columns=["scan_id", "reason"])
    computed = len(set(found) & set(missing))
    return Features(folder, facts, found, report, computed, len(found) - computed)


def _facts_of(store: VolumeStore, network: Vgg16Features, settings: FeatureSettings) -> dict[str, Any]:
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
    if store.settings.modality != "T1w":
        facts["modality"] = store.settings.modality
    content = json.dumps(facts, sort_keys=True)
    return {"fingerprint": hashlib.sha256(content.encode()).hexdigest()[:12], **facts}


def _is_whole(file: Path) -> bool:
    try:
        return np.load(file, mmap_mode="r").ndim == 2
    except (OSError, ValueError, EOFError):
        return False
