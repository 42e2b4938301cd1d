"""BatchNorm whose statistics span all processes of a batch: several processes train what one would."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def share_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm of a model take its statistics over all processes; names and weights stay.

    PyTorch's own SyncBatchNorm needs a GPU; on CPUs `SharedBatchNorm3d` stands in.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = SharedBatchNorm3d
    return model


class SharedBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm3d over the parts of a batch that several CPU processes hold; (n, channels, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        size = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, dim=(0, 2, 3, 4), correction=0)
        mean, variance = mean.double(), variance.double()
        parts = torch.cat([size * mean, size * (variance + mean**2), mean.new_tensor([size])])
        first, second, total = _SumOverProcesses.apply(parts).split([len(mean), len(mean), 1])
        mean = first / total
        variance = second / total - mean**2
        self._track(mean.detach(), variance.detach() * total / (total - 1))
        shape = (1, -1, 1, 1, 1)
        scale = self.weight * (variance + self.eps).rsqrt().to(x.dtype)
        shift = self.bias - mean.to(x.dtype) * scale
        return x * scale.view(shape) + shift.view(shape)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of theirs, since the loss is a sum over processes too."""

    @staticmethod
    def forward(context, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
