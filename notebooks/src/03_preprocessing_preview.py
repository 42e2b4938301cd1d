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
# # 03 · Preprocessing preview
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/03_preprocessing_preview.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/brainage-nb/brainage_nb/blob/v0.1.0/notebooks/03_preprocessing_preview.ipynb)
#
# **In:** `splits.csv` from notebook 02 and the scans it names.
#
# **Out:** `volumes/<fingerprint>/`, every scan as the array that a model receives, stored once in half precision.
#
# Preprocessing turns every scan into a cube of the same size and resolution. It is a MONAI `Compose`, a list of
# transforms.
#
# With the recipe `reference` the cube is placed below the crown of the head and holds intensities. With `best` it is
# aligned to the MNI152 template and holds the share of grey matter in each voxel, which depends little on scanner and
# position of the head.
#
# Each scan is preprocessed by itself, so a new scan can be preprocessed in the same way later.

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

# %% tags=["parameters"] nbmake={"mock": {"workspace": "../build/smoke", "spacing_mm": 6.0, "size": 32, "recipe": "reference"}}
# folder for everything written; empty: $BRAINAGE_WORKSPACE, else the platform's usual place
workspace = ""  # @param {type:"string"}
# best (grey matter on the MNI152 template, about two seconds a scan) or reference (raw heads)
recipe = "best"  # @param ["reference", "best"]
# mm; edge of a voxel of the grid (4 for a small run on a CPU)
spacing_mm = 2.0  # @param {type:"number"}
# voxels along each edge of the cube (48 with 4 mm)
size = 96  # @param {type:"integer"}
# Dask workers to preprocess on: local, tcp://host:port or a scheduler file; empty: the processors here
cluster = ""  # @param {type:"string"}
# scan to show step by step; empty: the first
preview_scan = ""  # @param {type:"string"}
# further settings by name, as found_masks=no; `brainage-nb list 03` shows them all
more = ""  # @param {type:"string"}

# %%

from brainage_nb.parameters import pick_fields, read_parameters
from brainage_nb.platforms import session_summary
from brainage_nb.volumes.pictures import brain_preview, montage, steps_figure
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.settings import PreprocessingSettings, list_changes, name_of_modality
from brainage_nb.volumes.store import build_modalities, build_store
from brainage_nb.volumes.transforms import describe_transform, preprocessing_chain, run_steps
from brainage_nb.workspace import open_workspace, write_csv

parameters = read_parameters(globals(), PreprocessingSettings)
ws = open_workspace(workspace).begin("03_preprocessing_preview")
print(session_summary(ws.root))

# %% [markdown]
# ## The chain
# `OpenScan` reads a file and reports in words what is wrong with it. `SmoothAndSample` resamples the scan to the grid.
# The other transforms depend on the recipe.
#
# The settings determine the fingerprint that names the volume store (the folder of preprocessed scans). Other settings
# give another store beside it.

# %%
settings = PreprocessingSettings.of_recipe(recipe, **pick_fields(parameters, PreprocessingSettings))
print(f"Other than recipe {recipe}: {list_changes(settings, recipe)}")

# %% [markdown]
# A MONAI transform can be added at the end. Uncomment the first three lines to smooth each volume with a median.
#
# The store, the model's bundle and later predictions record it by name and numbers. A transform that is not MONAI's is
# refused, since a bundle holds no code.
#
# Settings leave steps out, for example `more = "smooth=no"`.

# %%
# from monai.transforms import MedianSmooth
# from brainage_nb.volumes.transforms import add_transforms
# settings = add_transforms(settings, MedianSmooth(radius=1))
chain = preprocessing_chain(settings)
print(f"fingerprint {settings.fingerprint}", *map(describe_transform, chain.transforms), sep="\n")

# %% [markdown]
# ## One scan, step by step
# One row per transform of the chain. The first row is the scan as stored in its file, often lying on its side. From the
# second row on, L and R mark left and right of the head.
#
# Look for the whole brain in the last row. A long neck or a head far from the middle of the image does not push the
# brain out of the cube.

