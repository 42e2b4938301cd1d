"""A trained model as one folder or zip: opened without running anything from it, it predicts scans.

It also predicts all scans of another workspace, for an external evaluation. It trains and calibrates nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from brainage_nb.bundle_format import (
    MANIFEST,
    MAX_BYTES,
    RESNET,
    VGG,
    BundleError,
    BundleFiles,
    all_seen,
    among,
    open_bundle,
)
from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.correction import AgeBiasCorrector, ConformalInterval
from brainage_nb.evaluation.external import ExternalEvaluation, evaluate_external, refuse_trained_on
from brainage_nb.models.compute import working_device
from brainage_nb.platforms import n_workers
from brainage_nb.predict.cautions import (
    CAUTIONS,
    REFERENCE_FILE,
    Caution,
    Failure,
    Prediction,
    Reference,
    check_age,
    find_age_cautions,
    find_head_cautions,
    find_likeness_cautions,
    find_member_cautions,
    find_voxel_cautions,
    is_other_kind,
    name_reference,
)
from brainage_nb.predict.predictors import NetworkEnsemble, SvrModel, build_model
from brainage_nb.volumes.scans import SCAN_FLAGS, ScanError, voxel_file
from brainage_nb.workspace import Workspace, open_workspace, sha256_of

if TYPE_CHECKING:
    from brainage_nb.volumes.settings import PreprocessingSettings

ABSURD_AGE = 1000  # years, of which no network that learned from people is capable
MAX_VOXELS = 2 * 10**8  # a 0.5 mm head has 1.3 * 10**8
TITLES = {RESNET: "3D ResNet-18", VGG: "VGG16 features + SVR"}
ABOUT = ("scan_id", "subject_id", "session_id", "age", "sex", "site", "diagnosis", "control")
ADDED = ("do_not_use_because", "predicted_age")


class Reading(NamedTuple):
    """What a model made of one scan: the prepared volume, its affine, each member's age, what was noticed.

    `stacked` are the volumes of all channels where the network has several.
    """

    volume: np.ndarray
    affine: np.ndarray
    members: np.ndarray
    age: float
    cautions: list[Caution]
    stacked: np.ndarray | None = None


@dataclass
class Bundle:
    """A model with everything that was known of it when it was saved.

    Attributes
    ----------
    manifest : dict
        `bundle.json`; keys as written by `save_bundle`.
    model : NetworkEnsemble or SvrModel
    settings : PreprocessingSettings
        Every scan is prepared as the training scans were.
    correction : AgeBiasCorrector or None
    interval : ConformalInterval or None
    reference : Reference
    channels : dict of Reference
        Of a network that reads scans of one session together: each scan beside the T1w scan, in order.
    """

    manifest: dict[str, Any]
    model: NetworkEnsemble | SvrModel
    settings: PreprocessingSettings
    correction: AgeBiasCorrector | None
    interval: ConformalInterval | None
    reference: Reference = field(repr=False)
    channels: dict[str, Reference] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def title(self) -> str:
        """The model in a few words."""
        n, members = self.manifest["training"]["n_subjects"], len(self.manifest["members"])
        count = f"{members} members, " if members > 1 else ""
        read = " and ".join(self.manifest.get("channels", [self.settings.modality]))
        scans = "" if read == "T1w" else f"{read} scans of "
        return f"{TITLES[self.model.kind]} ({count}trained and validated on {scans}{n} people)"

    @property
    def is_test_object(self) -> bool:
        """Whether it was trained on the embedded known-answer heads, so that its ages mean nothing for
        people.
        """
        return set(self.manifest["training"].get("source", {})) == {"demo"}

    @property
    def others(self) -> tuple[str, ...]:
        """Which scans of the session it takes beside the T1w scan, as T2w."""
        return tuple(self.channels) if self.settings.modality == "T1w" else (self.settings.modality,)

    def predict(
        self, scan: Path | str, age: float | None = None, also: Mapping[str, Path | str] | None = None
    ) -> Prediction:
        """The age of one scan.

        Parameters
        ----------
        scan : path
            NIfTI or MGH, as `load_scan` reads it.
        age : float, optional
            True age in years, for the gap; the predicted age does not use it.
        also : mapping, optional
            Further scans of the same session: one of `others` -> path. A model of T2w scans needs that scan,
            a fused one does without; so does a network of both, if it was trained to, without an interval.

        Raises
        ------
        ScanError
            The file cannot be used as a scan.
        ValueError
            `age` is no age, or `also` names what the model does not take.

        Examples
        --------
        >>> prediction = load_bundle("bundle").predict("sub-01_T1w.nii.gz", age=54.0)
        >>> f"{prediction.predicted_age:.1f} years, gap {prediction.gap:.1f}"
        '56.1 years, gap 2.1'
        >>> prediction.do_not_use_because[:66]  # a drawn ball is no head
        'After preprocessing this scan does not look like the training scan'
        """
        age, scan, also = check_age(age), Path(scan), also or {}
        self.refuse_unknown(also)
        read = self._read(scan, also)
        unmeasured = dict.fromkeys(("correction", "interval", "rates") if self.channels.keys() - also else ())
        return self._conclude(scan, age, read, read.age, self.manifest | unmeasured)

    def refuse_unknown(self, also: Mapping[str, Any]) -> None:
        """ValueError where `also` names a scan that is none of `others`."""
        if unknown := [name for name in also if name not in self.others]:
            takes = (
                f"takes {' and '.join(self.others)} beside the T1w scan"
                if self.others
                else "reads one scan only"
            )
            raise ValueError(f"{unknown[0]}: {self.title} {takes}. Names of scans are written as in BIDS.")

    def _read(self, scan: Path, also: Mapping[str, Path | str]) -> Reading:
        is_other = self.settings.modality != "T1w"
        volume, affine, cautions = self._prepare_beside(scan, also) if is_other else self._prepare(scan)
        stacked = self._stack(scan, also, volume, cautions) if self.channels else None
        members = self.model.predict(volume if stacked is None else stacked)
        age = self._check_predicted(float(members.mean()), scan)
        return Reading(volume, affine, members, age, [*cautions, *find_member_cautions(members)], stacked)

    def _stack(
        self, scan: Path, also: Mapping[str, Path | str], t1w: np.ndarray, cautions: list[Caution]
    ) -> np.ndarray:
        """The volumes (channels, size, size, size) of a session, 0 for a missing one; adds to `cautions`."""
        volumes, missing = [t1w], []
        for name, reference in self.channels.items():
            if name not in also and self.manifest["channel_dropout"] > 0:
                volumes.append(np.zeros_like(t1w))
                missing.append(name)
                continue
            channel = replace(self, settings=self.settings.for_modality(name), reference=reference)
            volume, _, noticed = channel._prepare_beside(scan, also)
            volumes.append(volume)
            cautions += [caution for caution in noticed if caution not in cautions]
        if missing:
            used = [name for name in self.manifest["channels"] if name not in missing]
            facts = {"missing": " and ".join(missing), "used": " and ".join(used)}
            cautions.append(Caution.of("channel_left_empty", **facts))
        return np.stack(volumes)

    def _prepare_beside(
        self, scan: Path, also: Mapping[str, Path | str]
    ) -> tuple[np.ndarray, np.ndarray, list[Caution]]:
        """As `_prepare`, of another scan of the T1w scan's session; ScanError where it is not to be used."""
        modality = self.settings.modality
        if modality not in also:
            raise ScanError(
                "other_scan_needed",
                f"{scan.name}: {self.title} reads the {modality} scan of a session. Give the T1w scan and, "
                f"beside it, that one (--also {modality}=FILE).",
            )
        prepared = self._prepare(scan, Path(also[modality]))
        if unlike := [caution.sentence for caution in prepared[-1] if caution.forbids_use]:
            raise ScanError("other_scan_unlike", unlike[0])
        return prepared

    def _conclude(
        self, scan: Path, age: float | None, read: Reading, predicted: float, calibration: Mapping[str, Any]
    ) -> Prediction:
        """Interval, gap and warnings of a predicted age, as a manifest or a part of it is calibrated."""
        correction, interval = read_calibration(calibration)
        low, high = interval.predict(predicted) if interval else (-np.inf, np.inf)
        supports = [part.support_ for part in (interval, correction) if part and part.support_]
        cautions = [
            *read.cautions,
            *find_age_cautions(predicted, age, self.manifest["training"]),
            *(Caution.of("few_calibration_subjects", support=support) for support in supports),
        ]
        adjusts = correction is not None and age is not None
        return Prediction(
            scan=scan.name,
            predicted_age=predicted,
            low=float(low),
            high=float(high),
            level=interval.level if interval else np.nan,
            corrected_age=float(correction.transform(predicted)) if correction else None,
            members=tuple(read.members.tolist()),
            age=age,
            gap=None if age is None else predicted - age,
            adjusted_gap=float(correction.adjust_gap(predicted, age)) if adjusts else None,
            corrected_mae=(calibration["correction"] or {}).get("mae"),
            warnings=tuple(sorted(cautions, key=_forbids_first)),
            rates=calibration.get("rates"),
            interval_title=interval.title if interval else "",
            path=str(scan),
            volume=read.volume,
            affine=read.affine,
            stacked=read.stacked,
        )

    def predict_many(
        self,
        scans: Iterable[Path | str],
        ages: Sequence[float | None] | None = None,
        also: Sequence[Mapping[str, Path | str]] | None = None,
        *,
        n_jobs: int = 0,
    ) -> Iterator[Prediction | Failure]:
        """Results in the order of `scans`; a scan that fails gives a `Failure`, and the rest go on.

        `ages` and `also` hold one of what `predict` takes for each scan.

        `n_jobs` threads (0: one per processor) each take a scan from file to age, which keeps all processors
        busy; at most that many scans and one more are held in memory. A network on a GPU takes one scan at a
        time while the other threads prepare the next.
        """
        scans = [Path(scan) for scan in scans]
        ages = [None] * len(scans) if ages is None else list(ages)
        also = [{}] * len(scans) if also is None else list(also)
        if not len(ages) == len(also) == len(scans):
            raise ValueError(
                f"{len(ages)} ages for {len(scans)} scans; give one for each (None where unknown)."
            )
        for others in also:
            self.refuse_unknown(others)
        workers = n_workers(n_jobs)
        share = max(1, n_workers() // workers)  # processors of each thread's PyTorch
        tasks = zip(scans, ages, also, strict=True)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            waiting = deque(pool.submit(self._try, *task) for task in islice(tasks, workers + 1))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(self._try, *task) for task in islice(tasks, 1))

    def trained_on(self, subject_ids: Sequence[str]) -> list[bool]:
        """Which of these subjects the model was trained or chosen on (by salted hash of the id as the cohort
        had it).
        """
        return among(subject_ids, all_seen(self.manifest), "subjects")

    def trained_on_files(self, files: Sequence[Path | str]) -> list[bool]:
        """Which of these files, byte for byte, were among the training scans."""
        return among([sha256_of(voxel_file(file)) for file in files], all_seen(self.manifest), "images")

    def _try(self, scan: Path, age: float | None, also: Mapping[str, Any]) -> Prediction | Failure:
        try:
            return self.predict(scan, age, also)
        except ScanError as error:
            return Failure(scan.name, error.code, error.sentence, str(scan))
        except BundleError as error:
            return Failure(scan.name, "damaged_bundle", str(error), str(scan))
        except Exception as error:
            return Failure(scan.name, "failed", f"{scan.name}: {type(error).__name__}: {error}", str(scan))

    def _prepare(self, scan: Path, other: Path | None = None) -> tuple[np.ndarray, np.ndarray, list[Caution]]:
        """The volume as the model takes it, its affine, and what was noticed.

        Of the T1w scan, or of another scan of its session, laid onto it. It is compared with the training
        scans by its volume and by the T1w scan's statistics. Where it comes from the core of the brain, and
        the scan is skull-stripped and they were not, or the reverse, the volume alone is compared.
        """
        from brainage_nb.volumes.heads import find_head
        from brainage_nb.volumes.modalities import lay_onto_t1w
        from brainage_nb.volumes.preprocessing import as_stored, grid_affine, preprocess
        from brainage_nb.volumes.scan_statistics import measure_scan
        from brainage_nb.volumes.scans import load_scan, voxel_sizes

        try:
            image = t1w = load_scan(scan, max_voxels=MAX_VOXELS)
            if other is not None:
                image = lay_onto_t1w(other, t1w, self.settings.modality)
            volume = as_stored(preprocess(image, self.settings))
        except MemoryError:
            raise ScanError("too_large", f"{scan.name} does not fit into memory.") from None
        training = self.manifest["training"]
        cautions = [Caution(*flag) for flag in image.extra["flags"].items()]
        stripped = training.get("skull_stripped")  # of T1w scans, as what is known of voxels
        head, by_core = find_head(t1w), self.settings.by_core
        of_head = find_head_cautions(head, trained_stripped=stripped, by_core=by_core)
        if other is None:
            cautions += [*find_voxel_cautions(voxel_sizes(image.affine), training.get("voxel_mm")), *of_head]
        else:  # the T1w scan's own reader says what does not forbid use
            cautions += [caution for caution in of_head if caution.forbids_use]
        if self.trained_on_files([scan])[0]:
            cautions.append(Caution.of("training_scan"))
        statistics = None if by_core and is_other_kind(head, stripped) else measure_scan(t1w)
        likeness = find_likeness_cautions(self.reference, volume, statistics)
        return volume, grid_affine(image, self.settings), [*likeness, *cautions]

    def _check_predicted(self, age: float, scan: Path) -> float:
        if np.isnan(age) and self.model.kind == VGG:
            raise ScanError("no_prediction", f"{scan.name}: the model finds no brain to read in this scan.")
        if not abs(age) < ABSURD_AGE:
            raise BundleError(
                f"{self.title}: this bundle is damaged: it gives {age:.3g} years for {scan.name}. Copy or "
                "save it again."
            )
        return age


