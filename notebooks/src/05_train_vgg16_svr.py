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
# # 05 · VGG16 features and support vector regression
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/05_train_vgg16_svr.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/05_train_vgg16_svr.ipynb)
#
# **In:** `splits.csv` from notebook 02 and the volume store from notebook 03.
#
# **Out:** `runs/vgg16_svr/`: `predictions.csv` with two variants, early and late fusion, `settings.json`, and the model
# as plain arrays. The features stay in `features/` and are computed once.
#
# The classic baseline, and a model that needs no GPU. Three neighbouring axial slices (a *triplet*) become the red,
# green and blue of a picture; a network made for photographs turns it into features; a linear support vector
# regression (SVR) predicts the age from them. *Early* fusion averages the features of all triplets first; *late*
# fusion predicts an age from each triplet position and takes a weighted mean.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "vgg_weights": "random_projection", "image_size": 32}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# name of this run: its folder in runs/
run = "vgg16_svr"  # @param {type:"string"}
# auto (ImageNet where it can be fetched, else random_projection), imagenet (528 MB, downloaded once), random_projection (untrained and weaker), or the path of vgg16-397923af.pth
vgg_weights = "auto"  # @param ["auto", "imagenet", "random_projection"] {allow-input: true}
# pixels; side of the slices as the network sees them (224 as published, 112 costs a quarter)
image_size = 224  # @param {type:"integer"}
# what is kept of the last pooling: maps (all positions, as published) or mean (512 numbers, small and coarse)
pooling = "maps"  # @param ["maps", "mean"]
# triplets of slices at once (lower it if memory runs out)
batch_size = 16  # @param {type:"integer"}
# train on everybody: fitted on all subjects, evaluated out of fold (recommended below some 500 subjects)
final = False  # @param {type:"boolean"}
# draws of the subject bootstrap behind each interval
n_bootstrap = 2000  # @param {type:"integer"}
# seed of the random projection; nothing else here is random
seed = 1  # @param {type:"integer"}
# further settings by name, as modality=T2w; `brainage-nb list 05` shows them all
more = ""  # @param {type:"string"}

# %%
import matplotlib.pyplot as plt
import pandas as pd

from brainage_nb.evaluation.metrics import with_interval
from brainage_nb.evaluation.plots import draw_predicted_vs_true
from brainage_nb.evaluation.runs import read_splits
from brainage_nb.models.svr import GRID, EarlyFusion, LateFusion, VggSvr, make_svr, train_vgg_svr
from brainage_nb.models.vgg16 import (
    FeatureSettings,
    extract_features,
    triplet_images,
    triplets_with_brain,
    vgg16_features,
)
from brainage_nb.parameters import pick_fields, read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.predict.saving import current_bundle
from brainage_nb.volumes.settings import ModalityChoice, name_run
from brainage_nb.volumes.store import current_store
from brainage_nb.workspace import open_workspace

parameters = read_parameters(globals(), ModalityChoice)
ws = open_workspace(workspace).begin("05_train_vgg16_svr")
print(session_summary(ws.root))

# %% [markdown]
# ## Who trains, who is tested

# %%
ws.need("volumes/current")
modality = ModalityChoice(**pick_fields(parameters, ModalityChoice)).modality
run = name_run(run, "vgg16_svr", modality)
store = current_store(ws.path("volumes"), ws.scratch, modality)
splits = read_splits(ws, store.scan_ids, modality)
splits.groupby("split").agg(
    scans=("scan_id", "size"),
    subjects=("subject_id", "nunique"),
    youngest=("age", "min"),
    oldest=("age", "max"),
)

# %% [markdown]
# ## The network
# Its weights are never changed here. With ImageNet weights the filters respond to edges and textures of photographs. A
# random projection has the same architecture with random, untrained weights: it needs no download, is weaker, and is
# named in every table and figure. If weights are asked for but cannot be found, the notebook stops.

# %%
network = vgg16_features(vgg_weights, pooling=pooling, seed=seed).place()
settings = FeatureSettings.for_volumes(store.settings, image_size=image_size)
facts = {
    "weights": network.title,
    "hash of the weights": network.weights_sha256[:12],
    "image [pixels]": f"{image_size} x {image_size}",
    "features per triplet": network.n_features(image_size),
}
pd.DataFrame({"value": facts})

# %% [markdown]
# ## Slices as pictures
# What the network sees of one training scan: three neighbouring slices as red, green and blue, so that colour marks
# where neighbours differ. Triplets above the crown or low in the neck are skipped.

# %%
scan_id = splits.query("split == 'train' and scan_id in @store.scan_ids")["scan_id"].iloc[0]
volume = store[scan_id]
positions = triplets_with_brain(volume, store.spacing_mm, settings)
shown = positions[:: -(-len(positions) // 6)]
figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 2.6))
for ax, position, image in zip(axes, shown, triplet_images(volume, shown, settings), strict=True):
    ax.imshow(image.permute(1, 2, 0).numpy())
    ax.set_title(f"triplet {position}")
    ax.set_axis_off()
figure.suptitle(f"{len(shown)} of {len(positions)} triplets of scan {scan_id}")
plt.show()

# %% [markdown]
# ## Features of every scan
# The features of each scan are stored as soon as they are computed. After an interruption run this cell again: it
# computes only the missing ones. A scan that fails is listed with its reason and left out.

# %%
features = extract_features(
    store, ws.path("features"), network, settings=settings, scan_ids=splits["scan_id"], batch_size=batch_size
)
print(
    f"computed {features.computed}, found in the workspace {features.reused}, failed {len(features.failed)}"
)
display(features.failed)

# %% [markdown]
# One scan's features: one row per triplet position. A position without brain has no features (NaN), never zeros.

