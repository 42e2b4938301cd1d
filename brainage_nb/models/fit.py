"""Volumes for training: on the device where they fit, else streamed from the mapped store; the same values.

Knows the store's shards and the device; knows no ages and no model.

BatchNorm whose statistics span all processes of a batch: several processes train what one would.

What one optimisation step is made of: loss, learning rate, gradient in pieces, weight average, evaluation.

Knows models and batches; knows no files, folds or epochs' bookkeeping.

What a checkpoint of a model in training holds, and how training goes on from it, bit for bit on a CPU.

One model from its first step to its predictions, resumable at any step. Which models there are is not
decided here.

Order, batches and augmentation are functions of (seed, epoch, scan), so a run that goes on from a checkpoint
does what the uninterrupted run would have done, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainage_nb.models.compute import full_float32
from brainage_nb.models.network import (
    MOST_SCANS,
    AgeRegressor,
    VoxelRegression,
    fit_linear,
    load_pretrained,
    outputs_of,
    resnet18_regressor,
    views,
)
from brainage_nb.models.resume import Checkpoints, StopRequests, halved, write_weights
from brainage_nb.models.settings import Member, TrainingSettings, averaging_of, member_rows, refuse_difference
from brainage_nb.volumes.augment import augment
from brainage_nb.workspace import write_csv

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

AHEAD = 2


class ResidentVolumes:
    """All volumes of a list of scans, float16, on the device.

    Parameters
    ----------
    store : VolumeStore
    scan_ids : sequence of str
        Positions in this list are what `batches` takes.
    device : torch.device
    """

    def __init__(self, store: VolumeStore, scan_ids: Sequence[str], device: torch.device):
        self.where = "resident"
        self.size, self.spacing_mm, self.device = store.size, store.spacing_mm, device
        shape = (len(scan_ids), *(self.size,) * 3)
        self._volumes = torch.empty(shape, dtype=torch.float16, device=device)
        for row, (shard, place) in enumerate(zip(*store.locate(scan_ids), strict=True)):
            self._volumes[row] = torch.from_numpy(np.array(store.shards[shard][place])).to(device)

    def batches(self, wanted: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Float32 batches (n, 1, size, size, size), one for each array of n positions."""
        for rows in wanted:
            yield self._volumes[torch.as_tensor(rows, device=self.device)][:, None].float()


