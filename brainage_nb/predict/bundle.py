"""A trained model as one folder or zip: opened without running anything from it, it predicts scans.

It also predicts all scans of another workspace, for an external evaluation. It trains and calibrates nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from brainage_nb.bundle_format import (
    MANIFEST,
    MAX_BYTES,
    RESNET,
    VGG,
    BundleError,
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
        n, members = self.manifest["training"]["n_subjects"], len(self.manifest["members"])
        count = f"{members} members, " if members > 1 else ""
        return f"{TITLES[self.model.kind]} ({count}trained and validated on {n} people)"

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

        Examples
        --------
        >>> prediction = load_bundle("bundle").predict("sub-01_T1w.nii.gz", age=54.0)
        >>> f"{prediction.predicted_age:.1f} years, gap {prediction.gap:.1f}"
        '56.1 years, gap 2.1'
        >>> prediction.do_not_use_because[:66]  # a drawn ball is no head
        'After preprocessing this scan does not look like the training scan'
        """
        age, scan = check_age(age), Path(scan)
        volume, affine, noticed = self._prepare(scan)
        members = self.model.predict(volume)
        predicted = self._check_predicted(float(members.mean()), scan)
        interval, correction = self.interval, self.correction
        low, high = interval.predict(predicted) if interval else (-np.inf, np.inf)
        supports = [part.support_ for part in (interval, correction) if part and part.support_]
        cautions = [
            *find_likeness_cautions(self.reference, volume),
            *find_age_cautions(predicted, age, self.manifest["training"]),
            *noticed,
            *find_member_cautions(members),
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
            members=tuple(members.tolist()),
            age=age,
            gap=None if age is None else predicted - age,
            adjusted_gap=float(correction.adjust_gap(predicted, age)) if adjusts else None,
            corrected_mae=(self.manifest["correction"] or {}).get("mae"),
            warnings=tuple(sorted(cautions, key=_forbids_first)),
            path=str(scan),
            volume=volume,
            affine=affine,
        )

    def predict_many(
        self, scans: Iterable[Path | str], ages: Sequence[float | None] | None = None, *, n_jobs: int = 0
    ) -> Iterator[Prediction | Failure]:
        """Results in the order of `scans`; a scan that fails gives a `Failure`, and the rest go on.

        `n_jobs` threads (0: one per processor) each take a scan from file to age, which keeps all processors
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
        share = max(1, n_workers() // workers)  # processors of each thread's PyTorch
        tasks = zip(scans, ages, strict=True)
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

    def _try(self, scan: Path, age: float | None) -> Prediction | Failure:
        try:
            return self.predict(scan, age)
        except ScanError as error:
            return Failure(scan.name, error.code, error.sentence, str(scan))
        except BundleError as error:
            return Failure(scan.name, "damaged_bundle", str(error), str(scan))
        except Exception as error:
            return Failure(scan.name, "failed", f"{scan.name}: {type(error).__name__}: {error}", str(scan))

    def _prepare(self, scan: Path) -> tuple[np.ndarray, np.ndarray, list[Caution]]:
        """The volume as the model takes it, its affine, and what was noticed on the way."""
        from brainage_nb.volumes.heads import find_head
        from brainage_nb.volumes.preprocessing import as_stored, grid_affine, preprocess
        from brainage_nb.volumes.scans import load_scan, voxel_sizes

        try:
            image = load_scan(scan, max_voxels=MAX_VOXELS)
            volume = as_stored(preprocess(image, self.settings))
        except MemoryError:
            raise ScanError("too_large", f"{scan.name} does not fit into memory.") from None
        training = self.manifest["training"]
        cautions = [
            *(Caution(*flag) for flag in image.extra["flags"].items()),
            *find_voxel_cautions(voxel_sizes(image.affine), training.get("voxel_mm")),
            *find_head_cautions(find_head(image), trained_stripped=training.get("skull_stripped")),
        ]
        if self.trained_on_files([scan])[0]:
            cautions.append(Caution.of("training_scan"))
        return volume, grid_affine(image, self.settings), cautions

    def _check_predicted(self, age: float, scan: Path) -> float:
        if np.isnan(age) and self.model.kind == VGG:
            raise ScanError("no_prediction", f"{scan.name}: the model finds no brain to read in this scan.")
        if not abs(age) < ABSURD_AGE:
            raise BundleError(
                f"{self.title}: this bundle is damaged: it gives {age:.3g} years for {scan.name}. Copy or "
                "save it again."
            )
        return age


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
    from brainage_nb.volumes.settings import PreprocessingSettings

    place, files = working_device(device), open_bundle(source, max_bytes=max_bytes)
    manifest = files.manifest
    correction, interval = manifest["correction"], manifest["interval"]
    try:
        settings = PreprocessingSettings.from_json(manifest["preprocessing"])
        return Bundle(
            manifest=manifest,
            model=build_model(files, settings, place),
            settings=settings,
            correction=AgeBiasCorrector.from_dict(correction) if correction else None,
            interval=ConformalInterval.from_dict(interval) if interval else None,
            reference=Reference.from_parts(
                manifest["reference"], files.arrays(REFERENCE_FILE), settings.size
            ),
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
    predicted, notes = _predict_scans(bundle, scans, files)
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


def kept_scans(ws: Workspace) -> pd.DataFrame:
    """The scans of a workspace that cleaning kept, with all that `cohort.csv` knows of them."""
    cohort, cleaning = ws.read("cohort.csv"), ws.read("cleaning.csv")
    cohort["control"] = judge_controls(cohort)
    return cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])].reset_index(drop=True)


def _predict_scans(bundle: Bundle, scans: pd.DataFrame, files: list[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Rows with `ADDED` of the scans that have an age; a sentence per failure and kind of warning."""
    results = list(bundle.predict_many(files))
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
