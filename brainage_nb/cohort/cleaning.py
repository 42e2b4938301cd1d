"""Which scans are kept, which are dropped and why, which are odd: rules over the facts that inspection found.

Opens no file. A dropped scan has one reason, and its sentence names what was found and the limit it was held
against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.inspection import FACTS
from brainage_nb.parameters import check_fields
from brainage_nb.volumes.scans import MAX_VOXELS, SCAN_ERRORS, SCAN_FLAGS

ID_COLUMNS = ("scan_id", "subject_id", "session_id", "image")
EDGES = ("left", "right", "back", "front", "top")
REASONS = {
    **SCAN_ERRORS,
    "too_small": "too few voxels along an axis",
    "voxel_size": "a voxel size no head scan has",
    "field_of_view": "the image spans less than a human brain, or more than a person",
    "label_map": "a label map or mask, not intensities",
    "negative": "strongly negative intensities, as in CT or phase images",
    "head_size": "what is in the image is too small, or too large, for a human head",
    "no_age": "no age is known",
    "impossible_age": "an age no person has",
    "duplicate": "the same picture stands in the cohort already",
    "ambiguous": "the same picture under ids or ages that contradict each other",
}
FLAGS = {
    **SCAN_FLAGS,
    "skull_stripped": "the skull seems to be removed already",
    "head_cut_off": "the head touches the edge of the image",
    "coarse": "voxels coarser than the model's grid, or thick slices",
    "oblique": "the axes are tilted against the body's",
    "few_values": "few grey levels",
    "clipped": "many voxels at exactly the greatest intensity",
    "size_outlier": "the head's size is unlike the rest of the cohort's",
    "intensity_outlier": "the intensities are spread unlike the rest of the cohort's",
    "age_outside_adult": "an age outside the adult range",
    "age_conflict": "ages of one session disagree",
    "several_scans": "one of several scans of a session",
    "same_picture": "the same picture was also listed elsewhere; this copy was kept",
    "age_note": "the table needed a rule to give this age",
}


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


# --- findings: a code, its test (a scan's facts, the limits), its sentence --------------------------------
# A sentence is filled with the scan, the rules, and what the test found.


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


def _sentence(note: Any) -> str:
    return f"{note[0].upper()}{note[1:].rstrip('.')}." if isinstance(note, str) and note else ""


Findings = tuple[tuple[str, Callable[[Any, CleaningRules], Any], str], ...]
# fmt: off
IMPOSSIBLE: Findings = (
    ("too_small", lambda scan, rules: min(scan.shape) < rules.min_voxels_per_axis,
     "{scan.shape} voxels; at least {rules.min_voxels_per_axis} are needed along each axis."),
    ("voxel_size",
     lambda scan, rules: min(scan.voxel_mm) < rules.min_voxel_mm or max(scan.voxel_mm) > rules.max_voxel_mm,
     "Voxels of {scan.voxel_mm} mm; expected edges of {rules.min_voxel_mm:g} to {rules.max_voxel_mm:g} mm."),
    ("field_of_view", lambda scan, rules: min(scan.field_of_view_mm) < rules.min_field_of_view_mm,
     "The image spans {scan.field_of_view_mm} mm; a whole human brain needs at least "
     "{rules.min_field_of_view_mm:g} mm along each axis. A slab, a fragment, or an animal?"),
    ("field_of_view", lambda scan, rules: max(scan.field_of_view_mm) > rules.max_field_of_view_mm,
     "The image spans {scan.field_of_view_mm} mm, more than {rules.max_field_of_view_mm:g} mm: wrong voxel "
     "size?"),
    ("label_map", lambda scan, rules: scan.equal_neighbours > rules.max_equal_neighbours,
     "{scan.equal_neighbours:.0%} of bright voxels have a neighbour of exactly the same value "
     "({scan.n_values} values in all); above {rules.max_equal_neighbours:.0%} it is a label map."),
    ("negative",
     lambda scan, rules: scan.intensity_p1 < rules.min_intensity_p1
     and scan.intensity_p1 < -0.25 * (scan.intensity_p99 - scan.intensity_p1),
     "Intensities reach from {scan.intensity_p1:.0f} to {scan.intensity_p99:.0f} (1st and 99th percentile); "
     "T1-weighted images have none below {rules.min_intensity_p1:g}. CT (air is -1000) or a phase image?"),
    ("head_size", lambda scan, rules: not rules.min_head_ml <= scan.head_ml <= rules.max_head_ml,
     "{scan.head_ml:.0f} ml stand out from the background; a human brain or head has {rules.min_head_ml:g} "
     "to {rules.max_head_ml:g} ml. An animal, or a wrong voxel size?"),
)
ODD: Findings = (
    ("no_age", lambda scan, rules: not np.isfinite(scan.age),
     "The table gives this scan no age that can be used."),
    ("impossible_age", lambda scan, rules: not rules.min_age <= scan.age <= rules.max_age,
     "Age {scan.age:g} years; possible is {rules.min_age:g} to {rules.max_age:g}."),
    ("skull_stripped", lambda scan, rules: scan.skull_stripped,
     "The skull seems to be removed already ({scan.head_ml:.0f} ml, no dark bone under the surface)."),
    ("head_cut_off", _cut_edges, "The edge of the image cuts the head: {found}."),
    ("coarse", lambda scan, rules: max(scan.voxel_mm) > rules.coarse_mm,
     "Voxels of {scan.voxel_mm} mm; edges above {rules.coarse_mm:g} mm blur the cortex."),
    ("oblique", lambda scan, rules: scan.oblique_degrees > rules.oblique_degrees,
     "The axes are tilted by {scan.oblique_degrees:.0f} degrees (over {rules.oblique_degrees:g})."),
    ("few_values", lambda scan, rules: scan.n_values < rules.few_values,
     "Only {scan.n_values} grey levels (under {rules.few_values}); was it saved twice?"),
    ("clipped", lambda scan, rules: scan.at_maximum > rules.max_at_maximum,
     "{scan.at_maximum:.1%} of bright voxels have exactly the greatest intensity (over "
     "{rules.max_at_maximum:.0%}): clipped, or lettering in the image?"),
    ("age_outside_adult", lambda scan, rules: not rules.adult_from <= scan.age <= rules.adult_to,
     "Age {scan.age:.1f} years; methods and figures are checked on {rules.adult_from:g} to "
     "{rules.adult_to:g}."),
    ("age_note", lambda scan, rules: _sentence(getattr(scan, "age_note", "")), "{found}"),
)
OUTLIERS = (
    ("size_outlier", "head_mm", "The head measures {value:.0f} mm (width and length, geometric mean)"),
    ("intensity_outlier", "brightness", "The head's median is {value:.2f} of its 99th percentile"),
)
# fmt: on


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
    >>> cleaning = clean(cohort, inspect_scans(cohort, ws.resolve), CleaningRules(max_age=95))
    >>> cleaning.loc[~cleaning["kept"], ["scan_id", "reason", "detail"]]
    """
    rules, scans = rules or CleaningRules(), _join(cohort, facts)
    reasons: dict[str, tuple[str, str]] = {}
    flags: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for judge in (_judge_alone, _find_copies, _compare_sessions, _find_outliers):
        left = scans[~scans["scan_id"].isin(reasons)]
        for scan_id, code, sentence in judge(left, rules):
            if code in REASONS:
                reasons.setdefault(scan_id, (code, sentence))  # the first one counts
            else:
                flags[scan_id].append((code, sentence))
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
    return scans.map(lambda cell: _Sizes(cell) if isinstance(cell, tuple) else cell)


