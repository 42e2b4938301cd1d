"""The models inside a bundle as plain predictors: one stored volume in, one age a member out.

They come from checked arrays and JSON values only. Scans, intervals and warnings are for `prediction` and
`bundle`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from brainage_nb.bundle_format import BundleError, BundleFiles
from brainage_nb.models.compute import Placed
from brainage_nb.models.network import list_views, resnet18_regressor
from brainage_nb.workspace import write_json

if TYPE_CHECKING:
    from brainage_nb.models.svr import VggSvr

RESNET, VGG = "resnet18", "vgg16_svr"
# A manifest must not ask for more than any real network has.
LARGEST = {"widths": 2048, "blocks": 64}
MOST_OUTPUTS, LARGEST_EDGE = 1000, 256
HALF_PRECISION_YEARS = 0.01  # half-precision weights are kept where no prediction moves by more


class NetworkEnsemble:
    """One or several ResNets whose ages are averaged.

    Parameters
    ----------
    networks : sequence of AgeRegressor
        On the CPU, float32. They stay there, for heat maps too; another device receives copies.
    flip_averaging : bool
        Each age is the mean over the volume and its left-right mirror image, as in training's predictions.
    device : torch.device or str
        Where the convolutions of a prediction are computed; see `Placed`.
    """

    kind = RESNET

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        flip_averaging: bool,
        device: torch.device | str = "cpu",
    ):
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self._placed = Placed(self.networks, device)
        # Channels last: a quarter faster on a CPU at 96^3, the same ages to a few millionths.
        for network in self.networks:
            network.to(memory_format=torch.channels_last_3d)
        self.flip_averaging = flip_averaging

    @property
    def device(self) -> torch.device:
        """Where the convolutions are computed."""
        return self._placed.device

    def predict(self, volume: np.ndarray) -> np.ndarray:
        """Ages in years (members,) of one volume (size, size, size), RAS, float16 as stored."""
        return self.predict_with_features(volume)[0]

    def predict_with_features(self, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ages as `predict` gives them and, from the same pass, what `features` gives."""
        views = torch.cat(list_views(_batch_of(volume), self.flip_averaging))

        def look(networks: list[nn.Module]) -> tuple[list[float], np.ndarray]:
            batch = _beside(networks[0], views)
            features = [network.features(batch) for network in networks]
            ages = [network.ages_from(each, batch) for network, each in zip(networks, features, strict=True)]
            return [float(each.mean()) for each in ages], features[0][0].cpu().numpy()

        with torch.inference_mode():
            ages, features = self._placed.run(look)
        return np.array(ages), features

    def features(self, volume: np.ndarray) -> np.ndarray:
        """What the last layer of the first member sees of a volume, not mirrored: (widths[-1],)."""
        with torch.inference_mode():
            return self.networks[0].features(_batch_of(volume))[0].numpy()


class SvrModel:
    """VGG16 features and a support vector regression; one member.

    Parameters
    ----------
    model : VggSvr
        On the CPU. It stays there, for contributions too; another device receives a copy of its network.
    variant : {"early", "late"}
    device : torch.device or str
        Where the features of a prediction are computed; see `Placed`.
    """

    kind = VGG

    def __init__(self, model: VggSvr, variant: str, *, device: torch.device | str = "cpu"):
        self.model, self.variant = model, variant
        model.fusion(variant)  # refuses an unknown name
        self._placed = Placed(model, device, _with_network_on)

    @property
    def device(self) -> torch.device:
        """Where the features are computed."""
        return self._placed.device

    def predict(self, volume: np.ndarray) -> np.ndarray:
        """Age in years, shape (1,), of one volume (size, size, size), RAS, float16 as stored."""
        features = self._placed.run(lambda model: model.features(volume))
        return np.asarray(self.model.fusion(self.variant).predict([features]), dtype=float)

    def predict_with_features(self, volume: np.ndarray) -> tuple[np.ndarray, None]:
        """Age as `predict` gives it; features for a distance are kept of networks only."""
        return self.predict(volume), None


def compute_threads(n: int) -> None:
    """Let models called from the present thread use `n` processors each; other threads keep theirs."""
    torch.set_num_threads(n)


