# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Evaluate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/06_evaluate.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/06_evaluate.ipynb)
#
# **In:** the predictions of notebooks 04 and 05 in `runs/`.
#
# **Out:** `evaluation/`: `results.json`, `predictions.csv`, every figure, `report.html` (one file that opens offline)
# and `model_card.md`.
#
# How far off is the model on people it has never seen, and how sure is that figure? Every metric comes from raw
# predictions. Its 95 % interval comes from drawing the subjects again and again. Every mean absolute error (MAE)
# stands beside that of the mean predictor, who says the mean training age to everybody. Corrected values are kept
# apart: a correction that uses a person's true age can make pure noise look accurate.

# %% [markdown]
# ## Set-up
# Installs the package of this very release where it is absent, adds only what is missing, and leaves the platform's
# torch and numpy as they are. The last line says what was done.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("brainage_nb") is None:
    _near = 'export PYTHON=$1; for at in "$BRAINAGE_SOURCE" /kaggle/input/{*,*/*,*/*/*}; do [ -f "$at/$0" ] && exec bash -- "$at/$0"; done'
    _far = 'script=$(curl -fsSL https://raw.githubusercontent.com/brainage-nb/brainage_nb/v0.1.0/$0) && exec bash -c "$script"'
    _else = 'echo "No internet? Attach the wheel data set (README, Kaggle)." >&2; exit 1'
    subprocess.run(["bash", "-c", f"{_near}; {_far}; {_else}", "colab_setup.sh", sys.executable], check=True)

# %% [markdown]
# ## Parameters
# The only cell to edit. Colab shows it as a form; `brainage-nb run -p name=value` and papermill set the same names.

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "n_bootstrap": 200}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# runs to evaluate, with commas; empty: all that have predictions
runs = ""  # @param {type:"string"}
# share of people whose age a prediction interval should hold
level = 0.9  # @param {type:"number"}
# draws of the subject bootstrap behind each interval
n_bootstrap = 2000  # @param {type:"integer"}
# diagnosis that others are compared with; empty: found by name
controls = ""  # @param {type:"string"}
# workspaces of other cohorts (01 and 02 done there) to apply a model to, with commas; empty: none
external = ""  # @param {type:"string"}
# run whose model is applied to them
external_run = "resnet18"  # @param {type:"string"}
# their controls that may calibrate: subject ids with commas, or a file with one id a line; empty: no calibration
calibrate_on = ""  # @param {type:"string"}
# seed of every random choice
seed = 1  # @param {type:"integer"}
# further settings by name, as fuse=resnet18,resnet18_t2w; `brainage-nb list 06` shows them all
more = ""  # @param {type:"string"}

# %%
from pathlib import Path

from IPython.display import Markdown

from brainage_nb.evaluation import report as tables
from brainage_nb.evaluation.evaluate import evaluate_runs, headline_table
from brainage_nb.evaluation.fusion import FUSED, FusionSettings
from brainage_nb.evaluation.plots import draw_external, draw_figures
from brainage_nb.evaluation.report import write_report
from brainage_nb.parameters import read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.predict.bundle import apply_to_workspace, load_bundle, read_subject_ids
from brainage_nb.predict.saving import current_bundle, offer_fused_bundle, update_bundle
from brainage_nb.workspace import open_workspace

parameters = read_parameters(globals(), FusionSettings)
ws = open_workspace(workspace).begin("06_evaluate")
print(session_summary(ws.root))
if calibrate_on and not external:
    raise ValueError("calibrate_on names people of other cohorts: set external to their workspaces as well.")

# %% [markdown]
# ## Raw accuracy on subjects not learned from
# Test subjects took no part in training or in choosing an epoch. *Out of fold* is a run in which everybody taught:
# each is predicted by the models that had not seen them, and no test split is claimed. Read each MAE beside the mean predictor's. The
# wider the range of ages, the larger an MAE can get.

# %%
options = {"level": level, "n_bootstrap": n_bootstrap, "controls": controls or None, "seed": seed}
evaluation = evaluate_runs(ws, runs, fuse=parameters.get("fuse", ""), **options)
headline_table(evaluation.results).T

# %%
Markdown(
    "**Read this first**\n\n" + "\n".join(f"- {line}" for line in evaluation.warnings or ["No warnings."])
)

# %% [markdown]
# ## Predicted against true age, run by run

# %%
figures = draw_figures(evaluation)
for drawn in figures:
    if drawn.section == "accuracy":
        display(drawn.figure)

# %% [markdown]
# ## The line of the correction
# Models pull predictions towards the mean age: the old are read too young and the young too old. So predicted age is
# fitted as a straight line, a + b × age. The points are controls whom the model did not train on: validation scans or,
# with folds, out-of-fold ones. Test scans never take part. Where everybody is judged out of fold, each fold's people
# are corrected by the line of the other folds. The correction turns the line back, (predicted − a) / b. It
# needs no true age, so the result is still a prediction.

# %%
for name, found in evaluation.runs.items():
    line = found.calibration.corrector
    print(
        f"{name}: "
        + (f"{line.intercept_:.1f} + {line.slope_:.2f} × age" if line else found.calibration.refused)
    )
for drawn in figures:
    if drawn.name.startswith("correction_"):
        display(drawn.figure)

