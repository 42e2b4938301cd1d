"""Preprocessing as a MONAI `Compose`: the few transforms that MONAI lacks, over `volumes.preprocessing`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import monai.transforms
import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, Transform

from brainage_nb.volumes import preprocessing
from brainage_nb.volumes.preprocessing import Stage, build_transforms, list_steps, start
from brainage_nb.volumes.settings import PreprocessingSettings, write_transforms


class OpenScan(Transform):
    """A scan file to a MetaTensor (1, i, j, k) with the file's axes; ScanError says why it cannot be used."""

    def __init__(self, modality: str = "T1w") -> None:
        self.modality = modality

    def __call__(self, scan: str | Path | nib.spatialimages.SpatialImage) -> MetaTensor:
        return _to_tensor(start(scan, self.modality))

    def __repr__(self) -> str:
        return "OpenScan()" if self.modality == "T1w" else f"OpenScan(modality={self.modality!r})"


class ScanTransform(Transform):
    """A step of `volumes.preprocessing` on a MetaTensor (1, i, j, k) that `OpenScan` made.

    Parameters
    ----------
    **numbers
        The step's keywords.
    """

    step: ClassVar[Callable[..., Stage]]
    keeps_scan = True  # later transforms look for head and brain in it; loaders could not batch it

    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers

    def __call__(self, volume: MetaTensor) -> MetaTensor:
        found = volume.meta
        stage = Stage(volume[0].numpy(), volume.affine.numpy(), found["voxel_mm"], found["scan"])
        stage = type(self).step(stage, **self.numbers)
        return _to_tensor(stage if self.keeps_scan else stage._replace(scan=None))

    def __repr__(self) -> str:
        return write_transforms([(type(self).__name__, self.numbers)])


class SmoothAndSample(ScanTransform):
    """To the target resolution on a cube below the crown or in template space, in one pass."""

    step = staticmethod(preprocessing.smooth_and_sample)


class ShareGreyMatter(ScanTransform):
    """The share of grey matter in each voxel, 0 to 1, on the template's grid."""

    step = staticmethod(preprocessing.share_grey_matter)


class ScaleCube(ScanTransform):
    """Mean 0 and standard deviation 1 over all voxels, as NormalizeIntensity, summed in double precision."""

    step = staticmethod(preprocessing.scale_cube)


class ScaleBrain(ScanTransform):
    """Mean 0 and standard deviation 1 over the brain, and 0 outside of it."""

    step = staticmethod(preprocessing.scale_brain)


TRANSFORMS = {kind.step: kind for kind in (SmoothAndSample, ShareGreyMatter, ScaleCube, ScaleBrain)}


def preprocessing_chain(settings: PreprocessingSettings | None = None) -> Compose:
    """The MONAI Compose from a path to the network's input, a MetaTensor (1, size, size, size), axes RAS.

    Its voxels are those of `preprocess` exactly; `preprocess` starts without torch and MONAI.

    Examples
    --------
    >>> chain = preprocessing_chain(PreprocessingSettings(spacing_mm=4, size=48))
    >>> chain("sub-01_T1w.nii.gz").shape
    torch.Size([1, 48, 48, 48])
    """
    settings = settings or PreprocessingSettings()
    ours = [TRANSFORMS[step.func](**step.keywords) for step in list_steps(settings)]
    ours[-1].keeps_scan = False
    return Compose([OpenScan(settings.modality), *ours, *build_transforms(settings.extra)])


def add_transforms(settings: PreprocessingSettings, *transforms: Transform) -> PreprocessingSettings:
    """Settings whose chain ends with further transforms of MONAI; store and bundle carry them by name.

    Parameters
    ----------
    settings : PreprocessingSettings
    *transforms : Transform
        Of the kinds in `settings.MONAI_TRANSFORMS`, with plain values; ValueError for any other.

    Examples
    --------
    >>> from monai.transforms import MedianSmooth
    >>> add_transforms(PreprocessingSettings(), MedianSmooth(radius=1)).extra
    'MedianSmooth(radius=1)'
    """
    for kind in map(type, transforms):
        if kind is not getattr(monai.transforms, kind.__name__, None):
            raise ValueError(
                f"{kind.__name__} is no transform of MONAI: a bundle carries names and numbers, no code."
            )
    extra = "; ".join([*filter(None, [settings.extra]), *map(describe_transform, transforms)])
    settings = replace(settings, extra=extra)
    build_transforms(settings.extra)
    return settings


def describe_transform(transform: Transform) -> str:
    """A transform as the call that makes it, as `MedianSmooth(radius=1)`, from its attributes."""
    if isinstance(transform, OpenScan | ScanTransform):
        return repr(transform)
    arguments = {}
    for name, parameter in signature(type(transform)).parameters.items():
        value = vars(transform).get(name, parameter.default)
        if value is not parameter.default or isinstance(value, bool | int | float | str):
            arguments[name] = value
    return write_transforms([(type(transform).__name__, arguments)])


def run_steps(chain: Compose, scan: str | Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What each transform of a chain makes of a scan, for `pictures.steps_figure`.

    Returns
    -------
    list of (title, array, voxel_size)
        The transform, a 3-D array and its voxel size (3,) in mm. The first has the file's axes.

    Raises
    ------
    ScanError
        As `preprocess`.
    """
    steps, volume = [], scan
    for transform in chain.transforms:
        volume = transform(volume)
        steps.append((describe_transform(transform), np.asarray(volume[0]), volume.meta["voxel_mm"]))
    return steps


def _to_tensor(stage: Stage) -> MetaTensor:
    meta = {"voxel_mm": stage.voxel_mm} | ({} if stage.scan is None else {"scan": stage.scan})
    array = np.asarray(stage.array, np.float32)
    return MetaTensor(array[None], affine=stage.affine, meta=meta)
