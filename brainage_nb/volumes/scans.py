"""Open one scan file and say in plain words what is wrong with it.

Whether a readable scan is good enough for a cohort (size, voxel size, content) is for cleaning to judge.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
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
    "not_finite": "too few voxels are numbers (not NaN or infinite) to show a head",
    "blank": "every voxel has the same value",
}
# What was taken for granted about a scan that can be used.
SCAN_FLAGS = {
    "no_affine": "the header gives no orientation; the format's default is assumed (x leftwards, y forwards, "
    "z upwards)",
    "header_disagrees": "the header gives two sizes or orientations that disagree",
    "unit_not_mm": "the header's unit of length is not the millimetre",
    "one_volume_4d": "a 4-D image with one volume, taken as 3-D",
    "sheared": "the voxel axes are not at right angles to each other",
    "some_not_finite": "NaN or infinite voxels, taken as background",
    "mask_not_taken": "a mask beside the scan was not taken as its brain mask",
}
GZIP_MAGIC, MGH_MAGIC = b"\x1f\x8b", b"\x00\x00\x00\x01"
HEADER_READ = 4096  # bytes; every header read here is shorter, but for its extensions, which nothing needs
CHUNK = 2**20  # bytes read or unpacked at once
# More than any head scan has (0.3 mm: 600 x 800 x 800); guards against a file made to fill the memory.
MAX_VOXELS = 400_000_000
SLACK_BYTES = 2**24  # what may follow the voxels: a FreeSurfer footer, padding
MAX_OFFSET = 2**26  # bytes before the voxels: a header and its extensions
UNITS = {1: ("metre", 1000.0), 2: ("millimetre", 1.0), 3: ("micron", 0.001)}  # codes of NIfTI, in mm
EXTENT_MM = (1.0, 5000.0)  # an image's longest edge; any other is a wrong unit
LEAST_EDGE_MM = 0.001  # of a voxel; smoothing to a model's grid would go over millions of them
ROUNDING = 0.01  # a quaternion longer than 1 by no more is a rotation, rounded
SAME_SIZE, SAME_DEGREES = 0.005, 2.0  # up to here sizes (relative) and axes of two affines agree
MANY = 0.5  # share of NaN or infinite voxels from which what is left must have the size of a brain
LEAST_HEAD_ML = 500.0


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


def load_scan(path: str | Path, *, max_voxels: int = MAX_VOXELS) -> nib.spatialimages.SpatialImage:
    """Read a scan whole and check that it is one volume of real intensities.

    NIfTI-1/2 (`.nii`), pairs of NIfTI or Analyze (`.hdr` and `.img`), FreeSurfer (`.mgh`, `.mgz`); whether a
    file is compressed, and which of these it is, is seen from its content.

    Parameters
    ----------
    path : path
        The file; of a pair either half.
    max_voxels : int
        Most voxels a header may claim. It is read first, and no more is decompressed than it claims.

    Returns
    -------
    nibabel image
        3-D, in memory, affine in mm; `image.dataobj` is a float32 array, scaled by slope and intercept, NaN
        and infinite voxels set to background. `image.extra["flags"]` maps codes of `SCAN_FLAGS` to a sentence
        on this scan, `image.extra["nonfinite_fraction"]` is the share of voxels that were NaN or infinite,
        `image.extra["path"]` the file.

    Raises
    ------
    ScanError
        With a code of `SCAN_ERRORS`, whatever goes wrong.

    Examples
    --------
    >>> image = load_scan("sub-01_T1w.nii.gz")  # doctest: +SKIP
    >>> image.shape, image.extra["flags"]  # doctest: +SKIP
    ((176, 240, 256), {})
    """
    import nibabel as nib

    path = Path(path)
    header, flags = read_header(path)
    with errors_as_reason(path):
        _check_header(header, max_voxels)
        affine = placement(header, path, flags)
        array = _voxels(header, path)
        if array.ndim > 3:
            flags["one_volume_4d"] = _meaning("one_volume_4d")
        array = array.reshape(array.shape[:3], order="A")
        bad = _fill_nonfinite(array, affine, flags)
        if array.min() == array.max():
            raise ScanError("blank", f"every voxel is {array.flat[0]:g}; expected a head.")
    extra = {"flags": flags, "nonfinite_fraction": bad, "path": path}
    return nib.Nifti1Image(array, affine, extra=extra)


@contextmanager
def errors_as_reason(path: Path, done: str = "") -> Iterator[None]:
    """Whatever is raised while a scan is read, measured or preprocessed becomes its `ScanError`, so that one
    scan never ends a cohort.

    `done` is what cannot be done to it. Left out where the file is read; reasons begin with its name then.
    """
    try:
        yield
    except ScanError as error:
        if done:
            raise
        raise ScanError(error.code, f"{path.name}: {error.sentence}") from error
    except FileNotFoundError as error:
        raise ScanError("missing", f"{path} does not exist or is not a file.") from error
    except (EOFError, zlib.error) as error:
        sentence = f"{path.name}: the compressed data end early or are damaged; copy the file again."
        raise ScanError("truncated", sentence) from error
    except MemoryError as error:
        raise ScanError("too_large", f"{path.name} does not fit into memory.") from error
    except Exception as error:  # nibabel raises many kinds on broken files
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ScanError("unreadable", f"{path.name} cannot be {done or 'read'} ({reason}).") from error


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """Edge lengths of a voxel in mm, shape (3,), of a 4x4 voxel-to-world affine."""
    return np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))


def voxel_file(path: str | Path) -> Path:
    """The file whose content tells one scan from another: of a pair the `.img`, as many headers are alike."""
    try:
        voxels = _halves(Path(path))[1]
    except Exception:  # load_scan says what is wrong
        return Path(path)
    return voxels if voxels.is_file() else Path(path)


def read_header(path: str | Path) -> tuple[Any, dict[str, str]]:
    """A file's nibabel header, repaired where that is safe, and flags as `load_scan` gives; reads no voxel.

    Raises
    ------
    ScanError
        As `load_scan`.
    """
    path = Path(path)
    with errors_as_reason(path):
        if not path.is_file():
            raise ScanError("missing", f"{path} does not exist or is not a file.")
        first, second = _halves(path)
        start = _read(first, HEADER_READ).getvalue()[:HEADER_READ]
        if not start:
            raise ScanError("truncated", "the file is empty; copy it again.")
        if b"/annex/objects/" in start or start.startswith(b"version https://git-lfs"):
            raise ScanError("unreadable", "it is a git-annex or Git LFS link; fetch the scan itself.")
        kind, length = _kind(start, pair=first != second)
        header = kind.from_fileobj(io.BytesIO(start[:length]), check=False)
        flags = _repair(header)
        if start[:4] == MGH_MAGIC and not any(start[28:30]):  # nibabel has put the format's default in place
            flags["no_affine"] = _meaning("no_affine")
        header.check_fix()
    return header, flags


def placement(header: Any, path: Path, flags: dict[str, str]) -> np.ndarray:
    """Affine (4, 4) from voxels to the world in mm; `flags` gains what it was read against.

    As in nibabel the sform counts before the qform.

    Raises
    ------
    ScanError
        `bad_affine`.
    """
    stated = _stated_affines(header, path)
    affine = next(iter(stated.values()), header.get_best_affine())
    sizes = voxel_sizes(affine)
    if not abs(np.linalg.det(affine[:3, :3])) > 1e-9 * np.prod(sizes) or not np.isfinite(affine).all():
        raise ScanError("bad_affine", "the affine is singular or not finite; repair it.")
    scale = np.diag([_mm_factor(sizes, header, flags)] * 3 + [1.0])
    if stated:
        zooms = scale[0, 0] * np.asarray(header.get_zooms()[:3], dtype=float)
        _compare({name: scale @ one for name, one in stated.items()}, zooms, flags)
    else:
        flags["no_affine"] = _meaning("no_affine")
    axes = affine[:3, :3] / sizes
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.01:  # about half a degree
        flags["sheared"] = _meaning("sheared")
    if (least := voxel_sizes(scale @ affine).min()) < LEAST_EDGE_MM:
        raise ScanError(
            "bad_affine", f"voxels have an edge of {least:.2g} mm, as no scan has; repair the header."
        )
    return scale @ affine


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _meaning(code: str) -> str:
    return f"{SCAN_FLAGS[code][:1].upper()}{SCAN_FLAGS[code][1:]}."


# --- bytes ----------------------------------------------------------------------------------------------


def _halves(path: Path) -> tuple[Path, Path]:
    """The file with the header and the file with the voxels: one, or the halves of a pair."""
    ending = re.search(r"\.(hdr|img)(\.gz)?$", path.name, re.IGNORECASE)
    start = _read(path, HEADER_READ).getvalue() if ending else b""
    if not ending or start[344:347] == b"n+1" or start[4:7] == b"n+2":
        return path, path
    is_header = ending[1].lower() == "hdr"
    other = "img" if is_header else "hdr"
    names = [f"{part}{packed}" for part in (other, other.upper()) for packed in ("", ".gz", ".GZ")]
    places = [path.with_name(f"{path.name[: ending.start()]}.{name}") for name in names]
    partner = next(filter(Path.is_file, places), places[0])
    if is_header:
        return path, partner
    if not partner.is_file():
        raise ScanError("unreadable", f"it holds voxels only: its header {partner.name} is missing.")
    return partner, path


def _pieces(path: Path) -> Iterator[bytes]:
    """Content of a file, unpacked where it is compressed (also twice), in pieces of at most `CHUNK`."""
    with open(path, "rb") as stream:
        pieces = iter(lambda: stream.read(CHUNK), b"")
        for _ in range(3):
            first = next(pieces, b"")
            pieces = chain([first], pieces)
            if not first.startswith(GZIP_MAGIC):
                break
            pieces = _unpacked(pieces)
        yield from pieces


def _unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Content of a gzip stream, checksums verified; as gunzip does, several members are one content, and
    bytes after the last are passed over.
    """
    packed = next(pieces)
    while packed.startswith(GZIP_MAGIC):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            piece = member.decompress(packed, CHUNK)
            packed = member.unconsumed_tail
            if piece:
                yield piece
            elif not packed and not member.eof:
                packed = next(pieces, b"")
                if not packed:
                    raise EOFError
        packed = (member.unused_data + next(pieces, b"")).lstrip(b"\0")


