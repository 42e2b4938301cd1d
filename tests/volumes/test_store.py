"""The store is whole at any moment, the same for any number of processes, and knows when a row is damaged."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainage_nb.cluster import in_order
from brainage_nb.volumes import store as store_module
from brainage_nb.volumes.preprocessing import as_stored, preprocess
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import VolumeStore, build_store, current_store, find_damaged

SMALL = PreprocessingSettings(spacing_mm=8, size=12)
KILLED = """
import os, sys
import pandas as pd
from brainage_nb.volumes import store
from brainage_nb.volumes.preprocessing import PreprocessingSettings
store.COMMIT_SECONDS = 0.0
where, times = sys.argv[3], int(sys.argv[4])
plain, calls = getattr(store, where), []
def deadly(*arguments, **named):
    calls.append(1)
    if len(calls) == times:
        os.kill(os.getpid(), 9)
    return plain(*arguments, **named)
setattr(store, where, deadly)
scans = pd.read_csv(sys.argv[1], dtype=str)
store.build_store(scans, sys.argv[2], PreprocessingSettings(spacing_mm=8, size=12), n_jobs=1)
"""


@pytest.fixture
def scans(tmp_path):
    """Seven small scans on disk, as a table of scan_id and image."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(7):
        array = np.zeros((24, 26, 25), np.float32)
        array[4:20, 4:21, 5:21] = rng.uniform(200, 900, (16, 17, 16))
        path = tmp_path / f"{number:03d}.nii.gz"
        nib.save(nib.Nifti1Image(array, np.diag([8.0, 8, 8, 1])), path)
        rows.append((f"{number:03d}", str(path)))
    return pd.DataFrame(rows, columns=["scan_id", "image"])


def contents(folder):
    """Name to bytes of every file of a store."""
    return {path.name: path.read_bytes() for path in sorted((folder / SMALL.fingerprint).iterdir())}


def test_a_row_is_what_preprocess_gives_rounded(scans, tmp_path):
    store = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1).store
    assert store.scan_ids == scans["scan_id"].tolist()
    for scan_id, image in zip(scans["scan_id"], scans["image"], strict=True):
        assert np.array_equal(store[scan_id], as_stored(preprocess(image, SMALL)))
    assert (store.size, store.spacing_mm, store.fingerprint) == (12, 8.0, SMALL.fingerprint)
    assert store.settings == SMALL


def test_the_number_of_processes_changes_nothing(scans, tmp_path):
    build_store(scans, tmp_path / "one", SMALL, n_jobs=1)
    build_store(scans, tmp_path / "two", SMALL, n_jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_are_plain_npy_files_of_limited_size(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 3 * 2 * 12**3)
    store = build_store(scans, tmp_path, SMALL, n_jobs=1).store
    assert [shard.shape for shard in store.shards.values()] == [
        (3, 12, 12, 12),
        (3, 12, 12, 12),
        (1, 12, 12, 12),
    ]
    shard, row = store.locate(["004", "000"])
    assert (shard.tolist(), row.tolist()) == ([1, 0], [1, 0])
    for number, mapped in store.shards.items():
        loaded = np.load(store.folder / f"shard-{number:04d}.npy")
        assert loaded.dtype == np.float16
        assert np.array_equal(loaded, mapped)
    assert np.array_equal(store.read(["004", "000"]), np.stack([store["004"], store["000"]]))


def test_a_second_build_makes_nothing(scans, tmp_path):
    build_store(scans, tmp_path, SMALL, n_jobs=1)
    before = contents(tmp_path)
    report = build_store(scans, tmp_path, SMALL, n_jobs=1)
    assert (report.n_new, report.n_present, len(report.failed)) == (0, 7, 0)
    assert contents(tmp_path) == before


def test_new_scans_are_added_behind_the_old_ones(scans, tmp_path):
    build_store(scans.head(4), tmp_path / "grown", SMALL, n_jobs=1)
    report = build_store(scans, tmp_path / "grown", SMALL, n_jobs=1)
    build_store(scans, tmp_path / "whole", SMALL, n_jobs=1)
    assert (report.n_new, report.n_present) == (3, 4)
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("where", "times"), [("preprocess", 4), ("write_csv", 3), ("preprocess", 1)])
def test_a_killed_build_goes_on_to_the_very_same_store(scans, tmp_path, where, times):
    scans.to_csv(tmp_path / "scans.csv", index=False)
    argument = [str(tmp_path / "scans.csv"), str(tmp_path / "killed"), where, str(times)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *argument], capture_output=True)
    assert ended.returncode == -9
    partial = VolumeStore(tmp_path / "killed" / SMALL.fingerprint)
    assert len(partial) == times - 1
    assert find_damaged(partial.folder, partial.index) == []
    build_store(scans, tmp_path / "killed", SMALL, n_jobs=1)
    build_store(scans, tmp_path / "whole", SMALL, n_jobs=1)
    rest = {name for name in contents(tmp_path / "killed") if not name.endswith(".tmp")}
    assert {name: contents(tmp_path / "killed")[name] for name in rest} == contents(tmp_path / "whole")


