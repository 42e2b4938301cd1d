"""Which images lie in a folder, and what their names say of subject, session and site. Opens none of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img.gz", ".img")
COLUMNS = ["image", "stem", "folders", "subject_hint", "session_hint", "run_hint", "site_hint", "contrast"]

_T1_WORDS = {"t1", "t1w", "t1weighted", "mprage", "mpr", "mp2rage", "spgr", "fspgr", "bravo", "tfe", "unit1"}
_LABEL_WORDS = {
    *(
        "mask",
        "brainmask",
        "seg",
        "dseg",
        "probseg",
        "fseg",
        "segmentation",
        "label",
        "labels",
        "aseg",
        "aparc",
    ),
    *("parcellation", "dlmuse", "roi"),
}
_OTHER_WORDS = {
    *(
        "t2",
        "t2w",
        "t2star",
        "pd",
        "pdw",
        "flair",
        "dwi",
        "dti",
        "adc",
        "bold",
        "epi",
        "asl",
        "mra",
        "tof",
        "angio",
    ),
    *("swi", "pet", "ct", "fmap", "phasediff", "magnitude1", "magnitude2", "sbref"),
}
_CONTRAST_WORDS = _T1_WORDS | _LABEL_WORDS | _OTHER_WORDS
_SITES = {"guys": "Guys", "hh": "HH", "iop": "IOP"}
_PATTERNS = (
    # IXI002-Guys-0828-T1: the second number counts scans, it is no session
    re.compile(r"(?<![A-Za-z0-9])(?P<subject>IXI\d+)[-_](?P<site>Guys|HH|IOP)[-_]\d+", re.IGNORECASE),
    re.compile(r"(?<![A-Za-z0-9])(?P<subject>OAS[12]_\d{4})_(?P<session>MR\d+)", re.IGNORECASE),
    re.compile(r"(?<![A-Za-z0-9])(?P<subject>OAS3\d{4})_(?:MR_)?(?P<session>d\d{4})", re.IGNORECASE),
    re.compile(r"(?<!\d)(?P<subject>\d{3}_S_\d{4,5})"),  # ADNI
)
_SESSION = re.compile(
    r"(?:^|[-_. ])(?:(?:ses|session|visit|timepoint|tp|wave)[-_ ]?(?P<label>\d+)"
    r"|(?P<word>baseline|followup|retest)(?:[-_]?(?P<count>\d+))?)(?=$|[-_. ])",
    re.IGNORECASE,
)

_PART = re.compile(
    r"[^\s!-/:-@\[-`{-~\u00a0-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u2000-\u206f\u3000-\u303f]+"
)


def find_images(folder: Path | str) -> pd.DataFrame:
    """Find the images below a folder, at any depth.

    Where the folder holds BIDS images (`sub-…_T1w`), other BIDS images and the folders `derivatives`,
    `sourcedata` and `code` are left out, and the notes say how many.

    Parameters
    ----------
    folder : path
        Anything: a BIDS data set, one folder a subject, a flat folder, folders that are named like images
        (Kaggle unpacks `X.nii` to `X.nii/X.nii`). Hidden files are passed over.

    Returns
    -------
    DataFrame
        A row an image, in the order of paths: `image` (absolute path), `stem` (file name without ending),
        `folders` (names of the folders below `folder`, parted by `/`), `subject_hint`, `session_hint`,
        `run_hint`, `site_hint` (what the name says, or ""), `contrast` ("T1", "other" or "", by name).
        `attrs["notes"]` says what was left out.

    Raises
    ------
    FileNotFoundError
        Where there is no such folder.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Set data_dir to the folder that holds the scans."
        )
    paths, others = _walk(folder)
    images, notes = _only_t1_of_bids(describe_images(paths, folder))
    dicoms = others[".dcm"] + others[".ima"]
    if dicoms:
        notes.append(f"DICOM files, not read: {dicoms}. Convert them to NIfTI with dcm2niix.")
    images.attrs["notes"] = notes
    return images


def describe_images(paths: Iterable[Path], folder: Path) -> pd.DataFrame:
    """What the names of images below a folder say, in the columns of `find_images`."""
    return pd.DataFrame([_described(path, folder) for path in paths], columns=COLUMNS, dtype=str)


