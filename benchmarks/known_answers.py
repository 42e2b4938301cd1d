"""How near the recipe `best` comes to what can be known: artificial heads whose ageing is planted.

Notebooks 01 to 04 on the known-answer cohort, as anybody runs them; then the saved bundle reads heads that
were made for this alone, with another seed. On the same scans stand the attainable error (the best regression
of age on the planted anatomy itself, which carries each person's own departure) and the oracle's (who knows
the planted brain age). People of the fresh heads are then scanned again at every site, their own among them:
what the age moves by there, beside what it moves by where only pose, storage, bias field and noise are drawn
anew. What is done is kept under `--workspace`; a run that was cut goes on. Says nothing about people.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from brainage_nb.demo.anatomy import template_anatomy
from brainage_nb.demo.cohort import TRUTH, attainable_ages, image_path, make_demo_cohort, write_scan
from brainage_nb.demo.scans import SITES, draw_acquisition
from brainage_nb.evaluation.metrics import mean_with_interval, with_interval
from brainage_nb.pipeline import find_notebooks, run_notebooks
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Failure
from brainage_nb.predict.saving import current_bundle
from brainage_nb.workspace import open_workspace, read_csv, write_csv

BAR = 1.15  # times the attainable error
FRESH, SEED = 400, 2  # subjects that judge, and the seed they are made with; notebook 01 has seed 1
VOXEL_MM = 2
AT_EVERY_SITE, FIRST_SESSION = 60, 11  # people scanned again, and the first of these sessions' numbers
SAME_SITE, OTHER_SITE = "same site, once more", "another site"
QUICK_SUBJECTS, QUICK_FRESH, QUICK_EPOCHS = 60, 30, 3


def main() -> None:
    """Run the notebooks, print the table and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path(__file__).parent / "out" / "known_answers")
    parser.add_argument("--subjects", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--widths", default="32,64,128,256", help="64,128,256,512 is ResNet-18")
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--run", default="resnet18")
    quick = f"{QUICK_SUBJECTS} subjects, {QUICK_EPOCHS} epochs"
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args()
    subjects = QUICK_SUBJECTS if options.quick else options.subjects
    folder = options.workspace / f"heads-{subjects}{'-quick' if options.quick else ''}"
    ws = open_workspace(folder)
    overrides = {
        "source": "demo",
        "n_subjects": subjects,
        "demo_voxel_mm": float(VOXEL_MM),
        "recipe": "best",
        "spacing_mm": options.spacing_mm,
        "size": options.size,
        "widths": options.widths,
        "epochs": QUICK_EPOCHS if options.quick else options.epochs,
        "run": options.run,
    }
    run_notebooks(find_notebooks("01", "04"), ws, overrides)
    fresh = QUICK_FRESH if options.quick else FRESH
    heads = make_demo_cohort(options.workspace / f"fresh-{fresh}", fresh, SEED, voxel_mm=VOXEL_MM)
    rows = read(ws.run(options.run), heads)
    verdict = judged(rows, read_csv(ws.path("demo", TRUTH)))
    first = read_csv(heads / TRUTH).drop_duplicates("subject_id").head(AT_EVERY_SITE)
    again = scan_at_every_site(options.workspace / f"sites-{len(first)}", first)
    moved = changes_of_site(rows, read(ws.run(options.run), again))
    verdict |= {"other_site": moved.round(3).to_dict("index")}
    print(json.dumps(verdict | {"trained_on_subjects": subjects, "quick": options.quick}))


def read(run: Path, heads: Path) -> pd.DataFrame:
    """The truth about fresh heads and, as `predicted_age`, what the run's bundle makes of them (years)."""
    kept, truth = run / f"{heads.name}.csv", read_csv(heads / TRUTH)
    if not kept.is_file():
        bundle = load_bundle(current_bundle(run))
        paths = [heads / image_path(row) for row in truth.to_dict("records")]
        results = list(tqdm(bundle.predict_many(paths), "fresh heads", len(paths)))
        if refused := [result.sentence for result in results if isinstance(result, Failure)]:
            raise SystemExit(f"{len(refused)} of {len(paths)} heads were refused. The first: {refused[0]}")
        ages = [result.predicted_age for result in results]
        write_csv(truth[["scan_id"]].assign(predicted_age=ages), kept)
    return truth.merge(read_csv(kept), on="scan_id", validate="one_to_one")


def judged(rows: pd.DataFrame, training: pd.DataFrame) -> dict[str, object]:
    """Print the errors on the fresh heads and give the verdict."""
    subjects, age = rows["subject_id"].to_numpy(), rows["age"].to_numpy()
    everybody = pd.concat([training.assign(subject_id="training " + training["subject_id"]), rows])
    guesses = {
        "mean predictor": training["age"].mean(),
        "best": rows["predicted_age"],
        "attainable": attainable_ages(everybody)[len(training) :],
        "oracle": rows["brain_age"],
    }
    errors = pd.DataFrame({name: np.abs(guess - age) for name, guess in guesses.items()})
    r = float(np.corrcoef(rows["predicted_age"], age)[0, 1])
    table = {name: [with_interval(mean_with_interval(error, subjects))] for name, error in errors.items()}
    print(f"{len(rows)} fresh heads of {len(set(subjects))} subjects, years, 95 % subject bootstrap")
    print(pd.DataFrame(table, index=["MAE"]).T.to_string())
    ratio = mean_with_interval(errors["best"], subjects, over=errors["attainable"])
    print(f"best / attainable: {with_interval(ratio)}; r {r:.3f}")
    return {
        "name": "known_answers",
        "value": round(ratio["value"], 3),
        "interval": [round(ratio["low"], 3), round(ratio["high"], 3)],
        "bar": BAR,
        "holds": bool(ratio["value"] <= BAR),
        "unit": "times the attainable MAE, fresh heads",
        "n": len(rows),
        "r": round(r, 3),
        "mae": errors.mean().round(3).to_dict(),
    }


def scan_at_every_site(folder: Path, first: pd.DataFrame) -> Path:
    """The folder of new scans, one a site, of the people of these rows of `truth.csv`, one row each.

    A person's anatomy and age stay; pose, storage, bias field and noise are drawn anew at each site.
    """
    rows = []
    for row in first.to_dict("records"):
        for session, (name, site) in enumerate(SITES.items(), start=FIRST_SESSION):
            about = {"scan_id": f"{row['subject_id']}_{session}", "session_id": str(session), "site": name}
            rows.append(row | about | draw_acquisition(SEED, int(row["subject_id"]), session, site, VOXEL_MM))
    anatomy = template_anatomy(VOXEL_MM)
    for row in tqdm(rows, "heads at every site"):
        if not (path := folder / image_path(row)).exists():
            write_scan(anatomy, row, "T1w", SEED, path)
    write_csv(pd.DataFrame(rows), folder / TRUTH)
    return folder


def changes_of_site(rows: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """Print and give the change of predicted age, years, between scans of one person.

    Parameters
    ----------
    rows, again : DataFrame
        `subject_id, site, predicted_age` of the first scans, and of those at every site.
    """
    first = rows.drop_duplicates("subject_id")[["subject_id", "site", "predicted_age"]]
    both = again.merge(first, on="subject_id", suffixes=("", "_first")).set_index("subject_id")
    since, same = both["predicted_age"] - both["predicted_age_first"], both["site"] == both["site_first"]
    at = {site: both.loc[both["site"] == site, "predicted_age"] for site in SITES}
    moved = {SAME_SITE: since[same], OTHER_SITE: since[~same]}
    moved |= {f"{one} to {other}": at[other] - at[one] for one, other in combinations(SITES, 2)}
    lines = {}
    for name, change in moved.items():
        size = mean_with_interval(change.abs(), change.index.to_numpy())
        lines[name] = size | {"mean_change": change.mean(), "largest": change.abs().max()}
    table = pd.DataFrame(lines).T.astype({"n": int, "n_subjects": int})
    print(f"\n{both.index.nunique()} people scanned again: change of predicted age, years, 95 % bootstrap")
    shown = {"mean |change|": [with_interval(line) for line in lines.values()]}
    print(table[["mean_change", "largest", "n"]].round(2).assign(**shown).to_string())
    return table


if __name__ == "__main__":
    main()