def _beside(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The batch on the network's device, in the order of memory that is fast there."""
    device = network.age_mean.device
    if device.type == "cpu":
        return batch.to(memory_format=torch.channels_last_3d)
    return batch.to(device)


def _with_network_on(model: VggSvr, device: torch.device) -> VggSvr:
    network = copy.deepcopy(model.network).to(device=device)
    network.half = False  # as on the CPU
    return replace(model, network=network)


def _batch_of(volume: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(volume, dtype=np.float32))[None, None]


def network_from(architecture: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> nn.Module:
    """A network of this architecture with these weights, float32 on the CPU.

    Nothing is allocated before the weights were seen to fit, so a manifest cannot ask for more memory than
    its files hold.

    Raises
    ------
    ValueError
        The architecture is unknown or beyond bounds, or a tensor is missing, left over, of another shape, or
        not finite.
    """
    _check_blocks(architecture, weights)
    network = resnet18_regressor(**architecture)
    expected = network.state_dict()
    if unlike := sorted(set(expected) ^ set(weights)):
        raise ValueError(f"tensors missing or left over: {unlike[:4]}")
    for name, array in weights.items():
        if tuple(expected[name].shape) != array.shape or array.dtype.kind not in "fi":
            raise ValueError(
                f"{name} has shape {array.shape} and type {array.dtype}, expected "
                f"{tuple(expected[name].shape)}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
    state = {
        name: torch.from_numpy(array if array.flags.writeable else array.copy()).to(expected[name].dtype)
        for name, array in weights.items()
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def _check_blocks(architecture: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    """Whether the file holds the last convolution of every block and the regression's maps, before a network
    of that size is made.

    (Making it on PyTorch's meta device would need no memory, but drawing its weights there imports the
    compiler: four seconds.)
    """
    for name, largest in LARGEST.items():
        values = architecture.get(name, ())
        if not all(type(value) is int and 0 < value <= largest for value in values):
            raise ValueError(f"{name} = {values!r}: expected four whole numbers from 1 to {largest}")
    outputs = architecture.get("outputs", 1)
    if type(outputs) is not int or not 0 < outputs <= MOST_OUTPUTS:
        raise ValueError(f"outputs = {outputs!r}: expected a whole number from 1 to {MOST_OUTPUTS}")
    edge = architecture.get("linear_edge", 0)
    if type(edge) is not int or not 0 <= edge <= LARGEST_EDGE:
        raise ValueError(f"linear_edge = {edge!r}: expected a whole number from 0 to {LARGEST_EDGE}")
    expected = {f"linear.{name}": (edge,) * 3 for name in ("weight", "centre") if edge}
    for stage, (width, depth) in enumerate(
        zip(architecture["widths"], architecture["blocks"], strict=True), start=1
    ):
        for block in range(depth):
            expected[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3, 3)
    for name, shape in expected.items():
        found = weights[name].shape if name in weights else "missing"
        if found != shape:
            raise ValueError(f"{name} is {found}, bundle.json says {shape}")


def arrays_of(network: nn.Module, *, half: bool) -> dict[str, np.ndarray]:
    """A network's tensors as arrays; `half` rounds floating-point weights to float16."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    if not half:
        return arrays
    # Norms, biases and the age scale stay exact: they are few, and rounding them would move every prediction.
    return {name: array.astype(np.float16) if array.ndim > 1 else array for name, array in arrays.items()}


def precision_check(
    network: nn.Module,
    architecture: Mapping[str, Any],
    volumes: Sequence[np.ndarray],
    *,
    flip_averaging: bool,
) -> float:
    """Largest change in years of the ages of these volumes when the weights are rounded to half precision.

    `flip_averaging` as for `NetworkEnsemble`. Infinite where a weight is too large for half precision.
    """
    with np.errstate(over="ignore"):
        rounded = arrays_of(network, half=True)
    if not all(np.isfinite(array).all() for array in rounded.values()):
        return np.inf
    exact = NetworkEnsemble([network], flip_averaging=flip_averaging)
    half = NetworkEnsemble([network_from(architecture, rounded)], flip_averaging=flip_averaging)
    return max(float(np.abs(exact.predict(volume) - half.predict(volume)).max()) for volume in volumes)


def model_of(files: BundleFiles, device: torch.device | str = "cpu") -> NetworkEnsemble | SvrModel:
    """The model that a bundle's checked files hold.

    Raises
    ------
    BundleError
        Its kind is unknown, or it has no members.
    ValueError
        The manifest does not fit the arrays.
    """
    manifest = files.manifest
    if manifest["kind"] == RESNET:
        networks = [
            network_from(manifest["architecture"], files.arrays(member["file"]))
            for member in manifest["members"]
        ]
        if not networks:
            raise BundleError(f"{files.name} lists no members.")
        if manifest.get("shift_averaging"):
            raise BundleError(
                f"{files.name} averages over moved copies of a scan (shift_averaging = "
                f"{manifest['shift_averaging']!r}), which is no longer computed. Train it again."
            )
        return NetworkEnsemble(networks, flip_averaging=bool(manifest["flip_averaging"]), device=device)
    if manifest["kind"] == VGG:

        def write(folder: Path) -> None:
            for file in ("vgg_svr.safetensors", "vgg16_features.safetensors"):
                (folder / file).write_bytes(files.content(file))

        return svr_from(manifest["vgg_svr"], write, device)
    raise BundleError(f"{files.name} holds a model of kind {manifest['kind']!r}; known: {RESNET}, {VGG}.")


def svr_from(
    facts: Mapping[str, Any], write: Callable[[Path], None], device: torch.device | str = "cpu"
) -> SvrModel:
    """A VGG16-SVR from its JSON facts; `write(folder)` puts its two checked array files into a private
    folder.
    """
    from brainage_nb.models.svr import FACTS, VggSvr

    with tempfile.TemporaryDirectory(prefix="brainage-") as folder:
        write(Path(folder))
        write_json(facts, Path(folder) / FACTS)
        model = VggSvr.load(folder)
    return SvrModel(model, facts["variant"], device=device)
