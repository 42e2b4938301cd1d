"""Does the memory of streamed training depend on how many volumes there are?

Run: `python benchmarks/memory.py`. One epoch on 4,000 and on 400 volumes, each in a process of its own; the
peak of its anonymous memory (mapped files apart) is watched from outside. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import INDEX_COLUMNS, SHARD_BYTES, VolumeStore, shard_path
from brainage_nb.workspace import write_csv, write_json

BAR, SIZE = 1.2, 48
SETTINGS = TrainingSettings(epochs=1, batch_size=8, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu")


def sparse_store(folder: Path, n: int) -> tuple[VolumeStore, pd.DataFrame]:
    """A store of `n` empty volumes that takes no disk, and its splits."""
    folder.mkdir()
    write_json(PreprocessingSettings(spacing_mm=4.0, size=SIZE).to_json(), folder / "preprocessing.json")
    capacity = SHARD_BYTES // (2 * SIZE**3)
    ids = [f"S{row:05d}" for row in range(n)]
    index = pd.DataFrame({"scan_id": ids, "shard": np.arange(n) // capacity, "row": np.arange(n) % capacity})
    index["sha256"] = sha256(bytes(2 * SIZE**3)).hexdigest()
    index["source_sha256"] = ""
    write_csv(index.reindex(columns=INDEX_COLUMNS, fill_value=0), folder / "index.csv")
    for shard, rows in index.groupby("shard").size().items():
        np.lib.format.open_memmap(shard_path(folder, shard), "w+", np.float16, (rows, *(SIZE,) * 3))
    splits = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "fold": -1})
    part = np.array(["train", "train", "train", "train", "val", "test"])[np.arange(n) % 6]
    return VolumeStore(folder), splits.assign(age=np.linspace(20, 80, n), split=part)


def anonymous_megabytes(process: int) -> float:
    """Anonymous resident memory of a process, MB; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))


def peak(work: Path, n: int) -> tuple[float, float]:
    """(peak, seconds) of an epoch on `n` volumes in a forked process."""
    store, splits = sparse_store(work / f"volumes{n}", n)
    started = time.monotonic()
    child = os.fork()
    if not child:
        warnings.simplefilter("ignore")
        status = 1
        try:
            train(store, splits, work / f"run{n}", SETTINGS)
            status = 0
        finally:
            os._exit(status)
    highest = 0.0
    while True:
        highest = max(highest, anonymous_megabytes(child))
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        time.sleep(0.002)
    if status:
        raise RuntimeError(f"Training on {n} volumes failed; see the lines above.")
    return highest, time.monotonic() - started


def main() -> None:
    """Measure both sizes; print a table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 against 100 volumes")
    few, many = (100, 1000) if parser.parse_args().quick else (400, 4000)
    with tempfile.TemporaryDirectory() as folder:
        table = pd.DataFrame(
            [(n, *peak(Path(folder), n), n * 2 * SIZE**3 / 1e6) for n in (few, many)],
            columns=["volumes", "peak anonymous MB", "seconds", "volumes MB"],
        )
    print(table.round(1).to_string(index=False))
    small, large = table["peak anonymous MB"]
    outcome = {
        "name": "memory",
        "value": round(large / small, 3),
        "bar": BAR,
        "holds": bool(large <= BAR * small),
        "megabytes": {str(few): round(small, 1), str(many): round(large, 1)},
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
