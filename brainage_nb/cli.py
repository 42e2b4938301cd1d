"""The command `brainage-nb`: run the notebooks headless, list what can be set, predict scans, open the app.

What a command needs is imported when it runs: help and `list` are there at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainage_nb import __version__, pipeline
from brainage_nb.parameters import ParameterError, format_value, split_items
from brainage_nb.pipeline import NotebookFailed, NotebookPaused
from brainage_nb.platforms import version_of
from brainage_nb.workspace import (
    MissingInput,
    Workspace,
    describe_stale,
    find_stale,
    guard_formula,
    locate_workspace,
    open_workspace,
    write_csv,
)

if TYPE_CHECKING:
    import pandas as pd

    from brainage_nb.predict.bundle import Bundle
    from brainage_nb.predict.cautions import Failure, Prediction

STATUS = {ParameterError: 2, FileNotFoundError: 2, NotebookPaused: 75, NotebookFailed: 1, OSError: 1}
"""What a command ends with for an error; 0 is well, 130 interrupted."""
EPILOG = """\
first steps:
  brainage-nb run --workspace demo    the whole way, on artificial heads
  brainage-nb run -p source=folder -p data_dir=scans -p table=ages.csv
  brainage-nb list 01                 what can be set in a notebook
  brainage-nb predict head.nii.gz     the age of one new scan

Without --workspace everything is written to
  {place}
($BRAINAGE_WORKSPACE names another folder.) `brainage-nb run --help` and so on
show the options of each command.

exit status: 0 well, 1 failed, 2 wrong usage, 75 paused, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 well, 1 a notebook failed, 2 wrong usage, 75 paused."""
    options, unknown = _make_parser().parse_known_args(arguments)
    try:
        if unknown:
            raise ParameterError(
                f"{' '.join(unknown)}: there is no such option. Values go as -p name=value; "
                "`brainage-nb --help` and, for one, `brainage-nb run --help` show what is known."
            )
        status = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell names it
    except tuple(STATUS) as error:
        print(f"brainage-nb: {error}", file=sys.stderr)
        return next(status for kind, status in STATUS.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        print(
            "brainage-nb: interrupted; finished work is kept, run the same command to go on.", file=sys.stderr
        )
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="brainage-nb",
        description="From T1 scans and ages to an evaluated brain-age model.",
        epilog=EPILOG.format(place=locate_workspace()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersions, nargs=0, help="show versions and exit")
    parser.set_defaults(command=lambda _: parser.print_help() or 2)
    commands = parser.add_subparsers(metavar="command")
    for add_command in (_add_run, _add_list, _add_predict, _add_app, _add_completion):
        add_command(commands)
    return parser


class _ShowVersions(argparse.Action):
    """Versions of this package and of what decides its results, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        others = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "monai", "numpy", "pandas"))
        python = f"Python {platform.python_version()} on {platform.platform()}"
        print(f"brainage-nb {__version__} ({python}; {others})")
        parser.exit()


def _add(commands: Any, call: Callable[..., int], name: str, told: str, *examples: str) -> Any:
    """Add a command whose help ends with examples."""
    lines = [f"  brainage-nb {name} {example}".rstrip() for example in examples]
    command = commands.add_parser(
        name,
        help=told,
        description=f"{told[0].upper()}{told[1:]}.",
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=call)
    return command


def _default_place() -> str:
    return str(locate_workspace()).replace("%", "%%")  # argparse fills in what follows a %


# --- run and list ---------------------------------------------------------------------------------------


