"""Do notebooks 01 to 04, killed at random moments, end as if nothing had happened?

Run: `python benchmarks/kills.py [--kills 20] [--quick]`. `brainage-nb run` works on a tiny demo cohort; it is
killed once in each notebook, then again in a new workspace, in turn alone and with all its processes. The
last round has a disk (a small tmpfs, which only root can mount) that is full in the middle of each notebook's
writes. After each round the run goes to its end: cohort, splits, volumes and predictions have to be those of
the run that nobody killed, and no process may be left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from brainage_nb.volumes.store import current_store
from brainage_nb.workspace import read_csv

SETTINGS = {
    "n_subjects": 12,
    "demo_voxel_mm": 2,
    "recipe": "reference",
    "spacing_mm": 8,
    "size": 24,
    "epochs": 2,
    "batch_size": 4,
    "widths": "4,4,8,8",
    "device": "cpu",
    "checkpoint_minutes": 0,
}
NOTEBOOKS = ("01", "02", "03", "04")
STRAY_SECONDS = 60  # within which everything has to end with the run
LARGEST_DISK = 2**30


class Run:
    """One `brainage-nb run`: its lines as they come, and the processes that it started."""

    def __init__(self, workspace: Path):
        given = [part for name, value in SETTINGS.items() for part in ("-p", f"{name}={value}")]
        command = [sys.executable, "-m", "brainage_nb.cli", "run", "--to", NOTEBOOKS[-1], *given]
        # BRAINAGE_WORKSPACE goes down to all processes, and marks them.
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"BRAINAGE_WORKSPACE": str(workspace)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.workspace, self.lines, self.begun = workspace, [], {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"\[\d/\d\] (\d\d)_\w+: (running|complete)", line):
                self.begun[found[1], found[2]] = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.process.poll() is not None

    def wait(self) -> str:
        """Its output, once it has ended."""
        self.process.wait()
        self._reader.join(timeout=STRAY_SECONDS)
        return "".join(self.lines)

    def wait_for(self, number: str, seconds: float) -> None:
        """Wait until a notebook has run for some seconds; shorter where the run ends first."""
        while not self.ended:
            begun = [at for (name, what), at in self.begun.items() if name >= number and what == "running"]
            if begun and time.monotonic() - min(begun) >= seconds:
                return
            time.sleep(0.01)

    def kill(self, *, tree: bool) -> bool:
        """End it with SIGKILL, with all its processes or alone; False where it had ended before."""
        if self.ended:
            return False
        for process in list_processes(self.workspace) if tree else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return True


def list_processes(workspace: Path) -> list[psutil.Process]:
    """All processes that belong to a run in this workspace."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and process.environ().get("BRAINAGE_WORKSPACE") == str(workspace):
                found.append(process)
    return found


def count_strays(workspace: Path) -> int:
    """How many processes are left of runs that were killed, after some time; they are ended."""
    _, alive = psutil.wait_procs(list_processes(workspace), timeout=STRAY_SECONDS)
    for process in alive:
        process.kill()
    return len(alive)


def read_result(workspace: Path) -> dict[str, str]:
    """Hashes of what must be equal, bit for bit."""
    store = current_store(workspace / "volumes")
    index = store.index[["scan_id", "sha256", "source_sha256"]].to_csv(index=False)
    volumes = np.ascontiguousarray(store.read(store.scan_ids)).tobytes()
    tables = ("cohort.csv", "splits.csv", "runs/resnet18/predictions.csv")
    content = {name: (workspace / name).read_bytes() for name in tables}
    content |= {"volumes": volumes, "their index": index.encode()}
    history = read_csv(workspace / "runs" / "resnet18" / "history.csv").drop(columns="seconds")
    content["history"] = history.to_csv(index=False).encode()
    return {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}