# %% [markdown]
# ## The brain-age gap, raw and corrected
# The gap is predicted minus true age. A raw gap that falls with age says more about the model than about the brain.
# There are two ways to take the age out of it. The age-free one is the gap of the corrected prediction, which errs by
# more than the raw one: it is for comparing gaps, and the report names its error. The other subtracts from each gap
# what the line expects at that person's true age. It adjusts a gap and is never an accuracy.

# %%
for drawn in figures:
    if drawn.name.startswith("gap_vs_age_"):
        display(drawn.figure)

# %%
for name, found in evaluation.runs.items():
    print(name)
    display(tables.bias_table(found))

# %% [markdown]
# ## How wide an interval must be
# A prediction interval is a span of ages around a predicted one. Its `level` is the share of people whose true age
# should lie inside. Its width is read off the calibration scans: it is twice the error that this share of them stays
# within. That makes it a conformal interval, and it needs no assumption about the model. Everybody gets the same width
# (judged out of fold: everybody of one fold, from the other folds).
# Coverage is the share of the scans that judge (test, or out of fold) whose true age does lie inside. It should be near the level over all ages
# together. Single age groups can get more or less. The promise holds for people like those it was calibrated on. The
# last cell puts this interval into the bundle of each run, so that 07 and `predict` give what is checked here.

# %%
for name, found in evaluation.runs.items():
    interval = found.calibration.interval
    print(f"{name}: {interval.title if interval else 'no interval, nothing was held out'}")
    display(tables.coverage_table(found))
for drawn in figures:
    if drawn.section == "intervals":
        display(drawn.figure)

# %% [markdown]
# ## Groups and models side by side
# Groups of few people differ by chance. The last table says whether a change to a model helped: it compares the errors
# of two runs person by person. Where it reads "no difference shown", chance explains the difference.

# %%
for name, found in evaluation.runs.items():
    print(name)
    display(tables.groups_table(found))
tables.comparison_table(evaluation)

# %% [markdown]
# ## Rate of ageing
# Where people have visits a year or more apart: the change of predicted age a year, divided by the slope above, so 1 is
# expected. The first table says what that is worth for one person. A gap at one age is no rate.

# %%
for name, found in evaluation.runs.items():
    display(*tables.rates_tables(found.rates))
    print(name, *found.rates.warnings, *found.rates.notes, sep="\n  ")
for drawn in figures:
    if drawn.section == "rates":
        display(drawn.figure)

# %% [markdown]
# ## Fused
# `more = "fuse=resnet18,resnet18_t2w"` makes one age of several runs' ages, such as those from a T1w and a T2w scan of one
# session. Each run's ages are calibrated by a straight line, true age on predicted. Below 200 held-out people each then
# weighs by the inverse of its squared error; from 200 on a ridge regression decides. Who lacks one scan is fused from
# what there is and counted apart. The second table asks what another run adds, on the same people.

# %%
for title, table in tables.fusion_tables(evaluation).items():
    print({"people": "By what they have", "same": "The same people, who have all"}[title])
    display(table)
print("" if evaluation.fusion else "Nothing to fuse: more names no runs (fuse=...).")

# %% [markdown]
# ## Known answers
# On the demo cohort the truth is known, so the model can be checked against it. Oracle and attainable are those of
# notebook 01. The oracle errs less over the whole cohort. On a few test scans chance may turn the two round. Other
# cohorts have nothing here.

# %%
for drawn in figures:
    if drawn.section == "known":
        display(drawn.figure)
for name, known in tables.known_tables(evaluation).items():
    print(name)
    display(known["errors"], known["recovered"])

# %% [markdown]
# ## Elsewhere
# The model on cohorts it has never seen. Raw figures come first, then the offset of each site. Where controls are named
# for it, they calibrate the model, and everybody else is reported on. People who took part in training are refused.

# %%
places = [place.strip() for place in external.split(",") if place.strip()]
names = [Path(place).name for place in places]
for name, place in zip(names, places, strict=True):
    model = load_bundle(current_bundle(ws.run(external_run)))
    evaluation.external[name if names.count(name) == 1 else place] = apply_to_workspace(
        model, place, calibrate_on=read_subject_ids(calibrate_on), n_bootstrap=n_bootstrap, seed=seed
    )

# %%
for name, found in evaluation.external.items():
    print(name, *found.warnings, sep="\n  ")
    figures.append(draw_external(name, found))
    display(figures[-1].figure, *tables.external_tables(found).values())

# %% [markdown]
# ## Report and model card
# `report.html` is one file: send it to somebody who did not run this.

# %%
written = write_report(evaluation, figures)
trained = [name for name in evaluation.runs if name != FUSED]
for name in trained:
    print(f"{name}: {update_bundle(ws.run(name), evaluation.runs[name].calibration)}")
if evaluation.fusion:
    print(f"{FUSED}: {offer_fused_bundle(evaluation.fusion, ws)}")
print(f"Report: {ws.path('evaluation', 'report.html')}")

# %%
headline = headline_table(evaluation.results)
told = {f"{run} {metric}": headline.loc[run, metric] for run in headline.index for metric in headline}
for name, found in evaluation.external.items():
    told |= {f"{name}, {title}": text for title, text in tables.external_tables(found)["raw"].iloc[0].items()}
ws.finish(
    "06_evaluate",
    parameters,
    written=written,
    read=["cohort.csv", "splits.csv", *(f"runs/{name}/predictions.csv" for name in trained)],
    figures=told,
)
