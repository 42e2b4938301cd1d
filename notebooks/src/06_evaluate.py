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
# How far off is the model on people it has never seen, and how sure is that figure? Every metric is computed from raw
# predictions. Its 95 % interval is a bootstrap: the subjects are resampled many times. Every mean absolute error (MAE)
# is shown beside that of the mean predictor, which predicts the mean training age for everybody. Corrected values are
# reported separately: a correction that uses a person's true age can make pure noise look accurate.

# %% [markdown]
# ## Set-up
# Installs this release of the package if it is absent, adds only what is missing, and leaves the platform's torch and
# numpy as they are. The last line says what was done.

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

from brainage_nb.bundle_format import FUSED
from brainage_nb.evaluation import report as tables
from brainage_nb.evaluation.evaluate import evaluate_runs, headline_table
from brainage_nb.evaluation.fusion import FusionSettings
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
# ## Raw accuracy on held-out subjects
# Test subjects took no part in training or in choosing an epoch. *Out of fold* is a run in which everybody was used
# for training: each is predicted by the models that were not trained on them, and there is no test split. Read each
# MAE beside the mean predictor's. The wider the range of ages, the larger an MAE can get.

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
# Models pull predictions towards the mean age: the old are predicted too young and the young too old. So predicted age
# is fitted as a straight line, a + b × age. The points are controls on whom the model was not trained: validation scans
# or, with folds, out-of-fold ones. Test scans are never used. If everybody is evaluated out of fold, each fold's people
# are corrected by the line of the other folds. The correction inverts the line, (predicted − a) / b. It needs no true
# age, so the result is still a prediction.

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
# There are two ways to remove this dependence on age. The age-free one is the gap of the corrected prediction, which
# has a larger error than the raw one: it is for comparing gaps, and the report gives its error. The other, the
# adjusted gap, subtracts from each gap the one that the line expects at that person's true age. It must not be read as
# accuracy.

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
# should lie inside. Its width comes from the calibration scans, held out like those of the line above: it is twice the
# error that this share of them does not exceed. That makes it a conformal interval, which assumes nothing about the
# model. Everybody gets the same width (out of fold: everybody of one fold, from the other folds). Coverage is the share of test (or out-of-fold) scans whose true age does lie
# inside. It should be near the level over all ages together; in single age groups it can be higher or lower. This
# holds for people like those it was calibrated on. The last cell puts this interval into the bundle of each run, so
# that 07 and `predict` give the interval that is evaluated here.

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
# Small groups differ by chance. The last table tests whether a change to a model helped: it compares the errors of two
# runs person by person. Where it reads "no difference shown", chance can explain the difference.

# %%
for name, found in evaluation.runs.items():
    print(name)
    display(tables.groups_table(found))
tables.comparison_table(evaluation)

# %% [markdown]
# ## Rate of ageing
# For people with visits a year or more apart (two where ages are whole years): the change of predicted age per year,
# divided by the slope above, so 1 is expected. The first table shows how reliable this is for one person. A gap at one
# age is not a rate.

# %%
for name, found in evaluation.runs.items():
    display(*tables.rates_tables(found.rates))
    print(name, *found.rates.warnings, *found.rates.notes, sep="\n  ")
for drawn in figures:
    if drawn.section == "rates":
        display(drawn.figure)

# %% [markdown]
# ## Fused
# `more = "fuse=resnet18,resnet18_t2w"` combines the predictions of several runs into one age, such as those from a T1w
# and a T2w scan of one session. Each run's ages are calibrated by regressing true age on predicted age. With fewer than
# 200 held-out people each run is then weighted by the inverse of its squared error; with more, a ridge regression sets
# the weights. People without one of the scans are predicted from those they have and counted separately. The second
# table shows what each further run adds, on the same people.

# %%
for title, table in tables.fusion_tables(evaluation).items():
    print({"people": "By what they have", "same": "The same people, who have all"}[title])
    display(table)
print("" if evaluation.fusion else "Nothing to fuse: more names no runs (fuse=...).")

# %% [markdown]
# ## Known answers
# On the demo cohort the truth is known, so the model can be checked against it. The oracle and attainable errors are
# those of notebook 01. Over the whole cohort the oracle's is the smaller one; on a few test scans chance may reverse
# their order. For other cohorts this section is empty.

# %%
for drawn in figures:
    if drawn.section == "known":
        display(drawn.figure)
for name, known in tables.known_tables(evaluation).items():
    print(name)
    display(known["errors"], known["recovered"])

# %% [markdown]
# ## Elsewhere
# The model on cohorts it was not trained on. Raw figures come first, then the offset of each site. If controls are
# named in `calibrate_on`, the model is calibrated on them and evaluated on everybody else. People who took part in
# training are refused.

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
# `report.html` is a single file that can be sent to somebody who did not run this.

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
