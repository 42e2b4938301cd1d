"""The known-answer cohort: T1-like heads aged by known rules, in a BIDS-like folder beside the truth.

A test object for the whole kit. How well a model does on it says nothing about people.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tqdm import tqdm

from brainage_nb.demo.anatomy import Anatomy, template_anatomy
from brainage_nb.demo.scans import (
    ANATOMY,
    CONTRASTS,
    OLDEST,
    SITES,
    YOUNGEST,
    draw_acquisition,
    draw_subject,
    place_scan,
    planted_anatomy,
    scan_head,
)
from brainage_nb.drawing import BLUE
from brainage_nb.platforms import n_workers
from brainage_nb.workspace import read_json, write_csv, write_json, write_text, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = 2  # raised whenever the same seed would give other files
DESCRIPTION, TRUTH, PARTICIPANTS = "dataset_description.json", "truth.csv", "participants.tsv"
FEWEST_ATTAINABLE = 20  # subjects: two in each fold
SHOWN_MM = (4.0, -14.0, 14.0)  # MNI152 point whose three slices are shown: they cut the lateral ventricles


def make_demo_cohort(
    folder: Path | str,
    n_subjects: int = 200,
    seed: int = 1,
    *,
    voxel_mm: float = 1.0,
    followed: float = 0.0,
    rate_sd: float = 0.0,
    modalities: Sequence[str] = ("T1w",),
    n_jobs: int = 0,
) -> Path:
    """Write the known-answer cohort, or finish one that was begun with the same settings.

    Parameters
    ----------
    folder : path
        Where to write; an existing cohort there is kept, and grown where `n_subjects` is larger.
    n_subjects : int
        Number of subjects; about 15 % of them have a second session, one to four years later.
    seed : int
        With the subject's number it fixes everything about a subject, whatever the jobs and subjects beside.
    voxel_mm : 1 or 2
        Usual voxel edge in mm: 1 is realistic, 2 is the fast form for demo and tests.
    followed, rate_sd : float
        Share of people with two to four sessions over 2 to 9 years instead, one in five of them on another
        scanner later, and the spread of their planted rates of ageing (column `rate` of `truth.csv`).
    n_jobs : int
        Worker processes; 0 for as many as there are processors.
    modalities : sequence of str
        What is scanned in each session: T1w, and what else of `CONTRASTS` (T2w, FLAIR) is named.

    Returns
    -------
    Path
        The folder: `sub-0001[/ses-01]/anat/*_T1w.nii.gz` (and `*_T2w`, ...), `participants.tsv`, `truth.csv`
        and a `README` that says in words what is planted.

    Raises
    ------
    ValueError
        The folder holds a cohort of other settings, or a setting is out of range.

    Examples
    --------
    >>> make_demo_cohort("demo", n_subjects=220, voxel_mm=2)  # doctest: +SKIP
    PosixPath('demo')
    """
    folder = Path(folder)
    if voxel_mm not in (1, 2):
        raise ValueError(f"voxel_mm = {voxel_mm}: the known-answer cohort comes at 1 or 2 mm.")
    if not 1 <= n_subjects <= 9999:
        raise ValueError(f"n_subjects = {n_subjects}: give a number from 1 to 9999.")
    if not (0 <= followed <= 1 and 0 <= rate_sd <= 2):
        raise ValueError(
            f"followed = {followed}, rate_sd = {rate_sd}: give a share from 0 to 1, and a spread from 0 to 2."
        )
    visits = {"followed": followed, "rate_sd": rate_sd} if followed else {}
    _begin(folder, {"seed": int(seed), "voxel_mm": int(voxel_mm), "recipe": RECIPE} | visits, n_subjects)
    truth = draw_truth(n_subjects, seed, voxel_mm=voxel_mm, **visits)
    shown = ["T1w", *(name for name in CONTRASTS if name in modalities)]
    scans = [(row, name) for row in truth.to_dict("records") for name in shown]
    scans = [scan for scan in scans if not (folder / image_path(*scan)).exists()]
    if scans:
        anatomy = template_anatomy(int(voxel_mm))
        work = (delayed(write_scan)(anatomy, *scan, seed, folder / image_path(*scan)) for scan in scans)
        done = Parallel(n_jobs=n_workers(n_jobs), return_as="generator")(work)
        for _ in tqdm(done, total=len(scans), desc="known-answer heads", unit="scan"):
            pass
    write_csv(truth, folder / TRUTH)
    participants = _participants(truth)
    write_text(participants.to_csv(sep="\t", index=False, lineterminator="\n"), folder / PARTICIPANTS)
    return folder


def draw_truth(n_subjects: int, seed: int, *, voxel_mm: float, **visits: float) -> pd.DataFrame:
    """The content of `truth.csv`: one row per scan, every planted parameter and nuisance; ages in years.

    `followed` and `rate_sd` are as in `draw_subject`.
    """
    rows = []
    for index in range(1, n_subjects + 1):
        for row in draw_subject(seed, index, **visits):
            session = int(row["session_id"] or 1)
            site = SITES[str(row["site"])]
            rows.append(row | draw_acquisition(seed, index, session, site, voxel_mm))
    return pd.DataFrame(rows)


def image_path(row: dict[str, object], modality: str = "T1w") -> Path:
    """Where a row's scan lies in the cohort's folder."""
    parts = [f"sub-{row['subject_id']}"] + ([f"ses-{row['session_id']}"] if row["session_id"] else [])
    return Path(*parts, "anat", "_".join([*parts, f"{modality}.nii.gz"]))


def _begin(folder: Path, settings: dict[str, float], n_subjects: int) -> None:
    """Claim the folder for these settings, or say what differs from the cohort that lies there."""
    there = settings
    if (folder / DESCRIPTION).exists():
        there = read_json(folder / DESCRIPTION).get("GeneratedBy", [{}])[0].get("Settings", {})
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no known-answer cohort. Choose an empty or new folder."
        )
    differing = [name for name in settings | there if there.get(name) != settings.get(name)]
    if differing:
        differs = ", ".join(f"{n} is {there.get(n)}, asked for {settings.get(n)}" for n in differing)
        raise ValueError(f"{folder} holds another cohort ({differs}). Choose another folder or remove it.")
    if (present := len(list(folder.glob("sub-*")))) > n_subjects:
        raise ValueError(
            f"{folder} already holds {present} subjects of this cohort, asked for {n_subjects}. "
            "Choose another folder, or ask for at least as many."
        )
    made_by = {"Name": "brainage_nb.demo.cohort", "Settings": settings}
    description = {"Name": "brainage_nb known-answer cohort", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    write_json(description | {"GeneratedBy": [made_by]}, folder / DESCRIPTION)
    write_text((files(__package__) / "README.txt").read_text(encoding="utf-8"), folder / "README")


def write_scan(anatomy: Anatomy, row: dict[str, object], modality: str, seed: int, path: Path) -> None:
    """Write the scan of one row of `truth.csv`; arguments as in `scan_head`."""
    data, affine = scan_head(anatomy, row, seed, modality)
    turned = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(str(row["axcodes"]))))
    _write_image(nib.Nifti1Image(data, affine).as_reoriented(turned), path)


def _write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Whole or not at all; no time stamp inside, so that the same image gives the same bytes."""
    image.header.set_xyzt_units("mm", "sec")
    with writing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _participants(truth: pd.DataFrame) -> pd.DataFrame:
    shared = truth[["session_id", "age", "sex", "site"]].replace({"session_id": {"": "n/a"}})
    shared.insert(0, "participant_id", "sub-" + truth["subject_id"])
    return shared


