"""A trained model as one folder or zip: opened without running anything from it, it predicts scans.

The front of `bundles`: `files` (safe reading), `members` (networks), `prediction` (what is said), `saving`.

A trained model applied to the scans of another workspace: predictions in, an external evaluation out.

Refuses people and files the model was trained on. Trains and calibrates nothing by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from brainage_nb.bundle_format import MAX_BYTES, BundleError, BundleFiles, all_seen, among, open_bundle
from brainage_nb.cohort.rules import judge_controls
from brainage_nb.evaluation.external import ExternalEvaluation, evaluate_external, refuse_trained_on
from brainage_nb.models.compute import working_device
from brainage_nb.predict.cautions import FILE as REFERENCE_FILE
from brainage_nb.predict.cautions import (
    KINDS,
    Caution,
    Failure,
    Prediction,
    Reference,
    age_cautions,
    checked_age,
    distance_cautions,
    head_cautions,
    likeness_caution,
    member_cautions,
    voxel_cautions,
)
from brainage_nb.predict.predictors import RESNET, VGG, NetworkEnsemble, SvrModel, compute_threads, model_of
from brainage_nb.predict.saving import check_manifest
from brainage_nb.volumes.scans import SCAN_FLAGS, ScanError, voxel_file
from brainage_nb.workspace import Workspace, n_workers, open_workspace, sha256_of

if TYPE_CHECKING:
    import torch

    from brainage_nb.evaluation.correction import AgeBiasCorrector, ConformalInterval
    from brainage_nb.volumes.settings import PreprocessingSettings

MAX_VOXELS = 2 * 10**8  # a 0.5 mm head has 1.3 * 10**8


class Seen(NamedTuple):
    """One scan as the model will see it, and what was noticed on the way."""

    volume: np.ndarray
    affine: np.ndarray
    cautions: list[Caution]


@dataclass
class Bundle:
    """A model with everything that was said of it when it was saved.

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
    """

    manifest: dict[str, Any]
    model: NetworkEnsemble | SvrModel
    settings: PreprocessingSettings
    correction: AgeBiasCorrector | None
    interval: ConformalInterval | None
    reference: Reference = field(repr=False)

    @property
    def title(self) -> str:
        """The model in a few words."""
        n = self.manifest["training"]["n_subjects"]
        members = len(self.manifest.get("members", [])) or 1
        kind = {RESNET: "3D ResNet-18", VGG: "VGG16 features + SVR"}[self.model.kind]
        count = f"{members} members, " if members > 1 else ""
        return f"{kind} ({count}trained on {n} people)"

    @property
    def is_test_object(self) -> bool:
        """Whether it was trained on the embedded known-answer heads, so that its ages mean nothing for
        people.
        """
        return set(self.manifest["training"].get("source", {})) == {"demo"}

    def predict(self, scan: Path | str, age: float | None = None) -> Prediction:
        """The age of one scan.

        Parameters
        ----------
        scan : path
            NIfTI or MGH, as `load_scan` reads it.
        age : float, optional
            True age in years, for the gap; the predicted age does not use it.

        Raises
        ------
        ScanError
            The file cannot be used as a scan.
        ValueError
            `age` is no age.
        """
        age = checked_age(age)
        return self._judge(Path(scan), self._look(Path(scan)), age)

    def predict_many(
        self, scans: Iterable[Path | str], ages: Sequence[float | None] | None = None, *, n_jobs: int = 0
    ) -> Iterator[Prediction | Failure]:
        """Results in the order of `scans`; a scan that fails gives a `Failure`, and the rest go on.

        `n_jobs` threads (0: one a processor) each take a scan from file to age, which keeps all processors
        busy; at most that many scans and one more are held in memory. A network on a GPU takes one scan at a
        time while the other threads prepare the next.
        """
        scans = [Path(scan) for scan in scans]
        ages = [None] * len(scans) if ages is None else list(ages)
        if len(ages) != len(scans):
            raise ValueError(
                f"{len(ages)} ages for {len(scans)} scans; give one for each (None where unknown)."
            )
        workers = n_workers(n_jobs)
        share = max(1, n_workers() // workers)
        tasks = iter(list(zip(scans, ages, strict=True)))
        with ThreadPoolExecutor(workers, initializer=compute_threads, initargs=(share,)) as pool:
            waiting = deque(pool.submit(self._result, *task) for task in islice(tasks, workers + 1))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(self._result, *task) for task in islice(tasks, 1))

    def trained_on(self, subject_ids: Sequence[str]) -> list[bool]:
        """Which of these subjects the model was trained or chosen on (by salted hash of the id as the cohort
        had it).
        """
        return among(subject_ids, all_seen(self.manifest), "subjects")

    def trained_on_files(self, files: Sequence[Path | str]) -> list[bool]:
        """Which of these files, byte for byte, were among the training scans."""
        return among([sha256_of(voxel_file(file)) for file in files], all_seen(self.manifest), "images")

    def _result(self, scan: Path, age: float | None) -> Prediction | Failure:
        try:
            return self.predict(scan, age)
        except Exception as error:
            return _failure(scan, error)

    def _look(self, scan: Path) -> Seen:
        from brainage_nb.volumes.heads import find_head
        from brainage_nb.volumes.preprocessing import as_stored, grid_affine, preprocess
        from brainage_nb.volumes.scans import load_scan, voxel_sizes

        try:
            image = load_scan(scan, max_voxels=MAX_VOXELS)
            volume = as_stored(preprocess(image, self.settings))
        except MemoryError:
            raise ScanError("too_large", f"{scan.name} does not fit into memory.") from None
        cautions = [Caution(*flag) for flag in image.extra["flags"].items()]
        training = self.manifest["training"]
        cautions += voxel_cautions(voxel_sizes(image.affine), training["voxel_mm"])
        cautions += head_cautions(find_head(image), trained_stripped=training["skull_stripped"])
        if self.trained_on_files([scan])[0]:
            cautions.append(
                Caution(
                    "training_scan",
                    "This very file was among the training scans: its result flatters the model.",
                )
            )
        return Seen(volume, grid_affine(image, self.settings), cautions)

    def _judge(self, scan: Path, seen: Seen, age: float | None) -> Prediction:
        members, features = self.model.predict_with_features(seen.volume)
        predicted = float(members.mean())
        if not np.isfinite(predicted):
            raise ScanError(
                "no_prediction", f"{scan.name}: the model finds no brain it could read in this scan."
            )
        low, high = (-np.inf, np.inf)
        if self.interval:
            low, high = (float(end[0]) for end in self.interval.predict(np.array([predicted])))
        corrected, adjusted = None, None
        if self.correction:
            corrected = float(self.correction.transform(np.array([predicted]))[0])
            adjusted = None if age is None else float(self.correction.adjust_gap(predicted, age))
        cautions = self._unlike(seen.volume, features)
        cautions += age_cautions(predicted, age, self.manifest["training"]) + seen.cautions
        return Prediction(
            scan=scan.name,
            predicted_age=predicted,
            low=low,
            high=high,
            level=self.interval.level if self.interval else np.nan,
            corrected_age=corrected,
            members=tuple(members.tolist()),
            age=age,
            gap=None if age is None else predicted - age,
            adjusted_gap=adjusted,
            warnings=tuple(cautions + member_cautions(members) + self._support()),
            path=str(scan),
            volume=seen.volume,
            affine=seen.affine,
        )

    def _unlike(self, volume: np.ndarray, features: np.ndarray | None) -> list[Caution]:
        """Whether the scan is unlike the training scans; what is no such image at all is said so once."""
        found = likeness_caution(self.reference.correlation(volume), self.reference.lowest_usual)
        return found or distance_cautions(self.reference.far(volume, features))

    def _support(self) -> list[Caution]:
        """What few calibration subjects do not support."""
        said = [part.support_ for part in (self.interval, self.correction) if part is not None]
        return [Caution("few_calibration_subjects", sentence) for sentence in said if sentence]


def load_bundle(source: Path | str | IO[bytes], device: str = "cpu", *, max_bytes: int = MAX_BYTES) -> Bundle:
    """Open a bundle; nothing in it is executed.

    Parameters
    ----------
    source : path or binary file
        What `save_bundle` wrote: a folder, a `.zip`, or an open zip.
    device : {"cpu", "cuda"}
        Where its network computes. On a GPU it hides behind the preparation of further scans
        (`predict_many`), which stays on the processors; heat maps are made on the CPU. Both give the same
        ages but for rounding, below a thousandth of a year.
    max_bytes : int
        Largest size of all files together, opened.

    Raises
    ------
    BundleError
        With what is wrong and what to do.
    ValueError
        There is no such device, or it does not work.
    """
    place = working_device(device)
    files = open_bundle(source, max_bytes=max_bytes)
    try:
        return _assembled(files, place)
    except BundleError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(
            f"{files.name}: what bundle.json says does not fit its files or this version ({reason[:300]}). "
            "Save the bundle again, or copy it again."
        ) from error


def _assembled(files: BundleFiles, device: torch.device) -> Bundle:
    from brainage_nb.evaluation.correction import AgeBiasCorrector, ConformalInterval
    from brainage_nb.volumes.settings import PreprocessingSettings

    manifest = files.manifest
    settings = PreprocessingSettings.from_json(manifest["preprocessing"])
    check_manifest(manifest, settings)
    n_features = manifest["architecture"]["widths"][-1] if manifest["kind"] == RESNET else 0
    reference = Reference.from_parts(
        manifest["reference"], files.arrays(REFERENCE_FILE), settings.size, n_features
    )
    return Bundle(
        manifest=manifest,
        model=model_of(files, device),
        settings=settings,
        correction=AgeBiasCorrector.from_dict(manifest["correction"]) if manifest["correction"] else None,
        interval=ConformalInterval.from_dict(manifest["interval"]) if manifest["interval"] else None,
        reference=reference,
    )


def _failure(scan: Path, error: Exception) -> Failure:
    if isinstance(error, ScanError):
        return Failure(scan.name, error.code, error.sentence, str(scan))
    return Failure(scan.name, "failed", f"{scan.name}: {type(error).__name__}: {error}", str(scan))


ABOUT = ("scan_id", "subject_id", "session_id", "age", "sex", "site", "diagnosis", "control")


def named_subjects(text: str) -> list[str]:
    """Subject ids from a text with commas, or from a file with one id a line."""
    if text and Path(text).is_file():
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def apply_elsewhere(
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
    predicted, notes = _predicted(bundle, scans, files)
    training = bundle.manifest["training"]
    found = evaluate_external(
        predicted,
        reference_age=training["age_mean"],
        trained_ages=(training["age_low"], training["age_high"]),
        calibrate_on=calibrate_on,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    found.warnings += notes
    return found


def kept_scans(ws: Workspace) -> pd.DataFrame:
    """The scans of a workspace that cleaning kept, with all that `cohort.csv` knows of them."""
    cohort, cleaning = ws.read("cohort.csv"), ws.read("cleaning.csv")
    cohort["control"] = judge_controls(cohort)
    return cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])].reset_index(drop=True)


def _predicted(bundle: Bundle, scans: pd.DataFrame, files: list[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Rows with `predicted_age` of the scans that have one; a sentence a failure and a kind of warning."""
    results = list(bundle.predict_many(files))
    found = [isinstance(result, Prediction) for result in results]
    predictions = [result for result in results if isinstance(result, Prediction)]
    rows = scans.loc[found, [name for name in ABOUT if name in scans]]
    notes = [f"{lost.scan}: no prediction. {lost.sentence}" for lost in results if lost not in predictions]
    said = pd.Series([caution.code for one in predictions for caution in one.warnings], dtype=str)
    meaning = SCAN_FLAGS | KINDS
    notes += [
        f"{n} of {len(results)} scans: {meaning.get(code, 'warning')} (`{code}`)."
        for code, n in said.value_counts().items()
    ]
    return rows.assign(predicted_age=[one.predicted_age for one in predictions]), notes
