"""Push one notebook to Kaggle as a kernel, with parameters injected (a push itself takes none).

    python kaggle/push.py 04_train_resnet18 --owner NAME -p epochs=40 [--dry-run]

Needs the `kaggle` command and its token. `--dry-run` leaves the prepared folder and prints its path.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import papermill

from brainage_nb.pipeline import Notebook, ParameterError, parse_overrides

FOLDER = Path(__file__).parent


def prepare(name: str, owner: str, given: list[str], target: Path) -> Path:
    """Write the notebook with parameters injected, and its metadata with the owner's name, into `target`."""
    metadata = json.loads((FOLDER / name / "kernel-metadata.json").read_text().replace("OWNER/", f"{owner}/"))
    notebook = Notebook(FOLDER.parent / "notebooks" / f"{name}.ipynb")
    papermill.execute_notebook(
        str(notebook.path),
        str(target / metadata["code_file"]),
        parameters=parse_overrides(given, [notebook]),
        prepare_only=True,
        progress_bar=False,
    )
    (target / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def main() -> int:
    """Prepare and push; returns the exit status."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/kernel-metadata.json"))
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("notebook", choices=names)
    parser.add_argument("--owner", required=True, help="your Kaggle user name")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="name=value")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    target = Path(tempfile.mkdtemp(prefix="brainage_kaggle_"))
    try:
        prepare(options.notebook, options.owner, options.parameters, target)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Prepared {target}")
    if not options.dry_run:
        subprocess.run(["kaggle", "kernels", "push", "-p", str(target)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
