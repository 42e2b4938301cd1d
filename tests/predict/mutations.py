"""Bundles damaged at random, each opened in a process of its own: what it says, takes and needs.

    python -m tests.predict.mutations BUNDLE SCAN SEED N

prints one JSON object a mutation: its `kind`; what was predicted, or the sentence of `refused`; `seconds` of
processor; `megabytes` at most. The first is of the whole bundle, for comparison.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import resource
import signal
import stat
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Files = dict[str, bytes]
Rng = np.random.Generator
LONG = 300_000  # items of a list that is too long: about as many as a manifest has room for
WRONG = ("text", "", [], {}, [[]], {"a": 1}, True, -1, 0.5, 10**30, -(10**30), 1e308, 10**300, None)


# --- the manifest ---------------------------------------------------------------------------------------


def list_places(value: Any, place: tuple = ()) -> list[tuple]:
    """Where everything in nested lists and dicts stands; of long lists only the start."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [list_places(item, (*place, key)) for key, item in list(items)[:30]]
    return [*([place] if place else []), *(found for part in below for found in part)]


def set_at(manifest: dict, place: tuple, value: Any) -> dict:
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return manifest


def say_otherwise(rng: Rng, manifest: dict) -> dict:
    """Something of another kind, or absurd, anywhere."""
    places = list_places(manifest)
    return set_at(manifest, places[rng.integers(len(places))], copy.deepcopy(WRONG[rng.integers(len(WRONG))]))


def delete_something(rng: Rng, manifest: dict) -> dict:
    places = list_places(manifest)
    *outer, last = places[rng.integers(len(places))]
    inner = manifest
    for key in outer:
        inner = inner[key]
    del inner[last]
    return manifest


def lengthen_a_list(rng: Rng, manifest: dict) -> dict:
    """A list, or what is none, made very long."""
    places = list_places(manifest)
    items = ([0], [0.5], ["a"], [[]], ["0" * 24])[rng.integers(5)]
    return set_at(manifest, places[rng.integers(len(places))], items * LONG)


def widen_an_object(rng: Rng, manifest: dict) -> dict:
    """Many names in any object."""
    places = [()] + [p for p in list_places(manifest) if isinstance(look_up(manifest, p), dict)]
    look_up(manifest, places[rng.integers(len(places))]).update({f"k{n}": "x" for n in range(LONG)})
    return manifest


