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
from brainage_nb.volumes.store import StoreError, VolumeStore, build_store, current_store, find_damaged

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
    assert find_damaged(partial.folder, partial.index, 12) == []
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
    assert report.note.endswith(
        "1 volumes made, 6 were there, 0 failed. File replaced, hence preprocessed anew: 002."
    )
    report.store.verify()


def test_a_scan_whose_file_is_gone_keeps_its_volume(scans, tmp_path):
    build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    os.remove(tmp_path / "005.nii.gz")
    assert len(build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1).failed) == 0


def test_a_replaced_file_that_is_no_scan_leaves_no_volume_of_the_old_one(scans, tmp_path):
    build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    (tmp_path / "002.nii.gz").write_bytes(b"nothing")
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert report.failed["scan_id"].tolist() == ["002"]
    assert report.store.scan_ids == ["000", "001", "003", "004", "005", "006"]


def test_whatever_goes_wrong_with_one_scan_the_others_go_on(scans, tmp_path, monkeypatch):
    def overflow(image, settings):
        if "003" in str(image.extra["path"]):
            raise OverflowError("too large")
        return preprocess(image, settings)

    monkeypatch.setattr(store_module, "preprocess", overflow)
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert (report.n_new, report.failed["scan_id"].tolist()) == (6, ["003"])
    assert "OverflowError: too large" in report.failed["reason"][0]


# --- what lies on the disk is not what was written ---------------------------------------------------------

ROW_BYTES = 2 * 12**3


def flip(at):
    """A change of eight bytes of a file."""
    return lambda content: (
        content[:at] + bytes(byte ^ 255 for byte in content[at : at + 8]) + content[at + 8 :]
    )


def other_scan_in_the_first_row(content):
    return content.replace(b"\n000,", b"\n003,", 1)


