"""The workspace layer: files whole or absent, ids as text, platforms in the right order."""

import errno
import os
from types import SimpleNamespace

import pandas as pd
import pytest

from brainage_nb import workspace
from brainage_nb.workspace import (
    CannotWrite,
    DamagedInput,
    MissingInput,
    open_workspace,
    read_csv,
    read_json,
    write_text,
    writing,
)

COHORT = b"scan_id,subject_id,image,age\n1,1,a.nii,30.5\nNA,2,b.nii,44\n"
DAMAGES = {
    "empty": b"",
    "half": COHORT[:-2],
    "no rows": COHORT[:29],
    "no such columns": b"a,b\n1,2\n",
    "more cells than columns": COHORT.replace(b".nii", b",nii"),
    "an age that is no number": COHORT.replace(b"44", b"4O"),
    "flipped bytes": COHORT.replace(b"b.nii", b"\xff\xfe.ni"),
}


def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("cut")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["table.csv"]


def test_ids_keep_their_leading_zeros(tmp_path):
    frame = pd.DataFrame({"scan_id": ["007"], "subject_id": ["007"], "session_id": [""], "age": [30.5]})
    back = read_csv(workspace.write_csv(frame, tmp_path / "table.csv"))
    assert back.to_dict("records") == [{"scan_id": "007", "subject_id": "007", "session_id": "", "age": 30.5}]


def test_json_holds_numpy_numbers_and_turns_nan_into_null(tmp_path):
    import numpy as np

    path = workspace.write_json(
        {"a": np.float32(1.5), "b": np.nan, "c": (np.int64(2), tmp_path)}, tmp_path / "x.json"
    )
    assert read_json(path) == {"a": 1.5, "b": None, "c": [2, str(tmp_path)]}


def test_json_may_hold_a_list_where_that_is_said(tmp_path):
    path = workspace.write_json([{"a": 1}], tmp_path / "x.json")
    assert read_json(path, kind=list) == [{"a": 1}]
    with pytest.raises(DamagedInput, match="it should hold an object"):
        read_json(path)


def test_a_missing_input_names_the_notebook_that_makes_it(tmp_path):
    with pytest.raises(MissingInput, match="02_data_cleaning"):
        open_workspace(tmp_path).read("splits.csv")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_named_with_what_makes_it(tmp_path, damage):
    ws = open_workspace(tmp_path)
    ws.path("cohort.csv").write_bytes(COHORT)
    assert ws.read("cohort.csv")["scan_id"].tolist() == ["1", "NA"]
    ws.path("cohort.csv").write_bytes(DAMAGES[damage])
    with pytest.raises(
        DamagedInput, match=r"cohort.csv is damaged: .* run notebook 01_data_access: it makes"
    ):
        ws.read("cohort.csv")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"a": 1}', "\x00", "[" * 100_000])
def test_json_that_is_torn_empty_or_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "runs" / "resnet18" / "settings.json"
    with pytest.raises(MissingInput, match=r"settings.json is not there. Run notebook 04"):
        read_json(path, "identity")
    with pytest.raises(
        DamagedInput, match=r"settings.json is damaged: .* run notebook 04_train_resnet18 or 05"
    ):
        read_json(write_text(content, path), "identity")


WRONG = '{"status": "complete", "finished": "", "duration_s": 1, "parameters": {}, "written": [],"read":[1]}'


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"status": 1}', WRONG, WRONG.replace("[]", "7")])
def test_a_damaged_result_is_none(tmp_path, content):
    ws = open_workspace(tmp_path)
    ws.finish("01_data_access", {})
    assert ws.result("01_data_access")["status"] == "complete"
    write_text(content, ws.path("results", "01_data_access.json"))
    assert ws.result("01_data_access") is None


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "this place is read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "this place is read-only"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "the disk is full"),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_full_or_read_only_disk_is_said_with_place_and_remedy(tmp_path, monkeypatch, refusal, told):
    path = write_text("old", tmp_path / "cohort.csv")
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    said = pytest.raises(CannotWrite, match=rf"cohort.csv cannot be written: {told}.*BRAINAGE_WORKSPACE")
    with said, writing(path) as temporary:
        temporary.write_text("half")
        raise refusal
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_an_error_of_another_kind_is_not_laid_to_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(KeyError, match="age"), writing(tmp_path / "a"):
        raise KeyError("age")


