"""One phantom scan: who the subject is, what ageing did to the head, and how the scanner saw it.

Seeded draws make the rows of `truth.csv`, and arrays are made of those rows; files are `cohort`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainage_nb.demo.anatomy import CSF, FAT, GREY, WHITE, Anatomy

YOUNGEST, OLDEST = 20.0, 86.0  # years
GAP_SD = 3.75  # years; the mean absolute gap, which is the oracle's MAE, is 0.8 of it


class Planted(NamedTuple):
    """What ageing drives: an axis label, and how far people of one brain age depart from the mean."""

    label: str
    departure_sd: float  # in the parameter's own unit


ANATOMY = {  # columns of truth.csv
    "ventricle_mm": Planted("ventricle widening [mm]", 0.38),
    "sulcal_opening": Planted("sulcal opening [share]", 0.045),
    "grey_white_contrast": Planted("grey-white contrast [ratio]", 0.0120),
    "lesions": Planted("lesion extent [share]", 0.045),
}


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


class Contrast(NamedTuple):
    """How bright a sequence shows what a head is made of; white matter of a T1w scan is near 0.9."""

    grey: float
    white: float
    fluid: float
    texture: float  # of the brain, as a factor of the T1w scan's
    lesion: float  # added to white matter where a lesion is
    outside: float  # of skull, muscle and skin, as a factor of the T1w scan's
    fat: float


# Here lesions stand out about twice as much as on a T1w scan, and grey and white matter keep their contrast.
CONTRASTS = {
    "T2w": Contrast(0.58, 0.40, 1.0, -0.5, 0.60, 0.45, 0.7),
    "FLAIR": Contrast(0.62, 0.50, 0.12, -0.4, 0.55, 0.50, 0.8),
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


class Visit(NamedTuple):
    """One session: its label, age and gap in years, site, and what draws how far the anatomy departs anew."""

    session_id: str
    age: float
    gap: float
    site: str
    random: np.random.Generator | None = None


def draw_subject(
    seed: int, index: int, *, followed: float = 0.0, rate_sd: float = 0.0
) -> list[dict[str, object]]:
    """The truth about one subject: one row per session.

    Parameters
    ----------
    seed : int
        The cohort's seed.
    index : int
        The subject's number, from 1. A subject does not depend on how many others there are.
    followed, rate_sd : float
        Share of people with two to four sessions over 2 to 9 years, and the spread of their planted `rate`
        (years of brain age a year) about 1. With 0, 15 % have a second session and no rate is planted.
    """
    random = np.random.default_rng((seed, index))
    age = random.uniform(YOUNGEST, OLDEST)
    gap = random.normal(0, GAP_SD)
    sex = str(random.choice(["F", "M"]))
    site = str(random.choice(list(SITES), p=[0.45, 0.33, 0.22]))
    departure = {name: random.normal(0, planted.departure_sd) for name, planted in ANATOMY.items()}
    size = random.normal(1.02 if sex == "M" else 0.985, 0.018)
    stretch = random.normal(1, 0.012, 3)
    subject_id, rows, planted = f"{index:04d}", [], {}
    visits = _visit_twice(random, Visit("", age, gap, site))
    if followed:
        own = np.random.default_rng((seed, index, 50))
        planted["rate"] = round(own.normal(1, rate_sd), 3) if own.random() < followed else np.nan
        visits = _visit_often(own, Visit("", age, gap, site), planted["rate"])
    for visit in visits:
        brain_age = visit.age + visit.gap
        anatomy = _at_session(brain_age, departure, visit.random)
        rows.append(
            {
                "scan_id": f"{subject_id}_{visit.session_id}" if visit.session_id else subject_id,
                "subject_id": subject_id,
                "session_id": visit.session_id,
                "age": round(visit.age, 2),
                "sex": sex,
                "site": visit.site,
                "brain_age": round(brain_age, 3),
                "gap": round(brain_age - round(visit.age, 2), 3),
                **anatomy,
                **{f"size_{axis}": round(size * stretch[i], 4) for i, axis in enumerate("xyz")},
                **planted,
            }
        )
    return rows


def _visit_twice(random: np.random.Generator, first: Visit) -> Iterator[Visit]:
    """The one visit of most people, two of some; draws as it goes, so the anatomy's draws fall between."""
    if random.random() >= 0.15:
        yield first
        return
    yield first._replace(session_id="01")
    age, gap = first.age + random.uniform(0.8, 4.0), first.gap + random.normal(0, 0.5)
    yield Visit("02", age, gap, first.site, random)


