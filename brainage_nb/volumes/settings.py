"""Settings of volumes: which steps make them, how training varies them, recipes and the fingerprint.

Nothing is computed here, and nothing heavy is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from brainage_nb.parameters import check_fields
from brainage_nb.workspace import MODALITIES

# Raised whenever the same settings give other numbers than before; part of every fingerprint.
VERSION = 1
# What a recipe switches on; how its model is learned: `models.settings`. `best` is what the ablation on real
# scans chose (`benchmarks/accuracy.py`, `benchmarks/steadiness.py`).
RECIPES: dict[str, dict[str, bool]] = {
    "reference": {"brain_only": False, "to_mni": False, "grey_matter": False},
    "best": {"brain_only": True, "to_mni": True, "grey_matter": True},
}
# Transforms of MONAI that may follow the chain: same voxels each time, no file, no code, same shape.
MONAI_TRANSFORMS = (
    *("AdjustContrast", "ClipIntensityPercentiles", "GaussianSharpen", "GaussianSmooth"),
    *("HistogramNormalize", "MedianSmooth", "NormalizeIntensity", "SavitzkyGolaySmooth", "ScaleIntensity"),
    *("ScaleIntensityRange", "ScaleIntensityRangePercentiles", "ShiftIntensity", "StdShiftIntensity"),
    "ThresholdIntensity",
)
MOST_TEXT = 1000  # characters of `extra`
# The numbers of each step as `preprocessing.json` lists them. The fingerprint is made of them, so that a step
# that changes gives a store of another name.
STEPS: dict[str, dict[str, Any]] = {
    "lay onto the T1w scan": {"move": "rigid", "measure": "normalised mutual information"},
    "orientation": {"axes": "RAS"},
    "find the brain": {
        "template": "MNI152, nilearn",
        "bending_degrees": [1, 2, 4],
        "core_degree": 2,
        "deep_mm": 8.0,
        "margin_mm": 3.0,
        "lowest_correlation": 0.32,
    },
    "tissues": {
        "core_mm": 4.0,
        "rim_mm": 2.0,
        "most_empty": 0.3,
        "spacing_mm": 2.0,
        "resolution_mm": 3.0,
        "prior_mm": 6.0,
        "field_degree": 4,
        "lowest_contrast": 1.5,
        "values": "share of grey matter, 0 outside of the brain",
    },
    "smooth": {"kernel": "gaussian", "where": "finer than it"},
    "resample": {"interpolation": "linear"},
    "outside of the brain": {"value": 0.0},
    "z-score": {},
}
BELOW_CROWN = {"crown_ml": 5.0, "crown_to_centre_mm": 80.0, "top_mm": 120.0}
IN_TEMPLATE = {"space": "MNI152, affine", "centre_mm": [0.0, -17.0, 5.0]}


def recipe_defaults(recipe: str, recipes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a named recipe sets; ValueError for an unknown name."""
    if recipe not in recipes:
        raise ValueError(f"recipe = {recipe!r}: expected one of {', '.join(recipes)}.")
    return recipes[recipe]


