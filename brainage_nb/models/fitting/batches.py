"""Volumes for training: on the device where they fit, else streamed from the mapped store; the same values.

Knows the store's shards and the device; knows no ages and no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from brainage_nb.volumes.store import VolumeStore

AHEAD = 2


class ResidentVolumes:
    """All volumes of a list of scans, float16, on the device.

    Parameters
    ----------
    store : VolumeStore
    scan_ids : sequence of str
        Positions in this list are what `batches` takes.
    device : torch.device
    """

    def __init__(self, store: VolumeStore, scan_ids: Sequence[str], device: torch.device):
        self.where = "resident"
        self.size, self.spacing_mm, self.device = store.size, store.spacing_mm, device
        shape = (len(scan_ids), *(self.size,) * 3)
        self._volumes = torch.empty(shape, dtype=torch.float16, device=device)
        for row, (shard, place) in enumerate(zip(*store.locate(scan_ids), strict=True)):
            self._volumes[row] = torch.from_numpy(np.array(store.shards[shard][place])).to(device)

    def batches(self, wanted: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Float32 batches (n, 1, size, size, size), one for each array of n positions."""
        for rows in wanted:
            yield self._volumes[torch.as_tensor(rows, device=self.device)][:, None].float()


class StreamedVolumes:
    """Volumes of a list of scans, read from the mapped shards by a second thread, a little ahead.

    Parameters are those of `ResidentVolumes`.
    """

    def __init__(self, store: VolumeStore, scan_ids: Sequence[str], device: torch.device):
        self.where = "streamed"
        self.size, self.spacing_mm, self.device = store.size, store.spacing_mm, device
        self._shards = store.shards
        self._shard, self._row = (np.asarray(places) for places in store.locate(scan_ids))

    def batches(self, wanted: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Float32 batches (n, 1, size, size, size), one for each array of n positions."""
        with ThreadPoolExecutor(1, thread_name_prefix="volumes") as reader:
            waiting: deque = deque()
            try:
                for rows in wanted:
                    waiting.append(reader.submit(self._read, np.asarray(rows)))
                    if len(waiting) > AHEAD:
                        yield self._sent(waiting.popleft().result())
                while waiting:
                    yield self._sent(waiting.popleft().result())
            finally:
                for pending in waiting:
                    pending.cancel()

    def _read(self, rows: np.ndarray) -> Tensor:
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(rows), 1, *(self.size,) * 3), dtype=torch.float16, pin_memory=pinned)
        for target, row in zip(batch.numpy(), rows, strict=True):
            target[0] = self._shards[self._shard[row]][self._row[row]]
        return batch

    def _sent(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True).float()


def open_volumes(
    store: VolumeStore, scan_ids: Sequence[str], device: torch.device, share: float
) -> ResidentVolumes | StreamedVolumes:
    """Volumes on the device where they take at most `share` of its free memory, streamed otherwise.

    Parameters
    ----------
    store : VolumeStore
    scan_ids : sequence of str
        Scans that will be asked for, by position.
    device : torch.device
    share : float
        Share of the device's free memory, 0 to 1; 0 always streams.
    """
    needed = len(scan_ids) * store.size**3 * 2
    kind = ResidentVolumes if needed <= share * free_memory(device) else StreamedVolumes
    return kind(store, scan_ids, device)


def free_memory(device: torch.device) -> int:
    """Free memory of the device in bytes (of the system for the CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
