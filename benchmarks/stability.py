"""Do evaluation-mode predictions jump on small data, and what cures it? Three seeds on real scans at 4 mm.

Run: `python benchmarks/stability.py --data FOLDER [--epochs 12] [--quick]`, where FOLDER holds `images/` and
a table of ages (`IXI.xls`). One training for each seed and time constant of the weight average; after each
epoch the same weights are evaluated in each way: running statistics (what PyTorch does by default), precise
statistics, precise statistics of the averaged weights (what this package does). `--averages 1,3` compares
time constants (epochs). Only train and validation scans are looked at.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from torch.optim.swa_utils import update_bn

from brainage_nb.cohort.splits import deal_splits
from brainage_nb.models.fit import Trainer, predict_ages
from brainage_nb.models.resume import StopRequests
from brainage_nb.models.run import Job
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.sources.folder import match_scans
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import VolumeStore, build_store

BAR = 1.5
SHARED = Path(__file__).parents[2] / "shared" / "data"
DEFAULT_DATA = Path(os.environ.get("BRAINAGE_TEST_DATA", SHARED)) / "ixi_hh"


class Watch:
    """Evaluates the weights of each epoch in every way; takes the place of a progress bar."""

    def __init__(self, seed: int):
        self.seed, self.rows = seed, []

    def begin(self, *_) -> None:
        """Nothing to open."""

    step = end = begin

    def epoch(self, fit: Trainer) -> None:
        """Note the validation MAE (years) of each way."""
        network = copy.deepcopy(fit.network)
        ways = {"running statistics": validation_mae(fit, network)}
        with fit.accelerator.autocast():
            update_bn(fit.volumes.batches(fit.draw_precise_batches()), network)
        ways["precise statistics"] = validation_mae(fit, network)
        ways[average_of(fit.settings.ema_epochs)] = fit.history[-1]["val_mae"]
        for way, mae in ways.items():
            row = {"way": way, "seed": self.seed, "epoch": fit.epoch, "mae": mae}
            self.rows.append(row)
        print(self.seed, fit.epoch, {way: round(mae, 2) for way, mae in ways.items()}, flush=True)


def average_of(epochs: float) -> str:
    """Title of what this package does."""
    return f"precise statistics + average over {epochs:g} epochs"


def validation_mae(fit: Trainer, network) -> float:
    """MAE in years of a network on the validation scans, evaluation mode."""
    rows = fit.member.validation
    batches = fit.volumes.batches(np.array_split(rows, -(-len(rows) // 8)))
    ages = predict_ages(network, batches, fit.accelerator.autocast, flip_averaging=False)
    return float(np.abs(ages - fit.scans["age"].to_numpy()[rows]).mean())


def real_store(data: Path, work: Path) -> tuple[VolumeStore, pd.DataFrame]:
    """The scans of a folder at 4 mm, and their splits."""
    found = match_scans(data / "images", data / "IXI.xls")
    splits = deal_splits(found.cohort)
    settings = PreprocessingSettings(spacing_mm=4.0, size=48)
    return build_store(splits, work / "volumes", settings, resolve=Path).store, splits


def verdict(rows: pd.DataFrame) -> pd.DataFrame:
    """For each way and seed: best MAE, and the worst of the last half of training over it."""
    late = rows[rows["epoch"] > rows["epoch"].max() / 2]
    keys = ["way", "seed"]
    best, worst = rows.groupby(keys, sort=False)["mae"].min(), late.groupby(keys, sort=False)["mae"].max()
    mean = late.groupby(keys, sort=False)["mae"].mean()
    columns = {"best": best, "mean of last half": mean, "worst of last half": worst, "ratio": worst / best}
    return pd.DataFrame(columns).reset_index()


def main() -> None:
    """Train, print the before/after table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--averages", default=f"{TrainingSettings().ema_epochs:g}")
    parser.add_argument("--quick", action="store_true", help="six epochs of one seed")
    options = parser.parse_args()
    epochs, seeds = (6, "0") if options.quick else (options.epochs, options.seeds)
    if not options.data.is_dir():
        print(json.dumps({"name": "stability", "skipped": f"no scans at {options.data}; give --data"}))
        sys.exit(0)
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store, splits = real_store(options.data, Path(folder))
        kinds = product(seeds.split(","), options.averages.split(","))
        for seed, average in kinds:
            settings = TrainingSettings(
                epochs=epochs,
                seeds=(int(seed),),
                ema_epochs=float(average),
                checkpoint_minutes=1e9,
            )
            watch = Watch(int(seed))
            job = Job(store, splits, Path(folder) / f"seed{seed}average{average}", settings)
            job.run(StopRequests(), watch)
            rows += watch.rows
    # The average changes no training step: the other ways come out the same for each of its time constants.
    table = verdict(pd.DataFrame(rows).drop_duplicates(["way", "seed", "epoch"]))
    print(table.round(2).to_string(index=False))
    ours = table["way"] == average_of(TrainingSettings().ema_epochs)
    cured = table[ours]["ratio"]
    worst = table.groupby("way", sort=False)["ratio"].max()
    outcome = {
        "name": "stability",
        "value": round(float(cured.max()), 3),
        "bar": BAR,
        "holds": bool(cured.max() <= BAR),
        "worst_ratio": {way: round(r, 2) for way, r in worst.items()},
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
