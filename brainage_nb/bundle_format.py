"""The files of a model bundle: JSON and safetensors, written and read so that nothing in them is executed.

What a manifest may say is one table, `bundle_schema.json`; what the arrays mean is for `predict`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from brainage_nb.platforms import default_root
from brainage_nb.workspace import MissingInput, read_json, write_json, write_text, writing

FORMAT = 1  # raise it when an older reader would misread a newer bundle
MANIFEST, CARD = "bundle.json", "README.md"
RESNET, VGG = "resnet18", "vgg16_svr"  # kinds of model
ARRAYS = re.compile(r"(member-\d{2}|vgg_svr|vgg16_features|reference)\.safetensors")
CODE = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt")
MAX_BYTES = 4 * 2**30  # opened; 30 members of half precision are 2 GB
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_FILES = 64
MAX_RATIO = 100  # weights hardly compress; a zip bomb reaches 1000 and more
SYSTEM_FILES = ("__MACOSX", ".DS_Store", "desktop.ini")  # what file managers add; never opened


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

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """Named arrays of one safetensors file, whose size and SHA-256 agree with the manifest."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if file not in self.manifest["files"]:
            raise BundleError(
                f"{self.name}: {MANIFEST} names {str(file)[:80]!r}, which is not among its files."
            )
        content = self._read(file)
        if _listing(content) != self.manifest["files"][file]:
            raise BundleError(
                f"{self.name}: {file} is not the file this bundle was saved with (its SHA-256 or size "
                "differs). It was damaged or changed; copy or download the bundle again."
            )
        try:
            return load(content)
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise BundleError(f"{self.name}: {file} is not a readable safetensors file ({error}).") from error


# --- what a manifest may say ----------------------------------------------------------------------------


def check_manifest(manifest: dict[str, Any], name: str) -> None:
    """Refuse a manifest whose values are of another kind, out of range or contradict each other.

    Figures that cannot be read change no prediction: they are taken out, with a warning.
    """
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("bundle_schema.json").read_text(encoding="utf-8"))
    faults = []
    for error in list(Draft202012Validator(schema).iter_errors(manifest)):
        place, what = list(error.path), error.message
        what = what if len(what) < 200 else f"{what[:60]} ... {what[-120:]}"
        fault = f"{error.json_path[2:][:100]}: {what}"
        if place[:1] == ["figures"] and len(place) > 1:
            warnings.warn(f"{name}: these figures are left out ({fault}).", stacklevel=3)
            manifest["figures"].pop(place[1], None)
        else:
            faults.append(fault)
    if fault := next(iter(faults or _contradictions(manifest)), ""):
        raise BundleError(
            f"{name}: this bundle is damaged, or made by other means. In {MANIFEST}, {fault}. Copy or "
            "save it again."
        )


