"""The notebooks in order, headless: find them, read their parameters, run them through papermill.

A notebook's own result file is trusted, not papermill's exit: a notebook can stop early and still exit 0.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainage_nb.in_use import COVERED, RECORDS, Use
from brainage_nb.parameters import (
    Parameter,
    ParameterError,
    fields_of,
    find_parameter,
    join_more,
    parse_parameters,
    pick_fields,
    split_items,
    split_more,
)
from brainage_nb.workspace import (
    Workspace,
    describe_stale,
    explain_write_errors,
    find_stale,
    read_csv,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager

END_OF_GROUP = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"  # Windows has no groups

NEEDS = {
    "02_data_cleaning": "cohort.csv",
    "03_preprocessing_preview": "splits.csv",
    "04_train_resnet18": "volumes/current",
    "05_train_vgg16_svr": "volumes/current",
    "06_evaluate": "runs",
}
"""What a notebook cannot start without, in the workspace."""
EVERY_S = 60.0  # seconds between two lines of progress where no terminal shows it live
TO_SAVE_S = 90.0  # for an interrupted kernel: a step of training on a busy CPU, then its checkpoint

PATHS = ("bundle", "external", "init_from", "scan", "vgg_weights")  # must exist before a kernel starts


class NotebookFailed(RuntimeError):
    """A notebook stopped: its name, the cell and the error are in the message."""


class NotebookPaused(RuntimeError):
    """A notebook saved its work and ended early, as asked; the same command goes on."""


@dataclass(frozen=True)
class Notebook:
    """A notebook file, its parameters and its place in the order."""

    path: Path

    @property
    def name(self) -> str:
        """Its name without ending, as `04_train_resnet18`."""
        return self.path.stem

    @property
    def number(self) -> str:
        """Its two digits, as `04`."""
        return self.name[:2]

    def cells(self) -> list[dict[str, Any]]:
        """Its cells, source as one text."""
        cells = read_json(self.path, "cells")["cells"]
        return [cell | {"source": "".join(cell["source"])} for cell in cells]

    def cell_parameters(self) -> dict[str, Parameter]:
        """The parameters cell, in order."""
        for cell in self.cells():
            if "parameters" in cell["metadata"].get("tags", []):
                return parse_parameters(cell["source"])
        return {}

    def settings_classes(self) -> list[type]:
        """The settings classes that the notebook gives to `read_parameters`: `more` sets their fields."""
        source = next((cell["source"] for cell in self.cells() if "= read_parameters(" in cell["source"]), "")
        nodes = list(ast.walk(ast.parse(source)))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        homes = {alias.name: node.module for node in imports for alias in node.names}
        calls = [node for node in nodes if ast.unparse(node).startswith("read_parameters(")]
        return [getattr(import_module(homes[item.id]), item.id) for call in calls for item in call.args[1:]]

    def parameters(self) -> dict[str, Parameter]:
        """Everything that can be set: the parameters cell, then the fields behind `more`."""
        found = self.cell_parameters()
        for settings in self.settings_classes():
            found |= {name: field for name, field in fields_of(settings).items() if name not in found}
        return found

    def fill_cell(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the overrides that this notebook knows, as lines of its cell: fields stand in `more`."""
        given = {**overrides, **split_more(overrides.get("more", ""))}
        cell = self.cell_parameters()
        fields = {name: given[name] for name in self.parameters() if name in given and name not in cell}
        values = {name: given[name] for name in cell if name in given and name != "more"}
        return values | ({"more": join_more(fields)} if fields else {})

    def check(self, overrides: Mapping[str, Any]) -> None:
        """Raise `ParameterError` for what this notebook would refuse: values, choices, files, folders."""
        known = self.parameters()
        given = {**overrides, **split_more(overrides.get("more", ""))}
        values = {name: item.default for name, item in self.cell_parameters().items()}
        values |= {name: known[name].parse(given[name]) for name in known if name in given}
        for name in filter(values.get, PATHS):
            places = values[name].split(",") if name == "external" else [values[name]]
            choices = known[name].choices
            for place in places:
                if place.strip() not in choices and not Path(place.strip()).exists():
                    also = f", and it is none of {', '.join(choices)}" if choices else ""
                    raise ParameterError(f"{name} = {place!r}: there is no such file or folder{also}.")
        for settings in self.settings_classes():
            by_recipe = getattr(settings, "of_recipe", None)
            make = partial(by_recipe, values["recipe"]) if by_recipe and "recipe" in values else settings
            try:
                make(**pick_fields(values, settings))
            except (ValueError, OSError) as error:
                raise ParameterError(f"{self.name}: {error}") from error


