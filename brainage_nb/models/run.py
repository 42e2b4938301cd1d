"""All models of one training run, one after the other, and the tables they leave; `member_fit` fits each."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from brainage_nb.models.compute import check_disk, choose_device, choose_precision
from brainage_nb.models.fit import HISTORY, MemberFit, build_network, open_volumes
from brainage_nb.models.network import StartRefused, refuse_seen, seen_by
from brainage_nb.models.resume import StopRequests
from brainage_nb.models.settings import (
    Member,
    SettingsDiffer,
    TrainingSettings,
    members_of,
    refuse_difference,
    with_means,
)
from brainage_nb.platforms import version_of
from brainage_nb.workspace import read_csv, read_json, write_csv, write_json

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore


class Job:
    """All models of a run, one after the other; parameters as in `train`."""

    def __init__(
        self, store: VolumeStore, splits: pd.DataFrame, run_folder: Path, settings: TrainingSettings
    ):
        self.store, self.run_folder, self.settings = store, Path(run_folder), settings
        self.scans = _scans_in_store(splits, store)
        self.members = members_of(self.scans, settings)
        self.identity = settings.identity() | {
            "fingerprint": store.fingerprint,
            "scans_ages_splits": _digest(self.scans),
        }
        self.notes: list[str] = []

    def check_start(self, *, fresh: bool) -> None:
        """Refuse weights to start from that are absent, would be deleted first, or know the answers."""
        if not self.settings.init_from:
            return
        hashes = dict(zip(self.store.index["scan_id"], self.store.index["source_sha256"], strict=True))
        refuse_seen(self.settings.init_from, self.scans, hashes, folds=bool(self.settings.folds))
        if fresh and Path(self.settings.init_from).absolute().is_relative_to(self.run_folder.absolute()):
            raise StartRefused(
                f"init_from = {self.settings.init_from} lies in this run's own folder, which fresh = True "
                "deletes. Choose another name for this run."
            )

    def clear(self) -> None:
        """Delete what an earlier run left; the bundle too, since it would be another model's."""
        for name in ("settings.json", "history.csv", "predictions.csv"):
            (self.run_folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "bundle"):
            shutil.rmtree(self.run_folder / name, ignore_errors=True)
        if self.settings.scratch:
            shutil.rmtree(Path(self.settings.scratch) / self.run_folder.name, ignore_errors=True)

    def is_done(self) -> bool:
        """True for a finished run of the same settings; other settings raise `SettingsDiffer`."""
        path = self.run_folder / "settings.json"
        if not path.exists():
            return False
        before = read_json(path)
        if "identity" not in before:
            raise SettingsDiffer(
                f"{self.run_folder} holds a run of another kind. Choose another run name, or set fresh=True."
            )
        refuse_difference(before["identity"], self.identity, self.run_folder)
        return (self.run_folder / "predictions.csv").exists()

    def run(self, stop: StopRequests, progress, *, fresh: bool = False, only: str = "") -> None:
        """Fit the members that are not finished, or the one named `only`; write the tables once all are."""
        accelerator, note = accelerator_for(self.settings)
        if fresh and accelerator.is_main_process:
            self.clear()
        accelerator.wait_for_everyone()
        volumes = self._prepare(accelerator)
        self.notes = [note, *self.notes]
        for number, member in enumerate(self.members):
            if self._has(member) or only not in ("", member.name):
                continue
            folder = self._folder(member)
            folder.mkdir(parents=True, exist_ok=True)
            fit = MemberFit(volumes, self.scans, member, self.settings, accelerator, folder, self.identity)
            progress.begin(member.name, number, len(self.members), self.history())
            complete = fit.run(stop, progress.step, progress.epoch)
            progress.end()
            accelerator.free_memory()
            if not complete:
                self._stopped(fit, stop.reason)
                return
        if accelerator.is_main_process and not only:
            self.write_tables()
        accelerator.wait_for_everyone()

    def _prepare(self, accelerator):
        """Check the disk, open the volumes, write settings.json; returns the volumes."""
        with torch.device("meta"):
            network = build_network(self.settings, self.scans["age"].to_numpy())
        n_parameters = sum(weight.numel() for weight in network.parameters())
        self.run_folder.mkdir(parents=True, exist_ok=True)
        disk = check_disk(self.run_folder, n_parameters, len(self.members))
        scan_ids = list(self.scans["scan_id"])
        volumes = open_volumes(self.store, scan_ids, accelerator.device, self.settings.resident_share)
        self.notes = [f"{len(scan_ids)} volumes {volumes.where}", disk]
        if accelerator.is_main_process:
            self._write_settings(accelerator, n_parameters, volumes.where)
        return volumes

    def _stopped(self, fit: MemberFit, reason: str) -> None:
        if fit.accelerator.is_main_process:
            write_csv(self.history(fit), self.run_folder / "history.csv")
        why = {
            "time": "max_minutes is used up",
            "interrupt": "interrupted",
            "terminate": "asked to terminate",
        }
        self.notes.append(
            f"Stopped in epoch {fit.epoch + 1} of {fit.settings.epochs} of {fit.member.name}: {why[reason]}; "
            "all is saved. Run again with the same settings to go on."
        )

    def _folder(self, member: Member) -> Path:
        return self.run_folder / "checkpoints" / member.name

    def unfinished(self) -> list[Member]:
        """The members that have no predictions yet."""
        return [member for member in self.members if not self._has(member)]

    def _has(self, member: Member) -> bool:
        return (self._folder(member) / "predictions.csv").exists()

    def history(self, unfinished: MemberFit | None = None) -> pd.DataFrame:
        """History of the finished members, and of one that is not."""
        done = [read_csv(self._folder(m) / "history.csv") for m in self.members if self._has(m)]
        if unfinished is not None and unfinished.history:
            done.append(pd.DataFrame(unfinished.history))
        return pd.concat(done, ignore_index=True) if done else pd.DataFrame(columns=list(HISTORY))

    def _write_settings(self, accelerator, n_parameters: int, where: str) -> None:
        content = {
            "variant": "single" if len(self.members) == 1 else "mean",
            "fingerprint": self.store.fingerprint,
            "preprocessing": self.store.settings.to_json(),
            "recipe": self.settings.recipe,
            "seen_before": seen_by(self.settings.init_from),
            "settings": self.settings.to_json(),
            "identity": self.identity,
            "n_parameters": n_parameters,
            "device": _device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "precision": _precision_name(accelerator),
            "volumes": where,
            "versions": {name: version_of(name) for name in ("brainage-nb", "torch", "accelerate", "numpy")},
            "seconds_per_epoch": None,
        }
        write_json(content, self.run_folder / "settings.json")

    def write_tables(self) -> None:
        """settings.json, then history, then predictions, whose presence says that the run is complete."""
        history = self.history()
        write_csv(history, self.run_folder / "history.csv")
        content = read_json(self.run_folder / "settings.json")
        content["seconds_per_epoch"] = round(float(history["seconds"].median()), 3)
        best = history.loc[history.groupby(["fold", "seed"])["val_mae"].idxmin()]
        content["best_epochs"] = best[["fold", "seed", "epoch", "val_mae"]].to_dict("records")
        write_json(content, self.run_folder / "settings.json")
        rows = [read_csv(self._folder(member) / "predictions.csv") for member in self.members]
        predictions, _ = with_means(pd.concat(rows, ignore_index=True))
        write_csv(predictions, self.run_folder / "predictions.csv")


def _scans_in_store(splits: pd.DataFrame, store: VolumeStore) -> pd.DataFrame:
    """Rows with a volume and an age, by scan_id, ids as text."""
    known = splits["scan_id"].isin(set(store.scan_ids))
    if not known.all():
        names = ", ".join(splits.loc[~known, "scan_id"].astype(str).head(5))
        warnings.warn(
            f"{(~known).sum()} of {len(splits)} scans have no volume in the store and are left out: {names}.",
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


def accelerator_for(settings: TrainingSettings):
    """What computes a run, and a note that says it: device, number of processes, precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = choose_device(settings)
    precision = choose_precision(settings, device)
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(True)  # a notebook may have trained with another precision before
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
    return (
        accelerator,
        f"{accelerator.num_processes} process(es) on {_device_name(accelerator.device)}, {precision}",
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _precision_name(accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