@dataclass
class FusedBundle(Bundle):
    """Several bundles whose ages of one person are fused into one; `model` and the like are the first's.

    Attributes
    ----------
    members : tuple of Bundle
        In the order of the manifest's `members`; the first reads the T1w scan.
    """

    members: tuple[Bundle, ...] = ()

    @property
    def title(self) -> str:
        """The model in a few words."""
        named = [f"{one['run']} ({one['modality']})" for one in self.manifest["members"]]
        return (
            f"Fused from {' and '.join(named)} (trained on {self.manifest['training']['n_subjects']} people)"
        )

    @property
    def others(self) -> tuple[str, ...]:
        """Which scans of the session it can take beside the T1w scan, as T2w."""
        return tuple(dict.fromkeys(name for name in self._modalities if name != "T1w"))

    @property
    def _modalities(self) -> list[str]:
        return [member["modality"] for member in self.manifest["members"]]

    def predict(
        self, scan: Path | str, age: float | None = None, also: Mapping[str, Path | str] | None = None
    ) -> Prediction:
        """The fused age of one person; without one of `others` it is fused from the rest, which is said.

        Parameters and errors are as of `Bundle.predict`. A further scan that does not fit the T1w scan, or is
        unlike those of training, is not used, which is said too.

        Examples
        --------
        >>> load_bundle("runs/fused/bundle").predict("t1.nii.gz", also={"T2w": "t2.nii.gz"})  # doctest: +SKIP
        """
        age, scan, also = check_age(age), Path(scan), also or {}
        self.refuse_unknown(also)
        read, left_out = {}, []
        for place, (member, name) in enumerate(zip(self.members, self._modalities, strict=True)):
            if name == "T1w":
                read[place] = member._read(scan, {})
            elif name in also:
                try:
                    read[place] = member._read(scan, also)
                except ScanError as error:
                    facts = {"modality": name, "scan": Path(also[name]).name, "reason": error.sentence}
                    left_out.append(Caution.of("other_scan_not_used", **facts))
        used = {self._modalities[place] for place in read}
        part = self._find_part(used)
        kept = [read[place].age for place in read if self._modalities[place] in part["modalities"]]
        predicted = self._check_predicted(part["intercept"] + float(np.dot(part["weights"], kept)), scan)
        first = read[0]
        noticed = dict.fromkeys(caution for one in read.values() for caution in one.cautions)
        cautions = [*left_out, *self._find_missing(part), *noticed]
        members = np.array([one.age for one in read.values()])
        whole = first._replace(members=members, cautions=cautions)
        return replace(self._conclude(scan, age, whole, predicted, part), alone=first.age)

    def _find_part(self, used: Collection[str]) -> dict[str, Any]:
        """How these scans are fused: the largest part of the manifest that needs no others."""
        fitting = [part for part in self.manifest["parts"] if used >= set(part["modalities"])]
        return max(fitting, key=lambda part: len(part["weights"]))

    def _find_missing(self, part: Mapping[str, Any]) -> list[Caution]:
        """What the age had to do without, in one caution."""
        missing = [name for name in self.others if name not in part["modalities"]]
        if not missing:
            return []
        width, usual = (
            f"± {found['quantile']:.1f} years" if found and found["quantile"] is not None else "none"
            for found in (part["interval"], self.manifest["interval"])
        )
        facts = {"missing": " and ".join(missing), "used": " and ".join(part["modalities"])}
        return [Caution.of("fused_from_fewer", **facts, width=width, usual=usual)]


