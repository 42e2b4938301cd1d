"""What a T2w scan adds to a T1w scan where that is known, and whether fusing finds something in nothing.

Twice: with readers of the planted anatomy itself (no images; one knows all signs of ageing but lesions, the
other lesions alone), and with ridge regressions on T1w and T2w heads. The attainable difference is that of
the best regressions on the planted anatomy without lesions and with them. As planted, lesions depart so much
from person to person that they add next to nothing; so the readers are also given lesions that depart by a
tenth. Beside it, on the same people: another person's T2w scan, T2w scans computed from the T1w scan, and T2w
scans that three people in ten lack. All ages are out of fold and fused as notebook 06 does. Says nothing
about people.

Run: `python benchmarks/fusion.py [--quick]`; what is made is kept under `--folder`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.demo.cohort import TRUTH, attainable_ages, draw_truth, image_path, make_demo_cohort
from brainage_nb.demo.scans import planted_anatomy
from brainage_nb.evaluation.fusion import Fusion, fuse_runs
from brainage_nb.evaluation.metrics import mean_with_interval, paired_difference, with_interval
from brainage_nb.evaluation.runs import Run
from brainage_nb.models.network import fit_linear
from brainage_nb.platforms import n_workers
from brainage_nb.volumes.modalities import lay_onto_t1w
from brainage_nb.volumes.preprocessing import preprocess
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import read_csv

SUBJECTS, QUICK_SUBJECTS, SEED, FOLDS = 200, 60, 1, 5
SETTINGS = PreprocessingSettings(spacing_mm=4.0, size=48)
LACK = 0.3  # of the people, who are left without a T2w scan
OWN, ANOTHERS, NEGATIVE, CURVED, PARTLY = KINDS = (
    "own T2w",
    "another person's T2w",
    "T1w as a blurred, noisy negative",
    "T1w along a curve",  # of which a straight line reads something new, as a second model would
    "own T2w, three in ten lack it",
)
READERS, DEPARTURE = 600, 0.1  # subjects of the readers, and how far their lesions depart
NOTHING = 0.25  # years within which a scan that tells nothing new may move the error


def main() -> None:
    """Make the heads, read each scan, fuse, print the tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "out" / "fusion")
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SUBJECTS} subjects")
    options = parser.parse_args()
    subjects = QUICK_SUBJECTS if options.quick else options.subjects
    both = {"voxel_mm": 2, "modalities": ("T1w", "T2w")}
    heads = make_demo_cohort(options.folder / f"heads-{subjects}", subjects, SEED, **both)
    truth = read_csv(heads / TRUTH)
    truth["fold"] = truth["subject_id"].map(deal_folds(truth.groupby("subject_id")["age"].mean(), FOLDS))
    volumes = read_volumes(heads, truth, options.folder / f"volumes-{subjects}.npz")
    usable = np.isfinite(volumes["T2w"]).all(axis=(1, 2, 3))
    print(f"{len(truth)} sessions of {subjects} subjects; {(~usable).sum()} T2w scans fit nowhere")
    truth, t1w, t2w = truth[usable].reset_index(drop=True), volumes["T1w"][usable], volumes["T2w"][usable]
    readers = [judge_readers(READERS, departure) for departure in (None, DEPARTURE)]
    found = judge(truth, t1w, t2w)
    gain, attainable = readers[-1]["gain"], readers[-1]["attainable"]
    reached = gain["low"] > 0 and gain["low"] <= attainable["value"] <= gain["high"]
    verdict = {
        "name": "fusion",
        "value": round(gain["value"], 3),
        "interval": [round(gain["low"], 3), round(gain["high"], 3)],
        "bar": f"above 0, and the attainable {attainable['value']:.3f} within the interval",
        "holds": bool(reached and found["holds"]),
        "unit": f"years of MAE nearer than T1w alone, readers, lesions departing by {DEPARTURE:.0%}",
        "n": gain["n"],
    }
    print(json.dumps(verdict | {"readers": readers, "images": found, "quick": options.quick}))


def judge_readers(subjects: int, departure: float | None) -> dict[str, object]:
    """What fusing brings two readers of the planted anatomy, beside what is attainable; printed and given.

    `departure` is the log-normal spread of lesions between people of one brain age; None: as planted.
    """
    truth = draw_truth(subjects, SEED, voxel_mm=2)
    truth["fold"] = truth["subject_id"].map(deal_folds(truth.groupby("subject_id")["age"].mean(), FOLDS))
    if departure is not None:
        spread = np.random.default_rng(0).normal(0, departure, len(truth))
        truth["lesions"] = planted_anatomy(truth["brain_age"].to_numpy())["lesions"] * np.exp(spread)
    first, whole = attainable_ages(truth.drop(columns="lesions")), attainable_ages(truth)
    second = attainable_ages(truth[["subject_id", "age", "lesions"]])
    fusion = fuse(truth, {"T1w": first, "T2w": second})
    gain = next(row for row in fusion.compare_parts() if row["from"] == "T1w")["gain"]
    attainable = paired_difference(truth["age"], first, whole, truth["subject_id"])
    lesions = "as planted" if departure is None else f"departing by {departure:.0%}"
    words = fusion.whole.combination.words
    print(f"readers, {len(truth)} sessions of {subjects} subjects, lesions {lesions}: fused is nearer by")
    print(f"  {with_interval(gain)} years, attainable {with_interval(attainable)}; {words}")
    return {"departure": departure, "gain": gain, "attainable": attainable}