# %%
rows = features[scan_id]
print(f"scan {scan_id}: {rows.shape[0]} positions x {rows.shape[1]} features, {rows.dtype}")
pd.DataFrame(rows.astype("float32")).iloc[:, :8].dropna().head().round(2)

# %% [markdown]
# ## The regression
# A linear SVR from scikit-learn. Its kernel is the similarity of two scans: the sum of products over standardised
# features, divided by its mean diagonal. Without that division, C would mean nothing with so many features.

# %%
print(make_svr())
print(EarlyFusion(), "averages the features over the triplets, then fits one such SVR.")
print(LateFusion(), "fits one such SVR per triplet position and weighs their ages.")

# %% [markdown]
# Two hyperparameters have to be chosen, both in years. **C** limits the influence of a single scan on the fit: with a
# small C, predictions stay near the mean age. **epsilon** is the error below which there is no loss. The published pair
# is 98 and 0.064.

# %%
pd.Series(GRID, name="values tried [years]").to_frame()

# %% [markdown]
# ## Fit both fusions
# C, epsilon, the weights of late fusion and the headline variant are chosen by cross-validation *inside* the training
# subjects, in five parts with no person in two of them. Validation and test ages take no part.

# %%
fitted = train_vgg_svr(features, splits, ws.run(run), network, final=final)
if fitted.reused:
    print("This run was there already, with the same features and splits: read, not fitted again.")
elif fitted.changed:
    print("Replaced a run with other settings:", *fitted.changed, sep="\n  ")
pd.DataFrame({name: fitted.settings[name] for name in ("early", "late")}).round(3)

# %%
print(f"{len(fitted.left_out)} scans left out of the fit")
display(fitted.left_out)

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
fitted.grid.pivot_table("mae", "C", ["variant", "epsilon"]).plot(logx=True, marker="o", ax=ax)
ax.set(xlabel="C [years]", ylabel="MAE, inner cross-validation [years]")
ax.set_title(f"C and epsilon: lowest is best (late: mean over positions)\n{fitted.settings['title']}")
plt.show()

# %% [markdown]
# ## How well each height of the head predicts age
# Late fusion scores each triplet position on training subjects held out from its SVR, and gives it a weight. A position
# with a good score can get no weight if a neighbouring one carries the same information.

# %%
figure, (above, below) = plt.subplots(2, figsize=(8, 5), sharex=True, layout="constrained")
above.bar(fitted.positions["position"], fitted.positions["mae"])
above.set(ylabel="MAE of it alone [years]")
above.set_title(
    f"{fitted.positions['n_scans'].max()} training scans, inner cross-validation\n{fitted.settings['title']}"
)
below.bar(fitted.positions["position"], fitted.positions["weight"])
below.set(xlabel="triplet position (0 is lowest)", ylabel="weight (sum 1)")
plt.show()

# %% [markdown]
# ## Accuracy on held-out subjects
# Test subjects or, with `final`, everybody out of fold. Raw predictions with 95 % intervals over subjects, beside the
# mean predictor, a baseline that predicts the mean training age for everybody.
# Notebook 06 compares this model with the ResNet on the same people.

# %%
part = "test" if "test" in set(fitted.predictions["split"]) else "val"  # no test scan has a volume
part, tested = ("train", "out-of-fold") if final else (part, part)
metrics = fitted.accuracy(part, n_bootstrap=n_bootstrap)
names = {
    "mae": "MAE [years]",
    "mean_predictor_mae": "mean predictor's MAE [years]",
    "r": "r",
    "slope": "slope",
}
shown = {
    variant: {title: with_interval(found[key]) for key, title in names.items()}
    for variant, found in metrics.items()
}
print(f"{fitted.settings['title']}; headline: {fitted.settings['variant']} fusion; {tested} scans")
pd.DataFrame(shown)

# %%
test = fitted.predictions.query("split == @part")
figure, axes = plt.subplots(1, 2, figsize=(11, 5))
for ax, (variant, rows) in zip(axes, test.groupby("variant"), strict=True):
    name = f"{variant} fusion, {tested}\n{fitted.settings['title']}"
    draw_predicted_vs_true(
        rows["age"],
        rows["predicted_age"],
        metrics[variant],
        name=name,
        reference_age=fitted.reference_age,
        ax=ax,
    )
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Where one age comes from
# The saved model, read back: the years that each triplet adds to one test scan's predicted age. They sum to the
# predicted age minus the model's constant.

# %%
model = VggSvr.load(fitted.folder / "model")
scan_id = test["scan_id"].iloc[0]
age = model.predict([store[scan_id]])[0]
years = model.contributions(store[scan_id])
figure, ax = plt.subplots(figsize=(6, 5))
ax.barh(years["position"], years["years"])
ax.axvline(0, color="grey", linewidth=1)
ax.set(xlabel="contribution [years]", ylabel="triplet position (0 is lowest)")
ax.set_title(f"scan {scan_id}: predicted {age:.1f} years\n{model.variant} fusion, {fitted.settings['title']}")
plt.show()

# %% [markdown]
# ## Bundle
# Everything another person needs to use this model, and no code. **07** and the app open it.

# %%
print(f"Saved {current_bundle(fitted.folder)}")

# %%
figures = {
    "method": fitted.settings["title"],
    "slices [pixels]": image_size,
    "headline variant": fitted.settings["variant"],
} | {f"{tested} {title}, {variant}": value for variant, row in shown.items() for title, value in row.items()}
ws.finish(
    "05_train_vgg16_svr",
    parameters,
    written=[fitted.folder, features.folder],
    read=["splits.csv", fitted.folder / "predictions.csv"],
    figures=figures,
)