def read_calibration(
    manifest: Mapping[str, Any],
) -> tuple[AgeBiasCorrector | None, ConformalInterval | None]:
    """The entries `correction` and `interval` of a manifest, or of a part of a fused one."""
    correction, interval = manifest["correction"], manifest["interval"]
    return (
        AgeBiasCorrector.from_dict(correction) if correction else None,
        ConformalInterval.from_dict(interval) if interval else None,
    )


def _forbids_first(caution: Caution) -> bool:
    return not caution.forbids_use


def load_bundle(source: Path | str | IO[bytes], device: str = "cpu", *, max_bytes: int = MAX_BYTES) -> Bundle:
    """Open a bundle; nothing in it is executed.

    Parameters
    ----------
    source : path or binary file
        What `save_bundle` wrote: a folder, a `.zip`, or an open zip.
    device : {"cpu", "cuda"}
        Where its network computes. On a GPU it hides behind the preparation of further scans
        (`predict_many`), which stays on the processors; maps in years are made there too, Grad-CAM on the
        CPU. Both give the same ages but for rounding, below a thousandth of a year.
    max_bytes : int
        Largest size of all files together, opened.

    Raises
    ------
    BundleError
        With what is wrong and what to do.
    ValueError
        There is no such device, or it does not work.

    Examples
    --------
    >>> bundle = load_bundle("bundle")
    >>> bundle.title
    '3D ResNet-18 (trained and validated on 34 people)'
    """
    place, files = working_device(device), open_bundle(source, max_bytes=max_bytes)
    if not files.members:
        return _build(files, place)
    folders = [member["folder"] for member in files.manifest["members"]]
    members = tuple(_build(files.members[folder], place) for folder in folders)
    first, said = members[0], [member["modality"] for member in files.manifest["members"]]
    if said != [member.settings.modality for member in members]:
        raise BundleError(f"{files.name}: its models read other scans than {MANIFEST} says. Copy it again.")
    seen, *before = [people for member in members for people in all_seen(member.manifest)]
    learned = {"training": first.manifest["training"], "seen": seen, "seen_before": before}
    calibration = read_calibration(files.manifest)
    parts = (first.model, first.settings, *calibration, first.reference, members)
    return FusedBundle(files.manifest | learned, *parts)


