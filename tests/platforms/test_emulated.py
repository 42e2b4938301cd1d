"""The notebooks from a badge's state, package not installed, on emulated Colab and Kaggle."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from tests.platforms.emulation import ADDED, Emulated
from tests.platforms.resolution import ROOT
from tests.platforms.served import serve_index

FIRST = "01_data_access"
SMALL = {
    "01_data_access": {"n_subjects": 26, "demo_voxel_mm": 2.0},
    "02_data_cleaning": {},
    "03_preprocessing_preview": {"spacing_mm": 6.0, "size": 32, "recipe": "reference"},
    "04_train_resnet18": {"epochs": 2, "batch_size": 4},
    "05_train_vgg16_svr": {"vgg_weights": "random_projection", "image_size": 32},
    "06_evaluate": {"n_bootstrap": 200},
    "07_predict_and_explain": {},
}


def all_notebooks() -> list[dict]:
    return [{"notebook": name, "parameters": values} for name, values in SMALL.items()]


def wheel_set(folder, scratch):
    """The offline data set, made by its own script for this Python, from an index that is a folder."""
    serve_index(scratch, [*ADDED, "setuptools"])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    facts = {"kaggle-base": {"python": python, "added": {name: metadata.version(name) for name in ADDED}}}
    (scratch / "facts.json").write_text(json.dumps(facts))
    command = [sys.executable, ROOT / "kaggle" / "make_wheels.py", "--owner", "someone", "--into", folder]
    index = {"PIP_INDEX_URL": f"file://{scratch}/simple", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run([*command, "--facts", scratch / "facts.json"], check=True, env=os.environ | index)
    return folder


@pytest.fixture
def kaggle_offline(tmp_path):
    platform = Emulated("kaggle", tmp_path)
    wheel_set(platform.path("/kaggle/input/datasets/someone/brainage-nb-wheels"), tmp_path / "scratch")
    return platform


def complete(reports):
    """Fail with what the first notebook that did not end said."""
    for report in reports:
        assert report["ended"] == "complete", (
            f"{report['step']}: {report['error']}\n{report['output'][-3000:]}"
        )
    return reports


def is_ready(report):
    """Whether set-up's last line is among what a notebook printed."""
    return "brainage_nb 0.1.0 is ready. Added: " in report["output"]


def result(platform, root, notebook):
    return json.loads((platform.path(root) / "results" / f"{notebook}.json").read_text())


def test_on_colab_a_badge_s_notebook_sets_itself_up_from_the_release_and_works_on_drive(tmp_path):
    platform = Emulated("colab", tmp_path, online=True)
    platform.path("/content/drive/MyDrive").mkdir(parents=True)
    first = {"notebook": FIRST, "parameters": {"n_subjects": 4, "demo_voxel_mm": 2.0}}
    (report,) = complete(platform.run([first]))
    assert is_ready(report), report["output"]
    left = result(platform, "/content/drive/MyDrive/brainage", FIRST)
    assert (left["status"], left["platform"], left["figures"]["subjects"]) == ("complete", "colab", 4)
    executed = (platform.folder / "executed" / f"{FIRST}.ipynb").read_text()
    assert executed.count('"image/png"') == 2  # although the session draws to files only


@pytest.mark.slow
def test_on_kaggle_without_internet_it_sets_itself_up_from_the_wheel_set(kaggle_offline):
    reports = complete(kaggle_offline.run([{"notebook": FIRST, "setup_only": True}] * 2))
    assert [is_ready(report) for report in reports] == [True, False], reports  # the second finds it installed


def test_without_internet_and_without_the_wheel_set_the_setup_cell_says_what_to_attach(tmp_path):
    (report,) = Emulated("kaggle", tmp_path).run([{"notebook": FIRST}])
    assert report["ended"] == "failed"
    assert "No internet? Attach the wheel data set" in report["error"]


@pytest.mark.slow
def test_every_notebook_runs_to_its_end_on_colab_from_the_served_repository(tmp_path):
    platform = Emulated("colab", tmp_path, online=True)
    platform.path("/content/drive/MyDrive").mkdir(parents=True)
    reports = complete(platform.run(all_notebooks()))
    assert [is_ready(report) for report in reports] == [True] + [False] * 6  # installed once
    for name in SMALL:
        assert result(platform, "/content/drive/MyDrive/brainage", name)["status"] == "complete"
    assert list(platform.path("/content/brainage_local").rglob("shard-0000.npy"))


@pytest.mark.slow
def test_every_notebook_runs_to_its_end_on_kaggle_from_the_wheel_set(kaggle_offline):
    reports = complete(kaggle_offline.run(all_notebooks()))
    assert is_ready(reports[0])
    for name in SMALL:
        assert result(kaggle_offline, "/kaggle/working/brainage", name)["status"] == "complete"


@pytest.mark.slow
def test_the_kernel_that_runs_them_all_leaves_a_report(kaggle_offline):
    given = " ".join(f"{name}={value}" for values in SMALL.values() for name, value in values.items())
    step = {"notebook": "../kaggle/run_all/run_all", "parameters": {"settings": given}}
    complete(kaggle_offline.run([step]))
    assert (kaggle_offline.path("/kaggle/working/brainage/evaluation/report.html")).is_file()


@pytest.mark.slow
def test_each_kaggle_kernel_goes_on_from_the_output_of_the_one_before(kaggle_offline, tmp_path):
    working, attached = (kaggle_offline.path(name) for name in ("/kaggle/working", "/kaggle/input"))
    for number, step in enumerate(all_notebooks()[:4]):
        (report,) = complete(kaggle_offline.run([step]))
        assert ("Going on from the attached workspace" in report["output"]) == (number > 0)
        (working / "brainage").rename(attached / f"kernel-{number}")
    assert (attached / "kernel-3" / "runs" / "resnet18" / "predictions.csv").exists()
