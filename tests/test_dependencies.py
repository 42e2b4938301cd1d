"""What pyproject declares against what the package imports: nothing asked for in vain, nothing missing."""

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Needed without an import: the kernel that notebooks run in, and the engine that pandas reads Excel with.
NOT_IMPORTED = {"ipykernel", "python-calamine"}
COMES_WITH = {
    "ipython": "ipykernel",
    "jupyter-client": "ipykernel",
    "markupsafe": "jinja2",
    "urllib3": "requests",
}
ON_PLATFORMS = {"google", "kaggle_secrets"}  # modules that only Colab and Kaggle have


def names_of(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@cache
def imported_modules():
    """Top-level names of what any file of the package imports, inside functions too."""
    nodes = [
        node
        for path in (ROOT / "brainage_nb").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in direct | named} - {"brainage_nb"} - sys.stdlib_module_names


@cache
def imported_distributions():
    known = packages_distributions()
    return {canonicalize_name(name) for module in imported_modules() for name in known.get(module, (module,))}


@pytest.mark.parametrize("name", sorted(names_of(PROJECT["dependencies"]) - NOT_IMPORTED))
def test_each_runtime_dependency_is_imported_by_the_package(name):
    assert name in imported_distributions(), f"{name} is required and never imported: drop it"


def test_each_import_is_declared():
    extras = [
        line for name, extra in PROJECT["optional-dependencies"].items() if name != "dev" for line in extra
    ]
    declared = names_of([*PROJECT["dependencies"], *extras])
    declared |= {name for name, carrier in COMES_WITH.items() if carrier in declared}
    known = packages_distributions()
    undeclared = {
        module
        for module in imported_modules() - ON_PLATFORMS
        if not {canonicalize_name(name) for name in known.get(module, (module,))} & declared
    }
    assert undeclared == set()