def look_up(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


SEEN = {"salt": "00", "subjects": [], "images": []}
ABSURD = [  # what a manifest might say at places that matter most
    (("preprocessing", "settings", "size"), 10**6),
    (("preprocessing", "settings", "size"), 8),
    (("preprocessing", "settings", "spacing_mm"), 0),
    (("preprocessing", "settings", "spacing_mm"), -2.0),
    (("preprocessing", "settings", "spacing_mm"), 1e-300),
    (("preprocessing", "settings", "to_mni"), True),
    (("preprocessing", "settings", "extra"), "MedianSmooth(radius=1); " * 1000),
    (("preprocessing", "settings", "extra"), "open('x')"),
    (("preprocessing", "recipe"), "no such recipe"),
    (("correction", "slope"), 0),
    (("correction", "slope"), -0.8),
    (("correction", "slope"), 1e-300),
    (("correction", "intercept"), 1e300),
    (("interval", "quantile"), -8),
    (("interval", "quantile"), 1e300),
    (("interval", "level"), 7),
    (("rates",), {"slope": 0, "error": -1}),
    (("rates",), [0.8] * 10),
    (("seen_before",), [SEEN] * 200_000),
    (("seen_before",), [SEEN | {"images": ["0" * 24] * LONG}]),
    (("members",), [{"file": "member-00.safetensors"}] * 10_000),
    (("members",), [{"file": "member-00.safetensors"}] * 2),
    (("members",), [{"file": "../../etc/passwd"}]),
    (("members",), [{"file": "/etc/passwd"}]),
    (("members",), [{"file": "reference.safetensors"}]),
    (("members",), [{"file": "member-07.safetensors"}]),
    (("members",), []),
    (("files",), {f"member-{n:02d}.safetensors": {"sha256": "0" * 64, "bytes": 1} for n in range(100)}),
    (("files", "../evil"), {"sha256": "0" * 64, "bytes": 1}),
    (("kind",), "vgg16_svr"),
    (("kind",), "resnet18"),
    (("architecture",), {"widths": [2048] * 4, "blocks": [64] * 4, "shortcut": "A"}),
    (("architecture",), {"widths": [2048, 1, 1, 1], "blocks": [1] * 4, "shortcut": "A", "outputs": 65}),
    (("architecture",), {"widths": [4, 4, 8, 8], "blocks": [1] * 4, "shortcut": "A", "linear_edge": 256}),
    (("vgg_svr",), {"variant": "early"}),
    (("figures",), {f"split {n}": {"n": "many"} for n in range(10_000)}),
    (("figures", "test"), {f"f{n}": "x" for n in range(LONG)}),
    (("figures", "val"), {"n": 1, "mae": 2}),
    (("training", "age_counts"), [1]),
    (("training", "age_edges"), list(range(LONG))),
    (("training", "age_low"), 120),
    (("members", 0, "folder"), "../model-0"),
    (("members", 0, "modality"), "T2w"),
    (("parts", 0, "modalities"), ["T1w"]),
    (("parts", 0, "weights"), [1e300, 0]),
    (("parts", 0, "weights"), [1.0]),
    (("parts", 1, "intercept"), 1e9),
    (("parts",), []),
    (("position", "age"), [50]),
    (("format",), 2),
    (("format",), 10**30),
]


def say_the_absurd(rng: Rng, manifest: dict) -> dict:
    place, value = ABSURD[rng.integers(len(ABSURD))]
    try:
        outer = look_up(manifest, place[:-1])
        outer[place[-1] if len(place) > 1 else "format"]
    except (KeyError, IndexError, TypeError):  # another family's
        return manifest
    return set_at(manifest, place, copy.deepcopy(value))


MANIFEST_KINDS = (
    say_otherwise, say_otherwise, delete_something, lengthen_a_list, widen_an_object,
    say_the_absurd, say_the_absurd, say_the_absurd,
)  # fmt: skip


def damage_text(rng: Rng, text: str) -> bytes:
    """JSON that is none, or that other readers read otherwise."""
    numbers = [place for place in range(1, len(text)) if text[place - 1 : place + 1] == " 0"]
    place = numbers[rng.integers(len(numbers))]
    texts = (
        *(text[:place] + number + text[place + 1 :] for number in ("NaN", "-Infinity", "1" * 10**5, "1e999")),
        text.replace('"slope"', '"slope": 0.5, "slope"', 1),
        text.replace('"format"', '"format": 2, "format"', 1),
        "[" * 10**5, '{"format": ' * 10**5, text[: len(text) // 2], "", "null", "[]", "{}", "1", '"text"',
        '{"format": 1}', text + "x", " " * (9 * 2**20) + text, "[" + "{}," * 2**21 + "{}]",
        '{"format": 1, "files": [' + '{"":0},' * 10**6 + "{}]}",
    )  # fmt: skip
    chosen = texts[rng.integers(len(texts))].encode()
    return (chosen, chosen, chosen, chosen + b"\xff", chosen.decode().encode("utf-16"))[rng.integers(5)]


# --- the arrays -----------------------------------------------------------------------------------------


def choose(rng: Rng, names: Any) -> str:
    return sorted(names)[rng.integers(len(names))]


def change_array(rng: Rng, content: bytes) -> bytes:
    """One tensor with values, a shape or a type that it should not have; or missing, or one too many."""
    arrays = {name: array.copy() for name, array in load(content).items()}
    spreads = [name for name in arrays if name.endswith(("running_var", "age_sd", "scale"))]
    name = choose(rng, spreads if spreads and rng.random() < 0.3 else arrays)
    array = arrays[name]
    value = (np.nan, np.inf, -np.inf)[rng.integers(3)]
    if name in spreads:
        value = (0.0, -1.0, np.nan)[rng.integers(3)]
    place = rng.integers(array.size) if array.size else 0
    types = (np.float64, np.float32, np.float16, np.int8, np.uint8, np.complex64, bool)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes: tuple[Callable[[], Any], ...] = (
            lambda: np.where(np.arange(array.size).reshape(array.shape) == place, value, array),
            lambda: np.where(np.arange(array.size).reshape(array.shape) == place, value, array).astype(
                array.dtype
            ),
            lambda: array.reshape(-1)[:-1],
            lambda: array[None],
            lambda: np.concatenate([array.reshape(-1)] * 2),
            lambda: array.astype(types[rng.integers(len(types))]),
            lambda: None,
            lambda: array,
        )
        which = rng.integers(len(changes))
        changed = changes[which]()
    arrays[name] = changed
    if which == len(changes) - 1:
        arrays["one too many"] = array
    return save({name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None})


def change_header(rng: Rng, content: bytes) -> bytes:
    """A safetensors header that lies of its length, of offsets or of shapes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry, other = header[choose(rng, names)], header[choose(rng, names)]
    which = rng.integers(9)
    if which < 3:
        return struct.pack("<Q", (2**62, length + 1, 2**26)[which]) + content[8:]
    if which == 3:
        entry["data_offsets"] = other["data_offsets"]
    elif which == 4:
        entry["data_offsets"] = [0, 2**40]
    elif which == 5:
        entry["shape"] = [2**40, 2**40]
    elif which == 6:
        entry["dtype"] = ("BF16", "F8_E4M3", "BOOL", "x", "F64")[rng.integers(5)]
    elif which == 7:
        entry["shape"] = [0, 2**40]
    else:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def list_again(files: Files, manifest: dict, folder: str = "") -> dict:
    """The manifest with the true sizes and hashes of the files, as somebody hostile would write it."""
    for name in manifest["files"]:
        content = files[folder + name]
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return manifest


# --- the zip --------------------------------------------------------------------------------------------


def pack(files: Files, **more: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **more) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def damage_zip(rng: Rng, files: Files) -> bytes:
    """A zip that is cut, flipped, a bomb, or holds what does not belong into a bundle."""
    whole, which = bytearray(pack(files)), rng.integers(14)
    directory = whole.rfind(b"PK\x01\x02")  # of the last file
    if which == 0:
        return bytes(whole[: rng.integers(len(whole))])
    if which in (1, 2):  # anywhere, or near the end, where the directory is
        start = 0 if which == 1 else len(whole) - 400
        for place in rng.integers(start, len(whole), size=3):
            whole[place] ^= 1 << rng.integers(8)
        return bytes(whole)
    if which in (3, 4):  # declared sizes: opened, and both
        struct.pack_into("<I", whole, directory + 24, (2**32 - 2, 2**31)[rng.integers(2)])
        if which == 4:
            struct.pack_into("<I", whole, directory + 20, 2**31)
        return bytes(whole)
    if which == 5:
        return pack(files | {"member-09.safetensors": b"\0" * 2**28}, compression=zipfile.ZIP_DEFLATED)
    if which == 6:
        return pack(files, compression=(zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)[rng.integers(2)])
    if which == 7:
        return pack(files | {f"member-{n:05d}.safetensors": b"" for n in range(10_000)})
    if which == 8:
        names = "../evil.json", "/etc/passwd", "C:x.json", "a\\b.json", "run.py", "data.pkl", "x/bundle.json"
        return pack(files | {names[rng.integers(len(names))]: b"content"})
    if which == 9:
        swapped = list(files)
        swapped[0], swapped[-1] = swapped[-1], swapped[0]
        return pack(dict(zip(swapped, files.values(), strict=True)))
    if which == 10:  # a bomb in few bytes whose declared size is the good one
        name = next(name for name in files if name.endswith("reference.safetensors"))
        size = len(files.pop(name))
        bomb = pack(files | {name: b"\0" * 2**28}, compression=zipfile.ZIP_DEFLATED)
        whole = bytearray(bomb)
        struct.pack_into("<I", whole, whole.rfind(b"PK\x01\x02") + 24, size)
        return bytes(whole)
    stream = io.BytesIO(bytes(whole))
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "a") as archive:
        warnings.simplefilter("ignore")
        entry = zipfile.ZipInfo("member-09.safetensors" if which == 11 else choose(rng, files))
        if which in (11, 12):
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, b"/etc/passwd")
    return stream.getvalue()


def mutate(rng: Rng, files: Files) -> tuple[str, bytes]:
    """One damaged bundle as a zip, and what was done."""
    home = choose(rng, [name for name in files if name.endswith("bundle.json")])
    folder = home.removesuffix("bundle.json")  # of a fused bundle's member
    files, manifest = dict(files), json.loads(files[home])
    arrays = [name for name in files if name.endswith(".safetensors") and name.startswith(folder)]
    arrays = arrays if folder + "reference.safetensors" in files else []
    small = [name for name in arrays if len(files[name]) < 2**24] if rng.random() < 0.8 else arrays
    kind = (
        "manifest",
        "manifest",
        "manifest",
        "text",
        "array",
        "array",
        "array",
        "header",
        "swap",
        "zip",
        "zip",
    )[rng.integers(11 if arrays else 4)]
    if not arrays and rng.random() < 0.3:
        kind = "zip"
    if kind == "zip":
        return kind, damage_zip(rng, files)
    if kind == "manifest":
        change = MANIFEST_KINDS[rng.integers(len(MANIFEST_KINDS))]
        kind, manifest = change.__name__, change(rng, manifest)
    elif kind in ("array", "header"):
        name, change = choose(rng, small), change_array if kind == "array" else change_header
        kind, files[name] = f"{change.__name__} of {name}", change(rng, files[name])
        manifest = list_again(files, manifest, folder)
    elif kind == "swap":
        one, other = choose(rng, arrays), choose(rng, arrays)
        files[one], files[other] = files[other], files[one]
        manifest = list_again(files, manifest, folder)
    text = json.dumps(manifest)
    files[home] = damage_text(rng, text) if kind == "text" else text.encode()
    if folder:
        files["bundle.json"] = json.dumps(list_again(files, json.loads(files["bundle.json"]))).encode()
    return kind, pack(files)


# --- what becomes of them -------------------------------------------------------------------------------


def predict(bundle: Path, scan: str) -> dict[str, Any]:
    """Ages and codes of warnings of one scan, or the sentence that refuses the bundle."""
    from brainage_nb.bundle_format import BundleError
    from brainage_nb.predict.bundle import load_bundle

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # figures that are left out
            found = load_bundle(bundle).predict(scan, 50.0).to_dict()
    except BundleError as error:
        return {"refused": str(error)}
    return {name: found[name] for name in found if name not in ("scan", "path", "explanation")}


def predict_apart(bundle: Path, scan: str) -> dict[str, Any]:
    """`predict` in a process of its own, with what it took; `crashed` where it ended otherwise."""
    reading, writing = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (pid := os.fork()):
        os.close(reading)
        signal.alarm(60)
        room = 10 * 2**30  # should all else fail
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        try:
            result = predict(bundle, scan)
        except BaseException as error:
            result = {"crashed": f"{type(error).__name__}: {error}"[:500]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        os.write(writing, json.dumps(result | {"megabytes": peak}).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return (json.loads(said) if said else {"crashed": "the process was killed", "megabytes": 0}) | {
        "seconds": seconds
    }


def main(bundle: str, scan: str, seed: int, n: int) -> None:
    paths = [path for path in Path(bundle).rglob("*") if path.is_file()]
    files = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in paths}
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "bundle.zip"
        target.write_bytes(pack(files))
        predict(target, scan)
        for k in range(n + 1):
            kind, content = mutate(np.random.default_rng([seed, k]), files) if k else ("none", pack(files))
            target.write_bytes(content)
            size = len(content) / 2**20
            del content
            print(json.dumps({"kind": kind, "k": k, "size": size} | predict_apart(target, scan)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
