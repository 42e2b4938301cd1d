"""The variants of a volume whose predicted ages are averaged. One place for training and for bundles.

The 3-D ResNet-18 that reads an age from a head. It knows nothing of files, batches or training.

Written out here, not imported from MONAI: `import monai.networks.nets.resnet` costs 12 s on two cores and
every prediction would pay it, and MONAI 1.6's `norm` argument never reaches the residual blocks. Parameter
names and arithmetic are those of MONAI and MedicalNet, so their weights load (the tests compare outputs).

A ridge regression on smoothed voxels beside a network: what hundreds of scans say in a straight line.

It and a network err differently, and among few scans the mean of both errs less than either
(`benchmarks/accuracy.py`). The smoothing and the scaling are folded into one map of weights, so that a
prediction is a sum of products.

Weights to start training from: a bundle of ours, a `.safetensors`, or a PyTorch file such as MedicalNet's.

Only who may start from where is judged here; training itself is in `member_fit`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from brainage_nb.bundle_format import all_seen, among, open_bundle
from brainage_nb.models.settings import NORMS
from brainage_nb.volumes.resampling import FWHM_PER_SD


def views(batch: Tensor, *, flip_averaging: bool, shift_averaging: int = 0) -> Iterator[Tensor]:
    """The batch itself, then its variants, all of one shape.

    Parameters
    ----------
    batch : Tensor (batch, 1, D, H, W)
        Axes RAS.
    flip_averaging : bool
        Each view is followed by its left-right mirror image.
    shift_averaging : int
        Also the batch moved by so many voxels to and fro along each axis, its edge repeated; 0 for not.
    """
    for moved in (batch, *_shifted(batch, shift_averaging)):
        yield moved
        if flip_averaging:
            yield moved.flip(2)


def _shifted(batch: Tensor, voxels: int) -> Iterator[Tensor]:
    from torch.nn.functional import pad

    if not voxels:
        return
    wide = pad(batch, (voxels,) * 6, mode="replicate")
    for axis in (2, 3, 4):
        for start in (0, 2 * voxels):
            view = wide
            for other in (2, 3, 4):
                view = view.narrow(other, start if other == axis else voxels, batch.shape[other])
            yield view


DISTRIBUTION_POINTS, DISTRIBUTION_REACH = 65, 4.0  # of an age distribution: spread over +-4 age_sd
HEAD = ("fc.weight", "fc.bias", "age_mean", "age_sd")


def outputs_of(loss: str) -> int:
    """How many outputs a network learns with a loss: `distribution` needs many, all others one."""
    return DISTRIBUTION_POINTS if loss == "distribution" else 1


def resnet18_regressor(
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (2, 2, 2, 2),
    norm: str = "batch",
    shortcut: str = "B",
    dropout: float = 0.0,
    outputs: int = 1,
    linear_edge: int = 0,
    age_mean: float = 0.0,
    age_sd: float = 1.0,
) -> AgeRegressor:
    """3-D ResNet-18 with a 7x7x7 stem of stride 2, global average pooling and a linear last layer.

    Parameters
    ----------
    widths : sequence of int
        Channels of the four residual stages.
    blocks : sequence of int
        Residual blocks of each stage; (2, 2, 2, 2) is ResNet-18, (1, 1, 1, 1) is ResNet-10.
    norm : {"batch", "group", "instance"}
        Normalisation. "batch" learns fastest on small cohorts; before evaluation its statistics need
        `precise_statistics`. "group" is GroupNorm of 16 channels a group, alike in training and evaluation.
    shortcut : {"A", "B"}
        Where the resolution halves: "B" is a strided 1x1x1 convolution, "A" subsamples and pads with zero
        channels (MedicalNet; here gradients pass, in MONAI they do not).
    dropout : float
        Share of the pooled features dropped in training.
    outputs : int
        1 for the age itself; more for its distribution over so many ages, evenly from 4 `age_sd` below to
        4 `age_sd` above `age_mean`, whose mean is the age (soft labels, Peng et al. 2021,
        doi:10.1016/j.media.2020.101871).
    linear_edge : int
        Edge of the map of weights of a linear regression (`VoxelRegression`) whose age is averaged with that
        of the network; 0 for none.
    age_mean, age_sd : float
        Mean and spread of the training ages, years. The output starts at `age_mean`, so the optimiser's first
        steps are not spent on finding it.

    Returns
    -------
    AgeRegressor
        Module from (batch, 1, D, H, W) to ages in years of shape (batch,).
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown. Available: {list(NORMS)}")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut!r} is unknown. Available: ['A', 'B']")
    if len(widths) != 4 or len(blocks) != 4:
        raise ValueError(f"A ResNet has four stages; widths={tuple(widths)}, blocks={tuple(blocks)}.")
    network = AgeRegressor(widths, blocks, norm, shortcut, dropout, outputs, age_mean, age_sd)
    if linear_edge:
        empty = torch.zeros((linear_edge,) * 3)
        network.linear = VoxelRegression(empty, empty.clone(), 0.0)
    return network


