"""What the platforms preinstall, held against what the package asks for: offline facts, and a resolution."""

import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.platforms.resolution import (
    FACTS,
    ROOT,
    NoIndex,
    added_by,
    normal,
    python_of,
    read_freeze,
    resolve,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLATFORMS = json.loads(FACTS.read_text())
each_platform = pytest.mark.parametrize("image", PLATFORMS)


@pytest.fixture
def lists(shared_data):
    found = {path.name.split("-pip-")[0]: path for path in (shared_data / "platforms").glob("*-pip-freeze-*")}
    if not found:
        pytest.skip(f"no list of preinstalled packages in {shared_data / 'platforms'}")
    return {image: read_freeze(path.read_text()) for image, path in found.items()}


@each_platform
def test_every_bound_admits_the_version_that_is_preinstalled(image):
    facts = PLATFORMS[image]
    assert facts["python"] in Requirement(f"python{PROJECT['requires-python']}").specifier
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        name = normal(wanted.name)
        there = {**facts["preinstalled"], **facts["added"]}
        assert name in there, f"{name} is neither preinstalled on {image} nor added: resolve again"
        assert there[name] in wanted.specifier, f"{image} has {name} {there[name]}, we ask for {wanted}"


@each_platform
def test_torch_torchvision_and_numpy_are_never_among_what_is_added(image):
    assert not {"torch", "torchvision", "numpy"} & set(PLATFORMS[image]["added"])


@each_platform
def test_the_readme_names_what_is_added(image):
    sentence = re.search(r"Set-up adds ([^;.]+)", (ROOT / "README.md").read_text())[1]
    assert set(re.findall(r"`([^`]+)`", sentence)) == set(PLATFORMS[image]["added"]) | {"brainage-nb"}


@each_platform
def test_the_facts_are_those_of_the_real_lists(image, lists):
    real = lists[image]
    facts = PLATFORMS[image]
    assert {name: real.get(name) for name in facts["preinstalled"]} == facts["preinstalled"]
    assert not set(facts["added"]) & set(real)


@pytest.mark.slow  # asks the package index; a change of the dependencies is held against the facts above
@each_platform
def test_installing_changes_nothing_and_adds_only_what_is_named(image, request):
    try:
        preinstalled = request.getfixturevalue("lists")[image]
    except pytest.skip.Exception:  # the facts hold the part of the list that matters
        preinstalled = PLATFORMS[image]["preinstalled"]
    try:
        resolved = resolve(preinstalled, python_of(image))
    except NoIndex as error:
        pytest.skip(f"no package index answers: {error}")
    changed = {
        name: (preinstalled[name], version)
        for name, version in resolved.items()
        if preinstalled.get(name, version) != version
    }
    assert changed == {}
    assert set(added_by(resolved, preinstalled)) == set(PLATFORMS[image]["added"])
