"""What all figures share: colours, sizes, labels, where a legend goes. Knows nothing of scans or ages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart by people with any common form of colour blindness, and in grey print.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW = PALETTE
GREY = "#666666"
TEXT, SMALL = 9, 8  # points, at the printed size of the figure


def new_figure(
    columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.9
) -> tuple[Figure, Any]:
    """A figure of `columns` x `rows` Axes, `width` x `height` inches each, outside pyplot's list of open
    figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


BELOW_LABEL_INCHES = 0.42  # from an Axes to under its ticks and label


def label_axes(ax: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    """Title and axis labels in one size, without the upper and right frame; returns the Axes."""
    ax.set_title(title, fontsize=TEXT)
    ax.set_xlabel(xlabel, fontsize=TEXT)
    ax.set_ylabel(ylabel, fontsize=TEXT)
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend_under(ax: Axes, handles: Sequence[Any] | None = None, ncols: int = 3) -> None:
    """Put the legend of an Axes under its label, where it covers no point, however high the Axes is."""
    from matplotlib.transforms import ScaledTranslation

    handles = handles or ax.get_legend_handles_labels()[0]
    below = ax.transAxes + ScaledTranslation(0, -BELOW_LABEL_INCHES, ax.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    ax.legend(handles=handles, fontsize=SMALL, frameon=False, ncols=ncols, **place)
