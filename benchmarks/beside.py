"""What does a training step cost beside another job on the same processors, with and without passive waiting?

Run: `python benchmarks/beside.py [--quick]`. Two threads on two processors, batch 4 at 48^3, the default
network. A process that waits as the kit sets it and one that waits as OpenMP does by itself take steps in
turns, alone and beside a process that keeps one processor busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BATCH, SIZE, THREADS = 4, 48, 2
BARS = {"beside": 2.5, "alone": 1.1}  # passive beside over alone; passive over OpenMP's own way, both alone
WAITS = {"passive (the kit)": "import brainage_nb, torch", "OpenMP's own": "import torch, brainage_nb"}
BUSY = "while True: pass"
STEPS = f"""
import sys, time
from brainage_nb.models.network import resnet18_regressor
torch.set_num_threads({THREADS})
network = resnet18_regressor(age_mean=50.0, age_sd=10.0)
volumes = torch.randn({BATCH}, 1, {SIZE}, {SIZE}, {SIZE})
for _ in sys.stdin:
    before = time.perf_counter()
    network(volumes).mean().backward()
    print(time.perf_counter() - before, flush=True)
"""


def start(code: str) -> subprocess.Popen:
    """A Python process that takes one step for every line it is sent."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def step(process: subprocess.Popen) -> float:
    """Seconds that a process needs for a step."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def timed(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step, alone and beside a busy process, of each way to wait."""
    trainers = {name: start(imports + STEPS) for name, imports in WAITS.items()}
    found = {name: {} for name in WAITS}
    try:
        for trainer in trainers.values():
            step(trainer)
        for place in ("alone", "beside"):
            others = [start(BUSY)] if place == "beside" else []
            time.sleep(0.5)
            turns = [{name: step(trainer) for name, trainer in trainers.items()} for _ in range(rounds)]
            for name in WAITS:
                found[name][place] = statistics.median(turn[name] for turn in turns)
            for other in others:
                other.kill()
    finally:
        for trainer in trainers.values():
            trainer.kill()
    return found


def main() -> None:
    """Time all in turns; print a table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    found = timed(3 if options.quick else 10)
    print(f"{'threads wait':<20}{'alone':>10}{'beside':>10}{'ratio':>8}   seconds a step")
    for name, seconds in found.items():
        ratio = seconds["beside"] / seconds["alone"]
        print(f"{name:<20}{seconds['alone']:>10.3f}{seconds['beside']:>10.3f}{ratio:>8.2f}")
    ours, own = found.values()
    ratio, cost = ours["beside"] / ours["alone"], ours["alone"] / own["alone"]
    outcome = {
        "name": "beside",
        "value": round(ratio, 2),
        "bar": BARS["beside"],
        "holds": bool(ratio <= BARS["beside"] and cost <= BARS["alone"]),
        "cost_alone": round(cost, 3),
        "gain_beside": round(own["beside"] / ours["beside"], 2),
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "seconds": found,
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
