"""Does the heat fall where ageing was planted? On the known-answer cohort, against edges and random weights.

Needs a workspace with the cohort, its volumes and a trained network: `make demo` makes it. Writes group
maps by age beside the JSON; `--workspace` of real scans without a planted map gives the group maps alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")


def main() -> int:
    """Print the table, draw the group maps, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace/demo")
    parser.add_argument("--run", default="resnet18")
    parser.add_argument("--quick", action="store_true", help="fewer scans")
    options = parser.parse_args()
    from brainage_nb.demo.cohort import AGEING_MAP
    from brainage_nb.predict.bundle import load_bundle
    from brainage_nb.predict.explain import planted_check, planted_places
    from brainage_nb.predict.saving import current_bundle
    from brainage_nb.volumes.store import VolumeStore
    from brainage_nb.workspace import open_workspace

    if not Path(options.workspace, "runs", options.run, "predictions.csv").exists():
        print(f"No finished run {options.run} in {options.workspace}; run `make demo` first.")
        print(json.dumps({"name": "heat_maps", "value": None, "bar": "above edges", "holds": None}))
        return 0
    ws = open_workspace(options.workspace)
    bundle = load_bundle(current_bundle(ws.run(options.run)))
    store = VolumeStore(ws.path("volumes", bundle.settings.fingerprint))
    splits = ws.read("splits.csv")
    test = splits[(splits["split"] == "test") & splits["scan_id"].isin(store.scan_ids)].sort_values("age")
    draw_groups(bundle, store, test, 4 if options.quick else 12)
    planted = ws.path("demo", AGEING_MAP)
    if not planted.exists():
        print(json.dumps({"name": "heat_maps", "value": None, "bar": "no planted map", "holds": None}))
        return 0
    test = test.iloc[:: 3 if options.quick else 1]
    places = planted_places(ws.path("demo"), test, ws.resolve, bundle.settings)
    table = planted_check(bundle, store, places, planted)
    print(table.round(3).to_string(index=False))
    auc = table[table["inside"] == "head"].set_index("map")["auc_of_mean"]
    ours, others = float(auc.iloc[0]), auc.iloc[1:]
    figures = {f"{row.map}, {row.inside}": round(row.auc_of_mean, 4) for row in table.itertuples()}
    result = {
        "name": "heat_maps",
        "value": round(ours, 4),
        "bar": round(float(others.max()), 4),
        "holds": bool((ours > others).all()),
        "figures": figures,
    }
    print(json.dumps(result))
    return 0


def draw_groups(bundle, store, test, per_band: int) -> None:
    """Mean heat map of each age band, into benchmarks/out/heat_maps.png; regions of the oldest on screen."""
    from matplotlib.figure import Figure

    from brainage_nb.predict.explain import age_group_maps, coarse_regions, group_panels, region_table

    groups = age_group_maps(bundle, store, test, per_band=per_band)
    figure = Figure(figsize=(9, 3.2 * len(groups)), layout="constrained")
    for row, group in zip(figure.subplots(len(groups), 3, squeeze=False), groups, strict=True):
        group_panels(row, group)
    figure.suptitle("Mean Grad-CAM of test scans by true age (vermilion raises the age)", fontsize=10)
    out = Path(__file__).parent / "out" / "heat_maps.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"Group maps: {out}")
    print(region_table(groups[-1].heat, coarse_regions()).round(3).to_string(index=False), "\n")


if __name__ == "__main__":
    raise SystemExit(main())
