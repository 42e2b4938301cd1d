"""Work handed to a Dask cluster comes back in order, whatever happens to a worker."""

import os
import signal
import time

import pytest

from brainage_nb import cluster
from brainage_nb.cluster import ClusterError, in_order, open_cluster

distributed = pytest.importorskip("distributed", reason="Dask (the extra `cluster`) is not installed")


def double(number, marker):
    """Twice a number; the first process that is given 3 with a marker kills itself."""
    if number == 3 and marker and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5:
        raise ValueError("five cannot be doubled")
    return 2 * number


def deadly(number):
    """A number, unless it is 1: that kills whoever has it."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def gpu(_):
    """What CUDA device a worker is given."""
    time.sleep(0.3)
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with open_cluster("local", tmp_path_factory.getbasetemp()) as client:
        yield client


def test_results_keep_their_order_and_an_error_takes_its_own_place_only(local):
    results = list(in_order(local, double, [(number, "") for number in range(12)]))
    assert [result for result in results if not isinstance(result, Exception)] == [
        2 * number for number in range(12) if number != 5
    ]
    assert isinstance(results[5], ValueError)


def test_a_task_whose_worker_was_killed_is_done_by_another(local, tmp_path):
    results = list(in_order(local, double, [(number, str(tmp_path / "died")) for number in range(5)]))
    assert results == [0, 2, 4, 6, 8]
    assert (tmp_path / "died").exists()


@pytest.mark.slow  # beside other tests the workers' keepers sometimes start no new worker, and Dask waits
def test_a_task_that_kills_every_worker_is_given_up_and_the_rest_goes_on(tmp_path):
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        open_cluster("local", tmp_path) as client,
    ):
        results = list(in_order(client, deadly, [(number,) for number in range(4)]))
    assert isinstance(results[1], ClusterError)
    assert "too little memory" in str(results[1])
    assert [results[0], *results[2:]] == [0, 2, 3]


def test_local_workers_have_a_gpu_each_where_there_are_several(tmp_path):
    with open_cluster("local", tmp_path, gpus=2) as client:
        assert set(in_order(client, gpu, [(number,) for number in range(8)])) == {"0", "1"}


def test_nobody_at_the_address_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with (
        pytest.raises(ClusterError, match="no Dask scheduler answers"),
        open_cluster("tcp://127.0.0.1:9", tmp_path),
    ):
        pass


def test_workers_that_do_not_see_the_folder_are_named(local, tmp_path):
    address = local.scheduler.address
    with pytest.raises(ClusterError, match="do not see"), open_cluster(address, tmp_path / "elsewhere"):
        pass


def test_workers_with_another_version_are_named(local, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "version_of", lambda _: "0.0.0")
    address = local.scheduler.address
    with pytest.raises(ClusterError, match="have another brainage-nb"), open_cluster(address, tmp_path):
        pass
