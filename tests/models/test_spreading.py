"""A run's models trained by several workers are those of one process, whoever dies on the way."""

import os
import signal
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from brainage_nb.models.settings import TrainingFailed
from brainage_nb.models.train import MARK, TaskStop, train, train_member

distributed = pytest.importorskip("distributed", reason="Dask (the extra `cluster`) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:TRAINING ON THE CPU")


@pytest.fixture
def one_thread():
    """Dask gives a worker one thread; sums of the same order need the same here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_when_saved(pids, run_folder, killed):
    """Kill a worker once some model has a checkpoint and is not yet finished."""
    for _ in range(6000):
        if any(run_folder.glob("checkpoints/*/step-*.pt")):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
            return
        time.sleep(0.01)


@pytest.mark.slow  # a minute of waiting
def test_a_sweep_whose_worker_is_killed_ends_as_if_nothing_had_happened(
    tiny, tiny_settings, tmp_path, one_thread
):
    store, splits = tiny
    settings = replace(tiny_settings, folds=2, seeds=(1, 2), epochs=4, checkpoint_minutes=0.0)
    plain = train(store, splits, tmp_path / "plain", settings)
    killed = []
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]
        run = tmp_path / "spread"
        killer = threading.Thread(target=kill_when_saved, args=(pids, run, killed))
        killer.start()
        seen = []
        spread = train(
            store, splits, run, replace(settings, cluster=cluster.scheduler_address), on_epoch=seen.append
        )
        killer.join()
    assert killed, "no worker was killed: the test shows nothing"
    assert spread.complete
    pd.testing.assert_frame_equal(spread.predictions, plain.predictions, check_exact=True)
    pd.testing.assert_frame_equal(
        spread.history.drop(columns="seconds"), plain.history.drop(columns="seconds"), check_exact=True
    )
    assert len(seen) and len(seen[-1]) == 4 * 4
    assert any("4 models on 2 workers" in note for note in spread.notes)


@pytest.mark.slow  # a minute of waiting
def test_models_that_cannot_be_trained_are_named_and_the_others_kept(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    settings = replace(tiny_settings, seeds=(1, 2), epochs=1, cluster="local")
    run = tmp_path / "run"
    (run / "checkpoints" / "seed2" / "history.csv").mkdir(parents=True)  # where a file must go
    with pytest.raises(TrainingFailed, match="1 of 2 models") as caught:
        train(store, splits, run, settings)
    assert "seed2: IsADirectoryError" in str(caught.value)
    (run / "checkpoints" / "seed2" / "history.csv").rmdir()
    assert train(store, splits, run, settings).complete


def test_time_that_is_used_up_ends_a_sweep_with_all_saved(tiny, tiny_settings, tmp_path, one_thread):
    store, splits = tiny
    with distributed.LocalCluster(  # in this process: others would import torch first
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        settings = replace(tiny_settings, seeds=(1, 2), cluster=address, max_minutes=1e-6)
        stopped = train(store, splits, tmp_path / "run", settings)
        assert not stopped.complete
        assert any("max_minutes" in note for note in stopped.notes)
        assert train(store, splits, tmp_path / "run", replace(settings, max_minutes=0.0)).complete


def test_a_task_of_an_earlier_start_saves_nothing(tiny, tiny_settings, tmp_path, monkeypatch):
    store, splits = tiny
    run = tmp_path / "run"
    run.mkdir()
    (run / MARK).write_text("a newer start")
    with pytest.raises(TrainingFailed, match="started again or given up"):
        train_member([store.folder], splits, run, tiny_settings, "an older one", float("inf"), "seed0")
    assert not list(run.glob("checkpoints/*/*"))
    (run / MARK).write_text("this start")
    asked = TaskStop.asked

    def ask_after_another_start(self, accelerator):
        (run / MARK).write_text("newer")
        return asked(self, accelerator)

    monkeypatch.setattr(TaskStop, "asked", ask_after_another_start)
    with pytest.raises(TrainingFailed, match="started again or given up"):
        train_member([store.folder], splits, run, tiny_settings, "this start", float("inf"), "seed0")
    assert not (run / "checkpoints" / "seed0" / "predictions.csv").exists()
