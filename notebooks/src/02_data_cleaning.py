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
# **Out:** `cleaning.csv`, one row a scan with whether it is kept and, if not, one reason in words; `splits.csv`, which
# subject trains, validates and tests the model.
#
# Every scan is opened and looked at. What cannot be used is dropped with a reason; what is odd but usable is kept and
# flagged. A duplicated scan or a person in two splits makes any later figure too good to be true, so both are settled
# here, before a model sees anything.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke"}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# folds over the training and validation subjects for notebooks 04 and 05; 0: none
folds = 0  # @param {type:"integer"}
# seed of every random choice
seed = 1  # @param {type:"integer"}
# voxels; a header that claims more is refused unopened
max_voxels = 400000000  # @param {type:"integer"}
# voxels; fewer along any axis is too small
min_voxels_per_axis = 16  # @param {type:"integer"}
# mm; shortest possible edge of a voxel
min_voxel_mm = 0.2  # @param {type:"number"}
# mm; longest possible edge of a voxel
max_voxel_mm = 7.0  # @param {type:"number"}
# mm; least extent of the image along any axis
min_field_of_view_mm = 95.0  # @param {type:"number"}
# mm; largest extent of the image along any axis
max_field_of_view_mm = 600.0  # @param {type:"number"}
# share of bright voxels equal to a neighbour above which it is a label map
max_equal_neighbours = 0.5  # @param {type:"number"}
# intensity; a 1st percentile below this is no T1 scan (CT has -1000 in air)
min_intensity_p1 = -500.0  # @param {type:"number"}
# ml; least volume of what stands out from the background
min_head_ml = 600.0  # @param {type:"number"}
# ml; largest volume of what stands out from the background
max_head_ml = 12000.0  # @param {type:"number"}
# share of the head's largest section; more than this in an outermost slice is flagged as cut off
max_edge_fraction = 0.25  # @param {type:"number"}
# years; youngest possible age
min_age = 0.0  # @param {type:"number"}
# years; oldest possible age
max_age = 115.0  # @param {type:"number"}
# years; a younger age is flagged
adult_from = 18.0  # @param {type:"number"}
# years; an older age is flagged
adult_to = 95.0  # @param {type:"number"}
# years; two ages of one picture this close count as the same
same_age_years = 0.1  # @param {type:"number"}
# mm; a longer voxel edge is flagged
coarse_mm = 2.2  # @param {type:"number"}
# degrees; axes tilted by more are flagged
oblique_degrees = 20.0  # @param {type:"number"}
# distinct intensities; fewer are flagged
few_values = 32  # @param {type:"integer"}
# share of voxels at exactly the greatest intensity; more is flagged as clipped
max_at_maximum = 0.02  # @param {type:"number"}
# robust standard deviations from the cohort's median that make an outlier
outlier_z = 5.0  # @param {type:"number"}
# factor from the cohort's median an outlier must also reach
outlier_ratio = 1.3  # @param {type:"number"}
# scans; fewest from which outliers are judged
min_cohort = 10  # @param {type:"integer"}

# %%
import matplotlib.pyplot as plt

from brainage_nb.cohort.cleaning import CleaningRules, clean, counts_by_reason, inspect_scans
from brainage_nb.cohort.cleaning_plots import age_histogram, flagged_montage, plot_reasons
from brainage_nb.cohort.splits import deal_splits, plot_splits, split_table
from brainage_nb.workspace import open_workspace, resolved_parameters, session_summary, write_csv

parameters = resolved_parameters(globals())
ws = open_workspace(workspace).begin("02_data_cleaning")
session_summary(ws.root)

# %%
cohort = ws.read("cohort.csv")
print(f"{len(cohort)} scans of {cohort['subject_id'].nunique()} subjects")
cohort.head()

# %% [markdown]
# ## Open every scan
# Facts only, no judgement yet: shape, voxel size, orientation, intensities, what the head looks like, and a hash of
# the picture itself, so that one scan under two names is found.

# %%
rules = CleaningRules(**{name: parameters[name] for name in CleaningRules.__dataclass_fields__})
facts = inspect_scans(cohort, ws.resolve, rules)
facts.head()

# %% [markdown]
# ## Judge them
# One reason for each scan that is dropped; the sentence says what was found and what the limit is.

# %%
cleaning = clean(cohort, facts, rules)
write_csv(cleaning, ws.path("cleaning.csv"))
counts_by_reason(cleaning)

# %%
odd = cleaning[~cleaning["kept"] | (cleaning["flags"] != "")]
print(f"{len(odd)} scans dropped or flagged; the first 60, all are in cleaning.csv")
odd[["scan_id", "kept", "reason", "flags", "detail"]].head(60).style.set_properties(**{"text-align": "left"})

# %%
figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
plot_reasons(ax, counts_by_reason(cleaning))
plt.show()

# %% [markdown]
# ## Look at what was flagged
# A flag is a question, not a verdict: look, and drop a scan by removing it from `cohort.csv` if you must.

# %%
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
# ## Deal the splits
# Subjects are sorted by age and dealt in turn, 70 : 15 : 15, so that each split spans the range. All scans of a person
# stay together. A `splits.csv` that is already there is kept: new people are dealt among themselves and nobody moves.

# %%
existing = ws.read("splits.csv") if ws.path("splits.csv").exists() else None
splits = deal_splits(kept, folds=folds, seed=seed, existing=existing)
write_csv(splits, ws.path("splits.csv"))
split_table(splits)

# %%
figure, ax = plt.subplots(figsize=(8, 2.8), layout="constrained")
plot_splits(ax, splits)
plt.show()

# %% [markdown]
# ## What comes next
# **03 · Preprocessing preview** turns each kept scan into the array that a model sees.

# %%
ws.finish(
    "02_data_cleaning",
    parameters,
    written=[ws.path("cleaning.csv"), ws.path("splits.csv")],
    figures={
        "scans kept": int(cleaning["kept"].sum()),
        "scans dropped": int((~cleaning["kept"]).sum()),
        "scans kept with a flag": int((cleaning["kept"] & (cleaning["flags"] != "")).sum()),
        "subjects": kept["subject_id"].nunique(),
    },
)