def name_recipe(settings: Any, recipes: Mapping[str, dict[str, Any]]) -> str:
    """The recipe that these settings follow, as `best`, or the nearest, as `best with to_mni=False`."""
    differing = {
        name: [one for one in decided if getattr(settings, one) != decided[one]]
        for name, decided in recipes.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    changes = ", ".join(f"{one}={getattr(settings, one)!r}" for one in differing[nearest])
    return f"{nearest} with {changes}" if changes else nearest


def list_changes(settings: Any, recipe: str) -> str:
    """The settings that are not what the recipe gives by itself, as `spacing_mm=4.0 instead of 2.0; ...`."""
    plain, now = (asdict(item) for item in (type(settings).of_recipe(recipe), settings))
    for values in (plain, now):  # settings inside of settings, side by side with the others
        values.update(*[values.pop(name) for name in list(values) if isinstance(values[name], dict)])
    names = [name for name in now if now[name] != plain[name] and name != "seeds"]  # a draw, no choice
    return "; ".join(f"{name}={now[name]!r} instead of {plain[name]!r}" for name in names) or "nothing"


def check_modality(modality: str, parameter: str = "modality") -> None:
    """ValueError with the choices where there is no such modality."""
    if modality not in MODALITIES:
        raise ValueError(f"{parameter}: {modality!r} is none of {', '.join(MODALITIES)}.")


def name_of_modality(name: str, modality: str) -> str:
    """What a file or run is called for a modality: `current` for T1w is `current_T2w` for T2w."""
    path = Path(name)
    return name if modality == "T1w" else f"{path.stem}_{modality}{path.suffix}"


def name_run(run: str, usual: str, modality: str) -> str:
    """The name of a run: as given, or, where that is the usual one, with the modality (`resnet18_t2w`)."""
    return name_of_modality(run, modality).lower() if run == usual else run


def parse_transforms(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of MONAI transforms written as calls; the text is read, never run.

    Raises
    ------
    ValueError
        It is no list of calls with plain values, or names a transform that is not in `MONAI_TRANSFORMS`.

    Examples
    --------
    >>> parse_transforms("MedianSmooth(radius=1); ScaleIntensity()")
    [('MedianSmooth', {'radius': 1}), ('ScaleIntensity', {})]
    """
    try:
        lines = ast.parse(text[: MOST_TEXT + 1].strip()).body
        calls = [line.value for line in lines]
        named = [{part.arg: ast.literal_eval(part.value) for part in call.keywords} for call in calls]
        found = [(call.func.id, arguments) for call, arguments in zip(calls, named, strict=True)]
        plain = len(text) <= MOST_TEXT and all(isinstance(line, ast.Expr) for line in lines)
        plain = plain and not any(call.args for call in calls) and not any(None in part for part in named)
        json.dumps(found, sort_keys=True)
    except (SyntaxError, AttributeError, TypeError, ValueError, RecursionError, MemoryError):
        plain = False
    if not plain:
        raise ValueError(
            f"extra = {text[:100]!r}: expected calls with named, plain values, as MedianSmooth(radius=1); "
            f"several are separated by a semicolon, {MOST_TEXT} characters at most."
        )
    if unknown := [name for name, _ in found if name not in MONAI_TRANSFORMS]:
        raise ValueError(
            f"extra: {unknown[0]} cannot be part of the chain, which a bundle carries as names and numbers, "
            f"without code. It can hold these of MONAI: {', '.join(MONAI_TRANSFORMS)}."
        )
    return found


def write_transforms(transforms: list[tuple[str, dict[str, Any]]]) -> str:
    """The text that `parse_transforms` reads back."""
    return "; ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in transforms
    )


@dataclass(frozen=True)
class PreprocessingSettings:
    """Every number that decides what a preprocessed volume looks like.

    Parameters
    ----------
    spacing_mm : float
        Edge of a voxel of the result, mm.
    size : int
        Edge of the result in voxels; 96 at 2 mm and 48 at 4 mm both show 192 mm.
    smooth : bool
        Whether finer scans are smoothed to the target resolution first. Without, scans of one person at
        1 mm and 3 mm differ in texture.
    brain_only : bool
        Whether everything outside of the brain is set to 0 and the z-score runs over the brain; the recipe's
        if not set.
    to_mni : bool
        Whether the cube lies in MNI152 space (affine), instead of below the crown; the recipe's if not set.
    grey_matter : bool
        Whether the volume holds the share of grey matter in each voxel (0 to 1) instead of how bright it
        is; implies `brain_only`; the recipe's if not set.
    found_masks : bool
        Whether a brain mask that another tool left beside the scan is taken; matters only with the steps
        that look for the brain.
    extra : str
        Transforms of MONAI after the last step, as MedianSmooth(radius=1); several are separated by a
        semicolon.
    modality : str
        What was scanned, one of `MODALITIES`. All but T1w are laid onto the T1w scan of their session, whose
        head, brain and place on the template they take; they hold brightness, never shares of grey matter.
    """

    spacing_mm: float = 2.0
    size: int = 96
    smooth: bool = True
    brain_only: bool = False
    to_mni: bool = False
    grey_matter: bool = False
    found_masks: bool = True
    extra: str = ""
    modality: str = field(default="T1w", metadata={"by_code": True})  # 03 makes the volumes of each

    def __post_init__(self) -> None:
        check_fields(self)
        check_modality(self.modality)
        if self.grey_matter and self.modality != "T1w":
            raise ValueError(
                f"grey_matter = True: shares of grey matter are read from T1w scans, not {self.modality}."
            )
        if not 0.5 <= self.spacing_mm <= 10:
            raise ValueError(f"spacing_mm = {self.spacing_mm}: expected 0.5 to 10 mm, usually 2 or 4.")
        if not 8 <= self.size <= 512:
            raise ValueError(f"size = {self.size}: expected 8 to 512 voxels, usually 96 or 48.")
        object.__setattr__(self, "brain_only", self.brain_only or self.grey_matter)
        object.__setattr__(self, "extra", write_transforms(parse_transforms(self.extra)))

    @classmethod
    def of_recipe(cls, recipe: str, **numbers: Any) -> PreprocessingSettings:
        """Settings of a named recipe, except for those given.

        Parameters
        ----------
        recipe : {"reference", "best"}
        **numbers
            Any settings; they go before the recipe's. ValueError where one cannot be had beside the others.
        """
        other = {"grey_matter": False} if numbers.get("modality", "T1w") != "T1w" else {}
        settings = cls(**recipe_defaults(recipe, RECIPES) | other | numbers)
        if settings.brain_only != numbers.get("brain_only", settings.brain_only):
            raise ValueError(
                f"brain_only = {numbers['brain_only']!r} cannot be had with recipe = {recipe!r}: grey_matter "
                "implies brain_only. Set grey_matter as well."
            )
        return settings

    def for_modality(self, modality: str) -> PreprocessingSettings:
        """The same settings for another contrast, with brightness in place of shares of grey matter."""
        return replace(self, modality=modality, grey_matter=self.grey_matter and modality == "T1w")

    @property
    def recipe(self) -> str:
        """The recipe these steps follow, with what differs, see `name_recipe`."""
        name = name_recipe(self, RECIPES)
        return f"{name}, then {self.extra}" if self.extra else name

    @property
    def by_core(self) -> bool:
        """Whether volumes come from the core of the brain, and are much the same with and without a skull."""
        return self.grey_matter and self.to_mni  # else the crown places them, of skin or of brain

    @property
    def needs_brain(self) -> bool:
        """Whether any step looks for the brain."""
        return self.brain_only or self.to_mni

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Every step with its numbers, in order, as `preprocessing.json` lists them."""
        from brainage_nb.volumes import brain, modalities, tissues

        laid = {"modality": self.modality, "version": modalities.VERSION}
        grid = {"spacing_mm": self.spacing_mm, "size": self.size}
        grid |= IN_TEMPLATE if self.to_mni else BELOW_CROWN
        grid |= {} if self.needs_brain else {"axes": "world"}
        found = {"version": brain.VERSION, "masks_of_other_tools": self.found_masks}
        every = (  # name, whether it is taken, numbers
            ("lay onto the T1w scan", self.modality != "T1w", laid),
            ("orientation", not self.needs_brain, {}),
            ("find the brain", self.needs_brain, found),
            ("tissues", self.grey_matter, {"version": tissues.VERSION}),
            ("smooth", self.smooth, {"fwhm_mm": self.spacing_mm}),
            ("resample", True, grid),
            ("outside of the brain", self.brain_only and not self.grey_matter, {}),
            ("z-score", not self.grey_matter, {"over": "the brain" if self.brain_only else "all voxels"}),
        )
        steps = [{"step": name} | STEPS[name] | numbers for name, taken, numbers in every if taken]
        return steps + [{"step": name} | arguments for name, arguments in parse_transforms(self.extra)]

    @property
    def fingerprint(self) -> str:
        """Name of everything these settings give, as `2mm-96-1f0c…`; equal only where every number is."""
        content = json.dumps({"version": VERSION, "steps": self.steps}, sort_keys=True)
        return f"{self.spacing_mm:g}mm-{self.size}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def to_json(self) -> dict[str, Any]:
        """Content of `preprocessing.json`."""
        names = ("fingerprint", "recipe", "steps")
        return {"version": VERSION, "settings": asdict(self)} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PreprocessingSettings:
        """Read `to_json` back; ValueError where this version of the package would give other numbers."""
        given = dict(content["settings"])
        for switch in ("n4", "stripped"):  # that older versions had
            if not given.get(switch):
                given.pop(switch, None)
        known = {item.name for item in fields(cls)}
        if extra := set(given) - known:
            raise ValueError(f"Unknown preprocessing settings {sorted(extra)}; known are {sorted(known)}.")
        settings = cls(**given)
        if settings.fingerprint != content["fingerprint"]:
            raise ValueError(
                f"These volumes were made by other steps ({content['fingerprint']}) than this version of the "
                f"package takes with the same settings ({settings.fingerprint}). Use the version that made "
                "them, or preprocess again."
            )
        return settings


@dataclass(frozen=True)
class ModalityChoice:
    """Which of the volumes of 03 a model learns from.

    Parameters
    ----------
    modality : str
        What they are of: T1w, or one that 01 had in `modalities` and 03 made volumes of (T2w, ...).
    """

    modality: str = "T1w"

    def __post_init__(self) -> None:
        check_modality(self.modality)


@dataclass(frozen=True)
class AugmentationSettings:
    """Ranges and probabilities of the random changes; a probability of 0 turns one off.

    Parameters
    ----------
    flip : float
        Probability of exchanging left and right.
    rotation_deg : float
        Largest rotation about each axis, degrees.
    scale : float
        Largest isotropic change of size, share (0.08 is 8 % smaller to 8 % larger).
    shift_mm : float
        Largest shift along each axis, mm.
    pose : float
        Probability of rotation, scale and shift, drawn together.
    deformation_mm : float
        Largest displacement of a control point along each axis, mm (control points lie about 32 mm apart).
    deformation : float
        Probability of the smooth deformation.
    log_gamma : float
        Largest log of the contrast exponent: 0.25 draws exponents from 0.78 to 1.28.
    gamma : float
        Probability of the contrast change.
    log_bias : float
        Largest log of the smooth multiplicative field: 0.2 makes places 18 % darker to 22 % brighter.
    bias_field : float
        Probability of the bias field.
    blur_mm : float
        Largest full width at half maximum of the Gaussian blur along each axis, mm.
    blur : float
        Probability of the blur.
    noise_sd : float
        Largest standard deviation of the white noise, in standard deviations of the volume.
    noise : float
        Probability of the noise.
    """

    flip: float = 0.5
    rotation_deg: float = 10.0
    scale: float = 0.08
    shift_mm: float = 5.0
    pose: float = 0.7
    deformation_mm: float = 3.0
    deformation: float = 0.3
    log_gamma: float = 0.25
    gamma: float = 0.3
    log_bias: float = 0.2
    bias_field: float = 0.3
    blur_mm: float = 4.0
    blur: float = 0.2
    noise_sd: float = 0.1
    noise: float = 0.3

    def __post_init__(self):
        check_fields(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value < 0 or (entry.name in PROBABILITIES and value > 1):
                expected = "a probability from 0 to 1" if entry.name in PROBABILITIES else "a number from 0"
                raise ValueError(f"augmentation {entry.name}={value}: expected {expected}.")


PROBABILITIES = ("flip", "pose", "deformation", "gamma", "bias_field", "blur", "noise")
NOTHING = AugmentationSettings(**dict.fromkeys(PROBABILITIES, 0.0))