def read_volumes(heads: Path, truth: pd.DataFrame, kept: Path) -> dict[str, np.ndarray]:
    """Volumes (n, size, size, size) float16 of both scans; NaN for a T2w scan that fits nowhere."""
    if not kept.is_file():
        rows = truth.to_dict("records")
        work = (delayed(read_session)(heads, row) for row in rows)
        done = Parallel(n_jobs=n_workers(0), return_as="generator")(work)
        pairs = [np.stack(pair) for pair in tqdm(done, "sessions", len(rows))]
        first, second = np.stack(pairs, axis=1)
        np.savez(kept, T1w=first, T2w=second)
    return dict(np.load(kept))


def read_session(heads: Path, row: dict[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """T1w and T2w volume of one session, as notebook 03 makes them."""
    t1w = heads / image_path(row)
    volume = preprocess(t1w, SETTINGS)
    try:
        laid = lay_onto_t1w(heads / image_path(row, "T2w"), t1w, "T2w")
        beside = preprocess(laid, SETTINGS.for_modality("T2w"))
    except ScanError as error:
        if error.code != "not_registered":
            raise
        beside = np.full_like(volume, np.nan)
    return volume.astype(np.float16), beside.astype(np.float16)


def read_ages(volumes: np.ndarray, truth: pd.DataFrame) -> np.ndarray:
    """Ages (n,) in years that a ridge regression reads out of fold."""
    batches, ages = torch.from_numpy(np.array(volumes, np.float32))[:, None], np.zeros(len(truth))
    for fold in range(FOLDS):
        out = (truth["fold"] == fold).to_numpy(copy=True)
        taught = truth[~out]
        model = fit_linear(
            batches[torch.from_numpy(~out)].split(64),
            taught["age"].to_numpy(),
            taught["subject_id"].to_numpy(),
            SETTINGS.spacing_mm,
        )
        ages[out] = model(batches[torch.from_numpy(out)]).numpy()
    return ages


def fuse(truth: pd.DataFrame, ages: dict[str, np.ndarray]) -> Fusion:
    """Fuse ages out of fold; NaN where a person lacks the scan."""
    rows = truth[["scan_id", "subject_id", "session_id", "age", "fold"]].assign(split="train", control="yes")
    runs = {
        name: Run(name, {}, pd.DataFrame(), rows.assign(predicted_age=age).dropna(subset=["predicted_age"]))
        for name, age in ages.items()
    }
    return fuse_runs(runs)


def judge(truth: pd.DataFrame, t1w: np.ndarray, t2w: np.ndarray) -> dict[str, object]:
    """Print the tables and give the verdict."""
    rng, age, subjects = np.random.default_rng(0), truth["age"], truth["subject_id"]
    plain, noise = t1w.astype(np.float32), np.random.default_rng(1).normal(0, 0.2, t1w.shape)
    negative = noise - gaussian_filter(plain, (0, 1, 1, 1))
    first, own = read_ages(t1w, truth), read_ages(t2w, truth)
    lack = subjects.isin(rng.permutation(subjects.unique())[: round(LACK * subjects.nunique())])
    seconds = {
        OWN: own,
        ANOTHERS: own[shuffle_people(subjects, rng)],
        NEGATIVE: read_ages(negative, truth),
        CURVED: read_ages(np.tanh(-plain), truth),
        PARTLY: np.where(lack, np.nan, own),
    }
    found = {kind: fuse(truth, {"T1w": first, "second": second}) for kind, second in seconds.items()}
    gains = {
        kind: next(row for row in fusion.compare_parts() if row["from"] == "T1w")
        for kind, fusion in found.items()
    }
    without, all_of_it = attainable_ages(truth.drop(columns="lesions")), attainable_ages(truth)
    attainable = paired_difference(age, without, all_of_it, subjects)
    table = {
        kind: {
            "n": gains[kind]["n"],
            "T1w alone": with_interval(gains[kind]["mae"]),
            "nearer by": with_interval(gains[kind]["gain"]),
            "weights": fusion.whole.combination.words,
        }
        for kind, fusion in found.items()
    }
    print("MAE in years out of fold, 95 % subject bootstrap; nearer: T1w alone minus fused, paired")
    print(pd.DataFrame(table).T.to_string())
    reads = {"T2w alone": own, "attainable without lesions": without, "attainable": all_of_it}
    for name, guess in reads.items():
        print(f"{name}: {with_interval(mean_with_interval(np.abs(guess - age), subjects))}")
    print(f"attainable difference: {with_interval(attainable)}")
    people = pd.DataFrame(found[PARTLY].count_people())
    print(people[["fused_from", "n", "n_subjects", "half_width", "inside"]].to_string(index=False))
    counted = dict(zip(people["fused_from"], people["n"].tolist(), strict=True))
    nothing = max(abs(gains[kind]["gain"]["value"]) for kind in (ANOTHERS, NEGATIVE))
    own_gain = gains[OWN]["gain"]
    holds = own_gain["low"] <= attainable["value"] <= own_gain["high"] and nothing < NOTHING
    return {
        "holds": bool(holds and counted.get("T1w") == int(lack.sum())),
        "gains": {kind: row["gain"] for kind, row in gains.items()},
        "attainable": attainable,
        "people": counted,
    }


def shuffle_people(subjects: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """For each session the place of a session of another person (n,)."""
    names = rng.permutation(subjects.unique())
    other = dict(zip(names, np.roll(names, 1), strict=True))
    first = {name: place for place, name in reversed(list(enumerate(subjects)))}
    return np.array([first[other[name]] for name in subjects])


if __name__ == "__main__":
    main()
