"""Which subject trains, validates and tests: dealt by age, kept for good once dealt.

Works on subjects, never on scans, so that two scans of one person cannot sit in two splits. Not for cleaning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainage_nb.drawing import PALETTE, label_axes
from brainage_nb.parameters import check_fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLITS = ("train", "val", "test")
COLUMNS = ("scan_id", "subject_id", "session_id", "image", "age", "sex", "site", "split", "fold")


FEWEST_SITES = 3
NO_SITE = "not known"


@dataclass(frozen=True)
class FoldRules:
    """How folds are cut.

    Attributes
    ----------
    folds_by : {"age", "site"}
        `age`: each fold spans the ages. `site`: each fold is one site, for which the others train, so that
        the figures are those of a scanner that the model has never seen; from 3 sites.
    """

    folds_by: str = "age"

    def __post_init__(self) -> None:
        check_fields(self)


def deal_splits(
    scans: pd.DataFrame,
    *,
    folds: int = 0,
    folds_by: str = "age",
    seed: int = 0,
    existing: pd.DataFrame | None = None,
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15),
) -> pd.DataFrame:
    """Deal subjects, sorted by age, cyclically to train, validation and test.

    Parameters
    ----------
    scans : DataFrame
        One row per usable scan: `scan_id, subject_id, session_id, image, age` (years), `sex, site` if known.
    folds : int
        Number of cross-validation folds over the subjects of train and validation; 0 for none.
    folds_by : {"age", "site"}
        With `site`, the subjects of one site are one fold, whatever `folds` is (`deal_sites`).
    seed : int
        Turns the dealing pattern and breaks ties of age; the same seed deals the same subjects alike.
    existing : DataFrame, optional
        A split table dealt before. Its subjects keep their split, and their fold while `folds` is the same
        (another number of folds deals only the folds again). New subjects are dealt among themselves
        so that the whole comes nearest to `fractions`. Subjects not in `scans` are left out.
    fractions : tuple of float
        Shares of subjects for train, validation and test, summing to 1. Every share above 0 gets a subject.

    Returns
    -------
    DataFrame
        The rows of `scans` in their order, with `split`, and `fold` from 0 (-1 for test, and without folds).

    Raises
    ------
    ValueError
        Too few subjects, an age missing, or an `existing` table that contradicts itself.

    Examples
    --------
    >>> splits = deal_splits(kept, folds=5, seed=1)  # doctest: +SKIP
    >>> splits.groupby("split")["subject_id"].nunique()  # doctest: +SKIP
    """
    age = _age_of_subjects(scans)
    shares = pd.Series(fractions, index=SPLITS, dtype=float)
    if (shares < 0).any() or not np.isclose(shares.sum(), 1) or shares["train"] == 0:
        raise ValueError(
            f"fractions = {tuple(fractions)}: expected shares of train, val, test that sum to 1, train > 0."
        )
    rng = np.random.default_rng(seed)
    known = check_splits(scans.head(0).assign(split="", fold=-1) if existing is None else existing)
    _say_other_ages(known, scans)
    if _are_sites(known):
        known = known.assign(fold=-1)  # folds by age are dealt anew, those of sites follow the sites
    known = known[known["subject_id"].isin(age.index)].groupby("subject_id")[["split", "fold"]].first()
    split = _deal_new(age.drop(known.index), known["split"], shares, rng)
    split = pd.concat([known["split"], split]).reindex(age.index)
    _require_every_split(split, shares)
    if folds_by == "site":
        fold = deal_sites(scans[scans["subject_id"].map(split) != "test"])
    else:
        fold = _fold_of_subjects(age[split != "test"], known["fold"], folds, rng)
    dealt = scans.reset_index(drop=True).assign(
        split=scans["subject_id"].map(split).to_numpy(),
        fold=scans["subject_id"].map(fold).fillna(-1).astype(int).to_numpy(),
    )
    texts = dict.fromkeys(("session_id", "sex", "site"), "")
    return check_splits(dealt.reindex(columns=COLUMNS).fillna(texts))


def deal_folds(
    age: pd.Series, folds: int, *, seed: int | np.random.Generator = 0, sizes: np.ndarray | None = None
) -> pd.Series:
    """Deal subjects to folds so that each fold spans the ages.

    Parameters
    ----------
    age : Series
        Age in years, indexed by `subject_id` (one row per subject).
    folds : int
        Number of folds, at least 2.
    seed : int or Generator
        Which of `folds` neighbours in age goes to which fold.
    sizes : array of int, shape (folds,), optional
        Subjects that each fold already has; smaller ones are filled first.

    Returns
    -------
    Series
        Fold from 0 to `folds` - 1, indexed like `age`.
    """
    rng = np.random.default_rng(seed)
    sizes = np.zeros(folds, dtype=int) if sizes is None else np.array(sizes)
    ordered = _by_age(age, rng)
    fold = pd.Series(-1, index=age.index, dtype=int)
    for start in range(0, len(ordered), folds):
        block = ordered[start : start + folds]
        # Equally filled folds come in a drawn order; a fixed one would give fold 0 the youngest of each.
        emptiest = np.lexsort((rng.random(folds), sizes))[: len(block)]
        fold[block] = emptiest
        sizes[emptiest] += 1
    return fold


def deal_sites(scans: pd.DataFrame) -> pd.Series:
    """The fold of each subject, indexed by `subject_id`: sites in alphabetical order, from 0.

    Parameters
    ----------
    scans : DataFrame
        `subject_id, site`; who was at several sites counts for the first.

    Raises
    ------
    ValueError
        There are fewer than 3 sites, or some scans have none.
    """
    site = _name_sites(scans).groupby(scans["subject_id"], sort=False).first()
    counts = site.value_counts().sort_index()
    if NO_SITE in counts or len(counts) < FEWEST_SITES:
        found = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(
            f"folds_by = site: expected at least {FEWEST_SITES} sites among the subjects of train and val, "
            f"and one for each scan; there are {found}. Name them in the table, or set folds_by = age."
        )
    return site.map({name: fold for fold, name in enumerate(counts.index)})


def deal_everybody(splits: pd.DataFrame, folds: int) -> pd.DataFrame:
    """The table with every scan in train and dealt to folds, the test split too: nobody is set aside.

    For models that are judged by cross-validation alone. Dealt by subject and age, always alike. ValueError
    where the table's folds are sites, which this would undo.
    """
    if _are_sites(splits):
        n = splits.loc[splits["fold"] >= 0, "fold"].nunique()
        raise ValueError(
            "final = True deals everybody to folds by age, and in splits.csv each fold is a site (folds_by = "
            f"site in notebook 02). Leave final out, with folds = {n} "
            "in notebook 04 (05 takes them as they are), or run notebook 02 with folds_by = age."
        )
    ages = splits.groupby("subject_id", sort=True)["age"].mean()
    return splits.assign(split="train", fold=splits["subject_id"].map(deal_folds(ages, folds, seed=0)))


def _are_sites(splits: pd.DataFrame) -> bool:
    """Whether the folds are those of `deal_sites`: each fold one site, and each site one fold."""
    people = splits[splits["fold"] >= 0].groupby("subject_id")[["fold"]].first()
    people["site"] = _name_sites(splits).groupby(splits["subject_id"]).first()
    pairs = people.drop_duplicates()
    return len(pairs) > 1 and pairs["fold"].is_unique and pairs["site"].is_unique


def check_splits(
    splits: pd.DataFrame, scans: Iterable[str] | None = None, source: str = "splits.csv"
) -> pd.DataFrame:
    """Return the table unchanged, or raise where it would leak, contradicts itself or fits other scans.

    Parameters
    ----------
    splits : DataFrame
        One row per scan: `scan_id, subject_id, split, fold`; `image` and `age` are checked where they are.
    scans : iterable of str, optional
        Every `scan_id` that may be named: with a volume, or with a known reason for having none. Then no row
        may be of another scan, and somebody has to train and, without folds, to validate.
    source : str
        The file that the table comes from, as the message names it: `splits.csv`, `runs/x/predictions.csv`.

    Raises
    ------
    ValueError
        Names the file, how many ids and the first of them, and the notebook to run from.

    Examples
    --------
    >>> splits = check_splits(ws.read("splits.csv"), store.scan_ids)  # doctest: +SKIP
    """
    again = f"Run the training notebook (04 or 05) again: {source} is made there."
    rerun = again
    if PurePath(source).name == "splits.csv":
        again = f"Put it right, or delete it and run from 02_data_cleaning: {source} is made there."
        rerun = "Run from 03_preprocessing_preview."
    missing = [name for name in ("scan_id", "subject_id", "split", "fold") if name not in splits]
    if missing:
        raise ValueError(f"{source} lacks the columns {missing}; it has {list(splits)}. {again}")
    for wrong, key, what in _find_contradictions(splits):
        if wrong.any():
            ids = splits.loc[wrong, key].unique()
            raise ValueError(f"{source}: {len(ids)} {what}: {_some(ids)}. {again}")
    if scans is None:
        return splits
    strangers = splits.loc[~splits["scan_id"].astype(str).isin({str(scan) for scan in scans}), "scan_id"]
    if len(strangers):
        raise ValueError(
            f"{source} does not fit the scans at hand: it names {len(strangers)} of {len(splits)} that are "
            f"not among them: {_some(strangers)}. {rerun}"
        )
    needed = ("train",) if (splits["fold"].astype(int) >= 0).any() else ("train", "val")
    if empty := [name for name in needed if not (splits["split"] == name).any()]:
        raise ValueError(f"{source} has no scan in {' and '.join(empty)}: a model needs both. {again}")
    return splits


def _find_contradictions(splits: pd.DataFrame) -> Iterator[tuple[pd.Series, str, str]]:
    """Rows that are wrong, the column that names them, and what is wrong with them."""
    words = sorted(set(splits["split"].astype(str)) - set(SPLITS))
    yield ~splits["split"].isin(SPLITS), "scan_id", f"scans have a split other than {SPLITS}, such as {words}"
    yield splits["scan_id"].duplicated(), "scan_id", "scans stand twice"
    for key, what in (("subject_id", "subjects"), ("image", "image files")):
        for column in ("split", "fold") if key in splits else ():
            parts = splits.groupby(key)[column].transform("nunique")
            together = f"are in two {column}s, and all scans of a subject belong together"
            yield parts > 1, key, f"{what} {together}"
    fold, is_test = pd.to_numeric(splits["fold"], errors="coerce"), splits["split"] == "test"
    yield ~(fold >= -1) | (fold % 1 != 0), "scan_id", "scans have a fold that is no whole number from -1"
    yield is_test & (fold >= 0), "scan_id", "scans are in test and in a fold, where test scans have -1"
    half = (fold < 0) & (fold >= 0).any() & ~is_test
    yield half, "scan_id", "scans of train and val have no fold, and others have one"
    if "age" in splits:
        age = pd.to_numeric(splits["age"], errors="coerce")
        yield ~np.isfinite(age), "scan_id", "scans have no age"


def split_table(splits: pd.DataFrame) -> pd.DataFrame:
    """Count scans and subjects, age in years (youngest, mean, oldest), women of those whose sex is known; one
    row per split."""
    women = splits["sex"].map({"F": 100.0, "M": 0.0})
    table = splits.assign(women=women).groupby(pd.Categorical(splits["split"], SPLITS), observed=True)
    table = table.agg(
        scans=("scan_id", "size"),
        subjects=("subject_id", "nunique"),
        youngest=("age", "min"),
        mean_age=("age", "mean"),
        oldest=("age", "max"),
        women_percent=("women", "mean"),
    )
    return table.round(1).rename_axis("split")


def site_table(scans: pd.DataFrame) -> pd.DataFrame:
    """Count subjects by site and decade of age: where they go together, a model can learn one for the other.

    Returns
    -------
    DataFrame
        A row a site, a column a decade, as `20-29`, then `subjects` and `mean_age` (years).
    """
    about = scans.assign(site=_name_sites(scans)).groupby("subject_id").agg({"age": "mean", "site": "first"})
    decade = (about["age"] // 10 * 10).astype(int).map(lambda low: f"{low}-{low + 9}")
    table = pd.crosstab(about["site"], decade)
    ages = about.groupby("site")["age"]
    return table.assign(subjects=ages.size(), mean_age=ages.mean().round(1)).rename_axis(columns=None)


def _name_sites(scans: pd.DataFrame) -> pd.Series:
    """The site of each scan, in words where none is known."""
    given = scans["site"] if "site" in scans else pd.Series("", index=scans.index)
    return given.fillna("").astype(str).replace("", NO_SITE)


def plot_splits(ax: Axes, splits: pd.DataFrame) -> Axes:
    """Draw every subject's age (years) as a point in the row of its split; returns `ax`."""
    subjects = splits.groupby("subject_id").agg(age=("age", "mean"), split=("split", "first"))
    rng = np.random.default_rng(0)
    for row, (split, colour, marker) in enumerate(zip(SPLITS, PALETTE, "os^", strict=False)):
        ages = subjects.loc[subjects["split"] == split, "age"]
        height = row + rng.uniform(-0.28, 0.28, len(ages))
        ax.scatter(ages, height, s=14, alpha=0.75, color=colour, marker=marker, linewidths=0)
    counts = subjects["split"].value_counts().reindex(SPLITS, fill_value=0)
    ax.set_yticks(range(len(SPLITS)), [f"{split} (n = {counts[split]})" for split in SPLITS])
    ax.invert_yaxis()
    return label_axes(ax, f"Ages in each split (n = {len(subjects)} subjects)", "age [years]", "")


