"""Which platform this is: where files live there, what the machine has, Drive, inputs, secrets.

The only module that knows a platform's names. It knows no file of a workspace, no scan and no model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

DRIVE = Path("/content/drive")
MY_DRIVE = DRIVE / "MyDrive"
COLAB_DISK = Path("/content")
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_OUTPUT = Path("/kaggle/working")
INPUT_DEPTH = 4  # folders below KAGGLE_INPUT: datasets/<owner>/<slug>/brainage is the deepest we look into


class DriveNotMounted(OSError):
    """A path on Drive is wanted, Drive is not there, and nobody can be asked to mount it."""


def platform() -> str:
    """'kaggle', 'colab' or 'local'. Kaggle is asked first: its image carries Colab's markers too."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    if "google.colab" in sys.modules or os.environ.get("COLAB_RELEASE_TAG"):
        return "colab"
    return "local"


# --- folders --------------------------------------------------------------------------------------------


def default_root() -> Path:
    """$BRAINAGE_WORKSPACE, else the platform's usual place (Drive where it is mounted on Colab)."""
    if named := os.environ.get("BRAINAGE_WORKSPACE"):
        return Path(named)
    here = platform()
    if here == "kaggle":
        return KAGGLE_OUTPUT / "brainage"
    if here == "colab":
        return (MY_DRIVE if MY_DRIVE.is_dir() else COLAB_DISK) / "brainage"
    return Path("workspace")


def local_disk_for(root: Path | str) -> Path | None:
    """A fast local folder for the heavy work of the workspace `root`; None where `root` itself is local.

    Drive is slow and its renames are not known to be atomic, so a workspace there works on the machine's own
    disk and receives verified copies. $BRAINAGE_SCRATCH names such a disk for other slow file systems.
    """
    root = Path(root).absolute()
    if named := os.environ.get("BRAINAGE_SCRATCH"):
        disk = Path(named).absolute()
    elif root.is_relative_to(DRIVE):
        disk = COLAB_DISK / "brainage_local"
    else:
        return None
    return disk / hashlib.sha256(str(root).encode()).hexdigest()[:12]


def how_long_kept(root: Path | str) -> str:
    """What becomes of the files in `root` when the session ends, in words."""
    here, root = platform(), Path(root).absolute()
    if here == "colab":
        return "on Drive: kept" if root.is_relative_to(DRIVE) else "LOST WITH THE SESSION (not on Drive)"
    if here == "kaggle":
        inside = root.is_relative_to(KAGGLE_OUTPUT)
        return "output of this notebook: kept with its version" if inside else "LOST WITH THE SESSION"
    return "kept"


def session_hours() -> float:
    """Longest session of this platform, hours; infinite on one's own machine."""
    return 12.0 if platform() in ("colab", "kaggle") else float("inf")


def require_drive(path: Path | str) -> None:
    """Mount Drive where `path` lies on it and it is not there; does nothing anywhere else.

    Raises
    ------
    DriveNotMounted
        Where nobody can answer the question that mounting asks. (Writing on would fill a folder of that name
        on the machine's own disk, which is lost with the session.)
    """
    if platform() != "colab" or not Path(path).absolute().is_relative_to(DRIVE) or MY_DRIVE.is_dir():
        return
    if not can_answer():
        raise DriveNotMounted(
            f"{path} is on Drive, which is not mounted, and mounting asks a question that nobody can answer "
            "in a headless run. Mount Drive before (the folder symbol on the left of Colab), or set "
            "`workspace` to a folder that is not on Drive."
        )
    from google.colab import drive

    drive.mount(str(DRIVE))


def hint_at_drive(path: str) -> str:
    """What to do about a `path` that is not found on Colab: mount Drive, or name it as it is there."""
    if platform() != "colab":
        return ""
    if not MY_DRIVE.is_dir():
        return "Drive is not mounted: mount it (the folder symbol on the left), then Run all."
    return f"It is on Drive: set {MY_DRIVE / path}." if (MY_DRIVE / path).exists() else ""


def can_answer() -> bool:
    """Whether a person sits at this notebook: its front end lets code ask for input."""
    kernel = getattr(find_shell(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def find_shell() -> Any:
    """The IPython shell that runs this code, or None."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def attached_inputs(marker: str) -> list[Path]:
    """Folders among Kaggle's attached inputs that hold a file called `marker`, sorted; [] elsewhere.

    Inputs lie at /kaggle/input/<slug> or deeper, by a rule that has changed before, so what they hold tells
    what they are.
    """
    if platform() != "kaggle":
        return []
    patterns = ["*/" * depth + marker for depth in range(1, INPUT_DEPTH + 1)]
    return sorted({found.parent for pattern in patterns for found in KAGGLE_INPUT.glob(pattern)})


def attached_dataset(handle: str) -> Path | None:
    """Folder of the data set `owner/name` among Kaggle's inputs, or None where it is not attached."""
    if platform() != "kaggle":
        return None
    owner, _, name = handle.partition("/")
    name = name.split("/")[0]
    places = (KAGGLE_INPUT / name, KAGGLE_INPUT / "datasets" / owner / name, KAGGLE_INPUT / owner / name)
    return next((place for place in places if place.is_dir()), None)


# --- the machine ----------------------------------------------------------------------------------------


def n_workers(requested: int = 0) -> int:
    """Number of worker processes: `requested`, or, at 0, the processors this process may use."""
    if requested > 0:
        return requested
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_summary(root: Path | str = ".") -> str:
    """One line on where this session runs and where its files go; `session_details` has everything.

    From then on tables show long cells whole, so that no reason is cut, and figures appear in their cells,
    also where the session's own backend (MPLBACKEND) draws to files only.
    """
    import pandas as pd

    pd.set_option("display.max_colwidth", None)
    if getattr(shell := find_shell(), "kernel", None):
        shell.enable_matplotlib("inline")
    device = f", {device_name()}" if "torch" in sys.modules else ""  # not imported for its name alone
    return (
        f"brainage-nb {version_of('brainage-nb')} on {platform()}, {n_workers()} processors{device}; "
        f"workspace {root} ({how_long_kept(root)})"
    )


def session_details(root: Path | str = ".") -> pd.DataFrame:
    """What this session runs on: platform, workspace, device, memory, disk, versions. One row a fact."""
    import pandas as pd
    import psutil

    place = Path(root).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    facts = {
        "platform": platform(),
        "workspace": str(root),
        "its files": how_long_kept(root),
        "Python": sys.version.split()[0],
        "device": device_name(),
        "processors": str(n_workers()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "free disk": f"{shutil.disk_usage(there).free / 2**30:.1f} GiB",
    } | {name: version_of(name) for name in ("brainage-nb", "torch", "monai", "numpy", "scikit-learn")}
    return pd.DataFrame({"value": facts})


def device_name() -> str:
    """The accelerator in words, or 'CPU'."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}"
    return "CPU (no GPU seen)"


def version_of(package: str) -> str:
    """Installed version of a package, or 'absent'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
