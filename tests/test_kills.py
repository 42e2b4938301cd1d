"""Notebooks 01 to 04, killed at random moments, end as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_that_were_killed_also_on_a_full_disk_end_as_one_that_was_not():
    script = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    run = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["holds"], run.stdout
    assert outcome["kills"] >= 1
