"""What ageing the known-answer cohort plants, and the regressions that read it: one place for who makes the
cohort and who checks answers against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

# Columns of truth.csv that hold a person's planted anatomy; the others are pose, scanner and file form.
ANATOMY = ("ventricle_mm", "sulcal_opening", "grey_white_contrast", "lesions")


def anatomy_regressions() -> tuple[Pipeline, ...]:
    """Regressions of age (years) on the columns `ANATOMY`; the best one's error is the attainable one.

    A straight line, splines, and products of two parameters, each with its penalty chosen by itself.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, SplineTransformer, StandardScaler

    ridge = RidgeCV(np.logspace(-4, 3, 15))
    splines = SplineTransformer(n_knots=4, knots="quantile", extrapolation="linear")
    return (
        make_pipeline(StandardScaler(), ridge),
        make_pipeline(splines, StandardScaler(), ridge),
        make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), ridge),
    )
