"""A session on Drive that is cut: kernels killed amid 03 and 04, and the machine with its disk lost."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest

from tests.platforms.emulation import Emulated
from tests.platforms.test_emulated import SMALL, complete, result

WORKSPACE = "/content/drive/MyDrive/brainage"
LOCAL = "/content/brainage_local"
DRIVE_ROWS = f"{WORKSPACE}/volumes/*/index.csv"
LOCAL_ROWS = f"{LOCAL}/*/volumes/*/index.csv"
DRIVE_CHECKPOINTS = f"{WORKSPACE}/runs/resnet18/checkpoints/*/step-*.pt"
TRAINING = {"epochs": 8, "batch_size": 7, "checkpoint_minutes": 0.02}


def step(name: str, **more) -> dict:
    values = SMALL[name] | ({"n_subjects": 40} if name.startswith("01") else {})
    return {"notebook": name, "parameters": values | (TRAINING if name.startswith("04") else {})} | more


def on_drive(folder) -> Emulated:
    platform = Emulated("colab", folder, online=True)
    platform.path("/content/drive/MyDrive").mkdir(parents=True)
    complete(platform.run([step("01_data_access"), step("02_data_cleaning")]))
    return platform


def lose_the_machine(platform: Emulated) -> None:
    """What a new session finds: Drive as it was, an empty local disk."""
    shutil.rmtree(platform.path(LOCAL))


def killed(platform: Emulated, name: str, pattern: str, least: int) -> dict:
    (report,) = platform.run([step(name, kill=[pattern, least])])
    assert report["ended"] == "killed", report
    return report


def first_step(report: dict) -> int:
    """Where training's bar opened, which is where it went on."""
    return min(map(int, re.findall(r"\| (\d+)/\d+ \[[^\]]*step/s", report["output"])))


def store_of(platform: Emulated):
    (folder,) = [path for path in platform.path(f"{WORKSPACE}/volumes").iterdir() if path.is_dir()]
    index = pd.read_csv(folder / "index.csv", dtype={"scan_id": str}).drop(columns="source_mtime_ns")
    return index, {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.npy"))}


def predictions_of(platform: Emulated) -> bytes:
    return (platform.path(WORKSPACE) / "runs" / "resnet18" / "predictions.csv").read_bytes()


def losses_of(platform: Emulated) -> pd.DataFrame:
    history = pd.read_csv(platform.path(WORKSPACE) / "runs" / "resnet18" / "history.csv")
    return history.drop(columns="seconds")


@pytest.mark.slow
def test_a_session_cut_twice_in_03_and_in_04_ends_as_one_that_was_not(tmp_path):
    cut, whole = on_drive(tmp_path / "cut"), on_drive(tmp_path / "whole")
    complete(whole.run([step("03_preprocessing_preview"), step("04_train_resnet18")]))

    killed(cut, "03_preprocessing_preview", DRIVE_ROWS, 2)
    lose_the_machine(cut)
    there, total = len(store_of(cut)[0]), len(store_of(whole)[0])
    assert 0 < there < total  # what had reached Drive
    killed(cut, "03_preprocessing_preview", LOCAL_ROWS, there + 8)  # the machine stays, its disk is ahead
    (report,) = complete(cut.run([step("03_preprocessing_preview")]))
    made, found = map(int, re.search(r"(\d+) volumes made, (\d+) were there", report["output"]).groups())
    assert (made + found, found > there) == (total, True)

    killed(cut, "04_train_resnet18", DRIVE_CHECKPOINTS, 5)
    lose_the_machine(cut)
    assert first_step(killed(cut, "04_train_resnet18", DRIVE_CHECKPOINTS, 15)) >= 5
    (report,) = complete(cut.run([step("04_train_resnet18")]))
    assert first_step(report) >= 15

    (index, shards), (index_whole, shards_whole) = store_of(cut), store_of(whole)
    pd.testing.assert_frame_equal(index, index_whole)
    assert shards == shards_whole
    assert predictions_of(cut) == predictions_of(whole)
    pd.testing.assert_frame_equal(losses_of(cut), losses_of(whole), check_exact=True)
    assert np.isfinite(losses_of(cut)["val_mae"]).all()
    assert result(cut, WORKSPACE, "04_train_resnet18")["status"] == "complete"
