"""How near the recipe `best` comes to what can be known: artificial heads whose ageing is planted.

Notebooks 01 to 04 and 06 on the known-answer cohort, as anybody runs them. On the same test scans stand the
attainable error (the best regression of age on the planted anatomy itself, which carries each person's own
departure) and the oracle's (who knows the planted brain age). What is done is kept under `--workspace`; a run
that was cut goes on. Says nothing about people.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.pipeline import find_notebooks, run_notebooks
from brainage_nb.workspace import open_workspace, read_json

BAR = 1.15  # times the attainable error
QUICK_SUBJECTS, QUICK_EPOCHS = 60, 3


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
    ws = open_workspace(options.workspace / (f"quick-{subjects}" if options.quick else f"heads-{subjects}"))
    overrides = {
        "source": "demo",
        "n_subjects": subjects,
        "demo_voxel_mm": 2.0,
        "recipe": "best",
        "spacing_mm": options.spacing_mm,
        "size": options.size,
        "widths": options.widths,
        "epochs": QUICK_EPOCHS if options.quick else options.epochs,
        "run": options.run,
    }
    steps = [*find_notebooks("01", "04"), *find_notebooks("06", "06")]
    run_notebooks(steps, ws, overrides)
    results = read_json(ws.path("evaluation", "results.json"))
    print(json.dumps(judged(results, options.run) | {"n_subjects": subjects, "quick": options.quick}))


def judged(results: dict, run: str) -> dict[str, object]:
    """Print the errors on the test scans and give the verdict."""
    errors, test = results["_known_answers"][run]["mae"], results[run]["test"]
    rows = {
        "mean predictor": test["mean_predictor_mae"],
        run: errors["ours"],
        "attainable": errors["attainable"],
        "oracle": errors["oracle"],
    }
    table = pd.DataFrame({name: [with_interval(figure)] for name, figure in rows.items()}, index=["MAE"]).T
    print(f"Known-answer heads, test split, n = {test['n']}, years, 95 % subject bootstrap")
    print(table.to_string())
    ratio = errors["ours"]["value"] / errors["attainable"]["value"]
    return {
        "name": "known_answers",
        "value": round(ratio, 3),
        "bar": BAR,
        "holds": bool(ratio <= BAR),
        "unit": "times the attainable MAE, test split",
        "n": test["n"],
        "mae": {name: round(figure["value"], 3) for name, figure in rows.items()},
    }


if __name__ == "__main__":
    main()