def _add_run(commands: Any) -> None:
    run = _add(
        commands,
        run_command,
        "run",
        "run the notebooks in order, skipping what is done",
        "--workspace workspace/demo",
        "-p source=folder -p data_dir=scans -p table=ages.csv --dry-run",
        "--from 04 --to 04 -p epochs=40 -p weight_decay=1e-3",
    )
    told = f"folder for everything written (default: {_default_place()})"
    run.add_argument("--workspace", default="", metavar="FOLDER", help=told)
    run.add_argument("--from", dest="first", default="", metavar="NN", help="first notebook, as 02")
    run.add_argument("--to", dest="last", default="", metavar="NN", help="last notebook, as 04")
    run.add_argument("--again", action="store_true", help="run also what is done")
    run.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    told = "anything that `brainage-nb list` names (repeatable)"
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="name=value", help=told)


def _add_list(commands: Any) -> None:
    told = "show the notebooks and everything that can be set in them"
    listing = _add(commands, list_command, "list", told, "", "04")
    listing.add_argument("notebook", nargs="?", default="", metavar="NN", help="one notebook, as 04")


def run_command(options: argparse.Namespace) -> int:
    """Run the notebooks; with `--dry-run` only say which would run, and with what."""
    notebooks = pipeline.find_notebooks(options.first, options.last)
    overrides = pipeline.parse_overrides(options.parameters, notebooks)
    named = overrides.pop("workspace", "")
    if named and options.workspace not in ("", named):
        raise ParameterError(f"--workspace {options.workspace} and -p workspace={named}: give one of them.")
    root = options.workspace or named
    if options.dry_run:
        there = Workspace(locate_workspace(root))
        plan = pipeline.plan_run(notebooks, there, overrides, again=options.again)
        print(f"Workspace: {there.root}{'' if there.root.exists() else ' (would be made)'}")
        if changed := describe_stale(find_stale(there)):
            print(changed)
        for notebook, values, done in plan:
            given = [f"\n      {name} = {value!r}" for name, value in values.items() if name != "workspace"]
            how = f"would run with{''.join(given)}" if given else "would run with its defaults"
            print(f"{notebook.name}: {'done before, nothing to do' if done else how}")
        print("Nothing was run or written; without --dry-run it is.")
        return 0
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            # A batch system or a closing terminal ends, as Ctrl-C does, the kernel and its workers too.
            signal.signal(number, signal.default_int_handler)
    workspace = open_workspace(root)
    pipeline.run_notebooks(notebooks, workspace, overrides, again=options.again)
    report = workspace.path("evaluation", "report.html")
    if report.exists():
        print(f"Report: {report}")
    return 0


def list_command(options: argparse.Namespace) -> int:
    """Print each notebook with its parameters: name, default, meaning, choices."""
    width = min(110, shutil.get_terminal_size().columns)
    for notebook in pipeline.find_notebooks(options.notebook, options.notebook):
        print(notebook.name)
        cell = notebook.cell_parameters()
        for name, item in notebook.parameters().items():
            choices = f" ({item.expected})" if item.choices else ""
            mark = " " if name in cell else "+"
            line = f"{mark} {name:<22} {format_value(item.default) or '-':<14} {item.comment}{choices}"
            print(textwrap.fill(line, width, subsequent_indent=" " * 40))
        print()
    print('+ is set by -p name=value too, and in a notebook by more = "name=value name=value".')
    return 0


# --- predict --------------------------------------------------------------------------------------------


