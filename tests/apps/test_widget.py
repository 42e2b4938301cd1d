import datetime

import IPython.display
import ipywidgets
import pandas as pd
import pytest
from matplotlib.figure import Figure

from brainage_nb.apps.widget import (
    LiveCurve,
    PredictionWidget,
    history_figure,
    result_figure,
    uploaded,
    workspace_scans,
)
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Failure
from brainage_nb.predict.explain import age_among_held_out, explain
from tests.models.tiny_bundle import write_fused_bundle, write_scan, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


def test_a_chosen_scan_is_predicted_and_shown(bundle, tmp_path):
    scan = write_scan(tmp_path / "a.nii", 5)
    widget = PredictionWidget(bundle, {"a": (scan, 44.0)})
    result = widget.predict()
    assert result.predicted_age == pytest.approx(bundle.predict(scan).predicted_age, abs=1e-5)
    assert result.gap == pytest.approx(result.predicted_age - 44)
    assert bytes(widget.picture.value).startswith(b"\x89PNG")


def test_moving_a_slider_draws_another_slice(bundle, tmp_path):
    widget = PredictionWidget(bundle, {"a": (write_scan(tmp_path / "a.nii", 5), None)})
    widget.predict()
    before = widget.picture.value
    widget.sliders[2].value = widget.sliders[2].value - 4
    assert widget.picture.value != before


def upload(field, name, content):
    """Give a field a file, as a browser does."""
    about = {"name": name, "type": "", "size": 1, "last_modified": datetime.datetime.now(datetime.UTC)}
    if ipywidgets.__version__ < "8":
        field.set_trait("value", {name: {"metadata": about, "content": content}})
    else:
        field.value = (about | {"content": content},)


def test_an_upload_counts_before_the_list_and_a_bad_one_is_said(bundle, tmp_path):
    scan = write_scan(tmp_path / "a.nii", 5)
    widget = PredictionWidget(bundle, {"a": (scan, None)})
    files = {
        "b.nii": write_scan(tmp_path / "b.nii", 6).read_bytes(),
        "bad.nii": b"no scan",
    }
    for name, content in files.items():
        upload(widget.upload, name, content)
        result = widget.predict()
    assert isinstance(result, Failure) and "neither a NIfTI" in widget.said.value
    assert widget.prediction.scan == "b.nii"


def test_further_scans_of_the_session_count_and_go_with_the_scan_they_were_given_for(tmp_path):
    fused = load_bundle(write_fused_bundle(tmp_path / "fused"))
    t1, t2 = (write_scan(tmp_path / f"{name}.nii", n) for n, name in enumerate(("t1", "t2"), 5))
    alone, both = (fused.predict(t1, also=also).predicted_age for also in ({}, {"T2w": t2}))
    assert abs(both - alone) > 0.01
    widget = PredictionWidget(fused, {"a": (t1, None), "b": (t1, None)})
    upload(widget.others["T2w"], "t2.nii", t2.read_bytes())
    assert widget.predict().predicted_age == pytest.approx(both, abs=1e-4)
    widget.choice.value = "b"
    assert not widget.others["T2w"].value
    upload(widget.others["T2w"], "t2.zip", b"PK\x03\x04 no zip")
    assert widget.predict().predicted_age == pytest.approx(alone, abs=1e-4)
    assert "damaged or encrypted" in widget.said.value


def test_an_age_that_is_no_number_is_said(bundle, tmp_path):
    widget = PredictionWidget(bundle, {"a": (write_scan(tmp_path / "a.nii", 5), None)})
    widget.age.value = "fifty"
    assert isinstance(widget.predict(), Failure) and "expected years" in widget.said.value


def test_a_typed_age_is_forgotten_when_another_scan_is_chosen(bundle, tmp_path):
    scans = {name: (write_scan(tmp_path / f"{name}.nii", 5), age) for name, age in {"a": 44, "b": 66}.items()}
    widget = PredictionWidget(bundle, scans)
    widget.age.value = "50"
    assert widget.predict().age == 50
    widget.choice.value = "b"
    assert widget.predict().age == 66


def test_the_legend_of_the_position_plot_covers_no_point(bundle, tmp_path):
    result = bundle.predict(write_scan(tmp_path / "a.nii", 5), 44)
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    ax = age_among_held_out(figure.subplots(), result, bundle.manifest["position"])
    figure.canvas.draw()
    assert not ax.get_legend().get_window_extent().overlaps(ax.bbox)


def test_uploads_of_both_ipywidgets_versions_are_read():
    seven = {"a.nii": {"metadata": {"name": "a.nii"}, "content": b"abc"}}
    eight = ({"name": "a.nii", "content": memoryview(b"abc")},)
    for value in (seven, eight):
        (file,) = uploaded(value)
        assert (file.name, file.getvalue()) == ("a.nii", b"abc")
    assert uploaded({}) == uploaded(()) == []


def test_the_static_figure_says_what_the_widget_says(bundle, tmp_path):
    result = bundle.predict(write_scan(tmp_path / "a.nii", 5), 44)
    figure = result_figure(bundle, result, explain(bundle, result))
    texts = [text.get_text() for part in figure.subfigs for sub in (part, *part.axes) for text in sub.texts]
    assert any(f"{result.predicted_age:.1f}" in text and f"{result.gap:+.1f}" in text for text in texts)


def test_the_list_holds_test_scans_whose_files_are_there(tmp_path):
    write_scan(tmp_path / "b.nii")
    rows = pd.DataFrame(
        {
            "scan_id": ["c", "b", "a"],
            "split": ["test", "test", "train"],
            "image": ["c.nii", "b.nii", "b.nii"],
            "age": 50,
        }
    )
    assert workspace_scans(rows, lambda image: tmp_path / image) == {"b": (tmp_path / "b.nii", 50.0)}


class Handle:
    updates = 0

    def update(self, figure):
        self.updates += 1


def a_history(epochs):
    rows = [
        {"fold": -1, "seed": 1, "epoch": n, "train_loss": 9 - n, "val_loss": 10 - n} for n in range(epochs)
    ]
    return pd.DataFrame(rows).assign(train_mae=5.0, val_mae=6.0)


def test_it_draws_once_and_then_updates_no_more_often_than_asked(monkeypatch):
    shown = []
    monkeypatch.setattr(
        IPython.display, "display", lambda figure, display_id: shown.append(Handle()) or shown[-1]
    )
    eager, slow = LiveCurve(every_s=0), LiveCurve(every_s=1000)
    for epochs in (1, 2, 3):
        eager(a_history(epochs))
        slow(a_history(epochs))
    assert [handle.updates for handle in shown] == [2, 0]


def test_the_figure_shows_loss_and_error_of_every_epoch():
    loss, error = history_figure(a_history(4)).axes
    assert list(loss.get_lines()[0].get_ydata()) == [9, 8, 7, 6]
    assert "years" in error.get_ylabel()
