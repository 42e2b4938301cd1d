"""Bundles damaged at random are refused in words or predict as the whole one, soon and in little memory."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.models.tiny_bundle import write_fused_bundle, write_scan, write_svr_bundle, write_tiny_bundle

MEGABYTES, SECONDS = 300, 5
FAMILIES = {
    "resnet18": lambda folder: write_tiny_bundle(folder, n=2, n_scans=30),
    "vgg16_svr": write_svr_bundle,
    "fused": write_fused_bundle,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A scan, and a good bundle of each family."""
    place = tmp_path_factory.mktemp("whole")
    return write_scan(place / "scan.nii", 41), {
        name: make(place / name / "bundle") for name, make in FAMILIES.items()
    }


def run_mutations(bundle, scan, seed, n):
    """One row a mutation, the first of the whole bundle; see `mutations`."""
    given = [sys.executable, "-m", "tests.predict.mutations", str(bundle), str(scan), str(seed), str(n)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    said = subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True, env=alone).stdout
    return [json.loads(line) for line in said.splitlines()]


def find_fault(row, good):
    """What is wrong with how a damaged bundle was met; empty where nothing is."""
    refused = row.get("refused")
    if "crashed" in row:
        return row["crashed"]
    if row["seconds"] > SECONDS:
        return f"{row['seconds']:.1f} s"
    if (more := row["megabytes"] - good["megabytes"]) > 2 * row["size"] + MEGABYTES:
        return f"{more:.0f} MB more than the whole one, for a file of {row['size']:.1f} MB"
    if refused is not None:
        named = refused.startswith(("bundle.zip", "3D ResNet-18", "VGG16", "Fused"))
        in_words = named and len(refused) < 900 and not re.search("[a-z]Error|Traceback", refused)
        return "" if in_words else f"said: {refused}"
    other = {name for name in good if name not in ("kind", "k", "size", "seconds", "megabytes")}
    differ = [name for name in other if row[name] != good[name] and row[name] is not None]
    return "".join(f"{name}: {row[name]}, expected {good[name]}; " for name in differ)


@pytest.mark.parametrize(
    ("family", "seed", "n"),
    [
        ("resnet18", 1, 12),
        ("vgg16_svr", 2, 3),
        pytest.param("resnet18", 3, 120, marks=pytest.mark.slow),
        pytest.param("vgg16_svr", 4, 60, marks=pytest.mark.slow),
        pytest.param("fused", 6, 120, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_bundle_is_refused_in_words_or_predicts_as_the_whole_one(family, seed, n, whole):
    scan, bundles = whole
    good, *rows = run_mutations(bundles[family], scan, seed, n)
    assert good["predicted_age"] and good["corrected_age"] and len(rows) == n
    faults = {f"{row['kind']} ({row['k']})": fault for row in rows if (fault := find_fault(row, good))}
    assert faults == {}
    assert sum("refused" in row for row in rows) > n / 2
