"""Uploaded files on their way to a scan: bounded, in a private folder that is removed, never named in a log.

It decides what an upload is (scan, DICOM, something else) and reads no voxel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from brainage_nb.apps.predict_cli import is_image
from brainage_nb.models.bundles.prediction import Failure

MAX_UPLOAD = 2**30  # bytes of one upload
MAX_DICOM_FILES, MAX_DICOM_BYTES = 5000, 2 * 2**30
CONVERSION_SECONDS = 120
SCAN_TYPES = ("nii", "gz", "mgh", "mgz", "zip", "dcm", "ima")  # as the upload field offers them


class Upload(Protocol):
    """What Streamlit or ipywidgets hand over: a name and an open binary file."""

    name: str

    def getbuffer(self) -> memoryview: ...


@dataclass(frozen=True)
class StoredScan:
    """One scan on disk, as long as the folder lives: the file, and the name to show."""

    path: Path
    name: str


@contextmanager
def stored(uploads: Sequence[Upload]) -> Iterator[list[StoredScan | Failure]]:
    """Write uploads to a private temporary folder, DICOM converted; all of it is removed afterwards.

    Yields
    ------
    list of StoredScan or Failure
        In order; DICOM files together become one or several scans at the end.
    """
    with tempfile.TemporaryDirectory(prefix="brainage-") as folder:
        dicom = Path(folder, "dicom")
        found: list[StoredScan | Failure] = []
        for number, upload in enumerate(uploads):
            place = Path(folder, str(number))
            place.mkdir()
            found += _store_one(upload, place, dicom)
        if dicom.is_dir():
            found += converted(dicom, Path(folder, "converted"))
        yield found


def _store_one(upload: Upload, place: Path, dicom: Path) -> list[StoredScan | Failure]:
    name, content = plain_name(upload.name), upload.getbuffer()
    try:
        if len(content) > MAX_UPLOAD:
            limit = MAX_UPLOAD / 2**20
            return [
                Failure(name, "too_large", f"{name} is larger than {limit:,.0f} MB, the most that is read.")
            ]
        if bytes(content[:4]) == b"PK\x03\x04":
            return _unpack(upload, name, dicom)
        if bytes(content[128:132]) == b"DICM" or name.lower().endswith((".dcm", ".ima")):
            dicom.mkdir(exist_ok=True)
            (dicom / f"{len(list(dicom.iterdir())):05d}.dcm").write_bytes(content)
            return []
        path = place / (name if is_image(name) else f"{name}.nii")
        path.write_bytes(content)
        return [StoredScan(path, name)]
    finally:
        content.release()


def plain_name(name: str) -> str:
    """The file name without folders and unusual characters, at most 100 long."""
    last = re.split(r"[/\\]", name)[-1]
    cleaned = re.sub(r"[^\w.()+ -]", "_", last).lstrip(". ")[-100:]
    return cleaned or "scan.nii"


# --- DICOM ----------------------------------------------------------------------------------------------


def _unpack(upload: IO[bytes], name: str, dicom: Path) -> list[Failure]:
    """DICOM files of a zip, under names of our own; its own names and folders are not used."""
    try:
        with zipfile.ZipFile(upload) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > MAX_DICOM_FILES or sum(entry.file_size for entry in entries) > MAX_DICOM_BYTES:
                limit = MAX_DICOM_BYTES / 2**30
                sentence = f"{name} opens to more than {MAX_DICOM_FILES} files or {limit:.0f} GB."
                return [Failure(name, "too_large", f"{sentence} Zip the T1 series alone.")]
            n = sum([_unpack_one(archive, entry, dicom) for entry in entries])
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error):
        return [Failure(name, "unreadable", f"{name} is a damaged or encrypted zip file.")]
    if n == 0:
        sentence = f"{name} holds no DICOM images. Upload a NIfTI scan, or a zip of one DICOM series."
        return [Failure(name, "not_dicom", sentence)]
    return []


def _unpack_one(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, dicom: Path) -> bool:
    """Write one entry if it is DICOM; says whether it was."""
    with archive.open(entry) as stream:
        start = stream.read(132)
        if start[128:132] != b"DICM":
            return False
        dicom.mkdir(exist_ok=True)
        (dicom / f"{len(list(dicom.iterdir())):05d}.dcm").write_bytes(start + stream.read(entry.file_size))
    return True


def converted(dicom: Path, out: Path) -> list[StoredScan | Failure]:
    """NIfTI scans of a folder of DICOM files, by dcm2niix; a `Failure` where there are none."""
    name = "DICOM series"
    try:
        import dcm2niix
    except ImportError:
        sentence = "DICOM needs the converter dcm2niix (pip install dcm2niix), or convert to NIfTI yourself."
        return [Failure(name, "no_converter", sentence)]
    out.mkdir()
    # No sidecar (-b n), which would repeat names and dates; no names in file names.
    command = [str(dcm2niix.bin), "-b", "n", "-z", "n", "-f", "series_%s", "-o", str(out), str(dicom)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=CONVERSION_SECONDS)
    except (subprocess.SubprocessError, OSError):
        sentence = (
            "The DICOM files could not be converted (dcm2niix failed or took too long). Convert them to "
            "NIfTI."
        )
        return [Failure(name, "not_converted", sentence)]
    scans = [StoredScan(path, f"DICOM {path.stem.replace('_', ' ')}") for path in sorted(out.glob("*.nii"))]
    sentence = "No image volume was found in the DICOM files. Zip the whole T1 series, one file a slice."
    return scans or [Failure(name, "not_converted", sentence)]
