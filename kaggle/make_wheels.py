"""Build the data set that sets the notebooks up on Kaggle without internet: wheels and the set-up script.

    python kaggle/make_wheels.py --owner NAME [--into build/kaggle_wheels]
    kaggle datasets create -p build/kaggle_wheels            (later: kaggle datasets version -p ... -m "...")

Holds our own wheel and what Kaggle does not preinstall, in the versions that were resolved against its list
(tests/platforms/version_facts.json). Never torch: what is preinstalled is used as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from push import kaggle_owner

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
FACTS = ROOT / "tests" / "platforms" / "version_facts.json"
IMAGE = "kaggle-base"
SYSTEMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
NEVER = ("torch", "nvidia", "cuda", "triton", "numpy")


def build(owner: str, into: Path, facts: dict) -> list[Path]:
    """Fill the folder `into`, which must be absent or empty; returns the wheels.

    Parameters
    ----------
    owner : str
        Kaggle user name that will own the data set.
    into : path
    facts : dict
        `python` ("3.12") and `added` (versions by name), as in version_facts.json.
    """
    if into.exists() and any(into.iterdir()):
        raise SystemExit(f"{into} is not empty: it may hold an older set. Remove it or name another folder.")
    into.mkdir(parents=True, exist_ok=True)
    _pip("wheel", "--no-deps", "--wheel-dir", into, ROOT)
    pins = [f"{name}=={version}" for name, version in facts["added"].items()]
    systems = [item for name in SYSTEMS for item in ("--platform", name)]
    _pip(
        *("download", "--no-deps", "--only-binary=:all:", "--dest", into),
        *("--python-version", facts["python"], "--implementation", "cp", *systems, *pins),
    )
    wheels = sorted(into.glob("*.whl"))
    if unwanted := [wheel.name for wheel in wheels if wheel.name.startswith(NEVER)]:
        raise SystemExit(f"{unwanted} must come from the platform; look at {FACTS.name}.")
    shutil.copyfile(ROOT / "colab_setup.sh", into / "colab_setup.sh")
    _write(into / "brainage_wheels.json", _described(wheels, facts["python"]))
    metadata = (FOLDER / "wheels" / "dataset-metadata.json").read_text().replace("OWNER/", f"{owner}/")
    (into / "dataset-metadata.json").write_text(metadata)
    return wheels


def _described(wheels: list[Path], python: str) -> dict:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = {wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    return {"brainage-nb": project["version"], "python": python, "sha256": files}


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def main() -> int:
    """Build and say what was built; returns the exit status."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--owner", type=kaggle_owner, required=True, help="your Kaggle user name")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "kaggle_wheels")
    parser.add_argument("--facts", type=Path, default=FACTS, help="what Kaggle preinstalls and lacks")
    options = parser.parse_args()
    wheels = build(options.owner, options.into, json.loads(options.facts.read_text())[IMAGE])
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{options.into}: {len(wheels)} wheels, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
