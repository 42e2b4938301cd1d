"""Volume stores and split tables of made-up volumes, for the benchmarks of training. No benchmark itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import StoreWriter, VolumeStore
from brainage_nb.workspace import write_json

SOURCE = {"source_bytes": 0, "source_mtime_ns": 0, "source_sha256": ""}
PATTERN = ("train", "train", "val", "train", "train", "test")


def synthetic_store(folder: Path, n: int, size: int, spacing_mm: float) -> tuple[VolumeStore, pd.DataFrame]:
    """A store of `n` z-scored balls in noise, smaller with age, and their splits (two thirds to train on)."""
    settings = PreprocessingSettings(spacing_mm=spacing_mm, size=size)
    folder.mkdir(parents=True)
    write_json(settings.to_json(), folder / "preprocessing.json")
    ids, ages = [f"S{row:05d}" for row in range(n)], np.linspace(20, 80, n)
    radius = np.linalg.norm(np.indices((size,) * 3) - (size - 1) / 2, axis=0)
    noise = np.random.default_rng(0).normal(0, 0.1, (size,) * 3)
    writer = StoreWriter(folder, size)
    for row, (scan_id, age) in enumerate(zip(ids, ages, strict=True)):
        volume = (radius < size * (0.45 - 0.3 * (age - 20) / 60)) + np.roll(noise, row, axis=row % 3)
        writer.add(scan_id, ((volume - volume.mean()) / volume.std()).astype(np.float16), SOURCE)
    writer.commit()
    splits = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "age": ages, "fold": -1})
    return VolumeStore(folder), splits.assign(split=[PATTERN[row % 6] for row in range(n)])
