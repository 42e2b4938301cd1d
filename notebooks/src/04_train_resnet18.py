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
# # 04 · Train the 3D ResNet-18
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/04_train_resnet18.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/04_train_resnet18.ipynb)
#
# **In:** the volume store of notebook 03 and the splits of notebook 02.
#
# **Out:** `runs/<run>/`: settings, history, checkpoints and `predictions.csv` for every scan.
#
# A residual network looks at the whole volume and answers with one number, the age in years. After every epoch it is
# judged on the validation subjects, who choose the epoch in `reference` and only watch in `best`; the test subjects are
# only predicted, at the very end.
# Press *Run all* again after a lost connection: training goes on from the last checkpoint.

# %% [markdown]
# ## Set-up
# Installs the package of this very release where it is absent, adds only what is missing, and leaves the platform's
# torch and numpy as they are. The last line says what was done.

# %%
import glob
import importlib.util
import os
import subprocess
import sys
from urllib.parse import urljoin
from urllib.request import urlopen

if importlib.util.find_spec("brainage_nb") is None:
    _marks = ["/kaggle/input/" + "*/" * depth + "brainage_wheels.json" for depth in (1, 2, 3)]
    _places = ["file://" + path for mark in _marks for path in glob.glob(mark)]
    _places += ["https://raw.githubusercontent.com/brainage-nb/brainage_nb/v0.1.0/"]
    _given = os.environ.get("BRAINAGE_SOURCE", "")
    if os.path.isdir(_given):
        _given = f"file://{os.path.abspath(_given)}/"
    if _given.startswith(("http", "file:")):
        _places.insert(0, _given)
    try:
        _script = urlopen(urljoin(_places[0], "colab_setup.sh")).read()
    except OSError as error:
        _hint = "No internet? Attach the wheel data set (README, Kaggle)."
        raise RuntimeError(f"{_places[0]} cannot be read: {error}. {_hint}") from error
    subprocess.run(["bash", "-s"], input=_script, env=os.environ | {"PYTHON": sys.executable}, check=True)
    importlib.invalidate_caches()

# %% [markdown]
# ## Parameters
# The only cell to edit. Colab shows it as a form; `brainage-nb run -p name=value` and papermill set the same names.

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "epochs": 2, "batch_size": 4}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# name of this training run; another name is another run beside it
run = "resnet18"  # @param {type:"string"}
# passes over the training set
epochs = 60  # @param {type:"integer"}
# volumes a step; kept when memory forces smaller pieces
batch_size = 8  # @param {type:"integer"}
# peak of the learning rate, after the warm-up
learning_rate = 3e-4  # @param {type:"number"}
# weight decay of AdamW
weight_decay = 1e-4  # @param {type:"number"}
# seeds, with commas; one model a seed, several make an ensemble
seeds = "1"  # @param {type:"string"}
# folds of cross-validation over training and validation subjects; 0: none
folds = 0  # @param {type:"integer"}
# channels of the four stages; 64,128,256,512 is ResNet-18, halves of these train four times as fast
widths = "64,128,256,512"  # @param {type:"string"}
# residual blocks of the four stages; 2,2,2,2 is ResNet-18, 1,1,1,1 is ResNet-10
blocks = "2,2,2,2"  # @param {type:"string"}
# share of the pooled features dropped at random in training
dropout = 0.0  # @param {type:"number"}
# normalisation: batch (learns fastest), group or instance
norm = "batch"  # @param ["batch", "group", "instance"]
# reference; best (age distribution, last epoch, a linear regression beside it); custom: as the next three say
recipe = "best"  # @param ["reference", "best", "custom"]
# custom only: what is learned, huber (the age) or distribution (soft labels: a curve of ages around it)
loss = "huber"  # @param ["huber", "distribution"]
# custom only: which weights are kept, those of the epoch with the best validation error, or of the last one
keep = "best"  # @param ["best", "last"]
# custom only: average each age with that of a ridge regression on the smoothed volumes, fitted in seconds
linear = False  # @param {type:"boolean"}
# years; with distribution: standard deviation of the curve around each true age
label_sd = 3.0  # @param {type:"number"}
# epochs that the average of the weights reaches back; 0: none
ema_epochs = 1.0  # @param {type:"number"}
# predict each scan and its left-right mirror image, and average
flip_averaging = True  # @param {type:"boolean"}
# voxels by which each scan is also moved along every axis for its prediction, and averaged; 0: none
shift_averaging = 0  # @param {type:"integer"}
# stop after so many epochs without a better validation error; 0: never
patience = 0  # @param {type:"integer"}
# minutes after which everything is saved and the run ends, to be continued; 0: no limit
max_minutes = 0.0  # @param {type:"number"}
# minutes between checkpoints: what a lost session costs at most; 0: after every step
checkpoint_minutes = 5.0  # @param {type:"number"}
# refuse to train without a GPU
require_gpu = False  # @param {type:"boolean"}
# Dask workers that train folds and seeds side by side: local, tcp://host:port or a scheduler file; empty: none
cluster = ""  # @param {type:"string"}
# weights to start from: a bundle (folder or .zip), .safetensors or MedicalNet's .pth; empty: random ones
init_from = ""  # @param {type:"string"}
# delete what an earlier run of this name left and start anew
fresh = False  # @param {type:"boolean"}
# degrees; largest random rotation about each axis
rotation_deg = 10.0  # @param {type:"number"}
# share; largest random change of size (0.08: 8 % smaller to 8 % larger)
scale = 0.08  # @param {type:"number"}
# mm; largest random shift along each axis
shift_mm = 5.0  # @param {type:"number"}
# mm; largest random displacement of the smooth deformation's control points
deformation_mm = 3.0  # @param {type:"number"}
# log of the largest random contrast exponent
log_gamma = 0.25  # @param {type:"number"}
# log of the strongest random bias field
log_bias = 0.2  # @param {type:"number"}
# mm; full width at half maximum of the strongest random blur
blur_mm = 4.0  # @param {type:"number"}
# standard deviation of the strongest random noise, in those of the volume
noise_sd = 0.1  # @param {type:"number"}

