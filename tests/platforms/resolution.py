"""What installing the package adds to a platform, resolved against what that platform preinstalls.

    python -m tests.platforms.resolution LIST [LIST ...]     write version_facts.json anew from freeze lists

A list is called <platform>-<image>-pip-freeze-<year>-<month>.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTS = Path(__file__).with_name("version_facts.json")
PYTHON = {"colab": "3.13", "kaggle": "3.12"}
# The platforms' torch is another build than the registry's, with other companions.
COMPANIONS = re.compile(r"^(nvidia|cuda)-|^triton$")


class NoIndex(RuntimeError):
    """No package index answers."""


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_freeze(text: str) -> dict[str, str]:
    """Versions by name from `pip freeze`, without build tags (+cu128) and torch's companions."""
    lines = [line.strip().split("==") for line in text.splitlines() if "==" in line]
    found = {normal(name): re.sub(r"\+.*", "", version) for name, version in lines}
    return {name: version for name, version in found.items() if not COMPANIONS.match(name)}


def python_of(image: str) -> str:
    """Python's version on an image such as colab-gpu or kaggle-base."""
    return PYTHON[image.split("-")[0]]


def resolve(preinstalled: dict[str, str], python: str) -> dict[str, str]:
    """Versions of our whole dependency tree beside what is preinstalled, none of which may change.

    Raises
    ------
    NoIndex
        Where the registry cannot be asked.
    AssertionError
        Where there is no solution; uv's explanation is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in preinstalled.items()))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--constraint", str(constraints), str(ROOT / "pyproject.toml")]
        done = subprocess.run(command, capture_output=True, text=True)
    if re.search(r"Failed to fetch|error sending request|dns error|No module named uv", done.stderr):
        raise NoIndex(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return read_freeze(done.stdout)


def added_by(resolved: dict[str, str], preinstalled: dict[str, str]) -> dict[str, str]:
    """What is not preinstalled, by name."""
    return {name: version for name, version in sorted(resolved.items()) if name not in preinstalled}


def facts_of(list_file: Path) -> dict:
    """The facts kept of one platform: its Python, the preinstalled part of our tree, and what is added."""
    image, seen = re.fullmatch(r"(.+)-pip-freeze-(.+)\.txt", list_file.name).groups()
    preinstalled = read_freeze(list_file.read_text())
    resolved = resolve(preinstalled, python_of(image))
    kept = {name: preinstalled[name] for name in sorted(resolved) if name in preinstalled}
    return {
        "seen": seen,
        "python": python_of(image),
        "added": added_by(resolved, preinstalled),
        "preinstalled": kept,
    }


if __name__ == "__main__":
    found = {Path(name).name.split("-pip-")[0]: facts_of(Path(name)) for name in sys.argv[1:]}
    FACTS.write_text(json.dumps(found, indent=1) + "\n")
