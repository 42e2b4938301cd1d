"""Which images lie in a folder, and what their names say of subject, session and site. Opens none of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from brainage_nb.cohort.names import WORDS, parts_of, read_contrast
from brainage_nb.workspace import MARKER

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr.gz", ".hdr", ".img.gz", ".img")
COLUMNS = ["image", "stem", "folders", "subject_hint", "session_hint", "run_hint", "site_hint", "contrast"]

_WORDS = {kind: set(words) for kind, words in WORDS["images"].items()}
_PICTURE = {word: place for place, word in enumerate(WORDS["images"]["picture"])}
_MAP = _WORDS["label"] | _WORDS["map"]
_MADE_BY_ANTS_OR_FIRST = re.compile(
    r"[-_.]?(?:(?<!T)\d)?((?:BrainExtraction|BrainSegmentation|CorticalThickness|ExtractedBrain|BrainNormalizedTo"
    r"|SubjectTo|TemplateTo)[A-Za-z0-9]*|(?:Inverse)?Warp(?:ed)?|GenericAffine"
    r"|(?:[LR]_)?(?:Accu|Amyg|BrStem|Caud|Hipp|Pall|Puta|Thal)_(?:first|corr))$"
)
_ANTS_PICTURE = re.compile(r"(?:Brain|N4|(?<!Inverse)Warped|BrainNormalizedToTemplate)$")
_IN_WORKSPACE = "it lies in a workspace of this package; set data_dir to that folder itself to take it"
_COUNTED = ("Crop", "Eq")  # by dcm2niix: X_Crop_1
_ASIDE = re.compile(r"(?:^|/)(?:derivatives|sourcedata|code)(?:/|$)")
_DERIVED_OF_BIDS = re.compile(r"_(?:desc|space|res|den|label|from|to|mode)-[^_]+")
# SPM and CAT12 write before the name: msub-01, smwc1sub-01, u_rc1sub-01, mwp1sub-01
_SPM = r"(?:iy_|y_|u_|v_|w?j_)?(?:s\d{0,2}|m[0i]?|r|w)*"
_PREFIX = re.compile(rf"BiasField_|sanlm_|{_SPM}(?:c[1-6]|p\d)?")
_MAP_PREFIX = re.compile(rf"(?:s\d{{0,2}})?m0?w[cp]\d|{_SPM}(?:(?<=_)|c[1-6]|p\d)(?=sub-)")
# the folders of one FreeSurfer subject, and of one run of fsl_anat
_HOME = re.compile(r"(?:^|/)(?P<subject>[^/]*?)(?P<tool>/?\bmri(?:/orig)?|\.anat)$")
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


def find_images(folder: Path | str) -> pd.DataFrame:
    """Find the scans below a folder, at any depth.

    What FSL, SPM, CAT12, FreeSurfer, ANTs, fMRIPrep and this package make from a scan is no further scan: it
    is left out where its source is there, and maps (masks, tissues, fields, heat) always. Of a FreeSurfer
    subject one volume is taken (`T1.mgz` first). Where the folder holds BIDS images (`sub-…_T1w`), all other
    BIDS images and `derivatives`, `sourcedata` and `code` are left out too. Names decide; no file is opened.

    Parameters
    ----------
    folder : path
        Anything: a BIDS data set, one folder per subject, a flat folder, folders that are named like images
        (Kaggle unpacks `X.nii` to `X.nii/X.nii`). Hidden files are passed over.

    Returns
    -------
    DataFrame
        One row per image, in the order of paths: `image` (absolute path), `stem` (file name without ending),
        `folders` (names of the folders below `folder`, with `/` between), `subject_hint`, `session_hint`,
        `run_hint`, `site_hint` (what the name says, or ""), `contrast` ("T1", "other" or "", by name).
        `attrs["left_out"]` holds the others, with their `reason`; `attrs["notes"]` says what was decided.

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
    paths, others, workspaces = _walk(folder)
    images = describe_images(paths, folder)
    own = images["image"].str.startswith(tuple(f"{place}{os.sep}" for place in workspaces))
    found = images.assign(reason=_IN_WORKSPACE, until=[len(parts_of(stem)) - 1 for stem in images["stem"]])
    found.loc[~own, "reason"] = _check_bids(images[~own])
    products, notes = _find_products(images[found["reason"] == ""])
    found.update(products)
    dicoms = others[".dcm"] + others[".ima"]
    if dicoms:
        notes.append(f"DICOM files, not read: {dicoms}. Convert them to NIfTI with dcm2niix.")
    return _split_off(found, notes)


