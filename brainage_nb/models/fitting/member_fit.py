"""One model from its first step to its predictions, resumable at any step. Which models there are is not
decided here.

Order, batches and augmentation are functions of (seed, epoch, scan), so a run that goes on from a checkpoint
does what the uninterrupted run would have done, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brainage_nb.models.checkpoints import Checkpoints, halved, write_weights
from brainage_nb.models.devices import full_float32
from brainage_nb.models.fitting.batches import ResidentVolumes, StreamedVolumes
from brainage_nb.models.fitting.linear import MOST_SCANS, fit_linear
from brainage_nb.models.fitting.optimisation import (
    Stepper,
    WeightAverage,
    huber_loss,
    learning_rate_at,
    make_optimiser,
    piece_that_fits,
    precise_statistics,
    predict_ages,
)
from brainage_nb.models.fitting.shared_batchnorm import share_batchnorm
from brainage_nb.models.fitting.starting import load_pretrained
from brainage_nb.models.fitting.state import restore, state_of
from brainage_nb.models.fitting.stopping import StopRequests
from brainage_nb.models.fitting.sweeps import Member, member_rows
from brainage_nb.models.resnet import AgeRegressor, VoxelRegression, outputs_of, resnet18_regressor
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.views import averaging_of
from brainage_nb.volumes.augment import augment
from brainage_nb.workspace import write_csv

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
