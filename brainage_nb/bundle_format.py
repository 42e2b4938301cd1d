"""The files of a model bundle, written and read so that nothing in them is ever executed.

A bundle is a folder or a zip of a JSON manifest and safetensors arrays. What the files mean is for `bundle`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from brainage_nb.workspace import write_json, write_text, writing

FORMAT = 1  # raise it when an older reader would misread a newer bundle
MANIFEST = "bundle.json"
CARD = "README.md"
ARRAYS = re.compile(r"(member-\d{2}|vgg_svr|vgg16_features|reference)\.safetensors")
MAX_BYTES = 4 * 2**30  # opened; 30 members of half precision are 2 GB
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_FILES = 64
MAX_RATIO = 100  # weights hardly compress; a zip bomb reaches 1000 and more
DROPPINGS = ("__MACOSX/", ".DS_Store", "desktop.ini")  # what file managers add; never opened
ZIP, GZIP = b"PK\x03\x04", b"\x1f\x8b"


class BundleError(ValueError):
    """A bundle that cannot be used: what is wrong with it and what to do."""


@dataclass
class BundleFiles:
    """A bundle's checked manifest, and its arrays on demand.

    Attributes
    ----------
    manifest : dict
        `bundle.json`.
    name : str
        Of the folder or zip, for messages.
    """

    manifest: dict[str, Any]
    name: str
    _read: Callable[[str], bytes]

    def content(self, file: str) -> bytes:
        """Bytes of one listed file; size and SHA-256 agree with the manifest."""
        if file not in self.manifest["files"]:
            raise BundleError(
                f"{self.name}: {MANIFEST} names {str(file)[:80]!r}, which is not among its files."
            )
        listed = self.manifest["files"][file]
        content = self._read(file)
        if len(content) != listed["bytes"] or hashlib.sha256(content).hexdigest() != listed["sha256"]:
            raise BundleError(
                f"{self.name}: {file} is not the file this bundle was saved with (its SHA-256 or size "
                "differs). It was damaged or changed; copy or download the bundle again."
            )
        return content

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """Named arrays of one safetensors file."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.content(file))
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise BundleError(f"{self.name}: {file} is not a readable safetensors file ({error}).") from error


# --- reading --------------------------------------------------------------------------------------------


