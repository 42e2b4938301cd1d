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
# # 07 · Predict and explain
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/07_predict_and_explain.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/07_predict_and_explain.ipynb)
#
# **In:** a trained model (a run of notebook 04 or 05, or a bundle someone gave you) and one T1-weighted scan.
#
# **Out:** the predicted age with its interval and warnings, a heat map of what moved it, and the bundle: one
# folder with which to share the model. Opening a bundle runs nothing from it.
#
# For research only. This is not a medical device: it does not diagnose, and its result is not a basis for any
# decision about a person's care.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "per_band": 2}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# run whose model predicts, when no bundle is named
run = "resnet18"  # @param {type:"string"}
# bundle (folder or .zip) of a model from elsewhere; empty: that of the run
bundle = ""  # @param {type:"string"}
# scan to predict (NIfTI or MGH); empty: a test scan of the workspace
scan = ""  # @param {type:"string"}
# true age of that scan in years, for the gap; 0: not known, or from the workspace
true_age = 0.0  # @param {type:"number"}
# how the age is explained: integrated_gradients (years), grad_cam (a second), occlusion (minutes); SVR: triplets
method = "integrated_gradients"  # @param ["integrated_gradients", "grad_cam", "occlusion"]
# scans per age band behind each group map
per_band = 12  # @param {type:"integer"}
# seed of every random choice
seed = 1  # @param {type:"integer"}

# %%
import pandas as pd

from brainage_nb.apps.widget import PredictionWidget, result_figure, workspace_scans
from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.parameters import read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.predict.bundle import list_beside, load_bundle
from brainage_nb.predict.explain import explain
from brainage_nb.predict.saving import current_bundle
from brainage_nb.workspace import open_workspace, write_json

pd.options.display.max_colwidth = None  # warnings are sentences
parameters = read_parameters(globals())
ws = open_workspace(workspace).begin("07_predict_and_explain")
print(session_summary(ws.root))

# %% [markdown]
# ## The model
# A bundle holds the weights and the preprocessing of a model, and the number and ages of the people it was trained on.
# Its bias correction and its interval are those of notebook 06; no test scan was used for them. The table shows the raw
# accuracy on each held-out split, with a 95 % interval over subjects.

# %%
place = bundle or current_bundle(ws.run(run))
model = load_bundle(place)
training = model.manifest["training"]
print(f"{model.title}; ages {training['age_low']:.0f} to {training['age_high']:.0f} years; from {place}")
print(model.interval.title if model.interval else "No interval: nothing was held out to calibrate one.")
if model.is_test_object:
    print("Trained on invented heads, to test the kit: its ages mean nothing for people.")
pd.DataFrame(model.manifest["figures"]).map(
    lambda figure: with_interval(figure) if isinstance(figure, dict) else figure
)

# %% [markdown]
# ## One scan, one age
# The interval contains the true age of about the stated share of people like those it was calibrated on. The gap is
# the predicted minus the true age. If the scan is too unlike the training scans, the table begins with "read first"
# and the reason. Outside the ages and kinds of scan that the model was trained on, the predicted age means nothing.
# The corrected age is for comparing gaps; as a prediction it has a larger error than the predicted age.

# %%
splits = ws.read("splits.csv")
if ws.path("scans_without_volume.csv").exists():  # what gave no volume in 03 gives no age here
    splits = splits[~splits["scan_id"].isin(ws.read("scans_without_volume.csv")["scan_id"])]
scans = workspace_scans(splits, ws.resolve) or workspace_scans(splits, ws.resolve, "val")
if not (scan or scans):
    raise FileNotFoundError("No test scan of the workspace is there. Set scan to the file of one.")
