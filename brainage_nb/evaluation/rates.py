"""How fast a brain ages between visits: first what one person's rate is worth, then people's and a group's.

A gap at one age is no rate. Only predictions of people whom the model had not seen count. Draws nothing.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.names import WORDS
from brainage_nb.cohort.rules import name_controls
from brainage_nb.evaluation.correction import Calibration
from brainage_nb.evaluation.metrics import flat, regression_metrics, with_interval

MIN_YEARS = 1.0  # between first and last visit: below, a change is nearly all error
MAX_YEARS = 40.0  # above, no scanner is that old: an age is in another unit, or another person's
SAME_AGE = 0.25  # years: sessions this near each other repeat one age
WORTH = 0.5  # reliability below which nothing is said of one person
FOLLOW_UP = (2, 4, 6)  # years, of the reliability table
FEWEST = 3  # people behind a group's rate, or behind the bias of a change of scanner
ENOUGH = 10  # people behind a spread, or degrees of freedom behind an error
UNIT = 5.0  # years between visits are given to the mixed model in these, or it does not converge
COMMON = "departures from one common rate, so real differences are in it"
NO_RATE = "A brain-age gap at one age is no rate of ageing: it may be as old as the person."
NOBODY = (
    "No rate of ageing: no person has two predicted sessions at different ages. Only people whom the model "
    f"had not seen count: those of the test split or, with final = True, everybody. {NO_RATE}"
)
NOT_IN_BUNDLE = (
    "No rate of ageing: this bundle does not say how far the model's ages of one person scatter. Train on a "
    "cohort in which people have two or more sessions at different ages, and run notebook 06."
)


@dataclass(frozen=True)
class RateScale:
    """What turns changes of predicted age into a rate, and tells what it is worth. A bundle keeps it.

    Attributes
    ----------
    slope : float
        Years of predicted age per year of true age (`AgeBiasCorrector.slope_`).
    error : float
        Standard deviation in years of a prediction about the person's own line: test-retest error.
    error_from : str
        Where that comes from, in words.
    mean : float
        Mean rate of the cohort, years a year.
    spread : float or None
        Standard deviation of true rates between people; None where too few people tell.
    differs : bool
        Whether rates are shown to differ at all (chi-square test of homogeneity, 5 %); else no verdict is
        given.
    n_subjects : int
        People behind mean and spread.
    """

    slope: float
    error: float
    error_from: str
    mean: float = 1.0
    spread: float | None = None
    differs: bool = False
    n_subjects: int = 0

    def reliability(self, error: pd.Series | np.ndarray | float) -> Any:
        """Share of the differences between people's rates that is real, where a rate has this error; NaN
        where the spread is not known."""
        real = np.nan if self.spread is None else self.spread**2
        return real / (real + np.square(error))

    def _is_worth(self, reliability: Any) -> Any:
        return self.differs & (reliability >= WORTH)

    def table(self) -> pd.DataFrame:
        """What the rate of one person with two visits is worth: `years, error, reliability, verdict`."""
        years = np.array(FOLLOW_UP)
        error = self.error * np.sqrt(2) / (self.slope * years)
        worth = self.reliability(error)
        verdicts = np.where(self._is_worth(worth), "can be given", "none on one person")
        return pd.DataFrame({"years": years, "error": error, "reliability": worth, "verdict": verdicts})

    def rate_people(self, visits: pd.DataFrame) -> pd.DataFrame:
        """Least squares over each person's visits: a row a person; see `fit_lines` for the columns.

        Beside them `rate` and its standard error `error` (years a year), `reliability` and `verdict`.
        """
        people = fit_lines(visits)
        people["rate"] = people["change"] / self.slope
        people["error"] = self.error / (self.slope * np.sqrt(people["sum_squares"]))
        people["reliability"] = self.reliability(people["error"])
        away = (people["rate"] - self.mean) / people["error"]
        words = ["no verdict", "faster than the mean", "slower than the mean"]
        chosen = [~self._is_worth(people["reliability"]), away > 1.96, away < -1.96]
        people["verdict"] = np.select(chosen, words, "not told from the mean")
        return people


def rate_one_person(known: dict[str, Any] | None, ages: list[float], predicted: list[float]) -> str:
    """The rate of one person from two or more scans, in a few sentences, or why there is none.

    Parameters
    ----------
    known : dict or None
        `rates` of a bundle's manifest.
    ages, predicted : list of float
        True and predicted age at each scan, years.

    Examples
    --------
    >>> known = {"slope": 0.8, "error": 2.0, "error_from": "20 repeat sessions", "spread": 0.3}
    >>> print(rate_one_person(known, [60.0, 64.0], [61.0, 65.0]).split(".")[0])
    Rate of ageing: 1
    """
    if not known:
        return NOT_IN_BUNDLE
    years, least = max(ages) - min(ages), _least_years(pd.Series(ages))
    if not least <= years <= MAX_YEARS:
        whole = ", as the ages are whole years" if least > MIN_YEARS else ""
        return (
            f"No rate of ageing: the scans are {years:.1f} years apart by their true ages, and expected are "
            f"{least:g} to {MAX_YEARS:g}{whole}. Give each scan the age at which it was made, with decimals."
        )
    if len({*predicted}) < len(predicted):
        return (
            "No rate of ageing: two scans have exactly the same predicted age, so they are one scan given "
            "twice. Give each visit its own scan."
        )
    scale = RateScale(**known)
    visits = pd.DataFrame({"subject_id": "", "age": ages, "predicted": predicted})
    person = scale.rate_people(visits).iloc[0]
    said = f"Rate of ageing: {person['rate']:.2f} years a year, standard error {person['error']:.2f}"
    said += f" ({len(ages)} scans over {years:.1f} years; error from {scale.error_from})."
    if not scale.differs:
        return f"{said} No verdict: the rates of this model's own cohort are not shown to differ."
    said += f" Reliability {person['reliability']:.2f}: that share of the differences between people is real"
    if person["reliability"] < WORTH:
        return f"{said}, the rest is error. No verdict on one person below {WORTH}."
    return f"{said}. Verdict: {person['verdict']} of {scale.n_subjects} people ({scale.mean:.2f})."


@dataclass
class Rates:
    """What a run's visits say.

    Attributes
    ----------
    people : DataFrame
        A row a person with a rate: `subject_id, sessions, first_age, years, rate, error, reliability,
        verdict, scanner` (from which site to which, or "") and, where it was planted, `planted`.
    visits : DataFrame
        Their sessions by age: `subject_id, session_id, age, predicted, site, group, regrouped`.
    groups : DataFrame
        `who, n_subjects, rate, rate_low, rate_high, method`: everybody, then differences from controls.
    scale : RateScale or None
        None where there is no rate.
    notes, warnings : list of str
        What to know of these rates; `warnings` are those to read first.
    """

    people: pd.DataFrame = field(default_factory=pd.DataFrame)
    visits: pd.DataFrame = field(default_factory=pd.DataFrame)
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)
    scale: RateScale | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        told: dict[str, Any] = {"groups": self.groups.to_dict("records"), "notes": self.warnings + self.notes}
        if self.scale is not None:
            told |= {"scale": asdict(self.scale), "reliability": self.scale.table().to_dict("records")}
        return told


def measure_rates(
    rows: pd.DataFrame,
    calibration: Calibration,
    *,
    controls: str | None = None,
    truth: pd.DataFrame | None = None,
) -> Rates:
    """Rates of ageing of people with two or more sessions at different ages.

    Parameters
    ----------
    rows : DataFrame
        One row a scan of people whom the model that predicted them had not seen (`Run.unseen`):
        `subject_id, session_id, age, predicted_age` (raw, years) and, where known, `site, diagnosis`.
    calibration : Calibration
        Its line gives the model's slope, by which changes are divided.
    controls : str, optional
        The diagnosis to compare others with; by default all controls.
    truth : DataFrame, optional
        Of the known-answer cohort, with `subject_id` and the planted `rate`.
    """
    visits, reference = list_visits(rows, controls)
    found = Rates(visits=visits)
    if found.visits.empty:
        return Rates(notes=[NOBODY])
    if calibration.corrector is None:
        return Rates(notes=[f"No rate of ageing: {calibration.refused}"])
    rated = _choose_people(found)
    changes = _find_scanner_changes(found.visits)
    stayed = [table[~table["subject_id"].isin(changes)] for table in (found.visits, rated)]
    scale = find_scale(*stayed, calibration.corrector.slope_)
    visits = stayed[0][stayed[0]["subject_id"].isin(rated["subject_id"])]
    found.visits = found.visits[found.visits["subject_id"].isin(rated["subject_id"])]
    if scale is None or rated.empty:
        few = "visits on one scanner are too few to tell the model's own error from a change"
        found.notes += [NOBODY if rated.empty else f"No rate of ageing: {few}."]
        return found
    scale, found.groups = _measure_groups(visits, scale, reference, calibration.corrector.slope_interval_)
    if n := found.visits.loc[found.visits["regrouped"], "subject_id"].nunique():
        found.notes.append(
            f"Diagnosis changes between visits of {n} people: they count as what they were first."
        )
    found.scale, found.people = scale, scale.rate_people(found.visits)
    found.people["scanner"] = found.people["subject_id"].map(changes).fillna("")
    moved = found.people["scanner"] != ""
    found.people["verdict"] = found.people["verdict"].mask(moved, "no verdict: another scanner")
    _warn_of_scanners(found)
    if truth is not None and "rate" in truth:
        _compare_with_planted(found, truth)
    spread = "not known: the visits are too few to tell it from error"
    if scale.spread is not None:
        low, high = bound_spread(found.people[~moved])
        spread = f"{scale.spread:.2f} years a year, from {scale.n_subjects} people (their errors allow "
        spread += f"{low:.2f} to {high:.2f}, and each reliability rests on it)"
        spread += "" if scale.differs else "; not shown to be above 0, so no verdict on one person is given"
    found.notes += [
        f"Error of one prediction about its person's own line: {scale.error:.2f} years ({scale.error_from}).",
        f"Spread of true rates between people (standard deviation): {spread}.",
        NO_RATE,
    ]
    return found


# --- visits ---------------------------------------------------------------------------------------------


def list_visits(rows: pd.DataFrame, controls: str | None = None) -> tuple[pd.DataFrame, str]:
    """One row a session of people with several, sorted by age, and the name of controls.

    Scans of one session are averaged; the group is the diagnosis at the first of them, and `regrouped` tells
    who has another one later.
    """
    named = {name: rows.get(name, "") for name in ("session_id", "site", "diagnosis")}
    rows = rows.assign(**named).fillna(dict.fromkeys(named, ""))
    group, reference = name_controls(rows, controls)
    keys = ["subject_id", "session_id", "age"]
    visits = rows.assign(group=group).groupby(keys, as_index=False)
    visits = visits.agg(predicted=("predicted_age", "mean"), site=("site", "first"), group=("group", "first"))
    visits = visits.sort_values(["subject_id", "age"], ignore_index=True).astype(
        {"session_id": str, "site": str}
    )
    people = visits.groupby("subject_id")["group"]
    known = visits["group"].mask(visits["group"] == "").groupby(visits["subject_id"])
    visits["regrouped"] = known.transform("nunique") > 1
    visits["group"] = people.transform("first")
    return visits[people.transform("size") > 1], reference


def fit_lines(visits: pd.DataFrame) -> pd.DataFrame:
    """A line through each person's visits: `subject_id, sessions, first_age, years` (first to last visit).

    Beside them `change` (years of predicted age a year), `sum_squares` (of ages about their mean), `residual`
    (sum of squared predictions about the line) and its degrees of freedom `df`.
    """
    people = visits.groupby("subject_id")
    t, y = (visits[name] - people[name].transform("mean") for name in ("age", "predicted"))
    products = pd.DataFrame({"tt": t * t, "ty": t * y, "yy": y * y})
    sums = products.groupby(visits["subject_id"]).sum()
    repeated = sums["tt"] < 1e-9
    change = (sums["ty"] / sums["tt"]).mask(repeated)
    found = people["age"].agg(sessions="size", first_age="min", years=np.ptp)
    found = found.assign(change=change, sum_squares=sums["tt"])
    found["residual"] = (sums["yy"] - change.fillna(0) * sums["ty"]).clip(lower=0)
    found["df"] = found["sessions"] - 2 + repeated
    return found.reset_index()


def _choose_people(found: Rates) -> pd.DataFrame:
    """Lines of those whose visits give a rate; a sentence for each kind of visits that gives none."""
    backwards = [name for name, part in found.visits.groupby("subject_id") if _goes_backwards(part)]
    if backwards:
        found.warnings.append(
            f"People younger at a later session: {len(backwards)} (first: {', '.join(backwards[:5])}). An "
            "age or a session is wrong, so they have no rate. Put the table of ages right, and run from "
            "notebook 01."
        )
    found.visits = found.visits[~found.visits["subject_id"].isin(backwards)]
    lines, least = fit_lines(found.visits), _least_years(found.visits["age"])
    if least > MIN_YEARS and len(lines):
        found.notes.append(
            f"Ages are whole years: visits may lie a year nearer or further, so {least:g} are needed between "
            "them. Ages with decimals give better rates."
        )
    if n := int((lines["years"] == 0).sum()):
        found.notes.append(
            f"People with one age in all their sessions: {n}; no rate. Repeats tell the model's error, "
            "unless it is the age at the first visit: then the table must give that at each (age_column)."
        )
    if n := int(lines["years"].between(0, least, inclusive="neither").sum()):
        found.notes.append(f"People with less than {least:g} years between their visits: {n}; no rate.")
    if (far := lines["years"] > MAX_YEARS).any():
        names = ", ".join(lines.loc[far, "subject_id"].head(5))
        found.warnings.append(
            f"People with more than {MAX_YEARS:g} years between their visits: {far.sum()} (first: {names}). "
            "An age is in another unit, or somebody else's, so they have no rate. Put the table of ages "
            "right, and run from notebook 01."
        )
    return lines[lines["years"].between(least, MAX_YEARS)]


def _least_years(ages: pd.Series) -> float:
    """Between first and last visit; a year more where ages are whole, so that each may be nearly one off."""
    return MIN_YEARS + bool((ages % 1 == 0).all())


def _goes_backwards(visits: pd.DataFrame) -> bool:
    """Whether ages of one person fall as sessions go on, where labels have an order (`01`, `W2`, `bl`)."""
    labels = [re.fullmatch(r"(.*?)(\d+)", label.lower()) for label in visits["session_id"]]
    is_first = [label.lower() in WORDS["visits"]["first"] for label in visits["session_id"]]
    pairs = list(zip(labels, is_first, strict=True))
    if not all(match or first for match, first in pairs) or sum(is_first) > 1:
        return False
    if len({match[1] for match, first in pairs if not first}) > 1:
        return False
    order = [-1 if first else int(match[2]) for match, first in pairs]
    return bool((visits["age"].iloc[np.argsort(order, kind="stable")].diff() < 0).any())


# --- what a rate is worth -------------------------------------------------------------------------------


def find_scale(visits: pd.DataFrame, rated: pd.DataFrame, slope: float) -> RateScale | None:
    """Slope and test-retest error: the larger of what repeats at one age and people's own lines say.

    Give visits and lines of people whose scanner stayed. Each source counts from `ENOUGH` degrees of freedom
    on. With neither, departures from one common change stand for it, and real differences between people are
    in them. None where even those are too few.
    """
    lines = fit_lines(visits)
    repeats = lines[lines["years"] < SAME_AGE]
    own = rated[rated["df"] > 0]
    sums = {
        "sessions repeated at one age": (repeats["residual"], repeats["sessions"] - 1),
        "departures from people's own lines": (own["residual"], own["df"]),
    }
    errors = {
        f"{words}, {len(df)} people": np.sqrt(squares.sum() / df.sum())
        for words, (squares, df) in sums.items()
        if df.sum() >= ENOUGH
    }
    if not errors and (df := int((rated["sessions"] - 1).sum()) - 1) >= FEWEST:
        common = np.average(rated["change"], weights=rated["sum_squares"])
        squares = rated["residual"] + (rated["change"] - common) ** 2 * rated["sum_squares"]
        errors[f"{COMMON}; {len(rated)} people"] = np.sqrt(squares.sum() / df)
    if not errors or not max(errors.values()) > 0:
        return None
    worst = max(errors, key=errors.get)
    return RateScale(slope=slope, error=float(errors[worst]), error_from=worst)


# --- groups ---------------------------------------------------------------------------------------------


def _measure_groups(
    visits: pd.DataFrame, scale: RateScale, reference: str, slope_interval: list[float]
) -> tuple[RateScale, pd.DataFrame]:
    """The scale with mean and spread of people whose scanner stayed, and `Rates.groups`."""
    people = scale.rate_people(visits)
    if len(people) < FEWEST:
        return scale, pd.DataFrame()
    spread, p, *rows = fit_groups(visits, people, scale.slope, reference)
    scale = replace(scale, mean=rows[0]["rate"], n_subjects=len(people))
    if len(people) >= ENOUGH and not scale.error_from.startswith(COMMON):
        scale = replace(scale, spread=spread, differs=bool(p < 0.05))
    return scale, pd.DataFrame([_widen(row, slope_interval) for row in rows])


def fit_groups(visits: pd.DataFrame, people: pd.DataFrame, slope: float, reference: str) -> list[Any]:
    """Spread between people, p of no spread, then rows of `Rates.groups`: everybody, and differences from the
    reference.

    A linear mixed model: corrected age on the mean age at visits and years before or after it, so that only
    what changes within people makes the rate; random intercept, and random slope where `ENOUGH` people have
    three or more sessions. Where it does not converge, people's own rates are pooled (random effects), and
    `method` says so.
    """
    from statsmodels.stats.meta_analysis import combine_effects

    pooled = combine_effects(people["rate"], people["error"] ** 2, method_re="dl", use_t=True)
    spread, ends = float(np.sqrt(max(pooled.tau2, 0.0))), pooled.conf_int()[1]
    p = float(pooled.test_homogeneity().pvalue)
    middle = visits.groupby("subject_id")["age"].transform("mean")
    rows = visits.assign(decades=(middle - middle.mean()) / 10, since=(visits["age"] - middle) / UNIT)
    rows["corrected"] = (rows["predicted"] - rows["predicted"].mean()) / slope
    with_slope = (people["sessions"] > 2).sum() >= ENOUGH
    fitted, method = fit_mixed("corrected ~ decades + since", rows, with_slope=with_slope)
    everybody = _as_rate(pooled.mean_effect_re, *ends)
    if fitted is None:
        method = f"{method}; people's own rates pooled instead"
    else:
        everybody = _read_term(fitted, "since")
        if "slope" in method:
            spread = float(np.sqrt(fitted.cov_re.loc["since", "since"]) / UNIT)
    found = [{"who": "everybody", "n_subjects": len(people)} | everybody | {"method": method}]
    counts = rows.groupby("group")["subject_id"].nunique().drop("", errors="ignore")[lambda n: n >= FEWEST]
    if reference not in counts or len(counts) < 2:
        return [spread, p, *found]
    contrast = f"C(group, Treatment({reference!r}))"
    rows = rows[rows["group"].isin(counts.index)]
    fitted, method = fit_mixed(f"corrected ~ decades + since * {contrast}", rows, with_slope=with_slope)
    for name, n in counts.drop(reference).items():
        term = _read_term(fitted, f"since:{contrast}[T.{name}]") if fitted is not None else {}
        found.append({"who": f"{name} minus {reference}", "n_subjects": int(n)} | term | {"method": method})
    return [spread, p, *found]


def bound_spread(people: pd.DataFrame) -> list[float]:
    """Ends of a 95 % interval of the spread between people, years a year (Q-profile, Viechtbauer 2007).

    The spreads beside which people's departures from their mean are neither too small nor too large; their
    errors are taken as known.
    """
    from scipy import optimize, stats

    def departure(spread: float, share: float) -> float:
        weights = 1 / (people["error"] ** 2 + spread**2)
        mean = np.average(people["rate"], weights=weights)
        return np.sum(weights * (people["rate"] - mean) ** 2) - stats.chi2.ppf(share, len(people) - 1)

    widest = 10 * people["rate"].std()
    return [
        optimize.brentq(departure, 0, widest, args=(share,)) if departure(0, share) > 0 else 0.0
        for share in (0.975, 0.025)
    ]


def fit_mixed(formula: str, rows: pd.DataFrame, *, with_slope: bool) -> tuple[Any, str]:
    """A converged `MixedLM` by subject and what it is, in words; None where none converges."""
    from statsmodels.formula.api import mixedlm

    for random in (["~since"] if with_slope else []) + ["1"]:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                fitted = mixedlm(formula, rows, groups=rows["subject_id"], re_formula=random)
                fitted = fitted.fit(method=["lbfgs", "powell"])
        except np.linalg.LinAlgError:
            continue
        doubted = random != "1" and any("singular" in str(one.message) for one in said)
        if fitted.converged and np.isfinite(fitted.bse_fe).all() and not doubted:
            return fitted, f"mixed model, random intercept{' and slope' if random != '1' else ''}"
    return None, "the mixed model did not converge"


def _read_term(fitted: Any, term: str) -> dict[str, float]:
    """Rate with its 95 % t-interval, which counts people, not visits."""
    from scipy import stats

    rate = fitted.fe_params[term] / UNIT
    half = fitted.bse_fe[term] / UNIT * stats.t.ppf(0.975, max(fitted.model.n_groups - 2, 1))
    return _as_rate(rate, rate - half, rate + half)


def _as_rate(rate: float, low: float, high: float) -> dict[str, float]:
    return {"rate": float(rate), "rate_low": float(low), "rate_high": float(high)}


def _widen(row: dict[str, Any], slope_interval: list[float]) -> dict[str, Any]:
    """The same row, its interval with the uncertainty of the model's slope in it."""
    if "rate" not in row:
        return row | dict.fromkeys(("rate", "rate_low", "rate_high"), np.nan)
    low, high = slope_interval
    of_slope = row["rate"] * (high - low) / (high + low)
    half = np.hypot((row["rate_high"] - row["rate_low"]) / 2, of_slope)
    return row | {"rate_low": row["rate"] - half, "rate_high": row["rate"] + half}