def open_bundle(source: Path | str | IO[bytes], *, max_bytes: int = MAX_BYTES) -> BundleFiles:
    """Open a bundle and check everything that can be checked without reading the weights.

    Parameters
    ----------
    source : path or binary file
        A folder, a `.zip`, or an open zip (an upload).
    max_bytes : int
        Largest size of all files together, opened.

    Raises
    ------
    BundleError
        Pickles, files that do not belong, links, paths that lead out, zip bombs, a manifest that is missing,
        too large, not JSON or of a newer format.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        name, sizes, read = _folder(Path(source))
    else:
        name, sizes, read = _zip(source)
    _check_names(name, sizes)
    if sum(sizes.values()) > max_bytes:
        raise BundleError(
            f"{name} opens to {sum(sizes.values()) / 2**20:,.0f} MB; at most {max_bytes / 2**20:,.0f} MB "
            "are opened."
        )
    manifest = _manifest(name, sizes, read)
    present = set(sizes) - {MANIFEST, CARD}
    if present != set(manifest["files"]):
        missing, extra = set(manifest["files"]) - present, present - set(manifest["files"])
        raise BundleError(
            f"{name}: files and {MANIFEST} disagree (missing: {sorted(missing)}, not listed: "
            f"{sorted(extra)}). Copy the whole bundle again."
        )
    return BundleFiles(manifest, name, read)


def _folder(folder: Path) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    if not (folder / MANIFEST).exists() and (meant := _did_you_mean(folder)):
        raise BundleError(f"{folder} has no {MANIFEST}, so it is no bundle.{meant}")
    sizes = {}
    for path in folder.iterdir():
        if path.name in DROPPINGS:
            continue
        if path.is_symlink() or not path.is_file():
            raise BundleError(
                f"{folder.name}: {path.name} is a link or a folder; a bundle holds plain files."
            )
        sizes[path.name] = path.stat().st_size
    return folder.name, sizes, lambda file: (folder / file).read_bytes()


def _zip(source: Path | str | IO[bytes]) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    name = Path(str(source if isinstance(source, str | Path) else getattr(source, "name", "the upload"))).name
    _refuse_what_is_no_zip(source, name)
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BundleError(f"{name} is a damaged zip file ({error}). Copy it again.") from error
    entries = [
        entry
        for entry in archive.infolist()
        if not (entry.filename.startswith(DROPPINGS) or _dropping(entry))
    ]
    root = _one_root(entries)
    entries = [entry for entry in entries if entry.filename != root]
    for entry in entries:
        _check_entry(entry, name)
    found = {entry.filename.removeprefix(root): entry for entry in entries}
    if len(found) != len(entries):
        raise BundleError(f"{name} holds two files of one name; it was not made by this package.")
    sizes = {file: entry.file_size for file, entry in found.items()}
    return name, sizes, lambda file: _unpacked(archive, found[file], name)


def _refuse_what_is_no_zip(source: Path | str | IO[bytes], name: str) -> None:
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            expected = "Expected a bundle folder or a .zip of one."
            raise BundleError(f"No bundle at {source}. {expected}{_did_you_mean(Path(source))}")
        with open(source, "rb") as stream:
            start = stream.read(4)
    else:
        source.seek(0)
        start = source.read(4)
        source.seek(0)
    if start == ZIP:
        return
    meant = _did_you_mean(Path(source)) if isinstance(source, str | Path) else ""
    if start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05":
        raise BundleError(
            f"{name} is a Python pickle, which can run any code when it is opened, so it is not. A bundle "
            f"is a folder or .zip written by save_bundle.{meant}"
        )
    kind = "is empty" if not start else "is a gzip file" if start[:2] == GZIP else "is not a zip file"
    raise BundleError(f"{name} {kind}. Expected a bundle: a folder or .zip written by save_bundle.{meant}")


def _did_you_mean(place: Path) -> str:
    """The bundles of the run or workspace that was given in a bundle's place, or that the place lies in."""
    below = {found for depth in ("bundle", "*/bundle", "runs/*/bundle") for found in place.glob(depth)}
    above = {found for folder in [*place.absolute().parents][:3] for found in (folder, folder / "bundle")}
    near = [str(found) for found in sorted(below or above) if (found / MANIFEST).is_file()]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _dropping(entry: zipfile.ZipInfo) -> bool:
    return Path(entry.filename).name in DROPPINGS


def _one_root(entries: list[zipfile.ZipInfo]) -> str:
    """`bundle/` where everything lies in one folder (what zipping a folder by hand gives), else nothing."""
    roots = {entry.filename.partition("/")[0] for entry in entries if "/" in entry.filename}
    if len(roots) == 1 and all("/" in entry.filename for entry in entries):
        root = roots.pop()
        return "" if root in ("", ".", "..") else f"{root}/"
    return ""


def _check_entry(entry: zipfile.ZipInfo, name: str) -> None:
    file = entry.filename
    if ".." in Path(file).parts or file.startswith(("/", "\\")) or "\\" in file or ":" in file:
        raise BundleError(
            f"{name} holds a path that leads out of the bundle ({file[:80]!r}); it is not opened."
        )
    if entry.flag_bits & 1:
        raise BundleError(f"{name} is encrypted; give an unencrypted bundle.")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise BundleError(f"{name} holds a link ({file[:80]!r}); a bundle holds plain files.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BundleError(
            f"{name}: {file[:80]!r} is compressed in an unusual way; zip it with 'deflate' or not at all."
        )
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1) and entry.file_size > 2**20:
        raise BundleError(
            f"{name}: {file[:80]!r} would grow {entry.file_size / max(entry.compress_size, 1):,.0f} times "
            "when opened (a zip bomb); model weights hardly compress."
        )


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> bytes:
    try:
        with archive.open(entry) as stream:  # zipfile stops at the declared size, which was checked
            return stream.read(entry.file_size + 1)
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError) as error:
        raise BundleError(f"{name}: {entry.filename} is damaged ({error}). Copy the bundle again.") from error


