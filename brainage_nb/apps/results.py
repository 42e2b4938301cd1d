"""What the prediction app shows of its results, and hands out: numbers, warnings, slices, files.

Needs Streamlit; computes nothing but heat maps.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st
from matplotlib.figure import Figure

from brainage_nb import __version__
from brainage_nb.cohort.images import image_stem
from brainage_nb.evaluation.rates import rate_one_person
from brainage_nb.predict.cautions import COLUMNS, NOT_A_DEVICE, Failure, Prediction
from brainage_nb.predict.explain import COLOURS, age_among_held_out, explain, strongest
from brainage_nb.workspace import guard_formula

if TYPE_CHECKING:
    from collections.abc import Mapping

    from brainage_nb.predict.bundle import Bundle

PLANE_NAMES = ("Left to right", "Back to front", "Bottom to top")


@st.cache_resource
def one_at_a_time() -> threading.Lock:
    """The lock all sessions of this server share: heavy work in turn, so that memory stays that of one."""
    return threading.Lock()


def as_text(name: str) -> str:
    """A name in which Markdown finds nothing to format."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|~$:&-])", r"\\\1", name)


# --- on the page ----------------------------------------------------------------------------------------


def show_results(bundle: Bundle) -> None:
    """Everything about the predicted scans, if there are any."""
    results = st.session_state.get("results")
    if not results:
        return
    st.header("3 · Result", anchor=False)
    place = 0
    if len(results) > 1:
        names = [f"{number}. {result.scan}" for number, result in enumerate(results, start=1)]
        _overview(names, results)
        place = names.index(st.selectbox("Scan to look at", names, key=_key("chosen")))
        _show_rate(results)
    chosen, pictures = results[place], {}
    if isinstance(chosen, Failure):
        st.error(chosen.sentence, icon=":material/error:")
    else:
        pictures = _show_one(bundle, chosen, place)
    _downloads(bundle, results, place, pictures)


def keep_results(results: list[Prediction | Failure]) -> None:
    """Show these from now on; what was chosen and moved for the last ones is forgotten."""
    st.session_state["results"] = results
    st.session_state["explanations"] = {}
    st.session_state["times kept"] = st.session_state.get("times kept", 0) + 1


def _key(name: str) -> str:
    return f"{name}-{st.session_state.get('times kept', 0)}"


def _overview(names: Sequence[str], results: Sequence[Prediction | Failure]) -> None:
    rows = [
        {
            "Scan": name,
            "Use": _say_use(result),
            "age": getattr(result, "predicted_age", None),
            "Interval [years]": result.interval_text if isinstance(result, Prediction) else "",
            "gap": getattr(result, "gap", None),
            "Warnings": str(len(result.warnings)) if isinstance(result, Prediction) else "",
        }
        for name, result in zip(names, results, strict=True)
    ]
    columns = {
        "Use": st.column_config.TextColumn("Use", width="small"),
        "age": st.column_config.NumberColumn("Predicted age [years]", format="%.1f"),
        "gap": st.column_config.NumberColumn("Gap [years]", format="%+.1f"),
    }
    table = pd.DataFrame(rows).dropna(axis=1, how="all")  # no column of gaps where no age was given
    st.dataframe(table, hide_index=True, column_config=columns)


def _show_rate(results: Sequence[Prediction | Failure]) -> None:
    """The rate of ageing from scans of one person, where two have a true age and somebody says they are."""
    known = [one for one in results if isinstance(one, Prediction) and one.age is not None]
    label = "The scans with a true age are of one person: show the rate of ageing"
    if len(known) < 2 or not st.checkbox(label, key=_key("one person")):
        return
    if refused := [one.scan for one in known if one.do_not_use_because]:
        said = f"No rate of ageing: the age of {', '.join(refused)} is not to be used."
    elif any(one.rates != known[0].rates for one in known):
        said = "No rate of ageing: the ages are fused from different scans. Give each visit the same kinds."
    else:
        scans = [one.age for one in known], [one.predicted_age for one in known]
        said = rate_one_person(known[0].rates, *scans)
    st.info(as_text(said))
    st.caption("It holds for scans of one scanner and protocol: a change of scanner can add years.")


