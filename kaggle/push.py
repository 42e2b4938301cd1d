"""Push one notebook to Kaggle as a kernel, with parameters injected (a push itself takes none).

    python kaggle/push.py 04_train_resnet18 --owner NAME -p epochs=40 -p max_minutes=660
    python kaggle/push.py run_all --owner NAME -p settings="epochs=40" --offline
    python kaggle/push.py 04_train_resnet18 --owner NAME --part 2     go on where part 1 ran out of time
    python kaggle/push.py --status --owner NAME                       how the pushed ones are doing

Needs the `kaggle` command and its token. `--dry-run` leaves the prepared folder and prints its path;
`--offline` asks for no internet and attaches the wheel data set (make_wheels.py); `--dataset OWNER/NAME`
attaches another one, such as your scans, which every notebook that opens them needs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import papermill

from brainage_nb.parameters import ParameterError
from brainage_nb.pipeline import Notebook, parse_overrides

FOLDER = Path(__file__).parent
WHEELS = "brainage-nb-wheels"
OWNER = "[A-Za-z0-9_-]{3,}"
LONGEST_SLUG = 50  # Kaggle cuts longer titles, and the slug made of them then differs from the id


class SlugError(ValueError):
    """An id that Kaggle would not take, or would take as another; the message says what to change."""


def kaggle_owner(text: str) -> str:
    """A Kaggle user name, checked; for argparse."""
    if not re.fullmatch(OWNER, text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no Kaggle user name: 3 or more letters, digits, - or _"
        )
    return text


def part_number(text: str) -> int:
    """Which part of a long run, from 1; for argparse."""
    if not re.fullmatch("[1-9][0-9]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: expected a whole number from 1 to 99")
    return int(text)


def kernels() -> list[str]:
    """Names of the kernels' folders, in order."""
    return sorted(path.parent.name for path in FOLDER.glob("*/kernel-metadata.json"))


def metadata_of(
    name: str, owner: str, *, part: int = 1, offline: bool = False, datasets: Sequence[str] = ()
) -> dict[str, Any]:
    """A kernel's metadata for this owner.

    Parameters
    ----------
    name : str
        A folder beside this script.
    owner : str
        Kaggle user name.
    part : int
        From 2 on: another kernel that has the part before as its input and goes on from it.
    offline : bool
        Without internet, with the wheel data set.
    datasets : sequence of str
        Ids (owner/name) of further data sets to attach.
    """
    content = json.loads((FOLDER / name / "kernel-metadata.json").read_text().replace("OWNER/", f"{owner}/"))
    if part > 1:
        before = content["id"] + (f"-part-{part - 1}" if part > 2 else "")
        content["kernel_sources"] = [before]
        content["id"], content["title"] = f"{content['id']}-part-{part}", f"{content['title']} part {part}"
    content["dataset_sources"] = [*datasets, *([f"{owner}/{WHEELS}"] if offline else [])]
    content["enable_internet"] = not offline
    check_slugs(content)
    return content


def check_slugs(content: dict[str, Any]) -> None:
    """Raise `SlugError` where an id is malformed, too long, or not what Kaggle makes of the title."""
    for handle in [content["id"], *content["kernel_sources"], *content["dataset_sources"]]:
        if not re.fullmatch(OWNER + "/[a-z0-9][a-z0-9-]{4,}", handle):
            raise SlugError(f"{handle!r} is no Kaggle id: owner/name, name of small letters, digits and -.")
    slug = content["id"].split("/")[1]
    made = re.sub(r"[^a-z0-9]+", "-", content["title"].lower()).strip("-")
    if slug != made:
        raise SlugError(
            f"Kaggle makes the slug {made!r} of the title; the id says {slug!r}. Make them agree."
        )
    if len(content["title"]) > LONGEST_SLUG:
        raise SlugError(f"The title {content['title']!r} is longer than {LONGEST_SLUG} characters.")


def prepare(name: str, content: dict[str, Any], given: list[str], target: Path) -> Path:
    """Write the notebook with parameters injected, and its metadata, into `target`."""
    folder = FOLDER / name if (FOLDER / name / content["code_file"]).exists() else FOLDER.parent / "notebooks"
    notebook = Notebook(folder / content["code_file"])
    papermill.execute_notebook(
        str(notebook.path),
        str(target / content["code_file"]),
        parameters=notebook.fill_cell(parse_overrides(given, [notebook])),
        prepare_only=True,
        progress_bar=False,
    )
    (target / "kernel-metadata.json").write_text(json.dumps(content, indent=2) + "\n")
    return target


def show_status(owner: str) -> int:
    """Print Kaggle's word on each kernel; 1 where one could not be asked (most often: never pushed)."""
    failed = 0
    for name in kernels():
        handle = metadata_of(name, owner)["id"]
        done = subprocess.run(["kaggle", "kernels", "status", handle], capture_output=True, text=True)
        failed |= done.returncode != 0
        print(f"{name:<26} {(done.stdout.strip() or done.stderr.strip() or 'no answer').splitlines()[-1]}")
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Prepare and push, or show the status; returns the exit status."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("notebook", nargs="?", choices=kernels())
    parser.add_argument("--owner", type=kaggle_owner, required=True, help="your Kaggle user name")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="name=value")
    parser.add_argument("--part", type=part_number, default=1, help="2: go on from the output of part 1")
    parser.add_argument("--dataset", dest="datasets", action="append", default=[], metavar="OWNER/NAME")
    parser.add_argument("--offline", action="store_true", help="no internet, with the wheel data set")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--status", action="store_true")
    options = parser.parse_args(arguments)
    if options.status == bool(options.notebook):
        parser.error("name one notebook, or --status")
    if options.status:
        return show_status(options.owner)
    target = Path(tempfile.mkdtemp(prefix="brainage_kaggle_"))
    try:
        chosen = {name: getattr(options, name) for name in ("part", "offline", "datasets")}
        content = metadata_of(options.notebook, options.owner, **chosen)
        prepare(options.notebook, content, options.parameters, target)
    except (ParameterError, SlugError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Prepared {target}", flush=True)
    if not options.dry_run:
        subprocess.run(["kaggle", "kernels", "push", "-p", str(target)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
