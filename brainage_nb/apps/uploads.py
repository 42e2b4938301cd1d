"""Uploaded files on their way to an age: bounded, in a private folder that is removed, never named in a log.

It decides what an upload is (scan, DICOM, something else) and keeps each with its own true age.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from brainage_nb.cohort.images import is_image
from brainage_nb.predict.cautions import Failure, Prediction
from brainage_nb.workspace import CannotWrite, explain_write_errors

if TYPE_CHECKING:
    from brainage_nb.predict.bundle import Bundle

MAX_UPLOAD = 2**30  # bytes of one upload
MAX_DICOM_FILES, MAX_DICOM_BYTES = 5000, 2 * 2**30
CONVERSION_SECONDS = 120


@dataclass(frozen=True)
class StoredScan:
    """One scan on disk, as long as the folder lives.

    Attributes
    ----------
    path : Path
    name : str
        To show: the upload's own.
    origin : str
        `upload 2/T1.nii.gz`: tells scans of one name apart.
    age : float or None
        True age in years, where given with the upload.
    """

    path: Path
    name: str
    origin: str = ""
    age: float | None = None


def predict_stored(
    bundle: Bundle, scans: Sequence[StoredScan | Failure], others: Mapping[str, BytesIO] | None = None
) -> list[Prediction | Failure]:
    """Ages of scans under their own names; what is no scan stays the failure it is.

    `others` holds uploads of further scans of the session, by modality; at the end a failure for each that is
    no scan, or several.
    """
    with ExitStack() as folders:
        further = {name: folders.enter_context(stored([upload])) for name, upload in (others or {}).items()}
        also = {name: found[0].path for name, found in further.items() if _is_one_scan(found)}
        results = [_predict(bundle, scan, also) for scan in scans]
        return results + [_say_unused(name, found) for name, found in further.items() if name not in also]


def _predict(bundle: Bundle, scan: StoredScan | Failure, also: Mapping[str, Path]) -> Prediction | Failure:
    if isinstance(scan, Failure):
        return scan
    result = next(bundle.predict_many([scan.path], [scan.age], [also], n_jobs=1))
    return replace(result, scan=scan.name, path=scan.origin)


def _is_one_scan(found: Sequence[StoredScan | Failure]) -> bool:
    return len(found) == 1 and not isinstance(found[0], Failure)


def _say_unused(name: str, found: Sequence[StoredScan | Failure]) -> Failure:
    """Why a further upload was not used."""
    if isinstance(found[0], Failure):
        return found[0]
    sentence = f"The {name} upload holds {len(found)} scans, so none was used. Upload one scan."
    return Failure(f"{name} scan", "several_scans", sentence)


def together(uploads: Sequence[BytesIO]) -> list[list[BytesIO]]:
    """What was uploaded, thing by thing: single DICOM files are one series, any other upload is a scan."""
    slices = [upload for upload in uploads if _is_dicom(upload)]
    return [[upload] for upload in uploads if upload not in slices] + [slices] * bool(slices)


def shown_name(name: str) -> str:
    """The file name as it was given, without folders and what cannot be printed, at most 100 long."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(filter(str.isprintable, last))[-100:] or "scan"


@contextmanager
def stored(
    uploads: Sequence[BytesIO], ages: Sequence[float | None] | None = None
) -> Iterator[list[StoredScan | Failure]]:
    """Write uploads to a private temporary folder, DICOM converted; all of it is removed afterwards.

    Parameters
    ----------
    uploads : sequence of BytesIO
        With a `name` each, as Streamlit and ipywidgets hand them over.
    ages : sequence of float or None
        True ages in years, one for each thing of `together(uploads)`.

    Yields
    ------
    list of StoredScan or Failure
        In the order of `together(uploads)`; DICOM may become several scans.
    """
    things = together(uploads)
    ages = [None] * len(things) if ages is None else ages
    with tempfile.TemporaryDirectory(prefix="brainage-") as folder:
        found: list[StoredScan | Failure] = []
        for number, (thing, age) in enumerate(zip(things, ages, strict=True), start=1):
            place, name = Path(folder, str(number)), shown_name(thing[0].name)
            place.mkdir()
            for one in _store(thing, name, place, age):
                origin = f"upload {number}/{name}"
                found.append(
                    replace(one, path=origin) if isinstance(one, Failure) else replace(one, origin=origin)
                )
        yield found


