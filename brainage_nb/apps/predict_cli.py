"""`brainage-nb predict` and `brainage-nb app`: their options and what they do. Predicting itself is in
`models.bundle`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainage_nb.predict.bundle import Bundle
    from brainage_nb.predict.cautions import Failure, Prediction


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add `predict` and `app` to the command line's subcommands."""
    predict = commands.add_parser("predict", help="predict the age of scans with a saved model")
    predict.add_argument(
        "--bundle", default="", help="bundle folder or .zip (default: the newest in the workspace)"
    )
    predict.add_argument("scans", nargs="+", metavar="SCAN", help="NIfTI or MGH file, or a folder of them")
    predict.add_argument(
        "--table", default="", help="table with true ages (CSV, TSV, XLS, XLSX), for the gaps"
    )
    predict.add_argument("--out", default="", help="write the results to this CSV file")
    predict.add_argument(
        "--explain",
        action="store_true",
        help="write a heat map in years (NIfTI, PNG) of each scan beside the results: seconds to minutes",
    )
    predict.add_argument("--jobs", type=int, default=0, help="scans prepared at once (default: processors)")
    predict.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model computes (default auto: a GPU where one works and there are many scans)",
    )
    predict.set_defaults(command=run_predict)

    app = commands.add_parser("app", help="open the prediction app in a browser")
    app.add_argument("--bundle", default="", help="bundle to offer first (default: those of the workspace)")
    app.add_argument("--port", type=int, default=8501, help="port (default: 8501)")
    app.add_argument("--no-browser", action="store_true", help="only serve; do not open a browser")
    app.set_defaults(command=run_app)


# --- predict --------------------------------------------------------------------------------------------


def run_predict(options: argparse.Namespace) -> int:
    """Predict every scan; returns 0 where all have a result, 1 where some have none, 2 for wrong usage."""
    from tqdm import tqdm

    from brainage_nb.bundle_format import BundleError
    from brainage_nb.models.compute import chosen_device, name_of
    from brainage_nb.predict.bundle import load_bundle
    from brainage_nb.predict.cautions import NOT_A_DEVICE

    try:
        scans = scan_files(options.scans)
        ages = ages_of(scans, options.table) if options.table else None
        device, why = chosen_device(options.device, len(scans))
        bundle = load_bundle(options.bundle or newest_bundle(), device)
    except (BundleError, ValueError, OSError) as error:
        print(f"brainage-nb predict: {error}", file=sys.stderr)
        return 2
    print(f"{len(scans)} scan(s), computed on {name_of(bundle.model.device)}{why and f' ({why})'}.")
    results, n_folders = [], folders_that_tell_apart(scans)
    for result in tqdm(
        bundle.predict_many(scans, ages, n_jobs=options.jobs),
        total=len(scans),
        desc="scans",
        unit="scan",
        leave=False,
    ):
        results.append(result)
        if options.explain:
            _explain(bundle, result, _explanations_folder(options.out), n_folders)
    return _report(bundle, results, options, NOT_A_DEVICE)


def scan_files(given: Sequence[str]) -> list[Path]:
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


def ages_of(scans: Sequence[Path], table: str) -> list[float | None]:
    """True ages in years from a participants table; says by what rules, and which scans have none and why."""
    from brainage_nb.sources.folder import ages_of_scans

    ages, reasons, notes = ages_of_scans(scans, table)
    for note in notes:
        print(f"{table}: {note}")
    for scan, reason in zip(scans, reasons, strict=True):
        if reason:
            print(f"{scan}: no true age: {reason}")
    return ages


def newest_bundle() -> Path:
    """The newest bundle of the usual workspaces."""
    found = bundles_in_reach()
    if not found:
        raise FileNotFoundError(
            "No bundle was named and none lies in the workspace. Give --bundle, or make one: `make demo`, or "
            "notebook 04 or 05."
        )
    return found[0]


def bundles_in_reach() -> list[Path]:
    """Bundles of the default workspace and `./workspace/demo`: newest workspace first, networks first."""
    from brainage_nb.platforms import default_root
    from brainage_nb.workspace import read_json

    places = {root.absolute() for root in (default_root(), Path("workspace"), Path("workspace", "demo"))}
    known: list[tuple[float, bool, float, Path]] = []
    for root in places:
        made = {file: file.stat().st_mtime for file in root.glob("runs/*/bundle/bundle.json")}
        newest = max(made.values(), default=0.0)
        kinds = {file: read_json(file).get("kind") for file in made}
        known += [(newest, kinds[file] == "resnet18", made[file], file.parent) for file in made]
    return [place for *_, place in sorted(known, reverse=True)]


