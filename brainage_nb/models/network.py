"""The network that reads an age from a head, the linear regression beside it, and weights to start from.

It is MONAI's 3-D ResNet-18; batches, losses and the training loop are not known here.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

from brainage_nb.bundle_format import RESNET, all_seen, among, open_bundle
from brainage_nb.models.settings import TrainingRefused, TrainingSettings
from brainage_nb.volumes.resampling import FWHM_PER_SD

if TYPE_CHECKING:
    import pandas as pd

HEAD = ("fc.weight", "fc.bias", "age_mean", "age_sd")


def resnet18_regressor(
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (2, 2, 2, 2),
    shortcut: str = "B",
    linear_edge: int = 0,
    channels: int = 1,
    age_mean: float = 0.0,
    age_sd: float = 1.0,
) -> AgeRegressor:
    """3-D ResNet-18 with a 7x7x7 stem of stride 2, global average pooling and a linear last layer.

    Parameters
    ----------
    widths, blocks : sequence of int
        Channels and residual blocks of the four stages; blocks of (1, 1, 1, 1) make a ResNet-10.
    shortcut : {"A", "B"}
        Where the resolution halves: "B" is a strided 1x1x1 convolution, "A" subsamples and pads with zero
        channels, as MedicalNet does.
    linear_edge : int
        Edge of the map of weights of a linear regression (`VoxelRegression`) whose age is averaged with that
        of the network; 0 for none.
    channels : int
        Of the volumes it takes: scans of one session.
    age_mean, age_sd : float
        Mean and spread of the training ages, years. The output starts at `age_mean`, so the optimiser's first
        steps are not spent on finding it.

    Returns
    -------
    AgeRegressor
        Module from (batch, channels, D, H, W) to ages in years of shape (batch,).

    >>> resnet18_regressor(age_mean=50.0, age_sd=15.0)(torch.zeros(2, 1, 48, 48, 48)).shape
    torch.Size([2])
    """
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut!r} is unknown. Available: ['A', 'B']")
    if len(widths) != 4 or len(blocks) != 4:
        raise ValueError(f"A ResNet has four stages; widths={tuple(widths)}, blocks={tuple(blocks)}.")
    network = AgeRegressor(widths, blocks, shortcut, age_mean, age_sd, channels)
    if linear_edge:
        empty = torch.zeros((channels * linear_edge, linear_edge, linear_edge))
        network.linear = VoxelRegression(empty, empty.clone(), 0.0)
    return network


class AgeOutput(nn.Module):
    """What turns a network's score into an age. A subclass has `features` and the last layer, `fc`.

    `linear`, where there is one, stands beside the network: it is fitted after it, and a predicted age is the
    mean of both; that of the network alone where one of several channels is empty.
    """

    linear: VoxelRegression | None

    def start_at(self, age_mean: float, age_sd: float) -> None:
        """Let the first guess be `age_mean`, and scores count in `age_sd` from there (years)."""
        self.register_buffer("age_mean", torch.tensor(float(age_mean)))
        self.register_buffer("age_sd", torch.tensor(float(age_sd)))
        self.linear = None

    def forward(self, volumes: Tensor) -> Tensor:
        """Ages in years, shape (batch,)."""
        score = self.fc(self.features(volumes)).float()[:, 0]
        age = self.age_mean + self.age_sd * score
        if self.linear is None:
            return age
        # The network learned to do without a channel now and then, the regression did not.
        is_whole = volumes.flatten(2).any(dim=2).all(dim=1)
        return torch.where(is_whole, (age + self.linear(volumes)) / 2, age)


class AgeRegressor(AgeOutput, ResNet):
    """See `resnet18_regressor`; `features` gives what the last layer takes."""

    def __init__(self, widths, blocks, shortcut, age_mean, age_sd, channels=1):
        super().__init__(
            "basic",
            list(blocks),
            list(widths),
            spatial_dims=3,
            n_input_channels=channels,
            conv1_t_stride=2,  # MONAI's default, 1, does ten times the work
            shortcut_type=shortcut,
            num_classes=1,
        )
        self.start_at(age_mean, age_sd)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def features(self, volumes: Tensor) -> Tensor:
        """Pooled features (batch, widths[-1]) of volumes (batch, 1, D, H, W), axes RAS."""
        x = self.maxpool(self.act(self.bn1(self.conv1(volumes))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def _downsample_basic_block(self, x: Tensor, planes: int, stride: int, **_: Any) -> Tensor:
        """Shortcut "A": every `stride`-th voxel, then zeros. MONAI's own lets no gradient pass."""
        step = slice(None, None, stride)
        return nn.functional.pad(x[:, :, step, step, step], (0, 0, 0, 0, 0, 0, 0, planes - x.shape[1]))


