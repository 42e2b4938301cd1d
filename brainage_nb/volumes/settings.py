"""Which steps turn a scan into a network's input, with every number: settings, recipes, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from brainage_nb.parameters import check_fields

# Raised whenever the same settings give other numbers than before; part of every fingerprint.
VERSION = 1
# What a recipe switches on; how its model is learned: `models.settings`. `best` is what the ablation on real
# scans chose (`benchmarks/accuracy.py`, `benchmarks/steadiness.py`).
RECIPES: dict[str, dict[str, bool]] = {
    "reference": {"brain_only": False, "to_mni": False, "grey_matter": False},
    "best": {"brain_only": True, "to_mni": True, "grey_matter": True},
}
SWITCHES = tuple(RECIPES["reference"])


def recipe_defaults(recipe: str, recipes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a named recipe sets; ValueError for an unknown name."""
    if recipe not in recipes:
        raise ValueError(f"recipe = {recipe!r}: expected one of {', '.join(recipes)}.")
    return recipes[recipe]


def name_recipe(settings: Any, recipes: Mapping[str, dict[str, Any]]) -> str:
    """The recipe that these settings follow, as `best`, or the nearest, as `best with grey_matter=False`."""
    differing = {
        name: [field for field in decided if getattr(settings, field) != decided[field]]
        for name, decided in recipes.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    told = ", ".join(f"{field}={getattr(settings, field)!r}" for field in differing[nearest])
    return f"{nearest} with {told}" if told else nearest


def list_changes(settings: Any, recipe: str) -> str:
    """The settings that are not what the recipe gives by itself, as `spacing_mm=4.0 instead of 2.0; ...`."""
    plain, now = (asdict(item) for item in (type(settings).of_recipe(recipe), settings))
    for facts in (plain, now):  # settings inside of settings, side by side with the others
        facts.update(*[facts.pop(name) for name in list(facts) if isinstance(facts[name], dict)])
    names = [name for name in now if now[name] != plain[name] and name != "seeds"]  # a draw, no choice
    told = [f"{name}={now[name]!r} instead of {plain[name]!r}" for name in names]
    return "; ".join(told) or "nothing"


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
        Whether the volume holds the share of grey matter in each voxel (0 to 1, `tissues`) instead of how
        bright it is; implies `brain_only`; the recipe's if not set.
    found_masks : bool
        Whether a brain mask that another tool left beside the scan is taken (`brain.mask_beside`); matters
        only with the steps that look for the brain.
    """

    spacing_mm: float = 2.0
    size: int = 96
    smooth: bool = True
    brain_only: bool = False
    to_mni: bool = False
    grey_matter: bool = False
    found_masks: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.5 <= self.spacing_mm <= 10:
            raise ValueError(f"spacing_mm = {self.spacing_mm}: expected 0.5 to 10 mm, usually 2 or 4.")
        if not 8 <= self.size <= 512:
            raise ValueError(f"size = {self.size}: expected 8 to 512 voxels, usually 96 or 48.")
        object.__setattr__(self, "brain_only", self.brain_only or self.grey_matter)

    @classmethod
    def of_recipe(cls, recipe: str, **numbers: Any) -> PreprocessingSettings:
        """Settings of a named recipe, save for those given.

        Parameters
        ----------
        recipe : {"reference", "best"}
        **numbers
            Any settings; they go before the recipe's. ValueError where one cannot be had beside the others.
        """
        settings = cls(**recipe_defaults(recipe, RECIPES) | numbers)
        for name, value in numbers.items():
            if getattr(settings, name) != value:
                raise ValueError(
                    f"{name} = {value!r} cannot be had with recipe = {recipe!r}: grey_matter implies "
                    "brain_only. Set grey_matter as well."
                )
        return settings

    @property
    def recipe(self) -> str:
        """The recipe these steps follow, with what differs, see `name_recipe`."""
        return name_recipe(self, RECIPES)

    @property
    def needs_brain(self) -> bool:
        """Whether any step looks for the brain."""
        return any(getattr(self, name) for name in SWITCHES)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Every step with its numbers, in order, as `preprocessing.json` lists them."""
        from brainage_nb.volumes import heads

        if self.needs_brain:
            return self._steps_with_brain()
        return [
            {"step": "orientation", "axes": "RAS"},
            *([self._smoothing_step()] if self.smooth else []),
            {
                "step": "resample",
                "spacing_mm": self.spacing_mm,
                "size": self.size,
                "interpolation": "linear",
                "axes": "world",
                "crown_ml": heads.CROWN_ML,
                "crown_to_centre_mm": heads.CROWN_TO_CENTRE_MM,
                "top_mm": heads.TOP_MM,
            },
            self._scaling_step(),
        ]

    def _steps_with_brain(self) -> list[dict[str, Any]]:
        from brainage_nb.volumes import heads
        from brainage_nb.volumes import registration as mni

        place = {
            "crown_ml": heads.CROWN_ML,
            "crown_to_centre_mm": heads.CROWN_TO_CENTRE_MM,
            "top_mm": heads.TOP_MM,
        }
        if self.to_mni:
            place = {"space": "MNI152, affine", "centre_mm": mni.CENTRE_MM.tolist()}
        resampling = {
            "step": "resample",
            "spacing_mm": self.spacing_mm,
            "size": self.size,
            "interpolation": "linear",
        }
        return [
            self._finding_step(),
            *([self._tissue_step()] if self.grey_matter else []),
            *([self._smoothing_step()] if self.smooth else []),
            resampling | place,
            *self._steps_after_resampling(),
        ]

    def _steps_after_resampling(self) -> list[dict[str, Any]]:
        if self.grey_matter:
            return []
        cut = [{"step": "outside of the brain", "value": 0.0}] if self.brain_only else []
        return [*cut, self._scaling_step()]

    def _finding_step(self) -> dict[str, Any]:
        from brainage_nb.volumes import brain
        from brainage_nb.volumes import registration as warping

        return {
            "step": "find the brain",
            "version": brain.VERSION,
            "template": "MNI152, nilearn",
            "bending_degrees": list(warping.DEGREES),
            "margin_mm": brain.MARGIN_MM,
            "lowest_correlation": brain.LOWEST_CORRELATION,
            "masks_of_other_tools": self.found_masks,
        }

    def _tissue_step(self) -> dict[str, Any]:
        from brainage_nb.volumes import tissues

        return {
            "step": "tissues",
            "version": tissues.VERSION,
            "spacing_mm": tissues.SPACING_MM,
            "resolution_mm": tissues.RESOLUTION_MM,
            "prior_mm": tissues.PRIOR_MM,
            "field_degree": tissues.FIELD_DEGREE,
            "lowest_contrast": tissues.LOWEST_CONTRAST,
            "values": "share of grey matter, 0 outside of the brain",
        }

    def _smoothing_step(self) -> dict[str, Any]:
        return {
            "step": "smooth",
            "fwhm_mm": self.spacing_mm,
            "kernel": "gaussian",
            "where": "finer than it",
        }

    def _scaling_step(self) -> dict[str, Any]:
        return {"step": "z-score", "over": "the brain" if self.brain_only else "all voxels"}

    @property
    def fingerprint(self) -> str:
        """Name of everything these settings give, as `2mm-96-1f0c…`; equal only where every number is."""
        content = json.dumps({"version": VERSION, "steps": self.steps}, sort_keys=True)
        return f"{self.spacing_mm:g}mm-{self.size}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def to_json(self) -> dict[str, Any]:
        """Content of `preprocessing.json`."""
        return {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe,
            "settings": asdict(self),
            "steps": self.steps,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PreprocessingSettings:
        """Read `to_json` back; ValueError where this version of the package would give other numbers."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in content["settings"].items() if (name, value) != ("n4", False)}
        if extra := set(given) - known:
            raise ValueError(f"Unknown preprocessing settings {sorted(extra)}; known are {sorted(known)}.")
        settings = cls(**given)  # n4 is a switch that older versions had
        if settings.fingerprint != content["fingerprint"]:
            raise ValueError(
                f"These volumes were made by other steps ({content['fingerprint']}) than this version of the "
                f"package takes with the same settings ({settings.fingerprint}). Use the version that made "
                "them, or preprocess again."
            )
        return settings
