"""The result part of the prediction app's page: the number, its warnings, slices with heat, downloads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from brainage_nb.apps import documents
from brainage_nb.apps.app_parts import as_text
from brainage_nb.apps.turns import one_at_a_time
from brainage_nb.models.bundles.prediction import Failure, Prediction
from brainage_nb.models.explain import Explanation, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from brainage_nb.models.bundle import Bundle

SEVERE = ("unlike_training", "extreme_voxel_size")
PLANE_NAMES = ("Left to right", "Back to front", "Bottom to top")


def show_results(bundle: Bundle) -> None:
    """Everything about the predicted scans, if there are any."""
    results = st.session_state.get("results")
    if not results:
        return
    st.header("3 · Result", anchor=False)
    place = 0
    if len(results) > 1:
        _overview(results)
        names = [f"{number}. {result.scan}" for number, result in enumerate(results, start=1)]
        place = names.index(st.selectbox("Scan to look at", names, key="chosen"))
    chosen = results[place]
    if isinstance(chosen, Failure):
        st.error(chosen.sentence, icon=":material/error:")
        _downloads(bundle, results, {})
    else:
        _downloads(bundle, results, {place: _show_one(bundle, chosen, place)})


def _overview(results: Sequence[Prediction | Failure]) -> None:
    rows = [
        {
            "Scan": result.scan,
            "age": getattr(result, "predicted_age", None),
            "Interval [years]": result.interval_text if isinstance(result, Prediction) else "",
            "gap": getattr(result, "gap", None),
            "Warnings": str(len(result.warnings)) if isinstance(result, Prediction) else "no result",
        }
        for result in results
    ]
    columns = {
        "age": st.column_config.NumberColumn("Predicted age [years]", format="%.1f"),
        "gap": st.column_config.NumberColumn("Gap [years]", format="%+.1f"),
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True, column_config=columns)


def _show_one(bundle: Bundle, prediction: Prediction, place: int) -> dict[str, Figure]:
    """One scan's result; returns the pictures shown, for the downloaded page."""
    with st.container(border=True, key="result"):
        _numbers(prediction)
        _warnings(prediction)
    slices, position, details = st.tabs(["Where it comes from", "Among held-out scans", "Details"])
    with slices:
        pictures = {"Slices with heat map": _slices(bundle, prediction, place)}
    with position:
        pictures["Among held-out scans"] = _position(bundle, prediction)
    with details:
        st.dataframe(prediction.frame())
        st.dataframe(pd.DataFrame({"value": {k: str(v) for k, v in documents.model_facts(bundle).items()}}))
    return pictures


def _numbers(prediction: Prediction) -> None:
    st.caption(as_text(prediction.scan))
    columns = st.columns(3)
    columns[0].metric("Predicted age [years]", f"{prediction.predicted_age:.1f}")
    if prediction.level == prediction.level:
        columns[1].metric(f"{prediction.level:.0%} interval [years]", prediction.interval_text)
    if prediction.gap is not None:
        columns[2].metric("Gap: predicted minus true [years]", f"{prediction.gap:+.1f}")
    sentences = [
        f"For about {prediction.level * 10:.0f} of 10 people like those the model was checked on, the true "
        f"age lies between {prediction.low:.0f} and {prediction.high:.0f}."
        if prediction.low > float("-inf")
        else "",
        f"Corrected for the model's bias towards the mean: {prediction.corrected_age:.1f} years."
        if prediction.corrected_age is not None
        else "",
        f"The gap less what is usual at age {prediction.age:.0f}: {prediction.adjusted_gap:+.1f} years."
        if prediction.adjusted_gap is not None
        else "",
    ]
    st.markdown(" ".join(filter(None, sentences)))


def _warnings(prediction: Prediction) -> None:
    for caution in prediction.warnings:
        show = st.error if caution.code in SEVERE else st.warning
        show(caution.sentence, icon=":material/warning:")


def _slices(bundle: Bundle, prediction: Prediction, place: int) -> Figure:
    from matplotlib.figure import Figure

    from brainage_nb.models.explaining.plots import overlay_planes, strongest

    explanation = _explained(bundle, prediction, place)
    start = strongest(prediction.volume, explanation.heat)
    last = len(prediction.volume) - 1
    columns = st.columns(4)
    at = [
        column.slider(name, 0, last, where, key=f"{name}-{place}")
        for column, name, where in zip(columns, PLANE_NAMES, start, strict=False)
    ]
    opacity = columns[3].slider("Heat map", 0, 100, 60, 10, format="%d%%", key=f"opacity-{place}") / 100
    figure = Figure(figsize=(11, 3.9), layout="constrained", facecolor="black")
    axes = figure.subplots(1, 3)
    overlay_planes(
        axes, prediction.volume, explanation.heat, at, opacity=opacity, spacing_mm=explanation.spacing_mm
    )
    for ax in axes:
        ax.title.set_color("white")
    st.pyplot(figure, clear_figure=False)
    st.caption(
        f"{explanation.title}. Vermilion raises the age, blue lowers it. A heat map shows what the model "
        "used, not what is wrong with a brain."
    )
    return figure


def _explained(bundle: Bundle, prediction: Prediction, place: int) -> Explanation:
    known = st.session_state.setdefault("explanations", {})
    if place not in known:
        with st.spinner("Computing the heat map"), one_at_a_time():
            known[place] = explain(bundle, prediction)
    return known[place]


def _position(bundle: Bundle, prediction: Prediction) -> Figure:
    from matplotlib.figure import Figure

    from brainage_nb.models.explaining.plots import age_among_held_out

    figure = Figure(figsize=(6, 4.4), layout="constrained")
    age_among_held_out(figure.subplots(), prediction, bundle.manifest["position"])
    st.pyplot(figure, width=620, clear_figure=False)
    return figure


def _downloads(
    bundle: Bundle, results: Sequence[Prediction | Failure], pictures: dict[int, dict[str, Figure]]
) -> None:
    columns = st.columns([2, 2, 2, 4])
    columns[0].download_button(
        "CSV, all scans",
        documents.result_csv(results),
        "brain_age.csv",
        "text/csv",
        on_click="ignore",
        width="stretch",
    )
    columns[1].download_button(
        "JSON, all scans",
        documents.result_json(results, bundle),
        "brain_age.json",
        "application/json",
        on_click="ignore",
        width="stretch",
    )
    for place, shown in pictures.items():
        columns[2].download_button(
            "Page to print, this scan",
            documents.result_page(results[place], bundle, shown),
            f"brain_age_{documents.file_stem(results[place].scan)}.html",
            "text/html",
            on_click="ignore",
            width="stretch",
        )