def _read(path: Path, limit: int) -> io.BytesIO:
    """A file's content, up to the piece that passes the limit."""
    content = io.BytesIO()
    for piece in _pieces(path):
        content.write(piece)
        if content.tell() > limit:
            break
    return content


def _kind(start: bytes, *, pair: bool) -> tuple[Any, int]:
    """nibabel's class for a header, told from how it begins, and the bytes to give to it: no extensions."""
    import nibabel as nib

    size = {int.from_bytes(start[:4], order) for order in ("little", "big")} & {348, 540}
    pairs = (nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage)
    for kind in pairs if pair else ():
        if kind.header_class.may_contain_header(start):
            return kind.header_class, min(size, default=348)
    if size and not pair:
        return (nib.Nifti1Header if 348 in size else nib.Nifti2Header), min(size)
    if start[:4] == MGH_MAGIC:
        return nib.MGHImage.header_class, HEADER_READ
    raise ScanError("unreadable", "it is neither a NIfTI nor a FreeSurfer (MGH) image.")


# --- header ---------------------------------------------------------------------------------------------


def _repair(header: Any) -> dict[str, str]:
    """Mend what is safe to mend before nibabel checks the header, and give flags for what is not."""
    if getattr(header, "is_single", False) and header["vox_offset"] < header.single_vox_offset:
        header["vox_offset"] = header.single_vox_offset
    has_sform = header.get("sform_code", 0) != 0
    edges = header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))] if "pixdim" in header.keys() else 1  # noqa: SIM118
    if not np.all(np.isfinite(edges) & (edges != 0)):
        if not has_sform:
            wrong = f"pixdim says {_by(edges)}, which is no size of a voxel"
            raise ScanError("bad_affine", f"{wrong}; repair the header.")
        header["pixdim"][1:4] = voxel_sizes(header.get_sform())  # no size was stated, so none disagrees
    return _repair_quaternion(header, has_sform) if header.get("qform_code", 0) != 0 else {}


