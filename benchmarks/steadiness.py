"""How far a predicted age moves when the same head lies, is stored or is measured otherwise.

40 real scans that trained nothing, each in the forms of `disturbances.CASES`, from file to age as a user
would: a saved bundle's `predict_many`. Per recipe, a ResNet-18 at 4 mm is trained on the other scans of the
folder as notebooks 01 to 04 do it. `best` learns from all of them as with `final = True`: a model for each of
five folds, whose ages the bundle averages (five times as long; `--no-final` trains one model, whose epochs
15 % of the others watch, as in `reference`).
`--models best=BUNDLE,reference=BUNDLE` judges given bundles instead, and says how many of the scans these
have seen. A refused scan is counted, never left out in silence, and one that is refused only when disturbed
geometrically misses the bar. Everything is kept under `--cache`, each scan's predictions too, so that a cut
run goes on.

Run: `python benchmarks/steadiness.py --data FOLDER [--epochs 20] [--quick]`; FOLDER holds
`images/NAME.nii.gz` and `IXI.xls`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import disturbances
import nibabel as nib
import numpy as np
import pandas as pd
from disturbances import CASES, GEOMETRIC, disturb
from tqdm import tqdm

from brainage_nb.cohort.cleaning import clean
from brainage_nb.cohort.inspection import inspect_scans
from brainage_nb.cohort.splits import deal_splits
from brainage_nb.evaluation.metrics import mean_with_interval
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.predict.bundle import Bundle, kept_scans, load_bundle
from brainage_nb.predict.cautions import Failure, Prediction
from brainage_nb.predict.saving import current_bundle
from brainage_nb.sources.folder import match_scans
from brainage_nb.volumes.scans import load_scan
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import build_store
from brainage_nb.workspace import Workspace, open_workspace, read_json, sha256_of, write_csv, write_json

BAR = 1.0  # years, for every case in `GEOMETRIC`
SCANS, QUICK_SCANS, QUICK_EPOCHS = 40, 4, 3
VALIDATION = 0.15  # of the scans that train
RECIPES = ("best", "reference")  # the first is judged
UNCHANGED, AGAIN = "unchanged", "unchanged, again"


def prepared(data: Path, cache: Path) -> Workspace:
    """A workspace as notebooks 01 and 02 leave it, with `SCANS` subjects of all ages as its test split."""
    ws = open_workspace(cache / "workspace")
    cohort = match_scans(data / "images", data / "IXI.xls").cohort
    write_csv(cohort, ws.path("cohort.csv"))
    known = set(ws.read("cleaning.csv")["scan_id"]) if ws.path("cleaning.csv").exists() else set()
    if known != set(cohort["scan_id"]):
        write_csv(clean(cohort, inspect_scans(cohort, ws.resolve)), ws.path("cleaning.csv"))
    cleaning, kept = ws.read("cleaning.csv"), kept_scans(ws)
    share = min(SCANS / kept["subject_id"].nunique(), 0.5)
    fractions = ((1 - share) * (1 - VALIDATION), (1 - share) * VALIDATION, share)
    write_csv(deal_splits(kept, fractions=fractions), ws.path("splits.csv"))
    dropped = cleaning[~cleaning["kept"]]
    print(f"{len(kept)} scans kept, {len(dropped)} dropped", *dropped["detail"], sep="\n  ")
    return ws


def trained_bundle(ws: Workspace, recipe: str, epochs: int, *, final: bool) -> Path:
    """The bundle of a ResNet-18 at 4 mm, trained now or found finished; `final`: on all but the held-out."""
    splits = ws.read("splits.csv")
    settings = PreprocessingSettings.of_recipe(recipe, spacing_mm=4, size=48)
    report = build_store(splits, ws.path("volumes"), settings, ws.resolve)
    if len(report.failed):
        print(f"{recipe}: {len(report.failed)} scans gave no volume\n{report.failed.to_string(index=False)}")
    chosen = TrainingSettings.of_recipe(recipe, epochs=epochs, final=final, checkpoint_minutes=1.0)
    teaching = splits[splits["split"] != "test"] if final else splits  # else it deals these to folds too
    decides = json.dumps([settings.fingerprint, chosen.identity()], sort_keys=True)
    folder = ws.run(f"{recipe}-{epochs}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}")
    if not train(report.store, teaching, folder, chosen).complete:
        raise SystemExit("Training was stopped; everything is saved: run this again and it goes on.")
    return current_bundle(folder)


def given_bundles(text: str) -> dict[str, Path]:
    """`best=BUNDLE,reference=BUNDLE` as a mapping."""
    pairs = [entry.partition("=") for entry in text.split(",")]
    if not all(name and place for name, _, place in pairs):
        raise SystemExit(f"--models {text}: expected NAME=BUNDLE, several with commas.")
    return {name: Path(place) for name, _, place in pairs}


def digest_of(bundle: Path) -> str:
    """Short hash of all that is in a bundle."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file()) if bundle.is_dir() else [bundle]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]