class OwnNetwork(AgeOutput):
    """Any module from (batch, 1, D, H, W) to one number per volume: its age in `age_sd` from `age_mean`."""

    def __init__(self, network: nn.Module, age_mean: float, age_sd: float):
        super().__init__()
        self.network, self.fc = network, nn.Identity()
        self.start_at(age_mean, age_sd)

    def features(self, volumes: Tensor) -> Tensor:
        """The module's numbers, (batch, 1)."""
        given = self.network(volumes)
        if given.numel() != len(volumes):
            raise ValueError(
                f"The network gives {tuple(given.shape)} for {len(volumes)} volumes: expected one number "
                f"per volume, ({len(volumes)},) or ({len(volumes)}, 1)."
            )
        return given.reshape(-1, 1)


def build_network(
    settings: TrainingSettings, age: np.ndarray, network: nn.Module | Callable[[], nn.Module] | None = None
) -> AgeOutput:
    """The network of these settings, or one of your own, started at the mean and spread of the training ages.

    Parameters
    ----------
    settings : TrainingSettings
    age : (n,) array
        Years.
    network : module, or function that makes one, optional
        See `train`.

    >>> build_network(TrainingSettings(), np.array([20.0, 80.0])).age_mean
    tensor(50.)
    """
    start = {"age_mean": float(np.mean(age)), "age_sd": max(1.0, float(np.std(age)))}
    if network is not None:
        return OwnNetwork(copy.deepcopy(network) if isinstance(network, nn.Module) else network(), **start)
    shape = {name: getattr(settings, name) for name in ("widths", "blocks", "shortcut")}
    return resnet18_regressor(**shape, channels=len(settings.channel_names), **start)


def describe_network(network: AgeOutput, size: int, channels: int = 1) -> pd.DataFrame:
    """One row per part of a network.

    Parameters
    ----------
    network : AgeRegressor or OwnNetwork
        On the CPU; left in evaluation mode.
    size : int
        Edge of a volume, voxels.
    channels : int

    Returns
    -------
    DataFrame
        Index `part`; columns `kind`, `gives` (channels and voxels for one volume) and `parameters`.

    >>> describe_network(resnet18_regressor(), 96).loc["conv1", "gives"]
    (64, 48, 48, 48)
    """
    import pandas as pd

    shapes: dict[nn.Module, tuple] = {}  # in order of computation

    def note(part: nn.Module, _, given: Tensor) -> None:
        shapes[part] = tuple(given.shape[1:])

    inner = network.network if isinstance(network, OwnNetwork) else network
    hooks = [part.register_forward_hook(note) for part in inner.children()]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, channels, size, size, size))
    for hook in hooks:
        hook.remove()
    names = {part: name for name, part in inner.named_children()}
    rows = [(names[part], type(part).__name__, gives, count_weights(part)) for part, gives in shapes.items()]
    return pd.DataFrame(rows, columns=["part", "kind", "gives", "parameters"]).set_index("part")


def count_weights(module: nn.Module) -> int:
    """Number of a module's weights."""
    return sum(weight.numel() for weight in module.parameters())


# --- the linear regression beside a network: what hundreds of scans say in a straight line ----------------
# It and a network err differently, and among few scans the mean of both errs less than either. Smoothing and
# scaling are folded into one map of weights, so that a prediction is a sum of products.

