"""Work spread over processes: a pool on this machine, or a Dask cluster of a lab's servers or SLURM jobs.

Knows tasks, workers and their files only; what a task does is its caller's business. Dask (the extra
`cluster`) is imported where a cluster is asked for, never before.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainage_nb.platforms import n_workers, version_of

if TYPE_CHECKING:
    from distributed import Client
    from joblib import Parallel

CONNECT_SECONDS = 30
LOOPBACK = "127.0.0.1:0"  # Dask serves its state over HTTP even without a dashboard: not to the network
LOST_SECONDS = 20  # a task is pending so long though no worker has anything to do: it is handed out again
WAITING_PER_THREAD = 3  # results kept ahead of the one that is asked for


class ClusterError(RuntimeError):
    """A cluster that cannot be used as asked; the message says why and what to do."""


def process_pool(n_jobs: int, **how: Any) -> Parallel:
    """joblib's pool of `n_jobs` processes, which end with this one, however it ends.

    Left alone, joblib's workers wait for more work for five minutes after this process was killed.

    >>> list(process_pool(2, return_as="generator")(delayed(abs)(x) for x in (-1, -2)))  # doctest: +SKIP
    [1, 2]
    """
    from joblib import Parallel

    return Parallel(n_jobs, backend="loky", initializer=end_with, initargs=(os.getpid(),), **how)


def end_with(process: int) -> None:
    """End this process by SIGTERM soon after another has ended, however that ended.

    Parameters
    ----------
    process : int
        The other's process id.
    """
    import psutil

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def open_cluster(cluster: str, folder: Path | str, *, gpus: int = 0) -> Iterator[Client]:
    """Join a cluster, or start one on this machine, and see that its workers can do our work.

    Parameters
    ----------
    cluster : str
        "local": workers here, one a processor, or one a GPU; "tcp://host:port" (tls, ucx, ...): a running
        scheduler; a path ending in .json: the scheduler file that Dask's command-line tools write.
    folder : path
        Where the work's files lie; every worker must see it under the same path.
    gpus : int
        For "local": start this many workers with one GPU each, instead of one a processor.

    Raises
    ------
    ClusterError
        Dask is not installed, nobody answers, or a worker lacks the folder or has another version of this
        package.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ClusterError(
            f"cluster = {cluster!r} needs Dask: pip install 'brainage-nb[cluster]', or leave cluster empty."
        ) from error
    if cluster == "local":
        with _local(gpus) as here, Client(here) as client:
            yield client
        return
    where = {"scheduler_file": cluster} if cluster.endswith(".json") else {"address": cluster}
    try:
        client = Client(**where, timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f'cluster = {cluster!r}: no Dask scheduler answers there ({error}). Expected "local", '
            '"tcp://host:port" of a running scheduler, or the path of its scheduler file (.json).'
        ) from error
    with client:
        _check_workers(client, Path(folder).absolute())
        yield client


def in_order(
    client: Client, function: Callable[..., Any], tasks: Iterable[tuple], *, again: int = 1
) -> Iterator[Any]:
    """Results of `function(*task)` in the order of `tasks`; a task whose worker dies is done by another.

    Only as many tasks are handed out as keep all workers busy, so results do not pile up. A task that keeps
    killing its workers (too little memory, as a rule) gives a `ClusterError` in its place and the rest go
    on; an exception of the function itself is given in its place likewise.

    Parameters
    ----------
    client : Client
    function : callable
        Importable by the workers.
    tasks : iterable of tuple
    again : int
        How often a task is handed out anew after the scheduler gave it up (by default after four lost
        workers). Once, since Dask blames every task that a dying worker had waiting; more for tasks that go
        on where they stopped.
    """
    waiting: deque = deque()
    try:
        for task in tasks:
            while len(waiting) >= WAITING_PER_THREAD * max(1, sum(client.nthreads().values())):
                yield _result(client, function, *waiting.popleft(), again)
            waiting.append((task, client.submit(function, *task, pure=False)))
        while waiting:
            yield _result(client, function, *waiting.popleft(), again)
    finally:
        client.cancel([future for _, future in waiting])


def _result(client: Client, function: Callable[..., Any], task: tuple, future: Any, again: int) -> Any:
    from distributed.scheduler import KilledWorker

    for left in range(again, -1, -1):
        try:
            while not _is_done(client, future):
                future.cancel()
                future = client.submit(function, *task, pure=False)
            return future.result()
        except KilledWorker as error:
            if not left:
                return ClusterError(
                    "the workers that had this task died, one after the other "
                    f"(the last: {error.last_worker.address}): too little memory?"
                )
            future = client.submit(function, *task, pure=False)
        except Exception as error:
            return error


def _is_done(client: Client, future: Any) -> bool:
    """Wait for a task; False where the scheduler has forgotten it: it is pending while workers stand idle.

    Seen after several workers had died at once. `ClusterError` where no worker has been there for minutes.
    """
    from distributed import wait

    seen = time.monotonic()
    while True:
        try:
            wait(future, timeout=LOST_SECONDS)
            return True
        except TimeoutError:
            if client.nthreads():
                seen = time.monotonic()
                if not any(client.processing().values()):
                    return future.done()
            elif time.monotonic() - seen > 10 * CONNECT_SECONDS:
                raise ClusterError("all workers are gone, and none has come back. Start workers.") from None


def _local(gpus: int):
    """Workers on this machine that only it can reach, one thread each."""
    from distributed import Nanny, Scheduler, SpecCluster

    options = {"nthreads": 1, "host": "127.0.0.1", "memory_limit": 0, "dashboard_address": LOOPBACK}
    options |= {"silence_logs": logging.ERROR}
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = (given or [str(number) for number in range(gpus)])[:gpus]
    each = [{"CUDA_VISIBLE_DEVICES": name} for name in names] or [{}] * n_workers()
    workers = {
        number: {"cls": Nanny, "options": options | {"env": environment}}
        for number, environment in enumerate(each)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": LOOPBACK},
    }
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.ERROR)


def _check_workers(client: Client, folder: Path) -> None:
    """Wait for a worker, then compare folder and version on all that are there."""
    try:
        client.wait_for_workers(1, timeout=10 * CONNECT_SECONDS)
    except TimeoutError as error:
        raise ClusterError(
            f"The scheduler {client.scheduler.address} has had no worker for {10 * CONNECT_SECONDS} s. "
            "Start workers (`dask worker ADDRESS --nthreads 1`), then run this again."
        ) from error
    try:
        seen = client.run(_seen_by_worker, str(folder))
    except Exception as error:
        raise ClusterError(
            f"The workers cannot run this package ({type(error).__name__}: {error}). Install brainage-nb "
            f"{version_of('brainage-nb')} on all of them."
        ) from error
    blind = [worker for worker, (sees, _) in seen.items() if not sees]
    if blind:
        raise ClusterError(
            f"{len(blind)} workers do not see {folder} (the first: {blind[0]}). Put workspace and scans on a "
            "file system that all machines mount under the same path."
        )
    mine = version_of("brainage-nb")
    other = {worker: found for worker, (_, found) in seen.items() if found != mine}
    if other:
        worker, found = next(iter(other.items()))
        raise ClusterError(
            f"{len(other)} workers have another brainage-nb ({worker}: {found}) than this session ({mine}). "
            "Install the same version on all."
        )


def _seen_by_worker(folder: str) -> tuple[bool, str]:
    """Whether a folder is there, and the version of this package."""
    return Path(folder).is_dir(), version_of("brainage-nb")
