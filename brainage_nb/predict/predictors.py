"""The models inside a bundle as plain predictors: one stored volume in, one age per network out.

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
        """Ages in years (n_networks,) of one volume (size, size, size), RAS, float16 as stored."""
        batch = torch.from_numpy(np.asarray(volume, dtype=np.float32))[None, None]
        if self.flip_averaging:
            batch = torch.cat([batch, batch.flip(2)])
        batch = batch.to(memory_format=torch.channels_last_3d)

        def compute(networks: Sequence[nn.Module]) -> list[float]:
            place = batch.to(networks[0].age_mean.device)
            return [float(network(place).mean()) for network in networks]

        with torch.inference_mode():
            return np.array(self.placed.run(compute))


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


def build_model(files: BundleFiles, device: torch.device | str = "cpu") -> NetworkEnsemble | SvrModel:
    """The model that a bundle's files hold; ValueError where the arrays are not what the manifest says."""
    manifest = files.manifest
    if manifest["kind"] == VGG:
        return SvrModel(_load_svr(files), manifest["vgg_svr"]["variant"], device=device)
    networks = [
        load_network(manifest["architecture"], files.arrays(member["file"])) for member in manifest["members"]
    ]
    return NetworkEnsemble(networks, flip_averaging=manifest["flip_averaging"], device=device)


def _load_svr(files: BundleFiles) -> VggSvr:
    from brainage_nb.models.svr import ARRAYS, NETWORK, VggSvr

    fusions, network = files.arrays(ARRAYS), files.arrays(NETWORK)
    for name, array in (fusions | network).items():
        if not np.isfinite(array).all():
            raise ValueError(f"this bundle is damaged: {name} holds values that are not finite")
    return VggSvr.from_parts(files.manifest["vgg_svr"], fusions, network)


def load_network(architecture: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> nn.Module:
    """A network of this architecture with these weights, float32 on the CPU.

    Nothing is allocated before the weights were seen to fit, so a manifest cannot ask for more memory than
    its files hold.

    Raises
    ------
    ValueError
        A tensor is missing, left over, of another shape or kind, not finite, or a spread is negative.
    """
    _check_blocks(architecture, weights)
    # Bundles of release 0.1.0 name the norm; there is one.
    network = resnet18_regressor(**{name: value for name, value in architecture.items() if name != "norm"})
    expected = network.state_dict()
    if unlike := sorted(set(expected) ^ set(weights)):
        raise ValueError(f"tensors missing or left over: {unlike[:4]}")
    for name, array in weights.items():
        shape = tuple(expected[name].shape)
        if array.shape != shape or array.dtype.kind not in "fi":
            raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}, expected {shape}")
        spread = name.endswith(("running_var", "age_sd"))
        if not np.isfinite(array).all() or (spread and (array < 0).any()):
            raise ValueError(f"this bundle is damaged: {name} holds values that are not finite or negative")
        expected[name].copy_(torch.tensor(array))
    return network.eval()


def _check_blocks(architecture: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    """Whether the file holds the last convolution of every block and the regression's maps, before a network
    of that size is made.

    (Making it on PyTorch's meta device would need no memory, but drawing its weights there imports the
    compiler: four seconds.)
    """
    edge = architecture.get("linear_edge", 0)
    expected = {f"linear.{name}": (edge,) * 3 for name in ("weight", "centre") if edge}
    stages = zip(architecture["widths"], architecture["blocks"], strict=True)
    for stage, (width, depth) in enumerate(stages, start=1):
        for block in range(depth):
            expected[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3, 3)
    for name, shape in expected.items():
        found = weights[name].shape if name in weights else "missing"
        if found != shape:
            raise ValueError(f"{name} is {found}, bundle.json says {shape}")


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
