"""The command `brainage-nb`: run the notebooks headless, list them, predict scans, open the app."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Sequence

from brainage_nb import __version__
from brainage_nb.apps import predict_cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 well, 1 a notebook failed, 2 wrong usage, 75 paused."""
    options = _parser().parse_args(arguments)
    from brainage_nb.parameters import ParameterError
    from brainage_nb.pipeline import NotebookFailed, NotebookPaused

    try:
        return options.command(options)
    except (ParameterError, FileNotFoundError) as error:
        print(f"brainage-nb: {error}", file=sys.stderr)
        return 2
    except NotebookPaused as error:
        print(f"brainage-nb: {error}", file=sys.stderr)
        return 75
    except (NotebookFailed, OSError) as error:
        print(f"brainage-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "brainage-nb: interrupted; finished work is kept, run the same command to go on.", file=sys.stderr
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="brainage-nb", description="From T1 scans and ages to an evaluated brain-age model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="run the notebooks in order, skipping what is done")
    run.add_argument(
        "--workspace", default="", help="folder for everything written (default: the platform's usual place)"
    )
    run.add_argument("--from", dest="first", default="", metavar="NN", help="first notebook, as 02")
    run.add_argument("--to", dest="last", default="", metavar="NN", help="last notebook, as 04")
    run.add_argument("--again", action="store_true", help="run also what is done")
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="name=value",
        help="anything that `brainage-nb list` names (repeatable)",
    )
    run.set_defaults(command=_run)

    predict_cli.add_parsers(commands)

    listing = commands.add_parser("list", help="show the notebooks and everything that can be set in them")
    listing.add_argument("notebook", nargs="?", default="", metavar="NN", help="one notebook, as 04")
    listing.set_defaults(command=_list)
    return parser


def _run(options: argparse.Namespace) -> int:
    from brainage_nb.parameters import ParameterError
    from brainage_nb.pipeline import find_notebooks, parse_overrides, run_notebooks
    from brainage_nb.workspace import open_workspace

    _end_as_interrupted()
    notebooks = find_notebooks(options.first, options.last)
    overrides = parse_overrides(options.parameters, notebooks)
    named = overrides.pop("workspace", "")
    if named and options.workspace not in ("", named):
        raise ParameterError(f"--workspace {options.workspace} and -p workspace={named}: give one of them.")
    workspace = open_workspace(options.workspace or named)
    run_notebooks(notebooks, workspace, overrides, again=options.again)
    report = workspace.path("evaluation", "report.html")
    if report.exists():
        print(f"Report: {report}")
    return 0


def _end_as_interrupted() -> None:
    """Let a batch system or a closing terminal, as Ctrl-C does, end the kernel and its workers too."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def _list(options: argparse.Namespace) -> int:
    from brainage_nb.pipeline import find_notebooks

    for notebook in find_notebooks(options.notebook, options.notebook):
        print(notebook.name)
        cell = notebook.cell_parameters()
        for name, item in notebook.parameters().items():
            choices = f" ({item.expected})" if item.choices else ""
            mark = " " if name in cell else "+"
            line = f"{mark} {name:<22} {_shown(item.default):<14} {item.comment}{choices}"
            print(textwrap.fill(line, 110, subsequent_indent=" " * 40))
        print()
    print('+ is set by -p name=value too, and in a notebook by more = "name=value name=value".')
    return 0


def _shown(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default) or "-"


if __name__ == "__main__":
    sys.exit(main())
