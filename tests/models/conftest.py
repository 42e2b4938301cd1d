"""A tiny store and split table for tests of training: blobs whose brightness tells the age."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainage_nb.models.settings import TrainingSettings


@dataclass
class TinyStore:
    """What training asks of a volume store, over plain arrays in memory or mapped."""

    folder: Path
    scan_ids: list
    shards: list
    size: int
    spacing_mm: float = 8.0
    fingerprint: str = "tiny"

    @property
    def settings(self):
        return {"size": self.size}

    def locate(self, scan_ids):
        rows = np.array([self.scan_ids.index(scan_id) for scan_id in scan_ids], dtype=int)
        per_shard = len(self.shards[0])
        return rows // per_shard, rows % per_shard


def make_tiny_cohort(folder: Path, n: int = 30, size: int = 16, per_shard: int = 16):
    """(store, splits): a bright ball that shrinks with age in noise, float16 shards on disk."""
    rng = np.random.default_rng(0)
    age = np.linspace(20, 80, n)
    radius = np.linalg.norm(np.indices((size,) * 3) - (size - 1) / 2, axis=0)
    volumes = np.stack([(radius < size * (0.45 - 0.3 * (a - 20) / 60)).astype(float) for a in age])
    volumes += rng.normal(0, 0.1, volumes.shape)
    volumes -= volumes.mean((1, 2, 3), keepdims=True)
    volumes /= volumes.std((1, 2, 3), keepdims=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, n, per_shard)):
        np.save(folder / f"shard-{number:04d}.npy", volumes[start : start + per_shard].astype(np.float16))
    shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("shard-*.npy"))]
    ids = [f"S{i:03d}" for i in range(n)]
    splits = pd.DataFrame(
        {
            "scan_id": ids,
            "subject_id": ids,
            "session_id": "",
            "image": [f"{scan_id}.nii.gz" for scan_id in ids],
            "age": age,
            "sex": "F",
            "site": "here",
            "split": [("train", "train", "val", "train", "train", "test")[i % 6] for i in range(n)],
            "fold": -1,
        }
    )
    return TinyStore(folder, ids, shards, size), splits


@pytest.fixture
def tiny(tmp_path):
    """(store, splits) of 30 subjects at 16^3."""
    return make_tiny_cohort(tmp_path / "volumes")


@pytest.fixture
def tiny_settings():
    """A network of a few thousand weights and two epochs."""
    return TrainingSettings(
        epochs=2, batch_size=6, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu", learning_rate=3e-3
    )
