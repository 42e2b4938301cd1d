"""A bundle of untrained tiny networks, and scans: for tests of predicting, command line and app."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from brainage_nb.bundle_format import write_bundle
from brainage_nb.models.network import resnet18_regressor
from brainage_nb.predict.cautions import NOT_A_DEVICE, REFERENCE_FILE, Reference
from brainage_nb.predict.predictors import round_weights
from brainage_nb.predict.saving import _collect_svr, write_card
from brainage_nb.volumes.preprocessing import as_stored, preprocess
from brainage_nb.volumes.scan_statistics import measure_scan
from brainage_nb.volumes.scans import load_scan
from brainage_nb.volumes.settings import PreprocessingSettings

ARCHITECTURE = {"widths": [4, 4, 8, 8], "blocks": [1, 1, 1, 1], "shortcut": "A"}
SETTINGS = PreprocessingSettings(spacing_mm=8, size=24)
AGES = np.linspace(20, 80, 60)


def networks(n: int = 1, seed: int = 0) -> list:
    """Tiny networks that answer with clearly different ages."""
    torch.manual_seed(seed)
    made = [resnet18_regressor(**ARCHITECTURE, age_mean=45.0 + 14 * k, age_sd=10.0) for k in range(n)]
    for network in made:
        torch.nn.init.normal_(network.fc.weight, std=0.5)
    return [network.eval() for network in made]


def head_array(seed: int = 0, side: int = 48) -> np.ndarray:
    """A bright ball with a dark shell and a darker middle, int16, 4 mm voxels."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, side)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(x / 0.7, x / 0.85, x / 0.8, indexing="ij")))
    head = 800.0 * (radius < 1) - 500 * ((radius > 0.8) & (radius < 0.92)) - 200 * (radius < 0.3)
    return np.clip(head + rng.normal(0, 20, head.shape), 0, None).astype(np.int16)


def noisy_head(seed: int = 0) -> np.ndarray:
    """The same head with much noise inside and none around it, where it would move the head's crown."""
    head = head_array(seed)
    noise = np.random.default_rng(seed).normal(0, 300, head.shape)
    return np.clip(head + noise * (head > 100), 0, None).astype(np.int16)


def write_scan(path: Path, seed: int = 0, *, array: np.ndarray | None = None, spacing: float = 4.0) -> Path:
    """Write a head as NIfTI."""
    array = head_array(seed) if array is None else array
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * np.array(array.shape[:3]) / 2
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def manifest(n: int = 1, **changes) -> dict:
    """What `save_bundle` would say."""
    figure = {"value": 5.0, "low": 4.0, "high": 6.0}
    files = [{"file": f"member-{k:02d}.safetensors", "name": f"seed{k}"} for k in range(n)]
    said = {
        "run": "tiny",
        "created": "2026-01-01T00:00:00+00:00",
        "licence": "CC0",
        "intended_use": NOT_A_DEVICE,
        "versions": {},
        "variant": "single",
        "kind": "resnet18",
        "architecture": ARCHITECTURE,
        "flip_averaging": True,
        "members": files,
        "weights": "float16",
        "reproduced_within_years": 0.0,
        "preprocessing": SETTINGS.to_json(),
        "volumes": SETTINGS.fingerprint,
        "training": {
            "n_subjects": 60,
            "n_scans": 60,
            "age_low": 20.0,
            "age_high": 80.0,
            "age_mean": 50.0,
            "age_edges": list(range(20, 86, 5)),
            "age_counts": [5] * 13,
            "voxel_mm": [1.0, 4.0],
            "skull_stripped": None,
            "source": {"folder": 60},
        },
        "correction": {
            "intercept": 10.0,
            "slope": 0.8,
            "slope_interval": [0.7, 0.9],
            "n_subjects": 50,
            "age_range": [20.0, 80.0],
            "mae": 6.5,
            "support": "",
        },
        "correction_refused": "",
        "interval": {
            "level": 0.9,
            "quantile": 8.0,
            "n_calibration": 50,
            "support": "",
        },
        "figures": {"test": {"n": 50, "mae": figure, "r": figure, "mean_predictor_mae": figure}},
        "position": {
            "part": ["test"] * 60,
            "age": AGES.round().astype(int).tolist(),
            "predicted_age": (0.8 * AGES + 10).round(1).tolist(),
        },
        "seen": {"salt": "00" * 16, "subjects": [], "images": []},
    }
    return said | changes


