"""The known-answer cohort: T1-like heads aged by known rules, in a BIDS-like folder beside the truth.

A test object for the whole kit. How well a model does on it says nothing about people.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from tqdm import tqdm

from brainage_nb.cohort.phantom_anatomy import Anatomy, template_anatomy
from brainage_nb.cohort.phantom_scan import aged_head, displacement, sample_head, scan_head
from brainage_nb.cohort.phantom_subject import (
    ANATOMY,
    OLDEST,
    SITES,
    YOUNGEST,
    draw_acquisition,
    draw_subject,
    planted_anatomy,
)
from brainage_nb.workspace import n_workers, read_json, write_csv, write_json, write_text, writing

RECIPE = 1  # raised whenever the same seed would give other files
DESCRIPTION, TRUTH, PARTICIPANTS, AGEING_MAP = (
    "dataset_description.json",
    "truth.csv",
    "participants.tsv",
    "derivatives/ageing_map.nii.gz",
)
README = """\
The known-answer cohort of brainage_nb: invented heads, no people.

The brain is the MNI152 template that nilearn ships; skull, scalp, face and neck are drawn around it.
Each subject has an age and a planted brain age (age + gap). The brain age drives four things, each with
the subject's own departure from the mean:

  ventricle_mm          the ventricles' wall moves outward (mm), faster after 60
  sulcal_opening        cortex next to CSF gives way to CSF (share, 0 to 1)
  grey_white_contrast   (white - grey) / their mean falls
  lesions               dark periventricular lesions grow (extent, 0 to 1)

Head size and pose, smooth differences of shape, field of view, bias field, noise and the scanner site do
not depend on age.

participants.tsv    a row a subject and session: age (years), sex, site
truth.csv           a row a scan: brain age, gap (years), every planted parameter and nuisance
derivatives/ageing_map.nii.gz
                    where ageing was planted, 0 to 1, in MNI152 space: the mean change of intensity from
                    brain age 20 to 86 without nuisances, smoothed by 2 mm
"""


def make_cohort(
    folder: Path | str,
    n_subjects: int = 200,
    seed: int = 1,
    *,
    voxel_mm: float = 1.0,
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
    n_jobs : int
        Worker processes; 0 for as many as there are processors.

    Returns
    -------
    Path
        The folder: `sub-0001[/ses-01]/anat/*_T1w.nii.gz`, `participants.tsv`, `truth.csv`,
        `derivatives/ageing_map.nii.gz` and a `README` that says in words what is planted.

    Raises
    ------
    ValueError
        The folder holds a cohort of other settings, or a setting is out of range.
    """
    folder = Path(folder)
    if voxel_mm not in (1, 2):
        raise ValueError(f"voxel_mm = {voxel_mm}: the known-answer cohort comes at 1 or 2 mm.")
    if not 1 <= n_subjects <= 9999:
        raise ValueError(f"n_subjects = {n_subjects}: give a number from 1 to 9999.")
    _begin(folder, {"seed": int(seed), "voxel_mm": int(voxel_mm), "recipe": RECIPE}, n_subjects)
    truth = draw_truth(n_subjects, seed, voxel_mm=voxel_mm)
    rows = [row for row in truth.to_dict("records") if not (folder / image_path(row)).exists()]
    if rows or not (folder / AGEING_MAP).exists():
        anatomy = template_anatomy(int(voxel_mm))
        work = (delayed(_write_scan)(anatomy, row, seed, folder / image_path(row)) for row in rows)
        done = Parallel(n_jobs=n_workers(n_jobs), return_as="generator")(work)
        for _ in tqdm(done, total=len(rows), desc="known-answer heads", unit="scan"):
            pass
        _write_map(anatomy, folder / AGEING_MAP)
    write_csv(truth, folder / TRUTH)
    participants = _participants(truth)
    write_text(participants.to_csv(sep="\t", index=False, lineterminator="\n"), folder / PARTICIPANTS)
    return folder