def _add_predict(commands: Any) -> None:
    predict = _add(
        commands,
        predict_command,
        "predict",
        "predict the age of scans with a saved model",
        "head.nii.gz --age 63.5",
        "scans/ --table ages.csv --out results.csv",
        "head.nii.gz --bundle W/runs/resnet18/bundle --explain",
        "t1.nii.gz --bundle fused.zip --also T2w=t2.nii.gz",
    )
    predict.add_argument("scans", nargs="+", metavar="SCAN", help="NIfTI or MGH file, or a folder of them")
    told = f"bundle folder or .zip (default: the newest in {_default_place()})"
    predict.add_argument("--bundle", default="", metavar="PLACE", help=told)
    told = "another scan of the same session, for a fused model (repeatable)"
    predict.add_argument("--also", action="append", default=[], metavar="T2w=SCAN", help=told)
    known = predict.add_mutually_exclusive_group()
    told = "true age of one scan, for its gap"
    known.add_argument("--age", type=float, metavar="YEARS", help=told)
    told = "table with true ages (CSV, TSV, XLS, XLSX), for the gaps of several"
    known.add_argument("--table", default="", metavar="FILE", help=told)
    told = "write the results to this CSV file"
    predict.add_argument("--out", default="", metavar="FILE", help=told)
    told = "write a heat map in years (NIfTI, PNG) of each scan beside the results: seconds to minutes"
    predict.add_argument("--explain", action="store_true", help=told)
    told = "scans prepared at once (default: processors)"
    predict.add_argument("--jobs", type=int, default=0, metavar="N", help=told)
    told = "where the model computes (default auto: a GPU where one works and there are many scans)"
    predict.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=told)


def predict_command(options: argparse.Namespace) -> int:
    """Predict every scan; returns 0 where all have a result, 1 where some have none."""
    from tqdm import tqdm

    from brainage_nb.models.compute import chosen_device, name_of
    from brainage_nb.predict.bundle import load_bundle
    from brainage_nb.predict.cautions import Prediction, check_age
    from brainage_nb.predict.explain import explain

    if options.out and Path(options.out).is_dir():
        raise ParameterError(f"--out {options.out} is a folder: name the CSV file in it.")
    try:
        scans = find_scans(options.scans)
        also = read_also(options.also, len(scans))
        if options.age is not None and len(scans) != 1:
            raise ValueError(f"--age is of one scan, and there are {len(scans)}: give a --table.")
        ages = find_ages(scans, options.table) if options.table else [check_age(options.age)] * len(scans)
        device, why = chosen_device(options.device, len(scans))
        bundle = load_bundle(options.bundle or find_newest_bundle(), device)
        bundle.refuse_unknown(also)
    except (ValueError, OSError) as error:
        raise ParameterError(str(error)) from error
    print(f"{len(scans)} scan(s), computed on {name_of(bundle.model.device)}{why and f' ({why})'}.")
    out = Path(options.out).absolute()
    maps = out.with_name(f"{out.stem}_heat_maps") if options.out else Path("heat_maps").absolute()
    results, n_folders = [], count_telling_folders(scans)
    found = bundle.predict_many(scans, ages, [also] * len(scans), n_jobs=options.jobs)
    for result in tqdm(found, total=len(scans), desc="scans", unit="scan", leave=False):
        results.append(result)
        if options.explain and isinstance(result, Prediction):
            explanation = explain(bundle, result)
            explanation.save(maps, result, n_folders=n_folders)
            tqdm.write(f"{result.scan}: {explanation.words}")
    return _report(bundle, results, options.out, maps if options.explain else None)


def find_scans(given: Sequence[str]) -> list[Path]:
    """The files named, and the scans in the folders named; prints what is no scan there, with the reason."""
    from brainage_nb.cohort.images import find_images

    scans: list[Path] = []
    for item in map(Path, given):
        if not item.is_dir():
            scans.append(item)
            continue
        images = find_images(item)
        for left in images.attrs["left_out"].itertuples():
            print(f"Left out, name it to predict it: {left.image}: {left.reason}.")
        if images.empty:
            raise FileNotFoundError(f"No NIfTI or MGH image of a scan lies in {item}.")
        scans += map(Path, images["image"])
    return scans


def read_also(given: Sequence[str], n_scans: int) -> dict[str, str]:
    """Further scans of one person's session by their names, from `T2w=scan2.nii.gz`."""
    also = split_items(given)
    if also and n_scans != 1:
        raise ParameterError(
            f"--also names scans of one person's session, and {n_scans} scans are to be predicted. Give one."
        )
    return also