def _say_use(result: Prediction | Failure) -> str:
    """A word for the overview."""
    if isinstance(result, Failure):
        return "no result"
    if result.do_not_use_because:
        return "do not use"
    return "with caution" if result.warnings else "yes"


def _show_one(bundle: Bundle, prediction: Prediction, place: int) -> dict[str, Figure]:
    """One scan's result; returns the pictures shown, for the downloaded page."""
    with st.container(border=True, key="result"):
        st.caption(as_text(prediction.scan))
        forbidding = [caution for caution in prediction.warnings if caution.forbids_use]
        for caution in forbidding:
            st.error(caution.sentence, icon=":material/block:")
        _numbers(prediction)
        for caution in prediction.warnings[len(forbidding) :]:
            st.warning(caution.sentence, icon=":material/warning:")
    slices, position, details = st.tabs(["Heat map", "Beside other people", "Details"])
    with slices:
        pictures = {"Slices with heat map": _slices(bundle, prediction, place)}
    with position:
        figure = Figure(figsize=(6, 4.9), layout="constrained")
        age_among_held_out(figure.subplots(), prediction, bundle.manifest["position"])
        st.pyplot(figure, width=620, clear_figure=False)
        st.caption(
            "Each dot is a person from whom the model did not learn. The further dots lie from the dashed "
            "line, the more the model erred."
        )
        pictures["Beside other people, from whom the model did not learn"] = figure
    with details:
        st.table(prediction.frame().drop(index="read first", errors="ignore"))
        facts = {as_text(name): as_text(str(value)) for name, value in model_facts(bundle).items()}
        st.table(pd.DataFrame({"value": facts}))
    return pictures


def _numbers(prediction: Prediction) -> None:
    usable = not prediction.do_not_use_because
    label = "Predicted age [years]" if usable else "Not to be used: predicted age [years]"
    columns = st.container(key="numbers" if usable else "numbers-not-to-be-used").columns(3)
    columns[0].metric(label, f"{prediction.predicted_age:.1f}")
    if prediction.level == prediction.level:
        ends = prediction.interval_text if isfinite(prediction.low) else "none"  # a warning says why
        columns[1].metric(f"{prediction.level:.0%} interval [years]", ends)
    if prediction.gap is not None:
        columns[2].metric("Gap: predicted minus true [years]", f"{prediction.gap:+.1f}")
    if usable:
        st.markdown(" ".join(_say_what_it_means(prediction)))
    if usable and isfinite(prediction.low):
        st.caption(as_text(f"{prediction.interval_title}."))


def _say_what_it_means(prediction: Prediction) -> Iterator[str]:
    """What the interval promises, how the gap stands to it, and what of the gap is the model's own pull."""
    bounded = isfinite(prediction.low) and isfinite(prediction.high)
    if bounded:
        yield (
            f"An interval like this one holds the true age of about {prediction.level * 10:.0f} in 10 people "
            "like those the model was checked on. It says how exact the model is, not which ages are healthy."
        )
    if bounded and prediction.gap is not None:
        inside = prediction.low <= prediction.age <= prediction.high
        place, size = ("in", "within") if inside else ("outside", "larger than")
        yield (
            f"The true age, {prediction.age:.1f}, lies {place} the interval: the gap is {size} the model's "
            "usual error."
        )
    if prediction.adjusted_gap is not None:
        yield (
            "Models pull ages to the middle. Allowing for that pull at this true age, the gap is "
            f"{prediction.adjusted_gap:+.1f}."
        )