# %%
scans = ws.read("splits.csv")
chosen = scans.set_index("scan_id").loc[preview_scan or scans["scan_id"].iloc[0]]
try:
    display(steps_figure(run_steps(chain, ws.resolve(chosen["image"]))))
except ScanError as error:
    print(f"{error} Name another scan in preview_scan to see the steps.")

# %% [markdown]
# ## Where the brain is
# The recipe `best` finds the brain. Here is its outline on scans spread over the ages, before anything is cut away.
#
# An unreliable brain mask is not drawn. The table says why, and such a scan gives no volume below. `correlation` is
# that of brain and template, `agreement` the overlap of their outlines, `quality` the lower of the two.

# %%
outlined = scans.sort_values("age").iloc[:: max(1, len(scans) // 6)].head(6 if settings.needs_brain else 0)
paths = {row.scan_id: ws.resolve(row.image) for row in outlined.itertuples()}
found, outlines = brain_preview(paths, settings)
outlines if settings.needs_brain else print(f"the recipe {settings.recipe} looks for no brain")

# %%
found

# %% [markdown]
# ## All scans
# Each volume is written once, in half precision, with its checksum. After an interruption, run this cell again: it
# makes only the volumes that are missing.
#
# Scans that give no volume are listed in `scans_without_volume.csv`, with the reason.

# %%
where = {"resolve": ws.resolve, "scratch": ws.scratch, "cluster": cluster}
report = build_store(scans, ws.path("volumes"), settings, **where)
print(report.note)

# %%
without_volume = write_csv(report.failed, ws.path("scans_without_volume.csv"))
print(f"{len(report.failed)} scans gave no volume")
display(report.failed)
ready = scans["scan_id"].isin(report.store.scan_ids)
if lost := set(scans["split"]) - set(scans["split"][ready]):
    print(
        f"No volume for {', '.join(sorted(lost))}: take these scans out of cohort.csv, delete splits.csv, run 02."
    )
if not ready.any():
    raise ScanError(
        report.failed["code"].iloc[0], f"No scan gave a volume. The first: {report.failed['reason'].iloc[0]}"
    )

# %% [markdown]
# ## Other modalities
# Each scan of another modality (`modalities` in 01) is registered rigidly to the T1w scan of its session and then taken
# to the cube by that scan's transform. A scan that does not align is listed and left out.

# %%
others = build_modalities(ws.read("cohort.csv"), scans, ws.path("volumes"), settings, **where)
written = [ws.path("volumes", "current"), ws.path("volumes", report.store.fingerprint), without_volume]
for modality, made in others.items():
    print(made.note)
    table = ws.path(name_of_modality(without_volume.name, modality))
    written += [write_csv(made.failed, table), ws.path("volumes", made.store.fingerprint)]
    display(made.failed[made.failed["code"] != "none"])
    some = made.store.scan_ids[:: max(1, len(made.store) // 8)][:8]
    if some:
        display(montage(list(made.store.read(some)), some, name="axial", heading=f"{modality}, axial slices"))

# %% [markdown]
# ## The cohort as a model sees it
# Look for a head that is cut off, rotated or empty. The scans are spread evenly over the ages.
#
# `report.store` is a torch `Dataset`: `store[0]` is the first volume, and `DataLoader(store, batch_size=8)` gives
# batches.

# %%
store = report.store
shown = scans[ready].sort_values("age")
shown = shown.iloc[:: max(1, len(shown) // 24)].head(24)
titles = [f"{row.scan_id}, {row.age:.0f} y" for row in shown.itertuples()]
montage(list(store.read(shown["scan_id"])), titles, heading="middle sagittal slices, youngest to oldest")

# %%
montage(
    list(store.read(shown["scan_id"])),
    titles,
    name="axial",
    heading="middle axial slices, youngest to oldest",
)

# %% [markdown]
# ## What comes next
# **04** trains the network on these volumes, **05** the classic baseline.

# %%
ws.finish(
    "03_preprocessing_preview",
    parameters,
    written=written,
    read=["splits.csv", *(["cohort.csv"] if others else [])],
    figures={"volumes": len(store.scan_ids), "scans without a volume": len(report.failed)},
)
