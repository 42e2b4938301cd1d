"""Are planted rates of ageing found, and is what one person's rate is worth told rightly?

Simulated models see the planted brain ages with known slope and error; a ridge regression sees the heads.
Beside each: the same visits shuffled within a person, and what a change of scanner adds.
"""

import argparse
import json
import re
import tempfile

import numpy as np
import pandas as pd
from phantom import baseline_ages

from brainage_nb.demo.cohort import draw_truth, make_demo_cohort
from brainage_nb.evaluation.correction import AgeBiasCorrector, Calibration
from brainage_nb.evaluation.rates import Rates, expect_r, measure_rates

SEED, VISITS = 1, {"followed": 0.8, "rate_sd": 0.4}
SLOPE, ERROR, OFFSET = 0.8, 1.6, 4.0  # of a simulated model; years that its other scanners add
COHORTS, PEOPLE = (10, 40), (80, 120)  # quick, full
ADDS = re.compile(r"it adds (\S+) \[(\S+), (\S+)\]")
BAR = 0.85  # share of 95 % intervals that hold what was planted; 40 of 40 to 34 of 40 are chance


def measure(rows: pd.DataFrame) -> Rates:
    """Rates of a frame with `subject_id, age, site, predicted_age` and the planted `rate`."""
    corrector = AgeBiasCorrector().fit(rows["predicted_age"], rows["age"], subject_id=rows["subject_id"])
    return measure_rates(rows, Calibration(corrector, "", None), truth=rows)


def simulate(seed: int, n_people: int) -> pd.DataFrame:
    """A cohort whose predicted ages have a known slope, error and offset between scanners."""
    truth, rng = draw_truth(n_people, seed, voxel_mm=2, **VISITS), np.random.default_rng(seed)
    elsewhere = truth["site"] != truth.groupby("subject_id")["site"].transform("first")
    error = rng.normal(0, ERROR, len(truth)) + OFFSET * SLOPE * elsewhere
    return truth.assign(predicted_age=10 + SLOPE * truth["brain_age"] + error)


def shuffle_visits(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same predictions, those of each person in any order."""
    rng = np.random.default_rng(seed)
    people = rows.groupby("subject_id")["predicted_age"]
    return rows.assign(predicted_age=people.transform(lambda part: rng.permutation(part)))


def judge(rows: pd.DataFrame, seed: int) -> dict[str, float]:
    """What was found in one cohort, and whether each interval holds what was planted."""
    found, shuffled = measure(rows), measure(shuffle_visits(rows, seed))
    group, none = found.groups.iloc[0], shuffled.groups.iloc[0]
    kept = found.people[found.people["scanner"] == ""]
    recovered, planted = kept["rate"], kept["planted"]
    adds = [tuple(map(float, one)) for text in found.warnings for one in ADDS.findall(text)]
    return {
        "people": len(kept),
        "mean rate": group["rate"],
        "holds 1": group["rate_low"] < 1 < group["rate_high"],
        "shuffled": none["rate"],
        "shuffled holds 0": none["rate_low"] < 0 < none["rate_high"],
        "spread (planted)": planted.std(),
        "spread (found)": found.scale.spread,
        "error": found.scale.error,
        "r": np.corrcoef(planted, recovered)[0, 1],
        "r (expected)": expect_r(planted, kept["error"]),
        "slope": np.polyfit(planted, recovered, 1)[0],
        "standard errors": ((recovered - planted) / kept["error"]).std(),
        "scanner adds": np.mean([one[0] for one in adds]) if adds else np.nan,
        "scanner holds": np.mean([one[1] < OFFSET < one[2] for one in adds]) if adds else np.nan,
        "verdicts": (~kept["verdict"].str.startswith("no verdict")).mean(),
    }


def is_near(departures: pd.Series) -> bool:
    """Whether their mean is 0 but for chance (three standard errors)."""
    return bool(abs(departures.mean()) < 3 * departures.sem())


def main() -> None:
    """Print what was found beside what was planted, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{COHORTS[0]} cohorts, {PEOPLE[0]} heads")
    parser.add_argument("--folder", default="", help="keep the heads there instead of a temporary folder")
    options = parser.parse_args()
    n, people = COHORTS[not options.quick], PEOPLE[not options.quick]
    table = pd.DataFrame([judge(simulate(seed, people), seed) for seed in range(1, n + 1)]).astype(float)
    with tempfile.TemporaryDirectory() as temporary:
        place = options.folder or temporary
        heads = baseline_ages(make_demo_cohort(place, people, SEED, voxel_mm=2, **VISITS))
    seen, found = judge(heads, SEED), measure(heads)
    shown = {f"{n} simulated models, mean": table.mean(), "ridge on heads": pd.Series(seen, dtype=float)}
    print(pd.DataFrame(shown).round(2).to_string(), "\n")
    print(found.scale.table().round(2).to_string(index=False))
    print(*found.warnings, *found.notes, sep="\n")
    simulated = table.mean()
    holds = {
        "intervals hold the mean rate": simulated["holds 1"] >= BAR,
        "shuffled visits give 0": simulated["shuffled holds 0"] >= BAR,
        "a scanner's bias is found": simulated["scanner holds"] >= BAR,
        "r is that of the reliability": is_near(table["r"] - table["r (expected)"]),
        "slope on planted rates is 1": is_near(table["slope"] - 1),
        "standard errors are true": is_near(table["standard errors"] - 1),
        "ridge: mean rate 1, shuffled 0": bool(seen["holds 1"] and seen["shuffled holds 0"]),
    }
    print(*(f"{'holds' if held else 'MISSED'}  {what}" for what, held in holds.items()), sep="\n")
    figures = {name: None if value != value else round(float(value), 3) for name, value in seen.items()}
    result = {"name": "rates", "value": round(float(simulated["holds 1"]), 3), "bar": BAR}
    result |= {"holds": bool(all(holds.values())), "cohorts": n, "people": people, "ridge": figures}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