def find_ages(scans: Sequence[Path], table: str) -> list[float | None]:
    """True ages in years from a participants table; says by what rules, and which scans have none and why."""
    from brainage_nb.sources.folder import ages_of_scans

    ages, reasons, notes = ages_of_scans(scans, table)
    for note in notes:
        print(f"{table}: {note}")
    for scan, reason in zip(scans, reasons, strict=True):
        if reason:
            print(f"{scan}: no true age: {reason}")
    return ages


def find_newest_bundle() -> Path:
    """The newest bundle of the usual workspaces; says which are damaged."""
    from brainage_nb.bundle_format import find_bundles

    found, damaged = find_bundles()
    if not found:
        none = f"No bundle was named and none lies in the workspace {locate_workspace()}. Give --bundle, or"
        raise MissingInput(" ".join([*damaged, f"{none} make one with `brainage-nb run --to 04`."]))
    for sentence in damaged:
        print(f"Left out: {sentence}")
    return found[0]


def count_telling_folders(scans: Iterable[Path | str]) -> int:
    """How many of the last folders of their paths tell files of one name apart; 0 where names differ."""
    parts = {Path(os.path.abspath(scan)).parts for scan in scans}
    return next(n for n in range(max(map(len, parts))) if len({p[-1 - n :] for p in parts}) == len(parts))


def _report(bundle: Bundle, results: list[Prediction | Failure], out: str, maps: Path | None) -> int:
    """Print all results, first what is not to be used; write the CSV file where one is wanted."""
    import pandas as pd

    from brainage_nb.predict.cautions import COLUMNS, NOT_A_DEVICE, Failure

    frame = pd.DataFrame([result.to_dict() for result in results], columns=list(COLUMNS))
    print(f"{bundle.title}; ages in years.")
    from_here = -1 - count_telling_folders(frame["path"])
    names = [os.path.join(*Path(os.path.abspath(path)).parts[from_here:]) for path in frame["path"]]
    reasons = frame["do_not_use_because"].fillna("")  # a scan without a result has none
    for name, reason in zip(names, reasons, strict=True):
        if reason:
            print(f"  {name}: {reason}")
    use = reasons.map(lambda reason: "do not use" if reason else "")
    shown = frame.assign(scan=names, use=use)
    _print_table(shown, ("scan", "use", "predicted_age", "low", "high", "age", "gap", "warnings"))
    told: dict[str, list[str]] = {}  # what is true of the model is said once, not for each scan
    for name, result in zip(names, results, strict=True):
        failure = isinstance(result, Failure)
        said = [result] if failure else [caution for caution in result.warnings if not caution.forbids_use]
        for one in said:
            told.setdefault(one.sentence.removeprefix(f"{result.scan}: "), []).append(name)
    for sentence, scans in told.items():
        print(f"  {'All scans' if len(scans) == len(names) > 1 else ', '.join(scans)}: {sentence}")
    _print_details(results, shown)
    print(NOT_A_DEVICE)
    if out:
        print(f"Written: {write_csv(frame.map(guard_formula), out)}")
    if maps:
        print(f"Heat maps: {maps}")
    n_failed = sum(isinstance(result, Failure) for result in results)
    if n_failed:
        print(f"brainage-nb: {n_failed} of {len(results)} scans have no result.", file=sys.stderr)
    return int(n_failed > 0)