def notebooks_folder() -> Path:
    """Where the notebooks lie: beside the package in a checkout, else in the installation's share folder."""
    checkout = Path(__file__).parents[1] / "notebooks"
    installed = Path(sysconfig.get_path("data")) / "share" / "brainage_nb" / "notebooks"
    for folder in (checkout, installed):
        if any(folder.glob("[0-9][0-9]_*.ipynb")):
            return folder
    raise FileNotFoundError(
        f"No notebooks found, neither in {checkout} nor in {installed}. Reinstall brainage-nb."
    )


def find_notebooks(first: str = "", last: str = "") -> list[Notebook]:
    """The notebooks in order, from number `first` to number `last` (empty: the ends)."""
    every = [Notebook(path) for path in sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))]
    lowest, highest = (first or "00").zfill(2)[:2], (last or "99").zfill(2)[:2]
    for asked, number in ((first, lowest), (last, highest)):
        if asked and number not in {notebook.number for notebook in every}:
            raise ParameterError(
                f"There is no notebook {asked}. There are: {', '.join(n.name for n in every)}."
            )
    if lowest > highest:
        raise ParameterError(f"From notebook {first} to {last} there is none; the first number is the lower.")
    return [notebook for notebook in every if lowest <= notebook.number <= highest]


def parse_overrides(given: Sequence[str], notebooks: Sequence[Notebook]) -> dict[str, Any]:
    """Turn `name=value` texts into values; `more=...` stands for each of its own.

    Raises
    ------
    ParameterError
        A name that none of the notebooks knows or that is given twice, a value of another type or none of
        the choices, or one `run` for two notebooks.
    """
    texts = split_items(given)
    trained = [notebook.name for notebook in notebooks if "run" in notebook.cell_parameters()]
    if len(trained) > 1 and "run" in texts:
        raise ParameterError(
            f"-p run=... would be one run for {' and '.join(trained)}; choose one with --from and --to."
        )
    known = {name: item for notebook in notebooks for name, item in notebook.parameters().items()}
    for name in set(texts) - set(known):
        if homes := [notebook.name for notebook in find_notebooks() if name in notebook.parameters()]:
            raise ParameterError(
                f"{name} is set in {' and '.join(homes)}, which this run leaves out. "
                f"Without -p {name}=... what it made stays as it is; to change it, let it run (--from, --to)."
            )
    return {name: find_parameter(name, known).parse(text) for name, text in texts.items()}


def plan_run(
    notebooks: Sequence[Notebook], workspace: Workspace, overrides: Mapping[str, Any], *, again: bool = False
) -> list[tuple[Notebook, dict[str, Any], dict[str, Any] | None]]:
    """Each notebook with the lines of its cell and, where it is done and need not run, its result.

    Once one has to run, all after it have to; `ParameterError` where one of those would refuse its values,
    `MissingInput` where the first needs what an earlier notebook makes.
    """
    plan: list[tuple[Notebook, dict[str, Any], dict[str, Any] | None]] = []
    for notebook in notebooks:
        values = notebook.fill_cell(overrides) | {"workspace": str(workspace.root)}
        all_done = not again and all(done for *_, done in plan)
        result = _find_result(notebook, workspace, values) if all_done else None
        if result is None:
            notebook.check(overrides)
            if not plan and notebook.name in NEEDS:
                workspace.need(NEEDS[notebook.name])
        plan.append((notebook, values, result))
    return plan


