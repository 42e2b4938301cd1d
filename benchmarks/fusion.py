"""What a T2w scan adds to a T1w scan where that is known, and whether fusing finds something in nothing.

With readers of the planted signs of ageing themselves (no images; one knows all signs but lesions, the other
lesions alone): as in the demo, where lesions depart so much from person to person that they add next to
nothing, and redrawn. And with ridge regressions on T1w and T2w heads of the redrawn cohort, brain only and in
template space.

Judged, as settled before the cohort of seed 2 was read: a second scan also helps by being read apart from the
first, so each person has two T2w heads of one anatomy, with lesions of their own and with another person's.
The error of T1w fused with the latter, minus that of T1w fused with the former, is what lesions bring. It has
to be above 0, and what it is beyond the attainable has to be 0 within its interval. Attainable is what the
best regression on the signs as the ridge reads them gains where lesions are read off T2w instead of T1w. This
for T1w heads that show lesions half as clearly as T2w, and for T1w heads that show none. Fused with their own
T2w scan, T1w also has to err less than alone.

Beside it, on the same people: another person's T2w scan, a T2w scan computed from T1w, and T2w scans that
three people in ten lack. All ages are out of fold and fused as notebook 06 does. Says nothing about people.

Run: `python benchmarks/fusion.py [--quick]`; volumes are kept under `--folder`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq
from tqdm import tqdm

from brainage_nb.cohort.splits import deal_folds
from brainage_nb.demo.anatomy import Anatomy, template_anatomy
from brainage_nb.demo.cohort import attainable_ages, draw_truth, write_scan
from brainage_nb.demo.scans import ANATOMY, YOUNGEST, lesion_map, planted_anatomy
from brainage_nb.evaluation.fusion import Fusion, fuse_runs
from brainage_nb.evaluation.metrics import mean_with_interval, paired_difference, with_interval
from brainage_nb.evaluation.runs import Run
from brainage_nb.models.network import fit_linear
from brainage_nb.platforms import n_workers
from brainage_nb.volumes.modalities import lay_onto_t1w
from brainage_nb.volumes.preprocessing import preprocess
from brainage_nb.volumes.scans import ScanError, load_scan
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import writing

SUBJECTS, QUICK_SUBJECTS, SEED, FOLDS = 250, 60, 2, 5
SETTINGS = PreprocessingSettings(spacing_mm=4.0, size=48, to_mni=True, brain_only=True)
LACK = 0.3  # of the people, who are left without a T2w scan
OWN, OTHER_LESIONS, ANOTHERS, NEGATIVE, CURVED, PARTLY = (
    "own T2w",
    "own T2w with another person's lesions",
    "another person's T2w",
    "T1w as a blurred, noisy negative",
    "T1w along a curve",  # of which a straight line reads something new, as a second model would
    "own T2w, three in ten lack it",
)
T1W, BLIND = "T1w", "T1w that shows no lesions"
READERS, READERS_SEED = 600, 1  # subjects of the readers
OTHER_SIGNS = [name for name in ANATOMY if name != "lesions"]
LEAST_ML, ML_A_YEAR, DEPARTURE = 2.0, 0.5, 0.1  # of redrawn lesions: volume at 20, growth, log-normal spread
NOTHING = 0.25  # years within which a scan that tells nothing new may move the error


def main() -> None:
    """Make the volumes, read each scan, fuse, print the tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "out" / "fusion")
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: as many as processors")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SUBJECTS} subjects")
    options = parser.parse_args()
    subjects = QUICK_SUBJECTS if options.quick else options.subjects
    readers = [judge_readers(redrawn) for redrawn in (False, True)]
    truth = draw_people(subjects, options.seed, redrawn=True)
    folder = options.folder / f"{subjects}-seed-{options.seed}"
    volumes = read_volumes(truth, options.seed, folder, options.jobs)
    usable = np.isfinite(volumes).all(axis=(1, 2, 3, 4))
    print(f"{len(truth)} sessions of {subjects} subjects; {(~usable).sum()} T2w scans fit nowhere")
    named = dict(zip((T1W, BLIND, OWN, OTHER_LESIONS), volumes[usable].swapaxes(0, 1), strict=True))
    found = judge(truth[usable].reset_index(drop=True), named)
    print(json.dumps({"name": "fusion"} | found | {"readers": readers, "quick": options.quick}))