def _contradictions(manifest: Mapping[str, Any]) -> list[str]:
    training, position = manifest["training"], manifest["position"]
    members = [member["file"] for member in manifest["members"]]
    lengths = {len(position[name]) for name in ("part", "age", "predicted_age")}
    agree = {
        "members: two are one file": len(set(members)) == len(members),
        "training: the youngest age is above the oldest": training["age_low"] <= training["age_high"],
        "training: age_counts do not fit age_edges": len(training["age_edges"])
        == len(training["age_counts"]) + 1,
        "position: its lists are of different lengths": len(lengths) == 1,
    }
    return [what for what, holds in agree.items() if not holds]


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
        Pickles, files that do not belong, links, paths that lead out, zip bombs; a manifest that is missing,
        too large, not JSON, of a newer format, or that says what no bundle says.
    """
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    name, sizes, read = _list_folder(Path(source)) if is_folder else _list_zip(source)
    _check_names(name, sizes)
    if sum(sizes.values()) > max_bytes:
        opened, most = sum(sizes.values()) / 2**20, max_bytes / 2**20
        raise BundleError(f"{name} opens to {opened:,.0f} MB; at most {most:,.0f} MB are opened.")
    manifest = _read_manifest(name, sizes, read)
    check_manifest(manifest, name)
    return BundleFiles(manifest, name, read)


def _list_folder(folder: Path) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    """Name, size of each file, and how one is read."""
    if not (folder / MANIFEST).exists() and (meant := _did_you_mean(folder)):
        raise BundleError(f"{folder} has no {MANIFEST}, so it is no bundle.{meant}")
    files = [path for path in folder.iterdir() if path.name not in SYSTEM_FILES]
    for path in files:
        if path.is_symlink() or not path.is_file():
            raise BundleError(
                f"{folder.name}: {path.name} is a link or a folder; a bundle holds plain files."
            )
    return folder.name, {p.name: p.stat().st_size for p in files}, lambda file: (folder / file).read_bytes()


def _list_zip(source: Path | str | IO[bytes]) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    name = Path(str(source if isinstance(source, str | Path) else getattr(source, "name", "the upload"))).name
    _refuse_what_is_no_zip(source, name)
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BundleError(f"{name} is a damaged zip file ({error}). Copy it again.") from error
    entries = [
        entry
        for entry in archive.infolist()
        if not {Path(entry.filename).name, entry.filename.partition("/")[0]} & set(SYSTEM_FILES)
    ]
    root = _common_folder([entry.filename for entry in entries])
    entries = [entry for entry in entries if entry.filename != root]
    for entry in entries:
        _check_entry(entry, name)
    found = {entry.filename.removeprefix(root): entry for entry in entries}
    if len(found) != len(entries):
        raise BundleError(f"{name} holds two files of one name; it was not made by this package.")
    sizes = {file: entry.file_size for file, entry in found.items()}
    return name, sizes, lambda file: _unpack(archive, found[file], name)


def _refuse_what_is_no_zip(source: Path | str | IO[bytes], name: str) -> None:
    expected, meant = "Expected a bundle: a folder or .zip written by save_bundle.", ""
    if isinstance(source, str | Path):
        meant = _did_you_mean(Path(source))
        if not Path(source).is_file():
            raise BundleError(f"No bundle at {source}. {expected}{meant}")
        with open(source, "rb") as stream:
            start = stream.read(4)
    else:
        source.seek(0)
        start = source.read(4)
        source.seek(0)
    if start == b"PK\x03\x04":
        return
    kind = "is empty" if not start else "is not a zip file"
    if start[:2] == b"\x1f\x8b":
        kind = "is a gzip file"
    elif start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05":
        kind = "is a Python pickle, which can run any code when it is opened, so it is not"
    raise BundleError(f"{name} {kind}. {expected}{meant}")


def _did_you_mean(place: Path) -> str:
    """The bundles of the run or workspace that was given in a bundle's place, or that the place lies in."""
    below = {found for depth in ("bundle", "*/bundle", "runs/*/bundle") for found in place.glob(depth)}
    above = {found for folder in [*place.absolute().parents][:3] for found in (folder, folder / "bundle")}
    near = [str(found) for found in sorted(below or above) if (found / MANIFEST).is_file()]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _common_folder(files: list[str]) -> str:
    """`bundle/` where everything lies in one folder (what zipping a folder by hand gives), else nothing."""
    roots = {file.partition("/")[0] for file in files}
    if len(roots) == 1 and all("/" in file for file in files) and not roots & {"", ".", ".."}:
        return f"{roots.pop()}/"
    return ""


def _check_entry(entry: zipfile.ZipInfo, name: str) -> None:
    file, grows = entry.filename, entry.file_size / max(entry.compress_size, 1)
    leads_out = ".." in Path(file).parts or file.startswith(("/", "\\")) or "\\" in file or ":" in file
    unusual = entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for wrong, what in (
        (leads_out, "is a path that leads out of the bundle; it is not opened"),
        (entry.flag_bits & 1, "is encrypted; give an unencrypted bundle"),
        (stat.S_ISLNK(entry.external_attr >> 16), "is a link; a bundle holds plain files"),
        (unusual, "is compressed in an unusual way; zip it with 'deflate' or not at all"),
        (
            grows > MAX_RATIO and entry.file_size > 2**20,
            f"would grow {grows:,.0f} times when opened (a zip bomb); model weights hardly compress",
        ),
    ):
        if wrong:
            raise BundleError(f"{name}: {file[:80]!r} {what}.")


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> bytes:
    try:
        with archive.open(entry) as stream:  # zipfile stops at the declared size, which was checked
            return stream.read(entry.file_size + 1)
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError) as error:
        raise BundleError(f"{name}: {entry.filename} is damaged ({error}). Copy the bundle again.") from error


