"""One model from its first step to its predictions, resumable at any step. Which models there are is not
decided here.

Order, batches and augmentation are functions of (seed, epoch, scan), so a run that goes on from a checkpoint
does what the uninterrupted run would have done, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from brainage_nb.models.compute import full_float32
from brainage_nb.models.network import MOST_SCANS, build_network, fit_linear, load_pretrained
from brainage_nb.models.resume import Checkpoints, StopRequests, halve_weights, write_weights
from brainage_nb.models.settings import (
    Member,
    TrainingFailed,
    TrainingSettings,
    refuse_difference,
    tabulate_predictions,
)
from brainage_nb.volumes.augment import augment
from brainage_nb.workspace import write_csv

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

HUBER_DELTA = 1.0  # years: square within, linear beyond
WARMUP_EPOCHS = 5  # of linear rise before the cosine; at most a fifth of all epochs
GRADIENT_CLIP = 20.0  # largest norm
PRECISE_SCANS = 64  # enough for BatchNorm's means
AHEAD = 3  # batches read before they are asked for
HISTORY = [
    "fold", "seed", "epoch", "train_loss", "train_mae",
    "val_loss", "val_mae", "learning_rate", "gradient_norm", "seconds",
]  # fmt: skip


class VolumeDataset(torch.utils.data.Dataset):
    """Stored volumes with their ages, to be looped over by hand or by a `DataLoader`.

    Parameters
    ----------
    store : VolumeStore, or several
        Several give a channel each.
    scans : DataFrame
        `scan_id, age` (years); item k is row k.
    device : torch.device or str
        Where `batches` brings them.

    >>> volume, age = VolumeDataset(store, splits)[0]  # doctest: +SKIP
    >>> volume.shape, volume.dtype  # doctest: +SKIP
    (torch.Size([1, 96, 96, 96]), torch.float32)
    """

    def __init__(
        self,
        store: VolumeStore | Sequence[VolumeStore],
        scans: pd.DataFrame,
        device: torch.device | str = "cpu",
    ):
        stores = list_stores(store)
        self.size, self.spacing_mm, self._shards = *common_grid(stores), [one.shards for one in stores]
        self.device = torch.device(device)
        self._places = [np.stack(one.locate(list(scans["scan_id"])), axis=1) for one in stores]
        self._age = scans["age"].to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self._age)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.read([row])[0].float(), torch.tensor(self._age[row])

    def read(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Several volumes, float16 (n, channels, size, size, size), in memory, pinned for a GPU."""
        shape, pin = (len(rows), len(self._shards), *(self.size,) * 3), self.device.type == "cuda"
        batch = torch.empty(shape, dtype=torch.float16, pin_memory=pin)
        for channel, (shards, places) in enumerate(zip(self._shards, self._places, strict=True)):
            for target, (shard, place) in zip(batch.numpy(), places[rows], strict=True):
                target[channel] = shards[shard][place]
        return batch

    def batches(self, wanted: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Float32 batches (n, channels, size, size, size) on the device, one for each array of n positions.

        They are read ahead, while the device computes.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="volumes") as reader:
            waiting = deque(reader.submit(self.read, rows) for rows in wanted[:AHEAD])
            for following in [*wanted[AHEAD:], *[None] * len(waiting)]:
                batch = waiting.popleft().result()
                if following is not None:
                    waiting.append(reader.submit(self.read, following))
                yield batch.to(self.device, non_blocking=True).float()


def list_stores(store: VolumeStore | Sequence[VolumeStore]) -> list[VolumeStore]:
    """One store or several, as a list."""
    return list(store) if isinstance(store, list | tuple) else [store]


def common_grid(stores: Sequence[VolumeStore]) -> tuple[int, float]:
    """Size and spacing (mm) of all stores' volumes; ValueError where they differ."""
    grids = {(store.size, store.spacing_mm) for store in stores}
    if len(grids) > 1:
        raise ValueError(
            f"The channels' volumes differ in size and spacing_mm: {sorted(grids)}. Run notebook 03 for all "
            "of them with the same numbers."
        )
    return grids.pop()


