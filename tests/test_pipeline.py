"""The runner: parameters checked, done work skipped, every way of stopping early is a failure."""

import time

import nbformat
import pytest

from brainage_nb import pipeline
from brainage_nb.cli import main
from brainage_nb.pipeline import Notebook, NotebookFailed, ParameterError, parse_overrides, run_notebooks
from brainage_nb.workspace import open_workspace
from tests.test_in_use import running

PARAMETERS = """\
# folder for everything
workspace = ""
# passes over the training set
epochs = 3  # @param {type:"integer"}
# say so
loud = False
"""
ENDING = """
from brainage_nb.workspace import open_workspace
used = {"workspace": workspace, "epochs": epochs, "loud": loud}
open_workspace(workspace).finish("NAME", used, figures={"epochs": epochs})
"""


def make_notebook(folder, name, body="", ending=ENDING, extra=""):
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS + extra, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("## The middle part"),
        nbformat.v4.new_code_cell(body or "1 + 1"),
        nbformat.v4.new_code_cell(ending.replace("NAME", name)),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    return Notebook(folder / f"{name}.ipynb")


def test_parameters_are_read_with_defaults_and_comments(tmp_path):
    found = make_notebook(tmp_path, "01_a").parameters()
    assert [(item.name, item.default) for item in found.values()] == [
        ("workspace", ""),
        ("epochs", 3),
        ("loud", False),
    ]
    assert found["epochs"].comment == "passes over the training set"


def test_values_are_parsed_by_the_type_of_the_default(tmp_path):
    notebooks = [make_notebook(tmp_path, "01_a")]
    assert parse_overrides(["epochs=07", "loud=true", "workspace=01"], notebooks) == {
        "epochs": 7,
        "loud": True,
        "workspace": "01",
    }
    with pytest.raises(ParameterError, match="expected int"):
        parse_overrides(["epochs=many"], notebooks)


def test_an_unknown_parameter_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ParameterError, match="Did you mean epochs"):
        parse_overrides(["epocs=3"], [make_notebook(tmp_path, "01_a")])


def test_one_run_name_for_two_training_notebooks_is_refused(tmp_path):
    notebooks = [make_notebook(tmp_path, name, extra='# run\nrun = "x"') for name in ("04_a", "05_b")]
    assert parse_overrides(["run=y"], notebooks[:1]) == {"run": "y"}
    with pytest.raises(ParameterError, match="04_a and 05_b"):
        parse_overrides(["run=y"], notebooks)


def test_what_is_done_is_skipped_until_a_parameter_or_an_earlier_notebook_changes(tmp_path):
    notebooks = [make_notebook(tmp_path, "01_a"), make_notebook(tmp_path, "02_b")]
    ws = open_workspace(tmp_path / "ws")
    said = []
    run_notebooks(notebooks, ws, {}, say=said.append)
    run_notebooks(notebooks, ws, {}, say=said.append)
    assert sum("nothing to do" in line for line in said) == 2
    said.clear()
    results = run_notebooks(notebooks, ws, {"epochs": 5}, say=said.append)
    assert not any("nothing to do" in line for line in said)
    assert [result["figures"]["epochs"] for result in results] == [5, 5]
    assert ws.path("executed", "02_b.ipynb").exists()


def test_a_failing_cell_is_named_with_its_error(tmp_path):
    notebook = make_notebook(tmp_path, "01_a", body="values = {}\nvalues['age']")
    with pytest.raises(
        NotebookFailed, match=r"(?s)01_a stopped in cell 3 \(The middle part\).*KeyError: 'age'"
    ):
        run_notebooks([notebook], open_workspace(tmp_path / "ws"), {}, say=lambda line: None)