def _age_of_subjects(scans: pd.DataFrame) -> pd.Series:
    """Mean age of each subject's scans [years], indexed by subject_id in the order of the scans."""
    missing = scans.loc[~np.isfinite(scans["age"].astype(float)), "scan_id"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} scans have no age: {_some(missing)}. Deal only scans that cleaning kept."
        )
    return scans.groupby("subject_id", sort=False)["age"].mean()


def _say_other_ages(known: pd.DataFrame, scans: pd.DataFrame) -> None:
    """Warn of scans that had another age when they were dealt: corrected since, or another cohort's."""
    if "age" not in known:
        return
    both = known[["scan_id", "age"]].merge(scans[["scan_id", "age"]], on="scan_id", suffixes=("_dealt", ""))
    other = both.loc[~np.isclose(both["age_dealt"].astype(float), both["age"], rtol=0, atol=0.01), "scan_id"]
    if len(other):
        warnings.warn(
            f"{len(other)} scans have another age than when splits.csv was dealt ({_some(other)}). They keep "
            "their split. Where splits.csv is another cohort's, delete it and run 02_data_cleaning again.",
            stacklevel=3,
        )


def _deal_new(age: pd.Series, known: pd.Series, shares: pd.Series, rng: np.random.Generator) -> pd.Series:
    """Deal the subjects of `age` (years) so that they and the `known` ones come nearest to the shares."""
    have = known.value_counts().reindex(SPLITS, fill_value=0)
    counts = _new_counts(len(age), have, shares)
    pattern = np.roll(_spread(counts), rng.integers(max(1, len(age))))
    return pd.Series(pattern, index=_by_age(age, rng), dtype=object)