class StreamedVolumes:
    """Volumes of a list of scans, read from the mapped shards by a second thread, a little ahead.

    Parameters are those of `ResidentVolumes`.
    """

    def __init__(self, store: VolumeStore, scan_ids: Sequence[str], device: torch.device):
        self.where = "streamed"
        self.size, self.spacing_mm, self.device = store.size, store.spacing_mm, device
        self._shards = store.shards
        self._shard, self._row = (np.asarray(places) for places in store.locate(scan_ids))

    def batches(self, wanted: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Float32 batches (n, 1, size, size, size), one for each array of n positions."""
        with ThreadPoolExecutor(1, thread_name_prefix="volumes") as reader:
            waiting: deque = deque()
            try:
                for rows in wanted:
                    waiting.append(reader.submit(self._read, np.asarray(rows)))
                    if len(waiting) > AHEAD:
                        yield self._sent(waiting.popleft().result())
                while waiting:
                    yield self._sent(waiting.popleft().result())
            finally:
                for pending in waiting:
                    pending.cancel()

    def _read(self, rows: np.ndarray) -> Tensor:
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(rows), 1, *(self.size,) * 3), dtype=torch.float16, pin_memory=pinned)
        for target, row in zip(batch.numpy(), rows, strict=True):
            target[0] = self._shards[self._shard[row]][self._row[row]]
        return batch

    def _sent(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True).float()


def open_volumes(
    store: VolumeStore, scan_ids: Sequence[str], device: torch.device, share: float
) -> ResidentVolumes | StreamedVolumes:
    """Volumes on the device where they take at most `share` of its free memory, streamed otherwise.

    Parameters
    ----------
    store : VolumeStore
    scan_ids : sequence of str
        Scans that will be asked for, by position.
    device : torch.device
    share : float
        Share of the device's free memory, 0 to 1; 0 always streams.
    """
    needed = len(scan_ids) * store.size**3 * 2
    kind = ResidentVolumes if needed <= share * free_memory(device) else StreamedVolumes
    return kind(store, scan_ids, device)


def free_memory(device: torch.device) -> int:
    """Free memory of the device in bytes (of the system for the CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


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


def state_of(fit: MemberFit) -> dict[str, Any]:
    """All that decides what comes after this very step: plain tensors, numbers and text."""
    scaler = fit.accelerator.scaler
    cuda = fit.accelerator.device.type == "cuda"
    return {
        "identity": json.dumps(fit.identity),
        "model": fit.network.state_dict(),
        "average": fit.average.model.state_dict(),
        "optimiser": fit.optimiser.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "epoch": fit.epoch,
        "position": fit.position,
        "step": fit.step,
        "seconds": fit.seconds,
        "history": fit.history,
        "best": fit.best,
        "sums": fit.sums,
        "micro_batch": fit.stepper.micro_batch,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def restore(fit: MemberFit, state: dict[str, Any]) -> None:
    """Put a training where `state_of` found one; `SettingsDiffer` where it is another run's."""
    refuse_difference(json.loads(state["identity"]), fit.identity, fit.folder)
    fit.network.load_state_dict(state["model"])
    fit.average.model.load_state_dict(state["average"])
    fit.optimiser.load_state_dict(state["optimiser"])
    if fit.accelerator.scaler is not None and state["scaler"]:
        fit.accelerator.scaler.load_state_dict(state["scaler"])
    fit.epoch, fit.position, fit.step = state["epoch"], state["position"], state["step"]
    fit.seconds, fit.history, fit.best = state["seconds"], state["history"], state["best"]
    fit.sums.copy_(state["sums"])
    fit.stepper.micro_batch = state["micro_batch"]
    torch.set_rng_state(state["random"])
    if fit.accelerator.device.type == "cuda" and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"])


PRECISE_SCANS = 64  # enough for BatchNorm's means
HISTORY = (
    "fold",
    "seed",
    "epoch",
    "train_loss",
    "train_mae",
    "val_loss",
    "val_mae",
    "learning_rate",
    "gradient_norm",
    "seconds",
)


class Diverged(RuntimeError):
    """The loss is no longer a number; the message says what to set."""


def build_network(settings: TrainingSettings, age: np.ndarray) -> AgeRegressor:
    """The network of these settings, started at the mean and spread of the training ages (years)."""
    return resnet18_regressor(
        widths=settings.widths,
        blocks=settings.blocks,
        norm=settings.norm,
        shortcut=settings.shortcut,
        dropout=settings.dropout,
        outputs=outputs_of(settings.loss),
        age_mean=float(np.mean(age)),
        age_sd=max(1.0, float(np.std(age))),
    )


def _load(model: AgeRegressor, weights: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})


class MemberFit:
    """Training of one model.

    Parameters
    ----------
    volumes : ResidentVolumes or StreamedVolumes
        By row position in `scans`.
    scans : DataFrame
        `scan_id, subject_id, session_id, split, age`.
    member : Member
    settings : TrainingSettings
    accelerator : accelerate.Accelerator
    folder : Path
        Receives checkpoints, then `weights.safetensors`, `history.csv` and, last of all, `predictions.csv`.
    identity : dict
        What decides the result; a checkpoint with another identity is refused.
    """

    def __init__(
        self,
        volumes: ResidentVolumes | StreamedVolumes,
        scans: pd.DataFrame,
        member: Member,
        settings: TrainingSettings,
        accelerator,
        folder: Path,
        identity: dict[str, Any],
    ):
        self.volumes, self.scans, self.member = volumes, scans, member
        self.settings, self.accelerator, self.folder = settings, accelerator, folder
        self.identity = identity | {"model": member.name}
        self.age = torch.tensor(scans["age"].to_numpy(np.float32), device=accelerator.device)
        self.steps_per_epoch = -(-len(member.train) // settings.batch_size)
        self.epoch = self.position = self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"val_mae": float("inf"), "epoch": -1, "weights": {}}
        self._build()
        self.checkpoints = self._open_checkpoints() if accelerator.is_main_process else None
        self._saved = time.monotonic()

    def _build(self) -> None:
        settings, device = self.settings, self.accelerator.device
        torch.manual_seed(self.member.seed)
        model = build_network(settings, self.scans["age"].to_numpy()[self.member.train])
        if settings.init_from:
            load_pretrained(model, settings.init_from)
        model.to(device)
        self.average = WeightAverage(model, settings.ema_epochs * self.steps_per_epoch)
        piece = settings.micro_batch
        if self.accelerator.num_processes > 1:
            share = -(-settings.batch_size // self.accelerator.num_processes)
            piece = piece or piece_that_fits(model, self.volumes.size, share, self.accelerator)
            model = share_batchnorm(model, device)
        self.network = model
        prepared, self.optimiser = self.accelerator.prepare(model, make_optimiser(model, settings))
        self.stepper = Stepper(self.accelerator, prepared, self.optimiser, settings, piece)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def _open_checkpoints(self) -> Checkpoints:
        if not self.settings.scratch:
            return Checkpoints(self.folder)
        run = self.folder.parent.parent.name
        return Checkpoints(Path(self.settings.scratch) / run / self.folder.name, mirror=self.folder)

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self, stop: StopRequests, on_step: Callable, on_epoch: Callable) -> bool:
        """Train to the end, or to a reason to stop; True where the end was reached and everything is written.

        `on_step(fit)` and `on_epoch(fit)` are called after each.
        """
        self.resume()
        while not self.finished:
            if not self._train_epoch(stop, on_step):
                self.save()
                self._wait()
                return False
            self._end_epoch()
            on_epoch(self)
        self._finish()
        return True

    @property
    def finished(self) -> bool:
        """All epochs done, or none better for `patience` of them."""
        patience = self.settings.patience
        waited = self.epoch - 1 - self.best["epoch"]
        return self.epoch >= self.settings.epochs or bool(patience and self.epoch and waited >= patience)

    def _train_epoch(self, stop: StopRequests, on_step: Callable) -> bool:
        """The rest of this epoch; False where a reason to stop came first."""
        self.network.train()
        batches = self._batches_of_epoch()[self.position :]
        shares = [
            batch[self.accelerator.process_index :: self.accelerator.num_processes] for batch in batches
        ]
        started = time.monotonic()
        for batch, share, volumes in zip(batches, shares, self.volumes.batches(shares), strict=True):
            self._step(batch, share, volumes)
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            on_step(self)
            if stop.asked(self.accelerator):
                return False
            if now - self._saved >= 60 * self.settings.checkpoint_minutes:
                self.save()
                started = time.monotonic()
        return True

    def _batches_of_epoch(self) -> list[np.ndarray]:
        """Row positions of each batch; sizes differ by one at most, so no batch is tiny."""
        draw = np.random.default_rng([self.member.seed, self.epoch])
        batches = np.array_split(draw.permutation(self.member.train), self.steps_per_epoch)
        if len(batches[-1]) < self.accelerator.num_processes:
            raise ValueError(
                f"{self.accelerator.num_processes} processes cannot share batches of {len(batches[-1])}. Set "
                " a larger batch_size or fewer processes."
            )
        return batches

    def _step(self, batch: np.ndarray, share: np.ndarray, volumes: torch.Tensor) -> None:
        settings = self.settings
        if settings.augmentation is not None:
            streams = [(self.member.seed, self.epoch, int(row)) for row in share]
            volumes = augment(volumes, settings.augmentation, self.volumes.spacing_mm, streams)
        rate = learning_rate_at(self.step, self.steps_per_epoch, settings)
        age = self.age[torch.as_tensor(share, device=self.age.device)]
        self.sums += self.stepper.step(volumes, age, len(batch), rate)
        self.average.update(self.network, self.step)
        self.step += 1
        self.position += 1

    def _end_epoch(self) -> None:
        """Evaluate the averaged weights, note the epoch, keep the weights where they are the best so far."""
        started = time.monotonic()
        loss, mae = (self.accelerator.reduce(self.sums[:2], "sum") / len(self.member.train)).tolist()
        val_loss, val_mae = self._validation()
        if not np.isfinite(loss + val_mae):
            raise Diverged(
                f"{self.member.name}: the loss is {loss} in epoch {self.epoch + 1}. Lower learning_rate "
                f"({self.settings.learning_rate:g}) and run with fresh=True."
            )
        row = {
            "fold": self.member.fold,
            "seed": self.member.seed,
            "epoch": self.epoch,
            "train_loss": loss,
            "train_mae": mae,
            "val_loss": val_loss,
            "val_mae": val_mae,
            "learning_rate": learning_rate_at(self.step - 1, self.steps_per_epoch, self.settings),
            "gradient_norm": self.sums[2].item() / self.steps_per_epoch,
            "seconds": round(self.seconds + time.monotonic() - started, 3),
        }
        self.history.append(row)
        if val_mae < self.best["val_mae"] or self.settings.keep == "last":
            self.best = {"val_mae": val_mae, "epoch": self.epoch, "weights": halved(self.average.model)}
        self.epoch, self.position, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    # --- evaluation --------------------------------------------------------------------------------------

    def _validation(self) -> tuple[float, float]:
        """Loss and MAE in years of the averaged weights on the validation scans."""
        rows = self.member.validation
        precise_statistics(self.average.model, self._precise_batches(), self.accelerator.autocast)
        predicted = self._predict(rows, self.accelerator.autocast, flip_averaging=False)
        predicted, age = torch.from_numpy(predicted), torch.tensor(self.scans["age"].to_numpy(float)[rows])
        losses = huber_loss(predicted, age, self.settings.huber_delta)
        return losses.mean().item(), (predicted - age).abs().mean().item()

    def _precise_batches(self):
        """Training volumes spread over the ages, as they are predicted: without augmentation."""
        rows = self.member.train[np.argsort(self.scans["age"].to_numpy()[self.member.train], kind="stable")]
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PRECISE_SCANS)).round().astype(int)]
        rows = np.random.default_rng(0).permutation(rows)  # so that each batch spans the ages
        return self.volumes.batches(np.array_split(rows, -(-len(rows) // self.settings.batch_size)))

    def _predict(self, rows: np.ndarray, autocast: Callable, **averaging: int) -> np.ndarray:
        """Ages in years of the scans at `rows`, every process doing its share and receiving all."""
        size = self.stepper.micro_batch or self.settings.batch_size
        share = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = self.volumes.batches([share[start : start + size] for start in range(0, len(share), size)])
        ages = predict_ages(self.average.model, batches, autocast, **averaging)
        if self.accelerator.num_processes == 1:
            return ages
        from accelerate.utils import gather_object

        found = dict(gather_object(list(zip(share.tolist(), ages.tolist(), strict=True))))
        return np.array([found[row] for row in rows.tolist()])

    def _finish(self) -> None:
        """Predict with the best epoch's weights as stored, write everything, drop the checkpoints."""
        weights = self.best["weights"]
        _load(self.average.model, weights)
        if self.settings.linear:
            self.average.model.linear = self._linear().to(self.accelerator.device)
            weights = halved(self.average.model)
            _load(self.average.model, weights)
        averaging = averaging_of(vars(self.settings))
        with full_float32():  # as a saved model predicts
            predicted = self._predict(self.member.predicted, contextlib.nullcontext, **averaging)
        if self.accelerator.is_main_process:
            write_weights(weights, self.folder / "weights.safetensors")
            write_csv(pd.DataFrame(self.history, columns=list(HISTORY)), self.folder / "history.csv")
            rows = member_rows(self.scans, self.member, predicted)
            write_csv(rows, self.folder / "predictions.csv")
            self.checkpoints.delete()
        self.accelerator.wait_for_everyone()

    def _linear(self) -> VoxelRegression:
        """The regression beside the network, from the same training scans as they are stored."""
        rows = np.sort(np.random.default_rng(self.member.seed).permutation(self.member.train)[:MOST_SCANS])
        batches = self.volumes.batches(np.array_split(rows, -(-len(rows) // self.settings.batch_size)))
        scans = self.scans.iloc[rows]
        age, subjects = scans["age"].to_numpy(float), scans["subject_id"].to_numpy()
        return fit_linear(batches, age, subjects, self.volumes.spacing_mm)

    # --- checkpoints -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this very step."""
        if self.accelerator.is_main_process:
            self.checkpoints.save(state_of(self), self.step)
        self._saved = time.monotonic()

    def _wait(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.wait()
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if any; `SettingsDiffer` where it is another run's."""
        state = self.checkpoints.load() if self.checkpoints else None
        if self.accelerator.num_processes > 1:  # the first process alone sees its scratch folder
            from accelerate.utils import broadcast_object_list

            state = broadcast_object_list([state])[0]
        if state is None:
            return
        restore(self, state)