@pytest.mark.parametrize(
    "body", ["import sys; sys.exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_an_exit_or_a_killed_kernel_is_a_failure(tmp_path, body):
    notebook = make_notebook(tmp_path, "01_a", body=body)
    with pytest.raises(NotebookFailed):
        run_notebooks([notebook], open_workspace(tmp_path / "ws"), {}, say=lambda line: None)


def test_a_notebook_that_ends_without_its_last_cell_is_a_failure(tmp_path):
    notebook = make_notebook(tmp_path, "01_a", ending="1 + 1")
    with pytest.raises(NotebookFailed, match="left no result"):
        run_notebooks([notebook], open_workspace(tmp_path / "ws"), {}, say=lambda line: None)


def test_a_notebook_that_saved_and_stopped_is_neither_done_nor_failed(tmp_path, monkeypatch, capsys):
    make_notebook(tmp_path, "01_a", ending=ENDING.replace("figures=", "status='stopped', figures="))
    monkeypatch.setattr(pipeline, "notebooks_folder", lambda: tmp_path)
    for _ in range(2):
        assert main(["run", "--workspace", str(tmp_path / "ws")]) == 75
    assert "Run the same command to go on" in capsys.readouterr().err


def test_the_command_line_stops_at_the_first_failure_and_says_so(tmp_path, monkeypatch, capsys):
    make_notebook(tmp_path, "01_a", body="raise ValueError('no scans here')")
    make_notebook(tmp_path, "02_b")
    monkeypatch.setattr(pipeline, "notebooks_folder", lambda: tmp_path)
    assert main(["run", "--workspace", str(tmp_path / "ws")]) == 1
    assert "no scans here" in capsys.readouterr().err
    assert not (tmp_path / "ws" / "results" / "02_b.json").exists()
    assert main(["run", "--workspace", str(tmp_path / "ws"), "-p", "nonsense=1"]) == 2
    assert main(["list"]) == 0
    assert "passes over the training set" in capsys.readouterr().out


def test_an_executed_notebook_keeps_the_last_state_of_a_progress_bar_only(tmp_path):
    body = """
import sys, time
for step in range(4):
    print(f"\\rstep {step} of 3", end="", file=sys.stderr, flush=True)
    time.sleep(0.05)
print("\\ndone", file=sys.stderr, flush=True)
print("one\\ntwo")
"""
    ws = open_workspace(tmp_path / "w")
    run_notebooks([make_notebook(tmp_path, "01_a", body)], ws, {})
    executed = nbformat.read(ws.path("executed", "01_a.ipynb"), as_version=4)
    texts = {output.name: output.text for cell in executed.cells for output in cell.get("outputs", [])
             if output.output_type == "stream"}  # fmt: skip
    assert texts == {"stderr": "step 3 of 3\ndone\n", "stdout": "one\ntwo\n"}


def test_a_run_that_ends_well_interrupts_no_kernel(tmp_path, capfd):
    body = """
import time
kernel = get_ipython().kernel
answer = kernel.shell_handlers["kernel_info_request"]
async def slowly(*message):
    await answer(*message)
    time.sleep(0.5)  # a busy machine: what asked has its answer before the kernel is done with it
kernel.shell_handlers["kernel_info_request"] = slowly
"""
    run_notebooks([make_notebook(tmp_path, "01_a", body)], open_workspace(tmp_path / "w"), {})
    assert "KeyboardInterrupt" not in "".join(capfd.readouterr())


def test_notebooks_run_in_this_interpreter_whatever_kernels_there_are(tmp_path, monkeypatch):
    import json
    import sys

    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        spec = tmp_path / variable / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    ending = ENDING.replace('{"epochs": epochs}', '{"python": __import__("sys").executable}')
    results = run_notebooks([make_notebook(tmp_path, "01_a", ending=ending)], open_workspace(tmp_path), {})
    assert results[0]["figures"]["python"] == sys.executable


def test_a_kernel_that_does_not_start_is_a_failure_in_one_line(tmp_path, monkeypatch, capsys):
    make_notebook(tmp_path, "01_a")
    monkeypatch.setattr(pipeline, "notebooks_folder", lambda: tmp_path)
    monkeypatch.setattr("ipykernel.kernelspec.make_ipkernel_cmd", lambda *a, **k: ["/bin/false"])
    assert main(["run", "--workspace", str(tmp_path / "ws")]) == 1
    assert "01_a: the kernel" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGKILL"])
def test_what_ends_a_run_ends_its_kernel_and_workers(tmp_path, ending):
    import signal
    import subprocess
    import sys

    import psutil

    body = "from joblib import Parallel, delayed\nfrom pathlib import Path\nimport time\n"
    body += "def work(n):\n    (Path(workspace) / f'at_work_{n}').touch()\n    time.sleep(99)\n"
    body += "Parallel(2)(delayed(work)(n) for n in range(2))"
    make_notebook(tmp_path, "01_a", body)
    code = "import sys, pathlib; from brainage_nb import cli, pipeline; "
    code += "pipeline.notebooks_folder = pathlib.Path.cwd; sys.exit(cli.main(['run', '--workspace', 'ws']))"
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while len(list((tmp_path / "ws").glob("at_work_*"))) < 2 and time.monotonic() < waited + 60:
        time.sleep(0.1)
    started = psutil.Process(run.pid).children(recursive=True)
    assert len(started) >= 3
    run.send_signal(getattr(signal, ending))
    said = run.communicate(timeout=30)[1]
    assert psutil.wait_procs(started, timeout=5)[1] == []
    if ending == "SIGKILL":
        return
    assert said.endswith("brainage-nb: interrupted; finished work is kept, run the same command to go on.\n")
    assert "Task exception was never retrieved" not in said
    assert run.returncode == 130 and not list((tmp_path / "ws").glob(".in_use*"))


def test_two_runs_in_one_workspace_and_a_notebook_of_the_run_itself(tmp_path, monkeypatch, capsys):
    body = "from brainage_nb.workspace import open_workspace\nws = open_workspace(workspace).begin('01_a')"
    make_notebook(tmp_path, "01_a", body)
    monkeypatch.setattr(pipeline, "notebooks_folder", lambda: tmp_path)
    ws = tmp_path / "ws"
    assert main(["run", "--workspace", str(ws)]) == 0
    with running(ws) as run:
        assert main(["run", "--workspace", str(ws)]) == 1
    assert f"The workspace {ws} is in use by brainage-nb run, process {run.pid}" in capsys.readouterr().err