def take_named(images: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Take back what `find_images` left out as a product though a table gives its name to a person or scan.

    `m001` may be what SPM made from `001`; where the table has an id `m001`, it is that person.
    """
    known = {"-".join(parts_of(image_stem(re.split(r"[/\\]", name)[-1]))).casefold() for name in names}
    left = images.attrs["left_out"]
    runs = (accumulate(parts_of(stem.casefold()), "{}-{}".format) for stem in left["stem"])
    back = [not known.isdisjoint([*run][until:]) for run, until in zip(runs, left["until"], strict=True)]
    left = left.assign(reason=["" if named else why for named, why in zip(back, left["reason"], strict=True)])
    found = pd.concat([images.assign(reason="", until=0), left])
    return _split_off(found.sort_values("image", kind="stable"), images.attrs["notes"])


def describe_images(paths: Iterable[Path], folder: Path) -> pd.DataFrame:
    """What the names of images below a folder say, in the columns of `find_images`."""
    return pd.DataFrame([_describe(path, folder) for path in paths], columns=COLUMNS, dtype=str)


def is_image(name: str) -> bool:
    """Whether a file name ends like a scan's."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def image_stem(name: str) -> str:
    """A file name without its image ending."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def clean_text(text: str) -> str:
    """Text in the composed form of Unicode, without characters that nobody sees; odd blanks are blanks."""
    seen = [one for one in unicodedata.normalize("NFC", text) if unicodedata.category(one) != "Cf"]
    return " ".join("".join(seen).split())


def _walk(folder: Path) -> tuple[list[Path], Counter[str], list[str]]:
    """Images below a folder, how often other endings occur, and workspaces of this package in it; links are
    followed, each folder once."""
    found, others, workspaces, seen = [], Counter(), [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        workspaces += [root] if MARKER in files and Path(root) != folder else []
        names = {name for name in files if not name.startswith(".")}
        for name in sorted(names):
            if not is_image(name):
                others[Path(name).suffix.lower()] += 1
            elif not _is_second_half(name, names):
                found.append(Path(root, name))
    return sorted(found), others, workspaces


def _is_second_half(name: str, names: set[str]) -> bool:
    """Whether a file is the `.img` of a `.hdr`/`.img` pair: the pair is one image, named by its header."""
    headers = {f"{image_stem(name)}{ending}" for ending in (".hdr", ".hdr.gz", ".HDR", ".HDR.gz", ".HDR.GZ")}
    return name.lower().endswith((".img", ".img.gz")) and bool(headers & names)


def _describe(path: Path, folder: Path) -> tuple[str, ...]:
    stem = clean_text(image_stem(path.name))
    folders = [clean_text(image_stem(part)) for part in path.parent.relative_to(folder).parts]
    entities = dict(re.findall(r"(?:^|_)(sub|ses|run)-([^_]+)", "_".join([*folders, stem])))
    subject, session, site = entities.get("sub", ""), entities.get("ses", ""), ""
    if not subject:
        nearest_first = [stem, *reversed(folders)]
        known = _find_first(_PATTERNS, nearest_first)
        subject, site = known.get("subject", ""), _SITES.get(known.get("site", "").lower(), "")
        told = _find_first([_SESSION], nearest_first)
        words = "_".join(filter(None, (told.get("word"), told.get("count"))))
        session = known.get("session") or told.get("label") or words
    run = entities.get("run", "")
    return str(path), stem, "/".join(folders), subject, session, run, site, read_contrast(parts_of(stem))


def _find_first(patterns: Iterable[re.Pattern], names: list[str]) -> dict[str, str]:
    """The groups of the first pattern in the first name that has one."""
    found = (match for name in names for pattern in patterns if (match := pattern.search(name)))
    return next((match.groupdict() for match in found), {})


# --- what is no scan ------------------------------------------------------------------------------------


def _split_off(found: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The images without a reason against them; the others are put into `attrs`."""
    images = found.loc[found["reason"] == "", COLUMNS].reset_index(drop=True)
    left = found[found["reason"] != ""].reset_index(drop=True)
    images.attrs = {"left_out": left, "notes": notes}
    return images


def is_raw_bids(stem: str, folders: str) -> bool:
    """Whether an image with a name of BIDS is a scan itself, and was not made from one."""
    return not (_ASIDE.search(folders) or _DERIVED_OF_BIDS.search(stem))


def _check_bids(images: pd.DataFrame) -> pd.Series:
    """Why an image of a folder with raw BIDS scans is none of them; "" where nothing is against it."""
    stems, folders = images["stem"], images["folders"]
    aside = folders.str.contains(_ASIDE)
    bids, t1 = stems.str.match("sub-[^_]+_"), stems.str.endswith("_T1w")
    derived = stems.str.contains(_DERIVED_OF_BIDS) | folders.str.contains(r"(?:^|/)mri(?:/orig)?$")
    raw = bids & t1 & ~aside & ~derived
    has_raw = images["subject_hint"].isin({"", *images["subject_hint"][raw]})
    against = {  # the first counts
        "it lies in derivatives, sourcedata or code of a BIDS data set": aside,
        "its name does not end in _T1w, as that of a T1-weighted BIDS scan does": bids & ~t1,
        "it was made from a raw scan of this BIDS data set, which is taken": derived & has_raw,
    }
    found = [wrong & raw.any() for wrong in against.values()]
    return pd.Series(np.select(found, [*against], ""), images.index, dtype=str)


class _Reading(NamedTuple):
    """A name read as that of a product.

    Attributes
    ----------
    source : tuple of str
        What it leaves without the words for products.
    made : list of str
        Those words.
    is_map : bool
        Whether they mean a map.
    until : int
        The part of the name that was read last.
    """

    source: tuple[str, ...]
    made: list[str]
    is_map: bool
    until: int

    @property
    def rank(self) -> tuple[int, list[int]]:
        """How far the image is from a scan, by the words for what was made."""
        return len(self.made), [_PICTURE.get(word.lower(), len(_PICTURE)) for word in self.made]


def _find_products(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Why an image is no scan (`reason`, or ""), the part of its name that was read last (`until`); notes."""
    rows = list(images.itertuples())
    read = [_read_source(row.stem, row.folders, row.image) for row in rows]
    sources = _Sources()
    for row, own in zip(rows, read, strict=True):
        if not own.is_map:
            sources.add(row, own)
    result, kept = [], []
    for row, own in zip(rows, read, strict=True):
        readings = [*([own] if own.made else []), *_read_prefixed(row.stem)]
        found = [(source, one.made, one.until) for one in readings if (source := sources.find(row, one))]
        (_, taken), words, end = min(found, default=((0, ""), own.made, own.until))
        reason = f"by its name a product ({' '.join(words)}); {taken} is taken" if taken else ""
        if own.is_map and not taken:
            reason = f"by its name a map that was made from a scan ({' '.join(own.made)}), no scan"
        result.append((reason, end))
        if own.made and not reason and own.until >= len(parts_of(row.stem)) - 1:
            kept.append(f"{Path(row.image).name} ({' '.join(own.made)})")
    told = (
        f"Images taken although a program made them, by their names, because what they were made from is not "
        f"there: {len(kept)}, the first {kept[0] if kept else ''}. Train and predict on images of one kind."
    )
    return pd.DataFrame(result, images.index, columns=["reason", "until"]), [told] if kept else []


class _Sources:
    """Images by what their names leave without the words for products, and by folder; the best of each."""

    def __init__(self) -> None:
        self.best: dict[tuple, tuple] = {}
        self.folders = defaultdict(set)

    def add(self, row: Any, own: _Reading) -> None:
        """Add an image that may be the source of others."""
        one, source = (own.rank, row.image), own.source
        above, _, last = row.folders.rpartition("/")
        for key in [(source, row.folders), (source, "last", last), (source, "below", above)]:
            self.best[key] = min(self.best.get(key, one), one)
        if not own.made:
            self.folders[source].add(row.folders)

    def find(self, row: Any, own: _Reading) -> tuple[Any, str] | None:
        """The image that this one was made from, or that is rather taken: its rank and file name.

        It lies in the same folder, in one above or in one of the same numbered name (`raw/001`, `bet/001`),
        or scans of its name lie in one folder only.
        """
        names, source = row.folders.split("/"), own.source
        keys = [(source, above) for above in accumulate(names, "{}/{}".format)]
        keys += [(source, "last", name) for name in names if any(map(str.isdigit, name))]
        if _words_of_folder(row.folders):  # 001/T1/x, 001/FLAIR/x
            keys += [(source, "below", row.folders.rpartition("/")[0])]
        if source:  # `T1` alone says nothing of whose it is
            keys += [(source, "")]
            keys += [(source, *self.folders[source])] if len(self.folders.get(source, ())) == 1 else []
        found = min((self.best[key] for key in keys if key in self.best), default=None)
        return (found[0], Path(found[1]).name) if found and found[0] < own.rank else None


def _read_source(stem: str, folders: str, image: str) -> _Reading:
    """A name read as that of a product, by its folders too."""
    own, last = _read_products(stem), len(parts_of(stem))
    home = _HOME.search(folders)
    if home and (home["tool"] == ".anat" or image.lower().endswith((".mgz", ".mgh"))):
        source, made = (own.source, own.made)
        if folders.endswith("/orig") and stem.isdigit():
            source, made = (), ["orig"]
        tool = "fsl_anat" if home["tool"] == ".anat" else "FreeSurfer"
        subject, *longitudinal = home["subject"].split(".long.")  # processed once more, with other sessions
        made = [tool, *([stem] if source else made), *["longitudinal"] * len(longitudinal)]
        return _Reading(_read_products(subject).source, made, own.is_map or bool(source), last - 1)
    if words := _words_of_folder(folders):
        # a product if a scan of its name lies elsewhere, no map by itself
        return own._replace(made=[*own.made, *words], until=last)
    return own


def _words_of_folder(folders: str) -> list[str]:
    """The words of the nearest folder where they all speak of what was made or measured (`brain_masks`)."""
    words, people = parts_of(folders.split("/")[-1].lower()), _WORDS["people"]
    made = [word for word in words if word in _WORDS["folder"] or _is_product(word.removesuffix("s"))]
    return words if set(made) - people and set(words) <= {*made, *people} else []


def _read_products(stem: str) -> _Reading:
    """A file name read as that of a product."""
    if ants := _MADE_BY_ANTS_OR_FIRST.search(stem):
        parts = parts_of(stem[: ants.start()])
        return _Reading(_without_t1(parts), [ants[1]], not _ANTS_PICTURE.search(ants[1]), len(parts))
    made = [part.lstrip("_") for part in _DERIVED_OF_BIDS.findall(stem)]
    if not made and re.fullmatch(r"sub-[^_]+(?:_[a-z]+-[^_]+)*_T1w", stem):
        return _Reading(_casefold(parts_of(stem)[:-1]), [], False, 0)  # rec-norm is how the scanner made it
    parts = [part for part in re.split(r"[-_. +]+", _DERIVED_OF_BIDS.sub("", stem)) if part]
    rest, is_map, until = [], False, len(parts) if made else 0
    names_one = any(not _is_product(part) for part in _without_t1(parts))
    for number, part in enumerate(parts):
        follows = bool(made) and until == number - 1 and (is_map or made[-1] in _COUNTED)
        # before the id only small letters count: HEAT_001 is a person of a study
        if _is_product(part) and (rest or not names_one or part.islower()):
            made, until, is_map = [*made, part], number, part.lower() not in _PICTURE
        elif follows and re.fullmatch(r"\d{1,2}", part):
            made, until = [*made[:-1], f"{made[-1]}_{part}"], number  # pve_0: the number is the tissue's
        elif part.lower() not in _WORDS["T1"]:
            rest, is_map = [*rest, part], False  # only at the end a word makes the image a map
    if prefix := _MAP_PREFIX.match(stem):
        made, is_map = [prefix[0], *made], True
    return _Reading(_casefold(rest), made, is_map, until)


def _casefold(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part.casefold() for part in parts)


def _without_t1(parts: Iterable[str]) -> tuple[str, ...]:
    return _casefold(part for part in parts if part.lower() not in _WORDS["T1"])


def _is_product(part: str) -> bool:
    return part.lower() in _PICTURE or part.lower().rstrip("0123456789") in _MAP


def _read_prefixed(stem: str) -> Iterator[_Reading]:
    """Readings of a name as that of another image with letters before it."""
    for end in range(1, min(len(stem), 15)):
        if _PREFIX.fullmatch(stem[:end]) and stem[end].isalnum():
            rest = _read_products(stem[end:])
            yield rest._replace(made=[stem[:end], *rest.made], until=0)
