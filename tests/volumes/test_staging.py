"""A store on a slow disk worked on through a local copy: verified on the way in and on the way out."""

import shutil

import numpy as np
import pytest

from brainage_nb.volumes import store as staging
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import (
    StoreError,
    StoreMirror,
    StoreWriter,
    VolumeStore,
    current_store,
    read_index,
    shard_path,
)
from brainage_nb.workspace import write_json, write_text

SETTINGS = PreprocessingSettings(spacing_mm=10.0, size=16)
SOURCE = {"source_bytes": 1, "source_mtime_ns": 2, "source_sha256": ""}


def volume(number: int) -> np.ndarray:
    return np.full((16, 16, 16), number, np.float16)


@pytest.fixture
def drive(tmp_path):
    """`volumes` of a workspace on Drive with a store of three volumes."""
    home = tmp_path / "drive" / "volumes" / SETTINGS.fingerprint
    write_json(SETTINGS.to_json(), home / "preprocessing.json")
    write_text(SETTINGS.fingerprint, home.parent / "current")
    writer = StoreWriter(home, 16)
    for number in range(3):
        writer.add(f"s{number}", volume(number), SOURCE)
    writer.close()
    return home


def test_the_copy_reads_as_the_store_does(drive, tmp_path):
    copy = current_store(drive.parent, tmp_path / "local")
    assert copy.folder.is_relative_to(tmp_path / "local")
    assert (copy.read(["s2", "s0"]) == np.stack([volume(2), volume(0)])).all()


def test_it_is_fetched_once(drive, tmp_path):
    mirror = StoreMirror(drive, tmp_path / "local")
    mirror.fetch()
    written = shard_path(mirror.local, 0).stat().st_mtime_ns
    StoreMirror(drive, tmp_path / "local").fetch()
    assert shard_path(mirror.local, 0).stat().st_mtime_ns == written


def test_what_is_added_locally_reaches_the_store_and_no_shard_is_sent_twice(drive, tmp_path, monkeypatch):
    mirror = StoreMirror(drive, tmp_path / "local")
    mirror.fetch()
    writer = StoreWriter(mirror.local, 16, mirror)
    writer.add("s3", volume(3), SOURCE)
    writer.commit()  # the first is sent at once, the next within the same minute only at the end
    writer.add("s4", volume(4), SOURCE)
    writer.close()
    assert (current_store(drive.parent).read(["s3", "s4"]) == np.stack([volume(3), volume(4)])).all()
    sent = []
    monkeypatch.setattr(staging, "copy_verified", lambda source, _: sent.append(source.name))
    mirror.send()
    again = StoreMirror(drive, tmp_path / "local")
    again.fetch()
    again.send()
    assert [name for name in sent if name.startswith("shard")] == []


def test_a_copy_that_is_ahead_is_kept(drive, tmp_path):
    mirror = StoreMirror(drive, tmp_path / "local")
    mirror.fetch()
    writer = StoreWriter(mirror.local, 16)
    writer.add("s3", volume(3), SOURCE)
    writer.close()  # committed locally, never sent: the kernel was killed
    again = StoreMirror(drive, tmp_path / "local")
    again.fetch()
    again.send()
    assert read_index(drive)["scan_id"].tolist() == ["s0", "s1", "s2", "s3"]


def test_a_damaged_row_is_refused_by_readers_and_made_anew_by_the_writer(drive, tmp_path):
    with open(shard_path(drive, 0), "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(StoreError, match=r"1 of 3 volumes in .* are damaged.*s2\)\. Run notebook 03 again"):
        current_store(drive.parent, tmp_path / "local")
    mirror = StoreMirror(drive, tmp_path / "local2")
    writer = StoreWriter(mirror.fetch(), 16, mirror)
    assert writer.damaged == ["s2"]
    assert "s2" not in writer.entries
    writer.add("s2", volume(2), SOURCE)
    writer.close()
    assert (VolumeStore(drive).verify()["s2"] == volume(2)).all()
    assert (current_store(drive.parent, tmp_path / "local3")["s2"] == volume(2)).all()


def test_a_copy_that_rots_is_mended_and_so_is_a_header_on_the_drive(drive, tmp_path):
    local = current_store(drive.parent, tmp_path / "local").folder
    for folder, place in ((local, 300), (drive, 20)):
        with open(shard_path(folder, 0), "r+b") as stream:
            stream.seek(place)
            stream.write(b"\x7f")
    for scratch in (None, tmp_path / "local"):
        with pytest.raises(StoreError, match=r"shard-0000\.npy"):
            current_store(drive.parent, scratch)
    mirror = StoreMirror(drive, tmp_path / "local")
    writer = StoreWriter(mirror.fetch(), 16, mirror)
    assert writer.damaged == ["s0"]
    writer.add("s0", volume(0), SOURCE)
    writer.close()
    for scratch in (None, tmp_path / "local"):
        store = current_store(drive.parent, scratch)
        assert (store.read(["s0", "s2"]) == np.stack([volume(0), volume(2)])).all()


def test_a_torn_index_on_the_drive_is_said_and_mended(drive, tmp_path):
    index = (drive / "index.csv").read_bytes()
    (drive / "index.csv").write_bytes(index[:-20])
    with pytest.raises(StoreError, match=r"index\.csv is damaged: 1 of its 3 rows are torn"):
        current_store(drive.parent, tmp_path / "local")
    mirror = StoreMirror(drive, tmp_path / "local")
    writer = StoreWriter(mirror.fetch(), 16, mirror)
    assert writer.lost.startswith("1 of its 3 rows are torn")
    writer.add("s2", volume(2), SOURCE)
    writer.close()
    assert current_store(drive.parent).scan_ids == ["s0", "s1", "s2"]


def test_a_cut_while_sending_leaves_a_store_that_is_whole(drive, tmp_path, monkeypatch):
    mirror = StoreMirror(drive, tmp_path / "local")
    mirror.fetch()
    writer = StoreWriter(mirror.local, 16)
    writer.add("s3", volume(3), SOURCE)
    writer.close()
    real = staging.copy_verified

    def cut_at_the_index(source, target):
        if source.name == "index.csv":
            raise OSError("Drive is gone")
        return real(source, target)

    monkeypatch.setattr(staging, "copy_verified", cut_at_the_index)
    with pytest.raises(OSError, match="Drive is gone"):
        mirror.send()
    store = current_store(drive.parent)
    assert store.scan_ids == ["s0", "s1", "s2"]


def test_a_lost_local_disk_costs_only_what_was_not_sent(drive, tmp_path):
    mirror = StoreMirror(drive, tmp_path / "local")
    mirror.fetch()
    shutil.rmtree(tmp_path / "local")
    assert current_store(drive.parent, tmp_path / "local").scan_ids == ["s0", "s1", "s2"]
