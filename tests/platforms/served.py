"""What the notebooks' set-up reaches for, made from this checkout: the repository as its host serves it, and
a package index with just the packages that the platform lacks. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import subprocess
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
TAG = f"v{PROJECT['version']}"


def tracked_files() -> list[str]:
    """The files of the checkout as they are now, committed or not, less what git ignores."""
    if not (ROOT / ".git").exists():  # an unpacked source distribution
        return (ROOT / "brainage_nb.egg-info" / "SOURCES.txt").read_text().splitlines()
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in set(names) if (ROOT / name).is_file())


def serve_repository(folder: Path) -> None:
    """Lay out `folder/<host>/<path>` as the repository's host answers for the release of this version."""
    raw = folder / "raw.githubusercontent.com" / REPOSITORY / TAG
    archive = folder / "github.com" / REPOSITORY / "archive" / "refs" / "tags" / f"{TAG}.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name in tracked_files():
            tar.add(ROOT / name, f"{REPOSITORY.split('/')[1]}-{PROJECT['version']}/{name}")
    for name in ["colab_setup.sh", *(n for n in tracked_files() if n.startswith("notebooks/0"))]:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes((ROOT / name).read_bytes())


def serve_index(folder: Path, names: list[str]) -> None:
    """An index (PEP 503) in `folder/simple` with the installed version of each of these packages."""
    for name in names:
        home = folder / "simple" / name
        home.mkdir(parents=True)
        wheel = wheel_of(name, home)
        (home / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>\n')


def wheel_of(name: str, folder: Path) -> Path:
    """Pack an installed package into a wheel again, from the files its RECORD names."""
    found = metadata.distribution(name)
    tags = re.findall(r"^Tag: (.+)$", found.read_text("WHEEL"), flags=re.M)
    inner = Path(found.read_text("RECORD").split(".dist-info/")[0].splitlines()[-1]).name  # name-version
    python, abi, _ = tags[0].split("-")
    system = ".".join(dict.fromkeys(tag.split("-")[2] for tag in tags))
    path = folder / f"{inner}-{python}-{abi}-{system}.whl"
    if python == "py2" or any(tag.startswith("py2-") for tag in tags):
        path = folder / f"{inner}-py2.py3-{abi}-{system}.whl"
    lines = []
    with zipfile.ZipFile(path, "w") as wheel:
        for entry in found.files:
            if entry.parts[0] == ".." or "__pycache__" in entry.parts:
                continue
            if entry.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                continue
            content = Path(entry.locate()).read_bytes()
            wheel.writestr(str(entry), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{entry},sha256={digest},{len(content)}")
        record = io.StringIO()
        record.write("\n".join([*lines, f"{inner}.dist-info/RECORD,,"]) + "\n")
        wheel.writestr(f"{inner}.dist-info/RECORD", record.getvalue())
    return path