def _visit_often(random: np.random.Generator, first: Visit, rate: float) -> Iterator[Visit]:
    """Two to four visits, evenly apart, at which the brain has aged at this rate; one where it is NaN.

    One person in five is scanned at another site from some visit on.
    """
    if np.isnan(rate):
        yield first
        return
    n, span = random.integers(2, 5), random.uniform(2.0, 9.0)
    moved_at = random.integers(1, n) if random.random() < 0.2 else n
    elsewhere = str(random.choice([name for name in SITES if name != first.site]))
    start = min(first.age, OLDEST - span)
    for number, since in enumerate(np.linspace(0, span, n)):
        site = elsewhere if number >= moved_at else first.site
        yield Visit(f"{number + 1:02d}", start + since, first.gap + (rate - 1) * since, site, random)


def _at_session(
    brain_age: float, departure: dict[str, float], random: np.random.Generator | None
) -> dict[str, float]:
    """Planted mean plus the subject's own departure, which varies a little from session to session."""
    mean, now = planted_anatomy(brain_age), {}
    for name, (_, sd) in ANATOMY.items():
        jitter = random.normal(0, 0.15 * sd) if random else 0.0
        least = 0.05 if name == "grey_white_contrast" else 0.0
        now[name] = round(max(float(mean[name] + departure[name] + jitter), least), 5)
    return now


def draw_acquisition(seed: int, index: int, session: int, site: Site, voxel_mm: float) -> dict[str, object]:
    """How one session was acquired: pose, field of view, storage, bias; lengths in mm, angles in degrees."""
    random = np.random.default_rng((seed, index, session))
    turns = dict(zip(("pitch", "yaw", "roll"), random.normal(0, (3.5, 2.0, 2.0)), strict=True))
    neck = random.uniform(65, 100) if random.random() < 0.2 else random.uniform(22, 55)
    room = {"left": (20, 40), "right": (20, 40), "back": (20, 42), "front": (26, 55), "above": (18, 42)}
    margins = {side: random.uniform(*bounds) for side, bounds in room.items()} | {"below": neck}
    voxels = np.array(site.voxels[random.integers(len(site.voxels))]) * voxel_mm
    return {
        **{f"{name}_deg": round(angle, 2) for name, angle in turns.items()},
        **{f"margin_{side}_mm": round(value, 1) for side, value in margins.items()},
        **{f"voxel_{axis}_mm": round(float(edge), 3) for axis, edge in zip("xyz", voxels, strict=True)},
        "axcodes": str(random.choice(site.axcodes)),
        "oblique_deg": round(random.uniform(-8, 8), 2) if random.random() < 0.2 else 0.0,
        "bias": round(random.uniform(0.06, 0.20), 3),
        "fat": round(random.uniform(0.80, 1.20), 3),
        "table_z_mm": round(random.uniform(-30, 30), 1),
    }


def acquire_again(row: dict[str, object], seed: int, modality: str, voxel_mm: float) -> dict[str, object]:
    """A row of `truth.csv` as another sequence of the session finds the head: it has moved a little, and
    slices are thicker.
    """
    session, number = int(row["session_id"] or 1), list(CONTRASTS).index(modality)
    random = np.random.default_rng((seed, int(row["subject_id"]), session, number))
    moves = dict(zip(("pitch_deg", "yaw_deg", "roll_deg"), random.normal(0, 1.5, 3), strict=True))
    moves["table_z_mm"] = random.normal(0, 3.0)
    edges = {f"voxel_{axis}_mm": edge * voxel_mm for axis, edge in zip("xyz", (0.95, 0.95, 1.5), strict=True)}
    return row | {name: float(row[name]) + move for name, move in moves.items()} | edges


DEFORMATION_MM, DEFORMATION_KNOTS_MM = 1.3, 38.0
# Semi-axes and centre (mm, MNI152) of an ellipsoid around the brain; the field of view is set by it.
BRAIN_CENTRE, BRAIN_AXES = np.array([0.0, -17.0, 2.0]), np.array([73.0, 91.0, 82.0])


# --- what ageing did ------------------------------------------------------------------------------------


