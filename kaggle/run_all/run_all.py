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
# # All notebooks in one run
#
# **In:** scans and ages as notebook 01 finds them, or nothing: the default is the known-answer cohort.
#
# **Out:** the whole workspace with `evaluation/report.html`, and every notebook as it ran in `executed/`.
#
# For a machine that runs one notebook from end to end, as Kaggle's *Save & Run All* does. What an attached earlier
# output has finished is not done again.

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
# The only cell to edit.

# %% tags=["parameters"]
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# parameters of the notebooks as `brainage-nb run -p` takes them, with spaces between: epochs=40 batch_size=8
settings = ""  # @param {type:"string"}
# first notebook, as 01
first = ""  # @param {type:"string"}
# last notebook, as 04; empty: all
last = ""  # @param {type:"string"}

# %%
from brainage_nb.pipeline import NotebookPaused, find_notebooks, parse_overrides, run_notebooks
from brainage_nb.platforms import session_summary
from brainage_nb.workspace import open_workspace

ws = open_workspace(workspace)
print(session_summary(ws.root))

# %%
notebooks = find_notebooks(first, last)
try:
    run_notebooks(notebooks, ws, parse_overrides([f"more={settings}"], notebooks))
except NotebookPaused as paused:  # its time was up; the next run goes on from this output
    print(paused)
