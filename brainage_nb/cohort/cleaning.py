"""Which scans are kept, which are dropped and why, which are odd: rules over the facts that inspection found.

Opens no file. A dropped scan has one reason, and its sentence names what was found and the limit it was held
against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.inspection import FACTS
from brainage_nb.cohort.names import read_toml
from brainage_nb.parameters import check_fields
from brainage_nb.volumes.scans import MAX_VOXELS, SCAN_ERRORS, SCAN_FLAGS

ID_COLUMNS = ("scan_id", "subject_id", "session_id", "image")
EDGES = ("left", "right", "back", "front", "top")
_FINDINGS = read_toml("findings.toml")
REASONS = SCAN_ERRORS | {code: meaning for code, (meaning, _) in _FINDINGS["reasons"].items()}
FLAGS = SCAN_FLAGS | {code: meaning for code, (meaning, _) in _FINDINGS["flags"].items()}
SENTENCES = {code: text for kind in _FINDINGS.values() for code, (_, text) in kind.items()}


@dataclass(frozen=True)
class CleaningRules:
    """Every limit that cleaning uses.

    Attributes
    ----------
    max_voxels : int
        Most voxels a header may claim before the file is refused unopened.
    min_voxels_per_axis : int
        Fewest voxels along each axis.
    min_voxel_mm, max_voxel_mm : float
        Shortest and longest edge of a voxel [mm]. Thick clinical slices have 6.5 mm.
    min_field_of_view_mm, max_field_of_view_mm : float
        Shortest and longest extent of the image along an axis [mm]. A small adult brain is 100 mm high.
    max_equal_neighbours : float
        Largest share of bright voxels with a neighbour exactly as bright; label maps have above 0.6, images
        below 0.3.
    min_intensity_p1 : float
        Least 1st percentile of intensity; CT has -1000 in air. Only held against scans whose negative part is
        also more than a quarter of their range.
    min_head_ml, max_head_ml : float
        Least and largest volume of what stands out from the background [ml]. A small adult brain without
        skull has 850 ml, a macaque's 100 ml, a head with neck and shoulders less than 9000 ml.
    max_edge_fraction : float
        Flag a head whose section in an outermost slice is more than this share of its largest section. At
        the lower edge, where every neck is cut, only the height below the crown counts.
    min_age, max_age : float
        Youngest and oldest possible age [years].
    adult_from, adult_to : float
        Ages [years] outside which a scan is flagged: the preprocessing is checked on adults.
    max_years_between : float
        A person's scans further apart by their ages are dropped [years]: an age is in another unit, or of
        somebody else.
    same_age_years : float
        Two ages of one picture that differ by no more than this are taken as the same age [years].
    coarse_mm : float
        Flag voxels with a longer edge [mm]. The model's grid has 2 mm, slices of clinical routine 4 to 6.5.
    oblique_degrees : float
        Flag axes tilted by more [degrees].
    few_values : int
        Flag scans with fewer distinct intensities.
    max_at_maximum : float
        Flag scans in which a larger share of bright voxels has exactly the greatest intensity.
    outlier_z : float
        Flag a scan this many robust standard deviations (1.48 x median absolute deviation) from the median.
    outlier_ratio : float
        ... and also by at least this factor: in an even cohort many robust deviations are still little.
    min_cohort : int
        Fewest scans from which outliers are judged.
    """

    max_voxels: int = MAX_VOXELS
    min_voxels_per_axis: int = 16
    min_voxel_mm: float = 0.2
    max_voxel_mm: float = 7.0
    min_field_of_view_mm: float = 95.0
    max_field_of_view_mm: float = 600.0
    max_equal_neighbours: float = 0.5
    min_intensity_p1: float = -500.0
    min_head_ml: float = 600.0
    max_head_ml: float = 12000.0
    max_edge_fraction: float = 0.25
    min_age: float = 0.0
    max_age: float = 115.0
    max_years_between: float = 40.0
    adult_from: float = 18.0
    adult_to: float = 95.0
    same_age_years: float = 0.1
    coarse_mm: float = 2.2
    oblique_degrees: float = 20.0
    few_values: int = 32
    max_at_maximum: float = 0.02
    outlier_z: float = 5.0
    outlier_ratio: float = 1.3
    min_cohort: int = 10

    def __post_init__(self) -> None:
        check_fields(self)


# --- what one scan is in itself ---------------------------------------------------------------------------


def _is_beyond(values: Iterable[float], least: float, most: float) -> bool:
    return not all(least <= value <= most for value in values)


def _cut_edges(scan: Any, rules: CleaningRules) -> str:
    limit = rules.max_edge_fraction
    cut = [
        f"{edge} ({share:.0%} of its largest section, over {limit:.0%})"
        for edge, share in zip(EDGES, scan.edge_fractions, strict=True)
        if share > limit
    ]
    # A brain without skull is too short below its crown by nature.
    if scan.bottom_cut and not scan.skull_stripped:
        cut.append("bottom (too close below the crown)")
    return ", ".join(cut)


def _is_negative(scan: Any, rules: CleaningRules) -> bool:
    span = scan.intensity_p99 - scan.intensity_p1
    return scan.intensity_p1 < rules.min_intensity_p1 and scan.intensity_p1 < -0.25 * span


def _tell_note(scan: Any, _rules: CleaningRules) -> str:
    note = scan.age_note
    return f"{note[0].upper()}{note[1:].rstrip('.')}." if note else ""


# fmt: off
TESTS: dict[str, Callable[[Any, CleaningRules], Any]] = {
    "too_small": lambda scan, rules: min(scan.shape) < rules.min_voxels_per_axis,
    "voxel_size": lambda scan, rules: _is_beyond(scan.voxel_mm, rules.min_voxel_mm, rules.max_voxel_mm),
    "field_of_view": lambda scan, rules: _is_beyond(
        scan.field_of_view_mm, rules.min_field_of_view_mm, rules.max_field_of_view_mm),
    "label_map": lambda scan, rules: scan.equal_neighbours > rules.max_equal_neighbours,
    "negative": _is_negative,
    "head_size": lambda scan, rules: _is_beyond([scan.head_ml], rules.min_head_ml, rules.max_head_ml),
    "no_age": lambda scan, rules: not np.isfinite(scan.age),
    "impossible_age": lambda scan, rules: _is_beyond([scan.age], rules.min_age, rules.max_age),
    "skull_stripped": lambda scan, rules: scan.skull_stripped,
    "head_cut_off": _cut_edges,
    "coarse": lambda scan, rules: max(scan.voxel_mm) > rules.coarse_mm,
    "oblique": lambda scan, rules: scan.oblique_degrees > rules.oblique_degrees,
    "few_values": lambda scan, rules: scan.n_values < rules.few_values,
    "clipped": lambda scan, rules: scan.at_maximum > rules.max_at_maximum,
    "age_outside_adult": lambda scan, rules: _is_beyond([scan.age], rules.adult_from, rules.adult_to),
    "age_note": _tell_note,
}
# fmt: on
"""Whether a scan is so, or what is found in it, by code; the first reason counts."""
OUTLIERS = {"size_outlier": "head_mm", "intensity_outlier": "brightness"}


# --- judging -------------------------------------------------------------------------------------------


def clean(cohort: pd.DataFrame, facts: pd.DataFrame, rules: CleaningRules | None = None) -> pd.DataFrame:
    """Decide for every scan whether it is kept, and say why not or what is odd.

    Parameters
    ----------
    cohort : DataFrame
        `scan_id, subject_id, session_id, image, age` (years), and `age_note` where the table needed a rule.
    facts : DataFrame
        What `inspect_scans` found, one row per scan.
    rules : CleaningRules, optional
        The limits; by default `CleaningRules()`.

    Returns
    -------
    DataFrame
        One row per scan, in the order of `cohort`: `scan_id, subject_id, session_id, image, kept` (bool),
        `reason` (code of `REASONS`, empty where kept), `flags` (codes of `FLAGS` joined by `;` where kept),
        `detail` (sentences), then the facts.

    Raises
    ------
    ValueError
        Where `facts` is not about the scans of `cohort`.

    Examples
    --------
    >>> facts = inspect_scans(cohort, ws.resolve)  # doctest: +SKIP
    >>> cleaning = clean(cohort, facts, CleaningRules(max_age=95))  # doctest: +SKIP
    >>> cleaning.loc[~cleaning["kept"], ["scan_id", "reason", "detail"]]  # doctest: +SKIP
    """
    rules, scans = rules or CleaningRules(), _join(cohort, facts)
    reasons: dict[str, tuple[str, str]] = {}
    flags: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for judge in (_judge_alone, _find_copies, _compare_ages, _compare_sessions, _find_outliers):
        left = scans[~scans["scan_id"].isin(reasons)]
        for scan, code, found in judge(left, rules):
            sentence = SENTENCES.get(code, "{found}").format(scan=scan, rules=rules, found=found)
            if code in REASONS:
                reasons.setdefault(scan.scan_id, (code, sentence))  # the first one counts
            else:
                flags[scan.scan_id].append((code, sentence))
    return _to_table(scans, reasons, flags)


def counts_by_reason(cleaning: pd.DataFrame) -> pd.DataFrame:
    """Count scans: kept ones, then every reason and every flag that occurs, each with its meaning.

    Returns
    -------
    DataFrame
        `outcome` (kept, dropped, flagged), `code`, `scans`, `meaning`; a scan with two flags counts in both.
    """
    dropped = cleaning.loc[~cleaning["kept"], "reason"].value_counts()
    flags = cleaning.loc[cleaning["kept"], "flags"].str.split(";").explode()
    flagged = flags[flags.fillna("") != ""].value_counts()
    clear = int((cleaning["kept"] & (cleaning["flags"] == "")).sum())
    rows = [("kept", "", int(cleaning["kept"].sum()), f"of which {clear} without any flag")]
    rows += [("dropped", code, int(count), REASONS[code]) for code, count in dropped.items()]
    rows += [("flagged", code, int(count), FLAGS[code]) for code, count in flagged.items()]
    return pd.DataFrame(rows, columns=["outcome", "code", "scans", "meaning"])


def _join(cohort: pd.DataFrame, facts: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in (*ID_COLUMNS, "age", "age_note") if name in cohort]
    if cohort["scan_id"].duplicated().any() or set(cohort["scan_id"]) != set(facts["scan_id"]):
        raise ValueError(
            f"The facts are of {len(facts)} scans and the cohort has {len(cohort)}, with other scan_ids or "
            "one twice. Inspect this cohort again: inspect_scans(cohort, …)."
        )
    scans = cohort[known].merge(facts, on="scan_id", how="left")
    scans["age"] = pd.to_numeric(scans["age"], errors="coerce")
    scans["age_note"] = scans["age_note"].fillna("") if "age_note" in scans else ""
    return scans.map(lambda cell: _Sizes(cell) if isinstance(cell, tuple) else cell)


class _Sizes(tuple):
    """Lengths along axes, written as `2 x 2 x 2.5`."""

    def __format__(self, _spec: str) -> str:
        return " x ".join(f"{number:g}" for number in self)


Found = Iterator[tuple[Any, str, Any]]
"""A scan's row, a code of `REASONS`, which drops it, or of `FLAGS`, and what its sentence is filled with."""


