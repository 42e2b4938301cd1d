"""Weights to start training from: a bundle of ours, a `.safetensors`, or a PyTorch file such as MedicalNet's.

Only who may start from where is judged here; training itself is in `member_fit`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from brainage_nb.models.bundles.facts import all_seen, among
from brainage_nb.models.bundles.files import open_bundle
from brainage_nb.models.resnet import HEAD, AgeRegressor


class StartRefused(ValueError):
    """Weights that must not be started from; the message says why and what to do."""


def load_pretrained(model: AgeRegressor, path: str | Path) -> list[str]:
    """Load weights of the same architecture, save for the regression head; returns the names left alone.

    Parameters
    ----------
    model : AgeRegressor
        Changed in place. MedicalNet's weights need `norm="batch", shortcut="A"`.
    path : path
        A bundle (folder or `.zip`; of an ensemble the first member), `.safetensors`, or a PyTorch file, bare
        or under the key `state_dict`, with or without the prefix `module.`. Nothing in it is executed.

    Raises
    ------
    ValueError
        Where a tensor of the file does not fit the network, or the file lacks one the network needs.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in _weights(Path(path)).items()}
    own = model.state_dict()
    wanted = [name for name in own if name not in HEAD and not name.endswith("num_batches_tracked")]
    missing = [name for name in wanted if name not in weights]
    unlike = [name for name in wanted if name in weights and weights[name].shape != own[name].shape]
    if missing or unlike:
        raise ValueError(
            f"{path} does not fit this network: {len(missing)} tensors missing ({missing[:3]}), "
            f"{len(unlike)} of another shape ({unlike[:3]}). MedicalNet's weights need norm='batch' and "
            "shortcut='A'."
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return [name for name in own if name not in wanted]


def refuse_seen(path: str | Path, scans: pd.DataFrame, hashes: Mapping[str, str], *, folds: bool) -> None:
    """Refuse a bundle that has learned from scans this run is judged by; other files cannot be asked.

    Parameters
    ----------
    path : path
        What `load_pretrained` takes.
    scans : DataFrame
        `scan_id, split`.
    hashes : mapping
        Scan id -> SHA-256 of the scan's file, as the volume store has it.
    folds : bool
        With folds every scan is judged by its held-out prediction; else those of val and test.

    Raises
    ------
    StartRefused
    """
    if not Path(path).exists():
        raise StartRefused(f"init_from = {path} does not exist; give a bundle or a file of weights.")
    seen = seen_by(path)
    if not seen:
        return
    judged = scans if folds else scans[scans["split"] != "train"]
    known = [scan_id for scan_id in judged["scan_id"] if hashes.get(scan_id)]
    learned = [
        scan_id
        for scan_id, found in zip(known, among([hashes[s] for s in known], seen, "images"), strict=True)
        if found
    ]
    if learned:
        raise StartRefused(
            f"init_from = {path}: this bundle has learned from {len(learned)} of the {len(judged)} scans "
            f"that this run would be judged by (the first: {learned[0]}), so its errors would be too small. "
            "Start from a bundle of other people, such as one trained on the known-answer cohort."
        )


def seen_by(path: str | Path) -> list[dict[str, Any]]:
    """Whom weights to start from have learned from, as `all_seen` says it; nobody for what is no bundle."""
    place = _bundle_around(Path(path)) if str(path) else None
    return all_seen(open_bundle(place).manifest) if place else []


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a path is, or that a file of weights lies in."""
    if _is_bundle(path):
        return path
    return path.parent if (path.parent / "bundle.json").is_file() else None


def _is_bundle(path: Path) -> bool:
    return path.is_dir() or (zipfile.is_zipfile(path) and path.suffix == ".zip")


def _weights(path: Path) -> Mapping[str, Tensor]:
    if _is_bundle(path):
        files = open_bundle(path)
        if not files.manifest.get("members"):
            raise ValueError(
                f"{path} holds no network ({files.manifest.get('kind')}); start from a ResNet-18."
            )
        arrays = files.arrays(files.manifest["members"][0]["file"])
        return {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)
