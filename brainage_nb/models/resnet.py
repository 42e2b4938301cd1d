"""The 3-D ResNet-18 that reads an age from a head. It knows nothing of files, batches or training.

Written out here, not imported from MONAI: `import monai.networks.nets.resnet` costs 12 s on two cores and
every prediction would pay it, and MONAI 1.6's `norm` argument never reaches the residual blocks. Parameter
names and arithmetic are those of MONAI and MedicalNet, so their weights load (the tests compare outputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORMS = ("batch", "group", "instance")
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