class _Sizes(tuple):
    """Lengths along axes, written as `2 x 2 x 2.5`."""

    def __format__(self, _spec: str) -> str:
        return " x ".join(f"{number:g}" for number in self)


Found = Iterator[tuple[str, str, str]]
"""(scan_id, code, sentence): a code of `REASONS` drops the scan, one of `FLAGS` does not."""


def _judge_alone(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """What each scan is in itself."""
    for scan in scans.itertuples():
        if scan.error:
            yield scan.scan_id, scan.error, scan.error_detail
            continue
        header = scan.file_flags
        for code, found in _hold_against(IMPOSSIBLE, scan, rules):
            yield scan.scan_id, code, " ".join([found, *header.values()])  # the header may say why
        for code, found in (*header.items(), *_hold_against(ODD, scan, rules)):
            yield scan.scan_id, code, found


def _hold_against(findings: Findings, scan: Any, rules: CleaningRules) -> Iterator[tuple[str, str]]:
    for code, test, sentence in findings:
        if found := test(scan, rules):
            yield code, sentence.format(scan=scan, rules=rules, found=found)


def _find_copies(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """Pictures that occur twice: one copy stays, flagged. Where ages contradict each other nobody can say
    which label is right, so none stays."""
    for _, copies in scans.groupby("voxels_sha256", sort=False):
        first, *others = copies["scan_id"]
        apart = np.ptp(copies["age"])
        if apart > rules.same_age_years:
            named = ", ".join(f"{row.scan_id} (age {row.age:.1f})" for row in copies.itertuples())
            sentence = (
                f"The same picture stands under {named}; {apart:.1f} years apart, so which age is right "
                "cannot be told. None is kept; correct the table or the files."
            )
            yield from ((scan, "ambiguous", sentence) for scan in copies["scan_id"])
        elif others:
            yield first, "same_picture", f"The same picture also stands under {', '.join(others)}."
            for scan in others:
                yield scan, "duplicate", f"The same picture as {first}, which is kept."


def _compare_sessions(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    for (subject, session), same in scans.groupby(["subject_id", "session_id"], dropna=False, sort=False):
        where = f"subject {subject}" + (f", session {session}" if session else "")
        apart = np.ptp(same["age"])
        for scan in same["scan_id"] if len(same) > 1 else ():
            yield scan, "several_scans", f"One of {len(same)} scans of {where}; all stay in one split."
            if apart > rules.same_age_years:
                yield scan, "age_conflict", f"The scans of {where} have ages {apart:.1f} years apart."


def _find_outliers(scans: pd.DataFrame, rules: CleaningRules) -> Found:
    """Scans far from the cohort's median in head size or in how intensities are spread."""
    # Without a skull a head is small and evenly bright by nature: judged among its own kind.
    kinds = [kind for _, kind in scans.groupby("skull_stripped") if len(kind) >= rules.min_cohort]
    for kind, (code, column, sentence) in product(kinds, OUTLIERS):
        logs = np.log(kind[column].astype(float))
        middle = logs.median()
        spread = 1.4826 * (logs - middle).abs().median()
        far = (logs - middle).abs() > np.maximum(rules.outlier_z * spread, np.log(rules.outlier_ratio))
        for scan, value in kind.loc[far, ["scan_id", column]].itertuples(index=False):
            found = sentence.format(value=value)
            yield scan, code, f"{found}; the cohort's median is {np.exp(middle):.3g}."


def _to_table(
    scans: pd.DataFrame, reasons: dict[str, tuple[str, str]], flags: dict[str, list[tuple[str, str]]]
) -> pd.DataFrame:
    rows = []
    for scan in scans["scan_id"]:
        reason = reasons[scan][0] if scan in reasons else ""
        said = [reasons[scan]] if reason else flags[scan]
        codes = "" if reason else ";".join(code for code, _ in said)
        rows.append((not reason, reason, codes, " ".join(sentence for _, sentence in said)))
    verdicts = pd.DataFrame(rows, scans.index, ["kept", "reason", "flags", "detail"]).astype({"kept": bool})
    measured = scans[[*FACTS]].drop(columns=["scan_id", "error", "error_detail", "file_flags"])
    measured = measured.map(lambda cell: f"{cell}" if isinstance(cell, _Sizes) else cell)
    return pd.concat([scans.filter(ID_COLUMNS), verdicts, measured], axis="columns")