def forms_of(path: Path, scan_id: str, folder: Path) -> dict[str, Path]:
    """Files of a scan: as it is, the very same once more, and in every case.

    All lie in `folder`: a mask beside the original would be there for one form only.
    """
    copy = folder / path.name
    shutil.copyfile(path, copy)
    image, files = load_scan(path), {UNCHANGED: copy, AGAIN: copy}
    for number, case in enumerate(CASES):
        files[case] = folder / f"case-{number}.nii"
        nib.save(disturb(image, case, scan_id), files[case])
    return files


def said(result: Prediction | Failure) -> dict[str, object]:
    """What is kept of a result."""
    if isinstance(result, Failure):
        return {"predicted_age": None, "refused": result.code, "reason": result.sentence}
    return {"predicted_age": result.predicted_age, "refused": "", "reason": ""}


def predicted(scan, path: Path, models: dict[str, tuple[Bundle, Path]]) -> list[dict[str, object]]:
    """A row a model and form of one scan, from the cache where they were predicted before."""
    name = f"{scan.scan_id}-{sha256_of(path)[:8]}-{disturbances.VERSION}.json"
    missing = [model for model, (_, cache) in models.items() if not (cache / name).is_file()]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            files = forms_of(path, scan.scan_id, Path(folder))
            for model in missing:
                bundle, cache = models[model]
                results = bundle.predict_many(files.values())
                forms = {case: said(result) for case, result in zip(files, results, strict=True)}
                write_json(forms, cache / name)
    about = {"scan_id": scan.scan_id, "subject_id": scan.subject_id, "age": scan.age}
    return [
        about | {"model": model, "case": case, **form}
        for model, (_, cache) in models.items()
        for case, form in read_json(cache / name).items()
    ]


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Of one model's rows: a line a case with the change of predicted age, years, against the unchanged scan.

    Scans refused unchanged are in no line; those refused only in a case are counted in `refused`.
    """
    parts = {case: part.set_index("scan_id")["predicted_age"] for case, part in rows.groupby("case")}
    ages = pd.DataFrame(parts).astype(float)
    ages = ages[ages[UNCHANGED].notna()]
    subjects = rows.drop_duplicates("scan_id").set_index("scan_id")["subject_id"]
    lines = {}
    for case in (AGAIN, *CASES):
        moved = (ages[case] - ages[UNCHANGED]).dropna()
        figure = mean_with_interval(moved.abs(), subjects[moved.index].to_numpy()) if len(moved) else {}
        lines[case] = {
            **{name: figure.get(name, np.nan) for name in ("value", "low", "high")},
            "mean_change": moved.mean(),
            "largest": moved.abs().max(),
            "n": len(moved),
            "refused": len(ages) - len(moved),
        }
    return pd.DataFrame(lines).T.astype({"n": int, "refused": int})


def facts_of(rows: pd.DataFrame, bundle: Bundle, paths: list[Path]) -> dict[str, float]:
    """How good the model is on the scans as they are: one that says the same to everybody is steady too."""
    unchanged = rows[rows["case"] == UNCHANGED]
    ages, made = unchanged["age"].astype(float), unchanged["predicted_age"].astype(float)
    subjects = unchanged["subject_id"].unique().tolist()
    return {
        "n": len(unchanged),
        "refused_unchanged": int(made.isna().sum()),
        "mae": float((made - ages).abs().mean()),
        "mean_predictor_mae": float((bundle.manifest["training"]["age_mean"] - ages).abs().mean()),
        "sd_of_predictions": float(made.std()),
        "seen": int(max(sum(bundle.trained_on_files(paths)), sum(bundle.trained_on(subjects)))),
        "trained_on_subjects": bundle.manifest["training"]["n_subjects"],
    }


def show(model: str, facts: dict[str, float], table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Print one model's table and every refusal."""
    print(
        f"\n{model}: trained on {facts['trained_on_subjects']} people; of the {facts['n']} scans it has seen "
        f"{facts['seen']}, refuses {facts['refused_unchanged']} unchanged. On them as they are: MAE "
        f"{facts['mae']:.2f} years (mean predictor {facts['mean_predictor_mae']:.2f}), predictions spread by "
        f"{facts['sd_of_predictions']:.1f}"
    )
    shown = pd.DataFrame(
        {
            "mean |change|": table["value"].map("{:.3f}".format),
            "95 % interval": [
                "" if np.isnan(line.low) else f"{line.low:.3f} to {line.high:.3f}"
                for line in table.itertuples()
            ],
            "mean change": table["mean_change"].map("{:+.3f}".format),
            "largest": table["largest"].map("{:.3f}".format),
            "n": table["n"],
            "refused": table["refused"],
            "bar": [f"under {BAR:g}" if case in GEOMETRIC else "" for case in table.index],
        }
    )
    print(shown.to_string())
    for row in rows[rows["refused"] != ""].itertuples():
        print(f"  refused: {row.scan_id}, {row.case}: {row.refused}. {row.reason}")


