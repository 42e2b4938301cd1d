"""The notebooks as files: each test is named for what once went wrong for somebody."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pandas as pd
import pytest
import yaml

from brainage_nb.models.settings import RECIPES as TRAINING_RECIPES
from brainage_nb.parameters import fields_of, parse_parameters
from brainage_nb.pipeline import Notebook
from brainage_nb.sources.opening import SOURCES as DATA_SOURCES
from brainage_nb.sources.opening import SourceSettings
from brainage_nb.volumes.settings import RECIPES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import twins  # noqa: E402

SOURCES = sorted((ROOT / "notebooks" / "src").glob("*.py"))
NOTEBOOKS = [ROOT / "notebooks" / f"{source.stem}.ipynb" for source in SOURCES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY, TAG = PROJECT["urls"]["Repository"], f"v{PROJECT['version']}"
SHARED = {  # the same names mean the same thing, with the same type, in every notebook
    "workspace": str, "run": str, "source": str, "data_dir": str, "table": str,
    "spacing_mm": float, "size": int,
    "seed": int, "seeds": str, "epochs": int, "batch_size": int, "learning_rate": float, "folds": int,
    "max_minutes": float, "cluster": str, "init_from": str, "recipe": str,
}  # fmt: skip

COLAB_FORM = re.compile(r"^\w+ = .+  # @param (\{type:\"\w+\"\}|\[.+\]( \{.+\})?)$")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def parameters_cell(path):
    found = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(found) == 1, f"{path.name}: expected one cell tagged parameters, found {len(found)}"
    return found[0]


def test_every_notebook_agrees_with_its_source():
    command = [sys.executable, str(ROOT / "notebooks" / "twins.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


@each_notebook
def test_badges_open_this_notebook_of_this_repository(path):
    opening = cells(path, "markdown")[0].source
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"{colab}/blob/{TAG}/notebooks/{path.name})" in opening
    assert f"https://kaggle.com/kernels/welcome?src={REPOSITORY}/blob/{TAG}/notebooks/{path.name})" in opening


@each_notebook
def test_the_setup_cell_is_the_one_of_this_repository_and_version(path):
    found = [cell.source for cell in cells(path) if "colab_setup.sh" in cell.source]
    assert found == [twins.setup_cell().strip()]
    raw = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com")
    assert f"{raw}/{TAG}/$0" in found[0]
    assert len([line for line in found[0].splitlines() if line]) <= 8


@each_notebook
def test_it_is_a_valid_python3_notebook_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in cells(path))


@each_notebook
def test_parameters_are_flat_literals_each_under_a_comment_and_a_colab_form(path):
    source = parameters_cell(path).source
    for name, item in parse_parameters(source).items():
        assert isinstance(item.default, str | int | float | bool), name
        assert item.comment and not item.comment.startswith("@"), f"{name} has no comment line above it"
    for line in source.splitlines():
        assert line.startswith("#") or COLAB_FORM.match(line), line


@each_notebook
def test_shared_parameters_keep_their_type(path):
    for name, item in Notebook(path).cell_parameters().items():
        if name in SHARED:
            assert type(item.default) is SHARED[name], f"{name} is {item.default!r}"


@each_notebook
def test_smoke_values_name_parameters_that_exist(path):
    mock = parameters_cell(path).metadata.get("nbmake", {}).get("mock", {})
    assert set(mock) <= set(Notebook(path).cell_parameters())
    assert mock["workspace"] == "../build/smoke"
    Notebook(path).check(mock)


@each_notebook
def test_cells_are_short_and_define_nothing_long(path):
    for cell in cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(lines) <= 25, f"a cell of {len(lines)} lines: {lines[0]}"
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 2, f"{node.name} belongs into the package"


@each_notebook
def test_shell_lines_that_hide_their_failure_are_not_used(path):
    for cell in cells(path):
        assert not re.search(r"^\s*[!%]", cell.source, flags=re.M)
        for call in re.findall(r"subprocess\.run\(.*\)", cell.source):
            assert "check=True" in call


@each_notebook
def test_the_last_cell_leaves_the_result_file(path):
    assert "ws.finish(" in cells(path)[-1].source


@each_notebook
def test_the_result_file_says_what_was_read_so_that_an_edit_is_noticed(path):
    assert "read=" in cells(path)[-1].source or path.stem.startswith("07")  # which only shows


@each_notebook
def test_no_figure_is_typed_into_prose(path):
    for cell in cells(path, "markdown"):
        assert not re.search(r"\b(MAE|RMSE|r|R2)\s*(=|of|is)\s*\d", cell.source)


def test_no_cell_ends_in_a_call_whose_result_is_an_artist():
    call = re.compile(
        r"\.(suptitle|set\w*|plot|bar|barh|hist|imshow|scatter|legend|text|axh?line|tight_layout)\("
    )
    for source in SOURCES:
        for cell in jupytext.read(source).cells:
            last = ast.parse(cell.source).body[-1:] if cell.cell_type == "code" else []
            shown = [ast.unparse(node) for node in last if isinstance(node, ast.Expr)]
            assert not any(call.search(text) for text in shown if ".style." not in text), (
                f"{source.name}: {shown}"
            )


def test_figures_without_an_interval_are_shown_in_07():
    from brainage_nb.evaluation.metrics import with_interval

    (source,) = (
        cell.source for cell in jupytext.read(SOURCES[-1]).cells if 'manifest["figures"]' in cell.source
    )
    last = ast.Expression(ast.parse(source).body[-1].value)
    unknown = {"value": None, "low": None, "high": None}
    figures = {"test": {"n": 1, "mae": {"value": 3.0, "low": None, "high": None}, "r": unknown}}
    model = SimpleNamespace(manifest={"figures": figures})
    shown = eval(compile(last, "07", "eval"), {"pd": pd, "model": model, "with_interval": with_interval})
    assert shown["test"].to_dict() == {"n": 1, "mae": "3.00", "r": "not defined"}


def test_every_address_names_the_repository_and_the_release_of_pyproject():
    owner_name = REPOSITORY.removeprefix("https://github.com/")
    readme, script = (ROOT / "README.md").read_text(), (ROOT / "colab_setup.sh").read_text()
    for text in [readme, script, *(path.read_text() for path in [*SOURCES, *NOTEBOOKS])]:
        hosts = r"(?:github\.com|research\.google\.com/github|raw\.githubusercontent\.com)"
        assert set(re.findall(rf"{hosts}/([\w.-]+/[\w-]+(?:\.[\w-]+)*)", text)) <= {owner_name}
        assert set(re.findall(rf"{owner_name}/blob/([^/]+)/", text)) <= {TAG}
    assert f"VERSION={PROJECT['version']}\nREPOSITORY={REPOSITORY}\n" in script
    assert all(f"{REPOSITORY}/blob/{TAG}/notebooks/{path.name}" in readme for path in NOTEBOOKS)


def test_another_repository_and_version_reach_every_place():
    readme = (ROOT / "README.md").read_text()
    for text in [readme, (ROOT / "colab_setup.sh").read_text(), SOURCES[0].read_text()]:
        old = REPOSITORY.removeprefix("https://github.com/")
        moved = twins.readdressed(text, old, "someone/a.fork", "v9.8.7")
        assert old not in moved.replace(twins.setup_cell(), "")
        assert set(re.findall(r"someone/a\.fork/blob/([^/]+)/", moved)) <= {"v9.8.7"}
        assert text != moved
        assert "git clone" not in moved or "git clone https://github.com/someone/a.fork && cd a.fork" in moved
    lines = 'VERSION={0}\n__version__ = "{0}"\nversion: {0}\ncff-version: 1.2.0\n'
    assert twins.readdressed(lines.format("0.1.0"), "a/b", "a/b", "v9.8.7") == lines.format("9.8.7")


def test_the_form_is_short_and_everything_behind_it_has_a_meaning():
    forms = {path.stem: Notebook(path).cell_parameters() for path in NOTEBOOKS}
    assert {name: len(form) for name, form in forms.items() if len(form) > 10} == {}
    assert sum(map(len, forms.values())) <= 60
    for path in NOTEBOOKS:
        notebook = Notebook(path)
        assert ("more" in forms[path.stem]) == bool(notebook.settings_classes())
        for name, item in notebook.parameters().items():
            assert len(item.comment) > 10, f"{path.stem}: {name}"


def test_parameters_that_mirror_the_package_keep_its_defaults():
    for path in NOTEBOOKS:
        notebook = Notebook(path)
        for name, item in notebook.cell_parameters().items():
            for settings in notebook.settings_classes():
                field = fields_of(settings).get(name, item)
                assert name == "seeds" or field.default == item.default, f"{path.stem}: {name}"


def test_a_form_and_a_class_offer_the_same_choices_and_every_source():
    sources = Notebook(NOTEBOOKS[0]).cell_parameters()
    assert sources["age_unit"].choices == fields_of(SourceSettings)["age_unit"].choices
    assert sources["source"].choices == tuple(DATA_SOURCES)
    recipes = [Notebook(path).cell_parameters()["recipe"].choices for path in NOTEBOOKS[2:4]]
    assert recipes == [tuple(RECIPES), tuple(TRAINING_RECIPES)]


def test_only_the_platform_module_and_the_setup_cell_know_a_platform():
    words = re.compile(r"google\.colab|(?<!/)/kaggle/|/content|KAGGLE_|COLAB_")
    modules = {path.name: path.read_text() for path in (ROOT / "brainage_nb").rglob("*.py")}
    sources = {path.name: path.read_text().replace(twins.setup_cell(), "") for path in SOURCES}
    guilty = [name for name, text in (modules | sources).items() if words.search(text)]
    assert guilty == ["platforms.py"]


def test_the_environment_file_installs_what_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    extras = ",".join(sorted(project["optional-dependencies"]))
    assert f"python {project['requires-python']}" in environment["dependencies"]
    assert environment["dependencies"][-1] == {"pip": [f"--editable .[{extras}]"]}


def test_every_dependency_has_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = project["dependencies"] + [
        item for group in project["optional-dependencies"].values() for item in group
    ]
    assert [item for item in every if ">=" not in item] == []


def test_sources_are_percent_scripts():
    for source in SOURCES:
        assert jupytext.read(source).metadata["jupytext"]["text_representation"]["format_name"] == "percent"
