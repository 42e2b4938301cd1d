"""Train the age models of one run: `train` in notebooks, `python -m brainage_nb.models.training` elsewhere.

Decides where and how often to fit; the fitting of one model is in `fitting`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from brainage_nb.models.batches import open_volumes
from brainage_nb.models.fitting import HISTORY, MemberFit, build_network, refuse_difference
from brainage_nb.models.launching import in_worker, launch, processes_wanted
from brainage_nb.models.preflight import check_disk, choose_device, choose_precision
from brainage_nb.models.progress import EpochLines, ProgressBars
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.stopping import StopRequests
from brainage_nb.models.sweeps import Member, members_of, with_means
from brainage_nb.workspace import read_csv, read_json, version_of, write_csv, write_json

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

__all__ = ["RunResult", "TrainingSettings", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Parameters
    ----------
    complete : bool
        False where it stopped early with everything saved; call `train` again to go on.
    history : DataFrame
        A row an epoch of each model: losses and MAE in years, learning rate, gradient norm, seconds.
    predictions : DataFrame
        A row a scan, model and variant; empty until the run is complete.
    settings : dict
        As in `settings.json`.
    notes : list of str
        What should be told: device, precision, where the volumes are, disk, time.
    """

    complete: bool
    history: pd.DataFrame
    predictions: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]