class SmallDisk:
    """A tmpfs whose size can be changed while it is in use."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGEST_DISK}", "tmpfs", folder], check=True)

    def leave(self, room: int) -> None:
        """Leave this many bytes free."""
        size = max(4096, shutil.disk_usage(self.folder).used + room)
        subprocess.run(["mount", "-o", f"remount,size={min(size, LARGEST_DISK)}", self.folder], check=True)

    def unmount(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "-l", self.folder], check=True)


def kill_once(workspace: Path, number: str, seconds: float, *, tree: bool) -> dict:
    """Kill a run some seconds after a notebook began."""
    run = Run(workspace)
    run.wait_for(number, seconds)
    killed = run.kill(tree=tree)
    return {"at": f"{number} + {seconds:.1f} s", "killed": killed, "strays": count_strays(workspace)}


def kill_while_full(disk: SmallDisk, workspace: Path, room: int, delay: float, *, tree: bool) -> dict:
    """Let the disk be full after some bytes, and kill the run some moments after it is."""
    disk.leave(room)
    run = Run(workspace)
    while not run.ended and shutil.disk_usage(disk.folder).free > 2**14:
        time.sleep(0.005)
    full = time.monotonic()
    while not run.ended and time.monotonic() - full < delay:
        time.sleep(0.005)
    killed = run.kill(tree=tree)
    said = killed or re.search(r"the disk is full|[Ff]ree some disk space|No space left", run.wait())
    disk.leave(LARGEST_DISK)
    row = {"at": f"full after {room / 2**10:.0f} KB", "killed": killed, "strays": count_strays(workspace)}
    return row | ({} if said else {"unsaid": "".join(run.lines)[-800:]})


def finish(workspace: Path, whole: dict[str, str]) -> bool:
    """Run to the end; whether everything is as in the run that nobody killed."""
    run = Run(workspace)
    said = run.wait()
    if run.process.returncode:
        print(said)
        return False
    found = read_result(workspace)
    if different := [name for name in whole if found[name] != whole[name]]:
        print(f"different: {', '.join(different)}")
    return not different


def run_whole(workspace: Path) -> tuple[dict[str, float], dict[str, str]]:
    """A run that nobody kills: the seconds that each notebook takes, and the result."""
    run = Run(workspace)
    said = run.wait()
    if run.process.returncode:
        sys.exit(said)
    seconds = {n: run.begun[n, "complete"] - run.begun[n, "running"] for n in NOTEBOOKS}
    return seconds, read_result(workspace)


def kill_round(
    work: Path, number: int, kills: list[str], seconds: dict[str, float], whole: dict[str, str], *, full: bool
) -> tuple[list[dict], bool]:
    """Kill the runs of one new workspace, once in each of the notebooks, then run it to the end.

    A row for each kill, and whether the end is that of the run that nobody killed.
    """
    draw, rows, workspace = random.Random(number), [], work / f"round{number}" / "workspace"
    disk = SmallDisk(workspace.parent) if full else None
    try:
        for place, notebook in enumerate(kills):
            tree = (number + place) % 2 == 1
            if disk:
                room = draw.randint(2**12, 2**21)
                delay = draw.uniform(0, 0.2) if place else 60.0  # the first shall say that the disk is full
                row = kill_while_full(disk, workspace, room, delay, tree=tree)
            else:
                row = kill_once(workspace, notebook, draw.uniform(0, seconds[notebook]), tree=tree)
            rows.append({"round": number, "what": "all its processes" if tree else "it alone", **row})
            print(rows[-1], flush=True)
        return rows, finish(workspace, whole)
    finally:
        if disk:
            disk.unmount()


def main() -> None:
    """Run once undisturbed, then the rounds; print a table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="three kills, the last on a full disk")
    options = parser.parse_args()
    kills = ["01", "03", "04"] if options.quick else [NOTEBOOKS[n % 4] for n in range(options.kills)]
    cut = 2 if options.quick else 4
    rounds = [kills[start : start + cut] for start in range(0, len(kills), cut)]
    can_mount = hasattr(os, "geteuid") and os.geteuid() == 0
    if not can_mount:
        print("Only root can mount a small disk: the last round is as the others, its disk is not full.")
    rows, equal = [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        seconds, whole = run_whole(work / "whole")
        for number, chosen in enumerate(rounds):
            full = can_mount and number == len(rounds) - 1
            found, same = kill_round(work, number, chosen, seconds, whole, full=full)
            rows, equal = rows + found, [*equal, same]
            print(f"round {number}: {'as' if equal[-1] else 'NOT as'} the run that nobody killed", flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    strays = int(table["strays"].sum())
    unsaid = int(table["unsaid"].notna().sum()) if "unsaid" in table else 0
    outcome = {
        "name": "kills",
        "value": sum(equal),
        "bar": len(rounds),
        "holds": all(equal) and not strays and not unsaid,
        "kills": int(table["killed"].sum()),
        "strays": strays,
        "full_disk_unsaid": unsaid,
        "seconds_undisturbed": round(sum(seconds.values()), 1),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