def draw_people(subjects: int, seed: int, *, redrawn: bool) -> pd.DataFrame:
    """The truth about a cohort as in the demo, or redrawn; with a fold for each person and others' lesions.

    Redrawn, all signs of ageing but lesions depart twice as far from person to person, and lesions are given
    as the volume that a scan shows, in ml: it grows by `ML_A_YEAR` and departs by a tenth.
    """
    truth = draw_truth(subjects, seed, voxel_mm=2)
    people, rng = truth["subject_id"], np.random.default_rng(seed)
    truth["fold"] = people.map(deal_folds(truth.groupby("subject_id")["age"].mean(), FOLDS))
    if redrawn:
        mean = planted_anatomy(truth["brain_age"].to_numpy())
        for name in OTHER_SIGNS:
            truth[name] = np.maximum(2 * truth[name] - mean[name], 0)
        spread = people.map(pd.Series(rng.normal(0, DEPARTURE, people.nunique()), people.unique()))
        grown = LEAST_ML + ML_A_YEAR * (truth["brain_age"] - YOUNGEST)
        truth["lesions"] = np.maximum(grown, LEAST_ML / 2) * np.exp(spread)
    truth["other_lesions"] = truth["lesions"].to_numpy()[shuffle_people(people, rng)]
    return truth


def judge_readers(redrawn: bool) -> dict[str, object]:
    """What fusing brings two readers of the planted signs, beside what is attainable; printed and given."""
    truth = draw_people(READERS, READERS_SEED, redrawn=redrawn)
    first, whole = attainable_ages(truth.drop(columns="lesions")), attainable_ages(truth)
    second = attainable_ages(truth[["subject_id", "age", "lesions"]])
    gain = find_gain(fuse(truth, {"T1w": first, "T2w": second}))["gain"]
    attainable = paired_difference(truth["age"], first, whole, truth["subject_id"])
    cohort = "redrawn" if redrawn else "as in the demo"
    print(f"readers, {len(truth)} sessions of {READERS} people, signs {cohort}: fused is nearer by")
    print(f"  {with_interval(gain)} years, attainable {with_interval(attainable)}")
    return {"cohort": cohort, "gain": gain, "attainable": attainable}


def read_volumes(truth: pd.DataFrame, seed: int, folder: Path, jobs: int) -> np.ndarray:
    """Volumes (n, 4, size, size, size) float16, in the order of T1W, BLIND, OWN, OTHER_LESIONS.

    NaN where a T2w scan fits nowhere. A session whose volumes lie in the folder is not made again.
    """
    kept = [folder / f"{name}.npy" for name in truth["scan_id"]]
    rows = zip(truth.to_dict("records"), kept, strict=True)
    work = [delayed(read_session)(row, seed, path) for row, path in rows if not path.is_file()]
    done = Parallel(n_jobs=n_workers(jobs), return_as="generator")(work)
    list(tqdm(done, "sessions", len(work)))
    return np.stack([np.load(path) for path in kept])


def read_session(row: dict[str, object], seed: int, kept: Path) -> None:
    """Make the four heads of one session and keep their volumes, as notebook 03 makes them."""
    anatomy = template_anatomy(2)
    own, others = (find_extent(anatomy, row[name], seed, row) for name in ("lesions", "other_lesions"))
    with TemporaryDirectory() as folder:
        t1w, unseen, t2w = (Path(folder) / f"{name}.nii.gz" for name in ("T1w", "unseen", "T2w"))
        write_scan(anatomy, row | {"lesions": own}, "T1w", seed, t1w)
        write_scan(anatomy, row | {"lesions": 0.0}, "T1w", seed, unseen)
        write_scan(anatomy, row | {"lesions": own}, "T2w", seed, t2w)
        scan = load_scan(t1w)
        volumes = [preprocess(scan, SETTINGS), preprocess(unseen, SETTINGS)]
        try:
            laid = lay_onto_t1w(t2w, scan, "T2w")
        except ScanError as error:
            if error.code != "not_registered":
                raise
            volumes += 2 * [np.full_like(volumes[0], np.nan)]
        else:
            volumes.append(preprocess(laid, SETTINGS.for_modality("T2w")))
            write_scan(anatomy, row | {"lesions": others}, "T2w", seed, t2w)
            other = type(laid)(load_scan(t2w).dataobj, laid.affine, extra=laid.extra)  # acquired in one pose
            volumes.append(preprocess(other, SETTINGS.for_modality("T2w")))
    with writing(kept) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(volumes).astype(np.float16))


