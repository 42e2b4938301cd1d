"""Notebooks that take T1-weighted MRI scans and ages to a trained, honestly evaluated brain-age model.

>>> from brainage_nb import load_bundle
>>> load_bundle("W/runs/resnet18/bundle").predict("scan.nii.gz").predicted_age  # doctest: +SKIP
43.8
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Before anything loads OpenMP: threads that spin while they wait slow training manyfold beside other jobs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PUBLIC = {
    "AgeBiasCorrector": "evaluation.correction",
    "load_bundle": "predict.bundle",
    "make_demo_cohort": "demo.cohort",
    "match_scans": "sources.folder",
    "preprocess": "volumes.preprocessing",
    "preprocessing_chain": "volumes.transforms",
    "read_table": "tables.participants",
    "train": "models.train",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name where it is first used: `import brainage_nb` stays instant."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public: {', '.join(__all__)}.")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
