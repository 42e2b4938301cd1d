"""The words and limits of cleaning: why a scan is dropped, what is odd about one, and every threshold.

Applies nothing: the rules are applied in `cleaning`.
"""

from __future__ import annotations

from dataclasses import dataclass

from brainage_nb.parameters import check_fields
from brainage_nb.volumes.scans import MAX_VOXELS, SCAN_ERRORS, SCAN_FLAGS

REASONS = {
    **SCAN_ERRORS,
    "too_small": "too few voxels along an axis",
    "voxel_size": "a voxel size no head scan has",
    "field_of_view": "the image spans less than a human brain, or more than a person",
    "label_map": "a label map or mask, not intensities",
    "negative": "strongly negative intensities, as in CT or phase images",
    "head_size": "what is in the image is too small, or too large, for a human head",
    "no_age": "no age is known",
    "impossible_age": "an age no person has",
    "duplicate": "the same picture stands in the cohort already",
    "ambiguous": "the same picture under ids or ages that contradict each other",
}
FLAGS = {
    **SCAN_FLAGS,
    "skull_stripped": "the skull seems to be removed already",
    "head_cut_off": "the head touches the edge of the image",
    "coarse": "voxels coarser than the model's grid",
    "oblique": "the axes are tilted against the body's",
    "few_values": "few grey levels",
    "clipped": "many voxels at exactly the greatest intensity",
    "size_outlier": "the head's size is unlike the rest of the cohort's",
    "intensity_outlier": "the intensities are spread unlike the rest of the cohort's",
    "age_outside_adult": "an age outside the adult range",
    "age_conflict": "ages of one session disagree",
    "several_scans": "one of several scans of a session",
    "same_picture": "the same picture was also listed elsewhere; this copy was kept",
    "age_note": "the table needed a rule to give this age",
}


@dataclass(frozen=True)
class CleaningRules:
    """Every limit that cleaning uses.

    Attributes
    ----------
    max_voxels : int
        Most voxels a header may claim before the file is refused unopened.
    min_voxels_per_axis : int
        Fewest voxels along each axis.
    min_voxel_mm, max_voxel_mm : float
        Shortest and longest edge of a voxel [mm]. Thick clinical slices have 6.5 mm.
    min_field_of_view_mm, max_field_of_view_mm : float
        Shortest and longest extent of the image along an axis [mm]. A small adult brain is 100 mm high.
    max_equal_neighbours : float
        Largest share of bright voxels with a neighbour exactly as bright; label maps have above 0.6, images
        below 0.3.
    min_intensity_p1 : float
        Least 1st percentile of intensity; CT has -1000 in air. Only held against scans whose negative part is
        also more than a quarter of their range.
    min_head_ml, max_head_ml : float
        Least and largest volume of what stands out from the background [ml]. A small adult brain without
        skull has 850 ml, a macaque's 100 ml, a head with neck and shoulders less than 9000 ml.
    max_edge_fraction : float
        Flag a head whose section in an outermost slice is more than this share of its largest section. At
        the lower edge, where every neck is cut, only the height below the crown counts.
    min_age, max_age : float
        Youngest and oldest possible age [years].
    adult_from, adult_to : float
        Ages [years] outside which a scan is flagged: the preprocessing is checked on adults.
    same_age_years : float
        Two ages of one picture that differ by no more than this are taken as the same age [years].
    coarse_mm : float
        Flag voxels with a longer edge [mm].
    oblique_degrees : float
        Flag axes tilted by more [degrees].
    few_values : int
        Flag scans with fewer distinct intensities.
    max_at_maximum : float
        Flag scans in which a larger share of bright voxels has exactly the greatest intensity.
    outlier_z : float
        Flag a scan this many robust standard deviations (1.48 x median absolute deviation) from the median.
    outlier_ratio : float
        ... and also by at least this factor: in an even cohort many robust deviations are still little.
    min_cohort : int
        Fewest scans from which outliers are judged.
    """

    max_voxels: int = MAX_VOXELS
    min_voxels_per_axis: int = 16
    min_voxel_mm: float = 0.2
    max_voxel_mm: float = 7.0
    min_field_of_view_mm: float = 95.0
    max_field_of_view_mm: float = 600.0
    max_equal_neighbours: float = 0.5
    min_intensity_p1: float = -500.0
    min_head_ml: float = 600.0
    max_head_ml: float = 12000.0
    max_edge_fraction: float = 0.25
    min_age: float = 0.0
    max_age: float = 115.0
    adult_from: float = 18.0
    adult_to: float = 95.0
    same_age_years: float = 0.1
    coarse_mm: float = 2.2
    oblique_degrees: float = 20.0
    few_values: int = 32
    max_at_maximum: float = 0.02
    outlier_z: float = 5.0
    outlier_ratio: float = 1.3
    min_cohort: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