name = scan or list(scans)[len(scans) // 2]
path, known_age = (scan, None) if scan else scans[name]
rows = ws.read("cohort.csv").query("scan_id == @name") if not scan else pd.DataFrame()
also = (
    list_beside(rows, model.others, ws)[0] if len(rows) else {}
)  # a T2w scan of the session, for a fused model
prediction = model.predict(path, true_age or known_age, also)
prediction.frame()

# %%
pd.DataFrame(prediction.warnings, columns=["code", "warning"])

# %% [markdown]
# ## Where the age comes from
# Orange raises the predicted age, blue lowers it. Compared with what? Each method has its own reference.
#
# - `integrated_gradients`: the mean of the training scans. The map shows what moved this age away from the mean
#   brain's. The numbers are years; added up over all voxels they are the predicted age minus the age that the model
#   gives the mean brain.
# - `grad_cam`: this scan itself, changed a little. A place is hot if stronger features there would raise the age. The
#   numbers are relative; the largest is 1.
# - `occlusion`: this scan with a cube of 24 mm replaced by that of the mean brain. The numbers are years; they do not add
#   up to anything. The map takes minutes.
# - `triplets` (SVR models): the mean training age, or the regression's intercept. The numbers are years, one for each
#   three slices.
#
# A heat map is one method's estimate of which places moved the age. It does not show what is wrong with a brain, and it
# can look sensible even if the predicted age is wrong.

# %%
explanation = explain(model, prediction, method if model.model.kind == "resnet18" else "")
print(explanation.words)
result_figure(model, prediction, explanation)

# %%
saved = explanation.save(ws.path("predictions"), prediction)
saved.append(write_json(prediction.to_dict(), ws.path("predictions", "prediction.json")))
explanation.contributions if explanation.contributions is not None else [path.name for path in saved]

# %% [markdown]
# ## Look around
# Choose another scan of the workspace or upload one, and move through the slices. Without a live kernel, see
# the figure above instead.

# %%
PredictionWidget(model, scans or {prediction.scan: (path, None)})

# %% [markdown]
# ## By age: what the model uses on average
# One scan's map is noisy. The mean over test scans of similar age shows what the model uses as a rule; it is made by
# the same method, in years if the bundle allows it. If the recipe registers scans, all are in template space. Otherwise
# only crown and middle of the head are matched, to within about a centimetre. The head around the brain is not shown.

# %%
from brainage_nb.predict.explain import age_group_maps, coarse_regions, group_figure, region_table
from brainage_nb.volumes.store import VolumeStore

test = splits[splits["split"] == "test"]
groups = []
if (
    model.model.kind == "resnet18"
    and not model.channels
    and ws.path("volumes", model.settings.fingerprint).exists()
):
    store = VolumeStore(ws.path("volumes", model.settings.fingerprint)).verify()
    groups = age_group_maps(model, store, test[test["scan_id"].isin(store.scan_ids)], per_band=per_band)
group_figure(model, groups) if groups else None

# %% [markdown]
# Heat by region, in the oldest group. `sum` is the map summed over the region, in years if the map is in years.
# `share` is the region's part of all absolute heat. `density` is that share divided by the region's share of the
# volume: above 1 there is more heat than its size explains. Region borders are approximate.

# %%
regions = region_table(groups[-1].heat, coarse_regions(model.settings)) if groups else pd.DataFrame()
regions.round(3)

# %% [markdown]
# ## Can the maps be believed?
# In the demo cohort it is known where simulated (*planted*) ageing changes what the network sees. Heat should be there,
# and agree with it better than plain edges of the scan or the heat of a network with random weights do. Maps of several
# test scans are read together. `signed`: by how much a place raises the age more, the older the simulated brain is; a
# place with the wrong sign ranks last. `absolute`: the mean size, whatever the sign. `above` is the planted change from
# which on a voxel counts as ageing (1 is the largest), `planted` the share of the brain that does. `auc` is the area
# under the ROC curve, 0.5 by chance; `ap` is the average precision, as high as `planted` by chance. The difference of
# a brain from the mean brain also finds much of it, without any model. The ceiling is how well the training volumes
# themselves show the ageing. For real people the answer is not known.

# %%
from brainage_nb.demo.cohort import TRUTH
from brainage_nb.predict.explain import planted_check

checked = pd.DataFrame(columns=["map", "read", "above", "auc"])
if groups and sum(group.n for group in groups) > 2 and ws.path("demo", TRUTH).exists():
    stored = splits[splits["scan_id"].isin(store.scan_ids)]
    given = {"per_map": 2 * per_band, "seed": seed}
    checked = planted_check(model, store, ws.path("demo"), stored, ws.resolve, **given)
checked.round(3)

# %% [markdown]
# ## Done

# %%
ws.finish(
    "07_predict_and_explain",
    parameters,
    written=[*saved, *([] if bundle else [place])],
    figures={f"{prediction.scan}: predicted age [years]": round(prediction.predicted_age, 2)}
    | {
        f"AUC against planted ageing above {row.above}, {row['map']}, {row['read']}": round(row.auc, 3)
        for _, row in checked.iterrows()
    },
)
