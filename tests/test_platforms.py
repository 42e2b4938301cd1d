"""The platform layer: which platform, where files live, who is asked, and secrets that stay secret."""

import sys
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest

from brainage_nb import platforms
from brainage_nb.platforms import DriveNotMounted
from brainage_nb.sources.opening import SourceSettings
from brainage_nb.workspace import open_workspace, write_json

A_RESULT = {"status": "complete", "duration_s": 1, "parameters": {}, "written": []}
MARKS = ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "BRAINAGE_WORKSPACE", "BRAINAGE_SCRATCH")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in MARKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Colab with its folders below tmp_path; `mounted` lists the calls that mounted Drive."""
    calls = []
    drive = ModuleType("google.colab.drive")
    drive.mount = lambda place: (calls.append(place), platforms.MY_DRIVE.mkdir(parents=True))
    package = ModuleType("google.colab")
    package.drive = drive
    for name, module in {"google.colab": package, "google.colab.drive": drive}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setattr(platforms, "COLAB_DISK", tmp_path)
    monkeypatch.setattr(platforms, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(platforms, "MY_DRIVE", tmp_path / "drive" / "MyDrive")
    return SimpleNamespace(mounted=calls, drive=tmp_path / "drive" / "MyDrive", disk=tmp_path)


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setattr(platforms, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(platforms, "KAGGLE_OUTPUT", tmp_path / "working")
    return tmp_path


def a_person_is_there(monkeypatch, answer=True):
    monkeypatch.setattr(platforms, "can_answer", lambda: answer)


def test_kaggle_is_recognised_although_it_carries_colab_marks(monkeypatch):
    assert platforms.platform() == "local"
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert platforms.platform() == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert platforms.platform() == "kaggle"


def test_drive_is_the_default_only_where_it_is_mounted(colab):
    assert platforms.default_root() == colab.disk / "brainage"
    colab.drive.mkdir(parents=True)
    assert platforms.default_root() == colab.drive / "brainage"


def test_a_workspace_on_drive_mounts_it_where_a_person_can_answer(colab, monkeypatch):
    a_person_is_there(monkeypatch)
    open_workspace(colab.drive / "brainage")
    assert colab.mounted == [str(colab.drive.parent)]
    open_workspace(colab.drive / "brainage")
    assert len(colab.mounted) == 1  # it is there now


def test_headless_it_is_never_mounted_and_nothing_is_written_in_its_place(colab):
    with pytest.raises(DriveNotMounted, match="nobody can answer"):
        open_workspace(colab.drive / "brainage")
    assert colab.mounted == []
    assert not colab.drive.parent.exists()


def test_a_front_end_that_takes_input_is_a_person(monkeypatch):
    kernel = SimpleNamespace(_allow_stdin=True)
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace(kernel=kernel)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert platforms.can_answer()
    kernel._allow_stdin = False
    assert not platforms.can_answer()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not platforms.can_answer()


def test_scans_not_found_on_colab_are_looked_for_on_drive(colab):
    with pytest.raises(FileNotFoundError, match="Drive is not mounted: mount it"):
        SourceSettings(source="folder", data_dir="my_scans")
    (colab.drive / "my_scans").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"It is on Drive: set {colab.drive}/my_scans"):
        SourceSettings(source="folder", data_dir="my_scans")
    (colab.drive / "ages.csv").touch()
    with pytest.raises(FileNotFoundError, match=f"It is on Drive: set {colab.drive}/ages.csv"):
        SourceSettings(source="folder", data_dir=str(colab.drive / "my_scans"), table="ages.csv")


def test_heavy_work_leaves_drive_for_the_local_disk_one_folder_a_workspace(colab, monkeypatch, tmp_path):
    colab.drive.mkdir(parents=True)
    one, other = open_workspace(colab.drive / "one"), open_workspace(colab.drive / "other")
    assert one.scratch.parent == colab.disk / "brainage_local"
    assert one.scratch != other.scratch
    assert open_workspace(colab.disk / "here").scratch is None
    monkeypatch.setenv("BRAINAGE_SCRATCH", str(tmp_path / "ssd"))
    assert open_workspace(colab.disk / "here").scratch.parent == tmp_path / "ssd"


def test_what_is_lost_with_the_session_is_said(colab):
    colab.drive.mkdir(parents=True)
    assert platforms.how_long_kept(colab.drive / "brainage") == "on Drive: kept"
    assert "LOST" in platforms.how_long_kept(colab.disk / "brainage")


def test_a_new_workspace_on_kaggle_goes_on_from_the_newest_attached_one(kaggle, capsys):
    for slug, day in {"old": "2026-01-01", "datasets/me/new": "2026-02-01"}.items():
        attached = kaggle / "input" / slug / "brainage"
        write_json({"format": 1}, attached / "brainage_workspace.json")
        write_json(A_RESULT | {"finished": day}, attached / "results" / "01_data_access.json")
        (attached / "cohort.csv").write_text(slug)
    ws = open_workspace()
    assert ws.path("cohort.csv").read_text() == "datasets/me/new"
    assert "the newest of 2" in capsys.readouterr().out
    ws.path("cohort.csv").write_text("mine now")
    assert open_workspace().path("cohort.csv").read_text() == "mine now"


def test_tables_of_a_session_show_reasons_whole(tmp_path):
    with pd.option_context("display.max_colwidth", 50):
        platforms.session_summary(tmp_path)
        reason = "No brain was found that could be trusted: " + "it looks unlike a brain, " * 5 + "so."
        assert reason in pd.DataFrame({"reason": [reason]})._repr_html_()