def find_extent(anatomy: Anatomy, volume_ml: float, seed: int, row: dict[str, object]) -> float:
    """The planted extent at which this person's lesions, which lie in patches of their own, have a volume."""
    voxel_ml = anatomy.voxel_mm**3 / 1000

    def exceed(extent: float) -> float:
        own = np.random.default_rng((seed, int(row["subject_id"]), 90))  # as `scan_head` draws the patches
        return float((lesion_map(anatomy, extent, own) * anatomy.white).sum()) * voxel_ml - volume_ml

    return brentq(exceed, -1, 1, xtol=1e-4)  # below 0 where patches alone show more


def read_off(volumes: np.ndarray, truth: pd.DataFrame, column: str = "age") -> np.ndarray:
    """What a ridge regression reads out of fold (n,): age in years, or a planted sign of ageing."""
    batches, values = torch.from_numpy(np.array(volumes, np.float32))[:, None], np.zeros(len(truth))
    for fold in range(FOLDS):
        out = (truth["fold"] == fold).to_numpy(copy=True)
        taught = truth[~out]
        model = fit_linear(
            batches[torch.from_numpy(~out)].split(64),
            taught[column].to_numpy(),
            taught["subject_id"].to_numpy(),
            SETTINGS.spacing_mm,
        )
        values[out] = model(batches[torch.from_numpy(out)]).numpy()
    return values


def fuse(truth: pd.DataFrame, ages: dict[str, np.ndarray]) -> Fusion:
    """Fuse ages out of fold; NaN where a person lacks the scan."""
    rows = truth[["scan_id", "subject_id", "session_id", "age", "fold"]].assign(split="train", control="yes")
    runs = {
        name: Run(name, {}, pd.DataFrame(), rows.assign(predicted_age=age).dropna(subset=["predicted_age"]))
        for name, age in ages.items()
    }
    return fuse_runs(runs)


def find_gain(fusion: Fusion) -> dict[str, object]:
    """The row of T1w alone."""
    return next(row for row in fusion.compare_parts() if row["from"] == "T1w")


def judge(truth: pd.DataFrame, volumes: dict[str, np.ndarray]) -> dict[str, object]:
    """Print the tables and give the verdict."""
    read = {name: read_off(volume, truth) for name, volume in volumes.items()}
    for name, ages in read.items():
        found = mean_with_interval(np.abs(ages - truth["age"]), truth["subject_id"])
        print(f"{name} alone: mean absolute error {with_interval(found)} years out of fold")
    gains, people, counted = judge_controls(truth, volumes[T1W], read)
    compared = {t1w: compare_with_attainable(truth, volumes, read, t1w) for t1w in (T1W, BLIND)}
    without, all_of_it = attainable_ages(truth.drop(columns="lesions")), attainable_ages(truth)
    planted = paired_difference(truth["age"], without, all_of_it, truth["subject_id"])
    print(f"attainable by the planted signs themselves, with lesions or without: {with_interval(planted)}")
    reached = [
        one["brought"]["low"] > 0 and one["beyond"]["low"] <= 0 <= one["beyond"]["high"]
        for one in compared.values()
    ]
    nothing = max(abs(gains[kind]["value"]) for kind in (ANOTHERS, NEGATIVE))
    brought, attainable = (compared[T1W][name] for name in ("brought", "attainable"))
    holds = all(reached) and gains[OWN]["low"] > 0 and nothing < NOTHING and counted
    return {
        "value": round(brought["value"], 3),
        "interval": [round(brought["low"], 3), round(brought["high"], 3)],
        "bar": f"above 0, and no different from the attainable {attainable['value']:.3f}",
        "holds": bool(holds),
        "unit": "years of MAE that lesions of one's own in the T2w scan bring, paired",
        "n": brought["n"],
        "gains": gains,
        "compared": compared,
        "people": people,
    }


