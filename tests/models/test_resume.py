"""Checkpoints are whole and verified, or they do not count."""

import os
import signal

import pytest
import torch

from brainage_nb.models.compute import space_needed
from brainage_nb.models.resume import Checkpoints
from brainage_nb.models.settings import TrainingFailed


def state(step, size=1000):
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}, "history": [{"mae": 1.5}]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_state_comes_back_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), 1)
    checkpoints.save(state(2), 2)
    loaded = Checkpoints(tmp_path).load()
    assert loaded["step"] == 2
    assert loaded["history"] == [{"mae": 1.5}]
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 2.0))


def test_nothing_comes_from_an_empty_folder(tmp_path):
    assert Checkpoints(tmp_path / "new").load() is None


def test_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(5):
        checkpoints.save(state(step), step)
    assert [name[:14] for name in names(tmp_path)] == ["step-000000003", "step-000000004"]


@pytest.mark.parametrize("damage", ["one byte changed", "cut short", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), 1)
    newest = checkpoints.save(state(2), 2)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    kept = {"one byte changed": len(content), "cut short": len(content) // 3, "empty": 0}[damage]
    newest.write_bytes(bytes(content[:kept]))
    again = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        assert again.load()["step"] == 1
    again.save(state(3), 3)
    assert [name[:14] for name in names(tmp_path)] == ["step-000000001", "step-000000003"]


def test_leftovers_of_a_killed_writer_are_no_checkpoints_and_go(tmp_path):
    Checkpoints(tmp_path).save(state(1), 1)
    (tmp_path / ".step-000000002.99999.tmp").write_bytes(b"half")
    assert Checkpoints(tmp_path).load()["step"] == 1
    assert len(names(tmp_path)) == 1


def test_a_full_disk_stops_with_what_is_safe_and_leaves_no_broken_file(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), 1)
    checkpoints.save(state(2), 2)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file size limit stands for a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(TrainingFailed, match=r"Safe: step-000000002"):
            checkpoints.save(state(3, size=100_000), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [name[:14] for name in names(tmp_path)] == ["step-000000002"]
    assert Checkpoints(tmp_path).load()["step"] == 2


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    Checkpoints(tmp_path).save(state(0), 0)
    child = os.fork()
    if child == 0:  # pragma: no cover
        checkpoints = Checkpoints(tmp_path)
        for step in range(1, 10_000):
            checkpoints.save(state(step, size=200_000), step)
        os._exit(0)
    import time

    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = Checkpoints(tmp_path).load()
    assert loaded["model"]["weight"].eq(loaded["step"]).all()


def test_space_counts_two_checkpoints_one_in_writing_and_small_members():
    resnet18 = 33_161_409
    assert space_needed(resnet18, 1) > 3 * 0.53e9
    assert space_needed(resnet18, 15) < 3e9
