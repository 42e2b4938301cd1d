"""Keep notebooks/NN_name.ipynb and notebooks/src/NN_name.py twins, outputs stripped, and every address right.

python notebooks/twins.py                       source -> notebook (what `make notebooks` runs)
python notebooks/twins.py --check               exit 1 where the two disagree, naming them
python notebooks/twins.py --port NAME.ipynb     bring an edit made in Colab back into the source
python notebooks/twins.py --repository [O/N]    write repository and version of pyproject.toml (with O/N: that
                                                repository, there too) into badges, set-up cells, README,
                                                CITATION.cff and the package
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
RUN_ALL = ROOT / "kaggle" / "run_all" / "run_all.py"
SOURCES = [*sorted((FOLDER / "src").glob("*.py")), RUN_ALL]
NAMING = ("README.md", "CITATION.cff", "colab_setup.sh", "brainage_nb/__init__.py")
ADDRESSED = [*(ROOT / name for name in NAMING), *SOURCES]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

# The one set-up cell of every notebook. Where the package is absent it runs the set-up script: that of
# $BRAINAGE_SOURCE, else of the wheel data set attached on Kaggle, else of the release, so that notebook,
# script and package are of one version.
SETUP_CELL = """\
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("brainage_nb") is None:
    _near = 'export PYTHON=$1; for at in "$BRAINAGE_SOURCE" /kaggle/input/{*,*/*,*/*/*}; do [ -f "$at/$0" ] && exec bash -- "$at/$0"; done'
    _far = 'script=$(curl -fsSL https://raw.githubusercontent.com/{repository}/v{version}/$0) && exec bash -c "$script"'
    _else = 'echo "No internet? Attach the wheel data set (README, Kaggle)." >&2; exit 1'
    subprocess.run(["bash", "-c", f"{_near}; {_far}; {_else}", "colab_setup.sh", sys.executable], check=True)
"""  # noqa: E501


def project() -> dict:
    """The project's table of pyproject.toml, the one place that holds repository and version."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def repository() -> str:
    """The repository as owner/name."""
    return project()["urls"]["Repository"].removeprefix("https://github.com/")


def setup_cell() -> str:
    """The set-up cell of this repository and version."""
    return SETUP_CELL.replace("{repository}", repository()).replace("{version}", project()["version"])


def notebook_of(source: Path) -> Path:
    """Where the notebook of a source lies."""
    return source.with_suffix(".ipynb") if source == RUN_ALL else FOLDER / f"{source.stem}.ipynb"


def generate(source: Path) -> nbformat.NotebookNode:
    """The notebook of one source, with the cell ids of the notebook that is there."""
    fresh = jupytext.read(source)
    target = notebook_of(source)
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
    parser.add_argument("--repository", nargs="?", const="", metavar="OWNER/NAME")
    options = parser.parse_args()
    if options.port:
        return port(options.port)
    if options.repository is not None:
        readdress(options.repository)
    return check() if options.check else write()


def write() -> int:
    """Regenerate every notebook."""
    for source in SOURCES:
        nbformat.write(generate(source), notebook_of(source))
    return 0


def check() -> int:
    """Name every notebook that differs from its source or holds outputs."""
    wrong = []
    for source in SOURCES:
        target = notebook_of(source)
        if not target.exists():
            wrong.append(f"{target.name} is missing")
            continue
        notebook = nbformat.read(target, as_version=4)
        if any(cell.get("outputs") for cell in notebook.cells):
            wrong.append(f"{target.name} holds outputs")
        if text_of(notebook) != text_of(generate(source)):
            wrong.append(f"{target.name} differs from src/{source.name}")
        if setup_cell() not in source.read_text():
            wrong.append(f"src/{source.name} has another set-up cell (run `make badges`)")
    for line in wrong:
        print(f"{line}. Run `make notebooks` (or port an edit made in the notebook, see CONTRIBUTING).")
    return 1 if wrong else 0


def port(notebook: Path) -> int:
    """Write the source anew from an edited notebook, then the notebook from the source."""
    source = next(source for source in SOURCES if source.stem == notebook.stem)
    edited = nbformat.read(notebook, as_version=4)
    edited.metadata = jupytext.read(source).metadata
    jupytext.write(edited, source, fmt="py:percent")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(source)], check=True)
    return write()


def readdress(new: str) -> None:
    """Write repository and version into every file that names them; `new` other than "" is the repository."""
    if new and not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise SystemExit(f"REPO={new!r}: expected owner/name, as in make badges REPO=someone/brainage_nb")
    old, tag = repository(), f"v{project()['version']}"
    pyproject = ROOT / "pyproject.toml"
    if new:
        pyproject.write_text(
            pyproject.read_text().replace(f"https://github.com/{old}", f"https://github.com/{new}")
        )
    for path in ADDRESSED:
        path.write_text(readdressed(path.read_text(), old, new or old, tag))


def readdressed(text: str, old: str, new: str, tag: str) -> str:
    """A file's text with repository `new` for `old`, badges at the release `tag`, and that set-up cell."""
    text = text.replace(old, new)
    text = re.sub(rf"({re.escape(new)}/blob/)[^/]+(/notebooks/)", rf"\g<1>{tag}\g<2>", text)
    text = re.sub(rf"({re.escape(new)} && cd )[\w.-]+", rf"\g<1>{new.split('/')[1]}", text)
    version = tag.removeprefix("v")
    text = re.sub(r"^(VERSION=|version: ).*$", rf"\g<1>{version}", text, flags=re.M)
    text = re.sub(r"^(__version__ = ).*$", rf'\g<1>"{version}"', text, flags=re.M)
    start, end = text.find("# %%\nimport importlib.util\n"), text.find("# %% [markdown]\n# ## Parameters")
    if 0 < start < end:
        text = text[:start] + "# %%\n" + setup_cell() + "\n" + text[end:]
    return text


if __name__ == "__main__":
    sys.exit(main())