def _build(files: BundleFiles, place: torch.device | str) -> Bundle:
    """One bundle's model, from its files."""
    from brainage_nb.volumes.settings import PreprocessingSettings

    manifest = files.manifest
    try:
        settings = PreprocessingSettings.from_json(manifest["preprocessing"])
        correction, interval = read_calibration(manifest)
        channels = {
            name: Reference.from_parts(
                manifest["references"][name], files.arrays(name_reference(name)), settings.size
            )
            for name in manifest.get("channels", ())[1:]
        }
        return Bundle(
            manifest=manifest,
            model=build_model(files, settings, place),
            settings=settings,
            correction=correction,
            interval=interval,
            reference=Reference.from_parts(
                manifest["reference"], files.arrays(REFERENCE_FILE), settings.size
            ),
            channels=channels,
        )
    except BundleError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:300]
        raise BundleError(
            f"{files.name}: this bundle is damaged, or of another version: what {MANIFEST} says does not fit "
            f"its files ({reason}). Save the bundle again, or copy it again."
        ) from error


# --- applied to another workspace -----------------------------------------------------------------------


def read_subject_ids(text: str) -> list[str]:
    """Subject ids from a text with commas, or from a file with one id per line."""
    is_file = bool(text) and Path(text).is_file()
    names = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    return [name.strip() for name in names if name.strip()]


