"""Notebook 01 itself, headless, against the loopback server: killed while it downloads, then run again."""

import hashlib
import subprocess
import sys
import time

import nbformat
import numpy as np
import psutil

from brainage_nb.workspace import open_workspace
from tests.sources.test_opening import IXI_NAMES, nifti, tarred


def command(workspace, parameters):
    given = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    run = [sys.executable, "-m", "brainage_nb.cli", "run", "--workspace", str(workspace), "--to", "01"]
    return [*run, *given]


def kill_with_kernel(process):
    """Kill the runner and its kernel, which lives in a session of its own."""
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.wait()


def test_ixi_killed_while_it_downloads_then_run_again(loopback, tmp_path):
    notes = {"notes.bin": np.random.default_rng(0).bytes(500_000)}
    tar = tarred({name: nifti(seed) for seed, name in enumerate(IXI_NAMES)} | notes)
    half = len(tar) // 2
    table = "IXI_ID,AGE,CDR\n2,35.80,0\n12,38.78,0\n13,46.71,1\n99,50,0\n"
    parameters = {
        "source": "ixi",
        "ixi_images_url": loopback.put("/IXI-T1.tar", tar, faults=[("stall", half, 120)]) + "?token=s3cr3t",
        "ixi_table_url": loopback.put("/IXI.csv", table.encode()),
        "ixi_md5": hashlib.md5(tar).hexdigest(),
    }
    workspace = tmp_path / "ws"
    first = subprocess.Popen(
        command(workspace, parameters), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    part = workspace / "downloads" / "ixi" / ".IXI-T1.tar.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill_with_kernel(first)
    had = part.stat().st_size
    assert 0 < had <= half and not (workspace / "cohort.csv").exists()

    done = subprocess.run(command(workspace, parameters), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert loopback.asked("/IXI-T1.tar")[-1]["Range"] == f"bytes={had}-"
    ws = open_workspace(workspace)
    assert list(ws.read("cohort.csv")["scan_id"]) == ["IXI002", "IXI012"]
    assert list(ws.read("cohort_dropped.csv")["scan_id"]) == ["IXI013"]
    assert list(ws.read("cohort_unmatched.csv")["subject_id"]) == ["99"]
    assert all(ws.resolve(image).is_file() for image in ws.read("cohort.csv")["image"])

    (executed,) = workspace.rglob("01_data_access.ipynb")
    shown = [cell.outputs for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    assert "CC BY-SA 3.0" in str(shown) and "CDR 1, above 0" in str(shown)
    assert "s3cr3t" not in str(shown)

    again = subprocess.run(command(workspace, parameters), capture_output=True, text=True)
    assert again.returncode == 0 and len(loopback.asked("/IXI-T1.tar")) == 2
