"""Who uses a workspace: one at a time, by name; the dead, the silent and the idle make way."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from brainage_nb import in_use
from brainage_nb.in_use import Use, WorkspaceInUse
from brainage_nb.workspace import CannotWrite, open_workspace

RUN = """
import sys, time
from pathlib import Path
from brainage_nb import in_use
in_use.BEAT = in_use.BETWEEN_CELLS = 0.1
with in_use.Use(Path(sys.argv[1]), "brainage-nb run", lambda line: None):
    print("uses it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start_run(root, seconds=60):
    command = [sys.executable, "-c", RUN, str(root), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(root):
    run = start_run(root)
    assert run.stdout.readline() == "uses it\n"
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("BEAT", 0.05), ("SILENT", 0.4), ("BETWEEN_CELLS", 0.2)):
        monkeypatch.setattr(in_use, name, value)


@pytest.fixture
def shell():
    """What a kernel's cells run in; cells that follow each other, as "Run all" sends them."""
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def leave_record(root, **facts):
    known = {"who": "notebook 02_data_cleaning", "machine": in_use._identify_machine(), "pid": os.getpid()}
    path = root / ".in_use.000007.json"
    path.write_text(json.dumps(known | {"time": time.time(), "idle": False} | facts))
    return path


def test_a_second_user_is_refused_by_name_and_a_killed_one_is_followed(tmp_path):
    said = []
    with running(tmp_path) as run:
        with pytest.raises(WorkspaceInUse, match=f"in use by brainage-nb run, process {run.pid} of"):
            open_workspace(tmp_path).begin("01_data_access")
        run.kill()  # and not waited for: a zombie does not live either
        time.sleep(0.2)
        with Use(tmp_path, "brainage-nb run", said.append):
            pass
    assert len(said) == 1 and f"process {run.pid}" in said[0] and "is gone without having ended" in said[0]
    assert list(tmp_path.glob(in_use.RECORDS)) == []


def test_of_many_that_start_at_once_after_a_dead_one_exactly_one_has_the_workspace(tmp_path):
    leave_record(tmp_path, pid=2**22 + 1)
    started = [start_run(tmp_path, 1) for _ in range(6)]
    assert sorted(run.communicate()[0].count("uses it") for run in started) == [0] * 5 + [1]


@pytest.mark.parametrize("clock", [-7200, 0, 7200])
def test_on_another_machine_signs_of_life_count_whatever_its_clock_says(tmp_path, quick, clock):
    path, ended = leave_record(tmp_path, machine="elsewhere", time=0), threading.Event()

    def live():
        while not ended.wait(0.05):
            leave_record(tmp_path, machine="elsewhere", time=time.time() + clock)

    living = threading.Thread(target=live)
    living.start()
    with pytest.raises(WorkspaceInUse, match="notebook 02_data_cleaning"):
        Use(tmp_path, "brainage-nb run", lambda line: None)
    ended.set()
    living.join()
    said = []
    Use(tmp_path, "brainage-nb run", said.append).end()
    assert "Watching for" in said[0] and "Taking over" in said[1] and not path.exists()


@pytest.mark.parametrize("facts", [{"time": 5.0}, {"pid": 2**22 + 1}, {"idle": True}])
def test_a_later_process_of_that_number_and_an_idle_notebook_keep_nobody_out(tmp_path, quick, facts):
    leave_record(tmp_path, **facts)
    Use(tmp_path, "brainage-nb run", lambda line: None).end()


def test_a_record_cut_while_it_was_written_keeps_nobody_out(tmp_path, quick):
    leave_record(tmp_path).write_text("")
    Use(tmp_path, "brainage-nb run", lambda line: None).end()


def test_no_record_is_left_where_it_could_not_be_written(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Use, "_text", refuse)
    with pytest.raises(CannotWrite, match="the disk is full"):
        open_workspace(tmp_path).begin("01_data_access")
    assert not list(tmp_path.glob(in_use.RECORDS))


def test_who_was_displaced_is_told_and_leaves_the_other_alone(tmp_path):
    use = Use(tmp_path, "brainage-nb run")
    other = leave_record(tmp_path, token="other")
    with pytest.raises(WorkspaceInUse, match="taken over by another run or notebook"):
        use.check()
    use.end()
    assert other.exists()


@pytest.mark.slow  # a minute of waiting
def test_a_displaced_run_is_interrupted(tmp_path):
    run = start_run(tmp_path)
    assert run.stdout.readline() == "uses it\n"
    leave_record(tmp_path, token="other")
    assert "INTERRUPTED: The workspace" in run.communicate(timeout=120)[1]


def test_a_notebook_by_hand_uses_the_workspace_while_its_cells_run_until_it_ends(tmp_path, shell, quick):
    begin = f"""
from brainage_nb.workspace import open_workspace
ws = open_workspace({str(tmp_path)!r}).begin("02_data_cleaning")
record, = ws.root.glob(".in_use.*.json")
"""
    assert shell.run_cell(begin).success
    idle = "import json; json.loads(record.read_text())['idle']"
    assert (
        shell.run_cell(idle).result is False and json.loads(next(tmp_path.glob(".in_*")).read_text())["idle"]
    )
    assert shell.run_cell("ws.finish('02_data_cleaning', {}); 1").result == 1
    assert not list(tmp_path.glob(in_use.RECORDS))
    with running(tmp_path):  # 03, while 02's kernel is still there
        assert shell.run_cell("2").result == 2
        assert isinstance(shell.run_cell(begin).error_in_exec, WorkspaceInUse)


def test_a_notebook_left_in_its_middle_makes_way_and_does_not_run_on(tmp_path, shell, capsys):
    ws = "from brainage_nb.workspace import open_workspace\n"
    begin = f"ws = open_workspace({str(tmp_path)!r}).begin('02_data_cleaning'); 1"
    assert shell.run_cell(ws + begin).result == 1
    with running(tmp_path):
        later = shell.run_cell("raise RuntimeError('it ran')")
        assert type(later.error_before_exec).__name__ == "InputRejected"
        assert isinstance(shell.run_cell("ws.finish('02_data_cleaning', {})").error_in_exec, WorkspaceInUse)
    assert "Run this notebook again from its first cell" in "".join(capsys.readouterr())
    assert open_workspace(tmp_path).result("02_data_cleaning") is None
    assert shell.run_cell(begin + "\nws.finish('02_data_cleaning', {}); 2").result == 2