# --- what can be reached --------------------------------------------------------------------------------


def oracle_mae(truth: pd.DataFrame) -> float:
    """MAE in years of the true brain age reported as the age: the mean absolute planted gap.

    >>> oracle_mae(pd.DataFrame({"gap": [2.0, -4.0]}))
    3.0
    """
    return float(truth["gap"].abs().mean())


def mean_predictor_mae(truth: pd.DataFrame) -> float:
    """MAE in years of always saying the mean age; a subject counts once in that mean.

    >>> mean_predictor_mae(pd.DataFrame({"subject_id": ["1", "2"], "age": [40.0, 60.0]}))
    10.0
    """
    mean_age = truth.groupby("subject_id")["age"].mean().mean()
    return float((truth["age"] - mean_age).abs().mean())


def attainable_mae(truth: pd.DataFrame) -> float:
    """MAE in years of `attainable_ages`.

    >>> attainable_mae(draw_truth(200, 1, voxel_mm=2)) < 4
    True
    """
    return float(np.abs(attainable_ages(truth) - truth["age"]).mean())


def attainable_ages(truth: pd.DataFrame) -> np.ndarray:
    """Ages (n,) in years that the best regression on the planted anatomy reads off each scan, cross-validated
    by subject over the whole cohort.

    The parameters carry each person's own departure, so a model that reads them without error is still off by
    this much. Tried: a straight line, splines, products of two parameters, each with a penalty chosen by
    itself; the best of them over all scans counts.

    Parameters
    ----------
    truth : DataFrame
        The content of `truth.csv`, of at least `FEWEST_ATTAINABLE` subjects.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, SplineTransformer, StandardScaler

    if (n := truth["subject_id"].nunique()) < FEWEST_ATTAINABLE:
        raise ValueError(f"{n} subjects are too few for ten folds: at least {FEWEST_ATTAINABLE}.")
    ridge = RidgeCV(np.logspace(-4, 3, 15))
    splines = SplineTransformer(n_knots=4, knots="quantile", extrapolation="linear")
    models = (
        make_pipeline(StandardScaler(), ridge),
        make_pipeline(splines, StandardScaler(), ridge),
        make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), ridge),
    )
    planted, age = truth[[name for name in ANATOMY if name in truth]].to_numpy(), truth["age"].to_numpy()
    cut = GroupKFold(10, shuffle=True, random_state=0)
    ages = [cross_val_predict(model, planted, age, groups=truth["subject_id"], cv=cut) for model in models]
    return min(ages, key=lambda read: np.abs(read - age).mean())


# --- pictures -------------------------------------------------------------------------------------------


def draw_planted(folder: Path | str, truth: pd.DataFrame, figure: Figure, n: int = 5) -> Figure:
    """Draw heads of the cohort, youngest to oldest, over what each planted parameter does with age.

    The heads are cut in three planes, in mm, front or crown upwards.

    Parameters
    ----------
    folder : path
        Where `make_demo_cohort` wrote.
    truth : DataFrame
        Its `truth.csv`.
    figure : Figure
        Empty, about 11 x 10 inches, with `layout="constrained"`; it is filled and returned.
    n : int
        Number of heads, evenly spread over the scans.

    Examples
    --------
    >>> figure = plt.figure(figsize=(11, 10), layout="constrained")  # doctest: +SKIP
    >>> draw_planted("demo", read_csv("demo/truth.csv"), figure)  # doctest: +SKIP
    """
    n = min(n, len(truth))
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    above.suptitle(f"Known-answer cohort: {n} of {len(truth)} invented heads, by age")
    below.suptitle(f"What is planted (points: n = {len(truth)} scans; line: mean at brain age = age)")
    chosen = truth.sort_values("age").iloc[np.linspace(0, len(truth) - 1, n).round().astype(int)]
    columns = above.subplots(3, n, squeeze=False).T
    for row, column in zip(chosen.to_dict("records"), columns, strict=True):
        _draw_head(column, row, Path(folder) / image_path(row))
    ages = np.linspace(YOUNGEST, OLDEST, 100)
    for parameter, ax in zip(ANATOMY, below.subplots(1, len(ANATOMY)), strict=True):
        ax.scatter(truth["age"], truth[parameter], s=8, alpha=0.6, color=BLUE, linewidths=0)
        ax.plot(ages, planted_anatomy(ages)[parameter], color="black", linewidth=1.5)
        ax.set(xlabel="age [years]", ylabel=ANATOMY[parameter].label.replace(" [", "\n["))
    return figure


def _draw_head(column: np.ndarray, row: dict[str, Any], path: Path) -> None:
    """Three planes of one head through `SHOWN_MM`, one in each Axes of the column."""
    image = nib.as_closest_canonical(nib.load(path))
    head, edges = np.asanyarray(image.dataobj), image.header.get_zooms()
    extent, brightest = np.array(head.shape) * edges, np.percentile(head, 99.5)
    centre = np.linalg.solve(place_scan(row)[2], [*SHOWN_MM, 1.0])[:3].round().astype(int)
    title = f"age {row['age']:.0f}, brain age {row['brain_age']:.0f}\nsite {row['site']}"
    column[0].set_title(title, fontsize=9)
    for ax, across in zip(column, (2, 1, 0), strict=True):
        width, height = np.delete(extent, across)
        shown = np.take(head, centre[across], axis=across).T
        ax.imshow(shown, "gray", origin="lower", vmin=0, vmax=brightest, extent=(0, width, 0, height))
        ax.set_axis_off()
