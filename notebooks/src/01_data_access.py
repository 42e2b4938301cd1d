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
# # 01 · Data access
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/01_data_access.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/01_data_access.ipynb)
#
# **In:** a folder of T1-weighted scans and a table of ages, or the name of a public data set, or nothing at all: the
# default makes a cohort of test heads whose ages and brain ages are known.
#
# **Out:** `cohort.csv`, one row per scan: who was scanned, at which age, where the file is. Scans that the cohort rules
# left out are in `cohort_dropped.csv`; images not used and rows without a scan are in `cohort_unmatched.csv`.
#
# Matching the right age to the right scan is easy to get wrong: ids lose their leading zeros, a person is in the table
# twice with two ages, "89+" is read as 89. This notebook resolves each of these by a stated rule, or refuses and says
# what to set. It never invents an age.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "n_subjects": 26}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# where the scans come from; demo: known-answer heads, made here; docs/data.md lists what each other source needs
source = "demo"  # @param ["demo", "folder", "gdown", "kaggle_dataset", "ixi", "oasis1", "oasis2", "openneuro", "openbhb", "adni"]
# folder of scans, any nesting, BIDS recognised (sources folder, oasis1, oasis2, openbhb, adni); folder: or an archive
data_dir = ""  # @param {type:"string"}
# table of ages: CSV, TSV, XLS or XLSX; empty: participants.tsv or the only table in data_dir
table = ""  # @param {type:"string"}
# column of the table with the subject ids; empty: found by name
subject_column = ""  # @param {type:"string"}
# column with the age at the scan; empty: found by name
age_column = ""  # @param {type:"string"}
# unit of the ages: auto, years, months, weeks or days
age_unit = "auto"  # @param ["auto", "years", "months", "weeks", "days"]
# words for controls in the table that are not known (healthy, HC, CTL, ...), with commas between; 06 uses them too
control_words = ""  # @param {type:"string"}
# people in the demo cohort (source "demo")
n_subjects = 220  # @param {type:"integer"}
# further settings by name, as sex_column=gender max_cdr=-1; `brainage-nb list 01` shows them all
more = ""  # @param {type:"string"}

# %%
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

from brainage_nb.cohort.cleaning_plots import age_histogram
from brainage_nb.cohort.rules import CohortRules
from brainage_nb.demo.cohort import (
    attainable_mae,
    draw_planted,
    mean_predictor_mae,
    oracle_mae,
)
from brainage_nb.parameters import read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.sources.opening import SourceSettings, open_source
from brainage_nb.workspace import open_workspace, read_csv, write_csv

parameters = read_parameters(globals(), SourceSettings, CohortRules)
ws = open_workspace(workspace).begin("01_data_access")
print(session_summary(ws.root))

# %% [markdown]
# ## Scans and ages, matched
# Ids are compared without leading zeros, without `sub-` and without regard to case; session and site are read from the
# file name if it holds them. An ambiguous match is not made.
#
# `more = "modalities=T1w,T2w"` also takes the T2w scan of each session, in a column of its own; 03 registers it to the
# T1w scan. Other modalities are PDw, FLAIR, dwi-FA, dwi-MD and bold-fALFF. People without these scans stay in the
# cohort.
#
# Downloads resume where an earlier run ended, and are checked before they are used.

# %%
found = open_source(source, parameters, ws.root)
found.cohort.head(8)

# %% [markdown]
# ## Under which terms
# Data from people come with conditions, even if they are free.

# %%
Markdown(found.terms.markdown())

# %% [markdown]
# ## Who was left out by the cohort rules
# A brain-age model is trained on healthy people. `more` sets the rules: `max_cdr` (highest Clinical Dementia Rating),
# `controls_only`, `retests`.
# The first 40 scans that the rules left out are below; all are in `cohort_dropped.csv`.

# %%
found.rules.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %%
print(f"{len(found.dropped)} scans left out")
found.dropped.head(40)

# %% [markdown]
# ## What was decided on the way
# Each line is a rule that was applied to this table, with the rows it touched.

# %%
Markdown("\n".join(f"- {note}" for note in found.notes or ["Nothing needed deciding."]))

# %% [markdown]
# ## What did not match
# Images that were not used (no row in the table, not T1-weighted, a better image of the session), and rows without a
# scan. Nothing is dropped silently: check here before you go on. The first 20 of each are below; all are in
# `cohort_unmatched.csv`.

# %%
print(f"{len(found.unmatched_images)} images not taken")
found.unmatched_images.head(20)

# %%
print(f"{len(found.unmatched_rows)} rows of the table without a scan")
found.unmatched_rows.head(20)

# %% [markdown]
# ## Who is in the cohort
# A model predicts well only at ages that it was trained on: ideally, this histogram covers them evenly.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
age_histogram(axes[0], found.cohort, by="sex")
age_histogram(axes[1], found.cohort, by="site")
plt.show()

# %% [markdown]
# ## What is planted in the demo cohort
# Each head has a brain age: its age plus a gap of a few years. The brain age drives four changes: ventricles widen,
# sulci open, grey and white matter lose contrast, bright spots beside the ventricles darken.
#
# Two errors show how well any model could do, each as the mean over all scans. The **attainable** error remains even if
# the four changes are measured perfectly, because each person departs a little from the rules. The **oracle** error is
# that of the simulated brain age itself, because brain age is not age. Notebook 06 shows both again, over all scans and
# over the test scans. For other sources this cell shows nothing.

# %%
if source == "demo":
    truth = read_csv(ws.path("demo", "truth.csv"))
    figure = plt.figure(figsize=(11, 10), layout="constrained")
    draw_planted(ws.path("demo"), truth, figure)
    plt.show()

# %%
if source == "demo":
    references = {"mean predictor": mean_predictor_mae, "oracle": oracle_mae}
    if n_subjects >= 20:  # a regression in ten folds needs them
        references["attainable"] = attainable_mae
    display(pd.DataFrame({"MAE [years]": {name: round(mae(truth), 2) for name, mae in references.items()}}))

# %% [markdown]
# ## What comes next
# `cohort.csv` is written; **02 · Data cleaning** opens every scan and says which can be used.

# %%
written = [
    write_csv(found.cohort, ws.path("cohort.csv")),
    write_csv(found.dropped, ws.path("cohort_dropped.csv")),
    write_csv(
        pd.concat([found.unmatched_images, found.unmatched_rows]).fillna(""), ws.path("cohort_unmatched.csv")
    ),
]
ws.finish(
    "01_data_access",
    parameters,
    written=written,
    read=found.tables,
    figures={
        "scans": len(found.cohort),
        "subjects": found.cohort["subject_id"].nunique(),
        "scans left out by the cohort rules": len(found.dropped),
        "images not taken": f"{len(found.unmatched_images)}, each with its reason in cohort_unmatched.csv",
        "rows without a scan": f"{len(found.unmatched_rows)}, in the same file",
    },
)
