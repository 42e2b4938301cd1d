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
# # 02 · Data cleaning
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/02_data_cleaning.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/02_data_cleaning.ipynb)
#
# **In:** `cohort.csv` from notebook 01.
#
# **Out:** `cleaning.csv`, one row per scan with whether it is kept and, if not, one reason in words; `splits.csv`,
# which assigns each subject to training, validation or test.
#
# Every scan is opened and inspected. Unusable scans are dropped with a reason; unusual but usable scans are kept and
# flagged. A duplicated scan or a person in two splits makes every later figure too good to be true, so both are dealt
# with here, before any training.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke"}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# folds over the training and validation subjects for notebooks 04 and 05; 0: none
folds = 0  # @param {type:"integer"}
# seed of every random choice
seed = 1  # @param {type:"integer"}
# further settings by name, as min_age=5 coarse_mm=3; `brainage-nb list 02` shows them all
more = ""  # @param {type:"string"}

# %%
import matplotlib.pyplot as plt

from brainage_nb.cohort.cleaning import CleaningRules, clean, counts_by_reason
from brainage_nb.cohort.cleaning_plots import age_histogram, flagged_montage
from brainage_nb.cohort.inspection import inspect_scans
from brainage_nb.cohort.splits import FoldRules, deal_splits, plot_splits, site_table, split_table
from brainage_nb.parameters import pick_fields, read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.volumes.scans import voxel_file
from brainage_nb.workspace import open_workspace, write_csv

parameters = read_parameters(globals(), CleaningRules, FoldRules)
ws = open_workspace(workspace).begin("02_data_cleaning")
print(session_summary(ws.root))

# %%
cohort = ws.read("cohort.csv")
print(f"{len(cohort)} scans of {cohort['subject_id'].nunique()} subjects")
cohort.head()

# %% [markdown]
# ## Open every scan
# Measurements only, no decision yet: shape, voxel size, orientation, intensities, appearance of the head, and a hash of
# the image itself, so that one scan under two names is found.

# %%
rules = CleaningRules(**pick_fields(parameters, CleaningRules))
scan_files = [voxel_file(ws.resolve(image)) for image in cohort["image"]]
facts = inspect_scans(cohort, ws.resolve, max_voxels=rules.max_voxels)
facts.head()

# %% [markdown]
# ## Decide which scans are kept
# One reason for each scan that is dropped; it states what was found and what the limit is.

# %%
cleaning = clean(cohort, facts, rules)
write_csv(cleaning, ws.path("cleaning.csv"))
counts = counts_by_reason(cleaning)
counts

# %% [markdown]
# The findings: for each, how many scans, at which sites, and one example in words. A flag on a single scan means that
# it should be looked at. A flag on a whole site is a property of its scanner: the demo's sites *south* and *west* take
# thicker slices on purpose. Keep such scans, and compare the sites in notebook 06. Each scan's own sentence is in
# `cleaning.csv`.

# %%
odd = cleaning.merge(cohort.reindex(columns=["scan_id", "site"]), on="scan_id")
odd["finding"] = odd["reason"].where(~odd["kept"], odd["flags"]).str.split(";")
odd = odd.explode("finding").query("finding != ''")
by_finding = odd.groupby(["kept", "finding"]).agg(
    scans=("scan_id", "size"),
    sites=("site", lambda site: ", ".join(f"{name} {n}" for name, n in site.value_counts().items())),
    such_as=("scan_id", lambda ids: ", ".join(ids.head(3))),
    in_words=("detail", "first"),
)
print(f"{odd['scan_id'].nunique()} scans dropped or flagged")
by_finding.style.set_properties(**{"text-align": "left"})

# %% [markdown]
# ## Look at what was flagged
# A flag is a question, not a verdict. Look at these scans; to exclude one, remove it from `cohort.csv`.

# %%
if odd.empty:
    print("Nothing was flagged.")
else:
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.6), layout="constrained")
    flagged_montage(axes, cleaning, ws.resolve)
    plt.show()

# %% [markdown]
# ## Who remains

# %%
kept = cohort[cohort["scan_id"].isin(cleaning.loc[cleaning["kept"], "scan_id"])]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
age_histogram(axes[0], kept, by="sex")
age_histogram(axes[1], kept, by="site")
plt.show()

# %% [markdown]
# Subjects by site and age. If the people of one site are older than those of another, a model can infer the age from
# the scanner. Compare the gaps by site in notebook 06, and test it with `more = folds_by=site`: each fold is then one
# site.

# %%
site_table(kept)

# %% [markdown]
# ## Deal the splits
# As when dealing cards, people are sorted by age and assigned in turn to training, validation and test, 70 : 15 : 15,
# so that each split spans the ages. All scans of a person stay together. The seed sets where the dealing starts.
#
# An existing `splits.csv` is kept: only new people are assigned, and nobody else moves.

# %%
existing = ws.read("splits.csv") if ws.path("splits.csv").exists() else None
rules_of_folds = FoldRules(**pick_fields(parameters, FoldRules))
splits = deal_splits(kept, folds=folds, folds_by=rules_of_folds.folds_by, seed=seed, existing=existing)
write_csv(splits, ws.path("splits.csv"))
print(f"folds: {splits['fold'].max() + 1}; set as many in notebook 04 (05 takes them as they are)")
split_table(splits)

# %%
print("the youngest twelve, as they were dealt")
youngest = splits.drop_duplicates("subject_id").nsmallest(12, "age")
youngest[["subject_id", "age", "split"]].T

# %%
figure, ax = plt.subplots(figsize=(8, 2.8), layout="constrained")
plot_splits(ax, splits)
plt.show()

# %% [markdown]
# ## What comes next
# **03 · Preprocessing preview** turns each kept scan into the array that a model sees.

# %%
counts["told"] = counts["scans"].astype(str) + " " + counts["code"]
told = counts.groupby("outcome")["told"].agg(", ".join)
ws.finish(
    "02_data_cleaning",
    parameters,
    written=[ws.path("cleaning.csv"), ws.path("splits.csv")],
    read={"cohort.csv": "", **dict(zip(scan_files, facts["sha256"].fillna(""), strict=True))},
    figures={
        "scans kept": int(cleaning["kept"].sum()),
        "scans dropped": told.get("dropped", 0),
        "scans kept with a flag": told.get("flagged", 0),
        "subjects": kept["subject_id"].nunique(),
    },
)
