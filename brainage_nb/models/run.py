"""All models of one training run, one after the other, and the tables they leave; `fit` trains each."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from brainage_nb.cohort.splits import check_splits, deal_everybody
from brainage_nb.evaluation.runs import digest_tables, find_altered
from brainage_nb.models.compute import check_disk, choose_device, choose_precision
from brainage_nb.models.fit import HISTORY, Trainer, VolumeDataset, common_grid, list_stores
from brainage_nb.models.network import (
    build_network,
    count_weights,
    list_training_people,
    refuse_training_people,
)
from brainage_nb.models.resume import StopRequests, read_identity
from brainage_nb.models.settings import (
    COLUMNS,
    Member,
    TrainingRefused,
    TrainingSettings,
    add_means,
    list_members,
    read_run_settings,
    read_run_table,
    refuse_difference,
    tabulate_predictions,
)
from brainage_nb.platforms import version_of
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

STOPPED = {"time": "max_minutes is used up", "interrupt": "interrupted", "terminate": "asked to terminate"}


class Job:
    """All models of a run; parameters as in `train`."""

    def __init__(
        self,
        store: VolumeStore | Sequence[VolumeStore],
        splits: pd.DataFrame,
        run_folder: Path,
        settings: TrainingSettings,
        network: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.stores, self.run_folder = list_stores(store), Path(run_folder)
        self.store = self.stores[0]
        self.network, self.loss = network, loss
        self.settings = replace(settings, loss="own") if loss is not None else settings
        self._check_own()
        self.scans = _select_scans(check_splits(splits), self.stores)
        if self.settings.final:
            self.scans = deal_everybody(self.scans, self.settings.folds)
        self.members = list_members(self.scans, self.settings)
        self.own = {"network": _name_of(network), "loss": _name_of(loss)}
        self.identity = self.settings.identity() | {
            "fingerprint": self.store.fingerprint,
            "scans_ages_splits": _digest(self.scans),
            "scan_files": _digest_files(self.scans, self.store),
            **{
                f"channel_{n}": f"{one.fingerprint} {_digest_files(self.scans, one)}"
                for n, one in enumerate(self.stores[1:], start=2)
            },
            **{f"own_{name}": value for name, value in self.own.items() if value},
        }
        self.notes: list[str] = []

    def _check_own(self) -> None:
        asked, found = self.settings.channel_names, tuple(one.settings.modality for one in self.stores)
        if asked != found:
            raise TrainingRefused(
                f"{'channels' if self.settings.channels else 'modality'} = {','.join(asked)!r}, and these "
                f"volumes are of {','.join(found)}: open them with current_store(..., modality=...)."
            )
        common_grid(self.stores)
        if self.settings.loss == "own" and self.loss is None:
            raise TrainingRefused("loss = 'own' stands for a function: give it as train(..., loss=...).")

    def check_start(self, *, fresh: bool) -> None:
        """Refuse weights to start from that are absent, would be deleted first, or know the answers."""
        if not self.settings.init_from:
            return
        hashes = dict(zip(self.store.index["scan_id"], self.store.index["source_sha256"], strict=True))
        refuse_training_people(self.settings.init_from, self.scans, hashes, folds=bool(self.settings.folds))
        if fresh and Path(self.settings.init_from).absolute().is_relative_to(self.run_folder.absolute()):
            raise TrainingRefused(
                f"init_from = {self.settings.init_from} lies in this run's own folder, which fresh = True "
                "deletes. Choose another name for this run."
            )

    def clear(self) -> None:
        """Delete what an earlier run left; the bundle too, since it would be another model's."""
        for name in ("settings.json", "history.csv", "predictions.csv"):
            (self.run_folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "bundle"):
            shutil.rmtree(self.run_folder / name, ignore_errors=True)

    def is_done(self) -> bool:
        """True for a finished run of the same settings; other settings raise `TrainingRefused`.

        What is damaged counts as not done, with a warning that names the file. Models that were thrown away
        once the run was complete are not missed.
        """
        before = read_run_settings(self.run_folder)
        if not before:
            return False
        if "identity" not in before:
            raise TrainingRefused(
                f"{self.run_folder} holds a run of another kind. Choose another run name, or set fresh=True."
            )
        refuse_difference(before["identity"], self.identity, self.run_folder)
        history = read_run_table(self.run_folder / "history.csv", HISTORY)
        predictions = read_run_table(self.run_folder / "predictions.csv", COLUMNS)
        rows = sum(len(member.predicted) for member in self.members)
        means = predictions["scan_id"].nunique() if len(self.members) > 1 else 0
        whole = len(history) > 0 and len(predictions) == rows + means
        unfinished = (self.run_folder / "checkpoints").exists() and self.unfinished()
        altered = find_altered(self.run_folder, before)
        if whole and altered:
            names = " and ".join(altered)
            warnings.warn(f"{self.run_folder}: {names} not as this run wrote it: made again.", stacklevel=2)
        return whole and not unfinished and not altered

    def run(self, stop: StopRequests, progress, *, fresh: bool = False, only: str = "") -> None:
        """Fit the models that are not finished, or the one named `only`; write the tables once all are."""
        accelerator = make_accelerator(self.settings)
        if fresh and accelerator.is_main_process:
            self.clear()
        accelerator.wait_for_everyone()
        volumes = self._prepare(accelerator)
        for number, member in enumerate(self.members):
            if only not in ("", member.name) or self._is_finished(member):
                continue
            trainer = self.make_trainer(volumes, member, accelerator, self._folder(member))
            trainer.resume()
            if trainer.step:
                self.notes.append(f"{member.name} went on from step {trainer.step}, where it was cut")
            progress.begin(trainer, number, len(self.members), self.history())
            complete = trainer.run(stop, progress.step, progress.epoch)
            progress.end()
            accelerator.free_memory()
            if not complete:
                self._note_stop(trainer, stop.reason)
                return
        if accelerator.is_main_process and not only:
            self.write_tables()
        accelerator.wait_for_everyone()

    def make_trainer(self, volumes: VolumeDataset, member: Member, accelerator, folder: Path) -> Trainer:
        """What fits one model of the run."""
        arguments = (volumes, self.scans, member, self.settings, accelerator, folder, self.identity)
        return Trainer(*arguments, network=self.network, loss=self.loss)

    def count_weights(self) -> int:
        """Weights of one model."""
        with torch.random.fork_rng():
            return count_weights(build_network(self.settings, self.scans["age"].to_numpy(), self.network))

    def _prepare(self, accelerator) -> VolumeDataset:
        """Check the disk, open the volumes, write settings.json."""
        n_parameters = self.count_weights()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        disk = check_disk(self.run_folder, n_parameters, len(self.members))
        facts = _describe_device(accelerator) | {"n_parameters": n_parameters}
        self.notes = [
            f"{facts['processes']} process(es) on {facts['device']}, {facts['precision']}",
            f"{len(self.scans)} volumes",
            disk,
        ]
        if accelerator.is_main_process:
            (self.run_folder / "predictions.csv").unlink(missing_ok=True)  # it would say that all is done
            self._write_settings(facts)
        return VolumeDataset(self.stores, self.scans, accelerator.device)

    def _note_stop(self, trainer: Trainer, reason: str) -> None:
        if trainer.accelerator.is_main_process:
            write_csv(self.history(trainer.history), self.run_folder / "history.csv")
        self.notes.append(
            f"Stopped in epoch {trainer.epoch + 1} of {self.settings.epochs} of {trainer.member.name}: "
            f"{STOPPED[reason]}; all is saved. Run again with the same settings to go on."
        )

    def _folder(self, member: Member) -> Path:
        return self.run_folder / "checkpoints" / member.name

    def unfinished(self) -> list[Member]:
        """The models that have no predictions yet."""
        return [member for member in self.members if not self._is_finished(member)]

    def _is_finished(self, member: Member) -> bool:
        """Whether all that a model leaves is there and whole; `TrainingRefused` for other settings' model."""
        folder = self._folder(member)
        predictions = read_run_table(folder / "predictions.csv", COLUMNS)
        if list(predictions["scan_id"]) != list(self.scans["scan_id"].iloc[member.predicted]):
            return False
        try:
            identity = read_identity(folder / "weights.safetensors")
        except ValueError as error:
            warnings.warn(f"{error}. The model {member.name} is trained again.", stacklevel=1)
            return False
        if identity is not None:  # models of earlier releases do not say
            refuse_difference(identity, self.identity | {"model": member.name}, folder)
        return len(read_run_table(folder / "history.csv", HISTORY)) > 0

    def history(self, unfinished: Sequence[dict] = ()) -> pd.DataFrame:
        """History of the finished models, and the epochs of one that is not."""
        tables = [read_csv(self._folder(m) / "history.csv") for m in self.members if self._is_finished(m)]
        tables += [pd.DataFrame(unfinished)] if unfinished else []
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=HISTORY)

    def _write_settings(self, facts: dict) -> None:
        content = {
            "variant": "single" if len(self.members) == 1 else "mean",
            "fingerprint": self.store.fingerprint,
            "preprocessing": self.store.settings.to_json(),
            "modality": " + ".join(self.settings.channel_names),
            "recipe": self.settings.recipe,
            "final": self.settings.final,
            "own": self.own,
            "seen_before": list_training_people(self.settings.init_from),
            "settings": self.settings.to_json(),
            "identity": self.identity,
            **facts,
            "versions": {
                name: version_of(name) for name in ("brainage-nb", "torch", "monai", "accelerate", "numpy")
            },
            "seconds_per_epoch": None,
        }
        write_json(content, self.run_folder / "settings.json")

    def write_tables(self) -> None:
        """settings.json, then history, then predictions, whose presence says that the run is complete."""
        history = self.history()
        write_csv(history, self.run_folder / "history.csv")
        best = history.loc[history.groupby(["fold", "seed"])["val_mae"].idxmin()]
        content = read_json(self.run_folder / "settings.json") | {
            "seconds_per_epoch": round(float(history["seconds"].median()), 3),
            "best_epochs": best[["fold", "seed", "epoch", "val_mae"]].to_dict("records"),
        }
        rows = [read_csv(self._folder(member) / "predictions.csv") for member in self.members]
        predictions = add_means(pd.concat(rows, ignore_index=True))
        content |= digest_tables(predictions=predictions, history=history)
        write_json(content, self.run_folder / "settings.json")
        write_csv(predictions, self.run_folder / "predictions.csv")


