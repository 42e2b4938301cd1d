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
# A residual network takes the whole volume and predicts one number, the age in years. After each epoch it is evaluated
# on the validation subjects. In `reference` their error selects the epoch; in `best` it is only monitored. The test
# subjects are predicted once, at the very end. Press *Run all* again after a lost connection: training resumes from
# the last checkpoint.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "epochs": 2, "more": "batch_size=4 widths=16,32,64,128"}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# name of this training run; another name is another run beside it
run = "resnet18"  # @param {type:"string"}
# best (last epoch, a linear regression beside the network) or reference (best epoch, the network alone)
recipe = "best"  # @param ["reference", "best"]
# passes over the training set
epochs = 60  # @param {type:"integer"}
# peak of the learning rate, after the warm-up
learning_rate = 3e-4  # @param {type:"number"}
# seeds, with commas; one model a seed, several make an ensemble
seeds = "1"  # @param {type:"string"}
# train on everybody: a model for each of five folds over all subjects, evaluated out of fold (recommended below some 500 subjects; takes five times as long)
final = False  # @param {type:"boolean"}
# minutes after which everything is saved and the run ends, to be continued; 0: no limit
max_minutes = 0.0  # @param {type:"number"}
# delete what an earlier run of this name left and start anew
fresh = False  # @param {type:"boolean"}
# further settings by name, as batch_size=4 weight_decay=1e-3 blur_mm=2; `brainage-nb list 04` shows them all
more = ""  # @param {type:"string"}

# %%
import pandas as pd
from IPython.display import Markdown

from brainage_nb.apps.widget import LiveCurve
from brainage_nb.evaluation.metrics import metrics_by_split
from brainage_nb.evaluation.runs import read_splits
from brainage_nb.models.fit import VolumeDataset, list_learning_rates
from brainage_nb.models.network import build_network, describe_network
from brainage_nb.models.settings import TrainingSettings
from brainage_nb.models.train import forecast, train
from brainage_nb.parameters import pick_fields, read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.predict.saving import current_bundle
from brainage_nb.volumes.augment import augment, augmentation_examples
from brainage_nb.volumes.pictures import montage
from brainage_nb.volumes.settings import AugmentationSettings, list_changes, name_run
from brainage_nb.volumes.store import current_store
from brainage_nb.workspace import open_workspace

parameters = read_parameters(globals(), TrainingSettings, AugmentationSettings)
ws = open_workspace(workspace).begin("04_train_resnet18")
print(session_summary(ws.root))

# %% [markdown]
# ## Volumes and splits

# %%
ws.need("volumes/current")
elsewhere = parameters.get("cluster", "") not in ("", "local")
scratch = None if elsewhere else ws.scratch  # other machines do not see this disk
asked = TrainingSettings(**pick_fields(parameters, TrainingSettings)).channel_names
run = name_run(run, "resnet18", "_".join(asked))
stores = [current_store(ws.path("volumes"), scratch, modality) for modality in asked]
store = stores[0]
splits = read_splits(ws, store.scan_ids, asked[0])
for modality, one in zip(asked, stores, strict=True):
    print(f"{len(one.scan_ids)} {modality} volumes of {one.size}^3 voxels of {one.spacing_mm:g} mm")
splits.groupby("split").agg(
    scans=("scan_id", "size"),
    subjects=("subject_id", "nunique"),
    youngest=("age", "min"),
    oldest=("age", "max"),
)

# %% [markdown]
# ## Settings
# The recipe sets what is not set above. `brainage-nb list 04` shows every setting with its unit: `modality` trains on
# another scan of each session, `channels` on several at once (people without all of them are left out and counted).

# %%
augmentation = AugmentationSettings(**pick_fields(parameters, AugmentationSettings))
chosen = pick_fields(parameters, TrainingSettings)
settings = TrainingSettings.of_recipe(recipe, **chosen, augmentation=augmentation)
print(f"Other than recipe {recipe}: {list_changes(settings, recipe)}")
if splits["fold"].max() >= 0 and not (settings.folds or settings.final):
    print(
        f'splits.csv has folds, which this run leaves out: more = "folds={splits["fold"].max() + 1}" trains one model each'
    )
people = splits.groupby("split")["subject_id"].nunique()
if not settings.final and people.sum() < 500:
    print(
        f"{people.get('test', 0)} of {people.sum()} people evaluate this model. With final = True all of them do, "
        "by models that had not seen them; it takes five times as long."
    )

# %% [markdown]
# ## The network
# This is MONAI's 3D ResNet-18. A residual block learns what to add to its input.
# From stage to stage the resolution halves and the number of channels doubles.
# The last layer receives the mean of each channel and gives the age.
# The network starts at the mean age of the training subjects: its first prediction is that of the mean predictor, a
# baseline that predicts this age for everybody.

# %%
known = splits[splits["scan_id"].map(lambda scan_id: all(scan_id in one for one in stores))]
layers = describe_network(build_network(settings, known["age"].to_numpy()), store.size, len(stores))
print(f"{layers['parameters'].sum() / 1e6:.1f} million parameters")
layers

