"""The files of a model bundle: JSON and safetensors, written and read so that nothing in them is executed.

What a manifest may say is one table, `bundle_schema.json`; what the arrays mean is for `predict`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from brainage_nb.platforms import default_root
from brainage_nb.workspace import MissingInput, read_json, write_json, write_text, writing

FORMAT = 1  # raise it when an older reader would misread a newer bundle
MANIFEST, CARD = "bundle.json", "README.md"
RESNET, VGG, FUSED = "resnet18", "vgg16_svr", "fused"  # kinds of model; runs are called so too
MEMBER = re.compile(r"(model-[0-9])/.*")  # a file of a whole bundle inside of a fused one
ARRAYS = re.compile(r"(member-[0-9]{2}|vgg_svr|vgg16_features|reference(-[A-Za-z0-9-]{1,20})?)\.safetensors")
WHOLE = ("num_batches_tracked", "positions")  # arrays of whole numbers
CODE = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt")
MAX_BYTES = 4 * 2**30  # opened; 30 members of half precision are 2 GB
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_FILES = 64
EXPECTED = "Expected a bundle: a folder or .zip written by save_bundle."
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
    members : dict
        Of a fused bundle: folder -> the whole bundle in it; empty for any other.
    """

    manifest: dict[str, Any]
    name: str
    _read: Callable[[str], bytes]
    members: dict[str, BundleFiles] = field(default_factory=dict)

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """Named, finite arrays of one safetensors file, whose size and SHA-256 agree with the manifest."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if file not in self.manifest["files"]:
            raise BundleError(f"{self.name}: {file!r} is not among its files. Copy the whole bundle again.")
        content = self._read(file)
        if _listing(content) != self.manifest["files"][file]:
            raise BundleError(
                f"{self.name}: {file} is not the file this bundle was saved with (its SHA-256 or size "
                "differs). It was damaged or changed; copy or download the bundle again."
            )
        try:
            named = load(content)
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise BundleError(f"{self.name}: {file} is not a readable safetensors file ({error}).") from error
        for name, array in named.items():
            coarse = array.itemsize < 4 and (array.ndim < 2 or name.startswith("image."))
            usual = array.dtype.kind == ("i" if name.endswith(WHOLE) else "f") and not coarse
            if not usual or not np.isfinite(array).all():
                raise BundleError(
                    f"{self.name}: this bundle is damaged: {name[:80]} of {file} holds values that are not "
                    f"finite, or are too coarse ({array.dtype}). Copy or save it again."
                )
        return named


# --- what a manifest may say ----------------------------------------------------------------------------


def check_manifest(manifest: Any, name: str) -> None:
    """Refuse a manifest whose values are of another kind, out of range or contradict each other.

    Figures that cannot be read change no prediction: they are taken out, with a warning.
    """
    schema = json.loads(Path(__file__).with_name("bundle_schema.json").read_text(encoding="utf-8"))
    is_fused = isinstance(manifest, dict) and manifest.get("kind") == FUSED
    fused = {"$ref": "#/$defs/fused", "$defs": schema["$defs"] | {"bundle": schema}}
    fault = _find_fault(manifest, fused if is_fused else schema)
    if not fault:
        fault = next((what for what, holds in _list_agreements(manifest).items() if not holds), "")
    if fault:
        raise BundleError(
            f"{name}: this bundle is damaged, or made by other means. In {MANIFEST}, {fault}. Copy or save "
            "it again."
        )
    known = {"$ref": "#/$defs/figures", "$defs": schema["$defs"]}
    for split, figures in [*manifest["figures"].items()]:
        if fault := _find_fault(figures, known):
            warnings.warn(f"{name}: these figures are left out (figures.{split}: {fault}).", stacklevel=4)
            del manifest["figures"][split]


def _find_fault(content: Any, schema: Mapping[str, Any]) -> str:
    """Where the content is first not what the schema says, and how; empty where it is.

    Beside jsonschema's words there are two for long lists, which its own `items` takes seconds for.
    """
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend

    def check_numbers(_: Any, limits: list[float], values: Any, __: Any) -> Iterator[ValidationError]:
        low, high = limits
        if not all(type(value) in (int, float) and low <= value <= high for value in values):
            yield ValidationError(f"expected numbers from {low} to {high} only")

    def check_texts(_: Any, pattern: str, values: Any, __: Any) -> Iterator[ValidationError]:
        if not all(isinstance(value, str) and re.fullmatch(pattern, value) for value in values):
            yield ValidationError(f"expected texts of the form {pattern} only")

    words = {"numbersWithin": check_numbers, "textsLike": check_texts}
    error = next(extend(Draft202012Validator, words)(schema).iter_errors(content), None)
    if error is None:
        return ""
    what = error.message if len(error.message) < 200 else f"{error.message[:60]} ... {error.message[-120:]}"
    return f"{error.json_path.lstrip('$.')[:100]}: {what}" if error.path else what


def _list_agreements(manifest: Mapping[str, Any]) -> dict[str, bool]:
    """What must agree with what: a sentence for where it does not, and whether it does."""
    if manifest["kind"] == FUSED:
        return _list_fused_agreements(manifest)
    training, position = manifest["training"], manifest["position"]
    members = [member["file"] for member in manifest["members"]]
    listed = {file for file in manifest["files"] if file.startswith("member-")}
    edges, counts, voxels = training["age_edges"], training["age_counts"], training.get("voxel_mm") or []
    lengths = {len(position[name]) for name in ("part", "age", "predicted_age")}
    channels = manifest.get("channels", ["T1w"])
    inputs = manifest.get("architecture", {}).get("channels", 1)
    return {
        "members: two are one file": len(set(members)) == len(members),
        f"members: not the listed files: {sorted(listed ^ {*members})[:4]}": listed == {*members},
        "training: the youngest age is above the oldest": training["age_low"] <= training["age_high"],
        "training: voxel_mm is not the smallest and the largest edge": voxels == sorted(voxels),
        "training: age_counts do not fit age_edges": len(edges) == len(counts) + 1,
        "position: its lists are of different lengths": len(lengths) == 1,
        "channels: the first is not the T1w scan": channels[0] == "T1w",
        "channels: not those of references": sorted(channels[1:]) == sorted(manifest.get("references", ())),
        f"channels: {len(channels)}, and the network takes {inputs}": len(channels) == inputs,
    }


def _list_fused_agreements(manifest: Mapping[str, Any]) -> dict[str, bool]:
    """The same of a fused bundle, whose training is checked in the bundle that it is of."""
    members, parts, position = manifest["members"], manifest["parts"], manifest["position"]
    folders = [member["folder"] for member in members]
    modalities = [member["modality"] for member in members]
    wholes = [part for part in parts if set(part["modalities"]) == set(modalities)]
    alone = [part for part in parts if part["modalities"] == ["T1w"]]
    weighed = [sum(name in part["modalities"] for name in modalities) for part in parts]
    return {
        "members: two are one folder": len(set(folders)) == len(folders),
        "members: not the listed files": {f"{name}/{MANIFEST}" for name in folders} == {*manifest["files"]},
        "members: none reads the T1w scan": modalities[0] == "T1w",
        "parts: not one for all scans and one for the T1w scan": len(wholes) == len(alone) == 1,
        "parts: weights do not fit the members": weighed == [len(part["weights"]) for part in parts],
        "position: its lists are of different lengths": len({*map(len, position.values())}) == 1,
    }


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
    place = Path(source) if isinstance(source, str | Path) else None
    if place and not (place.is_file() or place.is_dir()):
        raise BundleError(f"No bundle at {source}. {EXPECTED}{_did_you_mean(place)}")
    name, sizes, read = _list_folder(place) if place and place.is_dir() else _list_zip(source)
    if sum(sizes.values()) > max_bytes:
        opened, most = sum(sizes.values()) / 2**20, max_bytes / 2**20
        raise BundleError(f"{name} opens to {opened:,.0f} MB; at most {most:,.0f} MB are opened.")

    def read_file(file: str) -> bytes:
        try:
            return read(file)
        except Exception as error:  # damaged zips raise a dozen kinds
            raise BundleError(
                f"{name}: {file} is damaged or cannot be read ({error}). Copy the bundle again."
            ) from error

    inner = sorted(
        {found[1] for file in sizes if (found := MEMBER.fullmatch(file))} if MANIFEST in sizes else ()
    )
    members = {}
    for folder in inner:
        start = f"{folder}/"
        own = {file.removeprefix(start): size for file, size in sizes.items() if file.startswith(start)}
        members[folder] = _check_files(
            f"{name}/{folder}", own, lambda file, start=start: read_file(start + file)
        )
    outer = {file: size for file, size in sizes.items() if file.partition("/")[0] not in members}
    return _check_files(name, outer, read_file, members)


def _check_files(
    name: str, sizes: Mapping[str, int], read: Callable[[str], bytes], members: Mapping[str, BundleFiles] = {}
) -> BundleFiles:
    """One bundle's names and manifest checked; a fused one's `members` were before."""
    _check_names(name, sizes)
    listed = {f"{folder}/{MANIFEST}": read(f"{folder}/{MANIFEST}") for folder in members}
    sizes = {**sizes, **{file: len(content) for file, content in listed.items()}}
    manifest = _read_manifest(name, sizes, read(MANIFEST))
    if (manifest["kind"] == FUSED) != bool(members):
        raise BundleError(f"{name} says it is {manifest['kind']}, but its files are not. Copy it again.")
    if any(_listing(content) != manifest["files"][file] for file, content in listed.items()):
        raise BundleError(f"{name} holds another model than it was fused from. Copy the whole bundle again.")
    return BundleFiles(manifest, name, read, dict(members))


def _list_folder(folder: Path) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    """Name, size of each file, and how one is read."""
    if not (folder / MANIFEST).exists() and (meant := _did_you_mean(folder)):
        raise BundleError(f"{folder} has no {MANIFEST}, so it is no bundle.{meant}")
    paths = [path for path in folder.iterdir() if path.name not in SYSTEM_FILES]
    inner = [
        path for path in paths if MEMBER.match(f"{path.name}/") and path.is_dir() and not path.is_symlink()
    ]
    files = {path.name: path for path in paths if path not in inner}
    files |= {f"{one.name}/{path.name}": path for one in inner for path in one.iterdir()}
    for path in files.values():
        if path.is_symlink() or not path.is_file():
            raise BundleError(
                f"{folder.name}: {path.name} is a link or a folder; a bundle holds plain files."
            )
    return (
        folder.name,
        {name: path.stat().st_size for name, path in files.items()},
        lambda file: files[file].read_bytes(),
    )


def _list_zip(source: Path | str | IO[bytes]) -> tuple[str, dict[str, int], Callable[[str], bytes]]:
    name = Path(str(source if isinstance(source, str | Path) else getattr(source, "name", "the upload"))).name
    if (kind := _name_kind(source)) != "zip":
        meant = _did_you_mean(Path(source)) if isinstance(source, str | Path) else ""
        raise BundleError(f"{name} {kind}. {EXPECTED}{meant}")
    try:
        archive = zipfile.ZipFile(source)
    except Exception as error:
        raise BundleError(f"{name} is a damaged zip file ({error}). Copy it again.") from error
    entries = [
        entry
        for entry in archive.infolist()
        if not {Path(entry.filename).name, entry.filename.partition("/")[0]} & set(SYSTEM_FILES)
    ]
    root = _common_folder([entry.filename for entry in entries])
    found = {entry.filename.removeprefix(root): entry for entry in entries if entry.filename != root}
    sizes = {file: entry.file_size for file, entry in found.items()}
    opened, size = sum(entry.file_size for entry in entries), archive.fp.seek(0, os.SEEK_END)
    unusual = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    twice = len({entry.filename for entry in entries}) < len(entries)
    grows = f"would grow from {size:,} to {opened:,} bytes when opened (a zip bomb); weights hardly compress"
    for wrong, what in (
        (twice, "holds two files of one name; it was not made by this package"),
        (unusual, "is compressed in an unusual way; zip it with 'deflate' or not at all"),
        (opened > 2 * size + MAX_MANIFEST_BYTES, grows),
    ):
        if wrong:
            raise BundleError(f"{name} {what}.")
    # The size is given, since zipfile would unpack more than declared before it notices.
    return name, sizes, lambda file: archive.open(found[file]).read(sizes[file] + 1)


def _name_kind(source: Path | str | IO[bytes]) -> str:
    """`zip`, or what a file is instead."""
    with open(source, "rb") if isinstance(source, str | Path) else nullcontext(source) as stream:
        stream.seek(0)
        start = stream.read(4)
    kinds = {
        rb"PK\x03\x04": "zip",
        rb"$": "is empty",
        rb"\x1f\x8b": "is a gzip file",
        rb"\x80[\x01-\x05]": "is a Python pickle, which can run any code when it is opened, so it is not",
    }
    return next((kind for form, kind in kinds.items() if re.match(form, start)), "is not a zip file")


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


def _check_names(name: str, sizes: Mapping[str, int]) -> None:
    """Every file is one of a few names: so none is code, and no path leads anywhere."""
    inner = [Path(file).parent for file in sizes if file.endswith(f"/{MANIFEST}")]
    strange = [file for file in sizes if file not in (MANIFEST, CARD) and not ARRAYS.fullmatch(file)]
    code = [file for file in strange if file.endswith(CODE)]
    size = sizes.get(MANIFEST, 0)
    for wrong, what in (
        (inner, "holds a bundle among other files, in {}/. Give that folder, or a .zip of it"),
        (len(sizes) > MAX_FILES, f"holds {len(sizes)} files; a bundle holds at most {MAX_FILES}"),
        (
            code,
            "holds {!r}: a pickle or PyTorch file can run any code when it is opened, so it is not. A bundle "
            "holds safetensors arrays; save the model with save_bundle",
        ),
        (strange, "holds {!r}, which does not belong into a bundle; nothing was opened"),
        (MANIFEST not in sizes, f"has no {MANIFEST}, so it is no bundle. Expected what save_bundle writes"),
        (size > MAX_MANIFEST_BYTES, f"has a {MANIFEST} of {size:,} bytes; at most {MAX_MANIFEST_BYTES:,}"),
    ):
        if wrong:
            first = str(wrong[0])[:80] if isinstance(wrong, list) else ""
            raise BundleError(f"{name} {what.format(first)}.")


def _read_manifest(name: str, sizes: Mapping[str, int], content: bytes) -> dict[str, Any]:
    """The manifest, which is of a known format and lists just the files that are there."""
    try:
        text = content.decode("utf-8")
        manifest = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_read_object)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:100] if isinstance(error, ValueError) else "nested too deeply"
        raise BundleError(f"{name}: {MANIFEST} is not readable JSON ({reason}). Copy it again.") from error
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is int and number > FORMAT:
        raise BundleError(
            f"{name} has format {number}; this version of brainage-nb reads {FORMAT}. Update brainage-nb."
        )
    check_manifest(manifest, name)
    listed = {file: item["bytes"] for file, item in manifest["files"].items()}
    for file in sorted({*listed, *sizes} - {MANIFEST, CARD}):
        if (found := sizes.get(file, "no")) != (expected := listed.get(file, "no")):
            raise BundleError(
                f"{name}: {file} has {found} bytes, expected {expected}. Copy the whole bundle again."
            )
    return manifest


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name stands twice among {[*found][:4]}")
    return found


# --- writing --------------------------------------------------------------------------------------------


def write_bundle(
    target: Path | str,
    manifest: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    card: str = "",
    members: Mapping[str, Path] = {},
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
    members : mapping
        Of a fused bundle: folder in it -> folder of the whole bundle that is copied there.
    """
    target = Path(target)
    building, older = (
        target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("building", "older")
    )
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        files = {file: _write_arrays(building / file, named) for file, named in arrays.items()}
        for name, folder in members.items():
            shutil.copytree(folder, building / name)
            files[f"{name}/{MANIFEST}"] = _listing((building / name / MANIFEST).read_bytes())
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
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder))
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
        found = {}
        for place in root.glob("runs/*/bundle"):
            try:
                is_network = read_json(place / MANIFEST, "kind")["kind"] == RESNET
                found[place] = (is_network, (place / MANIFEST).stat().st_mtime)
            except MissingInput as error:
                damaged.append(str(error))
        newest = max((time for _, time in found.values()), default=0.0)
        known += [(newest, *facts, place) for place, facts in found.items()]
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