def blank_channels(volumes: Tensor, share: float, streams: Sequence[Sequence[int]]) -> Tensor:
    """Set each channel of a batch (n, channels, size, size, size) to 0 with this chance, never all of one.

    `streams` holds a key for each sample: the same key draws the same channels.
    """
    for volume, key in zip(volumes, streams, strict=True):
        draw = np.random.default_rng([*key, len(volume)])
        blank = draw.random(len(volume)) < share
        blank[draw.integers(len(volume))] = False
        volume[torch.from_numpy(blank)] = 0
    return volumes


def huber_loss(predicted: Tensor, age: Tensor) -> Tensor:
    """Huber loss of each sample (batch,), years; square within `HUBER_DELTA` years, linear beyond.

    >>> huber_loss(torch.tensor([50.5, 53.0]), torch.tensor([50.0, 50.0]))
    tensor([0.1250, 2.5000])
    """
    return nn.functional.huber_loss(predicted, age, reduction="none", delta=HUBER_DELTA)


def make_optimiser(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on convolutions and the head's weights, not on norms and biases."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in parameters if w.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in parameters if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def make_schedule(
    optimiser: torch.optim.Optimizer, settings: TrainingSettings, steps_per_epoch: int
) -> LRScheduler:
    """The learning rate of each step: a linear rise, then a cosine to a hundredth of the peak."""
    steps = steps_per_epoch * settings.epochs
    rise = round(steps_per_epoch * min(WARMUP_EPOCHS, settings.epochs / 5))
    cosine = CosineAnnealingLR(optimiser, max(1, steps - rise), eta_min=settings.learning_rate / 100)
    if not rise:
        return cosine
    warm_up = LinearLR(optimiser, start_factor=1 / (rise + 1), total_iters=rise)
    return SequentialLR(optimiser, [warm_up, cosine], milestones=[rise])


def list_learning_rates(settings: TrainingSettings, steps_per_epoch: int) -> np.ndarray:
    """Learning rate of every step of a run, to be drawn.

    >>> rates = list_learning_rates(TrainingSettings(epochs=10), steps_per_epoch=4)
    >>> int(rates.argmax())  # two epochs of rise
    8
    """
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    schedule, rates = make_schedule(optimiser, settings, steps_per_epoch), []
    for _ in range(steps_per_epoch * settings.epochs):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return np.array(rates)


@torch.no_grad()
def predict_ages(
    model: nn.Module, batches: Iterable[Tensor], autocast, *, flip_averaging: bool
) -> np.ndarray:
    """Ages in years (n,), float64, of batches (batch, channels, D, H, W) with axes RAS; evaluation mode.

    With `flip_averaging` each age is the mean over the volume and its left-right mirror image.
    """
    model.eval()
    ages = []
    for batch in batches:
        with autocast():
            views = [model(view).float() for view in ([batch, batch.flip(2)] if flip_averaging else [batch])]
        ages.append(torch.stack(views).mean(dim=0).cpu().numpy().astype(np.float64))
    return np.concatenate(ages) if ages else np.empty(0)


