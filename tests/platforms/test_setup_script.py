"""colab_setup.sh in a Python that has what a platform preinstalls: what it adds, refuses and says."""

import functools
import http.server
import os
import shutil
import subprocess
import threading
import zipfile
from importlib import metadata

import pytest

from tests.platforms.emulation import platform_python
from tests.platforms.resolution import ROOT
from tests.platforms.served import PROJECT

VERSION = PROJECT["version"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Run the script from standard input, as the set-up cell does: (status, last line)."""
    folder = tmp_path_factory.mktemp("platform")
    python = platform_python(folder)
    light = folder / "light"  # what the script's last line imports; the real torch takes seconds
    light.mkdir()
    for name in ("torch", "torchvision"):
        (light / f"{name}.py").write_text(f"__version__ = {metadata.version(name)!r}\n")

    def run(source, python=python):
        # no index is asked: nothing here needs one, and nothing may reach out
        settings = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "HOME": str(folder)}
        settings["PYTHONPATH"] = str(light)
        environment = os.environ | settings | {"PYTHON": str(python), "BRAINAGE_SOURCE": str(source)}
        done = subprocess.run(
            ["bash", "-s"],
            input=(ROOT / "colab_setup.sh").read_text(),
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]

    return run


@pytest.fixture(autouse=True)
def clean(script, tmp_path_factory):
    """Each test starts with what is preinstalled and nothing else."""
    packages = next(tmp_path_factory.getbasetemp().glob("platform0/python/lib/python3*/site-packages"))
    for path in packages.iterdir():
        if path.name != "preinstalled.pth":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def wheel(folder, version=VERSION, requires="", name="brainage_nb", **more):
    """A wheel named as ours (or `name`) with one module, and whatever `more` puts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": meta + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **more,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path


def test_from_a_folder_over_http_it_closes_with_what_is_in_use_also_the_second_time(script, tmp_path):
    wheel(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = [script(f"http://127.0.0.1:{server.server_port}/") for _ in range(2)]
        server.shutdown()
    for status, last in said:
        expected = f"brainage_nb {VERSION} is ready. Added: nothing. In use: torch "
        assert (status, last.startswith(expected)) == (0, True), last


def test_what_cannot_be_added_without_changing_numpy_is_not_added(script, tmp_path):
    wheel(tmp_path, "0.1", name="numpy")
    wheel(tmp_path, requires="numpy<1.0")
    (tmp_path / "brainage_wheels.json").write_text("{}")
    status, last = script(tmp_path)
    assert status == 1
    assert last.startswith("brainage_nb is NOT ready: pip could not add what is missing")


def test_an_installation_that_replaces_numpy_is_noticed(script, tmp_path):
    meta = "Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n"
    status, last = script(wheel(tmp_path, **{"numpy-9.9.9.egg-info/PKG-INFO": meta}))
    assert status == 1
    assert last.startswith("brainage_nb is NOT ready: installing changed what was there: numpy==")


def test_numpy_that_no_longer_imports_is_noticed(script, tmp_path):
    status, last = script(wheel(tmp_path, **{"numpy.py": "raise ImportError('broken')\n"}))
    assert (status, "not everything can be imported" in last) == (1, True), last


def test_a_source_that_is_not_there_is_said(script, tmp_path):
    status, last = script(tmp_path / "nothing")
    assert (status, "is neither a file or folder that is there nor an address" in last) == (1, True)


def test_a_source_whose_name_looks_like_an_option_is_a_file(script, tmp_path):
    home = tmp_path.parent / "platform0"
    for option in ("-e", "--target=x"):
        (home / option).mkdir()
        archive = wheel(tmp_path).rename(home / option / wheel(tmp_path).name)
        status, last = script(archive.relative_to(home))
        assert (status, last.startswith(f"brainage_nb {VERSION} is ready")) == (0, True), last


def test_another_python_is_refused_with_the_versions_that_will_do(script, tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    status, last = script(tmp_path, python=old)
    assert (status, "3.11, 3.12 or 3.13 is needed" in last, "Python 3.9.1" in last) == (1, True, True)