def test_a_scan_that_fails_is_reported_and_leaves_no_row(scans, tmp_path):
    (tmp_path / "002.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    os.remove(tmp_path / "003.nii.gz")
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert report.failed["scan_id"].tolist() == ["002", "003"]
    assert report.failed["code"].tolist() == ["truncated", "missing"]
    assert "002" not in report.store
    assert len(report.store) == 5
    assert all(volume.std() > 0.5 for volume in report.store.read(report.store.scan_ids).astype(np.float32))
    with pytest.raises(KeyError, match="002"):
        report.store.locate(["001", "002"])


@pytest.mark.parametrize(
    "fault", [OverflowError("cannot convert float infinity"), MemoryError(), KeyError(7)]
)
def test_whatever_preprocessing_raises_is_that_scans_reason(scans, tmp_path, monkeypatch, fault):
    def broken(path, plain=store_module.load_scan):
        if path.name == "002.nii.gz":
            raise fault
        return plain(path)

    monkeypatch.setattr(store_module, "load_scan", broken)
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert report.failed["scan_id"].tolist() == ["002"]
    assert report.failed["reason"].str.contains("002.nii.gz (?:cannot be preprocessed|does not fit)").all()
    assert len(report.store) == 6


def test_a_scan_whose_content_changed_is_made_again_and_a_new_date_alone_is_not(scans, tmp_path):
    build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    os.utime(tmp_path / "001.nii.gz", (1, 1))
    image = nib.load(tmp_path / "002.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata()[::-1], image.affine), tmp_path / "002.nii.gz")
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert report.n_new == 1
    assert report.store.scan_ids == scans["scan_id"].tolist()
    assert np.array_equal(report.store["002"], as_stored(preprocess(tmp_path / "002.nii.gz", SMALL)))
    assert find_damaged(report.store.folder, report.store.index) == []


def test_a_scan_whose_file_is_gone_keeps_its_volume(scans, tmp_path):
    build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    os.remove(tmp_path / "005.nii.gz")
    assert len(build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1).failed) == 0


def test_a_damaged_row_is_found(scans, tmp_path):
    store = build_store(scans, tmp_path, SMALL, n_jobs=1).store
    assert find_damaged(store.folder, store.index) == []
    shard = store.folder / "shard-0000.npy"
    content = bytearray(shard.read_bytes())
    content[-3 * 2 * 12**3 + 100] ^= 1
    shard.write_bytes(content)
    assert find_damaged(store.folder, store.index) == ["004"]
    shard.write_bytes(content[:-100])
    assert len(find_damaged(store.folder, store.index)) == 7  # cut short: nothing in it is trusted


def test_current_follows_the_settings_used_last_and_the_note_says_what_changed(scans, tmp_path):
    build_store(scans.head(1), tmp_path, SMALL, n_jobs=1)
    report = build_store(scans.head(1), tmp_path, PreprocessingSettings(spacing_mm=8, size=16), n_jobs=1)
    assert current_store(tmp_path).size == 16
    assert "size 12 -> 16" in report.note
    with pytest.raises(FileNotFoundError, match="notebook 03"):
        current_store(tmp_path / "elsewhere")


def test_a_table_with_a_scan_twice_is_refused(scans, tmp_path):
    with pytest.raises(ValueError, match="'000'"):
        build_store(pd.concat([scans, scans.head(1)]), tmp_path, SMALL, n_jobs=1)
    with pytest.raises(ValueError, match="image"):
        build_store(scans[["scan_id"]], tmp_path, SMALL, n_jobs=1)


def test_a_store_goes_to_a_worker_process_without_its_volumes(scans, tmp_path):
    store = build_store(scans, tmp_path, SMALL, n_jobs=1).store
    wanted = store["003"]
    packed = pickle.dumps(store)
    assert len(packed) < 20_000
    assert np.array_equal(pickle.loads(packed)["003"], wanted)


def test_shards_cannot_be_written_through_the_store(scans, tmp_path):
    store = build_store(scans, tmp_path, SMALL, n_jobs=1).store
    with pytest.raises(ValueError, match="read-only"):
        store.shards[0][0] = 0


def test_a_cluster_makes_the_same_store_though_a_worker_is_killed(scans, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="Dask (the extra `cluster`) is not installed")
    plain = build_store(scans, tmp_path / "plain", SMALL, n_jobs=1).store
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]

        def kill_one_and_go_on(*arguments):
            threading.Timer(0.05, os.kill, (pids[0], signal.SIGKILL)).start()
            return in_order(*arguments)

        monkeypatch.setattr(store_module, "in_order", kill_one_and_go_on)
        report = build_store(scans, tmp_path / "spread", SMALL, cluster=cluster.scheduler_address)
        time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)
    assert len(report.failed) == 0
    assert np.array_equal(report.store.read(scans["scan_id"]), plain.read(scans["scan_id"]))


def test_a_shard_without_a_current_scan_is_not_needed(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 3 * 2 * 12**3)
    build_store(scans.head(3), tmp_path / "volumes", SMALL, n_jobs=1)
    for image in scans["image"].head(3):  # all scans of the first shard come anew
        changed = nib.load(image).get_fdata() + np.arange(25)
        nib.save(nib.Nifti1Image(changed.astype(np.float32), np.diag([8.0, 8, 8, 1])), image)
    store = build_store(scans.head(3), tmp_path / "volumes", SMALL, n_jobs=1).store
    expected = store.read(store.scan_ids)
    (store.folder / "shard-0000.npy").unlink()
    assert np.array_equal(VolumeStore(store.folder).read(store.scan_ids), expected)