def _judge_alone(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """What each scan is in itself."""
    for scan in scans.itertuples():
        if scan.error:
            yield scan, scan.error, scan.error_detail
            continue
        for code, sentence in scan.file_flags.items():
            yield scan, code, sentence
        for code, test in TESTS.items():
            if found := test(scan, rules):
                yield scan, code, found


def _find_copies(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """Pictures that occur twice: one copy stays, flagged. Where ages contradict each other nobody can say
    which label is right, so none stays."""
    for _, same in scans.groupby("voxels_sha256", sort=False):
        first, *others = same.itertuples()
        apart = np.ptp(same["age"])
        if apart > rules.same_age_years:
            named = ", ".join(f"{scan.scan_id} (age {scan.age:.1f})" for scan in (first, *others))
            yield from ((scan, "ambiguous", f"{named}; {apart:.1f}") for scan in (first, *others))
        elif others:
            yield first, "same_picture", ", ".join(scan.scan_id for scan in others)
            yield from ((scan, "duplicate", first.scan_id) for scan in others)


def _compare_ages(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """People whose ages span more than any follow-up: nobody can say which is right, so none stays."""
    for _, same in scans.groupby("subject_id", sort=False):
        ages = same["age"].sort_values()
        if ages.iloc[-1] - ages.iloc[0] > rules.max_years_between:
            named = ", ".join(f"{age:g}" for age in ages.unique())
            yield from ((scan, "ages_apart", named) for scan in same.itertuples())


def _compare_sessions(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    for (subject, session), same in scans.groupby(["subject_id", "session_id"], dropna=False, sort=False):
        where = f"subject {subject}" + (f", session {session}" if session else "")
        apart = np.ptp(same["age"])
        for scan in same.itertuples() if len(same) > 1 else ():
            yield scan, "several_scans", f"{len(same)} scans of {where}"
            if apart > rules.same_age_years:
                yield scan, "age_conflict", f"{where} have ages {apart:.1f}"


def _find_outliers(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """Scans far from the cohort's median in head size or in how intensities are spread."""
    # Without a skull a head is small and evenly bright by nature: judged among its own kind.
    kinds = [kind for _, kind in scans.groupby("skull_stripped") if len(kind) >= rules.min_cohort]
    for kind, (code, column) in product(kinds, OUTLIERS.items()):
        logs = np.log(kind[column].astype(float))
        middle = logs.median()
        spread = 1.4826 * (logs - middle).abs().median()
        far = (logs - middle).abs() > np.maximum(rules.outlier_z * spread, np.log(rules.outlier_ratio))
        yield from ((scan, code, f"{np.exp(middle):.3g}") for scan in kind[far].itertuples())


def _to_table(
    scans: pd.DataFrame, reasons: dict[str, tuple[str, str]], flags: dict[str, list[tuple[str, str]]]
) -> pd.DataFrame:
    rows = []
    for scan in scans["scan_id"]:
        reason = reasons[scan][0] if scan in reasons else ""
        header = [flag for flag in flags[scan] if flag[0] in SCAN_FLAGS]  # it may say why
        said = [reasons[scan], *header] if reason else flags[scan]
        codes = "" if reason else ";".join(code for code, _ in said)
        rows.append((not reason, reason, codes, " ".join(sentence for _, sentence in said)))
    verdicts = pd.DataFrame(rows, scans.index, ["kept", "reason", "flags", "detail"]).astype({"kept": bool})
    measured = scans[[*FACTS]].drop(columns=["scan_id", "error", "error_detail", "file_flags"])
    measured = measured.map(lambda cell: f"{cell}" if isinstance(cell, _Sizes) else cell)
    return pd.concat([scans.filter(ID_COLUMNS), verdicts, measured], axis="columns")