HALF, EMPTY, BRACES, BRACKETS = lambda content: content[: len(content) // 2], b"", b"{}\n", b"[]\n"
FAULTS = {  # file, what becomes of it (None: it is gone), what is said of it, scans that are made again
    "eight bytes of a volume": ("shard-0000.npy", flip(128 + ROW_BYTES), r"shard-0000\.npy; 001\)", "1"),
    "the shard's header": ("shard-0000.npy", flip(30), r"shard-0000\.npy", ""),
    "the shard cut short": ("shard-0001.npy", lambda content: content[:-9], r"shard-0001\.npy; 005\)", "5"),
    "the shard cut to nothing": ("shard-0001.npy", EMPTY, r"shard-0001\.npy; 003, 004, 005\)", "345"),
    "no shard": ("shard-0000.npy", None, r"shard-0000\.npy; 000, 001, 002\)", "012"),
    "the last shard gone": ("shard-0002.npy", None, r"shard-0002\.npy; 006\)", "6"),
    "half an index": ("index.csv", HALF, r"index\.csv is damaged: 1 of its \d rows are torn", "3456"),
    "an empty index": ("index.csv", EMPTY, r"index\.csv is damaged: its first line", "0123456"),
    "{} as index": ("index.csv", BRACES, r"index\.csv is damaged: its first line", "0123456"),
    "[] as index": ("index.csv", BRACKETS, r"index\.csv is damaged: its first line", "0123456"),
    "flipped bytes in the index": ("index.csv", flip(400), r"index\.csv is damaged: 1 of its 7 rows", None),
    "a row that cannot be": (
        "index.csv",
        lambda content: content.replace(b"\n002,0,2,", b"\n002,0,-2,"),
        r"1 of its 7 rows are torn",
        "2",
    ),
    "a scan twice": ("index.csv", other_scan_in_the_first_row, r"2 of its 7 rows .* name a scan twice", "03"),
    "half the settings": ("preprocessing.json", HALF, r"preprocessing\.json is damaged", ""),
    "no settings": ("preprocessing.json", EMPTY, r"preprocessing\.json is damaged", ""),
    "{} as settings": ("preprocessing.json", BRACES, r"preprocessing\.json is damaged", ""),
    "[] as settings": ("preprocessing.json", BRACKETS, r"preprocessing\.json is damaged", ""),
    "settings of no word": ("preprocessing.json", flip(3), r"preprocessing\.json is damaged", ""),
    "no index": ("index.csv", None, r"holds no volume: index\.csv is missing", "0123456"),
    "no file of settings": ("preprocessing.json", None, r"preprocessing\.json is missing", ""),
    "no current": ("../current", None, r"current is missing", ""),
    "current names nothing": ("../current", EMPTY, r"current names ''", ""),
    "current points nowhere": ("../current", b"2mm-96-gone\n", r"current names '2mm-96-gone'", ""),
    "current of no word": ("../current", flip(0), r"current names", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_and_the_next_build_makes_again_just_what_is_lost(
    fault, scans, tmp_path, monkeypatch
):
    name, become, said, again = FAULTS[fault]
    monkeypatch.setattr(store_module, "SHARD_BYTES", 3 * ROW_BYTES)
    whole = build_store(scans, tmp_path, SMALL, n_jobs=1).store
    expected = whole.read(whole.scan_ids)
    file = whole.folder / name
    if become is None:
        file.unlink()
    else:
        file.write_bytes(become if isinstance(become, bytes) else become(file.read_bytes()))
    with pytest.raises((StoreError, FileNotFoundError), match=said) as error:
        current_store(tmp_path)
    assert "Run notebook 03" in str(error.value)

    made = []
    monkeypatch.setattr(
        store_module, "preprocess", lambda image, s: made.append(image) or preprocess(image, s)
    )
    report = build_store(scans, tmp_path, SMALL, n_jobs=1)
    if again is None:
        assert len(made) == 1
    else:
        assert [image.extra["path"].name[2] for image in made] == list(again)
    assert (report.n_new, len(report.failed)) == (len(made), 0)
    assert become is None or not report.note.endswith("failed.")  # what was wrong is said
    store = current_store(tmp_path)
    assert np.array_equal(store.read(scans["scan_id"]), expected)
    report = build_store(scans, tmp_path, SMALL, n_jobs=1)
    assert report.note == f"{SMALL.fingerprint}: 0 volumes made, 7 were there, 0 failed."


def test_a_damaged_volume_whose_scan_is_gone_is_left_out_with_the_reason(scans, tmp_path):
    store = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1).store
    shard = store.folder / "shard-0000.npy"
    shard.write_bytes(flip(200)(shard.read_bytes()))
    os.remove(tmp_path / "000.nii.gz")
    report = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1)
    assert report.failed[["scan_id", "code"]].to_numpy().tolist() == [["000", "missing"]]
    assert "Damaged, hence preprocessed anew: 000." in report.note
    assert current_store(tmp_path / "volumes").scan_ids == scans["scan_id"].tolist()[1:]


def test_a_damaged_store_makes_its_notebook_count_as_not_done(scans, tmp_path):
    store = build_store(scans, tmp_path / "volumes", SMALL, n_jobs=1).store
    results = tmp_path / "results"
    results.mkdir()
    for name in ("02_data_cleaning", "03_preprocessing_preview"):
        (results / f"{name}.json").write_text("{}")
    current_store(tmp_path / "volumes")
    assert len(list(results.iterdir())) == 2
    (store.folder / "shard-0000.npy").unlink()
    with pytest.raises(StoreError):
        current_store(tmp_path / "volumes")
    assert [path.stem for path in results.iterdir()] == ["02_data_cleaning"]


def test_a_store_under_another_name_is_refused(scans, tmp_path):
    other = PreprocessingSettings(spacing_mm=8, size=16)
    build_store(scans.head(1), tmp_path, SMALL, n_jobs=1).store.folder.rename(tmp_path / other.fingerprint)
    (tmp_path / "current").write_text(other.fingerprint)
    for attempt in (lambda: current_store(tmp_path), lambda: build_store(scans, tmp_path, other, n_jobs=1)):
        with pytest.raises(StoreError, match=f"preprocessing.json is of {SMALL.fingerprint}"):
            attempt()


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
