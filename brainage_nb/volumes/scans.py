"""Open one scan file and say in plain words what is wrong with it.

Whether a readable scan is good enough for a cohort (size, voxel size, content) is for cleaning to judge.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import nibabel as nib

# Why a file cannot be used as a scan; cleaning uses the same codes.
SCAN_ERRORS = {
    "missing": "the file does not exist",
    "unreadable": "the file is not an image that can be read",
    "truncated": "the file ends before its image does, or its compressed data are damaged",
    "too_large": "the header claims more voxels than any head scan has",
    "header_only": "only the header is there; the file with the voxels is missing",
    "not_volume": "the file holds no volume but surface or connectivity data",
    "not_3d": "the image is not three-dimensional",
    "not_scalar": "a voxel holds a complex number or a colour, not one intensity",
    "bad_affine": "the header gives no usable voxel size or orientation",
    "not_finite": "too many voxels are NaN or infinite",
    "blank": "every voxel has the same value",
}
# What was taken for granted about a scan that can be used.
SCAN_FLAGS = {
    "no_affine": "the header gives no orientation; the format's default is assumed (x leftwards, y forwards, "
    "z upwards)",
    "one_volume_4d": "a 4-D image with one volume, taken as 3-D",
    "sheared": "the voxel axes are not at right angles to each other",
    "some_not_finite": "NaN or infinite voxels, taken as background",
}
GZIP_MAGIC = b"\x1f\x8b"
HEADER_READ = 4096  # bytes; every header read here is shorter
# More than any head scan has (0.3 mm: 600 x 800 x 800); guards against a file made to fill the memory.
MAX_VOXELS = 400_000_000
SLACK_BYTES = 2**24  # what may follow the voxels: a FreeSurfer footer, padding


class ScanError(ValueError):
    """A file that cannot be used as a scan.

    Attributes
    ----------
    code : str
        A key of `SCAN_ERRORS`.
    sentence : str
        What came and what was expected.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code, self.sentence = code, sentence

    def __reduce__(self):  # so that it survives the way back from a worker process
        return ScanError, (self.code, self.sentence)