# %% [markdown]
# ## Augmentation
# Each training volume is varied at random, differently in every epoch.
# A head may be tilted, larger, or scanned on another scanner, and the predicted age should stay the same.
# Volumes are mirrored left to right only; other mirror images are not anatomically possible.
# First, one volume with each change alone.

# %%
examples = augmentation_examples(store[store.scan_ids[0]], augmentation, store.spacing_mm, seed=1)
montage([volume for _, volume in examples], [title for title, _ in examples], name="axial", columns=3)

# %% [markdown]
# Then one batch, as the network receives it.

# %%
train_set = VolumeDataset(stores, known[known["split"] == "train"])
rows = range(min(settings.batch_size, len(train_set)))
batch = augment(train_set.read(rows).float(), augmentation, store.spacing_mm, [(1, 0, k) for k in rows])
ages = [f"{train_set[k][1]:.0f} years" for k in rows]
print(f"batch {tuple(batch.shape)}: scans, channel, right, anterior, superior")
montage(list(batch[:, 0].numpy()), ages, name="axial", columns=4)

# %% [markdown]
# ## Loss, optimiser, learning rate
# `huber` is quadratic within a year of the true age and linear beyond, so that a single outlier does not dominate.
# AdamW turns gradients into steps; weight decay is not applied to normalisation layers and biases.
# The learning rate rises for some epochs, since the first gradients are unstable, then falls as a cosine.

# %%
rates = pd.Series(list_learning_rates(settings, -(-len(train_set) // settings.batch_size)))
axes = rates.plot(figsize=(5, 2.4), xlabel="step", ylabel="learning rate", grid=True)

# %% [markdown]
# ## A network or loss of your own
# A network takes volumes (batch, channels, D, H, W) and gives one number for each: the predicted age is the mean
# training age plus that number times the standard deviation of the training ages.
# A loss takes predicted and true ages and gives one number for each scan.
# Both are recorded by name. A run with another network is evaluated as any other, but has no bundle, since
# a bundle holds no code.

# %%
network = loss = None  # the ResNet-18 and the recipe's loss; or, for example:
# import functools, monai, torch
# network = monai.networks.nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
# loss = functools.partial(torch.nn.functional.l1_loss, reduction="none")

# %% [markdown]
# ## Train
# What will be trained, and how long it takes: a few steps are timed first.

# %%
own = {"network": network, "loss": loss}
if not elsewhere:
    with pd.option_context("display.max_colwidth", None):
        display(forecast(stores, splits, ws.run(run), settings, fresh=fresh, **own))

# %%
curve = LiveCurve()
result = train(stores, splits, ws.run(run), settings, fresh=fresh, on_epoch=curve, **own)
Markdown("\n".join(f"- {note}" for note in result.notes))

# %% [markdown]
# The validation error is often below the training error: training scans are augmented and predicted while the weights
# still change, validation scans are predicted unchanged and with averaged weights.

# %%
curve.draw(result.history)  # the last epochs, in the same place
result.history.tail().assign(epoch=result.history["epoch"] + 1)  # the first is 1; in history.csv it is 0

# %% [markdown]
# ## First figures
# Raw predictions, split by split. In `best` each is the mean of the network's and a linear regression's age, so they
# differ from the curves above, which are the network's alone. The model was trained on the training subjects, and the
# epoch may have been selected on the validation subjects. Only the test row says what to expect on new people.
# With `final` there is one row for everybody, each predicted by the models that were not trained on them.
# **06 · Evaluate** adds intervals, corrections and the report.

# %%
if not result.complete:
    print("Not finished yet; everything is saved. Run this notebook again and it goes on from here.")
figures = metrics_by_split(result.predictions, result.settings.get("variant", ""))
figures

# %% [markdown]
# ## Bundle
# Everything another person needs to use this model, and no code: weights, preprocessing settings, a summary of the
# training subjects, bias correction and prediction interval. **07** and the app open it.

# %%
if result.complete and network is None and (not settings.channels or asked[0] == "T1w"):
    print(f"Saved {current_bundle(ws.run(run))}")

# %% [markdown]
# ## A loop of your own
# The store is a torch `Dataset`: volumes (1, size, size, size) with ages in years. Any loop can train on it.
# `write_predictions` writes the predictions to where **06** evaluates them with the other runs.

# %%
everyone = VolumeDataset(stores, known)
print(f"{len(everyone)} volumes, the first {tuple(everyone[0][0].shape)} of age {everyone[0][1]:.1f}")
# for volumes, ages in torch.utils.data.DataLoader(train_set, batch_size=4, shuffle=True): ...  # your step
# predicted = [float(your_network(volume[None])) for volume, _ in everyone]
# from brainage_nb.models.run import write_predictions
# write_predictions(known, predicted, ws.run("by_hand"), store)

# %%
folder = ws.run(run)
ws.finish(
    "04_train_resnet18",
    parameters,
    status="complete" if result.complete else "stopped",
    written=[path for path in sorted(folder.iterdir()) if not path.name.startswith(".")],
    read=["splits.csv", folder / "predictions.csv"],
    figures={f"{split} {title}": text for split, row in figures.iterrows() for title, text in row.items()},
)
