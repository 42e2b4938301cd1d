"""The variants of a volume whose predicted ages are averaged. One place for training and for bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_SHIFT = 4  # voxels


def averaging_of(facts: Mapping[str, Any]) -> dict[str, int]:
    """What `views` is to do, from the settings of a run or a bundle's manifest; ValueError out of bounds."""
    shift = facts.get("shift_averaging", 0)
    if type(shift) is not int or not 0 <= shift <= MOST_SHIFT:
        raise ValueError(f"shift_averaging = {shift!r}: expected 0 (none) to {MOST_SHIFT} voxels.")
    return {"flip_averaging": bool(facts["flip_averaging"]), "shift_averaging": shift}


def views(batch: Tensor, *, flip_averaging: bool, shift_averaging: int = 0) -> Iterator[Tensor]:
    """The batch itself, then its variants, all of one shape.

    Parameters
    ----------
    batch : Tensor (batch, 1, D, H, W)
        Axes RAS.
    flip_averaging : bool
        Each view is followed by its left-right mirror image.
    shift_averaging : int
        Also the batch moved by so many voxels to and fro along each axis, its edge repeated; 0 for not.
    """
    for moved in (batch, *_shifted(batch, shift_averaging)):
        yield moved
        if flip_averaging:
            yield moved.flip(2)


def _shifted(batch: Tensor, voxels: int) -> Iterator[Tensor]:
    from torch.nn.functional import pad

    if not voxels:
        return
    wide = pad(batch, (voxels,) * 6, mode="replicate")
    for axis in (2, 3, 4):
        for start in (0, 2 * voxels):
            view = wide
            for other in (2, 3, 4):
                view = view.narrow(other, start if other == axis else voxels, batch.shape[other])
            yield view
