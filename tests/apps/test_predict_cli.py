import argparse

import pandas as pd
import pytest
import torch

from brainage_nb.apps import predict_cli
from brainage_nb.models.bundle import load_bundle
from brainage_nb.workspace import read_csv
from tests.models.tiny_bundle import write_scan, write_tiny_bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def run(*arguments):
    parser = argparse.ArgumentParser()
    predict_cli.add_parsers(parser.add_subparsers(required=True))
    options = parser.parse_args([str(argument) for argument in arguments])
    return options.command(options)


def test_scans_folders_and_ages_end_in_one_table(tiny, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, seed in {"sub-01_T1w.nii": 1, "sub-02_T1w.nii.gz": 2}.items():
        write_scan(scans / name, seed)
    table = tmp_path / "ages.csv"
    table.write_text("participant_id,age\n1,44\n2,66\n3,70\n")
    assert run("predict", "--bundle", tiny, scans, "--table", table, "--out", tmp_path / "out.csv") == 0
    rows = read_csv(tmp_path / "out.csv")
    expected = load_bundle(tiny).predict(scans / "sub-02_T1w.nii.gz", 66)
    assert rows["scan"].tolist() == ["sub-01_T1w.nii", "sub-02_T1w.nii.gz"]
    assert rows["predicted_age"][1] == pytest.approx(expected.predicted_age, abs=1e-4)
    assert rows["gap"][1] == pytest.approx(expected.gap, abs=1e-4)
    said = capsys.readouterr().out
    assert f"{expected.predicted_age:.1f}" in said and "not a medical device" in said


def test_scans_without_a_true_age_are_named_with_the_reason_and_the_notes_of_the_table(tmp_path, capsys):
    names = ["site1_001.nii", "site1_002.nii", "site2_003.nii", "site2_007.nii"]
    table = tmp_path / "ages.csv"
    table.write_text("id,age\n001,20\n002,50\n003,89+\n004,70\n")
    assert predict_cli.ages_of([tmp_path / name for name in names], str(table)) == [20, 50, None, None]
    said = capsys.readouterr().out
    assert "site2_003.nii: no true age: its row gives no usable age: " in said and "89+" in said
    assert "site2_007.nii: no true age: no id of the table is in its name" in said
    assert "ages.csv: subject_id is read from column 'id'." in said


def test_one_bad_scan_is_named_and_the_rest_go_on(tiny, tmp_path, capsys):
    good, bad = write_scan(tmp_path / "good.nii"), tmp_path / "bad.nii"
    bad.write_text("no scan")
    assert run("predict", "--bundle", tiny, bad, good, "--out", tmp_path / "out.csv") == 1
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows["predicted_age"].notna().tolist() == [False, True]
    assert rows["warnings"][0] == "unreadable" and "neither a NIfTI" in rows["explanation"][0]
    said = capsys.readouterr()
    assert "1 of 2 scans have no result" in said.err and "bad.nii" in said.out


def test_explain_writes_a_map_that_lies_on_the_scan(tiny, tmp_path):
    import nibabel as nib
    import numpy as np

    scan = write_scan(tmp_path / "a.nii.gz")
    assert run("predict", "--bundle", tiny, scan, "--explain", "--out", tmp_path / "out.csv") == 0
    folder = tmp_path / "out_heat_maps"
    assert sorted(path.name for path in folder.iterdir()) == ["a_heat.nii.gz", "a_heat.png"]
    heat, head = nib.load(folder / "a_heat.nii.gz"), nib.load(scan)
    middle = np.linalg.inv(heat.affine) @ head.affine @ [23.5, 23.5, 23.5, 1]
    assert heat.shape == (24, 24, 24) and ((middle[:3] > 4) & (middle[:3] < 20)).all()


def test_the_device_is_said_and_a_gpu_that_is_not_there_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scan = write_scan(tmp_path / "a.nii")
    assert run("predict", "--bundle", tiny, scan) == 0
    assert "1 scan(s), computed on the CPU.\n" in capsys.readouterr().out
    assert run("predict", "--bundle", tiny, *[scan] * 8) == 0
    assert "8 scan(s), computed on the CPU (PyTorch sees no GPU)." in capsys.readouterr().out
    assert run("predict", "--bundle", tiny, scan, "--device", "cuda") == 2
    said = capsys.readouterr()
    assert "No usable GPU: PyTorch sees no GPU. Choose the CPU (`--device cpu`" in said.err and not said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bundle", "nowhere.zip", "a.nii"], "No bundle at"),
        (["a.nii"], "No bundle was named"),
        (["--bundle", "nowhere.zip", "empty"], "No NIfTI or MGH image"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRAINAGE_WORKSPACE", raising=False)
    (tmp_path / "empty").mkdir()
    assert run("predict", *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_newest_bundle_of_the_workspace_is_taken(tiny, tmp_path, monkeypatch):
    import os
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "mine"))
    for age, place in enumerate(("workspace/demo/runs/resnet18", "mine/runs/better")):
        copied = shutil.copytree(tiny, tmp_path / place / "bundle")
        os.utime(copied / "bundle.json", (age, age))
    assert predict_cli.newest_bundle() == tmp_path / "mine" / "runs" / "better" / "bundle"
    assert len(predict_cli.bundles_in_reach()) == 2


def test_the_app_is_served_to_this_machine_only():
    command = predict_cli.app_command(8599)
    assert "--server.address=127.0.0.1" in command and "--browser.gatherUsageStats=false" in command
