"""Archives: what is unpacked is whole and inside the folder; a killed run goes on; traps are refused."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from brainage_nb.sources import fetch
from brainage_nb.sources.fetch import DownloadError, find_unpacked, unpack
from brainage_nb.workspace import CannotWrite

BODIES = {f"scans/IXI00{i}.nii.gz": np.random.default_rng(i).bytes(20_000) for i in range(5)}
ENDINGS = ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"]


def make(path, files, links=()):
    """Write an archive of the kind its name says; `links` are (name, target)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, body in files.items():
                archive.writestr(name, body)
            for name, target in links:
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16
                archive.writestr(info, target)
        return path
    mode = {"tar": "w", "tgz": "w:gz", "gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[path.suffix[1:]]
    with tarfile.open(path, mode) as archive:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def tree(folder):
    """Relative path -> bytes of everything a reader would see."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_is_unpacked_whole(tmp_path, ending):
    archive = make(tmp_path / f"a.{ending}", BODIES | {"__MACOSX/x": b"1", "scans/._IXI001.nii.gz": b"2"})
    assert unpack(archive, tmp_path / "out") == []
    assert tree(tmp_path / "out") == BODIES


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_archive_is_refused_and_leaves_only_whole_files(tmp_path, ending, share):
    whole = make(tmp_path / f"whole.{ending}", BODIES).read_bytes()
    archive = tmp_path / f"a.{ending}"
    archive.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DownloadError, match="damaged"):
        unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out").items() <= BODIES.items()
    assert find_unpacked(tmp_path / "out", archive.name) is None


def test_a_tar_cut_between_two_files_is_not_taken_for_a_shorter_one(tmp_path):
    whole = make(tmp_path / "whole.tar", BODIES).read_bytes()
    archive = tmp_path / "a.tar"
    archive.write_bytes(whole[: 2 * (512 + 20_480)])
    with pytest.raises(DownloadError, match="end mark is missing"):
        unpack(archive, tmp_path / "out")


def test_damage_inside_a_zip_is_found(tmp_path):
    archive = make(tmp_path / "a.zip", BODIES)
    content = bytearray(archive.read_bytes())
    content[5000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match="damaged"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize("name", ["../evil", "/../evil", "a/../../evil", "..\\evil", "a/..", "."])
def test_names_that_lead_outside_are_refused(tmp_path, ending, name):
    archive = make(tmp_path / f"a.{ending}", {name: b"x"})
    with pytest.raises(DownloadError, match="leads outside the folder"):
        unpack(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_names_from_the_root_stay_in_the_folder(tmp_path, ending):
    unpack(make(tmp_path / f"a.{ending}", {f"{tmp_path}/evil": b"x"}), tmp_path / "out")
    assert [path.is_relative_to(tmp_path / "out") for path in tmp_path.rglob("evil")] == [True]


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_links_are_left_out_and_named(tmp_path, ending):
    archive = make(tmp_path / f"a.{ending}", BODIES, links=[("out", "/etc"), ("scans/l", "IXI001.nii.gz")])
    assert unpack(archive, tmp_path / "out") == [
        "out: a link, not unpacked",
        "scans/l: a link, not unpacked",
    ]
    assert tree(tmp_path / "out") == BODIES


def test_a_link_that_is_there_already_is_not_followed_out(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scans").symlink_to(tmp_path / "outside")
    with pytest.raises(DownloadError, match="outside the folder"):
        unpack(make(tmp_path / "a.tar", BODIES), tmp_path / "out")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("ending", ["tar.gz", "zip"])
def test_a_bomb_is_refused(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(fetch, "SMALL_BYTES", 1 << 20)
    archive = make(tmp_path / f"a.{ending}", {"zeros": bytes(30 << 20)})
    assert archive.stat().st_size < 1 << 17
    with pytest.raises(DownloadError, match="more than scans can"):
        unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_what_does_not_fit_the_disk_is_not_begun(tmp_path):
    info = tarfile.TarInfo("huge.nii")
    info.size = 10**14
    (tmp_path / "a.tgz").write_bytes(b"")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.addfile(info)
    with pytest.raises(DownloadError, match=r"more than scans can|GiB left"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_disk_that_takes_no_more_is_named_and_the_next_run_goes_on(tmp_path, monkeypatch, code, said):
    def refuse(source, sink, length):
        raise OSError(code, os.strerror(code))

    archive = make(tmp_path / "a.tar", BODIES)
    with monkeypatch.context() as broken:
        broken.setattr(fetch.shutil, "copyfileobj", refuse)
        with pytest.raises(CannotWrite, match=rf"{re.escape(str(tmp_path / 'out'))}.* {said}.*workspace"):
            unpack(archive, tmp_path / "out")
    assert find_unpacked(tmp_path / "out", archive.name) is None and tree(tmp_path / "out") == {}
    unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == BODIES


def test_a_finished_archive_is_not_opened_again_but_a_missing_file_is_restored(tmp_path):
    archive = make(tmp_path / "a.tar", BODIES)
    unpack(archive, tmp_path / "out")
    first = tmp_path / "out" / "scans" / "IXI000.nii.gz"
    before = first.stat().st_mtime_ns
    unpack(archive, tmp_path / "out")
    assert first.stat().st_mtime_ns == before
    first.unlink()
    assert find_unpacked(tmp_path / "out", "a.tar") is None
    unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == BODIES


def test_another_archive_of_the_same_name_replaces_files_of_the_same_size(tmp_path):
    unpack(make(tmp_path / "a.tar", BODIES), tmp_path / "out")
    new = {name: body[::-1] for name, body in BODIES.items()}
    unpack(make(tmp_path / "a.tar", new), tmp_path / "out")
    assert tree(tmp_path / "out") == new


def test_a_process_killed_while_unpacking_leaves_whole_files_only_and_the_next_goes_on(tmp_path):
    files = {f"scan{i:03}.nii": np.random.default_rng(i).bytes(3_000_000) for i in range(40)}
    archive = make(tmp_path / "a.tar", files)
    program = "import sys; from brainage_nb.sources.fetch import unpack; unpack(sys.argv[1], sys.argv[2])"
    child = subprocess.Popen([sys.executable, "-c", program, str(archive), str(tmp_path / "out")])
    deadline = time.monotonic() + 30
    while len(list((tmp_path / "out").glob("scan*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    came = tree(tmp_path / "out")
    assert 5 <= len(came) < 40 and came.items() <= files.items()
    kept = (tmp_path / "out" / min(came)).stat().st_mtime_ns
    unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == files
    assert (tmp_path / "out" / min(came)).stat().st_mtime_ns == kept