def judge_controls(
    truth: pd.DataFrame, t1w: np.ndarray, read: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, float]], dict[str, int], bool]:
    """Gains over T1w by second scan, scans by what they are fused from, whether all who lack one count."""
    rng, subjects = np.random.default_rng(0), truth["subject_id"]
    plain, noise = t1w.astype(np.float32), np.random.default_rng(1).normal(0, 0.2, t1w.shape)
    lack = subjects.isin(rng.permutation(subjects.unique())[: round(LACK * subjects.nunique())])
    seconds = {
        OWN: read[OWN],
        OTHER_LESIONS: read[OTHER_LESIONS],
        ANOTHERS: read[OWN][shuffle_people(subjects, rng)],
        NEGATIVE: read_off(noise - gaussian_filter(plain, (0, 1, 1, 1)), truth),
        CURVED: read_off(np.tanh(-plain), truth),
        PARTLY: np.where(lack, np.nan, read[OWN]),
    }
    found = {kind: fuse(truth, {"T1w": read[T1W], "second": second}) for kind, second in seconds.items()}
    gains = {kind: find_gain(fusion)["gain"] for kind, fusion in found.items()}
    print("years nearer than T1w alone, fused with (95 % subject bootstrap, paired):")
    for kind, gain in gains.items():
        print(f"  {kind}: {with_interval(gain)} (n = {gain['n']}; {found[kind].whole.combination.words})")
    people = pd.DataFrame(found[PARTLY].count_people())
    print(people[["fused_from", "n", "n_subjects", "half_width", "inside"]].to_string(index=False))
    counted = dict(zip(people["fused_from"], people["n"].tolist(), strict=True))
    return gains, counted, counted.get("T1w") == int(lack.sum())


def compare_with_attainable(
    truth: pd.DataFrame, volumes: dict[str, np.ndarray], read: dict[str, np.ndarray], t1w: str
) -> dict[str, dict[str, float]]:
    """What lesions bring the age fused from these T1w scans and T2w scans, beside what is attainable.

    `brought`: error with T2w scans of another person's lesions, minus error with own T2w scans. `attainable`:
    of the best regression on signs as read, the error with lesions as T1w shows them, if it does, minus that
    with lesions as T2w shows them. `beyond`: the first minus the second, person by person.
    """
    age, subjects = truth["age"], truth["subject_id"]
    shown = OTHER_SIGNS if t1w == BLIND else list(ANATOMY)
    signs = truth[["subject_id", "age"]].assign(
        **{name: read_off(volumes[t1w], truth, name) for name in shown}
    )
    lesions = read_off(volumes[OWN], truth, "lesions")
    without, with_t2w = attainable_ages(signs), attainable_ages(signs.assign(lesions=lesions))
    other, own = (
        fuse(truth, {"T1w": read[t1w], "T2w": read[kind]}).rows["predicted_age"]
        for kind in (OTHER_LESIONS, OWN)
    )
    differences = {
        "brought": np.abs(other - age) - np.abs(own - age),
        "attainable": np.abs(without - age) - np.abs(with_t2w - age),
    }
    differences["beyond"] = differences["brought"] - differences["attainable"]
    found = {name: mean_with_interval(one, subjects) for name, one in differences.items()}
    told = ", ".join(f"{name} {with_interval(one)}" for name, one in found.items())
    correlations = [np.corrcoef(one, truth[name])[0, 1] for name, one in signs[shown].items()]
    of_t2w = np.corrcoef(lesions, truth["lesions"])[0, 1]
    print(f"{t1w}: {told}; r of {', '.join(shown)} as read")
    print(f"  {np.round(correlations, 3)}, of lesions as T2w shows them {of_t2w:.3f}")
    return found


def shuffle_people(subjects: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """For each session the place of a session of another person (n,)."""
    names = rng.permutation(subjects.unique())
    other = dict(zip(names, np.roll(names, 1), strict=True))
    first = {name: place for place, name in reversed(list(enumerate(subjects)))}
    return np.array([first[other[name]] for name in subjects])


if __name__ == "__main__":
    main()
