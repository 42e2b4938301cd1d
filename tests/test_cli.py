import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from brainage_nb import cli
from brainage_nb.bundle_format import find_bundles
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.workspace import guard_formula, open_workspace, read_csv
from tests.models.tiny_bundle import noisy_head, write_scan, write_tiny_bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_scans_folders_and_ages_end_in_one_table(tiny, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, seed in {"sub-01_T1w.nii": 1, "sub-02_T1w.nii.gz": 2, "sub-02_T1w_heat.nii.gz": 3}.items():
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
    table, details = said.split(
        "For comparing gaps, ages and gaps corrected for the age bias: such ages err by 6.5"
    )
    assert "corrected" not in table and f"{expected.corrected_age:.1f}" in details
    assert "Interval (low, high): 90% conformal interval, calibrated on 50 subjects" in table
    assert "sub-02_T1w_heat.nii.gz: its name does not end in _T1w" in said


def test_scans_without_a_true_age_are_named_with_the_reason_and_the_notes_of_the_table(tmp_path, capsys):
    names = ["site1_001.nii", "site1_002.nii", "site2_003.nii", "site2_007.nii"]
    table = tmp_path / "ages.csv"
    table.write_text("id,age\n001,20\n002,50\n003,89+\n004,70\n")
    assert cli.find_ages([tmp_path / name for name in names], str(table)) == [20, 50, None, None]
    said = capsys.readouterr().out
    assert "site2_003.nii: no true age: its row gives no usable age: " in said and "89+" in said
    assert "site2_007.nii: no true age: no id of the table is in its name" in said
    assert "ages.csv: subject_id is read from column 'id'." in said


def test_one_scan_takes_its_age_without_a_table(tiny, tmp_path, capsys):
    scan = write_scan(tmp_path / "head.nii", 5)
    out = tmp_path / "out.csv"
    assert run("predict", "--bundle", tiny, scan, "--age", 40, "--out", out) == 0
    assert read_csv(out)["gap"][0] == pytest.approx(load_bundle(tiny).predict(scan, 40).gap, abs=1e-4)
    assert run("predict", "--bundle", tiny, scan, scan, "--age", 40) == 2
    assert run("predict", "--bundle", tiny, scan, "--age", 400) == 2
    said = capsys.readouterr().err
    assert "--age is of one scan, and there are 2" in said and "expected years from 0 to 120" in said


def test_bad_scans_are_named_together_and_the_rest_go_on(tiny, tmp_path, capsys):
    good, bad, worse = write_scan(tmp_path / "good.nii"), tmp_path / "bad.nii", tmp_path / "worse.nii"
    bad.write_text("no scan")
    worse.write_text("no scan")
    assert run("predict", "--bundle", tiny, bad, good, worse, "--out", tmp_path / "out.csv") == 1
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows["predicted_age"].notna().tolist() == [False, True, False]
    assert rows["warnings"][0] == "unreadable" and "neither a NIfTI" in rows["explanation"][0]
    said = capsys.readouterr()
    assert "2 of 3 scans have no result" in said.err
    assert "\n  bad.nii, worse.nii: " in said.out and "nan" not in said.out  # one sentence for both


def test_what_is_not_to_be_used_is_said_before_any_age_and_in_the_csv(tmp_path, capsys):
    bundle = write_tiny_bundle(tmp_path / "bundle", n_scans=30)
    good, noisy = write_scan(tmp_path / "good.nii", 41), write_scan(tmp_path / "b.nii", array=noisy_head(40))
    assert run("predict", "--bundle", bundle, good, noisy, "--out", tmp_path / "out.csv") == 0
    said, rows = capsys.readouterr().out, read_csv(tmp_path / "out.csv")
    reason = "Do not use this age: the scan is further from the training scans than all 30 compared"
    assert said.index(f"b.nii: {reason}") < said.index("predicted_age") and said.count(reason) == 1
    assert rows["do_not_use_because"].fillna("").str.startswith(reason).tolist() == [False, True]
    assert list(rows).index("do_not_use_because") < list(rows).index("predicted_age")


def test_explain_writes_a_map_that_lies_on_the_scan_and_says_its_sum(tiny, tmp_path, capsys):
    import nibabel as nib
    import numpy as np

    scan = write_scan(tmp_path / "a.nii.gz")
    assert run("predict", "--bundle", tiny, scan, "--explain", "--out", tmp_path / "out.csv") == 0
    said = capsys.readouterr().out
    assert (
        "a.nii.gz: What moved this age away from the mean training brain's" in said and "years (pred" in said
    )
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
        (["a.nii", "--out", "empty"], "--out empty is a folder: name the CSV file"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRAINAGE_WORKSPACE", raising=False)
    (tmp_path / "empty").mkdir()
    assert run("predict", *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_newest_whole_bundle_of_the_workspace_is_taken(tiny, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "mine"))
    for age, place in enumerate(("workspace/demo/runs/resnet18", "mine/runs/better")):
        copied = shutil.copytree(tiny, tmp_path / place / "bundle")
        os.utime(copied / "bundle.json", (age, age))
    assert cli.find_newest_bundle() == tmp_path / "mine" / "runs" / "better" / "bundle"
    assert len(find_bundles()[0]) == 2
    (tmp_path / "mine" / "runs" / "better" / "bundle" / "bundle.json").write_text("[]")
    assert cli.find_newest_bundle() == tmp_path / "workspace" / "demo" / "runs" / "resnet18" / "bundle"
    assert "better/bundle/bundle.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [(text, f"'{text}") for text in ("=1+1", "@SUM(A1)", "+x", "-cmd|' /C calc'!A0", "-2+3", "\t=1")]
    + [(text, text) for text in ("-1.5", "+3", "a=b", "-", "")],
)
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(text, shown):
    assert guard_formula(text) == shown


def test_a_file_name_that_is_a_formula_is_text_in_the_csv(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scan(tmp_path / "=2+2.nii")
    assert run("predict", "--bundle", tiny, "=2+2.nii", "--out", "out.csv") == 0
    (row,) = read_csv(tmp_path / "out.csv").to_dict("records")
    assert (row["scan"], row["path"]) == ("'=2+2.nii", "'=2+2.nii")


def test_a_dry_run_checks_and_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    place = tmp_path / "ws"
    given = ("run", "--dry-run", "--workspace", place, "--to", "03")
    assert run(*given, "-p", "spacing_mm=4", "-p", "n_subjects=30") == 0
    said = capsys.readouterr().out
    assert "01_data_access: would run with\n      n_subjects = 30\n" in said and "spacing_mm = 4.0" in said
    assert said.startswith(f"Workspace: {place} (would be made)\n")
    assert "02_data_cleaning: would run with its defaults\n" in said
    assert run(*given, "-p", "source=folder", "-p", f"data_dir={tmp_path / 'none'}") == 2
    assert "There is no folder" in capsys.readouterr().err
    assert not place.exists()
    table = tmp_path / "participants.tsv"
    table.write_text("before")
    open_workspace(place).finish("01_data_access", {}, read=[table])
    table.write_text("another age")
    assert run(*given) == 0
    assert f"Changed since: 01_data_access read {table}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "run", "list", "predict", "app", "completion"])
def test_each_command_has_examples_that_it_takes_and_names_the_workspace(command, monkeypatch, capsys):
    monkeypatch.setenv("BRAINAGE_WORKSPACE", "/a %place")
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        run(*command.split(), "--help")
    help_text = capsys.readouterr().out
    lines = re.findall(r"^  brainage-nb (.*?)(?:   .*| >.*)?$", help_text, flags=re.M)
    assert lines and all(cli._make_parser().parse_args(line.split()) for line in lines)
    assert "/a %place" in " ".join(help_text.split()) or command in ("list", "completion")
    assert max(map(len, help_text.splitlines())) <= 80


def test_without_a_command_the_help_is_shown_as_wrong_usage(capsys):
    assert run() == 2
    assert "first steps:" in capsys.readouterr().out


def test_the_version_names_what_decides_results(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert re.match(r"brainage-nb \d\S+ \(Python 3.*; torch \d.*, monai \d.*\)\n$", capsys.readouterr().out)


def test_a_shell_completes_commands_notebooks_and_parameters(capsys):
    pytest.importorskip("shtab")
    assert run("completion", "bash") == 0
    script = capsys.readouterr().out
    for word in ("predict", "--dry-run", "04", "weight_decay", "cuda", "_shtab_compgen_files"):
        assert re.search(rf"[\s'\"]{word}\b", script), word


def heads_of_one_name(folder, names=("S1/T1.nii.gz", "S2/T1.nii.gz", "S3/anat/T1.nii.gz")):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_scan(folder / name, seed)
    return [folder / name for name in names]


def test_scans_of_one_name_keep_their_own_rows_and_maps(tiny, tmp_path, capsys):
    scans = heads_of_one_name(tmp_path / "study")
    out = tmp_path / "out.csv"
    given = [
        tmp_path / "study",
        tmp_path / "study" / ".." / "study" / "S1" / "T1.nii.gz",
    ]  # one of them twice
    assert run("predict", "--bundle", tiny, *given, "--explain", "--out", out) == 0
    rows = read_csv(out)
    assert rows["path"].tolist() == [str(path) for path in (*scans, given[1])]
    maps = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_heat.nii.gz"))
    places = ("S1/T1", "S2/T1", "anat/T1")
    assert maps == [f"out_heat_maps/{place}_heat.nii.gz" for place in places]
    said = capsys.readouterr().out
    assert all(f"{place}.nii.gz" in said for place in places)


def test_a_map_of_another_scan_is_never_overwritten(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scans = heads_of_one_name(tmp_path, ("S1/T1.nii.gz", "S2/T1.nii.gz", "S2/T1.nii"))
    for scan in (*scans, *scans):
        assert run("predict", "--bundle", tiny, scan, "--explain") == 0
    maps = sorted(str(path.relative_to("heat_maps")) for path in Path("heat_maps").rglob("*_heat.nii.gz"))
    place = tmp_path.name
    assert maps == ["S2/T1_heat.nii.gz", "T1_heat.nii.gz", f"{place}/S2/T1_heat.nii.gz"]


def test_the_app_is_served_to_this_machine_only():
    arguments = cli.app_arguments(8599)
    assert "--server.address=127.0.0.1" in arguments and "--browser.gatherUsageStats=false" in arguments


def test_a_port_that_cannot_be_or_is_taken_is_refused_and_a_reader_that_has_enough_is_not_complained_of(
    capsys,
):
    assert run("app", "--port", "99999") == 2
    assert "expected 1 to 65535" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run("app", "--port", taken.getsockname()[1]) == 2
    assert "already; open it, or give another --port" in capsys.readouterr().err
    command = f"{sys.executable} -m brainage_nb.cli list | head -n 1; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("01_data_access\n141\n", "")


def test_a_bundle_the_app_cannot_open_is_said_at_once(tiny, capsys):
    pytest.importorskip("streamlit")
    assert run("app", "--bundle", tiny.parent) == 2
    assert f"Did you mean {tiny}?" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_the_app_asks_nothing_on_a_new_machine_and_ends_its_server_when_it_is_ended(tmp_path):
    """With a browser wanted and a terminal there, Streamlit would ask for an e-mail address first."""
    pytest.importorskip("streamlit")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    terminal, inside = os.openpty()
    command = [sys.executable, "-m", "brainage_nb.cli", "app", "--port", str(port)]
    environment = os.environ | {"HOME": str(tmp_path), "PATH": os.devnull, "BROWSER": "true"}
    pipes = {"stdin": inside, "stdout": inside, "stderr": inside}
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes)
    try:
        assert wait_until(lambda: answers(port)), os.read(terminal, 9999).decode()
        server.terminate()
        server.wait(30)
        assert not answers(port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        os.close(terminal)
        os.close(inside)


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    return condition()


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
