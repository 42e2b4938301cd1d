"""The models inside a bundle as plain predictors: one stored volume or several in, one age per network out.

They come from checked arrays and JSON values only. Scans, intervals and warnings are for `bundle`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from brainage_nb.bundle_format import RESNET, VGG, BundleFiles
from brainage_nb.models.compute import Placed
from brainage_nb.models.network import resnet18_regressor

if TYPE_CHECKING:
    from brainage_nb.models.svr import VggSvr
    from brainage_nb.volumes.settings import PreprocessingSettings


class NetworkEnsemble:
    """One or several ResNets whose ages are averaged.

    Parameters
    ----------
    networks : sequence of AgeRegressor
        On the CPU, float32. They stay there, for Grad-CAM too; another device receives copies.
    flip_averaging : bool
        Each age is the mean over the volume and its left-right mirror image, as in training's predictions.
    device : torch.device or str
        Where the ages are computed; see `Placed`.
    """

    kind = RESNET

    def __init__(
        self, networks: Sequence[nn.Module], *, flip_averaging: bool, device: torch.device | str = "cpu"
    ):
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.placed = Placed(self.networks, device)
        # Channels last: a quarter faster on a CPU at 96^3, the same ages to a few millionths.
        for network in self.networks:
            network.to(memory_format=torch.channels_last_3d)
        self.flip_averaging = flip_averaging

    @property
    def device(self) -> torch.device:
        """Where the ages are computed."""
        return self.placed.device

    def predict(self, volume: np.ndarray) -> np.ndarray:
        """Ages in years (n_networks,) of one volume (size, size, size), RAS, float16 as stored.

        Of the scans that a network reads together, (channels, size, size, size).
        """
        batch = as_batch(volume)
        if self.flip_averaging:
            batch = torch.cat([batch, batch.flip(2)])
        batch = batch.to(memory_format=torch.channels_last_3d)

        def compute(networks: Sequence[nn.Module]) -> list[float]:
            place = batch.to(networks[0].age_mean.device)
            return [float(network(place).mean()) for network in networks]

        with torch.inference_mode():
            return np.array(self.placed.run(compute))


def as_batch(volume: np.ndarray) -> torch.Tensor:
    """Float32 (1, channels, size, size, size) of one volume (size, size, size), or of one with channels."""
    array = np.asarray(volume, dtype=np.float32)
    return torch.from_numpy(array.reshape(1, -1, *array.shape[-3:]))


class SvrModel:
    """VGG16 features and a support vector regression; an ensemble of one.

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


def _with_network_on(model: VggSvr, device: torch.device) -> VggSvr:
    network = copy.deepcopy(model.network).to(device=device)
    network.half = False  # as on the CPU
    return replace(model, network=network)


def build_model(
    files: BundleFiles, settings: PreprocessingSettings, device: torch.device | str = "cpu"
) -> NetworkEnsemble | SvrModel:
    """The model that a bundle's files hold, for volumes of these settings; ValueError where the arrays are
    not what the manifest says."""
    manifest = files.manifest
    if manifest["kind"] == VGG:
        return SvrModel(_load_svr(files, settings), manifest["vgg_svr"]["variant"], device=device)
    architecture, members = manifest["architecture"], manifest["members"]
    networks = [load_network(architecture, files.arrays(member["file"])) for member in members]
    return NetworkEnsemble(networks, flip_averaging=manifest["flip_averaging"], device=device)


def _load_svr(files: BundleFiles, settings: PreprocessingSettings) -> VggSvr:
    from brainage_nb.models.svr import ARRAYS, FUSIONS, NETWORK, VggSvr
    from brainage_nb.models.vgg16 import SLICES

    model = VggSvr.from_parts(files.manifest["vgg_svr"], files.arrays(ARRAYS), files.arrays(NETWORK))
    low, high = model.settings.window
    if model.spacing_mm != settings.spacing_mm or not low < high:
        raise ValueError(f"vgg_svr: slices of {model.spacing_mm} mm, seen from {low} to {high}")
    n_features = model.network.n_features(model.settings.image_size)
    for name in FUSIONS:
        _check_fusion(name, model.fusion(name), settings.size // SLICES, n_features)
    return model


def _check_fusion(name: str, fusion: Any, n_positions: int, n_features: int) -> None:
    positions, weights, n = fusion.positions_, fusion.weighting_.weights, len(fusion.coef_)
    triplets = len(positions)
    given = [array.shape for array in (positions, weights, fusion.coef_, fusion.intercept_)]
    expected = [(triplets,), (triplets,), (n, n_features), (n,)]
    if given != expected or n not in (1, triplets) or fusion.coef_.dtype != np.float64:
        raise ValueError(f"the arrays of {name} have shapes {given}, expected {expected}")
    if positions.dtype.kind != "i" or not set(positions.tolist()) <= set(range(n_positions)):
        raise ValueError(f"{name} reads positions that a volume does not have")
    numbers = (fusion.coef_, fusion.intercept_, *fusion.weighting_)
    if not all(np.isfinite(array).all() for array in numbers) or (weights < 0).any():
        raise ValueError(f"{name} holds weights that are not finite, or negative")


def load_network(architecture: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> nn.Module:
    """A network of this architecture with these weights, float32 on the CPU.

    It is made only where there are weights enough for it, so a manifest cannot ask for much more memory than
    its files hold. (Making it on PyTorch's meta device would need none, but drawing its weights there imports
    the compiler: four seconds.)

    Raises
    ------
    ValueError
        A tensor is missing, left over, of another shape or not finite, or a spread is not positive.
    """
    stages = zip(architecture["widths"], architecture["blocks"], strict=True)
    linear = 2 * architecture.get("channels", 1) * architecture.get("linear_edge", 0) ** 3
    least = sum(27 * width**2 * depth for width, depth in stages) + linear
    if least > (held := sum(array.size for array in weights.values())):
        raise ValueError(f"a network of more than {least:,} weights is described, the file holds {held:,}")
    # Bundles of release 0.1.0 name the norm and one output; there are no others.
    shape = {name: value for name, value in architecture.items() if name not in ("norm", "outputs")}
    network = resnet18_regressor(**shape)
    expected = network.state_dict()
    if unlike := sorted(set(expected) ^ set(weights)):
        raise ValueError(f"tensors missing or left over: {unlike[:4]}")
    for name, tensor in expected.items():
        array = weights[name]
        if array.shape != tensor.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {tuple(tensor.shape)}")
        tensor.copy_(torch.tensor(array))
        is_spread = name.endswith(("running_var", "age_sd"))
        if not tensor.isfinite().all() or (is_spread and not (tensor > 0).all()):
            raise ValueError(f"{name} holds values that are not finite, or a spread that is not positive")
    return network.eval()


def round_weights(network: nn.Module) -> dict[str, np.ndarray]:
    """A network's tensors, its large ones in half precision unless a weight is too large for that.

    Norms, biases and the age's scale stay exact: they are few, and rounding them would move every age.
    """
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    most = np.finfo(np.float16).max
    return {
        name: array.astype(np.float16) if array.ndim > 1 and np.abs(array).max() < most else array
        for name, array in arrays.items()
    }