def write_predictions(
    splits: pd.DataFrame, predicted_age: Sequence[float], run_folder: str | Path, store: VolumeStore
) -> Path:
    """Leave the predictions of a loop of your own where notebook 06 finds and evaluates them.

    Parameters
    ----------
    splits : DataFrame
        `scan_id, subject_id, session_id, split, age` (years), one row per scan.
    predicted_age : (n,) array
        Years, in the order of `splits`.
    run_folder : path
        `runs/<run>` of the workspace; receives `predictions.csv` and `settings.json`.
    store : VolumeStore
        What was predicted from.

    Returns
    -------
    Path
        The run folder.
    """
    folder, everyone = Path(run_folder), np.arange(len(splits))
    member = Member(-1, 0, everyone, everyone, everyone)
    facts = {"variant": "single", "fingerprint": store.fingerprint, "own": {"network": "by hand", "loss": ""}}
    write_json(facts | {"settings": {}}, folder / "settings.json")
    write_csv(tabulate_predictions(splits, member, predicted_age), folder / "predictions.csv")
    return folder


def _select_scans(splits: pd.DataFrame, stores: Sequence[VolumeStore]) -> pd.DataFrame:
    """Rows with a volume in every store and an age, by scan_id, ids as text."""
    known = splits["scan_id"].isin(set.intersection(*(set(store.scan_ids) for store in stores)))
    if not known.all():
        names = ", ".join(splits.loc[~known, "scan_id"].astype(str).head(5))
        where = "the store" if len(stores) == 1 else f"one of the {len(stores)} stores"
        warnings.warn(
            f"{(~known).sum()} of {len(splits)} scans have no volume in {where} and are left out: {names}.",
            stacklevel=3,
        )
    scans = splits[known].sort_values("scan_id").reset_index(drop=True)
    if not scans["age"].notna().all():
        raise ValueError(
            f"{scans['age'].isna().sum()} scans have no age. Deal splits from cleaned scans only."
        )
    return scans.assign(
        session_id=scans["session_id"].fillna("") if "session_id" in scans else "",
        fold=scans.get("fold", -1),
    )