class Trainer:
    """Training of one model.

    Parameters
    ----------
    volumes : VolumeDataset
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
    network, loss
        As in `train`.
    """

    # What a checkpoint holds beside the states of `_stateful` and of the random numbers.
    PROGRESS = ("epoch", "position", "step", "seconds", "history", "best", "sums")

    def __init__(
        self,
        volumes: VolumeDataset,
        scans: pd.DataFrame,
        member: Member,
        settings: TrainingSettings,
        accelerator,
        folder: Path,
        identity: dict[str, Any],
        *,
        network: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.volumes, self.scans, self.member, self.settings = volumes, scans, member, settings
        self.accelerator, self.folder, self.loss = accelerator, folder, loss or huber_loss
        self.identity = identity | {"model": member.name}
        self.years = scans["age"].to_numpy(float)
        self.age = torch.tensor(self.years, dtype=torch.float32, device=accelerator.device)
        self.steps_per_epoch = -(-len(member.train) // settings.batch_size)
        self.epoch = self.position = self.step = 0
        self.seconds, self.history = 0.0, []
        self.best: dict[str, Any] = {"val_mae": float("inf"), "epoch": -1, "weights": {}}
        self.sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self._build(network)
        self.checkpoints = Checkpoints(folder)
        self._saved = time.monotonic()

    def _build(self, network) -> None:
        settings, device = self.settings, self.accelerator.device
        torch.manual_seed(self.member.seed)
        model = build_network(settings, self.years[self.member.train], network)
        if settings.init_from:
            load_pretrained(model, settings.init_from)
        model.to(device)
        steps = settings.ema_epochs * self.steps_per_epoch
        decay = get_ema_multi_avg_fn(math.exp(-1 / steps) if steps else 0.0)
        self.average = AveragedModel(model, multi_avg_fn=decay).eval().requires_grad_(False)
        if self.accelerator.num_processes > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimiser = make_optimiser(model, settings)
        self.schedule = make_schedule(optimiser, settings, self.steps_per_epoch)
        self.network = model
        self.model, self.optimiser = self.accelerator.prepare(model, optimiser)

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self, stop: StopRequests, on_step: Callable, on_epoch: Callable) -> bool:
        """Train to the end, or to a reason to stop; True where the end was reached and everything is written.

        `on_step(trainer)` and `on_epoch(trainer)` are called after each.
        """
        while self.epoch < self.settings.epochs:
            if not self.train_epoch(stop, on_step):
                self.save()
                self.accelerator.wait_for_everyone()
                return False
            self._end_epoch()
            on_epoch(self)
        self._finish()
        return True

    def train_epoch(self, stop: StopRequests, on_step: Callable) -> bool:
        """The rest of this epoch; False where a reason to stop came first."""
        self.network.train()
        batches = self.draw_batches()[self.position :]
        shares = [
            batch[self.accelerator.process_index :: self.accelerator.num_processes] for batch in batches
        ]
        started = time.monotonic()
        for batch, share, volumes in zip(batches, shares, self.volumes.batches(shares), strict=True):
            self.train_step(volumes, share, len(batch))
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            on_step(self)
            if stop.asked(self.accelerator):
                return False
            if now - self._saved >= 60 * self.settings.checkpoint_minutes:
                self.save()
                started = time.monotonic()
        return True

    def draw_batches(self) -> list[np.ndarray]:
        """Row positions of each batch of this epoch; sizes differ by one at most, so no batch is tiny."""
        draw = np.random.default_rng([self.member.seed, self.epoch])
        batches = np.array_split(draw.permutation(self.member.train), self.steps_per_epoch)
        if len(batches[-1]) < self.accelerator.num_processes:
            raise ValueError(
                f"{self.accelerator.num_processes} processes cannot share batches of {len(batches[-1])}. Set "
                "a larger batch_size or fewer processes."
            )
        return batches

    def train_step(self, volumes: Tensor, rows: np.ndarray, batch_total: int) -> None:
        """One step of the optimiser.

        Parameters
        ----------
        volumes : Tensor (n, channels, size, size, size)
            This process's part of the batch, as stored.
        rows : (n,) array
            Their row positions.
        batch_total : int
            Volumes of the batch over all processes: each sample weighs 1 / batch_total in the gradient.
        """
        streams = [(self.member.seed, self.epoch, int(row)) for row in rows]
        if self.settings.augmentation is not None:
            volumes = augment(volumes, self.settings.augmentation, self.volumes.spacing_mm, streams)
        if self.settings.channels:
            volumes = blank_channels(volumes, self.settings.channel_dropout, streams)
        try:
            self.sums[:2] += self.compute_gradients(volumes, self.age[torch.as_tensor(rows)], batch_total)
        except torch.OutOfMemoryError as error:
            raise TrainingFailed(
                f"{len(volumes)} volume(s) at once do not fit the memory of {self.accelerator.device}. Set a "
                "smaller batch_size or narrower widths, or preprocess to a coarser spacing_mm."
            ) from error
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        if self.accelerator.scaler is not None:  # fp16 skips a step whose gradient overflows
            norm = norm.nan_to_num(nan=0.0, posinf=0.0)
        self.sums[2] += norm
        self.optimiser.step()
        self.optimiser.zero_grad()
        if not self.optimiser.step_was_skipped:
            self.schedule.step()
        self.average.update_parameters(self.network)
        self.step, self.position = self.step + 1, self.position + 1

    def time_step(self, n: int = 3) -> float:
        """Seconds of a step: the fastest of `n` after the first, on an epoch's first batch.

        The weights are changed by it: for a trainer that is thrown away.
        """
        self.network.train()
        batch, seconds = self.draw_batches()[0], []
        for _ in range(n):
            started = time.monotonic()
            (volumes,) = self.volumes.batches([batch])
            self.train_step(volumes, batch, len(batch))
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - started)
        return min(seconds[1:])

    def compute_gradients(self, volumes: Tensor, age: Tensor, batch_total: int) -> Tensor:
        """Add up gradients; gives (sum of losses, sum of absolute errors), float64."""
        predicted, losses = self._compute_losses(volumes, age)
        # Accelerate averages gradients over processes; the loss is a mean over the whole batch.
        self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / batch_total))
        error = (predicted.detach() - age).abs()
        return torch.stack([losses.detach().double().sum(), error.double().sum()])

    def _compute_losses(self, volumes: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted ages (years) and what is minimised, both (batch,)."""
        predicted = self.model(volumes)
        losses = self.loss(predicted, age)
        if losses.shape != age.shape:
            raise ValueError(
                f"The loss gives {tuple(losses.shape)} for {len(age)} ages: expected one number per scan, "
                f"({len(age)},); leave the mean over the batch to the loop."
            )
        return predicted, losses

    def _end_epoch(self) -> None:
        """Evaluate the averaged weights, note the epoch, keep the weights where they are the best so far."""
        started = time.monotonic()
        loss, mae = (self.accelerator.reduce(self.sums[:2], "sum") / len(self.member.train)).tolist()
        val_loss, val_mae = self._validate()
        if not np.isfinite(loss + val_mae):
            raise TrainingFailed(
                f"{self.member.name}: the loss is {loss} in epoch {self.epoch + 1}. Lower learning_rate "
                f"({self.settings.learning_rate:g}) and run with fresh=True."
            )
        numbers = (self.member.fold, self.member.seed, self.epoch, loss, mae, val_loss, val_mae)
        rate, norm = self.schedule.get_last_lr()[0], self.sums[2].item() / self.steps_per_epoch
        seconds = round(self.seconds + time.monotonic() - started, 3)
        self.history.append(dict(zip(HISTORY, (*numbers, rate, norm, seconds), strict=True)))
        if val_mae < self.best["val_mae"] or self.settings.keep == "last":
            weights = halve_weights(self.average.module)
            self.best = {"val_mae": val_mae, "epoch": self.epoch, "weights": weights}
        self.epoch, self.position, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    # --- evaluation --------------------------------------------------------------------------------------

    def _validate(self) -> tuple[float, float]:
        """Loss and MAE in years of the averaged weights on the validation scans."""
        with self.accelerator.autocast():  # statistics of the averaged weights, which never trained
            update_bn(self.volumes.batches(self.draw_precise_batches()), self.average)
        rows = self.member.validation
        predicted = torch.from_numpy(self._predict(rows, self.accelerator.autocast, flip_averaging=False))
        age = torch.from_numpy(self.years[rows])
        return self.loss(predicted, age).mean().item(), (predicted - age).abs().mean().item()

    def draw_precise_batches(self) -> list[np.ndarray]:
        """Training scans spread over the ages, for BatchNorm's means (Wu & Johnson 2021, arXiv:2105.07576).

        On small data the running averages lag behind the weights by years of predicted age.
        """
        rows = self.member.train[np.argsort(self.years[self.member.train], kind="stable")]
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PRECISE_SCANS)).round().astype(int)]
        return self._split(np.random.default_rng(0).permutation(rows))  # so that each batch spans the ages

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, -(-len(rows) // self.settings.batch_size))

    def _predict(self, rows: np.ndarray, autocast: Callable, *, flip_averaging: bool) -> np.ndarray:
        """Ages in years of the scans at `rows`, every process doing its share and receiving all."""
        size = self.settings.batch_size
        share = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = self.volumes.batches([share[start : start + size] for start in range(0, len(share), size)])
        ages = predict_ages(self.average.module, batches, autocast, flip_averaging=flip_averaging)
        if self.accelerator.num_processes == 1:
            return ages
        from accelerate.utils import gather_object

        found = dict(gather_object(list(zip(share.tolist(), ages.tolist(), strict=True))))
        return np.array([found[row] for row in rows.tolist()])

    def _finish(self) -> None:
        """Predict with the best epoch's weights as stored, write everything, drop the checkpoints."""
        model, weights = self.average.module, self.best["weights"]
        _load(model, weights)
        if self.settings.linear:
            model.linear = self._fit_linear().to(self.accelerator.device)
            weights = halve_weights(model)
            _load(model, weights)
        with full_float32():  # as a saved model predicts
            flip = self.settings.flip_averaging
            predicted = self._predict(self.member.predicted, contextlib.nullcontext, flip_averaging=flip)
        if self.accelerator.is_main_process:
            write_weights(weights, self.folder / "weights.safetensors", self.identity)
            write_csv(pd.DataFrame(self.history, columns=HISTORY), self.folder / "history.csv")
            rows = tabulate_predictions(self.scans, self.member, predicted)
            write_csv(rows, self.folder / "predictions.csv")
            self.checkpoints.delete()
        self.accelerator.wait_for_everyone()

    def _fit_linear(self) -> nn.Module:
        """The regression beside the network, from the same training scans as they are stored."""
        rows = np.sort(np.random.default_rng(self.member.seed).permutation(self.member.train)[:MOST_SCANS])
        subjects = self.scans["subject_id"].to_numpy()[rows]
        batches = self.volumes.batches(self._split(rows))
        return fit_linear(batches, self.years[rows], subjects, self.volumes.spacing_mm)

    # --- checkpoints -------------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        parts = {"network": self.network, "average": self.average, "optimiser": self.optimiser}
        scaler = self.accelerator.scaler
        return parts | {"schedule": self.schedule} | ({"scaler": scaler} if scaler is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes after this very step: plain tensors, numbers and text."""
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        state |= {name: getattr(self, name) for name in self.PROGRESS}
        cuda = self.accelerator.device.type == "cuda"
        random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
        return state | {"identity": json.dumps(self.identity), "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` left off; `TrainingRefused` where that was another run."""
        refuse_difference(json.loads(state["identity"]), self.identity, self.folder)
        for name, part in self._stateful().items():
            if name in state:
                part.load_state_dict(state[name])
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        self.sums = self.sums.to(self.accelerator.device)
        torch.set_rng_state(state["random"][0])
        if self.accelerator.device.type == "cuda" and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1])

    def save(self) -> None:
        """Write a checkpoint of this very step."""
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.state_dict(), self.step)
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if any."""
        if (state := self.checkpoints.load()) is not None:
            self.load_state_dict(state)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