def _check_names(name: str, sizes: Mapping[str, int]) -> None:
    if inner := [file for file in sizes if file.endswith(f"/{MANIFEST}")]:
        raise BundleError(
            f"{name} holds a bundle among other files, in {Path(inner[0]).parent}/. Give that folder, or a "
            ".zip of it alone."
        )
    if len(sizes) > MAX_FILES:
        raise BundleError(f"{name} holds {len(sizes)} files; a bundle holds at most {MAX_FILES}.")
    for file in sizes:
        if file in (MANIFEST, CARD) or ARRAYS.fullmatch(file):
            continue
        if file.endswith((".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt")):
            raise BundleError(
                f"{name} holds {file[:80]!r}: a pickle or PyTorch file can run any code when it is opened, "
                "so it is not. A bundle holds safetensors arrays; save the model with save_bundle."
            )
        raise BundleError(
            f"{name} holds {file[:80]!r}, which does not belong into a bundle; nothing was opened."
        )
    if MANIFEST not in sizes:
        raise BundleError(f"{name} has no {MANIFEST}, so it is no bundle. Expected what save_bundle writes.")
    if sizes[MANIFEST] > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{name}: {MANIFEST} has {sizes[MANIFEST]:,} bytes; at most {MAX_MANIFEST_BYTES:,}."
        )


def _manifest(name: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        manifest = json.loads(read(MANIFEST).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{name}: {MANIFEST} is not readable JSON ({type(error).__name__}).") from error
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BundleError(f"{name}: {MANIFEST} does not say its format, so it is no bundle of this package.")
    if number > FORMAT:
        raise BundleError(
            f"{name} has format {number}; this version of brainage-nb reads up to {FORMAT}. Update "
            "brainage-nb."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_listing(item) for item in files.values()):
        raise BundleError(f"{name}: {MANIFEST} does not list its files with sha256 and bytes.")
    for file in sizes.keys() & files.keys():
        if sizes[file] != files[file]["bytes"]:
            raise BundleError(
                f"{name}: {file} has {sizes[file]:,} bytes, expected {files[file]['bytes']:,}. Copy the "
                "bundle again."
            )
    return manifest


def _is_listing(item: Any) -> bool:
    return (
        isinstance(item, dict) and isinstance(item.get("sha256"), str) and isinstance(item.get("bytes"), int)
    )


# --- writing --------------------------------------------------------------------------------------------


def write_bundle(
    target: Path | str,
    manifest: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    card: str = "",
) -> Path:
    """Write a bundle, whole or not at all; an older one at the same place is replaced.

    Parameters
    ----------
    target : path
        A folder, or a file name ending in `.zip`.
    manifest : mapping
        Plain JSON values; `format` and `files` are added.
    arrays : mapping
        File name -> named arrays.
    card : str
        README.md for people.
    """
    target = Path(target)
    building = target.with_name(f".{target.name}.{os.getpid()}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        files = {file: _write_arrays(building / file, named) for file, named in arrays.items()}
        write_json({"format": FORMAT, **manifest, "files": files}, building / MANIFEST)
        if card:
            write_text(card, building / CARD)
        if target.suffix == ".zip":
            return zip_bundle(building, target)
        return _swap(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def zip_bundle(folder: Path | str, target: Path | str) -> Path:
    """One file to hand around, not compressed (weights hardly shrink, and stored files open faster)."""
    with writing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(Path(folder).iterdir()):
            archive.write(path, path.name)
    return Path(target)


def _write_arrays(path: Path, named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    from safetensors.numpy import save

    content = save({name: np.asarray(array, order="C") for name, array in named.items()})
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _swap(building: Path, target: Path) -> Path:
    older = target.with_name(f".{target.name}.{os.getpid()}.older")
    if target.exists():
        os.replace(target, older)
    os.replace(building, target)
    shutil.rmtree(older, ignore_errors=True)
    return target


HASH_ROUNDS = (
    2000  # slows down guessing ids; it cannot stop it where ids are few and known (IXI001, IXI002, ...)
)


def hashed(name: str, salt: str) -> str:
    """A salted hash of a subject id, or of a file's SHA-256, as kept in a bundle."""
    return hashlib.pbkdf2_hmac("sha256", name.encode(), bytes.fromhex(salt), HASH_ROUNDS).hex()[:24]


def all_seen(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whom the bundle learned from: its own people, and those of the bundles its weights started from."""
    return [manifest["seen"], *manifest.get("seen_before", [])]


def among(names: Iterable[str], seen: Iterable[Mapping[str, Any]], kind: str) -> list[bool]:
    """Which of these subject ids (`kind` "subjects") or file hashes ("images") are in `all_seen`."""
    known = [(part["salt"], set(part[kind])) for part in seen]
    return [any(hashed(name, salt) in hashes for salt, hashes in known) for name in names]