def _slices(bundle: Bundle, prediction: Prediction, place: int) -> Figure:
    known = st.session_state["explanations"]
    if place not in known:
        with st.spinner("Computing the heat map"), one_at_a_time():
            known[place] = explain(bundle, prediction)
    start = strongest(prediction.volume, known[place].heat)
    last = len(prediction.volume) - 1
    columns = st.columns(4)
    at = [
        column.slider(name, 0, last, where, key=_key(f"{name}-{place}"))
        for column, name, where in zip(columns, PLANE_NAMES, start, strict=False)
    ]
    opacity = columns[3].slider(
        "Strength of colours", 0, 100, 60, 10, format="%d%%", key=_key(f"opacity-{place}")
    )
    for column, figure in zip(st.columns(3), known[place].planes(prediction, at, opacity / 100), strict=True):
        column.pyplot(figure)
    grey = "its share of grey matter" if bundle.settings.grey_matter else "its intensity"
    st.caption(
        f"Grey is the scan as the model saw it ({grey}). {COLOURS}. R and L are the head's right and left, "
        f"A and P front and back. {known[place].words} A heat map shows what moved this prediction, not what "
        "is wrong with a brain."
    )
    return known[place].picture(prediction, at, opacity=opacity / 100)


# --- to take away ---------------------------------------------------------------------------------------


def _downloads(
    bundle: Bundle,
    results: Sequence[Prediction | Failure],
    place: int,
    pictures: Mapping[str, Figure],
) -> None:
    files = [
        ("CSV, all scans", result_csv(results), "brain_age.csv", "text/csv"),
        ("JSON, all scans", result_json(results, bundle), "brain_age.json", "application/json"),
    ]
    if pictures:
        name = f"brain_age_{place + 1}_{image_stem(results[place].scan)}.html"
        page = result_page(results[place], bundle, pictures)
        files.append(("Page to print, this scan", page, name, "text/html"))
    for column, (label, content, name, kind) in zip(st.columns([2, 2, 2, 4]), files, strict=False):
        column.download_button(label, content, name, kind, on_click="ignore", width="stretch")


def result_json(results: Sequence[Prediction | Failure], bundle: Bundle) -> str:
    """All results with what made them, as JSON text."""
    rows = []
    for result in results:
        rows.append(result.to_dict())
        if isinstance(result, Prediction):
            rows[-1]["members"] = [round(value, 4) for value in result.members]
            rows[-1]["warnings"] = [caution._asdict() for caution in result.warnings]
            del rows[-1]["explanation"]
    content = {"model": model_facts(bundle), "notice": NOT_A_DEVICE, "unit": "years", "results": rows}
    return json.dumps(content, indent=2, allow_nan=False)


def result_csv(results: Sequence[Prediction | Failure]) -> str:
    """All results as CSV text, columns as of the command line."""
    frame = pd.DataFrame([result.to_dict() for result in results], columns=list(COLUMNS))
    return frame.map(guard_formula).to_csv(index=False, lineterminator="\n")


def result_page(prediction: Prediction, bundle: Bundle, pictures: Mapping[str, Figure]) -> str:
    """One page of HTML without outside references, to be kept or printed: figures, interval, warnings,
    model.
    """
    from jinja2 import Environment, PackageLoader

    rows = {
        "file": prediction.path,
        **prediction.frame()["value"].drop(index=["predicted age [years]", "read first"], errors="ignore"),
    }
    templates = Environment(loader=PackageLoader("brainage_nb.apps", "."), autoescape=True)
    return templates.get_template("page.html.j2").render(
        result=prediction,
        rows=rows,
        meaning="" if prediction.do_not_use_because else " ".join(_say_what_it_means(prediction)),
        bundle=bundle,
        model=model_facts(bundle),
        pictures={title: as_data_url(figure) for title, figure in pictures.items()},
        notice=NOT_A_DEVICE,
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
        "interval": bundle.interval.title if bundle.interval else "none: nothing was held out",
    }
    for split, figures in manifest["figures"].items():
        mae, mean = figures["mae"]["value"], figures["mean_predictor_mae"]["value"]
        part = {"val": "validation"}.get(split, split.replace("_", " "))
        name = f"mean absolute error, {part} scans"
        facts[name] = f"{mae:.1f} years (n = {figures['n']}; always saying the mean age: {mean:.1f})"
    return facts


def as_data_url(figure: Figure) -> str:
    """A figure as a PNG inside the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