def _repair_quaternion(header: Any, has_sform: bool) -> dict[str, str]:
    quaternion = {name: float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")}
    length = np.linalg.norm(list(quaternion.values()))
    if 1 < length <= 1 + ROUNDING:
        for name, part in quaternion.items():
            header[name] = part / length
    if length <= 1 + ROUNDING:
        return {}
    wrong = f"the qform is no rotation (its quaternion has length {length:.3g})"
    if not has_sform:
        raise ScanError("bad_affine", f"{wrong}; repair the header.")
    header["qform_code"] = 0
    return {"header_disagrees": f"In the header {wrong}; the sform was used."}


def _check_header(header: Any, max_voxels: int) -> None:
    """Refuse what is no volume of intensities, or far too large, before a voxel is read."""
    shape, offset = tuple(int(n) for n in header.get_data_shape()), header.get_data_offset()
    dtype = header.get_data_dtype()
    if np.prod(shape, dtype=float) > max_voxels:
        claimed = f"it claims {' x '.join(map(str, shape))} voxels"
        raise ScanError("too_large", f"{claimed}; at most {max_voxels:,} in all are opened.")
    if offset > MAX_OFFSET:
        raise ScanError("unreadable", f"its header places the voxels at byte {offset:,}.")
    if 3000 <= int(header.get("intent_code", 0)) < 3100:  # CIFTI-2
        raise ScanError("not_volume", f"it holds surface or connectivity data {shape}, not a volume.")
    if dtype.names or dtype.kind == "c":
        held = "colours" if dtype.names else "complex numbers"
        raise ScanError("not_scalar", f"it holds {held}; expected one intensity for each voxel.")
    if len(shape) < 3 or 0 in shape or np.prod(shape[3:], dtype=int) != 1:
        raise ScanError("not_3d", f"it has shape {shape}; expected one 3-D volume.")


def _stated_affines(header: Any, path: Path) -> dict[str, np.ndarray]:
    """Every affine the header gives, by its name; the one that counts first."""
    if header.get("Mdc") is not None:  # MGH
        return {"affine": header.get_affine()}
    if header.get("sform_code") is None:  # Analyze
        mat = path.with_name(re.sub(r"\.(hdr|img)(\.gz)?$", ".mat", path.name, flags=re.IGNORECASE))
        return {mat.name: _affine_of_spm(header, mat)} if mat.is_file() else {}
    forms = {"sform": header.get_sform(coded=True), "qform": header.get_qform(coded=True)}
    return {f"the {name} (code {code})": one for name, (one, code) in forms.items() if one is not None}


def _affine_of_spm(header: Any, mat: Path) -> np.ndarray:
    """What SPM keeps beside an Analyze pair."""
    import nibabel as nib

    contents = {"header": header.binaryblock, "image": b"", "mat": mat.read_bytes()}
    files = {name: nib.FileHolder(fileobj=io.BytesIO(content)) for name, content in contents.items()}
    return nib.Spm99AnalyzeImage.from_file_map(files).affine


def _mm_factor(edges: np.ndarray, header: Any, flags: dict[str, str]) -> float:
    """What turns the header's lengths into mm: by its unit, unless that can only be wrong."""
    unit, factor = UNITS.get(int(header.get("xyzt_units", 2)) & 7, ("unknown", 1.0))
    extent = float((edges * header.get_data_shape()[:3]).max())
    possible = [used for used in (factor, 1.0) if EXTENT_MM[0] <= extent * used <= EXTENT_MM[1]]
    if not possible:
        raise ScanError(
            "bad_affine",
            f"voxels of {_by(edges)} make an image {extent:.3g} long (header's unit: {unit}), "
            "which is no head. Correct the header: voxel sizes, or xyzt_units (1 metre, 2 mm, 3 micron).",
        )
    if factor != 1:
        why = f", but an image of {extent:.3g} {unit}s is no head" if possible[0] == 1 else ""
        flags["unit_not_mm"] = (
            f"The header's unit is the {unit}{why}: voxels of {_by(edges)} were read as "
            f"{_by(edges * possible[0])} mm."
        )
    return possible[0]


def _compare(stated: dict[str, np.ndarray], zooms: np.ndarray, flags: dict[str, str]) -> None:
    """Flag affines (in mm; the first is used) and voxel sizes that disagree in more than rounding."""
    used, *others = stated.values()
    differ = [] if np.allclose(voxel_sizes(used), zooms, rtol=SAME_SIZE, atol=0) else ["size"]
    for other in others:
        cosines = (_directions(used) * _directions(other)).sum(axis=0)
        degrees = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
        if degrees > SAME_DEGREES:
            differ.append(f"axes (up to {degrees:.0f} degrees apart)")
        if np.linalg.det(used[:3, :3]) * np.linalg.det(other[:3, :3]) < 0:
            differ.append("side (one mirrors the other)")
    if differ:
        says = [f"{name} says {_by(voxel_sizes(one))} mm, {_axes(one)}" for name, one in stated.items()]
        flags["header_disagrees"] = (
            f"The header disagrees with itself in {' and '.join(differ)}: {'; '.join(says)}; pixdim says "
            f"{_by(zooms)} mm. Used was {next(iter(stated))}; check which is right."
        )


def _directions(affine: np.ndarray) -> np.ndarray:
    """Unit vectors (3, 3), one column per voxel axis, at right angles as a qform can only have them."""
    left, _, right = np.linalg.svd(affine[:3, :3] / voxel_sizes(affine))
    return left @ right


def _axes(affine: np.ndarray) -> str:
    """The anatomical directions in which the voxel axes grow, such as RAS."""
    import nibabel as nib

    return "".join(axis or "?" for axis in nib.aff2axcodes(affine))


def _by(lengths: np.ndarray) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths)