# %%
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

from brainage_nb.apps.widget import LiveCurve, history_figure
from brainage_nb.evaluation.metrics import metrics_by_split
from brainage_nb.models.bundles.saving import current_bundle
from brainage_nb.models.fitting.forecast import forecast
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.training import train
from brainage_nb.volumes.augment import AugmentationSettings, augmentation_examples
from brainage_nb.volumes.pictures import montage
from brainage_nb.volumes.store import current_store
from brainage_nb.workspace import open_workspace, resolved_parameters, session_summary

set_matplotlib_formats("png")  # figures appear in their cells
parameters = resolved_parameters(globals())
ws = open_workspace(workspace).begin("04_train_resnet18")
session_summary(ws.root)

# %% [markdown]
# ## Volumes and splits

# %%
ws.need("volumes/current")
scratch = ws.scratch if cluster in ("", "local") else None  # other machines do not see this disk
store = current_store(ws.path("volumes"), scratch)
splits = ws.read("splits.csv")
print(f"{len(store.scan_ids)} volumes of {store.size}^3 voxels of {store.spacing_mm:g} mm")
splits.groupby("split").agg(
    scans=("scan_id", "size"),
    subjects=("subject_id", "nunique"),
    youngest=("age", "min"),
    oldest=("age", "max"),
)

# %% [markdown]
# ## What the network gets to see
# Each training volume is varied at random, anew in every epoch: a head may be turned, larger, or taken by another
# scanner, and the age must stay the same. Only left and right are exchanged; other mirror images are no anatomy.

# %%
ranges = {name: parameters[name] for name in AugmentationSettings.__dataclass_fields__ if name in parameters}
augmentation = AugmentationSettings(**ranges)
examples = augmentation_examples(store[store.scan_ids[0]], augmentation, store.spacing_mm, seed=1)
montage([volume for _, volume in examples], [title for title, _ in examples], name="axial", columns=3)

# %% [markdown]
# ## Train
# AdamW with a warm-up and a cosine, mixed precision where the card has it. The network starts at the mean age of the
# training subjects, so its first guess is the mean predictor's. First a few steps are timed: what the run will take is
# known before it starts.

# %%
chosen = {name: parameters[name] for name in TrainingSettings.__dataclass_fields__ if name in parameters}
for name in ("seeds", "widths", "blocks"):
    chosen[name] = tuple(int(value) for value in chosen[name].split(","))
settings = TrainingSettings.of_recipe(recipe, **chosen, scratch=str(scratch or ""), augmentation=augmentation)
if cluster in ("", "local"):
    display(forecast(store, splits, ws.run(run), settings, fresh=fresh))

# %%
result = train(store, splits, ws.run(run), settings, fresh=fresh, on_epoch=LiveCurve())
Markdown("\n".join(f"- {note}" for note in result.notes))

# %%
display(history_figure(result.history))
result.history.tail()

# %% [markdown]
# ## First figures
# Raw predictions, split by split. Training subjects were seen, and validation subjects may have chosen the epoch: only the
# test row says what to expect on new people. **06 · Evaluate** adds intervals, corrections and the report.

# %%
if not result.complete:
    print("Not finished yet; everything is saved. Run this notebook again and it goes on from here.")
reference_age = splits.loc[splits["split"] == "train", "age"].mean()
figures = metrics_by_split(result.predictions, result.settings.get("variant", ""), reference_age)
figures

# %% [markdown]
# ## Bundle
# Everything another person needs to use this model, and nothing that runs: weights, preprocessing, whom it learned
# from, its correction and interval. **07** and the app open it.

# %%
if result.complete:
    print(f"Saved {current_bundle(ws.run(run))}")

# %%
folder = ws.run(run)
ws.finish(
    "04_train_resnet18",
    parameters,
    status="complete" if result.complete else "stopped",
    written=[path for path in sorted(folder.iterdir()) if not path.name.startswith(".")],
    figures={f"{split} {title}": text for split, row in figures.iterrows() for title, text in row.items()},
)
