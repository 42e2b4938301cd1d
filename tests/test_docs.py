"""The pages of docs/: what they say of the code is what the code is, their links resolve, examples run."""

import ast
import builtins
import doctest
import re
import shutil
import sys
import unicodedata
from importlib import import_module
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

import brainage_nb
from brainage_nb.cohort import cleaning
from brainage_nb.pipeline import find_notebooks
from brainage_nb.predict.cautions import CAUTIONS
from tests.models.conftest import make_tiny_cohort
from tests.models.tiny_bundle import write_scan

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
PAGES += [ROOT / "kaggle" / "README.md"]


@pytest.fixture(scope="module")
def scripts():
    """The scripts of docs/, by name."""
    sys.path.insert(0, str(DOCS))
    yield {name: import_module(name) for name in ("build_site", "layers", "refusals")}
    sys.path.remove(str(DOCS))


def anchor_of(heading):
    """The anchor that GitHub and MyST give a heading."""
    kept = [one for one in heading.lower() if one in " -_" or unicodedata.category(one)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def anchors_of(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    return {anchor_of(heading) for heading in re.findall(r"(?m)^#+ +(.+?) *$", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_internal_link_and_anchor_resolves(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name} links {link}, which is not there"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_pages_examples_exist(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("brainage_nb"):
                missing = {name.name for name in node.names} - set(dir(import_module(node.module)))
                assert not missing, f"{page.name} imports {missing} from {node.module}"
    known = {name for notebook in find_notebooks() for name in notebook.parameters()}
    assert {*re.findall(r"-p [\"']?(\w+)=\S", text)} - {"name", "settings"} <= known


def test_every_page_of_the_site_is_in_a_table_of_contents():
    listed = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8")):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / re.sub(r".*<|>", "", line)).resolve() for line in lines}
    pages = {page.with_suffix("") for page in DOCS.rglob("*.md")} - {DOCS / "index"}
    assert pages <= listed


def test_links_of_a_page_become_those_of_the_site(scripts):
    relink = scripts["build_site"].relink
    here = Path("docs/guides/colab.md"), Path("guides/colab.md")
    text = "[a](../data.md) [b](../../notebooks/01_x.ipynb) [c](../../CONTRIBUTING.md#tests)"
    expected = "[a](../data.md) [b](../notebooks/01_x.ipynb) [c](../contributing.md#tests)"
    assert relink(text, *here) == expected
    unchanged = "[d](https://example.org) [e](#here) ![f](../pictures/steps.png)"
    assert relink(unchanged, *here) == unchanged
    outside = relink("[a](../../brainage_nb/cli.py)", *here)
    assert outside == f"[a]({scripts['build_site'].REPOSITORY}/blob/main/brainage_nb/cli.py)"


def test_a_staged_notebook_has_no_paths_of_the_machine_and_no_live_form(scripts, tmp_path):
    form = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Box()"}
    cells = [
        nbformat.v4.new_code_cell("import importlib.util\nimportlib.util.find_spec('x')"),
        nbformat.v4.new_code_cell(f"print('{tmp_path}/runs')"),
        nbformat.v4.new_code_cell("Form()", outputs=[nbformat.v4.new_output("display_data", form)]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "executed.ipynb")
    scripts["build_site"].stage_notebook(
        tmp_path / "executed.ipynb", tmp_path / "site" / "01.ipynb", tmp_path
    )
    folded, printed, live = nbformat.read(tmp_path / "site" / "01.ipynb", as_version=4).cells
    assert folded.metadata["tags"] == ["hide-input"]
    assert printed.source == "print('workspace/demo/runs')"
    assert live.outputs[0]["data"] == {"text/plain": scripts["build_site"].LIVE_FORM}


def test_the_page_of_parameters_has_each_with_its_meaning(scripts):
    page = scripts["build_site"].write_parameters()
    assert "| **`epochs`** | `60` | passes over the training set |" in page
    assert "| `weight_decay` | `0.0001` |" in page


# --- when something is refused ----------------------------------------------------------------------------


def test_the_page_of_refusals_is_that_of_the_code(scripts):
    page = scripts["refusals"].PAGE.read_text(encoding="utf-8")
    assert page == scripts["refusals"].write_page(), (
        "run `python docs/refusals.py` and commit docs/refused.md"
    )
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "brainage_nb").rglob("*.py"))
    raised = set(re.findall(r"raise ([A-Z]\w+)\(", code)) - {*dir(builtins), "InputRejected"}
    assert {"ScanError", "WorkspaceInUse"} <= raised
    for code in {*cleaning.REASONS, *cleaning.FLAGS, *CAUTIONS, *raised}:
        assert f"| `{code}` |" in page, code


def test_a_reason_without_a_remedy_and_a_remedy_without_a_reason_are_errors(scripts, monkeypatch):
    refusals = scripts["refusals"]
    monkeypatch.setitem(refusals.REASONS, "upside_down", "the head stands on its crown")
    with pytest.raises(ValueError, match="does not say what to do about 'upside_down'"):
        refusals.write_page()
    monkeypatch.delitem(refusals.REASONS, "upside_down")
    monkeypatch.delitem(refusals.FLAGS, "oblique")
    with pytest.raises(ValueError, match=r"no such reason: \['oblique'\]"):
        refusals.write_page()


def test_sentences_given_as_a_reason_are_found(scripts):
    source = """
def find(n):
    self.reasons[n] = f"no row of {n}: none taken"
    if n:
        return None, "two rows fit"
    return Age(reason=f"'{n}' is a range" if n else "no age at all")
"""
    found = scripts["refusals"].find_sentences(ast.parse(source))
    assert set(found) == {"no row of …: none taken", "two rows fit", "'…' is a range", "no age at all"}


# --- layers and reference ---------------------------------------------------------------------------------


def test_the_picture_of_the_layers_is_the_contract(scripts):
    layers = scripts["layers"]
    picture = layers.PICTURE.read_text(encoding="utf-8")
    assert picture == layers.draw_layers(), "run `python docs/layers.py` and commit docs/pictures/layers.svg"
    heights = {name: int(y) for y, name in re.findall(r'y="(\d+)" font-size="14"[^>]*>(\w+)<', picture)}
    assert (
        heights["cli"] < heights["models"] == heights["sources"] < heights["evaluation"] < heights["tables"]
    )


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto(?:function|class):: brainage_nb\.(\w+)$", page, re.MULTILINE))
    assert documented == set(brainage_nb.__all__)


# --- examples ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """What the examples read: a table, scans, a bundle; and a store with its splits."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "scans").mkdir()
    rows = "participant_id\tage\tsex\nsub-01\t34.2\tF\nsub-02\t71\tM\nsub-03\t89+\tF\n"
    (folder / "participants.tsv").write_text(rows)
    for name in ("01", "02", "99"):
        (folder / "scans" / f"sub-{name}_T1w.nii.gz").touch()
    write_scan(folder / "sub-01_T1w.nii.gz", 1)
    shutil.copytree(ROOT / "tests" / "data" / "bundle_0_1_0", folder / "bundle")
    return folder, dict(zip(("store", "splits"), make_tiny_cohort(folder / "volumes"), strict=True))


def modules_with_examples():
    files = sorted((ROOT / "brainage_nb").rglob("*.py"))
    with_examples = [path for path in files if ">>> " in path.read_text(encoding="utf-8")]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in with_examples
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_docstrings_are_true(name, example_folder, monkeypatch):
    folder, names = example_folder
    monkeypatch.chdir(folder)
    module = import_module(name)
    told = {"np": np, "pd": pd, **names, **vars(module)}
    found = doctest.testmod(module, globs=told, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_each_public_name_has_an_example():
    for name in brainage_nb.__all__:
        assert ">>> " in getattr(brainage_nb, name).__doc__, name