def load_scan(
    path: str | Path, *, max_nonfinite: float = 0.5, max_voxels: int = MAX_VOXELS
) -> nib.spatialimages.SpatialImage:
    """Read a scan whole and check that it is one volume of real intensities.

    NIfTI-1/2 (`.nii`, `.nii.gz`, `.hdr`/`.img`), FreeSurfer (`.mgh`, `.mgz`);
    whether a file is compressed, and which of these it is, is seen from its content, not from its name.

    Parameters
    ----------
    path : path
        The file.
    max_nonfinite : float
        Largest share of NaN or infinite voxels; fewer are set to 0.
    max_voxels : int
        Most voxels a header may claim. It is read first, and no more is decompressed than it claims.

    Returns
    -------
    nibabel image
        3-D, in memory, with the file's affine and header; `image.dataobj` is a float32 array, scaled by slope
        and intercept. `image.extra["flags"]` lists codes of `SCAN_FLAGS`, `image.extra["nonfinite_fraction"]`
        the share of voxels that were NaN or infinite, `image.extra["path"]` the file.

    Raises
    ------
    ScanError
        With a code of `SCAN_ERRORS`.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError("missing", f"{path} does not exist or is not a file.")
    image = _opened(path, max_voxels)
    _check_header(image, path, max_voxels)
    array = _voxels(image, path)
    flags = ["one_volume_4d"] if array.ndim > 3 else []
    array = array.reshape(array.shape[:3], order="A")
    affine = _checked_affine(image, path)
    flags += _affine_flags(image, affine)
    finite = np.isfinite(array)
    bad = 1.0 - np.count_nonzero(finite) / array.size
    if bad > max_nonfinite:
        raise ScanError("not_finite", f"{path.name}: {bad:.0%} of the voxels are NaN or infinite.")
    if bad:
        array[~finite] = 0.0
        flags.append("some_not_finite")
    if array.min() == array.max():
        raise ScanError("blank", f"{path.name}: every voxel is {array.flat[0]:g}; expected a head.")
    facts = {"flags": tuple(flags), "nonfinite_fraction": float(bad), "path": path}
    return _in_memory(array, affine, image, facts)


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """Edge lengths of a voxel in mm, shape (3,), of a 4x4 voxel-to-world affine."""
    return np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))


def _opened(path: Path, max_voxels: int) -> Any:
    """The image, not yet decoded; bytes of a compressed file are already decompressed."""
    import nibabel as nib

    with open(path, "rb") as stream:
        start = stream.read(HEADER_READ)
    if not start:
        raise ScanError("truncated", f"{path.name} is empty; copy the file again.")
    if b"/annex/objects/" in start or start.startswith(b"version https://git-lfs"):
        raise ScanError("unreadable", f"{path.name} is a git-annex or Git LFS link; fetch the scan itself.")
    try:
        if start.startswith(GZIP_MAGIC):
            return _from_bytes(_decompressed(path, max_voxels), path)
        if path.suffix in (".hdr", ".img"):
            return nib.load(path)
        _claimed_bytes(start, path, max_voxels)
        return _from_bytes(path.read_bytes(), path)
    except ScanError:
        raise
    except FileNotFoundError as error:
        raise _header_only(path, error) from error
    except Exception as error:  # nibabel raises many kinds on broken files
        raise ScanError("unreadable", f"{path.name} cannot be read as an image ({_said(error)}).") from error


def _header_only(path: Path, error: FileNotFoundError) -> ScanError:
    missing = Path(error.filename).name if error.filename else "the file with the voxels"
    return ScanError("header_only", f"{path.name} is a header only: {missing} is missing.")


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _decompressed(path: Path, max_voxels: int) -> bytes:
    """Content of a gzip file (one or several members), checksums verified; at most what its header claims."""
    try:
        with gzip.open(path) as stream:
            start = stream.read(HEADER_READ)
            limit = _claimed_bytes(start, path, max_voxels) + SLACK_BYTES
            stream.seek(0)
            content = stream.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        said = f"{path.name}: the compressed data end early or are damaged; copy the file again."
        raise ScanError("truncated", said) from error
    if len(content) > limit:
        raise ScanError("unreadable", f"{path.name} unpacks to far more than its header claims.")
    return content


def _claimed_bytes(start: bytes, path: Path, max_voxels: int) -> int:
    """Size of the whole image by its header, from the first bytes of the file; refused where absurd."""
    image_class = _kind(start, path)
    header = image_class.header_class.from_fileobj(io.BytesIO(start), check=False)
    shape = header.get_data_shape()
    _refuse_absurd(shape, path, max_voxels)
    offset = int(header.get_data_offset())
    return offset + int(np.prod(shape, dtype=float)) * header.get_data_dtype().itemsize


def _refuse_absurd(shape: tuple[int, ...], path: Path, max_voxels: int) -> None:
    if np.prod(shape, dtype=float) > max_voxels:
        claimed = " x ".join(str(int(n)) for n in shape)
        raise ScanError(
            "too_large", f"{path.name} claims {claimed} voxels; at most {max_voxels:,} in all are opened."
        )


def _from_bytes(content: bytes, path: Path) -> Any:
    """Decode decompressed bytes."""
    return _kind(content, path).from_bytes(content)


def _kind(content: bytes, path: Path) -> Any:
    """NIfTI-1, NIfTI-2 or MGH, told apart by how the file begins."""
    import nibabel as nib

    size = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    if size & {348, 540}:
        return nib.Nifti1Image if 348 in size else nib.Nifti2Image
    if content[:4] == b"\x00\x00\x00\x01":
        return nib.MGHImage
    raise ScanError("unreadable", f"{path.name} is neither a NIfTI nor a FreeSurfer (MGH) image.")


def _check_header(image: Any, path: Path, max_voxels: int) -> None:
    shape = tuple(int(n) for n in image.shape)
    _refuse_absurd(shape, path, max_voxels)
    keys = getattr(image.header, "keys", tuple)()
    if "intent_code" in keys and 3000 <= int(image.header["intent_code"]) < 3100:  # CIFTI-2
        raise ScanError(
            "not_volume", f"{path.name} holds surface or connectivity data {shape}, not a volume."
        )
    dtype = image.get_data_dtype()
    if dtype.names or dtype.kind == "c":
        kind = "colours" if dtype.names else "complex numbers"
        raise ScanError("not_scalar", f"{path.name}: voxels are {kind}; expected one intensity each.")
    if len(shape) < 3 or 0 in shape or np.prod(shape[3:], dtype=int) != 1:
        raise ScanError("not_3d", f"{path.name} has shape {shape}; expected one 3-D volume.")


def _voxels(image: Any, path: Path) -> np.ndarray:
    try:
        return image.get_fdata(dtype=np.float32, caching="unchanged")
    except FileNotFoundError as error:
        raise _header_only(path, error) from error
    except (EOFError, OSError, zlib.error, ValueError) as error:
        raise ScanError("truncated", f"{path.name}: voxels are missing ({_said(error)}).") from error


def _checked_affine(image: Any, path: Path) -> np.ndarray:
    affine = np.asarray(image.affine, dtype=float)
    volume = abs(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0.0
    if volume < 1e-9 * max(1.0, np.prod(voxel_sizes(affine))):
        raise ScanError("bad_affine", f"{path.name}: the affine is singular or not finite; repair it.")
    return affine


def _affine_flags(image: Any, affine: np.ndarray) -> list[str]:
    flags = []
    header = image.header
    if "sform_code" in getattr(header, "keys", tuple)():
        if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
            flags.append("no_affine")
    elif type(image).__name__.startswith(("Analyze", "Spm")):
        flags.append("no_affine")
    axes = affine[:3, :3] / voxel_sizes(affine)
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.01:  # about half a degree
        flags.append("sheared")
    return flags


def _in_memory(array: np.ndarray, affine: np.ndarray, image: Any, extra: dict[str, Any]) -> Any:
    import nibabel as nib

    header = image.header if isinstance(image, nib.Nifti1Image) else None
    made = nib.Nifti1Image(array, affine, header, extra=extra)
    made.header.set_data_dtype(np.float32)
    return made