def aged_head(
    anatomy: Anatomy,
    planted: dict[str, float],
    *,
    contrast: float = 1.0,
    fat: float = 1.0,
    random: np.random.Generator | None = None,
    modality: str = "T1w",
) -> np.ndarray:
    """The template head with planted tissue changes (all but the ventricles' widening), in template space.

    Parameters
    ----------
    anatomy : Anatomy
        The template head.
    planted : dict
        `sulcal_opening`, `grey_white_contrast` and `lesions`, as `planted_anatomy` gives them.
    contrast : float
        What the scanner makes of the grey-white contrast, as a factor.
    fat : float
        Brightness of fat relative to the usual.
    random : Generator, optional
        Draws where lesions lie; without it they follow the distance from the ventricles only.
    modality : str
        T1w, or a key of `CONTRASTS`.

    Returns
    -------
    (nx, ny, nz) float32 array
        Intensities, white matter of a T1w scan near 0.9.
    """
    middle, half = (GREY + WHITE) / 2, 0.5 * planted["grey_white_contrast"] * contrast
    t1w = Contrast(middle * (1 - half), middle * (1 + half), CSF, 1.0, -0.30, 1.0, FAT)
    shown = CONTRASTS.get(modality, t1w)
    grey = anatomy.grey * (1 - planted["sulcal_opening"] * anatomy.sulci)
    fluid = anatomy.inside - grey - anatomy.white
    inside = shown.grey * grey + shown.white * anatomy.white
    inside += shown.fluid * fluid
    inside += shown.texture * anatomy.texture
    inside += (shown.lesion * lesion_map(anatomy, planted["lesions"], random)) * anatomy.white
    head = shown.outside * anatomy.head + np.float32(shown.fat * fat) * anatomy.fat
    head[anatomy.brain] += inside
    return head


def lesion_map(anatomy: Anatomy, extent: float, random: np.random.Generator | None = None) -> np.ndarray:
    """Periventricular lesions, 0..1, in the brain's box: where nearness to a ventricle passes 1 - extent."""
    near = anatomy.periventricular
    if random is not None:
        patches = smooth_random(random, near.shape, 11.0 / anatomy.voxel_mm)
        near = near * (1 + 0.35 * patches)
    return np.clip(4.0 * (near - (1 - extent)), 0, 1)


def displacement(
    anatomy: Anatomy, ventricle_mm: float, random: np.random.Generator | None = None
) -> np.ndarray:
    """Where to look in the template, minus where one is, in mm: widened ventricles and a person's own shape.

    Returns
    -------
    (3, nx, ny, nz) float32 array on the grid of `anatomy.field_affine`
    """
    field = -np.float32(ventricle_mm) * anatomy.widening
    if random is None:
        return field
    knots = DEFORMATION_KNOTS_MM / anatomy.field_affine[0, 0]
    shape = field.shape[1:]
    return field + np.float32(DEFORMATION_MM) * np.stack([smooth_random(random, shape, knots) for _ in "xyz"])


def mean_head(anatomy: Anatomy, brain_age: float, modality: str = "T1w") -> np.ndarray:
    """The mean head of a brain age on the template's own grid, without pose, a person's own shape or scanner.

    Returns
    -------
    (nx, ny, nz) float32 array
        Intensities as `aged_head`'s, on the grid of `anatomy.affine`.
    """
    planted = planted_anatomy(brain_age)
    head = aged_head(anatomy, planted, modality=modality)
    field = displacement(anatomy, planted["ventricle_mm"])
    return sample_head(anatomy, head, field, head.shape, anatomy.affine)


# --- how the scanner saw it -----------------------------------------------------------------------------


def scan_head(
    anatomy: Anatomy, truth: dict[str, object], seed: int, modality: str = "T1w"
) -> tuple[np.ndarray, np.ndarray]:
    """Acquire one scan.

    Parameters
    ----------
    anatomy : Anatomy
        The template head.
    truth : dict
        A row of `truth.csv`: the subject's and the acquisition's draws.
    seed : int
        The cohort's seed. With the subject it fixes the shape, with the session also noise and bias field.
    modality : str
        T1w, or a key of `CONTRASTS`: the same head, acquired again (`acquire_again`).

    Returns
    -------
    image : int16 array, axes right, front, up
        Stored values; noise is Rician.
    affine : (4, 4) array
        Voxel index -> scanner position in mm.
    """
    site, index, session = SITES[str(truth["site"])], int(truth["subject_id"]), int(truth["session_id"] or 1)
    own, draws = np.random.default_rng((seed, index, 90)), 100
    if modality != "T1w":
        truth = acquire_again(truth, seed, modality, anatomy.voxel_mm)
        draws = 200 + 100 * list(CONTRASTS).index(modality)
    shown = {"contrast": site.contrast, "fat": float(truth["fat"]), "modality": modality}
    head = aged_head(anatomy, truth, **shown, random=own)
    field = displacement(anatomy, float(truth["ventricle_mm"]), own)
    shape, affine, to_template = place_scan(truth)
    image = sample_head(anatomy, head, field, shape, to_template)
    random = np.random.default_rng((seed, index, draws + session))
    voxels = np.linalg.norm(affine[:3, :3], axis=0)
    width = np.hypot(site.blur_mm, 0.6 * np.maximum(voxels - anatomy.voxel_mm, 0)) / 2.355
    image = ndimage.gaussian_filter(image, width / voxels, truncate=3.0)
    knots = 70.0 / voxels
    image = np.maximum(image, 0) ** np.float32(site.gamma)
    image *= np.exp(float(truth["bias"]) * smooth_random(random, shape, knots))
    noise = site.noise * random.standard_normal((2, *shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])
    return np.clip(image * site.scale, 0, 32767).astype(np.int16), affine


