"""Does the heat fall where ageing changes a network's input? On the known-answer cohort, against edges and
random weights.

Needs a workspace with the cohort, its volumes and a trained network of either recipe: `make demo` makes one.
Says how well maps in years add up, what one costs on one core, and writes group maps by age beside the JSON;
`--workspace` of real scans gives these alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path


def main() -> int:
    """Print the tables, draw the group maps, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace/demo")
    parser.add_argument("--run", default="resnet18")
    parser.add_argument("--quick", action="store_true", help="fewer scans")
    options = parser.parse_args()
    from brainage_nb.demo.cohort import TRUTH
    from brainage_nb.predict.bundle import load_bundle
    from brainage_nb.predict.explain import planted_check
    from brainage_nb.predict.saving import current_bundle
    from brainage_nb.volumes.store import VolumeStore
    from brainage_nb.workspace import open_workspace

    verdict = {"name": "heat_maps", "value": None, "bar": "above edges and random weights", "holds": None}
    if not Path(options.workspace, "runs", options.run, "predictions.csv").exists():
        print(f"No finished run {options.run} in {options.workspace}; run `make demo` first.")
        print(json.dumps(verdict))
        return 0
    ws = open_workspace(options.workspace)
    bundle = load_bundle(current_bundle(ws.run(options.run)))
    store = VolumeStore(ws.path("volumes", bundle.settings.fingerprint))
    splits = ws.read("splits.csv")
    splits = splits[splits["scan_id"].isin(store.scan_ids)]
    test = splits[splits["split"] == "test"].sort_values("age")
    verdict |= cost(bundle, store, test["scan_id"].iloc[::12])
    draw_groups(bundle, store, test, 4 if options.quick else 12)
    if ws.path("demo", TRUTH).exists():
        how = {"per_map": 8, "draws": 2} if options.quick else {"per_map": 24, "draws": 5}
        table = planted_check(bundle, store, ws.path("demo"), splits, ws.resolve, **how)
        print(f"Recipe {bundle.settings.recipe}; se: standard errors over scans")
        print(table.round(3).to_string(index=False))
        verdict |= judged(table)
    print(json.dumps(verdict))
    return 0


def cost(bundle, store, scan_ids) -> dict[str, float]:
    """How far maps in years are from adding up, and seconds and memory of one, on one core."""
    import torch

    from brainage_nb.predict.explain import integrated_gradients

    torch.set_num_threads(1)
    model, mean = bundle.model, bundle.reference.mean_volume
    mean_age = model.predict(mean).mean()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    sums = [integrated_gradients(model, store[scan_id], mean).sum() for scan_id in scan_ids]
    seconds = (time.process_time() - began) / len(sums)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    owed = [model.predict(store[scan_id]).mean() - mean_age for scan_id in scan_ids]
    off = max(abs(a - b) for a, b in zip(sums, owed, strict=True))
    print(f"Maps in years of {len(sums)} scans: sums off by at most {off:.3f} years;")
    print(f"{seconds:.1f} s of one core a scan, {megabytes:.0f} MB\n")
    return {"sum_off": round(float(off), 4), "seconds": round(seconds, 2), "megabytes": round(megabytes)}


def judged(table) -> dict[str, object]:
    """Whether the model's map is above edges and all random weights, at each threshold, by both scores.

    What counts is the map read with its sign; `holds_absolute` is the same of its size alone. Prints mean and
    range of random weights.
    """
    drawn = table[table["map"].str.contains("random weights")].groupby(["read", "above"])[["auc", "ap"]]
    print(f"\nRandom weights\n{drawn.agg(['mean', 'min', 'max']).round(3)}")
    ours, edges = table["map"].iloc[0], table[table["map"] == "edges of the scan"].set_index("above")
    named = table.set_index(["map", "read", "above"]).sort_index()
    holds = {}
    for read in ("signed", "absolute"):
        others = [edges[["auc", "ap"]], drawn.max().loc[read]]
        holds[read] = all((named.loc[(ours, read), ["auc", "ap"]] > other).all(axis=None) for other in others)
    figures = {", ".join(map(str, index)): row.to_dict() for index, row in named.round(4).iterrows()}
    value = float(named.loc[(ours, "signed", 0.3), "auc"])
    return {"value": value, "holds": holds["signed"], "holds_absolute": holds["absolute"], "figures": figures}


def draw_groups(bundle, store, test, per_band: int) -> None:
    """Mean heat map of each age band, into benchmarks/out/heat_maps.png; regions of the oldest on screen."""
    from brainage_nb.predict.explain import age_group_maps, coarse_regions, group_figure, region_table

    groups = age_group_maps(bundle, store, test, per_band=per_band)
    out = Path(__file__).parent / "out" / "heat_maps.png"
    out.parent.mkdir(exist_ok=True)
    group_figure(bundle, groups).savefig(out, dpi=110)
    print(f"Group maps: {out}")
    print(region_table(groups[-1].heat, coarse_regions(bundle.settings)).round(3).to_string(index=False))


if __name__ == "__main__":
    raise SystemExit(main())
