"""Can the evaluation be fooled? Pure noise and simulated models with known parameters, sent through
everything.

Noise test: predictions that know nothing of age. Recovery test: 200 cohorts whose slope, offset and noise are
known. False alarms: how many ordinary scans are called far from training, beside how many are said to be; of
drawn numbers and, with `--store`, of the scans of a workspace, some learned from and the rest judged.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from brainage_nb.evaluation.correction import AgeBiasCorrector, ConformalInterval
from brainage_nb.evaluation.evaluate import evaluate_runs, headline_table
from brainage_nb.evaluation.metrics import regression_metrics
from brainage_nb.evaluation.report import write_report
from brainage_nb.predict.cautions import STATISTICS, Reference, measure_remoteness
from brainage_nb.predict.saving import read_statistics
from brainage_nb.volumes.scan_statistics import SCAN_STATISTICS
from brainage_nb.volumes.store import VolumeStore
from tests.evaluation.fake_workspace import cohort_frame, write_run, write_workspace

SLOPE, OFFSET, NOISE = 0.75, 13.0, 5.0
REFERENCES, JUDGED, WITHIN = (20, 64, 200), 5000, 0.01


def noise_test(n_subjects: int = 400) -> dict[str, bool]:
    """Noise around the mean training age, through evaluation, report and card; what must hold, and whether it
    does."""
    scans = cohort_frame(n_subjects, seed=11)
    scans["gap_planted"] = 0.0
    rng = np.random.default_rng(5)
    mean_age = scans.loc[scans["split"] == "train", "age"].mean()
    with tempfile.TemporaryDirectory() as folder:
        ws = write_workspace(Path(folder), scans)
        write_run(ws, "noise", scans, rng.normal(mean_age, 8, len(scans)))
        evaluation = evaluate_runs(ws)
        write_report(evaluation)
        page = ws.path("evaluation", "report.html").read_text(encoding="utf-8")
        card = ws.path("evaluation", "model_card.md").read_text(encoding="utf-8")
        rows = pd.read_csv(ws.path("evaluation", "predictions.csv"))
    print(headline_table(evaluation.results).T.to_string(), "\n")
    print(evaluation.runs["noise"].calibration.refused, "\n")
    test = evaluation.results["noise"]["test"]
    found = evaluation.runs["noise"].calibration
    shown = f"{test['mae']['value']:.2f}"
    return {
        "MAE is not below the mean predictor's": test["mae"]["value"] >= test["mean_predictor_mae"]["value"],
        "r's interval holds 0": test["r"]["low"] < 0 < test["r"]["high"],
        "the corrector refuses": found.corrector is None and "not above 0" in found.refused,
        "no corrected column is filled": bool(
            rows[["corrected_age", "corrected_gap", "adjusted_gap"]].isna().all(axis=None)
        ),
        "report and card show the raw MAE": shown in page and shown in card,
        "report and card say that it is no better than the mean predictor": all(
            "not shown to be better" in text for text in (page, card)
        ),
        "report and card say that the correction was refused": "refused" in page
        and "No correction is offered" in card,
        "results hold no corrected figure": evaluation.results["_age_free_corrected"]["noise"]
        == {"refused": found.refused},
    }


def recovery_test(repetitions: int, n_fit: int = 100, n_test: int = 200) -> pd.DataFrame:
    """A row a repetition: how often parameters lie in their intervals, what is left of the bias, coverage
    on test."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(repetitions):
        age = rng.uniform(20, 86, n_fit + n_test)
        predicted = OFFSET + SLOPE * age + rng.normal(0, NOISE, len(age))
        fit, test = slice(0, n_fit), slice(n_fit, None)
        corrector = AgeBiasCorrector().fit(predicted[fit], age[fit], "val")
        figures = regression_metrics(age[test], predicted[test], reference_age=53.0, n_bootstrap=500)
        free = corrector.transform(predicted[test])
        row = {
            "slope in its t-interval": corrector.slope_interval_[0] < SLOPE < corrector.slope_interval_[1],
            "slope in its bootstrap interval": figures["slope"]["low"] < SLOPE < figures["slope"]["high"],
            "MAE in its bootstrap interval": figures["mae"]["low"] < _true_mae() < figures["mae"]["high"],
            "raw gap-age r": figures["gap_age_r"]["value"],
            "corrected gap-age r": np.corrcoef(free - age[test], age[test])[0, 1],
            "adjusted gap-age r": np.corrcoef(corrector.adjust_gap(predicted[test], age[test]), age[test])[
                0, 1
            ],
            "offset recovered [years]": corrector.intercept_,
            "slope recovered": corrector.slope_,
        }
        low, high = ConformalInterval(0.9).fit(predicted[fit], age[fit], "val").predict(predicted[test])
        row["coverage"] = ((age[test] >= low) & (age[test] <= high)).mean()
        rows.append(row)
    return pd.DataFrame(rows).astype(float)