EDGE_MM = 4.0  # of a cube; finer than what the smoothing leaves
SMOOTH_MM = 12.0  # full width at half maximum, usual in morphometry
LEAST_SPREAD = 0.1  # of the largest spread over scans: voxels that vary less say nothing and are left out
PENALTIES = np.logspace(-4, 1, 16)  # in mean squared lengths of a scan
FOLDS = 5
MOST_SCANS = 3000  # more are drawn from at random: all are held in memory at once


class VoxelRegression(nn.Module):
    """Ages straight from a volume: how its means over cubes depart from usual ones, times weights, added up.

    Parameters
    ----------
    weight : Tensor (channels * edge, edge, edge)
        Years; each channel of a volume is brought to this many cubes an axis.
    centre : Tensor (channels * edge, edge, edge)
        Means over the training volumes.
    bias : float
        Age of a volume like these, years.
    """

    def __init__(self, weight: Tensor, centre: Tensor, bias: float):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("centre", centre)
        self.register_buffer("bias", torch.tensor(float(bias)))

    def forward(self, volumes: Tensor) -> Tensor:
        """Ages in years (batch,) of volumes (batch, 1, D, H, W)."""
        return self.bias + self.parts(volumes).sum(dim=(1, 2, 3))

    def parts(self, volumes: Tensor) -> Tensor:
        """Years (batch, channels * edge, edge, edge) that each cube adds to an age."""
        with torch.autocast(volumes.device.type, enabled=False):
            return (cubes(volumes.float(), self.weight.shape[-1]) - self.centre) * self.weight


def cubes(volumes: Tensor, edge: int) -> Tensor:
    """Means over cubes (batch, channels * edge, edge, edge) of volumes (batch, channels, D, H, W)."""
    return nn.functional.adaptive_avg_pool3d(volumes, edge).flatten(1, 2)


def fit_linear(
    volumes: Iterable[Tensor], age: np.ndarray, subjects: np.ndarray, spacing_mm: float
) -> VoxelRegression:
    """Fit the regression, on the CPU; its penalty is chosen by cross-validation over subjects.

    Parameters
    ----------
    volumes : iterable of Tensor (batch, channels, size, size, size)
        The training volumes in batches, axes RAS.
    age : (n,) array
        Years, in the order of the volumes.
    subjects : (n,) array
        Whose scans they are.
    spacing_mm : float
        Edge of a voxel.
    """
    smooth, sd, total = [], 0.0, 0.0
    for batch in volumes:
        width_mm = batch.shape[-1] * spacing_mm
        edge = max(1, min(batch.shape[-1], round(width_mm / EDGE_MM)))
        sd = SMOOTH_MM / FWHM_PER_SD / (width_mm / edge)  # in cubes
        channels = cubes(batch, edge).unflatten(1, (-1, edge))
        means = ((channels + channels.flip(2)) / 2).flatten(1, 2)  # left and right count alike
        total = total + means.sum(dim=0)
        smooth.extend(_smooth(volume, sd) for volume in means.cpu().numpy())
    smooth = np.stack(smooth)
    centre, spread = smooth.mean(axis=0), smooth.std(axis=0)
    used = spread > LEAST_SPREAD * spread.max()
    scaled = (smooth[:, used] - centre[used]) / spread[used]
    del smooth
    coefficients, intercept = _fit_ridge(scaled, age, subjects)
    weight = np.zeros(centre.shape)
    weight[used] = coefficients / spread[used]
    # The smoothing is its own adjoint: smoothing the weights does what smoothing each volume would do.
    weight = torch.from_numpy(_smooth(weight, sd).astype(np.float32))
    return VoxelRegression(weight, (total / len(age)).cpu(), intercept)