# --- scanners, and the truth that was planted -----------------------------------------------------------


def _find_scanner_changes(visits: pd.DataFrame) -> dict[str, str]:
    """Who was scanned at more than one site: subject -> from which to which."""
    known = visits[visits["site"] != ""].groupby("subject_id")["site"]
    each = {name: list(dict.fromkeys(sites)) for name, sites in known}
    return {name: " to ".join(sites) for name, sites in each.items() if len(sites) > 1}


def _warn_of_scanners(found: Rates) -> None:
    """Name those whose scanner changed; estimate what each change adds where several people made it."""
    from statsmodels.stats.weightstats import DescrStatsW

    if (found.visits["site"] == "").all():
        found.notes.append("No site is known, so a change of scanner between visits cannot be seen.")
    people, told = found.people[found.people["scanner"] != ""], []
    for change, part in people.groupby("scanner"):
        names = ", ".join(part["subject_id"].head(5)) + (", …" if len(part) > 5 else "")
        added, shown = _measure_change(found, part["subject_id"], change), "too few to say how much"
        if len(added) >= FEWEST:
            low, high = DescrStatsW(added).tconfint_mean()
            shown = f"it adds {with_interval({'value': added.mean(), 'low': low, 'high': high}, 1)} years"
        told.append(f"{change}, {len(part)} ({names}): {shown}")
    if told:
        found.warnings.append(
            f"Scanner changed between visits of {len(people)} people: what that adds to the brain age is in "
            f"their rates, so they are in no rate of a group. {'; '.join(told)}."
        )


