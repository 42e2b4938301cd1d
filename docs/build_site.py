"""Build the site: python docs/build_site.py workspace/demo build/site

Stages docs/*.md, the notebooks that the demo executed, CONTRIBUTING, CHANGELOG and kaggle/README.md into one
folder, then runs Sphinx there, offline, with warnings as errors. The site is build/site/html/index.html.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import layers  # noqa: E402
import refusals  # noqa: E402

from brainage_nb.parameters import format_value  # noqa: E402
from brainage_nb.pipeline import find_notebooks  # noqa: E402

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# Files of the repository that are pages too -> their place in the site; everything below docs/ keeps its own.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kaggle/README.md": "guides/kaggle_kernels.md",
}
PARAMETERS = """\
# Everything that can be set

**Bold** names stand in the notebook's parameters cell. All names can be set on the command line with
`-p name=value`, the others in a notebook with `more = "name=value name=value"`. `brainage-nb list` prints the
same.
"""
LIVE_FORM = "A live form: run this cell in Jupyter, Colab or Kaggle to use it."
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def main(demo: str, target: str) -> int:
    """Write the generated pages, stage everything, run Sphinx; its exit status."""
    refusals.PAGE.write_text(refusals.write_page(), encoding="utf-8")
    layers.PICTURE.write_text(layers.draw_layers(), encoding="utf-8")
    source = Path(target) / "source"
    shutil.rmtree(source, ignore_errors=True)
    stage_pages(source)
    (source / "parameters.md").write_text(write_parameters(), encoding="utf-8")
    for notebook in sorted(Path(demo, "executed").glob("0*.ipynb")):
        stage_notebook(notebook, source / "notebooks" / notebook.name, Path(demo).resolve())
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        f"{target}/doctrees",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([*command, str(source), f"{target}/html"], env=environment, check=False).returncode


def stage_pages(source: Path) -> None:
    """Copy the pages with their links made those of the site."""
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("*.toml", "__pycache__", "[!c]*.py"))
    for name in PAGES:
        shutil.copy(ROOT / name, source / PAGES[name])
    origins = {place: name for name, place in PAGES.items()}
    for page in source.rglob("*.md"):
        place = page.relative_to(source).as_posix()
        origin = Path(origins.get(place, f"docs/{place}"))
        page.write_text(relink(page.read_text(encoding="utf-8"), origin, Path(place)), encoding="utf-8")


def relink(text: str, origin: Path, place: Path) -> str:
    """Links of a page at `origin` in the repository as they are at `place` in the site.

    What is no page of the site is linked in the repository.
    """

    def replace(match: re.Match[str]) -> str:
        target = os.path.normpath(origin.parent / match[1])
        if target in PAGES:
            inside = PAGES[target]
        elif target.startswith(("docs/", "notebooks/0")):
            inside = target.removeprefix("docs/")
        else:
            return f"{REPOSITORY}/blob/main/{target}"
        return os.path.relpath(inside, place.parent)

    return LINK.sub(replace, text)


def write_parameters() -> str:
    """The page of everything that can be set, from the notebooks and settings classes."""
    parts = [PARAMETERS]
    for notebook in find_notebooks():
        parts += [f"## {notebook.name}\n", "| name | default | meaning |", "|---|---|---|"]
        cell = notebook.cell_parameters()
        for name, item in notebook.parameters().items():
            shown = f"**`{name}`**" if name in cell else f"`{name}`"
            default = f"`{format_value(item.default)}`" if format_value(item.default) else ""
            choices = f" ({item.expected})" if item.choices else ""
            parts.append(f"| {shown} | {default} | {item.comment}{choices} |".replace("\n", " "))
        parts.append("")
    return "\n".join(parts)


def stage_notebook(executed: Path, target: Path, demo: Path) -> None:
    """Copy an executed notebook: no paths of this machine, no live widgets, the set-up cell folded."""
    text = executed.read_text(encoding="utf-8").replace(str(demo), "workspace/demo")
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if "importlib.util.find_spec(" in cell.source:
            cell.metadata["tags"] = ["hide-input"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace("# Parameters", "# what the demo sets instead", 1)
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                output.data = {
                    "text/plain": "A live form: run this cell in Jupyter, Colab or Kaggle to use it."
                }
    notebook.metadata.pop("widgets", None)
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