def _new_counts(n_new: int, have: pd.Series, shares: pd.Series) -> pd.Series:
    """How many of `n_new` subjects each split gets: empty splits first, then whoever lacks most."""
    target = shares * (n_new + have.sum())
    total = have.copy()
    for _ in range(n_new):
        empty = [split for split in SPLITS if total[split] == 0 and shares[split] > 0]
        total[empty[0] if empty else (target - total).idxmax()] += 1
    return total - have


def _spread(counts: pd.Series) -> np.ndarray:
    """Array of split names, `counts` of each, every name spread as evenly as can be (largest remainder)."""
    share = counts / max(1, counts.sum())
    given = counts * 0
    names = []
    for position in range(counts.sum()):
        lacking = share * (position + 1) - given
        name = lacking[given < counts].idxmax()
        given[name] += 1
        names.append(name)
    return np.array(names, dtype=object)


def _by_age(age: pd.Series, rng: np.random.Generator) -> pd.Index:
    """Subjects from young to old; equal ages in an order that the generator draws, not the file's."""
    age = age.sort_index()
    return age.index[np.lexsort((rng.random(len(age)), age.to_numpy()))]


def _require_every_split(split: pd.Series, shares: pd.Series) -> None:
    empty = [name for name in SPLITS if shares[name] > 0 and not (split == name).any()]
    if empty:
        raise ValueError(
            f"{len(split)} subjects leave {', '.join(empty)} empty. At least {int((shares > 0).sum())} are "
            "needed; if an older splits.csv is in the way, delete it and the splits are dealt again."
        )


def _fold_of_subjects(age: pd.Series, known: pd.Series, folds: int, rng: np.random.Generator) -> pd.Series:
    """Fold of each subject of train and validation, indexed by subject_id; empty without folds."""
    if folds == 0:
        return pd.Series(dtype=int)
    if folds < 2 or folds > len(age):
        raise ValueError(
            f"folds = {folds}: expected 0 (none), or 2 to {len(age)} (subjects of train and val together)."
        )
    kept = known[known.index.isin(age.index)]
    if set(kept) != set(range(folds)):  # another number of folds: old numbers would mean other parts
        kept = kept.iloc[:0]
    sizes = kept.value_counts().reindex(range(folds), fill_value=0).to_numpy()
    new = deal_folds(age.drop(kept.index), folds, seed=rng, sizes=sizes)
    return pd.concat([kept, new]).astype(int)


def _some(ids: Sequence, most: int = 5) -> str:
    shown = ", ".join(str(item) for item in list(ids)[:most])
    return shown + (f" and {len(ids) - most} more" if len(ids) > most else "")