def _measure_change(found: Rates, subjects: pd.Series, change: str) -> pd.Series:
    """Years that a change of scanner adds to each of these people's brain age, beyond the mean rate."""
    rows = found.visits[found.visits["subject_id"].isin(subjects)]
    last = rows["site"] == change.split(" to ")[-1]
    before, after = (rows[of].groupby("subject_id")[["age", "predicted"]].mean() for of in (~last, last))
    apart = after - before
    return apart["predicted"] / found.scale.slope - found.scale.mean * apart["age"]


def _compare_with_planted(found: Rates, truth: pd.DataFrame) -> None:
    """Add `planted` to the people, and say how much of it is found beside what the error lets one expect."""
    planted = truth.dropna(subset=["rate"]).drop_duplicates("subject_id").set_index("subject_id")["rate"]
    found.people["planted"] = found.people["subject_id"].map(planted)
    rows = found.people[(found.people["scanner"] == "") & found.people["planted"].notna()]
    if len(rows) < FEWEST or rows["planted"].nunique() < 2:
        return
    figures = regression_metrics(rows["planted"], rows["rate"])
    expected = expect_r(rows["planted"], rows["error"])
    row, scale = flat(figures), found.scale
    spread = "not known" if scale.spread is None else f"{scale.spread:.2f}"
    found.notes.append(
        f"Known answers: recovered on planted rate of {len(rows)} people: r {with_interval(row, key='r')} "
        f"(expected from the errors: {expected:.2f}), slope {with_interval(row, key='slope')}. "
        f"Planted: mean {rows.planted.mean():.2f}, spread (standard deviation) {rows.planted.std():.2f} "
        f"years a year; found: mean {scale.mean:.2f}, spread {spread}."
    )


def expect_r(planted: pd.Series, error: pd.Series) -> float:
    """Mean correlation of planted rates with rates off by no more than their standard errors (200 draws)."""
    drawn = planted.to_numpy() + np.random.default_rng(0).normal(0, error, (200, len(error)))
    return float(np.mean([np.corrcoef(planted, one)[0, 1] for one in drawn]))