def test_a_file_that_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), writing(tmp_path / "a" / "copy"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")


def test_a_workspace_below_a_file_is_refused_in_words(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="a file lies where a folder is needed"):
        open_workspace(tmp_path / "file" / "ws")


def test_the_environment_names_the_workspace(monkeypatch, tmp_path):
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "here"))
    assert open_workspace().root == tmp_path / "here"
    assert open_workspace(tmp_path / "there").root == tmp_path / "there"


def test_finish_records_rows_and_parameters_and_begin_voids_them(tmp_path):
    ws = open_workspace(tmp_path).begin("01_data_access")
    table = workspace.write_csv(pd.DataFrame({"a": [1, 2, 3]}), ws.path("cohort.csv"))
    ws.finish("01_data_access", {"seed": 3}, written=[table], figures={"scans": 3})
    result = ws.result("01_data_access")
    assert result["written"] == [{"path": "cohort.csv", "rows": 3, "bytes": 8}]
    assert (result["status"], result["parameters"], result["figures"]) == (
        "complete",
        {"seed": 3},
        {"scans": 3},
    )
    assert ws.begin("01_data_access").result("01_data_access") is None


def test_files_that_changed_after_a_notebook_read_them_are_named_with_where_to_run_from(
    tmp_path, capsys, monkeypatch
):
    ws = open_workspace(tmp_path / "ws")
    table, scan, other = tmp_path / "people.tsv", ws.path("scan.nii"), ws.path("other.nii")
    for path in (table, scan, other):
        path.write_text("one")
    ws.finish("01_data_access", {}, read=[table])
    ws.finish("02_data_cleaning", {}, read={scan: workspace.sha256_of(scan), other: ""})
    os.utime(scan, (1, 1))  # another time, the same content
    ws.begin("03_preprocessing_preview")
    assert workspace.find_stale(ws) == {} and not capsys.readouterr().out
    monkeypatch.setattr(workspace, "sha256_of", lambda path: pytest.fail(f"{path} is read a second time"))
    assert workspace.find_stale(ws) == {}
    monkeypatch.undo()
    scan.write_text("two")
    table.write_text("three")
    other.unlink()
    assert workspace.find_stale(ws) == {"01_data_access": [str(table)], "02_data_cleaning": ["scan.nii"]}
    assert list(workspace.find_stale(ws, "01_data_access")) == ["01_data_access"]
    ws.begin("02_data_cleaning")
    said = capsys.readouterr().out
    assert f"01_data_access read {table}; 02_data_cleaning read scan.nii. Run from 01_data_access on" in said


def test_a_copy_that_reads_back_differently_does_not_count(tmp_path, monkeypatch):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"whole")
    target.write_bytes(b"old")
    monkeypatch.setattr(workspace.shutil, "copyfile", lambda _, there: there.write_bytes(b"hal"))
    with pytest.raises(OSError, match="reads back with other content"):
        workspace.copy_verified(source, target)
    assert target.read_bytes() == b"old"


def test_a_run_name_cannot_leave_its_folder(tmp_path):
    ws = open_workspace(tmp_path)
    for name in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="one plain folder name"):
            ws.run(name)


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import brainage_nb.cli, brainage_nb.workspace, sys; print({'torch', 'pandas'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_waiting_threads_give_way_unless_the_user_has_said_how_they_wait():
    import os
    import subprocess
    import sys

    code = "import brainage_nb, os; print(os.environ['OMP_WAIT_POLICY'])"
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, found in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, env=others | given, capture_output=True, text=True, check=True).stdout
        assert out.strip() == found


def test_scans_unpacked_to_the_disk_of_a_lost_session_are_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINAGE_SCRATCH", str(tmp_path / "fast"))
    ws = open_workspace(tmp_path / "slow")
    scan = ws.scratch / "unpacked" / "a.zip-1-2" / "a.nii"
    with pytest.raises(MissingInput, match="01_data_access again"):
        ws.resolve(scan)
    scan.parent.mkdir(parents=True)
    scan.touch()
    assert ws.resolve(scan) == scan
    assert (
        ws.resolve("demo/none.nii") == tmp_path / "slow" / "demo" / "none.nii"
    )  # others are judged by cleaning
