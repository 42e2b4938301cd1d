"""The runner: parameters checked, done work skipped, every way of stopping early is a failure."""

import re
import time
from pathlib import Path

import nbformat
import pytest

from brainage_nb import pipeline
from brainage_nb.cli import main
from brainage_nb.parameters import ParameterError, join_more, read_parameters, split_more
from brainage_nb.pipeline import (
    Notebook,
    NotebookFailed,
    find_notebooks,
    parse_overrides,
    run_notebooks,
)
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.workspace import open_workspace
from tests.test_in_use import running

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def no_kernel(monkeypatch):
    """Run cells in this process: what is skipped and what runs again is decided outside of kernels."""

    def run_here(notebook, workspace, values, *_, **__):
        workspace.path("results", f"{notebook.name}.json").unlink(missing_ok=True)
        names = {}
        for cell in notebook.cells():
            if cell["cell_type"] == "code":
                exec(cell["source"], names)
                names |= values if "parameters" in cell["metadata"].get("tags", []) else {}
        return workspace.result(notebook.name)

    monkeypatch.setattr(pipeline, "_execute", run_here)


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
    with pytest.raises(ParameterError, match="expected a whole number"):
        parse_overrides(["epochs=many"], notebooks)


def test_an_unknown_parameter_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ParameterError, match="Did you mean epochs"):
        parse_overrides(["epocs=3"], [make_notebook(tmp_path, "01_a")])
    with pytest.raises(ParameterError, match="Did you mean age_column or age_unit"):
        parse_overrides(["age=alter"], find_notebooks())


SETTINGS = """
from brainage_nb.parameters import read_parameters
from brainage_nb.volumes.settings import PreprocessingSettings
set_here = read_parameters(globals(), PreprocessingSettings)
"""


def test_more_names_fields_of_the_settings_and_reaches_the_notebook_like_any_parameter(tmp_path):
    extra = '# further settings\nmore = ""\n# which\nkind = "a"  # @param ["a", "b"]\n'
    ending = ENDING.replace("{'epochs': epochs}", "set_here").replace('{"epochs": epochs}', "set_here")
    notebook = make_notebook(tmp_path, "01_a", SETTINGS, ending, extra)
    given = parse_overrides(["size=32", "more=spacing_mm=6 found_masks=no", "epochs=5"], [notebook])
    assert given == {"size": 32, "spacing_mm": 6.0, "found_masks": False, "epochs": 5}
    assert notebook.fill_cell(given) == {"epochs": 5, "more": "found_masks=False size=32 spacing_mm=6.0"}
    (result,) = run_notebooks([notebook], open_workspace(tmp_path / "ws"), given, say=lambda line: None)
    assert result["figures"] | given == result["figures"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["kind=c"], "kind = 'c': expected one of a, b"),
        (["more=spacing_m=4"], "Did you mean spacing_mm"),
        (["more=spacing_mm"], "expected name=value"),
        (["more=spacing_mm = 4"], "without blanks"),
        (["more=spacing_mm='4"], "a quote is opened and not closed"),
        (["spacing_mm=4,5"], "expected a number"),
        (["spacing_mm=inf"], "expected a number"),
        (["spacing_mm=4", "more=spacing_mm=5"], "spacing_mm is given twice, as '4' and as '5'"),
        (["epochs=4", "epochs=5"], "epochs is given twice"),
        (["size=4"], "expected 8 to 512 voxels"),
    ],
)
def test_what_a_notebook_would_refuse_is_refused_before_any_kernel_starts(tmp_path, given, told, monkeypatch):
    extra = '# further settings\nmore = ""\n# which\nkind = "a"  # @param ["a", "b"]\n'
    notebook = make_notebook(tmp_path, "01_a", SETTINGS, extra=extra)
    monkeypatch.setattr(pipeline, "_execute", None)
    with pytest.raises(ParameterError, match=told):
        run_notebooks([notebook], open_workspace(tmp_path / "ws"), parse_overrides(given, [notebook]))


def test_more_in_a_form_is_checked_and_never_goes_beside_a_line_of_the_form():
    form = {"size": 48, "more": "spacing_mm=4", "_hidden": 1, "module": pytest}
    assert read_parameters(form, PreprocessingSettings) == {
        "size": 48,
        "more": "spacing_mm=4",
        "spacing_mm": 4.0,
    }
    for more, told in {
        "size=32": "has a line of its own",
        "found_mask=yes": "Did you mean found_masks",
    }.items():
        with pytest.raises(ParameterError, match=told):
            read_parameters(form | {"more": more}, PreprocessingSettings)