def _check_names(name: str, sizes: Mapping[str, int]) -> None:
    inner = [Path(file).parent for file in sizes if file.endswith(f"/{MANIFEST}")]
    strange = [file for file in sizes if file not in (MANIFEST, CARD) and not ARRAYS.fullmatch(file)]
    code = [file for file in strange if file.endswith(CODE)]
    size = sizes.get(MANIFEST, 0)
    for wrong, what in (
        (
            inner,
            f"holds a bundle among other files, in {[*inner, ''][0]}/. Give that folder, or a .zip of it",
        ),
        (len(sizes) > MAX_FILES, f"holds {len(sizes)} files; a bundle holds at most {MAX_FILES}"),
        (
            code,
            f"holds {[*code, ''][0][:80]!r}: a pickle or PyTorch file can run any code when it is opened, so "
            "it is not. A bundle holds safetensors arrays; save the model with save_bundle",
        ),
        (
            strange,
            f"holds {[*strange, ''][0][:80]!r}, which does not belong into a bundle; nothing was opened",
        ),
        (MANIFEST not in sizes, f"has no {MANIFEST}, so it is no bundle. Expected what save_bundle writes"),
        (size > MAX_MANIFEST_BYTES, f"has a {MANIFEST} of {size:,} bytes; at most {MAX_MANIFEST_BYTES:,}"),
    ):
        if wrong:
            raise BundleError(f"{name} {what}.")


def _read_manifest(name: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> dict[str, Any]:
    """The manifest, which is of a known format and lists just the files that are there."""
    try:
        manifest = json.loads(read(MANIFEST).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: {MANIFEST} is not readable JSON ({type(error).__name__}).") from error
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is not int or number < 1:
        raise BundleError(f"{name}: {MANIFEST} does not say its format, so it is no bundle of this package.")
    if number > FORMAT:
        raise BundleError(
            f"{name} has format {number}; this version of brainage-nb reads {FORMAT}. Update brainage-nb."
        )
    listed, present = manifest.get("files"), {f: n for f, n in sizes.items() if f not in (MANIFEST, CARD)}
    sound = isinstance(listed, dict) and all(isinstance(item, dict) for item in listed.values())
    if not sound or not all({"sha256", "bytes"} == set(item) for item in listed.values()):
        raise BundleError(f"{name}: {MANIFEST} does not list its files with sha256 and bytes.")
    if set(present) != set(listed):
        missing, extra = sorted(set(listed) - set(present)), sorted(set(present) - set(listed))
        raise BundleError(
            f"{name}: files and {MANIFEST} disagree (missing: {missing}, not listed: {extra}). Copy the "
            "whole bundle again."
        )
    for file, size in present.items():
        if size != listed[file]["bytes"]:
            raise BundleError(
                f"{name}: {file} has {size:,} bytes, expected {listed[file]['bytes']}. Copy the bundle again."
            )
    return manifest


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
    building, older = (
        target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("building", "older")
    )
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        files = {file: _write_arrays(building / file, named) for file, named in arrays.items()}
        write_json({"format": FORMAT, **manifest, "files": files}, building / MANIFEST)
        if card:
            write_text(card, building / CARD)
        if target.suffix == ".zip":
            return zip_bundle(building, target)
        if target.exists():
            os.replace(target, older)
        os.replace(building, target)
        return target
    finally:
        for folder in (building, older):
            shutil.rmtree(folder, ignore_errors=True)


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
    return _listing(content)


def _listing(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def find_bundles() -> tuple[list[Path], list[str]]:
    """Bundles of the default workspace and `./workspace/demo`: newest workspace first, networks first.

    Beside them, a sentence on each whose `bundle.json` is damaged.
    """
    known, damaged = [], []
    for root in {root.absolute() for root in (default_root(), Path("workspace"), Path("workspace", "demo"))}:
        made = {file: file.stat().st_mtime for file in root.glob(f"runs/*/bundle/{MANIFEST}")}
        newest = max(made.values(), default=0.0)
        for file, time in made.items():
            try:
                known.append((newest, read_json(file, "kind")["kind"] == RESNET, time, file.parent))
            except MissingInput as error:
                damaged.append(str(error))
    return [place for *_, place in sorted(known, reverse=True)], damaged


# --- who was in it --------------------------------------------------------------------------------------

HASH_ROUNDS = 2000  # slows guessing of ids down; cannot stop it where ids are few and known (IXI001, ...)


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
