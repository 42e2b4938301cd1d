"""What extraction costs beyond the network itself: the same triplets through `extract_features` and bare.

Run: `python benchmarks/features.py [--quick]`. Both are timed in one process, in turns: a busy machine
slows both. Weights do not matter for time: a random projection needs no download.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
import pandas as pd
import torch

from brainage_nb.models.vgg16 import (
    FeatureSettings,
    Vgg16Features,
    extract_features,
    triplet_images,
    triplets_with_brain,
    vgg16_features,
)

BAR = 1.15
SIZE, SPACING = 96, 2.0


class Store(dict):
    """Made-up z-scored heads with the face of a volume store."""

    fingerprint, spacing_mm = "benchmark", SPACING

    def __init__(self, n: int):
        rng = np.random.default_rng(0)
        for number in range(n):
            volume = rng.normal(-0.7, 0.02, (SIZE,) * 3)
            volume[14:82, 8:88, 4:92] += rng.uniform(1, 3, (68, 80, 88))
            self[f"scan-{number}"] = volume.astype(np.float16)
        self.scan_ids = list(self)
        self.index = pd.DataFrame({"scan_id": self.scan_ids, "sha256": "made up"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=224, help="side of the slices, pixels")
    parser.add_argument("--pairs", type=int, default=6, help="scans timed both ways")
    parser.add_argument("--quick", action="store_true", help="slices of 112 pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="triplets at once")
    options = parser.parse_args()
    settings = FeatureSettings(image_size=112 if options.quick else options.image_size)
    network = vgg16_features("random_projection").place()
    store = Store(options.pairs + 1)
    pairs = [timed_pair(store, scan_id, network, settings, options.batch_size) for scan_id in store.scan_ids]
    pairs = pairs[1:]  # the first pair warms both up
    for alone, all_of_it, n in pairs:
        print(f"{n} triplets: network {alone:6.2f} s, extraction {all_of_it:6.2f} s, {all_of_it / alone:.3f}")
    ratio = statistics.median(all_of_it / alone for alone, all_of_it, _ in pairs)
    result = {
        "name": "features",
        "value": round(ratio, 3),
        "bar": BAR,
        "holds": ratio <= BAR,
        "unit": "extraction time over bare network time, median of pairs",
        "image_size": settings.image_size,
        "device": str(network.device),
        "seconds_per_triplet": round(sum(pair[0] for pair in pairs) / sum(pair[2] for pair in pairs), 4),
    }
    print(json.dumps(result))


def timed_pair(
    store: Store, scan_id: str, network: Vgg16Features, settings: FeatureSettings, batch_size: int
) -> tuple[float, float, int]:
    """Seconds bare, seconds whole, triplets. Which comes first alternates with the scan's number."""
    positions = triplets_with_brain(store[scan_id], SPACING, settings)
    kinds = [lambda: bare(store, scan_id, positions, network, settings, batch_size)]
    kinds.append(lambda: whole(store, scan_id, network, settings, batch_size))
    order = (0, 1) if int(scan_id.split("-")[1]) % 2 else (1, 0)
    seconds = {number: kinds[number]() for number in order}
    return seconds[0], seconds[1], len(positions)


@torch.inference_mode()
def bare(
    store: Store,
    scan_id: str,
    positions: np.ndarray,
    network: Vgg16Features,
    settings: FeatureSettings,
    batch_size: int,
) -> float:
    """Seconds of the convolutional part alone, on images that are ready."""
    images = triplet_images(store[scan_id], positions, settings, network.device)
    ready = ((images - network.mean) / network.sd).contiguous(memory_format=torch.channels_last)
    synchronise()
    start = time.perf_counter()
    with torch.autocast(network.device.type, dtype=torch.float16, enabled=network.half):
        for batch in ready.split(batch_size):
            network.layers(batch)
    synchronise()
    return time.perf_counter() - start


def whole(
    store: Store, scan_id: str, network: Vgg16Features, settings: FeatureSettings, batch_size: int
) -> float:
    """Seconds from the volume in the store to the features on disk."""
    with tempfile.TemporaryDirectory() as folder:
        synchronise()
        start = time.perf_counter()
        extract_features(store, folder, network, settings=settings, scan_ids=[scan_id], batch_size=batch_size)
        return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
