"""The volume store: preprocessed scans as float16 rows of a few large files, each row with its checksum.

What is in a row is decided in preprocessing, how rows get there in `store_building`; who a scan belongs to is
not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..workspace import read_json
from .preprocessing import PreprocessingSettings
from .staging import StoreMirror
from .store_files import HEADER_BYTES, read_index, sha256_of_volume, shard_path

if TYPE_CHECKING:
    import pandas as pd


class VolumeStore:
    """Preprocessed volumes on disk, read through memory maps.

    Parameters
    ----------
    folder : path
        `volumes/<fingerprint>` of a workspace.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "preprocessing.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} is no volume store: preprocessing.json is missing. Run notebook 03 first."
            )
        self.settings = PreprocessingSettings.from_json(read_json(self.folder / "preprocessing.json"))
        self.index = read_index(self.folder)
        self._place = dict(zip(self.index["scan_id"], range(len(self.index)), strict=True))
        self._maps: dict[int, np.ndarray] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> VolumeStore:
        """Open the store in a folder; FileNotFoundError where there is none."""
        return cls(folder)

    @property
    def fingerprint(self) -> str:
        """Name of the preprocessing that made the volumes."""
        return self.settings.fingerprint

    @property
    def spacing_mm(self) -> float:
        """Edge of a voxel, mm."""
        return self.settings.spacing_mm

    @property
    def size(self) -> int:
        """Edge of a volume, voxels."""
        return self.settings.size

    @property
    def scan_ids(self) -> list[str]:
        """Scans in the store, in the order in which they were added."""
        return self.index["scan_id"].tolist()

    @property
    def shards(self) -> dict[int, np.ndarray]:
        """Memory maps (n, size, size, size) float16, read-only, by shard number; only of shards in use."""
        if self._maps is None:
            rows = self.index.groupby("shard")["row"].max() + 1
            self._maps = {
                int(shard): np.memmap(
                    shard_path(self.folder, shard),
                    np.float16,
                    "r",
                    HEADER_BYTES,
                    (int(count), self.size, self.size, self.size),
                )
                for shard, count in rows.items()
            }
        return self._maps

    def locate(self, scan_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row of each scan, two int arrays (n,); KeyError names what is missing."""
        places = self._places(scan_ids)
        columns = self.index[["shard", "row"]].to_numpy()[places]
        return columns[:, 0], columns[:, 1]

    def read(self, scan_ids: Sequence[str]) -> np.ndarray:
        """Volumes of several scans, float16 (n, size, size, size), in memory."""
        made = np.empty((len(scan_ids), self.size, self.size, self.size), np.float16)
        for place, (shard, row) in enumerate(zip(*self.locate(scan_ids), strict=True)):
            made[place] = self.shards[shard][row]
        return made

    def verify(self) -> pd.DataFrame:
        """Compare every row with its checksum; a row (scan_id, problem) for each that differs."""
        import pandas as pd

        bad = [
            (entry.scan_id, f"shard {entry.shard}, row {entry.row} is not what was written; build again")
            for entry in self.index.itertuples()
            if sha256_of_volume(self.shards[entry.shard][entry.row]) != entry.sha256
        ]
        return pd.DataFrame(bad, columns=["scan_id", "problem"])

    def __getitem__(self, scan_id: str) -> np.ndarray:
        return self.read([scan_id])[0]

    def __contains__(self, scan_id: str) -> bool:
        return scan_id in self._place

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}  # a worker maps the files itself

    def _places(self, scan_ids: Sequence[str]) -> list[int]:
        if missing := [scan_id for scan_id in scan_ids if scan_id not in self._place]:
            raise KeyError(
                f"{len(missing)} of {len(scan_ids)} scans are not in {self.folder} ({len(self)} volumes), "
                f"the first is {missing[0]!r}. Run notebook 03 on the cohort as it is now."
            )
        return [self._place[scan_id] for scan_id in scan_ids]


def current_store(volumes_folder: str | Path, scratch: Path | None = None) -> VolumeStore:
    """Open the store that `volumes/current` names; with `scratch`, a copy of it on that fast local disk."""
    name = Path(volumes_folder) / "current"
    if not name.is_file():
        raise FileNotFoundError(f"{name} is missing. Run notebook 03 first; it makes the volume store.")
    home = Path(volumes_folder) / name.read_text(encoding="utf-8").strip()
    if scratch is None:
        return VolumeStore.open(home)
    mirror = StoreMirror(home, scratch)
    if damaged := mirror.fetch():
        raise OSError(f"{damaged} volumes of {home} are damaged. Run notebook 03 again: it makes them anew.")
    return VolumeStore.open(mirror.local)
