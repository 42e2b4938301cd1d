"""Can the heat maps be believed? Sanity checks, and a score against ageing planted in the known-answer
cohort.

Only the known-answer cohort can answer where the age *should* come from; on people nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.cohort.phantom import TRUTH
from brainage_nb.models.explaining.groups import brain_mask, in_template, template_grid
from brainage_nb.models.explaining.heat_maps import edge_map, grad_cam, randomised

if TYPE_CHECKING:
    from brainage_nb.models.bundle import Bundle
    from brainage_nb.volumes.preprocessing import PreprocessingSettings
    from brainage_nb.volumes.store import VolumeStore

HEAT, EDGES, RANDOM = "Grad-CAM of the model", "edges of the scan", "Grad-CAM, weights randomised"


def planted_places(
    cohort: Path | str,
    scans: pd.DataFrame,
    resolve: Callable[[str], Path],
    settings: PreprocessingSettings,
) -> dict[str, np.ndarray]:
    """Where each known-answer head lies: scan id -> affine (4, 4) from its cube's voxels to MNI152 mm.

    From the planted pose and size, so no registration error is mixed into the score.

    Parameters
    ----------
    cohort : path
        The known-answer cohort's folder.
    scans : DataFrame
        `scan_id, image`.
    resolve : callable
        From an `image` cell to a path.
    """
    from brainage_nb.cohort.phantom_scan import place_scan
    from brainage_nb.volumes.preprocessing import grid_affine

    truth = pd.read_csv(
        Path(cohort) / TRUTH, dtype={"scan_id": str, "subject_id": str, "session_id": str}
    ).set_index("scan_id")
    places = {}
    for row in scans.itertuples():
        _, scanner, to_template = place_scan(truth.loc[row.scan_id].to_dict())
        cube = grid_affine(resolve(row.image), settings)
        places[row.scan_id] = to_template @ np.linalg.inv(scanner) @ cube
    return places


def planted_check(
    bundle: Bundle,
    store: VolumeStore,
    places: dict[str, np.ndarray],
    ageing_map: Path | str,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """How well heat falls where ageing was planted: the model's, that of edges, that of random weights.

    Parameters
    ----------
    places : mapping
        Scans to use and where they lie, from `planted_places`; give test scans.
    ageing_map : path
        The cohort's `ageing_map.nii.gz`.
    seed : int
        Of the random weights.

    Returns
    -------
    DataFrame
        `map, inside, n, auc_of_mean, auc_of_scans`: area under the ROC curve, 0.5 is chance, of the mean
        absolute map over scans and the mean over scans, inside the head and inside the brain alone. Inside
        the brain much of the planted ageing lies along sulci, where edges are, so edges are hard to beat
        there.
    """
    networks = bundle.model.networks
    drawn = [randomised(network, seed) for network in networks]
    makers = {
        HEAT: lambda volume: grad_cam(networks, volume),
        EDGES: edge_map,
        RANDOM: lambda volume: grad_cam(drawn, volume),
    }
    planted = on_template(ageing_map)
    volumes = {scan_id: np.asarray(store[scan_id], np.float32) for scan_id in places}
    head = np.mean([in_template(volume > 0, places[name]) for name, volume in volumes.items()], axis=0) > 0.3
    rows = []
    for name, make in makers.items():
        maps = [in_template(np.abs(make(volume)), places[scan]) for scan, volume in volumes.items()]
        for inside, mask in {"head": head, "brain": head & brain_mask()}.items():
            each = float(np.mean([localisation(heat, planted, mask) for heat in maps]))
            rows.append((name, inside, len(maps), localisation(np.mean(maps, axis=0), planted, mask), each))
    return pd.DataFrame(rows, columns=["map", "inside", "n", "auc_of_mean", "auc_of_scans"])


def on_template(image: Path | str) -> np.ndarray:
    """A NIfTI image in MNI152 space, on the template grid."""
    import nibabel as nib
    from scipy import ndimage

    loaded = nib.load(image)
    shape, affine = template_grid()
    matrix = np.linalg.inv(loaded.affine) @ affine
    return ndimage.affine_transform(loaded.get_fdata(dtype=np.float32), matrix, output_shape=shape, order=1)


def localisation(heat: np.ndarray, planted: np.ndarray, inside: np.ndarray, *, above: float = 0.2) -> float:
    """Area under the ROC curve of absolute heat against where ageing was planted; 0.5 is chance.

    Parameters
    ----------
    heat, planted : arrays of one shape
    inside : bool array
        Where it is asked, such as the head; background is easily right and says nothing.
    above : float
        Planted change that counts as ageing (1 is the largest).
    """
    from scipy.stats import rankdata

    strength, true = np.abs(heat[inside]), planted[inside] > above
    n_true = int(true.sum())
    if not 0 < n_true < len(true):
        raise ValueError(f"{n_true} of {len(true)} voxels have planted ageing; a curve needs both kinds.")
    ranks = rankdata(strength)
    return float((ranks[true].sum() - n_true * (n_true + 1) / 2) / (n_true * (len(true) - n_true)))