def image_stem(name: str) -> str:
    """A file name without its image ending."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def parts_of(name: str) -> list[str]:
    """The parts of a name between blanks and punctuation of any script."""
    return [name[start:end] for start, end in spans_of_parts(name)]


def spans_of_parts(name: str) -> list[tuple[int, int]]:
    """Where each part of a name begins and ends."""
    return [match.span() for match in _PART.finditer(name)]


def clean_text(text: str) -> str:
    """Text in the composed form of Unicode, without characters that nobody sees; odd blanks are blanks."""
    kept = "".join(
        character
        for character in unicodedata.normalize("NFC", text)
        if unicodedata.category(character) != "Cf"
    )
    return " ".join(kept.split())


def is_contrast_word(part: str) -> bool:
    """Whether a part of a name tells what was measured (`T1`, `flair`, `mask`) rather than who."""
    return part.lower() in _CONTRAST_WORDS


def _walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Images below a folder, and how often other endings occur; links are followed, each folder once."""
    found, others, seen = [], Counter(), set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        names = {name for name in files if not name.startswith(".")}
        for name in sorted(names):
            if not name.lower().endswith(IMAGE_SUFFIXES):
                others[Path(name).suffix.lower()] += 1
            elif not _is_second_half(name, names):
                found.append(Path(root, name))
    return sorted(found), others


def _is_second_half(name: str, names: set[str]) -> bool:
    """Whether a file is the `.img` of a `.hdr`/`.img` pair: the pair is one image, named by its header."""
    return name.lower().endswith((".img", ".img.gz")) and f"{image_stem(name)}.hdr" in names


def _described(path: Path, folder: Path) -> tuple[str, ...]:
    stem = clean_text(image_stem(path.name))
    folders = [clean_text(image_stem(part)) for part in path.parent.relative_to(folder).parts]
    entities = dict(
        re.findall(r"(?:^|_)(sub|ses|run)-([^_/]+)", "/".join([*folders, stem]).replace("/", "_"))
    )
    if "sub" in entities:
        subject, session, site = entities["sub"], entities.get("ses", ""), ""
    else:
        subject, session, site = _known_name([stem, *reversed(folders)])
        session = session or _session_in([stem, *reversed(folders)])
    run = entities.get("run", "")
    return str(path), stem, "/".join(folders), subject, session, run, site, contrast_of(parts_of(stem))


def _known_name(names: list[str]) -> tuple[str, str, str]:
    """Subject, session and site where a name follows a data set's own pattern."""
    for name in names:
        for pattern in _PATTERNS:
            if match := pattern.search(name):
                parts = match.groupdict()
                return (
                    match["subject"],
                    parts.get("session", ""),
                    _SITES.get(parts.get("site", "").lower(), ""),
                )
    return "", "", ""


def _session_in(names: list[str]) -> str:
    for name in names:
        if match := _SESSION.search(name):
            return match["label"] or "_".join(filter(None, (match["word"], match["count"])))
    return ""


def contrast_of(parts: Iterable[str]) -> str:
    """What the parts of a file name say was measured: "T1", "other" or ""."""
    words = {part.lower() for part in parts}
    if words & _LABEL_WORDS:
        return "other"
    if words & _T1_WORDS:
        return "T1"
    return "other" if words & _OTHER_WORDS else ""


def _only_t1_of_bids(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    aside = images["folders"].str.contains(r"(?:^|/)(?:derivatives|sourcedata|code)(?:/|$)")
    bids = images["stem"].str.match(r"sub-[^_]+(?:_[a-zA-Z]+-[^_]+)*_[A-Za-z0-9]+$")
    t1 = bids & images["stem"].str.endswith("_T1w")
    if not (t1 & ~aside).any():
        return images, []
    other = bids & ~t1 & ~aside
    notes = [
        f"{what}: {count}."
        for what, count in {
            "BIDS images that are not T1w, left out": other.sum(),
            "Images in derivatives, sourcedata and code, left out": aside.sum(),
        }.items()
        if count
    ]
    return images[~aside & ~other].reset_index(drop=True), notes