def _store(thing: Sequence[BytesIO], name: str, place: Path, age: float | None) -> list[StoredScan | Failure]:
    dicom = place / "dicom"
    for upload in thing:
        with upload.getbuffer() as content:
            if len(content) > MAX_UPLOAD:
                said = f"{name} is larger than {MAX_UPLOAD / 2**20:,.0f} MB, the most that is read."
                return [Failure(name, "too_large", said)]
            try:
                if bytes(content[:4]) == b"PK\x03\x04":
                    if lost := _unpack(upload, name, dicom):
                        return lost
                elif _is_dicom(upload):
                    _keep_dicom(content, dicom)
                else:
                    plain = plain_name(name)
                    path = place / (plain if is_image(plain) else f"{plain}.nii")
                    with explain_write_errors(path):
                        path.write_bytes(content)
                    return [StoredScan(path, name, age=age)]
            except CannotWrite as error:
                return [Failure(name, "not_stored", str(error))]
    return converted(dicom, place / "converted", age)


def plain_name(name: str) -> str:
    """The file name without folders and unusual characters, at most 100 long."""
    cleaned = re.sub(r"[^\w.()+ -]", "_", shown_name(name)).lstrip(". ")
    return cleaned or "scan.nii"


# --- DICOM ----------------------------------------------------------------------------------------------


def _is_dicom(upload: BytesIO) -> bool:
    with upload.getbuffer() as content:
        start = bytes(content[:132])
    return start[128:] == b"DICM" or (
        upload.name.lower().endswith((".dcm", ".ima")) and not start.startswith(b"PK\x03\x04")
    )


def _keep_dicom(content: bytes | memoryview, dicom: Path) -> None:
    """Write one file under a name of our own."""
    with explain_write_errors(dicom / "slice"):
        dicom.mkdir(exist_ok=True)
        (dicom / f"{len(list(dicom.iterdir())):05d}.dcm").write_bytes(content)


def _unpack(upload: BytesIO, name: str, dicom: Path) -> list[Failure]:
    """DICOM files of a zip, under names of our own; its own names and folders are not used."""
    try:
        with zipfile.ZipFile(upload) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > MAX_DICOM_FILES or sum(entry.file_size for entry in entries) > MAX_DICOM_BYTES:
                limit = MAX_DICOM_BYTES / 2**30
                sentence = f"{name} opens to more than {MAX_DICOM_FILES} files or {limit:.0f} GB."
                return [Failure(name, "too_large", f"{sentence} Zip the T1 series alone.")]
            for entry in entries:
                with archive.open(entry) as stream:
                    start = stream.read(132)
                    if start[128:132] == b"DICM":
                        _keep_dicom(start + stream.read(entry.file_size), dicom)
    except CannotWrite:
        raise
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error):
        return [Failure(name, "unreadable", f"{name} is a damaged or encrypted zip file.")]
    if not dicom.exists():
        sentence = f"{name} holds no DICOM images. Upload a NIfTI scan, or a zip of one DICOM series."
        return [Failure(name, "not_dicom", sentence)]
    return []


def converted(dicom: Path, out: Path, age: float | None = None) -> list[StoredScan | Failure]:
    """NIfTI scans of a folder of DICOM files, by dcm2niix; a `Failure` where there are none.

    Where they are of several patients, whose `age` it is cannot be known: no scan gets it, which is said.
    """
    name = "DICOM series"
    try:
        import dcm2niix
    except ImportError:
        sentence = "DICOM needs the converter dcm2niix (pip install dcm2niix), or convert to NIfTI yourself."
        return [Failure(name, "no_converter", sentence)]
    out.mkdir()
    # No sidecar (-b n), which would repeat names and dates; the patient's id names a folder, no file.
    named = ["-f", "patient_%i/series_%s", "-o", str(out)]
    command = [str(dcm2niix.bin), "-b", "n", "-z", "n", *named, str(dicom)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=CONVERSION_SECONDS)
    except (subprocess.SubprocessError, OSError):
        sentence = "dcm2niix could not convert the DICOM files, or took too long. Convert them to NIfTI."
        return [Failure(name, "not_converted", sentence)]
    files = sorted(out.rglob("*.nii"))
    mixed = len({path.parent for path in files}) > 1 and age is not None
    scans: list[StoredScan | Failure] = [
        StoredScan(path, f"DICOM {path.stem.replace('_', ' ')}", age=None if mixed else age) for path in files
    ]
    if mixed:
        sentence = "These DICOM files are of several patients, so the true age was used for none of them. "
        scans.append(Failure(name, "age", f"{sentence}Upload each patient's series as a .zip of its own."))
    sentence = "No image volume was found in the DICOM files. Zip the whole T1 series, one file a slice."
    return scans or [Failure(name, "not_converted", sentence)]
