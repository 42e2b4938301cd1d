"""Workers end with the process that started them, also where it is killed."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.models.tiny_bundle import write_scan

INSPECTING = """
from brainage_nb.cohort.inspection import inspect_scans
inspect_scans(pd.DataFrame({"image": ["SCAN"] * 2000, "scan_id": range(2000)}), str, n_jobs=2)
"""
PREPROCESSING = """
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.store import build_store
scans = pd.DataFrame({"image": ["SCAN"] * 2000, "scan_id": [f"s{k}" for k in range(2000)]})
build_store(scans, "FOLDER/volumes", PreprocessingSettings(spacing_mm=8, size=24), n_jobs=2)
"""


@pytest.mark.parametrize(("work", "number"), [(INSPECTING, signal.SIGTERM), (PREPROCESSING, signal.SIGKILL)])
def test_no_worker_outlives_a_run_that_was_killed(work, number, tmp_path):
    scan = write_scan(tmp_path / "scan.nii")
    code = "import pandas as pd" + work.replace("SCAN", str(scan)).replace("FOLDER", str(tmp_path))
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    workers, until = [], time.monotonic() + 60
    while sum(worker.cpu_times().user > 0.5 for worker in workers) < 2 and time.monotonic() < until:
        assert run.poll() is None
        time.sleep(0.1)
        workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    run.send_signal(number)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert not alive
