"""What a release carries: one version everywhere, a source distribution with everything, forms that parse."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import brainage_nb

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github").rglob("*.yml"))


def test_the_version_is_the_same_everywhere():
    texts = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "colab_setup.sh")}
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    badges = set(re.findall(r"brainage_nb/blob/v([^/]+)/notebooks", texts["README.md"]))
    (set_up,) = re.findall(r"^VERSION=(.*)$", texts["colab_setup.sh"], flags=re.M)
    assert {brainage_nb.__version__, cited["version"], set_up, *badges} == {PROJECT["version"]}
    assert re.search(
        rf"^## {re.escape(PROJECT['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.M
    )


def test_the_citation_names_the_authors_the_licence_and_the_repository():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["authors"] == PROJECT["authors"] and cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]


def test_the_source_distribution_holds_every_file_that_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    taken = (ROOT / "MANIFEST.in").read_text().split()
    taken += ["brainage_nb", "pyproject.toml", "MANIFEST.in", "LICENSE"]  # always
    tops = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    assert [top for top in tops if not any(fnmatch(top, pattern) for pattern in taken)] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_workflows_and_forms_are_whole(path):
    form = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
        assert form["name"] and form["description"]
        assert all(part["type"] == "markdown" or part["attributes"]["label"] for part in form["body"])
    for run in re.findall(r"run: bash (\S+)", path.read_text()):
        assert (ROOT / run.removeprefix("unpacked/")).is_file()


def test_only_the_job_that_publishes_may_ask_for_an_identity_and_it_waits_for_the_trial():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = release["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert (jobs["publish"]["needs"], jobs["try"]["needs"]) == ("try", "build")