def _true_mae() -> float:
    """Expected |predicted - age| over ages 20 to 86, by numerical mean."""
    from scipy import stats

    bias = OFFSET + (SLOPE - 1) * np.linspace(20, 86, 2001)
    return float(stats.foldnorm.mean(np.abs(bias) / NOISE, scale=NOISE).mean())


def count_false_alarms(
    volumes: np.ndarray | None = None, statistics: np.ndarray | None = None, judged: int = JUDGED
) -> pd.DataFrame:
    """For each number of training scans, the share of ordinary scans called far and the share claimed.

    Drawn scans have long tails (t of 4 degrees) and differ in eight ways; each is judged by its own training
    set. Of real scans, with their statistics (n, 10) before preprocessing, a training set judges ten.
    """
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(8, len(STATISTICS) + len(SCAN_STATISTICS)))
    rows = []
    for n in (n for n in REFERENCES if volumes is None or len(volumes) >= n + 10):
        found = []
        while len(found) < judged:
            if volumes is None:
                *training, new = rng.standard_t(4, (n + 1, 8)) @ mixing
                found.append(measure_remoteness(np.array(training), new))
                continue
            order = rng.permutation(len(volumes))
            reference = Reference.fit(volumes[order[:n]], statistics[order[:n]])
            new = [reference.describe(volumes[k], statistics[k]) for k in order[n : n + 10]]
            found += [measure_remoteness(reference.rows, scan) for scan in new]
        far = np.mean([one.p_value <= one.limit for one in found])
        rows.append({"n": n, "claimed": found[0].limit, "called far": far})
    return pd.DataFrame(rows)


def main() -> None:
    """Run all, print what was found, and print the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="accepted; the full form takes a minute")
    parser.add_argument("--store", default="", help="folder of a volume store, for false alarms on scans")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("Noise test")
    noise = noise_test()
    for sentence, holds in noise.items():
        print(f"  {'yes' if holds else 'NO ':<4}{sentence}")
    print(
        f"\nRecovery test: {options.repetitions} cohorts, slope {SLOPE}, offset {OFFSET}, noise {NOISE} years"
    )
    repeated = recovery_test(options.repetitions)
    found = repeated.mean().to_dict()
    first = repeated.head(200).mean()
    for name, value in found.items():
        print(f"  {name:<34}{value:8.3f}   first 200: {first[name]:.3f}")
    alarms = {"drawn": count_false_alarms()}
    if options.store:
        store = VolumeStore(options.store)
        cleaning = pd.read_csv(store.folder.parents[1] / "cleaning.csv", dtype={"scan_id": str})
        statistics = read_statistics(cleaning, store.scan_ids)
        alarms["scans"] = count_false_alarms(store.read(store.scan_ids), statistics, 1000)
    for name, table in alarms.items():
        print(f"\nFalse alarms, {name}\n{table.round(4).to_string(index=False)}")
    holds = {
        "false alarms of drawn scans within 1 % of the claim": bool(
            (alarms["drawn"]["called far"] - alarms["drawn"]["claimed"]).abs().max() <= WITHIN
        ),
        "noise": all(noise.values()),
        "parameters in their 95 % intervals": all(found[name] > 0.93 for name in found if "interval" in name),
        "corrected gap-age r about 0": abs(found["corrected gap-age r"]) < 0.05
        and abs(found["adjusted gap-age r"]) < 0.05,
        "coverage 90 % +- 3": all(abs(table["coverage"] - 0.9) <= 0.03 for table in (found, first)),
    }
    verdict = {
        "name": "evaluation_honesty",
        "value": {name: round(value, 4) for name, value in found.items()}
        | {
            "noise": noise,
            "false_alarms": {name: table.round(4).to_dict("records") for name, table in alarms.items()},
        },
        "bar": {"coverage": [0.87, 0.93], "corrected_gap_age_r": 0.05},
        "holds": all(holds.values()),
        "parts": holds,
        "repetitions": options.repetitions,
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
