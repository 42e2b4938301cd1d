"""VGG16's convolutional part and where its weights come from, never guessed and never swapped in silence.

It turns three-channel images into feature vectors. It knows no scans, slices or ages: see `features`.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from brainage_nb.workspace import sha256_of

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
