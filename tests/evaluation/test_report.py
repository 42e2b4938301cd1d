import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from brainage_nb.evaluation.evaluate import evaluate_runs
from brainage_nb.evaluation.external import evaluate_external
from brainage_nb.evaluation.plots import draw_figures
from brainage_nb.evaluation.report import (
    as_html_table,
    dropped_table,
    flat_settings,
    model_card,
    write_report,
)
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import read_json, write_json
from tests.evaluation.fake_workspace import cohort_frame, simulated, write_run, write_workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    scans = cohort_frame(160, diagnosis=True)
    ws = write_workspace(tmp_path_factory.mktemp("report"), scans, demo=True)
    write_run(ws, "resnet18", scans, simulated(scans))
    write_report(evaluate_runs(ws, n_bootstrap=50))
    return ws.path("evaluation")


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_file_of_the_contract_is_written(folder):
    assert {"results.json", "predictions.csv", "report.html", "model_card.md", "figures"} <= {
        path.name for path in folder.iterdir()
    }
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    assert len(figures) == 10 and "predicted_vs_true_resnet18.png" in figures


def test_every_figure_of_a_run_carries_its_name_and_none_is_drawn_twice(tmp_path, monkeypatch):
    scans = cohort_frame(160, diagnosis=True)
    ws = write_workspace(tmp_path, scans, demo=True)
    for name in ("one", "two"):
        write_run(ws, name, scans, simulated(scans))
    evaluation = evaluate_runs(ws, n_bootstrap=20)
    figures = draw_figures(evaluation)
    named = [drawn for drawn in figures if drawn.name.endswith(("_one", "_two"))]
    assert len(named) == 2 * 8
    for drawn in named:
        name = drawn.name.rpartition("_")[2]
        assert drawn.figure.get_suptitle() == name and drawn.caption.startswith(f"{name}")
    monkeypatch.setattr("brainage_nb.evaluation.report.draw_figures", lambda evaluation: 1 / 0)
    page = write_report(evaluation, figures)[0]
    shown = re.findall(r'<figure id="([^"]+)"', page.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(drawn.name for drawn in figures)


def test_results_can_be_read_back_with_each_metric_as_value_low_high(folder):
    test = read_json(folder / "results.json")["resnet18"]["test"]
    assert test["mae"]["low"] < test["mae"]["value"] < test["mae"]["high"]


def test_the_page_needs_no_other_file_and_no_network(page):
    links = re.findall(r'(?:src|href)="([^"]{1,40})', page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "<script" not in page and "url(" not in page


def test_the_page_has_every_section_a_reader_needs(page):
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "Read this first",
        "Result",
        "What data",
        "What was dropped",
        "Splits",
        "Training",
        "Predicted against true age",
        "Gap against age, raw and corrected",
        "Prediction intervals",
        "Groups",
        "Rate of ageing",
        "Models side by side",
        "Known answers",
        "Settings and versions",
        "Words",
    ]
    for anchor in re.findall(r'href="#(\w+)"', page):
        assert f'id="{anchor}"' in page


def test_a_built_cohort_is_called_a_test_object_in_report_and_card(folder, page):
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert "It is a test object" in text
    assert "Not for scans of people" in card


def test_the_card_gives_raw_figures_with_intervals_beside_the_mean_predictor(folder):
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    test = read_json(folder / "results.json")["resnet18"]["test"]
    for metric, name in (("mae", "MAE"), ("mean_predictor_mae", "mean predictor's MAE")):
        assert f"| {name} [years] | {test[metric]['value']:.2f} [{test[metric]['low']:.2f}" in card
    for section in ("Intended use", "Not intended", "Data", "Limits", "How it was made"):
        assert f"## {section}" in card


def test_names_of_sites_and_groups_are_no_markup_in_the_card(tmp_path):
    scans = cohort_frame(160, diagnosis=True)
    scans["site"] = ["a|b", "<script>*x* [y](z)"] * (len(scans) // 2)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "resnet18", scans, simulated(scans))
    card = model_card(evaluate_runs(ws, n_bootstrap=20))
    assert r"Sites: &lt;script&gt;\*x\* [y]\(z), a\|b." in card and r"| site | a\|b |" in card
    assert "<script>" not in card and "## Accuracy" in card


def test_the_card_of_a_named_recipe_says_what_it_reached_elsewhere_and_what_that_does_not_show(
    tmp_path, folder
):
    scans = cohort_frame(60)
    ws = write_workspace(tmp_path, scans, demo=False)
    write_run(ws, "resnet18", scans, simulated(scans))
    cards = {}
    brightness = PreprocessingSettings(brain_only=True, to_mni=True).to_json() | {"recipe": "best"}
    for name, prepared in {
        "best": PreprocessingSettings.of_recipe("best").to_json(),
        "older": brightness,  # what an earlier release called best
        "unknown": brightness | {"fingerprint": "2mm-96-0"},
    }.items():
        path = ws.run("resnet18") / "settings.json"
        write_json(read_json(path) | {"recipe": "best", "preprocessing": prepared}, path)
        cards[name] = model_card(evaluate_runs(ws, n_bootstrap=20))
    assert "121 people (IXI, one scanner" in cards["best"] and "MAE 5.48 years [4.78, 6.25]" in cards["best"]
    assert (
        "one scanner, 20 to 82 years" in cards["best"]
        and "neither is the model of this card" in cards["best"]
    )
    assert "reached elsewhere" not in cards["older"] + cards["unknown"]
    assert "reached elsewhere" not in (folder / "model_card.md").read_text(encoding="utf-8")  # invented heads


def test_no_corrected_error_is_shown_as_accuracy(folder, page):
    results = read_json(folder / "results.json")
    corrected = results["_age_free_corrected"]["resnet18"]["test"]["mae"]["value"]
    assert f"{corrected:.2f} [" not in page and f"{corrected:.2f}&nbsp;[" not in page
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert f"{corrected:.2f}" not in card
    for text, said in ((page, "Corrected so, predictions"), (card, "Predictions corrected by this line")):
        assert f"{said} err by {corrected:.1f} [" in text.replace("&nbsp;", " ")  # its own error, named so


def test_what_has_no_data_is_said_in_a_line_instead_of_an_empty_figure(tmp_path):
    scans = cohort_frame(40)
    ws = write_workspace(tmp_path, scans)
    (write_run(ws, "plain", scans, simulated(scans)) / "history.csv").unlink()
    write_report(evaluate_runs(ws, n_bootstrap=20))
    text = ws.path("evaluation", "report.html").read_text(encoding="utf-8")
    assert "No diagnosis could be compared" in text and "left no curve" in text
    assert "Known answers" not in text and "test object" not in text
    names = {path.stem for path in ws.path("evaluation", "figures").iterdir()}
    assert not [name for name in names if name.startswith(("training", "diagnosis", "planted", "intervals"))]
    assert "cannot support a 90% interval" in text
    assert np.isinf(pd.read_csv(ws.path("evaluation", "predictions.csv"))["high"]).all()


def test_one_test_subject_gives_a_report_without_nan(tmp_path):
    scans = cohort_frame(8).assign(split=["train", "train", "val", "train", "train", "val", "train", "test"])
    ws = write_workspace(tmp_path, scans, demo=True)
    write_run(ws, "tiny", scans, simulated(scans))
    evaluation = evaluate_runs(ws, n_bootstrap=20)
    figures = draw_figures(evaluation)
    written = write_report(evaluation, figures)
    texts = [path.read_text(encoding="utf-8") for path in written if path.suffix in (".html", ".md")]
    texts += [text.get_text() for drawn in figures for text in drawn.figure.findobj(Text)]
    assert len(figures) > 5 and not [text for text in texts if re.search(r"\bnan\b", text)]


def test_what_was_dropped_is_counted_with_an_example(tmp_path, page):
    ws = write_workspace(tmp_path, cohort_frame(20))
    (row,) = dropped_table(ws).to_dict("records")
    assert row == {"reason": "unreadable", "scans": 2, "for example": "odd1: The file ends early."}
    assert row["for example"] in page


def test_another_cohort_has_its_section_with_raw_figures_and_no_names(tmp_path):
    scans = cohort_frame(100)
    ws = write_workspace(tmp_path, scans)
    write_run(ws, "resnet18", scans, simulated(scans))
    elsewhere = cohort_frame(50, seed=9).assign(subject_id=lambda rows: "secret" + rows["subject_id"])
    elsewhere["predicted_age"] = simulated(elsewhere)
    evaluation = evaluate_runs(ws, n_bootstrap=20)
    evaluation.external["OASIS"] = evaluate_external(
        elsewhere,
        reference_age=50.0,
        trained_ages=(20.0, 60.0),
        calibrate_on=elsewhere["subject_id"].head(10).tolist(),
        n_bootstrap=20,
    )
    write_report(evaluation)
    text = ws.path("evaluation", "report.html").read_text(encoding="utf-8")
    assert "Other cohorts" in text and "an offset on 10 named controls" in text and "extrapolations" in text
    assert "secret" not in text + ws.path("evaluation", "results.json").read_text(encoding="utf-8")
    assert read_json(ws.path("evaluation", "results.json"))["_external"]["OASIS"]["metrics"]["n"] == 50
    assert ws.path("evaluation", "figures", "external_OASIS.png").exists()


def test_nested_settings_become_one_row_each_without_repetition():
    nested = {
        "variant": "mean",
        "device": "CPU",
        "settings": {"epochs": 3, "device": "auto", "augmentation": {"flip": 0.123456789}},
        "identity": {"epochs": 3},
    }
    flat = {"variant": "mean", "device": "CPU", "epochs": "3", "augmentation.flip": "0.1235"}
    assert flat_settings(nested) == flat


def test_text_from_tables_cannot_become_markup():
    html = str(as_html_table(pd.DataFrame({"site": ["<script>x</script>"], "mae": ["7.10 [6.20, 8.00]"]})))
    assert "<script>" not in html and "7.10&nbsp;[6.20,&nbsp;8.00]" in html


def test_importing_the_report_needs_no_torch_and_no_pyplot():
    code = (
        "import sys, brainage_nb.evaluation.report; "
        "print([name for name in ('torch', 'monai', 'matplotlib.pyplot', 'sklearn', 'statsmodels') if name "
        "in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