def _fit_ridge(scaled: np.ndarray, age: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (n_voxels,) and intercept, from as many principal components as there are scans."""
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.model_selection import GroupKFold

    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    kept = values > 1e-9 * values[-1]
    lengths = np.sqrt(values[kept])
    components, penalties = vectors[:, kept] * lengths, PENALTIES * values.mean()
    model, folds = Ridge(alpha=penalties[-1]), min(FOLDS, len(np.unique(subjects)))
    if folds > 1:
        cut = list(GroupKFold(folds).split(components, age, subjects))
        model = RidgeCV(penalties, scoring="neg_mean_absolute_error", cv=cut)
    model.fit(components, age)
    return scaled.T @ (vectors[:, kept] @ (model.coef_ / lengths)), float(model.intercept_)


def _smooth(cubes: np.ndarray, sd: float) -> np.ndarray:
    """Cubes (channels * edge, edge, edge), each channel smoothed by itself."""
    from scipy.ndimage import gaussian_filter

    channels = cubes.reshape(-1, *(cubes.shape[-1],) * 3)
    return gaussian_filter(channels, (0, sd, sd, sd), mode="constant").reshape(cubes.shape)


# --- weights to start from: a bundle, a `.safetensors`, or a PyTorch file such as MedicalNet's ------------


def load_pretrained(model: nn.Module, path: str | Path) -> list[str]:
    """Load weights of the same architecture, save for the regression head; returns the names left alone.

    Parameters
    ----------
    model : AgeRegressor
        Changed in place. MedicalNet's weights need `shortcut="A"`.
    path : path
        A bundle (folder or `.zip`; of an ensemble the first member), `.safetensors`, or a PyTorch file, bare
        or under the key `state_dict`, with or without the prefix `module.`. Nothing in it is executed.

    Raises
    ------
    ValueError
        Where a tensor of the file does not fit the network, or the file lacks one the network needs.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in _read_weights(Path(path)).items()}
    own = model.state_dict()
    wanted = [name for name in own if name not in HEAD and not name.endswith("num_batches_tracked")]
    missing = [name for name in wanted if name not in weights]
    unlike = [name for name in wanted if name in weights and weights[name].shape != own[name].shape]
    if missing or unlike:
        raise ValueError(
            f"{path} does not fit this network: {len(missing)} tensors missing ({missing[:3]}), "
            f"{len(unlike)} of another shape ({unlike[:3]}). MedicalNet's weights need shortcut='A'."
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return [name for name in own if name not in wanted]


def refuse_training_people(
    path: str | Path, scans: pd.DataFrame, hashes: Mapping[str, str], *, folds: bool
) -> None:
    """Refuse a bundle that has learned from scans this run is judged by; other files cannot be asked.

    Parameters
    ----------
    path : path
        What `load_pretrained` takes.
    scans : DataFrame
        `scan_id, split`.
    hashes : mapping
        Scan id -> SHA-256 of the scan's file, as the volume store has it.
    folds : bool
        With folds every scan is judged by its held-out prediction; else those of val and test.

    Raises
    ------
    TrainingRefused
    """
    if not Path(path).exists():
        raise TrainingRefused(f"init_from = {path} does not exist; give a bundle or a file of weights.")
    seen = list_training_people(path)
    judged = scans if folds else scans[scans["split"] != "train"]
    known = [scan_id for scan_id in judged["scan_id"] if hashes.get(scan_id)]
    found = among([hashes[scan_id] for scan_id in known], seen, "images") if seen else []
    learned = [scan_id for scan_id, one in zip(known, found, strict=False) if one]
    if learned:
        raise TrainingRefused(
            f"init_from = {path}: this bundle has learned from {len(learned)} of the {len(judged)} scans "
            f"that this run would be judged by (the first: {learned[0]}), so its errors would be too small. "
            "Start from a bundle of other people, such as one trained on the known-answer cohort."
        )


def list_training_people(path: str | Path) -> list[dict[str, Any]]:
    """From which people starting weights have learned, in `all_seen`'s form; none for what is no bundle."""
    if not str(path):
        return []
    place = Path(path)
    if not _is_bundle(place):
        place = place.parent  # a file of weights may lie in a bundle
        if not (place / "bundle.json").is_file():
            return []
    files = open_bundle(place)
    return [seen for one in [*files.members.values()] or [files] for seen in all_seen(one.manifest)]


def _is_bundle(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".zip" and zipfile.is_zipfile(path))


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if _is_bundle(path):
        files = open_bundle(path)
        if files.manifest["kind"] != RESNET:
            raise ValueError(
                f"{path} holds no single network ({files.manifest['kind']}); start from a ResNet-18."
            )
        arrays = files.arrays(files.manifest["members"][0]["file"])
        return {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)