def _digest(scans: pd.DataFrame) -> str:
    columns = ["scan_id", "subject_id", "age", "split", "fold"]
    return hashlib.sha256(scans[columns].to_csv(index=False).encode()).hexdigest()[:16]


def _digest_files(scans: pd.DataFrame, store: VolumeStore) -> str:
    """Of the scan files that the volumes were made from: another file is another volume."""
    files = store.index.set_index("scan_id").loc[scans["scan_id"], "source_sha256"]
    return hashlib.sha256(files.to_csv(index=False).encode()).hexdigest()[:16]


def _name_of(own: object) -> str:
    """The name that a network or loss of the user's own is recorded by; empty for none."""
    if own is None:
        return ""
    named = getattr(own, "func", own)  # of a functools.partial
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"


def make_accelerator(settings: TrainingSettings):
    """The `accelerate.Accelerator` of a run: device, processes and precision, proved beforehand."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = choose_device(settings)
    precision = choose_precision(settings, device)
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(True)  # a notebook may have trained with another precision before
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision.replace("fp32", "no"))


def _describe_device(accelerator) -> dict[str, str | int]:
    """Device, processes and precision as settings.json says them."""
    cuda = accelerator.device.type == "cuda"
    name = (
        torch.cuda.get_device_name(accelerator.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    )
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return {"device": name, "processes": accelerator.num_processes, "precision": precision}