def write_tiny_bundle(folder: Path, *, n: int = 1, n_scans: int = 3, **changes) -> Path:
    """A bundle whose reference are a few of our balls."""
    scratch = folder.with_name(f"{folder.name}-scans")
    scratch.mkdir(parents=True)
    scans = [write_scan(scratch / f"{k}.nii", k) for k in range(n_scans)]
    statistics = np.array([measure_scan(load_scan(scan)) for scan in scans])
    reference = Reference.fit((as_stored(preprocess(scan, SETTINGS)) for scan in scans), statistics)
    arrays = {f"member-{k:02d}.safetensors": round_weights(net) for k, net in enumerate(networks(n))}
    said = manifest(n, reference=reference.to_dict(), **changes)
    return write_bundle(folder, said, arrays | {REFERENCE_FILE: reference.arrays()}, write_card(said))


def write_fused_bundle(folder: Path) -> Path:
    """Two tiny bundles, of a T1w and a T2w scan, and how their ages are fused."""
    scratch = folder.with_name(f"{folder.name}-members")
    inner = {
        f"model-{k}": write_tiny_bundle(
            scratch / f"{k}", n=k + 1, preprocessing=SETTINGS.for_modality(modality).to_json()
        )
        for k, modality in enumerate(("T1w", "T2w"))
    }
    said = manifest()
    calibration = {name: said[name] for name in ("correction", "interval")}
    wide = {"interval": said["interval"] | {"quantile": 11.0}}
    kept = ("run", "created", "licence", "figures", "position")
    fused = {name: said[name] for name in kept} | calibration | {
        "kind": "fused",
        "members": [
            {"folder": "model-0", "run": "tiny", "modality": "T1w"},
            {"folder": "model-1", "run": "tiny_t2w", "modality": "T2w"},
        ],
        "parts": [
            {"modalities": ["T1w", "T2w"], "intercept": 1.0, "weights": [0.7, 0.3]} | calibration,
            {"modalities": ["T1w"], "intercept": 2.0, "weights": [0.9]} | calibration | wide,
        ],
    }  # fmt: skip
    card = write_card(fused | {"training": said["training"]})
    return write_bundle(folder, fused, {}, card, inner)


def write_svr_bundle(folder: Path) -> Path:
    """A bundle of VGG16's filters, drawn, and two fusions of invented weights."""
    from brainage_nb.models.svr import FUSIONS, VggSvr, Weighting
    from brainage_nb.models.vgg16 import FeatureSettings, vgg16_features

    rng, positions = np.random.default_rng(0), np.arange(2, 6)
    fusions = [make() for make in FUSIONS.values()]
    for fusion, n in zip(fusions, (1, len(positions)), strict=True):
        fusion.positions_, fusion.coef_ = positions, rng.normal(0, 0.1, (n, 512))
        fusion.intercept_, fusion.weighting_ = np.full(n, 50.0), Weighting(np.full(4, 0.25), 50.0, 1.0)
    network = vgg16_features("random_projection", pooling="mean")
    model = VggSvr(*fusions, network, FeatureSettings(image_size=32), SETTINGS.spacing_mm, "late", {})
    scratch = folder.with_name(f"{folder.name}-model")
    model.save(scratch / "model")
    _, entries, arrays = _collect_svr(scratch, {"variant": "late"})
    reference = Reference.fit([as_stored(preprocess(write_scan(scratch / "a.nii"), SETTINGS))])
    said = manifest(reference=reference.to_dict(), **entries)
    return write_bundle(folder, said, arrays | {REFERENCE_FILE: reference.arrays()}, write_card(said))


def bomb(claimed: tuple[int, int, int], gigabytes: float = 10.0) -> bytes:
    """A `.nii.gz` of some megabytes that holds zeros of this size, whatever its header claims."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(claimed)
    piece = gzip.compress(bytes(2**26), 9)  # gzip files may be strung together
    return gzip.compress(header.binaryblock + bytes(4)) + piece * round(gigabytes * 1e9 / 2**26)
