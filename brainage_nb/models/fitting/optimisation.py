"""What one optimisation step is made of: loss, learning rate, gradient in pieces, weight average, evaluation.

Knows models and batches; knows no files, folds or epochs' bookkeeping.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from brainage_nb.models.resnet import AgeRegressor
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.views import views


def huber_loss(predicted: Tensor, age: Tensor, delta: float) -> Tensor:
    """Huber loss of each sample (batch,), years; square within `delta` years, linear beyond.

    Raises
    ------
    ValueError
        Where the shapes differ: (batch, 1) against (batch,) would broadcast to (batch, batch) and train
        nonsense.
    """
    if predicted.ndim != 1 or predicted.shape != age.shape:
        raise ValueError(
            f"predicted ages {tuple(predicted.shape)}, true ages {tuple(age.shape)}: expected both (batch,)."
        )
    return nn.functional.huber_loss(predicted, age, reduction="none", delta=delta)


def distribution_loss(network: AgeRegressor, scores: Tensor, age: Tensor, label_sd: float) -> Tensor:
    """Kullback-Leibler divergence of each sample (batch,) from a normal curve around its age to the network's
    distribution.

    Parameters
    ----------
    network : AgeRegressor
        Of several outputs; says which ages they stand for.
    scores : Tensor (batch, outputs)
        Of its last layer.
    age : Tensor (batch,)
        Years; ages beyond the outputs count as the nearest.
    label_sd : float
        Standard deviation of the curve, years.
    """
    points = network.age_mean + network.age_sd * network.points()
    age = age.clamp(points[0], points[-1])
    wanted = (-((points - age[:, None]) / label_sd).square() / 2).log_softmax(dim=1)
    given = scores.float().log_softmax(dim=1)
    return nn.functional.kl_div(given, wanted, reduction="none", log_target=True).sum(dim=1)


def learning_rate_at(step: int, steps_per_epoch: int, settings: TrainingSettings) -> float:
    """Learning rate of a step: linear rise over the warm-up, then a cosine to a hundredth of the peak."""
    total = steps_per_epoch * settings.epochs
    rise = steps_per_epoch * min(settings.warmup_epochs, settings.epochs / 5)
    if step < rise:
        return settings.learning_rate * (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, total - rise)
    return settings.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def make_optimiser(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on convolutions and the head's weights, not on norms and biases."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in parameters if w.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in parameters if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


class WeightAverage:
    """Exponential moving average of a model's weights; `model` is the averaged network, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        The network in training.
    time_constant : float
        In steps; the average forgets older weights by 1/e over so many. 0 follows the weights exactly.
    """

    def __init__(self, model: nn.Module, time_constant: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = math.exp(-1 / time_constant) if time_constant > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step number `step` (from 0); early steps average over what there is."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Tensor], autocast) -> None:
    """Re-estimate BatchNorm statistics as plain means over batches (Wu & Johnson 2021, arXiv:2105.07576).

    On small data the running averages lag behind the weights by years of predicted age. Nothing to do for
    other norms.

    Parameters
    ----------
    model : nn.Module
        Changed in place, left in evaluation mode.
    batches : iterable of Tensor (batch, 1, D, H, W)
        Training volumes, as in prediction: without augmentation.
    autocast : callable
        Gives the context of mixed precision.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    model.train()
    for batch in batches:
        with autocast():
            model(batch)
    model.eval()
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value


@torch.no_grad()
def predict_ages(
    model: nn.Module, batches: Iterable[Tensor], autocast, *, flip_averaging: bool, shift_averaging: int = 0
) -> np.ndarray:
    """Ages in years (n,), float64, of batches (batch, 1, D, H, W) with axes RAS; evaluation mode.

    Each age is the mean over the volume's `views`.
    """
    model.eval()
    ages = []
    for batch in batches:
        with autocast():
            seen = views(batch, flip_averaging=flip_averaging, shift_averaging=shift_averaging)
            predicted = torch.stack([model(view).float() for view in seen]).mean(dim=0)
        ages.append(predicted.cpu().numpy().astype(np.float64))
    return np.concatenate(ages) if ages else np.empty(0)


