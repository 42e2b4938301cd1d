"""A tiny store and split table for tests of training: balls whose size tells the age."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import StoreWriter, VolumeStore
from brainage_nb.workspace import write_json

TINY = TrainingSettings(
    epochs=3, batch_size=6, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu", learning_rate=3e-3
)
"""A network of some ten thousand weights, three epochs of four steps."""
SOURCE = {"source_bytes": 0, "source_mtime_ns": 0, "source_sha256": ""}


def make_tiny_cohort(folder: Path, n: int = 30, size: int = 16, per_shard: int = 16, modality: str = "T1w"):
    """(store, splits): a bright ball that shrinks with age, in noise; two shards on disk."""
    settings = PreprocessingSettings(spacing_mm=8.0, size=size).for_modality(modality)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings.to_json(), folder / "preprocessing.json")
    rng = np.random.default_rng(0)
    ages = np.linspace(20, 80, n)
    ids = [f"S{row:03d}" for row in range(n)]
    writer = StoreWriter(folder, size)
    writer.capacity = per_shard
    radius = np.linalg.norm(np.indices((size,) * 3) - (size - 1) / 2, axis=0)
    for scan_id, age in zip(ids, ages, strict=True):
        volume = (radius < size * (0.45 - 0.3 * (age - 20) / 60)) + rng.normal(0, 0.1, radius.shape)
        writer.add(scan_id, ((volume - volume.mean()) / volume.std()).astype(np.float16), SOURCE)
    writer.commit()
    splits = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "age": ages})
    splits["image"] = splits["scan_id"] + ".nii.gz"
    pattern = ("train", "train", "val", "train", "train", "test")
    return VolumeStore(folder), splits.assign(
        sex="F", site="here", split=[pattern[row % 6] for row in range(n)], fold=-1
    )


@pytest.fixture
def tiny(tmp_path):
    """(store, splits) of 30 subjects at 16^3."""
    return make_tiny_cohort(tmp_path / "volumes")


@pytest.fixture
def tiny_settings():
    return TINY


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a finished run of these settings on that cohort, and what `train` gave."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", train(*make_tiny_cohort(folder / "volumes"), folder / "run", TINY)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run's folder."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))