@pytest.mark.parametrize("text", ["", "a b", 'it\'s "so"', "C:\\data\\x", "#1 = 2", "dätä", " x "])
def test_any_text_survives_the_way_through_more(text):
    assert split_more(join_more({"a": text, "b": (1, 2), "c": True})) == {"a": text, "b": "1,2", "c": "True"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["data_dir=HERE"], "data_dir = .* is not read with source = 'demo'. Set source to folder"),
        (["table=HERE/t.csv"], "table = .* is not read with source = 'demo'"),
        (["source=demo", "more=sex_column=gender"], "sex_column"),
        (["source=folder"], "data_dir is empty"),
        (["source=folder", "data_dir=HERE/nothing"], "There is no folder .*nothing"),
        (["source=folder", "data_dir=HERE", "table=nothing.csv"], "There is no table nothing.csv"),
        (["source=folder", "data_dir=HERE", "n_subjects=30"], "n_subjects = 30 is not read"),
        (["source=folder", "data_dir=HERE/notes.txt"], "notes.txt' is a file, and none of .tar.gz"),
        (["source=folder", "data_dir=HERE/empty"], "No NIfTI or MGZ image lies in .*empty"),
        (["source=folder", "data_dir=HERE/scans"], "No table lies in .*scans. Set table"),
        (["source=folder", "data_dir=HERE/scans", "table=HERE/empty"], "empty' is a folder. Set table"),
        (["source=folders"], "Did you mean folder"),
        (["recipe=custom"], "expected one of reference, best"),
        (["brain_only=no"], "brain_only = False cannot be had"),
        (["seeds=1,x"], "seeds = '1,x': expected a whole number, or several with commas"),
        (["init_from=HERE/nothing"], "init_from = .*: there is no such file or folder"),
        (["bundle=HERE/nothing.zip"], "bundle = .*: there is no such file or folder"),
        (["vgg_weights=imagnet"], "vgg_weights = 'imagnet': there is no such file"),
    ],
)
def test_the_command_refuses_folders_tables_choices_and_bundles_before_it_starts(
    tmp_path, given, told, monkeypatch, capsys
):
    monkeypatch.setattr(pipeline, "_execute", None)
    for name in ("notes.txt", "scans/a.nii.gz", "empty/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    words = [word for item in given for word in ("-p", item.replace("HERE", str(tmp_path)))]
    assert main(["run", "--workspace", str(tmp_path / "ws"), *words]) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--from", "03"], "splits.csv is not in the workspace .*Run notebook 02_data_cleaning first"),
        (["--from", "05", "--to", "02"], "From notebook 05 to 02 there is none"),
        (["-p", "epochs", "40"], "40: there is no such option. Values go as -p name=value"),
    ],
)
def test_a_run_that_cannot_begin_is_refused_before_any_kernel_starts(
    tmp_path, given, told, monkeypatch, capsys
):
    monkeypatch.setattr(pipeline, "_execute", None)
    assert main(["run", "--workspace", str(tmp_path / "ws"), *given]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_parameter_of_a_notebook_that_the_run_leaves_out_is_refused_by_its_name(capsys):
    assert main(["run", "--from", "04", "-p", "spacing_mm=4"]) == 2
    told = capsys.readouterr().err
    assert "spacing_mm is set in 03_preprocessing_preview, which this run leaves out" in told
    assert "Without -p spacing_mm=... what it made stays" in told


def test_the_list_of_one_notebook_shows_fields_and_choices(capsys):
    assert main(["list", "04"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "one of huber, own" in shown and "+ blur_mm 4.0 Largest full width" in shown
    assert "01_data_access" not in shown


def test_commands_of_the_readme_and_the_makefile_name_parameters_that_exist():
    texts = [(ROOT / name).read_text() for name in ("README.md", "Makefile", "kaggle/README.md")]
    known = {name for notebook in find_notebooks() for name in notebook.parameters()} | {"settings"}
    assert set(re.findall(r"-p (\w+)=", " ".join(texts))) <= known


def test_one_run_name_for_two_training_notebooks_is_refused(tmp_path):
    notebooks = [make_notebook(tmp_path, name, extra='# run\nrun = "x"') for name in ("04_a", "05_b")]
    assert parse_overrides(["run=y"], notebooks[:1]) == {"run": "y"}
    with pytest.raises(ParameterError, match="04_a and 05_b"):
        parse_overrides(["run=y"], notebooks)


def test_what_is_done_is_skipped_until_a_parameter_or_an_earlier_notebook_changes(tmp_path, no_kernel):
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


@pytest.mark.parametrize(
    ("name", "content"),
    [("results/01_a.json", text) for text in ("", "{", "{}", "[]")]
    + [("table.csv", text) for text in ("", "a,b\n1")]
    + [("table.csv", None)],
)
def test_what_a_done_notebook_left_and_is_torn_or_gone_is_made_again(tmp_path, no_kernel, name, content):
    ending = ENDING.replace("figures=", "written=[Path(workspace) / 'table.csv'], figures=")
    body = "from pathlib import Path\n(Path(workspace) / 'table.csv').write_text('a,b\\n1,2\\n')"
    notebook = make_notebook(tmp_path, "01_a", body, ending)
    ws, said = open_workspace(tmp_path / "ws"), []
    run_notebooks([notebook], ws, {}, say=said.append)
    whole = ws.path("table.csv").read_text()
    ws.path(name).unlink() if content is None else ws.path(name).write_text(content)
    for _ in range(2):
        run_notebooks([notebook], ws, {}, say=said.append)
    assert ["nothing to do" in line for line in said if "complete" not in line] == [False, False, True]
    assert ws.path("table.csv").read_text() == whole


def test_a_failing_cell_is_named_with_its_error_after_its_progress(tmp_path, monkeypatch):
    body = "import sys\nprint('\\rstep 1 of 3', file=sys.stderr, flush=True)\nvalues = {}\nvalues['age']"
    notebook, said = make_notebook(tmp_path, "01_a", body=body), []
    monkeypatch.setattr(pipeline, "EVERY_S", 0)
    with pytest.raises(
        NotebookFailed, match=r"(?s)01_a stopped in cell 3 \(The middle part\).*KeyError: 'age'"
    ):
        run_notebooks([notebook], open_workspace(tmp_path / "ws"), {}, say=said.append)
    assert said[-2:] == ["      cell 4 of 5: The middle part", "      step 1 of 3"]


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


def test_a_table_edited_after_a_notebook_read_it_runs_that_notebook_and_the_later_ones_again(
    tmp_path, no_kernel
):
    table, lines = tmp_path / "people.tsv", []
    table.write_text("age\n50\n")
    reading = ENDING.replace("used, ", f"used, read=[{str(table)!r}], ")
    names = ("01_a", "02_b", "03_c")
    notebooks = [
        make_notebook(tmp_path, name, ending=reading if name == "02_b" else ENDING) for name in names
    ]
    ws = open_workspace(tmp_path / "ws")
    run_notebooks(notebooks, ws, {})
    table.write_text("age\n51\n")
    run_notebooks(notebooks, ws, {}, say=lines.append)
    assert lines[0] == f"Changed since: 02_b read {table}. Run from 02_b on."
    assert [line.split(":")[1].split()[0] for line in lines[1:]] == [
        "done", "running", "complete", "running", "complete"
    ]  # fmt: skip
    run_notebooks(notebooks, ws, {}, say=lines.append)
    assert [line.split(":")[1].split()[0] for line in lines[-3:]] == ["done"] * 3


def test_an_executed_notebook_keeps_the_last_state_of_progress_bars_and_of_figures_that_a_later_cell_updates(
    tmp_path,
):
    body = """
import sys, time
from IPython.display import display
for step in range(4):
    print(f"\\rstep {step} of 3", end="", file=sys.stderr, flush=True)
    time.sleep(0.05)
print("\\ndone", file=sys.stderr, flush=True)
for step in range(3):
    print(step, file=sys.stderr, flush=True)
    print(step, flush=True)
shown = display("first", display_id=True)
"""
    ws = open_workspace(tmp_path / "w")
    run_notebooks([make_notebook(tmp_path, "01_a", body, ending="shown.update('second')\n" + ENDING)], ws, {})
    executed = nbformat.read(ws.path("executed", "01_a.ipynb"), as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    texts = {"stderr": "", "stdout": ""}
    for output in outputs:
        if output.output_type == "stream":
            texts[output.name] += output.text
    assert texts == {"stderr": "step 3 of 3\ndone\n0\n1\n2\n", "stdout": "0\n1\n2\n"}
    shown = [output["data"]["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert "'second'" in shown and "'first'" not in shown


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


def test_progress_is_shown_live_in_a_terminal_and_once_a_minute_elsewhere(tmp_path, monkeypatch, capsys):
    bar = "\rnet:   0%|     | 0/90\rnet:  40%|##   | 36/90 [00:12<00:18, epoch 2/5, val MAE 9.1 years]"
    said = []
    progress = pipeline._Progress(said.append, 40)
    progress.write(bar)
    assert said == []
    monkeypatch.setattr(pipeline, "EVERY_S", 0)
    for text in (bar, "a warning\n", "\r   \r"):
        progress.write(text)
    assert said == ["      net:  40% 36/90 [00:12<00:18, epoch 2/5, val MAE 9.1 years]"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    live = pipeline._Progress(said.append, 40)
    live.start_cell({"cell_type": "markdown", "source": "## Train\nFor long."}, 7)
    live.write(bar)
    live.end()
    shown = capsys.readouterr().err.split("\r")[1::2]
    assert [line.strip() for line in shown] == [
        "cell 8 of 40: Train", "net:  40% 36/90 [00:12<00:18, epoch 2/5", ""
    ]  # fmt: skip
    assert {len(line) for line in shown} == {39} and len(said) == 1


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
    body += "try:\n    Parallel(2)(delayed(work)(n) for n in range(2))\n"
    body += "except KeyboardInterrupt:\n    time.sleep(4)\n    (Path(workspace) / 'saved').touch()\n    raise"
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
    assert (tmp_path / "ws" / "saved").exists()  # a step of training on a busy CPU takes that long
    assert said.startswith("brainage-nb: stopping; what runs may save first.")
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