def _explanations_folder(out: str) -> Path:
    return (
        Path(out).absolute().parent / f"{Path(out).stem}_heat_maps" if out else Path("heat_maps").absolute()
    )


def folders_that_tell_apart(scans: Iterable[Path | str]) -> int:
    """How many of the last folders of their paths tell files of one name apart; 0 where names differ."""
    parts = {Path(os.path.abspath(scan)).parts for scan in scans}
    return next(n for n in range(max(map(len, parts))) if len({p[-1 - n :] for p in parts}) == len(parts))


def _explain(bundle: Bundle, result: Prediction | Failure, folder: Path, n_folders: int) -> None:
    from tqdm import tqdm

    from brainage_nb.predict.cautions import Prediction
    from brainage_nb.predict.explain import explain

    if isinstance(result, Prediction):
        explanation = explain(bundle, result)
        explanation.save(folder, result, n_folders=n_folders)
        tqdm.write(f"{result.scan}: {explanation.words}")


def _report(bundle: Bundle, results: list[Any], options: argparse.Namespace, notice: str) -> int:
    import pandas as pd

    from brainage_nb.predict.cautions import COLUMNS, Failure
    from brainage_nb.workspace import write_csv

    frame = pd.DataFrame([result.to_dict() for result in results], columns=list(COLUMNS))
    failed = [result for result in results if isinstance(result, Failure)]
    shown = [
        name
        for name in ("predicted_age", "low", "high", "corrected_age", "age", "gap", "adjusted_gap")
        if frame[name].notna().any()
    ]
    print(f"{bundle.title}; ages in years.")
    with pd.option_context("display.width", 200, "display.max_colwidth", 40, "display.precision", 1):
        from_here = -1 - folders_that_tell_apart(frame["path"])
        names = [os.path.join(*Path(os.path.abspath(path)).parts[from_here:]) for path in frame["path"]]
        print(frame.assign(scan=names)[["scan", *shown, "warnings"]].to_string(index=False, na_rep=""))
    for name, result in zip(names, results, strict=True):
        for sentence in _sentences(result):
            print(f"  {name}: {sentence.removeprefix(f'{result.scan}: ')}")
    print(notice)
    if options.out:
        write_csv(frame, options.out)
        print(f"Written: {options.out}")
    if options.explain:
        print(f"Heat maps: {_explanations_folder(options.out)}")
    if failed:
        print(f"brainage-nb predict: {len(failed)} of {len(results)} scans have no result.", file=sys.stderr)
    return 1 if failed else 0


def _sentences(result: Prediction | Failure) -> list[str]:
    from brainage_nb.predict.cautions import Failure

    return (
        [result.sentence]
        if isinstance(result, Failure)
        else [caution.sentence for caution in result.warnings]
    )


# --- app ------------------------------------------------------------------------------------------------


def run_app(options: argparse.Namespace) -> int:
    """Serve the app on this machine until this process is ended; 2 where it cannot be served."""
    from brainage_nb.bundle_format import BundleError, open_bundle

    try:
        from streamlit.web import cli as streamlit

        if options.bundle:
            open_bundle(options.bundle)
    except ImportError:
        reason = "Streamlit is not installed. Run: pip install 'brainage-nb[app]'"
    except BundleError as error:
        reason = str(error)
    else:  # in this process, so that whatever ends it ends the server
        arguments = app_arguments(options.port, options.bundle, browser=not options.no_browser)
        return streamlit.main(arguments, standalone_mode=False) or 0
    print(f"brainage-nb app: {reason}", file=sys.stderr)
    return 2


def app_arguments(port: int, bundle: str = "", *, browser: bool = False) -> list[str]:
    """What Streamlit is started with: the app on the loopback address only, asking for no e-mail address
    and sending no usage statistics.
    """
    script = Path(__file__).with_name("streamlit_app.py")
    settings = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": not browser,
        "server.showEmailPrompt": False,
        "server.maxUploadSize": 1024,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "theme.base": "light",
        "theme.primaryColor": "#0072B2",
    }
    flags = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
    ]
    given = ["--", "--bundle", str(Path(bundle).absolute())] if bundle else []
    return ["run", str(script), *flags, *given]