class Stepper:
    """One optimisation step over a batch, in pieces that fit the device, on one process or several.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
    model, optimiser
        As prepared by the accelerator.
    settings : TrainingSettings
    micro_batch : int
        Volumes computed at once; 0 for the whole batch.
    """

    def __init__(self, accelerator, model, optimiser, settings: TrainingSettings, micro_batch: int):
        self.accelerator, self.model, self.optimiser = accelerator, model, optimiser
        self.network = accelerator.unwrap_model(model)
        self.settings, self.micro_batch = settings, micro_batch

    def step(self, volumes: Tensor, age: Tensor, batch_total: int, learning_rate: float) -> Tensor:
        """Do one step; returns (sum of losses, sum of absolute errors, gradient norm) of this process,
        float64.

        Parameters
        ----------
        volumes, age : Tensor (n, 1, D, H, W) and (n,)
            This process's part of the batch.
        batch_total : int
            Volumes of the batch over all processes: each sample weighs 1 / batch_total in the gradient.
        learning_rate : float
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        sums = self._gradient_that_fits(volumes, age, batch_total)
        norm = torch.zeros(())
        if self.settings.gradient_clip:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return torch.cat([sums, norm.detach().to(sums)[None]])

    def _gradient_that_fits(self, volumes: Tensor, age: Tensor, batch_total: int) -> Tensor:
        while True:
            try:
                return self._gradient(volumes, age, batch_total)
            except torch.OutOfMemoryError:
                self._halve(len(volumes))

    def _halve(self, batch: int) -> None:
        """Halve the piece that is computed at once; the step starts again and the batch stays what it was."""
        size = min(self.micro_batch or batch, batch)
        if size == 1 or self.accelerator.num_processes > 1:
            raise torch.OutOfMemoryError(
                f"{size} volume(s) at once do not fit the memory of {self.accelerator.device}. Set a smaller "
                "batch_size, or micro_batch where several processes train together, or a coarser spacing_mm."
            )
        self.micro_batch = (size + 1) // 2
        self.optimiser.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"{size} volumes at once do not fit the device: computing {self.micro_batch} at a time (which is "
            f"what BatchNorm sees) and adding gradients up. The batch of {batch} stays.",
            stacklevel=2,
        )

    def _gradient(self, volumes: Tensor, age: Tensor, batch_total: int) -> Tensor:
        """Add up gradients piece by piece; processes exchange them with the last piece only."""
        piece = self.micro_batch or len(volumes)
        # Accelerate averages gradients over processes; the loss is a mean over the whole batch.
        weight = self.accelerator.num_processes / batch_total
        sums = torch.zeros(2, dtype=torch.float64, device=volumes.device)
        for start in range(0, len(volumes), piece):
            part = slice(start, start + piece)
            last = start + piece >= len(volumes)
            with _exchanging(self.accelerator, self.model, last):
                predicted, losses = self._losses(volumes[part], age[part])
                self.accelerator.backward(losses.sum() * weight)
            error = (predicted.detach() - age[part]).abs()
            sums += torch.stack([losses.detach().double().sum(), error.double().sum()])
        return sums

    def _losses(self, volumes: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted ages (years) and what is minimised, both (batch,)."""
        scores = self.model(volumes, scores=True)
        predicted = self.network.ages(scores)
        if self.settings.loss == "distribution":
            return predicted, distribution_loss(self.network, scores, age, self.settings.label_sd)
        return predicted, huber_loss(predicted, age, self.settings.huber_delta)


def _exchanging(accelerator, model, last: bool):
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def piece_that_fits(model: nn.Module, size: int, share: int, accelerator) -> int:
    """How many volumes of edge `size` every process can compute at once, at most `share`; 0 means all.

    Several processes must know before they start: one that runs out of memory in a step leaves the others
    waiting.
    """
    trial, piece = copy.deepcopy(model), share
    while piece > 1 and not _fits(trial, size, piece, accelerator):
        piece = (piece + 1) // 2
    from accelerate.utils import gather_object

    piece = min(gather_object([piece]))
    return 0 if piece == share else piece


def _fits(model: nn.Module, size: int, piece: int, accelerator) -> bool:
    try:
        with accelerator.autocast():
            ages = model(torch.zeros(piece, 1, size, size, size, device=accelerator.device))
        ages.sum().backward()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    finally:
        model.zero_grad()
    return True
