"""The VGG16 + SVR model as it is kept and used: volumes to ages, saved as plain arrays and JSON, no pickle.

Fits nothing (`vgg.fusion`), chooses no rows (`vgg.run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.models.vgg.features import SLICES, FeatureSettings, volume_features
from brainage_nb.models.vgg.fusion import EARLY, LATE, EarlyFusion, LateFusion
from brainage_nb.models.vgg.fusion_rules import Fusion
from brainage_nb.models.vgg.linear_svr import Choice, LinearSvr
from brainage_nb.models.vgg.network import (
    Vgg16Features,
    WeightsError,
    save_features,
    saved_features,
    vgg16_features,
)
from brainage_nb.workspace import read_json, write_json, writing

ARRAYS, FACTS, NETWORK = "vgg_svr.safetensors", "vgg_svr.json", "vgg16_features.safetensors"


@dataclass
class VggSvr:
    """Both fusions with the network they read, from volumes to ages.

    Parameters
    ----------
    early, late : EarlyFusion, LateFusion
    network : Vgg16Features
    settings : FeatureSettings
    spacing_mm : float
        Of the volumes it was fitted to.
    variant : {"early", "late"}
        The headline: the lower inner cross-validated MAE on training subjects.
    facts : dict
        What was said of it when it was fitted; not used for predicting.
    """

    early: EarlyFusion
    late: LateFusion
    network: Vgg16Features
    settings: FeatureSettings
    spacing_mm: float
    variant: str
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def fusion(self, variant: str = "") -> EarlyFusion | LateFusion:
        """The named fusion; the headline one where no name is given."""
        known = {EARLY: self.early, LATE: self.late}
        if (variant or self.variant) not in known:
            raise ValueError(f"variant = {variant!r}: expected one of {', '.join(known)}.")
        return known[variant or self.variant]

    def features(self, volume: np.ndarray) -> np.ndarray:
        """(positions, features) of one volume (size, size, size), RAS, float16 as in a store."""
        return volume_features(volume, self.spacing_mm, self.network, self.settings)

    def predict(self, volumes: Sequence[np.ndarray], variant: str = "") -> np.ndarray:
        """Ages in years (n,) of volumes (n, size, size, size), RAS, float16 as in a store."""
        return self.fusion(variant).predict([self.features(volume) for volume in volumes])

    def contributions(self, volume: np.ndarray, variant: str = "") -> pd.DataFrame:
        """What each triplet adds to one volume's age: `position, first_slice, last_slice, years`.

        The years add up to the predicted age less the model's starting point (early: the SVR's intercept;
        late: the training scans' mean age); NaN where the volume shows no brain.
        """
        fusion = self.fusion(variant)
        first = fusion.positions * SLICES
        years = fusion.contributions(self.features(volume))
        columns = {"position": fusion.positions, "first_slice": first, "last_slice": first + SLICES - 1}
        return pd.DataFrame({**columns, "years": years})

    def save(self, folder: Path | str, *, with_network: bool = False) -> list[Path]:
        """Write arrays and JSON; `with_network` adds VGG16's convolutional weights (59 MB)."""
        from safetensors.numpy import save_file

        paths = [Path(folder) / name for name in (ARRAYS, FACTS)]
        with writing(paths[0]) as temporary:
            save_file(_arrays(self), temporary)
        write_json(_facts(self), paths[1])
        if with_network:
            paths.append(Path(folder) / NETWORK)
            with writing(paths[2]) as temporary:
                save_features(self.network, temporary)
        return paths

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> VggSvr:
        """Read what `save` wrote. Without a copy of the network in the folder, a random projection is drawn
        again and ImageNet weights are fetched.

        Raises
        ------
        WeightsError
            The network at hand is not the one this model was fitted with.
        """
        from safetensors.numpy import load_file

        facts = read_json(Path(folder) / FACTS)
        arrays = load_file(Path(folder) / ARRAYS)
        network = _network(Path(folder), facts["network"]).place(device)
        early = EarlyFusion(
            arrays["early.positions"],
            _svrs(arrays, EARLY, facts[EARLY]["intercepts"])[0],
            Choice(**facts[EARLY]["choice"]),
            facts[EARLY]["inner_mae"],
        )
        late = LateFusion(
            arrays["late.positions"],
            _svrs(arrays, LATE, facts[LATE]["intercepts"]),
            Fusion(**facts[LATE]["fusion"], weights=arrays["late.fusion"]),
            Choice(**facts[LATE]["choice"]),
            facts[LATE]["inner_mae"],
        )
        settings = FeatureSettings(**facts["settings"])
        return cls(early, late, network, settings, facts["spacing_mm"], facts["variant"], facts["facts"])


def _arrays(model: VggSvr) -> dict[str, np.ndarray]:
    arrays = {"early.positions": model.early.positions, "late.positions": model.late.positions}
    arrays["late.fusion"] = model.late.fusion.weights
    for name, svrs in ((EARLY, [model.early.svr]), (LATE, model.late.svrs)):
        for part in ("mean", "scale", "weight"):
            arrays[f"{name}.{part}"] = np.stack([getattr(svr, part) for svr in svrs])
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _facts(model: VggSvr) -> dict[str, Any]:
    described = {
        name: {
            "choice": fitted.choice._asdict(),
            "inner_mae": fitted.inner_mae,
            "intercepts": [svr.intercept for svr in svrs],
        }
        for name, fitted, svrs in (
            (EARLY, model.early, [model.early.svr]),
            (LATE, model.late, model.late.svrs),
        )
    }
    fusion = model.late.fusion
    described[LATE]["fusion"] = {"rule": fusion.rule, "centre": fusion.centre, "slope": fusion.slope}
    network = model.network
    return {
        "variant": model.variant,
        "spacing_mm": model.spacing_mm,
        "settings": asdict(model.settings),
        "network": {
            "weights": network.mode,
            "weights_sha256": network.weights_sha256,
            "pooling": network.pooling,
            "seed": network.seed,
        },
        **described,
        "facts": model.facts,
    }


def _svrs(arrays: dict[str, np.ndarray], name: str, intercepts: list[float]) -> list[LinearSvr]:
    parts = (arrays[f"{name}.{part}"] for part in ("mean", "scale", "weight"))
    return [LinearSvr(*row, intercept) for *row, intercept in zip(*parts, intercepts, strict=True)]


def _network(folder: Path, facts: dict[str, Any]) -> Vgg16Features:
    mode, pooling = facts["weights"], facts["pooling"]
    if (folder / NETWORK).exists():
        network = saved_features(folder / NETWORK, mode, pooling, facts["seed"])
    else:
        network = vgg16_features(mode, pooling=pooling, seed=facts["seed"])
    if network.weights_sha256 != facts["weights_sha256"]:
        raise WeightsError(
            f"The VGG16 weights found have hash {network.weights_sha256[:8]}…, this model was fitted with "
            f"{facts['weights_sha256'][:8]}…. Save the model again where it was fitted, "
            "with its network: `save(folder, with_network=True)`."
        )
    return network
