"""Pictures of brains found: the mask's outline on scans as they are preprocessed, and a table of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .brain import find_brain
from .pictures import PLANES, plane, show_plane
from .preprocessing import grid_affine, preprocess
from .recipes import PreprocessingSettings
from .scans import ScanError, load_scan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTLINE = "#56B4E9"


def brain_preview(
    scans: Mapping[str, str | Path], settings: PreprocessingSettings
) -> tuple[pd.DataFrame, Figure]:
    """Find the brain in a few scans and show it.

    Parameters
    ----------
    scans : mapping
        Title to file.
    settings : PreprocessingSettings
        For the grid and the masks beside scans; scans are drawn before anything outside of the brain is
        set to 0. A brain that cannot be trusted is not drawn: its row says why.

    Returns
    -------
    table : DataFrame
        A row a scan: quality (0 to 1), correlation, agreement, litres, where the mask is from, problems, and
        why a mask beside it was not taken.
    figure : Figure
        A row a plane, a column a scan.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    rows, drawn = [], []
    plain = replace(settings, brain_only=False, n4=False, grey_matter=False)
    for title, path in scans.items():
        try:
            image = load_scan(path)
        except ScanError as error:
            rows.append({"scan": title, "problems": str(error)})
            continue
        brain = find_brain(image, found_masks=settings.found_masks)
        rows.append(
            {
                "scan": title,
                "quality": brain.quality,
                "correlation": brain.correlation,
                "agreement": brain.agreement,
                "litres": brain.volume_l,
                "mask": "template" if brain.source == "template" else Path(brain.source).name,
                "problems": "; ".join(brain.problems),
                "note": image.extra["flags"].get("mask_not_taken", ""),
            }
        )
        if not brain.problems:
            inside = brain.mask_on(grid_affine(image, plain), (settings.size,) * 3)
            drawn.append((title, preprocess(image, plain), inside))
    figure = Figure(figsize=(1.5 * max(len(drawn), 1) + 0.2, 5.0), layout="constrained")
    if drawn:
        _draw(figure, drawn)
    return pd.DataFrame(rows), figure


def outline(inside: np.ndarray, name: str, ax: Axes) -> Axes:
    """Draw the outline of a RAS mask (x, y, z) over the middle slice that `show_plane` drew."""
    picture, _ = plane(inside.astype(np.float32), name)
    if 0 < picture.mean() < 1:
        ax.contour(picture, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    return ax


def _draw(figure: Figure, drawn: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    axes = figure.subplots(len(PLANES), len(drawn), squeeze=False)
    for column, (title, volume, inside) in zip(axes.T, drawn, strict=True):
        for name, ax in zip(PLANES, column, strict=True):
            outline(inside, name, show_plane(volume, name, ax))
        column[0].set_title(title, fontsize=8)