class AgeRegressor(nn.Module):
    """See `resnet18_regressor`; `features` gives what the last layer sees, `ages` what it makes of that.

    `linear`, where there is one, stands beside the network: it is fitted after it (`fitting.linear`), and a
    predicted age is the mean of both.
    """

    def __init__(self, widths, blocks, norm, shortcut, dropout, outputs, age_mean, age_sd):
        super().__init__()
        self.conv1 = nn.Conv3d(1, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(norm, widths[0])
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            first = ResidualBlock(before, width, stride, norm, shortcut)
            rest = [ResidualBlock(width, width, 1, norm, shortcut) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
            before = width
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(before, outputs)
        self.register_buffer("age_mean", torch.tensor(float(age_mean)))
        self.register_buffer("age_sd", torch.tensor(float(age_sd)))
        self.linear: VoxelRegression | None = None
        self._start()

    def _start(self):
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        if self.fc.out_features > 1:  # the first guess is the training ages' spread
            self.fc.bias.data = -self.points().square() / 2

    def features(self, volumes: Tensor) -> Tensor:
        """Pooled features (batch, widths[-1]) of volumes (batch, 1, D, H, W), axes RAS."""
        x = self.maxpool(self.act(self.bn1(self.conv1(volumes))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3, 4))

    def points(self) -> Tensor:
        """Where the distribution's outputs stand, (outputs,), in `age_sd` from `age_mean`."""
        return torch.linspace(
            -DISTRIBUTION_REACH, DISTRIBUTION_REACH, self.fc.out_features, device=self.age_mean.device
        )

    def ages(self, scores: Tensor) -> Tensor:
        """Ages in years (batch,) of the last layer's outputs (batch, outputs)."""
        scores = scores.float()
        if scores.shape[1] > 1:
            return self.age_mean + self.age_sd * (scores.softmax(dim=1) @ self.points())
        return self.age_mean + self.age_sd * scores[:, 0]

    def seen(self, volumes: Tensor) -> Tensor:
        """All that an age is made of: `features` and, as a last column, the age of `linear` where it is."""
        features = self.features(volumes)
        if self.linear is None:
            return features
        return torch.cat([features, self.linear(volumes)[:, None]], dim=1)

    def ages_of(self, seen: Tensor) -> Tensor:
        """Ages in years (batch,) of what `seen` gave."""
        ages = self.ages(self.fc(self.dropout(seen[:, : self.fc.in_features])))
        return ages if self.linear is None else (ages + seen[:, -1].float()) / 2

    def forward(self, volumes: Tensor, *, scores: bool = False) -> Tensor:
        """Ages in years, shape (batch,); with `scores` the last layer's outputs (batch, outputs) instead."""
        if scores:
            return self.fc(self.dropout(self.features(volumes)))
        return self.ages_of(self.seen(volumes))


class VoxelRegression(nn.Module):
    """Ages straight from a volume: how its means over cubes depart from usual ones, times weights, added up.

    Parameters
    ----------
    weight : Tensor (edge, edge, edge)
        Years; the volume is brought to this many cubes an axis.
    centre : Tensor (edge, edge, edge)
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
        """Years (batch, edge, edge, edge) that each cube adds to an age."""
        with torch.autocast(volumes.device.type, enabled=False):
            return (cubes(volumes.float(), len(self.weight)) - self.centre) * self.weight


def cubes(volumes: Tensor, edge: int) -> Tensor:
    """Means over cubes (batch, edge, edge, edge) of volumes (batch, 1, D, H, W)."""
    return nn.functional.adaptive_avg_pool3d(volumes, edge)[:, 0]


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut around them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, before: int, width: int, stride: int, norm: str, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv3d(before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(norm, width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = _norm(norm, width)
        if stride == 1 and before == width:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = Subsample(stride, width - before)
        else:
            self.downsample = nn.Sequential(
                nn.Conv3d(before, width, kernel_size=1, stride=stride), _norm(norm, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + self.downsample(x))


class Subsample(nn.Module):
    """Shortcut "A": every `stride`-th voxel, then `padding` channels of zeros."""

    def __init__(self, stride: int, padding: int):
        super().__init__()
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        step = slice(None, None, self.stride)
        return nn.functional.pad(x[:, :, step, step, step], (0, 0, 0, 0, 0, 0, 0, self.padding))


def _norm(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    if norm == "instance":
        return nn.GroupNorm(channels, channels)
    return nn.GroupNorm(max(1, channels // 16), channels)


EDGE_MM = 4.0  # of a cube; finer than what the smoothing leaves
SMOOTH_MM = 12.0  # full width at half maximum, usual in morphometry
LEAST_SPREAD = 0.1  # of the largest spread over scans: voxels that vary less say nothing and are left out
PENALTIES = np.logspace(-4, 1, 16)  # in mean squared lengths of a scan
FOLDS = 5
MOST_SCANS = 3000  # more are drawn from at random: all are held in memory at once


def fit_linear(
    volumes: Iterable[Tensor], age: np.ndarray, subjects: np.ndarray, spacing_mm: float
) -> VoxelRegression:
    """Fit the regression, on the CPU; its penalty is chosen by cross-validation over subjects.

    Parameters
    ----------
    volumes : iterable of Tensor (batch, 1, size, size, size)
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
        size = batch.shape[-1]
        edge = max(1, min(size, round(size * spacing_mm / EDGE_MM)))
        sd = SMOOTH_MM / FWHM_PER_SD / (size * spacing_mm / edge)  # in cubes
        means = cubes(batch, edge)
        means = (means + means.flip(1)) / 2  # left and right count alike
        total = total + means.sum(dim=0)
        smooth.extend(_smoothed(volume, sd) for volume in means.cpu().numpy())
    smooth = np.stack(smooth)
    centre, spread = smooth.mean(axis=0), smooth.std(axis=0)
    used = spread > LEAST_SPREAD * spread.max()
    scaled = (smooth[:, used] - centre[used]) / spread[used]
    del smooth
    coefficients, intercept = _ridge(scaled, age, subjects)
    weight = np.zeros(centre.shape)
    weight[used] = coefficients / spread[used]
    # The smoothing is its own adjoint: smoothing the weights does what smoothing each volume would do.
    weight = torch.from_numpy(_smoothed(weight, sd).astype(np.float32))
    return VoxelRegression(weight, (total / len(age)).cpu(), intercept)


def _ridge(scaled: np.ndarray, age: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (n_voxels,) and intercept, from as many principal components as there are scans."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    kept = values > 1e-9 * values[-1]
    lengths = np.sqrt(values[kept])
    components = vectors[:, kept] * lengths
    penalties = PENALTIES * values.mean()
    model = Ridge(alpha=penalties[-1])
    folds = min(FOLDS, len(np.unique(subjects)))
    if folds > 1:
        grid, cut = {"alpha": penalties}, GroupKFold(folds)
        search = GridSearchCV(model, grid, scoring="neg_mean_absolute_error", cv=cut, refit=False)
        model.alpha = search.fit(components, age, groups=subjects).best_params_["alpha"]
    model.fit(components, age)
    return scaled.T @ (vectors[:, kept] @ (model.coef_ / lengths)), float(model.intercept_)


def _smoothed(volume: np.ndarray, sd: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(volume, sd, mode="constant")


class StartRefused(ValueError):
    """Weights that must not be started from; the message says why and what to do."""


def load_pretrained(model: AgeRegressor, path: str | Path) -> list[str]:
    """Load weights of the same architecture, save for the regression head; returns the names left alone.

    Parameters
    ----------
    model : AgeRegressor
        Changed in place. MedicalNet's weights need `norm="batch", shortcut="A"`.
    path : path
        A bundle (folder or `.zip`; of an ensemble the first member), `.safetensors`, or a PyTorch file, bare
        or under the key `state_dict`, with or without the prefix `module.`. Nothing in it is executed.

    Raises
    ------
    ValueError
        Where a tensor of the file does not fit the network, or the file lacks one the network needs.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in _weights(Path(path)).items()}
    own = model.state_dict()
    wanted = [name for name in own if name not in HEAD and not name.endswith("num_batches_tracked")]
    missing = [name for name in wanted if name not in weights]
    unlike = [name for name in wanted if name in weights and weights[name].shape != own[name].shape]
    if missing or unlike:
        raise ValueError(
            f"{path} does not fit this network: {len(missing)} tensors missing ({missing[:3]}), "
            f"{len(unlike)} of another shape ({unlike[:3]}). MedicalNet's weights need norm='batch' and "
            "shortcut='A'."
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return [name for name in own if name not in wanted]


def refuse_seen(path: str | Path, scans: pd.DataFrame, hashes: Mapping[str, str], *, folds: bool) -> None:
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
    StartRefused
    """
    if not Path(path).exists():
        raise StartRefused(f"init_from = {path} does not exist; give a bundle or a file of weights.")
    seen = seen_by(path)
    if not seen:
        return
    judged = scans if folds else scans[scans["split"] != "train"]
    known = [scan_id for scan_id in judged["scan_id"] if hashes.get(scan_id)]
    learned = [
        scan_id
        for scan_id, found in zip(known, among([hashes[s] for s in known], seen, "images"), strict=True)
        if found
    ]
    if learned:
        raise StartRefused(
            f"init_from = {path}: this bundle has learned from {len(learned)} of the {len(judged)} scans "
            f"that this run would be judged by (the first: {learned[0]}), so its errors would be too small. "
            "Start from a bundle of other people, such as one trained on the known-answer cohort."
        )


def seen_by(path: str | Path) -> list[dict[str, Any]]:
    """Whom weights to start from have learned from, as `all_seen` says it; nobody for what is no bundle."""
    place = _bundle_around(Path(path)) if str(path) else None
    return all_seen(open_bundle(place).manifest) if place else []


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a path is, or that a file of weights lies in."""
    if _is_bundle(path):
        return path
    return path.parent if (path.parent / "bundle.json").is_file() else None


def _is_bundle(path: Path) -> bool:
    return path.is_dir() or (zipfile.is_zipfile(path) and path.suffix == ".zip")


def _weights(path: Path) -> Mapping[str, Tensor]:
    if _is_bundle(path):
        files = open_bundle(path)
        if not files.manifest.get("members"):
            raise ValueError(
                f"{path} holds no network ({files.manifest.get('kind')}); start from a ResNet-18."
            )
        arrays = files.arrays(files.manifest["members"][0]["file"])
        return {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)