def draw_truth(n_subjects: int, seed: int, *, voxel_mm: float) -> pd.DataFrame:
    """The content of `truth.csv`: a row a scan, every planted parameter and nuisance; ages in years."""
    rows = []
    for index in range(1, n_subjects + 1):
        for row in draw_subject(seed, index):
            session = int(row["session_id"] or 1)
            site = SITES[str(row["site"])]
            rows.append(row | draw_acquisition(seed, index, session, site, voxel_mm))
    return pd.DataFrame(rows)


def image_path(row: dict[str, object]) -> Path:
    """Where a row's scan lies in the cohort's folder."""
    parts = [f"sub-{row['subject_id']}"] + ([f"ses-{row['session_id']}"] if row["session_id"] else [])
    return Path(*parts, "anat", "_".join([*parts, "T1w.nii.gz"]))


def ageing_map(anatomy: Anatomy) -> np.ndarray:
    """Where ageing was planted: mean change of intensity from the youngest to the oldest brain age, 0..1.

    The four parameters change one at a time and their absolute changes add up, so that none hides another.

    Returns
    -------
    float32 array on the grid of `anatomy.affine`
    """
    young, old = planted_anatomy(YOUNGEST), planted_anatomy(OLDEST)
    before = _without_nuisance(anatomy, young)
    change = sum(np.abs(_without_nuisance(anatomy, young | {name: old[name]}) - before) for name in ANATOMY)
    smooth = ndimage.gaussian_filter(change, 2.0 / anatomy.voxel_mm)
    return np.clip(smooth / np.percentile(smooth[smooth > 0], 99.9), 0, 1).astype(np.float32)


def _without_nuisance(anatomy: Anatomy, planted: dict[str, float]) -> np.ndarray:
    head = aged_head(anatomy, planted)
    return sample_head(
        anatomy, head, displacement(anatomy, planted["ventricle_mm"]), head.shape, anatomy.affine
    )


def _begin(folder: Path, settings: dict[str, int], n_subjects: int) -> None:
    """Claim the folder for these settings, or say what differs from the cohort that lies there."""
    described = folder / DESCRIPTION
    if described.exists():
        there = read_json(described).get("GeneratedBy", [{}])[0].get("Settings", {})
        other = {
            name: (there.get(name), value) for name, value in settings.items() if there.get(name) != value
        }
        if other:
            differs = ", ".join(f"{name} is {old}, asked for {new}" for name, (old, new) in other.items())
            raise ValueError(
                f"{folder} holds another cohort ({differs}). Choose another folder or remove it."
            )
        present = len(list(folder.glob("sub-*")))
        if present > n_subjects:
            raise ValueError(
                f"{folder} already holds {present} subjects of this cohort, asked for {n_subjects}. "
                "Choose another folder, or ask for at least as many."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no known-answer cohort. Choose an empty or new folder."
        )
    made_by = {"Name": "brainage_nb.cohort.phantom", "Settings": settings}
    description = {"Name": "brainage_nb known-answer cohort", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    write_json(description | {"GeneratedBy": [made_by]}, described)
    write_text(README, folder / "README")


def _write_scan(anatomy: Anatomy, row: dict[str, object], seed: int, path: Path) -> None:
    data, affine = scan_head(anatomy, row, seed)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    turned = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(str(row["axcodes"]))))
    _write_image(image.as_reoriented(turned), path)


def _write_map(anatomy: Anatomy, path: Path) -> None:
    image = nib.Nifti1Image(ageing_map(anatomy), anatomy.affine)
    image.header.set_xyzt_units("mm", "sec")
    _write_image(image, path)


def _write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Whole or not at all; no time stamp inside, so that the same image gives the same bytes."""
    with writing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _participants(truth: pd.DataFrame) -> pd.DataFrame:
    shared = truth[["session_id", "age", "sex", "site"]].replace({"session_id": {"": "n/a"}})
    shared.insert(0, "participant_id", "sub-" + truth["subject_id"])
    return shared