def place_scan(truth: dict[str, object]) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Grid shape, its affine in the scanner, and the map from its indices to template mm (both 4x4)."""
    turn = _rotation(*(float(truth[f"{name}_deg"]) for name in ("pitch", "yaw", "roll")))
    pose = turn * np.array([float(truth[f"size_{axis}"]) for axis in "xyz"])
    reach = np.sqrt(((pose * BRAIN_AXES) ** 2).sum(axis=1))
    low, high = (("left", "back", "below"), ("right", "front", "above"))
    start = -reach - [float(truth[f"margin_{side}_mm"]) for side in low]
    stop = reach + [float(truth[f"margin_{side}_mm"]) for side in high]
    voxels = np.array([float(truth[f"voxel_{axis}_mm"]) for axis in "xyz"])
    shape = tuple(int(n) for n in np.ceil((stop - start) / voxels))
    scanner = from_matvec(_rotation(float(truth["oblique_deg"])), [0, 0, float(truth["table_z_mm"])])
    grid = from_matvec(np.diag(voxels), start)
    return shape, scanner @ grid, from_matvec(np.linalg.inv(pose), BRAIN_CENTRE) @ grid


def _rotation(pitch: float, yaw: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Rotation matrix (3, 3) of angles in degrees about x, z and y, in this order from right to left."""
    return Rotation.from_euler("ZYX", [yaw, roll, pitch], degrees=True).as_matrix()


def sample_head(
    anatomy: Anatomy, head: np.ndarray, field: np.ndarray, shape: tuple[int, ...], to_template: np.ndarray
) -> np.ndarray:
    """The head at every voxel of a scan; where to look is worked out on every few voxels, then refined."""
    steps = np.maximum(1, np.round(4.0 / np.linalg.norm(to_template[:3, :3], axis=0))).astype(int)
    coarse = [np.arange(0, n + step, step, dtype=np.float32) for n, step in zip(shape, steps, strict=True)]
    position = _apply_affine(to_template, np.stack(np.meshgrid(*coarse, indexing="ij")))
    on_field = _apply_affine(np.linalg.inv(anatomy.field_affine), position)
    moves = [ndimage.map_coordinates(part, on_field, order=1, mode="nearest") for part in field]
    on_head = _apply_affine(np.linalg.inv(anatomy.affine), position + np.stack(moves)).astype(np.float32)
    weights = [_interpolation(n, step, len(axis)) for n, step, axis in zip(shape, steps, coarse, strict=True)]
    fine = np.stack([_blend_knots(part, weights) for part in on_head])
    return ndimage.map_coordinates(head, fine, order=1, mode="nearest", prefilter=False)


def _apply_affine(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A 4x4 affine applied to points of shape (3, …)."""
    return np.tensordot(affine[:3, :3], points, axes=1) + affine[:3, 3].reshape(3, 1, 1, 1)


def smooth_random(
    random: np.random.Generator, shape: tuple[int, ...], knots: np.ndarray | float
) -> np.ndarray:
    """A smooth random image of variance one, float32: white noise on knots (voxels apart), blended."""
    knots = np.broadcast_to(knots, 3)
    bases = []
    for n, apart in zip(shape, knots, strict=True):
        at = np.arange(-apart, n + apart, apart)
        basis = np.exp(-0.5 * ((np.arange(n)[:, None] - at) / (0.7 * apart)) ** 2)
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    draws = random.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    return _blend_knots(draws, bases)


def _blend_knots(knots: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    """Apply one (n, k) matrix along each of the three axes."""
    return np.ascontiguousarray(np.einsum("ai,bj,ck,ijk->abc", *bases, knots, optimize=True))


def _interpolation(n: int, step: int, knots: int) -> np.ndarray:
    """Weights (n, knots) of linear interpolation between values at every `step`-th of n voxels."""
    distance = np.abs(np.arange(n)[:, None] / step - np.arange(knots))
    return np.clip(1 - distance, 0, None).astype(np.float32)
