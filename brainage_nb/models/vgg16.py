"""VGG16's convolutional part and where its weights come from, never guessed and never swapped in silence.

It turns three-channel images into feature vectors. It knows no scans, slices or ages: see `features`.

One volume to VGG16 features: triplets of consecutive axial slices, each as an image of three channels.

Knows no ages and no splits, so nothing here can leak. Features of many scans are kept by `cache`.

VGG16 features of many scans in the workspace: each is computed once, again only if inputs change.

Knows no ages and no splits, so nothing here can leak; `fusion` learns from what this leaves behind.

Pictures of the VGG16 + SVR baseline: arrays and tables in, an Axes back. Accuracy: evaluation.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainage_nb.drawing import legend_under
from brainage_nb.volumes.heads import head_in
from brainage_nb.workspace import read_csv, read_json, sha256_of, write_csv, write_json, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from brainage_nb.volumes.settings import PreprocessingSettings

IMAGENET, RANDOM_PROJECTION, AUTO = "imagenet", "random_projection", "auto"
IMAGENET_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# torchvision publishes only the first eight hex digits of the file's SHA-256, in its name.
IMAGENET_SHA256_START = "397923af"
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLINGS = ("maps", "mean")
CHANNELS = 512
REDUCTION = 32  # five poolings halve each side


class WeightsError(RuntimeError):
    """VGG16 weights are absent, are not what they should be, or cannot be fetched."""


class WeightsUnavailable(WeightsError):
    """The ImageNet weights are neither here nor to be fetched."""


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
        self.mode, self.pooling, self.seed = mode, pooling, seed
        self.weights_sha256, self.half = hash_of_tensors(layers), False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD).view(1, 3, 1, 1), persistent=False)

    @property
    def title(self) -> str:
        """The weights in words, for results and figure titles."""
        if self.mode == IMAGENET:
            return "VGG16, ImageNet weights"
        return "VGG16, random projection (no trained weights)"

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, height, width) images of values 0 to 1 to (n, features)."""
        with self.precision():
            maps = self.layers((images - self.mean) / self.sd)
        return maps.mean(dim=(2, 3)) if self.pooling == "mean" else maps.flatten(1)

    def n_features(self, image_size: int) -> int:
        """Length of a feature vector at this image size (pixels a side)."""
        return CHANNELS * (1 if self.pooling == "mean" else (image_size // REDUCTION) ** 2)

    def place(self, device: torch.device | str = "") -> Vgg16Features:
        """Move to a device (default: the GPU, if any); half precision where it computes that natively."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return self.to(device=device, memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    def precision(self) -> torch.autocast:
        """The context its layers compute in. Weights stay in float32, so that they can be saved exactly."""
        return torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half)


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
    """
    if str(weights) == AUTO:
        try:
            return vgg16_features(IMAGENET, pooling=pooling)
        except WeightsUnavailable as error:
            warnings.warn(f"RANDOM PROJECTION instead of ImageNet weights: {error}", stacklevel=2)
            return vgg16_features(RANDOM_PROJECTION, pooling=pooling, seed=seed)
    layers = _empty_layers()
    if str(weights) == RANDOM_PROJECTION:
        _draw(layers, seed)
        return Vgg16Features(layers, RANDOM_PROJECTION, pooling, seed)
    path = _downloaded() if str(weights) == IMAGENET else Path(weights).expanduser()
    _load_imagenet(layers, path)
    return Vgg16Features(layers, IMAGENET, pooling)


def saved_features(path: str | Path, mode: str, pooling: str, seed: int = 0) -> Vgg16Features:
    """The network from a file that `save_features` wrote."""
    from safetensors.torch import load_file

    layers = _empty_layers()
    layers.load_state_dict(load_file(path))
    return Vgg16Features(layers, mode, pooling, seed)


def save_features(network: Vgg16Features, path: str | Path) -> None:
    """Write the convolutional weights alone (59 MB, safetensors), so that predicting needs no download."""
    from safetensors.torch import save_file

    state = network.layers.state_dict()
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}, path)


def hash_of_tensors(layers: nn.Module) -> str:
    """SHA-256 over all weights in order, in hex: equal weights, equal hash, whatever file held them."""
    digest = hashlib.sha256()
    for name, tensor in layers.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _empty_layers() -> nn.Sequential:
    from torchvision.models import vgg16

    # Built without memory first: the classifier's 124 M weights (490 MB) are never needed here.
    with torch.device("meta"):
        layers = vgg16(weights=None, init_weights=False).features
    return layers.to_empty(device="cpu")


def _draw(layers: nn.Sequential, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            nn.init.zeros_(layer.bias)
            with (
                torch.no_grad()
            ):  # He et al. 2015, eq. 10: keeps the variance of activations through ReLU layers
                layer.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)


def _downloaded() -> Path:
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / Path(IMAGENET_URL).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix=IMAGENET_SHA256_START)
    except (OSError, RuntimeError) as error:
        raise WeightsUnavailable(
            f"VGG16's ImageNet weights could not be downloaded from {IMAGENET_URL} ({error}). Switch the "
            f"internet on, or bring the file {path.name} along and give its path as the weights, or choose "
            f'"{RANDOM_PROJECTION}" by name: untrained filters, a weaker model, said in every result.'
        ) from error
    return path