# --- voxels ---------------------------------------------------------------------------------------------


def _voxels(header: Any, path: Path) -> np.ndarray:
    """All voxels as float32, scaled."""
    from nibabel.arrayproxy import ArrayProxy

    place = _halves(path)[1]
    if not place.is_file():
        raise ScanError("header_only", f"it is a header only: {place.name} is missing.")
    n_bytes = int(np.prod(header.get_data_shape(), dtype=float)) * header.get_data_dtype().itemsize
    most = header.get_data_offset() + n_bytes + SLACK_BYTES
    content = _read(place, most)
    if content.tell() > most:
        raise ScanError("unreadable", "it holds far more than its header claims.")
    try:
        return np.asanyarray(ArrayProxy(content, header), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise ScanError("truncated", f"voxels are missing ({_first_line(error)}).") from error


def _fill_nonfinite(array: np.ndarray, affine: np.ndarray, flags: dict[str, str]) -> float:
    """Set voxels that are NaN or infinite to background, in place, and give their share.

    Most of a stripped scan may be NaN, so a share says little: what is left must be as large as a brain.
    """
    from scipy import ndimage

    finite = np.isfinite(array)
    bad = 1.0 - np.count_nonzero(finite) / array.size
    if bad > MANY:
        left_ml = np.count_nonzero(ndimage.binary_opening(finite)) * np.prod(voxel_sizes(affine)) / 1000
        if left_ml < LEAST_HEAD_ML:
            raise ScanError(
                "not_finite",
                f"{bad:.0%} of the voxels are NaN or infinite; what is left, {left_ml:.0f} ml "
                f"without gaps, is no head (at least {LEAST_HEAD_ML:.0f} ml).",
            )
    if bad:
        array[~finite] = min(0.0, np.percentile(array[finite], 1))  # 0 is no background of z-scores
        flags["some_not_finite"] = f"{bad:.1%} of the voxels are NaN or infinite, taken as background."
    return float(bad)
