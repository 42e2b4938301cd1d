"""Who a phantom subject is and how each session was acquired: seeded draws, the rows of `truth.csv`.

Numbers only; `phantom_scan` makes images of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

YOUNGEST, OLDEST = 20.0, 86.0  # years
GAP_SD = 3.75  # years; the mean absolute gap, which is the oracle's MAE, is 0.8 of it
# How far a person of a given brain age departs from the planted curve, in the parameter's own unit.
INDIVIDUAL_SD = {
    "ventricle_mm": 0.38,
    "sulcal_opening": 0.045,
    "grey_white_contrast": 0.0120,
    "lesions": 0.045,
}
ANATOMY = tuple(INDIVIDUAL_SD)  # the columns of truth.csv that ageing drives


@dataclass(frozen=True)
class Site:
    """How one scanner shows a head: contrast, sharpness, noise, and how it stores its files."""

    contrast: float  # grey-white contrast relative to the planted one
    gamma: float  # exponent that bends the intensity scale
    blur_mm: float  # full width at half maximum of the point spread
    noise: float  # standard deviation relative to white matter
    scale: float  # stored value of white matter
    axcodes: tuple[str, ...]
    voxels: tuple[tuple[float, float, float], ...]  # edges x, y, z relative to the cohort's voxel_mm


SITES = {
    "north": Site(1.00, 1.00, 1.0, 0.030, 500, ("RAS", "LAS"), ((1, 1, 1),)),
    "south": Site(0.90, 1.08, 2.2, 0.040, 260, ("PSR", "PIR"), ((1.2, 0.95, 0.95), (1, 1, 1))),
    "west": Site(1.08, 0.93, 1.6, 0.050, 700, ("RAI", "LPI", "ASL"), ((0.95, 0.95, 1.5), (0.9, 1.3, 0.9))),
}


def planted_anatomy(brain_age: np.ndarray | float) -> dict[str, np.ndarray | float]:
    """The mean of each anatomy parameter at a brain age in years.

    Returns
    -------
    dict
        `ventricle_mm`: outward movement of the ventricles' wall, mm, accelerating after 60;
        `sulcal_opening`: share of the cortex next to CSF that gave way to it;
        `grey_white_contrast`: (white - grey) / their mean intensity;
        `lesions`: extent of periventricular lesions, 0 none to 1 all white matter around the ventricles.
    """
    years = np.asarray(brain_age, float) - YOUNGEST
    late = 8.0 * np.logaddexp(0, (years - 40) / 8.0)
    return {
        "ventricle_mm": 0.030 * years + 0.125 * late,
        "sulcal_opening": 0.06 + 0.0085 * years + 0.0050 * late,
        "grey_white_contrast": 0.37 - 0.0026 * years,
        "lesions": 0.04 + 0.0025 * years + 0.0130 * late,
    }


def draw_subject(seed: int, index: int) -> list[dict[str, object]]:
    """The truth about one subject: a row a session (one or two).

    Parameters
    ----------
    seed : int
        The cohort's seed.
    index : int
        The subject's number, from 1. A subject does not depend on how many others there are.
    """
    random = np.random.default_rng((seed, index))
    age = random.uniform(YOUNGEST, OLDEST)
    gap = random.normal(0, GAP_SD)
    sex = str(random.choice(["F", "M"]))
    site = str(random.choice(list(SITES), p=[0.45, 0.33, 0.22]))
    departure = {name: random.normal(0, sd) for name, sd in INDIVIDUAL_SD.items()}
    size = random.normal(1.02 if sex == "M" else 0.985, 0.018)
    stretch = random.normal(1, 0.012, 3)
    sessions = 2 if random.random() < 0.15 else 1
    rows = []
    for session in range(1, sessions + 1):
        now = age + (random.uniform(0.8, 4.0) if session == 2 else 0.0)
        gap_now = gap + (random.normal(0, 0.5) if session == 2 else 0.0)
        anatomy = _at_session(now + gap_now, departure, random if session == 2 else None)
        subject_id, session_id = f"{index:04d}", f"{session:02d}" if sessions == 2 else ""
        rows.append(
            {
                "scan_id": f"{subject_id}_{session_id}" if session_id else subject_id,
                "subject_id": subject_id,
                "session_id": session_id,
                "age": round(now, 2),
                "sex": sex,
                "site": site,
                "brain_age": round(now + gap_now, 3),
                "gap": round(now + gap_now - round(now, 2), 3),
                **anatomy,
                **{f"size_{axis}": round(size * stretch[i], 4) for i, axis in enumerate("xyz")},
            }
        )
    return rows


def _at_session(
    brain_age: float, departure: dict[str, float], random: np.random.Generator | None
) -> dict[str, float]:
    """Planted mean plus the subject's own departure, which varies a little from session to session."""
    mean = planted_anatomy(brain_age)
    jitter = {name: random.normal(0, 0.15 * sd) if random else 0.0 for name, sd in INDIVIDUAL_SD.items()}
    lowest = {"grey_white_contrast": 0.05}
    return {
        name: round(max(float(mean[name] + departure[name] + jitter[name]), lowest.get(name, 0.0)), 5)
        for name in ANATOMY
    }


def draw_acquisition(seed: int, index: int, session: int, site: Site, voxel_mm: float) -> dict[str, object]:
    """How one session was acquired: pose, field of view, storage, bias; lengths in mm, angles in degrees."""
    random = np.random.default_rng((seed, index, session))
    pitch, yaw, roll = random.normal(0, (3.5, 2.0, 2.0))
    neck = random.uniform(65, 100) if random.random() < 0.2 else random.uniform(22, 55)
    margins = {
        "left": random.uniform(20, 40),
        "right": random.uniform(20, 40),
        "back": random.uniform(20, 42),
        "front": random.uniform(26, 55),
        "below": neck,
        "above": random.uniform(18, 42),
    }
    voxels = np.array(site.voxels[random.integers(len(site.voxels))]) * voxel_mm
    return {
        "pitch_deg": round(pitch, 2),
        "yaw_deg": round(yaw, 2),
        "roll_deg": round(roll, 2),
        **{f"margin_{side}_mm": round(value, 1) for side, value in margins.items()},
        **{f"voxel_{axis}_mm": round(float(voxels[i]), 3) for i, axis in enumerate("xyz")},
        "axcodes": str(random.choice(site.axcodes)),
        "oblique_deg": round(random.uniform(-8, 8), 2) if random.random() < 0.2 else 0.0,
        "bias": round(random.uniform(0.06, 0.20), 3),
        "fat": round(random.uniform(0.80, 1.20), 3),
        "table_z_mm": round(random.uniform(-30, 30), 1),
    }