def train(
    store: VolumeStore,
    splits: pd.DataFrame,
    run_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    fresh: bool = False,
    on_epoch=None,
) -> RunResult:
    """Train every model of a run, going on from where an earlier call stopped.

    Parameters
    ----------
    store : VolumeStore
        Preprocessed volumes.
    splits : DataFrame
        `scan_id, subject_id, session_id, age` (years), `split` and `fold`; scans absent from the store are
        left out.
    run_folder : path
        Receives `settings.json`, `history.csv`, `predictions.csv` and `checkpoints/`.
    settings : TrainingSettings, optional
    fresh : bool
        Delete what an earlier run left in the folder and start anew.
    on_epoch : callable, optional
        Called with the history so far (DataFrame) after each epoch, to draw a live curve.

    Returns
    -------
    RunResult

    Raises
    ------
    NotReady
        No usable GPU where one is required, or too little disk.
    SettingsDiffer
        The folder holds a run with other settings, and `fresh` is False.
    """
    settings = settings or TrainingSettings()
    run_folder = Path(run_folder)
    if not in_worker() and processes_wanted(settings) > 1:
        launch(store, splits, run_folder, settings, fresh=fresh)
        return _result(run_folder, [])
    job = Job(store, splits, run_folder, settings)
    if fresh:
        job.clear()
    if job.is_done():
        return _result(run_folder, ["This run is complete with these settings: nothing was trained again."])
    progress = EpochLines() if in_worker() else ProgressBars(on_epoch)
    with StopRequests(settings.max_minutes) as stop:
        job.run(stop, progress)
    stop.pass_on()
    return _result(run_folder, job.notes)


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
            "scans": _digest(self.scans),
        }
        self.notes: list[str] = []

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
        refuse_difference(read_json(path)["identity"], self.identity, self.run_folder)
        return (self.run_folder / "predictions.csv").exists()

    def run(self, stop: StopRequests, progress) -> None:
        """Fit the members that are not finished; write the run's tables once all are."""
        accelerator, notes = _accelerator(self.settings)
        network = build_network(self.settings, self.scans["age"].to_numpy())
        n_parameters = sum(weight.numel() for weight in network.parameters())
        self.run_folder.mkdir(parents=True, exist_ok=True)
        notes.append(check_disk(self.run_folder, n_parameters, len(self.members)))
        volumes = open_volumes(
            self.store, list(self.scans["scan_id"]), accelerator.device, self.settings.resident_share
        )
        notes.append(f"{len(self.scans)} volumes {volumes.where}")
        self.notes += notes
        self._write_settings(accelerator, n_parameters, volumes.where)
        for number, member in enumerate(self.members):
            if self._has(member):
                continue
            fit = MemberFit(
                volumes, self.scans, member, self.settings, accelerator, self._folder(member), self.identity
            )
            progress.begin(member.name, number, len(self.members), self._history())
            complete = fit.run(stop, progress.step, progress.epoch)
            progress.end()
            accelerator.free_memory()
            if accelerator.is_main_process:
                write_csv(self._history(fit if not complete else None), self.run_folder / "history.csv")
            if not complete:
                self.notes.append(_stopped_sentence(stop.reason, fit))
                return
        if accelerator.is_main_process:
            self._write_tables()
        accelerator.wait_for_everyone()

    def _folder(self, member: Member) -> Path:
        folder = self.run_folder / "checkpoints" / member.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _has(self, member: Member) -> bool:
        return (self._folder(member) / "predictions.csv").exists()

    def _history(self, unfinished: MemberFit | None = None) -> pd.DataFrame:
        done = [read_csv(self._folder(m) / "history.csv") for m in self.members if self._has(m)]
        if unfinished is not None and unfinished.history:
            done.append(pd.DataFrame(unfinished.history))
        return pd.concat(done, ignore_index=True) if done else pd.DataFrame(columns=list(HISTORY))

    def _write_settings(self, accelerator, n_parameters: int, where: str) -> None:
        if not accelerator.is_main_process:
            return
        content = {
            "variant": "single" if len(self.members) == 1 else "mean",
            "fingerprint": self.store.fingerprint,
            "preprocessing": self.store.settings,
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

    def _write_tables(self) -> None:
        """settings.json, then history, then predictions, whose presence says that the run is complete."""
        history = self._history()
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


def _accelerator(settings: TrainingSettings):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = choose_device(settings)
    precision = choose_precision(settings, device)
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(True)  # a notebook may have trained with another precision before
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
    note = f"{accelerator.num_processes} process(es) on {_device_name(accelerator.device)}, {precision}"
    return accelerator, [note]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _precision_name(accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def _stopped_sentence(reason: str, fit: MemberFit) -> str:
    why = {"time": "max_minutes is used up", "interrupt": "interrupted", "terminate": "asked to terminate"}
    return (
        f"Stopped in epoch {fit.epoch + 1} of {fit.settings.epochs} of {fit.member.name} ({why[reason]}); "
        "all is saved. Run again with the same settings to go on."
    )


def _result(run_folder: Path, notes: list[str]) -> RunResult:
    predictions = run_folder / "predictions.csv"
    history = run_folder / "history.csv"
    return RunResult(
        complete=predictions.exists(),
        history=read_csv(history) if history.exists() else pd.DataFrame(columns=list(HISTORY)),
        predictions=read_csv(predictions) if predictions.exists() else pd.DataFrame(),
        settings=read_json(run_folder / "settings.json"),
        notes=notes,
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry of one process; under `accelerate launch` there are several."""
    from brainage_nb.volumes.store import VolumeStore

    parser = argparse.ArgumentParser(prog="python -m brainage_nb.models.training", description=main.__doc__)
    parser.add_argument("--volumes", required=True, help="folder of the volume store")
    parser.add_argument("--splits", required=True, help="splits.csv")
    parser.add_argument("--run-folder", required=True, help="folder of the run, as WORKSPACE/runs/resnet18")
    parser.add_argument("--settings", help="JSON file of training settings; defaults where absent")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    given = parser.parse_args(arguments)
    content = json.loads(Path(given.settings).read_text(encoding="utf-8")) if given.settings else {}
    os.environ.setdefault("BRAINAGE_TRAINING_WORKER", "1")
    result = train(
        VolumeStore.open(given.volumes),
        read_csv(given.splits),
        given.run_folder,
        TrainingSettings.from_json(content),
        fresh=given.fresh,
    )
    if os.environ.get("RANK", "0") == "0":
        print(*result.notes, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
