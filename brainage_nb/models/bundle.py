"""A trained model as one folder or zip: opened without running anything from it, it predicts scans.

The front of `bundles`: `files` (safe reading), `members` (networks), `prediction` (what is said), `saving`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brainage_nb.models.bundles.facts import all_seen, among, check_manifest
from brainage_nb.models.bundles.files import MAX_BYTES, BundleError, BundleFiles, open_bundle
from brainage_nb.models.bundles.members import (
    RESNET,
    VGG,
    NetworkEnsemble,
    SvrModel,
    compute_threads,
    model_of,
)
from brainage_nb.models.bundles.prediction import (
    Caution,
    Failure,
    Prediction,
    age_cautions,
    checked_age,
    distance_cautions,
    head_cautions,
    likeness_caution,
    member_cautions,
    voxel_cautions,
)
from brainage_nb.models.bundles.reference import FILE as REFERENCE_FILE
from brainage_nb.models.bundles.reference import Reference
from brainage_nb.models.bundles.saving import current_bundle, save_bundle
from brainage_nb.models.devices import working_device
from brainage_nb.volumes.scans import ScanError, voxel_file
from brainage_nb.workspace import n_workers, sha256_of

if TYPE_CHECKING:
    import torch

    from brainage_nb.evaluation.bias import AgeBiasCorrector
    from brainage_nb.evaluation.intervals import ConformalInterval
    from brainage_nb.volumes.preprocessing import PreprocessingSettings

__all__ = ["Bundle", "BundleError", "current_bundle", "load_bundle", "save_bundle"]

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
    from brainage_nb.evaluation.bias import AgeBiasCorrector
    from brainage_nb.evaluation.intervals import ConformalInterval
    from brainage_nb.volumes.preprocessing import PreprocessingSettings

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
