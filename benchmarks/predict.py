"""What a prediction costs: one 1 mm scan warm and cold, fifty scans in a row, ten uploads to the app at once.

A network of the real size with random weights (time does not depend on them), on two threads. Where there is
a GPU, fifty scans in a row on it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parents[1]))

WARM_S, COLD_S = 1.5, 3.0  # cold: processor time beyond importing torch and MONAI
# In a row on a CPU, preprocessing and network want the same cores: no better than their sum is possible. On a
# GPU the network must hide behind preprocessing.
OVER = 1.15
SAME_YEARS = 1e-3  # ages of a GPU and of the CPU
COLD = """
import sys, time
began = time.process_time()
import monai.networks.nets, torch
imported = time.process_time()
from brainage_nb.predict.bundle import load_bundle
bundle = load_bundle(sys.argv[1])
bundle.predict(sys.argv[2])
print(imported - began, time.process_time() - imported)
"""


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A bundle of full width for 96^3 volumes, and a 256^3 scan of 1 mm."""
    import nibabel as nib
    import numpy as np
    import torch
    from scipy import ndimage

    from brainage_nb.models.network import resnet18_regressor
    from brainage_nb.models.settings import TrainingSettings
    from brainage_nb.volumes.settings import PreprocessingSettings
    from tests.models import tiny_bundle

    default = TrainingSettings()
    tiny_bundle.ARCHITECTURE = {
        "widths": list(default.widths),
        "blocks": list(default.blocks),
        "shortcut": default.shortcut,
    }
    tiny_bundle.SETTINGS = PreprocessingSettings()
    torch.manual_seed(0)
    tiny_bundle.networks = lambda n, seed=0: [
        resnet18_regressor(**tiny_bundle.ARCHITECTURE, age_mean=50.0, age_sd=10.0) for _ in range(n)
    ]
    bundle = tiny_bundle.write_tiny_bundle(folder / "bundle", architecture=tiny_bundle.ARCHITECTURE)
    head = ndimage.zoom(tiny_bundle.head_array(side=64).astype(np.float32), 4, order=1)
    head += np.random.default_rng(0).normal(0, 10, head.shape).astype(np.float32)
    image = nib.Nifti1Image(np.clip(head, 0, 2000).astype(np.int16), np.diag([1.0, 1, 1, 1]))
    nib.save(image, folder / "scan.nii.gz")
    return bundle, folder / "scan.nii.gz"