def run_notebooks(
    notebooks: Sequence[Notebook],
    workspace: Workspace,
    overrides: Mapping[str, Any],
    *,
    again: bool = False,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Run notebooks in order; skip those already done with the same parameters; stop at the first failure.

    Parameters
    ----------
    notebooks : list of Notebook
    workspace : Workspace
        Executed notebooks are kept in its folder `executed/`.
    overrides : mapping
        Parameter values; each notebook takes those it knows.
    again : bool
        Run also what is done.
    say : callable
        Receives one line of progress at a time: of a notebook that runs, one a minute, but for a terminal,
        which shows it live.

    Returns
    -------
    list of dict
        Each notebook's result as it left it in `results/`.

    Raises
    ------
    ParameterError
        Before anything runs: a notebook would refuse its parameters.
    NotebookFailed
        Names the notebook, the cell and the error.
    NotebookPaused
        A notebook ended early with its work saved (its time was up).
    WorkspaceInUse
        Another run or notebook uses this workspace, or has taken it over.
    """
    with explain_write_errors(workspace.path(RECORDS)):
        use = Use(workspace.root, "brainage-nb run", say)
    results = []
    with use:
        if changed := describe_stale(find_stale(workspace)):
            say(changed)
        plan = plan_run(notebooks, workspace, overrides, again=again)
        for place, (notebook, values, done) in enumerate(plan, start=1):
            head = f"[{place}/{len(notebooks)}] {notebook.name}"
            if done:
                say(f"{head}: done before with the same parameters, nothing to do")
            else:
                say(f"{head}: running")
                done = _execute(notebook, workspace, values, use, say)
                figures = "".join(f"\n      {name}: {value}" for name, value in done["figures"].items())
                say(f"{head}: complete in {done['duration_s']:.0f} s{figures}")
            results.append(done)
    return results


def _find_result(
    notebook: Notebook, workspace: Workspace, values: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The notebook's result if it ended well with these parameters, its tables are whole, what it read is as
    it was, and no earlier notebook ended after it.
    """
    results = workspace.results()
    result = results.get(notebook.name)
    earlier = [item["finished"] for name, item in results.items() if name < notebook.name]
    wanted = {name: item.default for name, item in notebook.cell_parameters().items()} | dict(values)
    if result is None or result["status"] != "complete":
        return None
    if {name: result["parameters"].get(name) for name in wanted} != wanted:
        return None
    if max(earlier, default="") > result["finished"] or find_stale(workspace, notebook.name):
        return None
    try:
        for file in result["written"]:
            _check_whole(workspace.path(file["path"]))
        if notebook.name.startswith("01") and workspace.scratch is not None:
            for image in workspace.read("cohort.csv")["image"]:
                workspace.resolve(image)  # the session whose disk held it may be over
    except FileNotFoundError:
        return None
    return result


def _check_whole(path: Path) -> None:
    """Read the tables and JSON of a file or folder; `MissingInput` where one is gone or damaged."""
    for file in [path] if path.is_file() else path.iterdir():
        if file.suffix == ".csv":
            read_csv(file)
        elif file.suffix == ".json":
            read_json(file)


class _Progress:
    """Where the notebook that runs is: one line of the terminal, rewritten, or else a line a minute.

    Of the notebook's progress bars, which papermill writes into this as a file, the last state is shown
    without the bar itself: `resnet18: 40% 120/300 [02:10<03:15, 1.08s/step, epoch 6/15, ...]`.
    """

    def __init__(self, say: Callable[[str], Any], n_cells: int):
        self.say, self.n_cells, self.title = say, n_cells, ""
        self.live, self.said = sys.stderr.isatty(), time.monotonic()

    def start_cell(self, cell: Mapping[str, Any], cell_index: int) -> None:
        """Take in that this cell begins, and under which heading."""
        if cell["cell_type"] == "markdown":
            self.title = (re.findall(r"^#+ *(.*)", cell["source"], flags=re.M) or [self.title])[-1]
        self.show(f"cell {cell_index + 1} of {self.n_cells}: {self.title}")

    def write(self, text: str) -> None:
        """Take in what the notebook writes to stderr; after a carriage return stands a bar's new state."""
        states = [re.sub(r" *\|.*?\|", "", state).strip() for state in text.split("\r")[1:]]
        if states := list(filter(None, states)):
            self.show(states[-1])

    def flush(self) -> None:
        """Nothing is held back."""

    def show(self, state: str) -> None:
        """Rewrite the terminal's line; elsewhere say it, if the last one is a minute old."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{state[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)
        elif time.monotonic() - self.said >= EVERY_S:
            self.say(f"      {state}")
            self.said = time.monotonic()

    def end(self) -> None:
        """Clear the terminal's line."""
        if self.live:
            self.show("")


def _execute(
    notebook: Notebook,
    workspace: Workspace,
    values: Mapping[str, Any],
    use: Use,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    workspace.path("results", f"{notebook.name}.json").unlink(missing_ok=True)
    output = workspace.path("executed", f"{notebook.name}.ipynb")
    progress = _Progress(say, len(notebook.cells()) + 1)  # papermill adds a cell with the parameters
    try:
        with explain_write_errors(output), _kernel({COVERED: use.record["token"]}) as kernel:
            output.parent.mkdir(parents=True, exist_ok=True)
            papermill.execute_notebook(
                str(notebook.path),
                str(output),
                parameters=dict(values),
                kernel_name="python3",
                km=kernel,
                progress_bar=False,
                stderr_file=progress,
                on_cell_start=progress.start_cell,
                request_save_on_cell_execute=True,
            )
    except PapermillExecutionError as error:
        raise NotebookFailed(_describe_failure(notebook, error, progress.title, output)) from error
    except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that never came up
        raise NotebookFailed(
            f"{notebook.name}: the kernel died ({error}), most often for want of memory. "
            f"Run again: finished work is kept. What ran so far: {output}"
        ) from error
    except KeyboardInterrupt:
        use.check()  # not the user's, where another run has taken over
        raise
    finally:
        progress.end()
        _keep_last_lines(output)
    use.check()
    return _read_ending(notebook, workspace, output)


def _read_ending(notebook: Notebook, workspace: Workspace, output: Path) -> dict[str, Any]:
    """The result that the notebook left; an exception where it left none or stopped early."""
    result = workspace.result(notebook.name)
    if result is None:
        raise NotebookFailed(
            f"{notebook.name} stopped before its last cell without an error (an exit, or a kernel killed "
            f"mid-way): it left no result. Look at {output}"
        )
    if result["status"] != "complete":
        raise NotebookPaused(
            f"{notebook.name} stopped before its end with everything saved. Run the same command to go on."
        )
    return result


def _keep_last_lines(executed: Path) -> None:
    """Keep of each progress bar what a terminal would show at the end, not a line for every update.

    nbclient's `coalesce_streams` does it while the notebook runs, and then writes a figure that a later cell
    updates to a wrong place or none.
    """
    if not executed.is_file():
        return
    book = read_json(executed, "cells")
    for cell in book["cells"]:
        kept: list[Any] = []
        for output in cell.get("outputs", []):
            if output["output_type"] != "stream":
                kept.append(output)
                continue
            output["text"] = "".join(output["text"])
            if kept and kept[-1].get("name") == output["name"]:
                output["text"] = kept.pop()["text"] + output["text"]
            kept.append(output | {"text": re.sub(r"[^\n]*\r(?=[^\n])", "", output["text"])})
        if "outputs" in cell:
            cell["outputs"] = kept
    write_json(book, executed)


@contextmanager
def _kernel(environment: Mapping[str, str]) -> Iterator[KernelManager]:
    """A kernel of this very interpreter, whatever kernels Jupyter finds; its workers end with the block."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager

    kernel = KernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # leaves ipykernel's own, of this interpreter
        client_class="jupyter_client.asynchronous.AsyncKernelClient",  # as papermill's engine wants it
    )
    quiet = ["--IPKernelApp.log_level=ERROR"]  # else it warns of its own TCP on every start
    kernel.start_kernel(
        env=os.environ | environment, extra_arguments=[*quiet, "--HistoryManager.hist_file=:memory:"]
    )
    # Its pipe is closed when this process ends, in whichever way; with it go workers that a kernel leaves.
    last = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", END_OF_GROUP, str(kernel.provisioner.pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield kernel
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # it would print the interrupted cell's end as an error
        print("brainage-nb: stopping; what runs may save first. Once more ends it at once.", file=sys.stderr)
        kernel.interrupt_kernel()
        _wait_until_idle(kernel)
        raise
    finally:
        if kernel.is_alive():  # `shutdown_kernel` would interrupt it, and an idle one complains of that
            kernel.request_shutdown()
            kernel.finish_shutdown()
        kernel.cleanup_resources()
        last.communicate()


def _wait_until_idle(kernel: KernelManager) -> None:
    """Let the interrupted cell end: one that is shut down in its midst does not save."""
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TO_SAVE_S)
    except RuntimeError:  # it died, or its time is over
        pass
    finally:
        client.stop_channels()


def _describe_failure(notebook: Notebook, error: Any, title: str, output: Path) -> str:
    """One message of a failed cell: where, what, the error, where to look."""
    first = error.source.strip().partition("\n")[0]
    return (
        f"{notebook.name} stopped in cell {error.exec_count} ({title}), which starts `{first}`:\n"
        f"  {error.ename}: {error.evalue}\n"
        f"The notebook as it ran: {output}"
    )
