"""Keep notebooks/NN_name.ipynb and notebooks/src/NN_name.py twins, outputs stripped.

python notebooks/twins.py                       source -> notebook (what `make notebooks` runs)
python notebooks/twins.py --check               exit 1 where the two disagree, naming them
python notebooks/twins.py --port NAME.ipynb     bring an edit made in Colab back into the source
python notebooks/twins.py --repository O/N      rewrite the repository's address everywhere
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
ADDRESSED = [
    ROOT / "pyproject.toml",
    ROOT / "README.md",
    ROOT / "colab_setup.sh",
    *sorted((FOLDER / "src").glob("*.py")),
]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def repository() -> str:
    """The repository as owner/name, from pyproject.toml, the one place that holds it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def generate(source: Path) -> nbformat.NotebookNode:
    """The notebook of one source, with the cell ids of the notebook that is there."""
    fresh = jupytext.read(source)
    target = FOLDER / f"{source.stem}.ipynb"
    known = nbformat.read(target, as_version=4) if target.exists() else nbformat.v4.new_notebook()
    if target.exists():
        fresh = combine_inputs_with_outputs(fresh, known)
    kept = {cell.id for cell in known.cells}
    for place, cell in enumerate(fresh.cells):
        if (
            cell.id not in kept
        ):  # a new cell: an id that depends on its text alone, so that a rerun changes nothing
            cell.id = hashlib.sha256(f"{place}{cell.source}".encode()).hexdigest()[:8]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    fresh.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            "accelerator": "GPU",
            "colab": {"provenance": []},
        }
    )
    fresh.nbformat, fresh.nbformat_minor = 4, 5
    return fresh


def text_of(notebook: nbformat.NotebookNode) -> str:
    """Everything of a notebook that its source fixes: kinds, texts and tags of its cells."""
    kept = [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]
    return json.dumps([kept, notebook.metadata], sort_keys=True)


def main() -> int:
    """Run one of the four forms in the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--port", type=Path, metavar="NAME.ipynb")
    parser.add_argument("--repository", metavar="OWNER/NAME")
    options = parser.parse_args()
    if options.port:
        return port(options.port)
    if options.repository is not None:
        readdress(options.repository)
    return check() if options.check else write()


def write() -> int:
    """Regenerate every notebook."""
    for source in sorted((FOLDER / "src").glob("*.py")):
        nbformat.write(generate(source), FOLDER / f"{source.stem}.ipynb")
    return 0


def check() -> int:
    """Name every notebook that differs from its source or holds outputs."""
    wrong = []
    for source in sorted((FOLDER / "src").glob("*.py")):
        target = FOLDER / f"{source.stem}.ipynb"
        if not target.exists():
            wrong.append(f"{target.name} is missing")
            continue
        notebook = nbformat.read(target, as_version=4)
        if any(cell.get("outputs") for cell in notebook.cells):
            wrong.append(f"{target.name} holds outputs")
        if text_of(notebook) != text_of(generate(source)):
            wrong.append(f"{target.name} differs from src/{source.name}")
    for line in wrong:
        print(f"{line}. Run `make notebooks` (or port an edit made in the notebook, see CONTRIBUTING).")
    return 1 if wrong else 0


def port(notebook: Path) -> int:
    """Write the source anew from an edited notebook, then the notebook from the source."""
    source = FOLDER / "src" / f"{notebook.stem}.py"
    edited = nbformat.read(notebook, as_version=4)
    edited.metadata = jupytext.read(source).metadata
    jupytext.write(edited, source, fmt="py:percent")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(source)], check=True)
    return write()


def readdress(new: str) -> None:
    """Replace the repository's address wherever it stands."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise SystemExit(f"REPO={new!r}: expected owner/name, as in make badges REPO=someone/brainage_nb")
    old = repository()
    for path in ADDRESSED:
        if path.exists():
            path.write_text(path.read_text().replace(old, new))


if __name__ == "__main__":
    sys.exit(main())