def seconds(run, times: int) -> float:
    """The shortest of several runs: other work on the machine only adds."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def cold(bundle: Path, scan: Path, times: int) -> tuple[float, float]:
    """Processor seconds of a new process to import torch and MONAI, and beyond that."""
    runs = []
    for _ in range(times):
        command = [sys.executable, "-c", COLD, str(bundle), str(scan)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        runs.append((float(out[0]), float(out[1])))
    return min(runs, key=lambda run: run[1])


def in_a_row(bundle, scan: Path, n: int, rounds: int) -> tuple[float, float, float]:
    """Seconds a scan, of preprocessing alone, of the network alone and of predicting, with all threads.

    Preprocessing and predicting take turns, so that both meet the same machine.
    """
    from concurrent.futures import ThreadPoolExecutor

    from brainage_nb.platforms import n_workers
    from brainage_nb.volumes.preprocessing import as_stored, preprocess

    def prepare():
        with ThreadPoolExecutor(n_workers()) as pool:
            list(pool.map(lambda _: preprocess(scan, bundle.settings).sum(), range(n)))

    def predict():
        ages = {result.predicted_age for result in bundle.predict_many([scan] * n)}
        assert max(ages) - min(ages) < SAME_YEARS, ages

    bundle.predict(scan)
    turns = [(seconds(prepare, 1), seconds(predict, 1)) for _ in range(rounds)]
    volume = as_stored(preprocess(scan, bundle.settings))
    network = seconds(lambda: bundle.model.predict(volume), 5)
    prepared, predicted = (min(times) for times in zip(*turns, strict=True))
    return prepared / n, network, predicted / n


def rows_in_a_row(place: Path, scan: Path, n: int, rounds: int) -> dict[str, tuple]:
    """Rows of the table: (value, bar, whether it holds) of `n` scans on the CPU, and on a GPU if any."""
    from brainage_nb.models.compute import why_no_gpu
    from brainage_nb.predict.bundle import load_bundle

    def rows(bundle, where: str, limit) -> dict[str, tuple]:
        prepared, network, predicted = in_a_row(bundle, scan, n, rounds)
        most, of = limit(prepared, network)
        return {
            f"{n} in a row, preprocessing alone [s a scan]{where}": (prepared, "", True),
            f"{n} in a row, network alone [s a scan]{where}": (network, "", True),
            f"{n} in a row, predicted [s a scan]{where}": (
                predicted,
                f"{OVER:g} times {of}",
                predicted <= most,
            ),
        }

    cpu = load_bundle(place)
    found = rows(cpu, "", lambda prepared, network: (OVER * (prepared + network), "their sum"))
    if reason := why_no_gpu():
        return found | {"  on a GPU": (reason, "not measured", True)}
    gpu = load_bundle(place, "cuda")
    found |= rows(gpu, ", GPU", lambda prepared, _: (OVER * prepared, "preprocessing"))
    apart = abs(gpu.predict(scan).predicted_age - cpu.predict(scan).predicted_age)
    return found | {
        "  ages of GPU and CPU differ by [years]": (apart, f"at most {SAME_YEARS}", apart <= SAME_YEARS)
    }


def at_once(bundle, scan: Path, n: int) -> tuple[bool, float, float]:
    """(all right, seconds, peak memory in GiB) of n people uploading to one app in the same moment."""
    import psutil
    from streamlit.testing.v1 import AppTest

    expected, content = bundle.predict(scan).predicted_age, scan.read_bytes()
    script = Path(__file__).parents[1] / "brainage_nb" / "apps" / "streamlit_app.py"
    ages, peak, done = [], [0], threading.Event()

    def watch():
        process = psutil.Process()
        while not done.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    def person():
        page = AppTest.from_file(script, default_timeout=600).run()
        page = page.file_uploader(key="scans-0").upload("scan.nii.gz", content).run()
        page = page.button(key="predict").click().run()
        ages.append(page.session_state["results"][0].predicted_age)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    people = [threading.Thread(target=person) for _ in range(n)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    done.set()
    watcher.join()
    right = len(ages) == n and all(abs(age - expected) < 1e-4 for age in ages)
    return right, time.perf_counter() - began, peak[0] / 2**30


def main() -> None:
    """Measure, print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions, 10 scans in a row, 3 uploads"
    )
    quick = parser.parse_args().quick
    from brainage_nb.predict.bundle import load_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place, scan = write_inputs(folder)
        bundle = load_bundle(place)
        bundle.predict(scan)
        warm = seconds(lambda: bundle.predict(scan), 3 if quick else 7)
        import_s, cold_s = cold(place, scan, 2 if quick else 4)
        batches = rows_in_a_row(place, scan, 10 if quick else 50, 1 if quick else 3)
        os.environ["BRAINAGE_WORKSPACE"] = str(folder / "workspace")
        (folder / "workspace" / "runs" / "resnet18").mkdir(parents=True)
        (folder / "workspace" / "runs" / "resnet18" / "bundle").symlink_to(place)
        right, together, memory = at_once(bundle, scan, 3 if quick else 10)
    figures = {
        "warm, one scan [s]": (warm, f"at most {WARM_S}", warm <= WARM_S),
        "cold process beyond importing torch and MONAI [s of processor]": (
            cold_s,
            f"at most {COLD_S}",
            cold_s <= COLD_S,
        ),
        "  importing torch and MONAI alone [s of processor]": (import_s, "", True),
        **batches,
        "uploads at once, all right": (right, "yes", right),
        "  seconds until the last": (together, "", True),
        "  peak memory [GiB]": (memory, "", True),
    }
    for title, (value, bar, holds) in figures.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        print(f"{title:<54}{shown:>8}   {bar:<24}{'' if holds else 'NOT HELD'}")
    print(
        json.dumps(
            {
                "name": "predict",
                "value": round(warm, 3),
                "bar": WARM_S,
                "holds": all(holds for _, _, holds in figures.values()),
                "figures": {title.strip(): value for title, (value, _, _) in figures.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