def rounded(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else round(value, 4)


def verdict_of(tables: dict[str, pd.DataFrame], facts: dict[str, dict], quick: bool) -> dict[str, object]:
    """The closing line: the worst geometric case of the first model against the bar."""
    judged = next(iter(tables))
    geometric = tables[judged].loc[list(GEOMETRIC)]
    floor = max(float(table.loc[AGAIN, "largest"]) for table in tables.values())
    worst = float(geometric["value"].max(skipna=False))
    return {
        "name": "steadiness",
        "value": rounded(worst),
        "bar": BAR,
        "holds": bool(worst < BAR and geometric["refused"].sum() == 0 and floor == 0),
        "n": facts[judged]["n"],
        "unit": "years, mean absolute change of predicted age, worst geometric case",
        "model": judged,
        "noise_floor": rounded(floor),
        "quick": quick,
        "models": {
            model: {
                **{name: rounded(value) for name, value in facts[model].items()},
                "cases": {
                    case: {name: rounded(value) for name, value in line.items()}
                    for case, line in table.to_dict("index").items()
                },
            }
            for model, table in tables.items()
        },
    }


def main() -> None:
    """Print the tables and, as the last line, the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ixi_hh"))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "steadiness")
    parser.add_argument("--epochs", type=int, default=20, help="of the models trained here")
    told = "best learns from all but the scans held out, a model a fold"
    parser.add_argument("--final", action=argparse.BooleanOptionalAction, default=True, help=told)
    parser.add_argument("--models", default="", help="NAME=BUNDLE,...: judge these; the first has the bar")
    parser.add_argument("--scans", type=int, default=SCANS, help=f"take fewer than the {SCANS} held out")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SCANS} scans, {QUICK_EPOCHS} epochs")
    options = parser.parse_args()
    if not (options.data / "IXI.xls").is_file():
        print(json.dumps({"name": "steadiness", "skipped": f"no scans under {options.data}"}))
        return
    epochs = QUICK_EPOCHS if options.quick else options.epochs
    ws = prepared(options.data, options.cache)
    places = given_bundles(options.models) if options.models else {}
    final = {"best": options.final, "reference": False}
    places = places or {name: trained_bundle(ws, name, epochs, final=final[name]) for name in RECIPES}
    kept = {
        name: options.cache / "predictions" / f"{name}-{digest_of(path)}" for name, path in places.items()
    }
    models = {name: (load_bundle(path), kept[name]) for name, path in places.items()}
    scans = ws.read("splits.csv").query("split == 'test'").sort_values(["age", "scan_id"])
    n = min(QUICK_SCANS if options.quick else options.scans, len(scans))
    scans = scans.iloc[np.linspace(0, len(scans) - 1, n).round().astype(int)]
    paths = [ws.resolve(image) for image in scans["image"]]
    todo = tqdm(zip(scans.itertuples(), paths, strict=True), "scans", n)
    rows = pd.DataFrame([row for scan, path in todo for row in predicted(scan, path, models)])
    parts = {name: rows[rows["model"] == name] for name in models}
    tables = {name: changes(part) for name, part in parts.items()}
    facts = {name: facts_of(part, models[name][0], paths) for name, part in parts.items()}
    print(f"\n{n} scans of {scans['subject_id'].nunique()} subjects, years, 95 % subject bootstrap")
    for name, table in tables.items():
        show(name, facts[name], table, parts[name])
    print(json.dumps(verdict_of(tables, facts, options.quick)))


if __name__ == "__main__":
    main()