def apply_to_workspace(
    bundle: Bundle,
    workspace: str | Path,
    *,
    calibrate_on: Collection[str] = (),
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> ExternalEvaluation:
    """Predict every kept scan of another workspace and evaluate it as an external cohort.

    Parameters
    ----------
    bundle : Bundle
        The trained model.
    workspace : path
        A workspace in which notebooks 01 and 02 have run; nothing is written there.
    calibrate_on : subject ids
        Controls that may calibrate; reported apart from the rest. Empty: no calibration.

    Raises
    ------
    EvaluationError
        The model was trained on one of these subjects or files.
    """
    ws = open_workspace(workspace)
    scans = kept_scans(ws)
    files = [ws.resolve(image) for image in scans["image"]]
    subjects = scans["subject_id"].drop_duplicates().tolist()
    refuse_trained_on(subjects, bundle.trained_on(subjects), "subjects")
    refuse_trained_on([file.name for file in files], bundle.trained_on_files(files), "image files")
    also = list_beside(scans, bundle.others, ws)
    predicted, notes = _predict_scans(bundle, scans, files, also)
    training = bundle.manifest["training"]
    found = evaluate_external(
        predicted,
        reference_age=training["age_mean"],
        trained_ages=(training["age_low"], training["age_high"]),
        calibrate_on=calibrate_on,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    found.warnings = notes + found.warnings
    return found


def list_beside(rows: pd.DataFrame, others: Sequence[str], ws: Workspace) -> list[dict[str, Path]]:
    """The further scans of each row's session that its table names, as `Bundle.predict` takes them."""
    named = [name for name in others if name in rows]
    cells = rows[named].fillna("").to_dict("records")
    return [{name: ws.resolve(file) for name, file in row.items() if file} for row in cells]


def kept_scans(ws: Workspace) -> pd.DataFrame:
    """The scans of a workspace that cleaning kept, with all that `cohort.csv` knows of them."""
    cohort, cleaning = ws.read("cohort.csv"), ws.read("cleaning.csv")
    cohort["control"] = judge_controls(cohort)
    return cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])].reset_index(drop=True)


def _predict_scans(
    bundle: Bundle, scans: pd.DataFrame, files: list[Path], also: list[dict[str, Path]]
) -> tuple[pd.DataFrame, list[str]]:
    """Rows with `ADDED` of the scans that have an age; a sentence per failure and kind of warning."""
    results = list(bundle.predict_many(files, also=also))
    found = [isinstance(result, Prediction) for result in results]
    predictions = [result for result in results if isinstance(result, Prediction)]
    rows = scans.loc[found, [name for name in ABOUT if name in scans]]
    cautions = [caution for one in predictions for caution in one.warnings]
    codes = pd.Series([caution.code for caution in sorted(cautions, key=_forbids_first)], dtype=str)
    meaning = SCAN_FLAGS | {code: said["counted"] for code, said in CAUTIONS.items()}
    notes = [
        f"{n} of {len(results)} scans: {meaning.get(code, 'warning')} (`{code}`)."
        for code, n in codes.value_counts(sort=False).items()
    ]
    notes += [f"{lost.scan}: no prediction. {lost.sentence}" for lost in results if lost not in predictions]
    found = {name: [getattr(one, name) for one in predictions] for name in ADDED}
    return rows.assign(**found), notes
