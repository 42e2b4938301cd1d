"""Results to take away: JSON, CSV and one page of HTML that stands alone. Draws nothing."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from brainage_nb import __version__
from brainage_nb.apps.styles import PAGE_STYLE
from brainage_nb.models.bundles.prediction import COLUMNS, NOT_A_DEVICE, Failure, Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from brainage_nb.models.bundle import Bundle


def result_json(results: Sequence[Prediction | Failure], bundle: Bundle) -> str:
    """All results with what made them, as JSON text."""
    content = {
        "model": model_facts(bundle),
        "notice": NOT_A_DEVICE,
        "unit": "years",
        "results": [_with_members(result) for result in results],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def result_csv(results: Sequence[Prediction | Failure]) -> str:
    """All results as CSV text, columns as of the command line."""
    import pandas as pd

    rows = [{name: _no_formula(value) for name, value in result.to_dict().items()} for result in results]
    return pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")


def result_page(prediction: Prediction, bundle: Bundle, pictures: Mapping[str, Figure]) -> str:
    """One page of HTML without outside references, to be kept or printed: figures, interval, warnings,
    model.
    """
    rows = prediction.frame()["value"].drop(index="predicted age [years]")
    facts = model_facts(bundle)
    return PAGE.format(
        style=PAGE_STYLE,
        scan=html.escape(prediction.scan),
        age=f"{prediction.predicted_age:.1f}",
        rows="".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows.items()
        ),
        warnings="".join(f"<li>{html.escape(caution.sentence)}</li>" for caution in prediction.warnings)
        or "<li>None.</li>",
        pictures="".join(
            f"<figure><img alt='{html.escape(title)}' "
            f"src='{as_data_url(figure)}'><figcaption>{html.escape(title)}"
            "</figcaption></figure>"
            for title, figure in pictures.items()
        ),
        model="".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in facts.items()
        ),
        notice=html.escape(NOT_A_DEVICE),
        test_object=TEST_OBJECT if bundle.is_test_object else "",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def model_facts(bundle: Bundle) -> dict[str, Any]:
    """The model in a few lines: what, from whom it learned, how good."""
    manifest = bundle.manifest
    training = manifest["training"]
    facts = {
        "model": bundle.title,
        "run": manifest["run"],
        "made": manifest["created"],
        "training ages": f"{training['age_low']:.0f} to {training['age_high']:.0f} years",
        "licence of the weights": manifest["licence"],
    }
    for split, figures in manifest["figures"].items():
        mae, mean = figures["mae"]["value"], figures["mean_predictor_mae"]["value"]
        name = f"mean absolute error, {split.replace('_', ' ')} scans"
        facts[name] = f"{mae:.1f} years (n = {figures['n']}; always saying the mean age: {mean:.1f})"
    return facts


def file_stem(name: str) -> str:
    """A scan's name without image endings, for the name of a download."""
    return re.sub(r"(\.nii)?(\.gz)?$|\.mg[hz]$", "", name) or "scan"


def as_data_url(figure: Figure) -> str:
    """A figure as a PNG inside the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _with_members(result: Prediction | Failure) -> dict[str, Any]:
    row = result.to_dict()
    if isinstance(result, Prediction):
        row["members"] = [round(value, 4) for value in result.members]
        row["warnings"] = [caution._asdict() for caution in result.warnings]
        del row["explanation"]
    return row


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula (a file may be named `=1+1.nii`) is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t") else value


TEST_OBJECT = (
    "<p class='test'>This model was trained on invented heads, to test the kit. Its ages mean nothing for "
    "people.</p>"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Brain age: {scan}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
<h1>Brain age of {scan}</h1>
<p class="age">{age} <small>years, predicted</small></p>
<table>{rows}</table>
{test_object}
<h2>Warnings</h2><ul>{warnings}</ul>
{pictures}
<h2>The model</h2><table>{model}</table>
<p class="notice">{notice}</p>
<footer>Made {made} with brainage-nb {version}.</footer>
</body></html>
"""