def _load_imagenet(layers: nn.Sequential, path: Path) -> None:
    if not path.is_file():
        raise WeightsError(
            f'VGG16 weights: {path} is not a file. Expected "{IMAGENET}", "{RANDOM_PROJECTION}" or the path '
            f"of torchvision's {Path(IMAGENET_URL).name}."
        )
    found = sha256_of(path)
    if not found.startswith(IMAGENET_SHA256_START):
        raise WeightsError(
            f"{path} has SHA-256 {found[:8]}…, expected {IMAGENET_SHA256_START}…: damaged or another file. "
            f"Delete it and download {IMAGENET_URL} again."
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "features."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    layers.load_state_dict(kept)


SLICES = 3
GREY_WINDOW = (0.0, 1.0)


class FeatureError(ValueError):
    """A volume from which no features can be computed, and why."""


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
    batches = [
        network(images.contiguous(memory_format=torch.channels_last))
        for images in triplet_images(volume, positions, settings, network.device).split(batch_size)
    ]
    found = torch.cat(batches).to(torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        raise FeatureError("the network's output overflows half precision: the volume's values are too large")
    rows = np.full((volume.shape[2] // SLICES, found.shape[1]), np.nan, dtype=np.float16)
    rows[positions] = found
    return rows


# --- many scans, each as (positions, features) ---------------------------------------------------------


def present(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Which triplets show brain: bool (scans, positions)."""
    return np.stack([np.isfinite(rows[:, 0]) for rows in scans])


def at_position(scans: Sequence[np.ndarray], position: int) -> np.ndarray:
    """Features of one triplet position: float32 (scans, features); NaN rows where no brain is."""
    return np.stack([rows[position] for rows in scans]).astype(np.float32)


def mean_over_triplets(scans: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Mean over those of `positions` that show brain: float32 (scans, features); NaN where none does."""
    means = np.full((len(scans), scans[0].shape[1]), np.nan, dtype=np.float32)
    for mean, rows in zip(means, scans, strict=True):
        chosen = rows[positions].astype(np.float32)
        chosen = chosen[np.isfinite(chosen[:, 0])]
        if len(chosen):
            mean[:] = chosen.mean(axis=0)
    return means


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


BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"  # Okabe-Ito, and a grey


def plot_triplet(image: np.ndarray, position: int, ax: Axes) -> Axes:
    """One triplet as the network sees it: (3, height, width), values 0 to 1, slices as red, green, blue."""
    ax.imshow(np.moveaxis(image, 0, -1), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"triplet {position}", fontsize=10)
    return ax


def plot_present(present: np.ndarray, used: np.ndarray, ax: Axes) -> Axes:
    """At how many scans each triplet position shows brain: `present` is bool (scans, positions)."""
    share = 100 * present.mean(axis=0)
    positions = np.arange(present.shape[1])
    colours = np.where(np.isin(positions, used), BLUE, "#BBBBBB")
    ax.bar(positions, share, color=colours)
    ax.set(xlabel="triplet position (0 is lowest)", ylabel="scans showing brain [%]", ylim=(0, 100))
    ax.set_title(f"Where the brain lies: {len(used)} positions in use (blue), n = {len(present)} scans")
    return ax


def plot_grid(grid: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Inner cross-validated MAE over C, a line an epsilon: `variant, C, epsilon, mae` (years)."""
    styles = {"early": (BLUE, "o"), "late": (ORANGE, "s")}
    dashes = ("-", "--", ":")
    for variant, (colour, marker) in styles.items():
        rows = grid[grid["variant"] == variant]
        for dash, (epsilon, line) in zip(dashes, rows.groupby("epsilon"), strict=False):
            label = f"{'one early SVR' if variant == 'early' else 'mean late SVR'}, epsilon {epsilon:g} y"
            ax.plot(line["C"], line["mae"], dash, color=colour, marker=marker, label=label)
    ax.set(
        xscale="log", xlabel="C (kernel with mean diagonal 1)", ylabel="MAE, inner cross-validation [years]"
    )
    legend_under(ax, ncols=2)
    ax.set_title(
        f"Choosing the SVR's C and epsilon (lowest is best) on training subjects\n{title}", fontsize=10
    )
    return ax


def plot_positions(by_position: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Validation score of each triplet's own SVR and its weight: `position, n_scans, mae, weight`."""
    ax.bar(by_position["position"], by_position["mae"], color=BLUE, label="MAE of this triplet alone")
    ax.set(xlabel="triplet position (0 is lowest)", ylabel="MAE, inner cross-validation [years]")
    weight = ax.twinx()
    weight.plot(by_position["position"], by_position["weight"], "s-", color=ORANGE, label="weight (right)")
    weight.set(ylabel="weight in the combined age", ylim=(0, max(0.05, 1.3 * by_position["weight"].max())))
    handles = [*ax.get_legend_handles_labels()[0], *weight.get_legend_handles_labels()[0]]
    legend_under(ax, handles)
    n_scans = int(by_position["n_scans"].max())
    ax.set_title(f"What each height knows about age, n = {n_scans} training scans\n{title}", fontsize=10)
    return ax


def plot_contributions(contributions: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Years each triplet adds to one scan's age: `position, years`."""
    years = contributions["years"]
    ax.barh(contributions["position"], years, color=np.where(years >= 0, ORANGE, BLUE))
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set(xlabel="contribution [years]", ylabel="triplet position (0 is lowest)", title=title)
    return ax
