"""Which scans are kept, which are dropped and why, which are odd: rules over the facts that inspection found.

Opens no file. A dropped scan has one reason, and its sentence names what was found and the limit it was held
against.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from brainage_nb.cohort.inspection import FACTS, inspect_scans
from brainage_nb.cohort.rules import FLAGS, REASONS, CleaningRules

__all__ = ["FLAGS", "REASONS", "CleaningRules", "clean", "counts_by_reason", "inspect_scans"]

ID_COLUMNS = ("scan_id", "subject_id", "session_id", "image")
EDGES = ("left", "right", "back", "front", "top")
Finding = tuple[str, str]
"""A code of `REASONS` or `FLAGS`, and a sentence about this scan."""


def clean(cohort: pd.DataFrame, facts: pd.DataFrame, rules: CleaningRules | None = None) -> pd.DataFrame:
    """Decide for every scan whether it is kept, and say why not or what is odd.

    Parameters
    ----------
    cohort : DataFrame
        `scan_id, subject_id, session_id, image, age` (years), and `age_note` where the table needed a rule.
    facts : DataFrame
        What `inspect_scans` found, a row a scan.
    rules : CleaningRules, optional
        The limits; by default `CleaningRules()`.

    Returns
    -------
    DataFrame
        A row a scan, in the order of `cohort`: `scan_id, subject_id, session_id, image, kept` (bool),
        `reason` (code of `REASONS`, empty where kept), `flags` (codes of `FLAGS` joined by `;` where kept),
        `detail` (sentences), then the facts.

    Raises
    ------
    ValueError
        Where `facts` is not about the scans of `cohort`.
    """
    rules = rules or CleaningRules()
    scans = _joined(cohort, facts)
    reasons = {row.scan_id: next(_reasons(row, rules), None) for row in scans.itertuples()}
    kept = scans[[reasons[scan] is None for scan in scans["scan_id"]]]
    doubles, survivors = _duplicates(kept, rules)
    reasons |= doubles
    kept = kept[~kept["scan_id"].isin(doubles)]
    flags = {row.scan_id: [*_flags(row, rules)] for row in kept.itertuples()}
    for found in (survivors, _session_flags(kept, rules), _outliers(kept, rules)):
        for scan, finding in found:
            flags[scan].append(finding)
    return _as_table(scans, reasons, flags)


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


def _joined(cohort: pd.DataFrame, facts: pd.DataFrame) -> pd.DataFrame:
    known = [name for name in (*ID_COLUMNS, "age", "age_note") if name in cohort]
    if cohort["scan_id"].duplicated().any() or set(cohort["scan_id"]) != set(facts["scan_id"]):
        raise ValueError(
            f"The facts are of {len(facts)} scans and the cohort has {len(cohort)}, with other scan_ids or "
            "one twice. Inspect this cohort again: inspect_scans(cohort, …)."
        )
    scans = cohort[known].merge(facts, on="scan_id", how="left")
    return scans.assign(age=pd.to_numeric(scans["age"], errors="coerce"))


# --- one scan ------------------------------------------------------------------------------------------


def _reasons(scan: Any, rules: CleaningRules) -> Iterator[Finding]:
    """Reasons to drop a scan for what it is itself; the first one counts."""
    if scan.error:
        yield scan.error, scan.error_detail
        return
    for code, said in (*_impossible_geometry(scan, rules), *_not_a_t1_head(scan, rules)):
        yield code, " ".join([said, *scan.file_flags.values()])  # the header may say why
    if not np.isfinite(scan.age):
        yield "no_age", "The table gives this scan no age that can be used."
    elif not rules.min_age <= scan.age <= rules.max_age:
        yield "impossible_age", f"Age {scan.age:g} years; possible is {rules.min_age:g} to {rules.max_age:g}."


def _impossible_geometry(scan: Any, rules: CleaningRules) -> Iterator[Finding]:
    if min(scan.shape) < rules.min_voxels_per_axis:
        yield (
            "too_small",
            f"{_by(scan.shape)} voxels; at least {rules.min_voxels_per_axis} are needed along each axis.",
        )
    low, high = rules.min_voxel_mm, rules.max_voxel_mm
    if min(scan.voxel_mm) < low or max(scan.voxel_mm) > high:
        yield "voxel_size", f"Voxels of {_by(scan.voxel_mm)} mm; expected edges of {low:g} to {high:g} mm."
    low, high = rules.min_field_of_view_mm, rules.max_field_of_view_mm
    if min(scan.field_of_view_mm) < low:
        yield (
            "field_of_view",
            f"The image spans {_by(scan.field_of_view_mm)} mm; a whole human brain needs at least {low:g} mm "
            "along each axis. A slab, a fragment, or an animal?",
        )
    if max(scan.field_of_view_mm) > high:
        yield (
            "field_of_view",
            f"The image spans {_by(scan.field_of_view_mm)} mm, more than {high:g} mm: wrong voxel size?",
        )


def _not_a_t1_head(scan: Any, rules: CleaningRules) -> Iterator[Finding]:
    if scan.equal_neighbours > rules.max_equal_neighbours:
        yield (
            "label_map",
            f"{scan.equal_neighbours:.0%} of bright voxels have a neighbour of exactly the same value "
            f"({scan.n_values} values in all); above {rules.max_equal_neighbours:.0%} it is a label map.",
        )
    low, high = scan.intensity_p1, scan.intensity_p99
    if low < rules.min_intensity_p1 and low < -0.25 * (high - low):
        yield (
            "negative",
            f"Intensities reach from {low:.0f} to {high:.0f} (1st and 99th percentile); T1-weighted images "
            f"have none below {rules.min_intensity_p1:g}. CT (air is -1000) or a phase image?",
        )
    if not rules.min_head_ml <= scan.head_ml <= rules.max_head_ml:
        yield (
            "head_size",
            f"{scan.head_ml:.0f} ml stand out from the background; a human brain or head has "
            f"{rules.min_head_ml:g} to {rules.max_head_ml:g} ml. An animal, or a wrong voxel size?",
        )


def _flags(scan: Any, rules: CleaningRules) -> Iterator[Finding]:
    """What is odd about a kept scan, and what is assumed."""
    yield from scan.file_flags.items()
    if scan.skull_stripped:
        yield (
            "skull_stripped",
            f"The skull seems to be removed already ({scan.head_ml:.0f} ml, no dark bone under the surface).",
        )
    if cut := _cut_edges(scan, rules):
        yield "head_cut_off", f"The edge of the image cuts the head: {cut}."
    if max(scan.voxel_mm) > rules.coarse_mm:
        yield (
            "coarse",
            f"Voxels of {_by(scan.voxel_mm)} mm; edges above {rules.coarse_mm:g} mm blur the cortex.",
        )
    if scan.oblique_degrees > rules.oblique_degrees:
        yield (
            "oblique",
            f"The axes are tilted by {scan.oblique_degrees:.0f} degrees (over {rules.oblique_degrees:g}).",
        )
    if scan.n_values < rules.few_values:
        yield (
            "few_values",
            f"Only {scan.n_values} grey levels (under {rules.few_values}); was it saved twice?",
        )
    if scan.at_maximum > rules.max_at_maximum:
        yield (
            "clipped",
            f"{scan.at_maximum:.1%} of bright voxels have exactly the greatest intensity (over "
            f"{rules.max_at_maximum:.0%}): clipped, or lettering in the image?",
        )
    if not rules.adult_from <= scan.age <= rules.adult_to:
        yield (
            "age_outside_adult",
            f"Age {scan.age:.1f} years; methods and figures are checked on {rules.adult_from:g} to "
            f"{rules.adult_to:g}.",
        )
    note = getattr(scan, "age_note", "")
    if isinstance(note, str) and note:
        yield "age_note", _capital(note.rstrip(".")) + "."


def _cut_edges(scan: Any, rules: CleaningRules) -> str:
    edges = zip(EDGES, scan.edge_fractions, strict=True)
    limit = rules.max_edge_fraction
    cut = [
        f"{edge} ({share:.0%} of its largest section, over {limit:.0%})"
        for edge, share in edges
        if share > limit
    ]
    # A brain without skull is too short below its crown by nature.
    if scan.bottom_cut and not scan.skull_stripped:
        cut.append("bottom (too close below the crown)")
    return ", ".join(cut)


# --- scans beside each other ---------------------------------------------------------------------------


def _duplicates(
    kept: pd.DataFrame, rules: CleaningRules
) -> tuple[dict[str, Finding], list[tuple[str, Finding]]]:
    """Scans to drop because their picture occurs twice, and a flag for each copy that stays.

    Where ids or ages contradict each other nobody can say which label is right, so no copy stays.
    """
    dropped: dict[str, Finding] = {}
    flagged: list[tuple[str, Finding]] = []
    for _, copies in kept.groupby("voxels_sha256", sort=False):
        if len(copies) == 1:
            continue
        apart = np.ptp(copies["age"])
        first, others = copies["scan_id"].iloc[0], list(copies["scan_id"].iloc[1:])
        if apart > rules.same_age_years:
            for row in copies.itertuples():
                dropped[row.scan_id] = ("ambiguous", _contradiction(row, copies, apart))
            continue
        for scan in others:
            dropped[scan] = ("duplicate", f"The same picture as {first}, which is kept.")
        flagged.append((first, ("same_picture", f"The same picture also stands under {', '.join(others)}.")))
    return dropped, flagged


def _contradiction(scan: Any, copies: pd.DataFrame, apart: float) -> str:
    others = copies[copies["scan_id"] != scan.scan_id]
    named = ", ".join(f"{row.scan_id} (age {row.age:.1f})" for row in others.itertuples())
    return (
        f"The same picture stands under {scan.scan_id} (age {scan.age:.1f}) and {named}; {apart:.1f} years "
        "apart, so which age is right cannot be told. None is kept; correct the table or the files."
    )


def _session_flags(kept: pd.DataFrame, rules: CleaningRules) -> Iterator[tuple[str, Finding]]:
    for (subject, session), scans in kept.groupby(["subject_id", "session_id"], dropna=False, sort=False):
        if len(scans) == 1:
            continue
        where = f"subject {subject}" + (f", session {session}" if session else "")
        apart = np.ptp(scans["age"])
        for scan in scans["scan_id"]:
            yield scan, ("several_scans", f"One of {len(scans)} scans of {where}; all stay in one split.")
            if apart > rules.same_age_years:
                yield scan, ("age_conflict", f"The scans of {where} have ages {apart:.1f} years apart.")


def _outliers(kept: pd.DataFrame, rules: CleaningRules) -> Iterator[tuple[str, Finding]]:
    """Scans far from the cohort's median in head size or in how intensities are spread."""
    # Without a skull a head is small and evenly bright by nature: judged among its own kind.
    for _, scans in kept.groupby("skull_stripped"):
        for code, column, what in (
            (
                "size_outlier",
                "head_mm",
                "The head measures {value:.0f} mm (width and length, geometric mean)",
            ),
            ("intensity_outlier", "brightness", "The head's median is {value:.2f} of its 99th percentile"),
        ):
            if len(scans) < rules.min_cohort:
                continue
            logs = np.log(scans[column].astype(float))
            middle = logs.median()
            spread = 1.4826 * (logs - middle).abs().median()
            far = (logs - middle).abs() > np.maximum(rules.outlier_z * spread, np.log(rules.outlier_ratio))
            for scan, value in scans.loc[far, ["scan_id", column]].itertuples(index=False):
                usual = f"; the cohort's median is {np.exp(middle):.3g}."
                yield scan, (code, what.format(value=value) + usual)


def _as_table(
    scans: pd.DataFrame, reasons: dict[str, Finding | None], flags: dict[str, list[Finding]]
) -> pd.DataFrame:
    ids = scans["scan_id"]
    table = scans[[name for name in ID_COLUMNS if name in scans]].copy()
    table["kept"] = [reasons[scan] is None for scan in ids]
    table["reason"] = [reasons[scan][0] if reasons[scan] else "" for scan in ids]
    table["flags"] = [";".join(code for code, _ in flags.get(scan, [])) for scan in ids]
    table["detail"] = [
        reasons[scan][1] if reasons[scan] else " ".join(said for _, said in flags[scan]) for scan in ids
    ]
    for name in FACTS:
        if name not in ("scan_id", "error", "error_detail", "file_flags"):
            table[name] = scans[name].map(_by) if scans[name].dtype == object else scans[name]
    return table


def _by(numbers: Any) -> Any:
    """(2.0, 2.0, 2.5) -> '2 x 2 x 2.5'; anything else as it is."""
    return " x ".join(f"{number:g}" for number in numbers) if isinstance(numbers, tuple) else numbers


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