def _print_table(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """These columns, but for those that hold nothing."""
    import pandas as pd

    shown = frame[list(columns)].replace("", None).dropna(axis=1, how="all")
    with pd.option_context("display.width", 200, "display.max_colwidth", 40, "display.precision", 1):
        print(shown.to_string(index=False, na_rep=""))


def _print_details(results: Iterable[Prediction | Failure], frame: pd.DataFrame) -> None:
    """Who calibrated the interval; the correction, with its own error."""
    titles = dict.fromkeys(getattr(result, "interval_title", "") for result in results)
    for title in filter(None, titles):
        print(f"Interval (low, high): {title}.")
    if not frame["corrected_age"].notna().any():
        return
    errors = frame["corrected_mae"].dropna().unique()
    own = f": such ages err by {errors[0]:.1f} years on average" if len(errors) == 1 else ""
    print(f"For comparing gaps, ages and gaps corrected for the age bias{own}.")
    _print_table(frame, ("scan", "corrected_age", "adjusted_gap"))


# --- app ------------------------------------------------------------------------------------------------


def _add_app(commands: Any) -> None:
    told = "open the prediction app in a browser"
    app = _add(commands, app_command, "app", told, "", "--bundle model.zip --port 8600 --no-browser")
    told = f"bundle to offer first (default: those of {_default_place()})"
    app.add_argument("--bundle", default="", metavar="PLACE", help=told)
    app.add_argument("--port", type=int, default=8501, metavar="N", help="port (default: 8501)")
    app.add_argument("--no-browser", action="store_true", help="only serve; do not open a browser")


def app_command(options: argparse.Namespace) -> int:
    """Serve the app on this machine until this process is ended, which ends the server too."""
    from brainage_nb.bundle_format import BundleError, open_bundle

    if not 0 < options.port < 65536:
        raise ParameterError(f"--port {options.port}: expected 1 to 65535, as 8501.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            place = f"http://127.0.0.1:{options.port}"
            raise ParameterError(f"Something is served at {place} already; open it, or give another --port.")
    try:
        from streamlit.web import cli as streamlit

        if options.bundle:
            open_bundle(options.bundle)
    except ImportError:
        raise ParameterError("Streamlit is not installed. Run: pip install 'brainage-nb[app]'") from None
    except BundleError as error:
        raise ParameterError(str(error)) from error
    print("Loading the app: some seconds, on a busy computer a minute ...", flush=True)
    import_module("brainage_nb.apps.results")  # or the browser would show an empty page all that time
    arguments = app_arguments(options.port, options.bundle, browser=not options.no_browser)
    return streamlit.main(arguments, standalone_mode=False) or 0


def app_arguments(port: int, bundle: str = "", *, browser: bool = False) -> list[str]:
    """What Streamlit is started with: the app on the loopback address only, asking for no e-mail address
    and sending no usage statistics.
    """
    settings: dict[str, Any] = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": str(not browser).lower(),
        "server.showEmailPrompt": "false",
        "server.maxUploadSize": 1024,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "theme.base": "light",
        "theme.primaryColor": "#0072B2",
    }
    script = Path(__file__).parent / "apps" / "streamlit_app.py"
    given = ["--", "--bundle", str(Path(bundle).absolute())] if bundle else []
    return ["run", str(script), *(f"--{name}={value}" for name, value in settings.items()), *given]


# --- completion -----------------------------------------------------------------------------------------


def _add_completion(commands: Any) -> None:
    told = "print a script with which a shell completes commands, options and parameters"
    examples = ("bash >> ~/.bash_completion", "zsh > ~/.zfunc/_brainage-nb")
    command = _add(commands, completion_command, "completion", told, *examples)
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def completion_command(options: argparse.Namespace) -> int:
    """Print the script; parameters of the notebooks are those of this release."""
    try:
        import shtab
    except ImportError:
        raise ParameterError("shtab is not installed. Run: pip install 'brainage-nb[completion]'") from None
    names = dict.fromkeys(name for one in pipeline.find_notebooks() for name in one.parameters())
    parser = _make_parser()
    for command in parser._subparsers._group_actions[0].choices.values():
        for action in command._actions:
            if action.dest in ("scans", "bundle", "table", "out", "workspace"):
                action.complete = shtab.FILE
            elif action.metavar == "NN":
                action.choices = [notebook.number for notebook in pipeline.find_notebooks()]
            elif action.dest == "parameters":
                action.choices = [f"{name}=" for name in names]
    print(shtab.complete(parser, options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
