"""Make the pictures of README and docs from a finished demo: python docs/make_pictures.py workspace/demo

Every picture is of invented heads, drawn by the code that draws the notebooks' figures.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure

from brainage_nb.demo.cohort import draw_planted
from brainage_nb.volumes.pictures import steps_figure
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.transforms import preprocessing_chain, run_steps
from brainage_nb.workspace import open_workspace, read_csv

TARGET = Path(__file__).parent / "pictures"


def main(workspace: str) -> None:
    """Write `docs/pictures/*.png`."""
    ws = open_workspace(workspace)
    TARGET.mkdir(exist_ok=True)
    truth = read_csv(ws.path("demo", "truth.csv"))
    heads = Figure(figsize=(11, 10), layout="constrained")
    draw_planted(ws.path("demo"), truth, heads).savefig(TARGET / "heads.png", dpi=70)
    first = ws.resolve(ws.read("splits.csv")["image"].iloc[0])
    steps = run_steps(preprocessing_chain(PreprocessingSettings.of_recipe("best")), first)
    steps_figure(steps).savefig(TARGET / "steps.png", dpi=60)
    name = "predicted_vs_true_resnet18.png"
    shutil.copy(ws.path("evaluation", "figures", name), TARGET / name)
    heat_map = min(ws.path("predictions").glob("*_heat.png"))
    shutil.copy(heat_map, TARGET / "heat_map.png")


if __name__ == "__main__":
    main(sys.argv[1])
