"""Colab and Kaggle as a notebook meets them: real folder names, their environment, no internet, and a Python
that has what they preinstall but not this package.

The folders exist in a mount namespace only, the network in a network namespace with nothing but a loopback,
so no code of the product needs to know that it is tested. Needs Linux with user namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.platforms.resolution import FACTS, normal
from tests.platforms.served import serve_index, serve_repository

HERE = Path(__file__).parent
ADDED = sorted(json.loads(FACTS.read_text())["kaggle-base"]["added"])
NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
COLAB_MARKS = {"COLAB_RELEASE_TAG": "release-colab-external", "COLAB_JUPYTER_TRANSPORT": "ipc"}
MARKS = {
    "colab": COLAB_MARKS,
    "kaggle": COLAB_MARKS | {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_URL_BASE": "https://www.kaggle.com"},
}
INDEX = "packages.example"
HOSTS = ("raw.githubusercontent.com", "github.com", INDEX)


def require_namespaces() -> None:
    """Skip where the system makes no namespaces for us."""
    if shutil.which("unshare") is None:
        pytest.skip("platforms are emulated in namespaces: no unshare here")
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"platforms are emulated in namespaces: {tried.stderr.strip()}")


@dataclass
class Emulated:
    """One emulated platform.

    Parameters
    ----------
    kind : {"colab", "kaggle"}
    folder : Path
        Holds its roots, its Python, and what is served to it.
    online : bool
        Whether the repository's host and a package index answer (from this machine).
    """

    kind: str
    folder: Path
    online: bool = False

    def __post_init__(self):
        require_namespaces()
        for name in ("home", "root", "etc", "executed", *self.roots):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        names = HOSTS if self.online else ()
        (self.folder / "etc" / "hosts").write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
        self.python = platform_python(self.folder)
        if self.online:
            serve_repository(self.folder / "served")
            serve_index(self.folder / "served" / INDEX, [*ADDED, "setuptools"])
            make_certificate(self.folder / "served", HOSTS)

    @property
    def roots(self) -> tuple[str, ...]:
        """Folders of the platform, below `folder`."""
        return ("content",) if self.kind == "colab" else ("kaggle/input", "kaggle/working")

    def path(self, inside: str) -> Path:
        """Where a path of the platform lies on this machine."""
        return self.folder / inside.lstrip("/")

    def environment(self) -> dict[str, str]:
        """What a process on the platform finds set."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        certificate = str(self.folder / "served" / "certificate.pem")
        online = {"SSL_CERT_FILE": certificate, "PIP_CERT": certificate}
        online |= {"PIP_INDEX_URL": f"https://{INDEX}/simple/"}
        return (
            kept
            | {"HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
            | {"JUPYTER_PATH": str(self.folder / "jupyter"), "PIP_NO_CACHE_DIR": "1"}
            | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_COMPILE": "1"}
            | (online if self.online else {})
            | MARKS[self.kind]
        )

    def run(self, plan: list[dict], minutes: float = 30) -> list[dict]:
        """Run notebooks (or a command) one after the other on the platform; what `inside.py` reports of each.

        A step is {"notebook": name, "parameters": {...}, "kill": [file, lines]} or {"command": [...]}.
        """
        start = "/content" if self.kind == "colab" else "/kaggle/working"
        settings = {"plan": plan, "served": str(self.folder / "served") if self.online else "", "cwd": start}
        settings |= {"executed": str(self.folder / "executed")}
        (self.folder / "plan.json").write_text(json.dumps(settings))
        command = [*NAMESPACES, "bash", str(HERE / "enter.sh"), str(self.folder / "root"), str(self.folder)]
        command += [sys.executable, str(HERE / "inside.py"), str(self.folder / "plan.json")]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=60 * minutes
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]


def platform_python(folder: Path) -> Path:
    """A Python in `folder` that has what the platforms preinstall, and a Jupyter kernel of it."""
    target = folder / "python"
    venv.create(target, symlinks=True, with_pip=False)
    packages = link_packages(folder / "preinstalled")
    home = next((target / "lib").glob("python3*/site-packages"))
    (home / "preinstalled.pth").write_text(f"{packages}\n")
    python = target / "bin" / "python"
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    return python


def link_packages(folder: Path) -> Path:
    """Fill `folder` with links to this environment's packages, less this package and what the platforms lack;
    nothing is copied or downloaded. `google.colab` is the stand-in.
    """
    ours = Path(site.getsitepackages()[0])
    absent = {normal(name) for name in [*ADDED, "brainage-nb"]}
    google = folder / "google"
    google.mkdir(parents=True)
    for entry in ours.iterdir():
        name = normal(entry.name.split("-")[0].removesuffix(".py").split(".")[0])
        hook = entry.suffix in (".pth", ".egg-link") or entry.name.startswith("__editable__")
        if not hook and name not in absent and entry.name not in ("__pycache__", "google"):
            (folder / entry.name).symlink_to(entry)
    for part in (ours / "google").glob("*"):
        (google / part.name).symlink_to(part)
    (google / "colab").symlink_to(HERE / "stand_in" / "google" / "colab")
    return folder


def make_certificate(folder: Path, names: tuple[str, ...]) -> None:
    """A certificate for these host names that is its own authority; skips where openssl is not there."""
    if shutil.which("openssl") is None:
        pytest.skip("serving the repository under its own name needs openssl")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += [
        "-subj",
        "/CN=emulated",
        "-keyout",
        str(folder / "key.pem"),
        "-out",
        str(folder / "certificate.pem"),
    ]
    command += ["-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)]
    subprocess.run(command, check=True, capture_output=True)
