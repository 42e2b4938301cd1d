"""What of a run is torn, empty or of another kind is named, and made again from what is whole."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import psutil
import pytest

from brainage_nb.models.settings import TrainingRefused, TrainingSettings
from brainage_nb.models.train import train
from tests.models.conftest import make_tiny_cohort

pytestmark = pytest.mark.filterwarnings("ignore:TRAINING ON THE CPU")
SETTINGS = TrainingSettings(
    epochs=1, batch_size=6, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), device="cpu", seeds=(1, 2)
)
FILES = ["settings.json", "history.csv", "predictions.csv"]
FILES += [f"checkpoints/seed2/{name}" for name in ("predictions.csv", "history.csv", "weights.safetensors")]
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "its last byte gone": lambda content: content[:-1],
    "zeros at the end": lambda content: content[:-40] + bytes(40),
    "an empty list": lambda content: b"[]\n",
    "an empty object": lambda content: b"{}\n",
}

# A line end is not missed; weights of 0 are as good as any, as far as their file says.
WHOLE = {("json", "its last byte gone"), ("safetensors", "zeros at the end")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(store, splits, folder, result) of a whole run of two models."""
    folder = tmp_path_factory.mktemp("finished")
    store, splits = make_tiny_cohort(folder / "volumes")
    return store, splits, folder / "run", train(store, splits, folder / "run", SETTINGS)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_run_made_whole_again(finished, tmp_path, file):
    store, splits, folder, whole = finished
    for number, (name, damage) in enumerate(DAMAGES.items()):
        if (file.rsplit(".")[-1], name) in WHOLE:
            continue
        run = shutil.copytree(folder, tmp_path / f"run{number}")
        (run / file).write_bytes(damage((folder / file).read_bytes()))
        with pytest.warns(UserWarning, match=file):
            again = train(store, splits, run, SETTINGS)
        assert again.complete, name
        pd.testing.assert_frame_equal(again.predictions, whole.predictions, check_exact=True)
        pd.testing.assert_frame_equal(
            again.history.drop(columns="seconds"), whole.history.drop(columns="seconds"), check_exact=True
        )
        assert again.settings["identity"] == whole.settings["identity"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_is_made_again(finished, tmp_path, file):
    store, splits, folder, whole = finished
    run = shutil.copytree(folder, tmp_path / "run")
    (run / file).unlink()
    again = train(store, splits, run, SETTINGS)
    assert again.complete
    pd.testing.assert_frame_equal(again.predictions, whole.predictions, check_exact=True)


def test_models_that_were_thrown_away_after_the_run_are_not_trained_again(finished, tmp_path):
    store, splits, folder, _ = finished
    run = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "nothing was trained again" in train(store, splits, run, SETTINGS).notes[0]


def test_a_row_that_was_taken_out_comes_back(finished, tmp_path):
    store, splits, folder, whole = finished
    run = shutil.copytree(folder, tmp_path / "run")
    lines = (run / "predictions.csv").read_text().splitlines(keepends=True)
    (run / "predictions.csv").write_text("".join(lines[:-1]))
    again = train(store, splits, run, SETTINGS)
    pd.testing.assert_frame_equal(again.predictions, whole.predictions, check_exact=True)


def test_models_of_other_settings_are_refused_where_settings_json_is_lost(finished, tmp_path):
    store, splits, folder, _ = finished
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "settings.json").write_text("{")
    with (
        pytest.warns(UserWarning, match=r"settings\.json is damaged"),
        pytest.raises(TrainingRefused, match=r"learning_rate: was 0.0003, now 0.1"),
    ):
        train(store, splits, run, replace(SETTINGS, learning_rate=0.1))


LAUNCHED = """
from dataclasses import replace
from pathlib import Path
from brainage_nb.models.run import Job
from brainage_nb.models.train import launch
from tests.models.conftest import make_tiny_cohort
from tests.models.test_damaged_runs import SETTINGS
if __name__ == "__main__":
    store, splits = make_tiny_cohort(Path("FOLDER/volumes"))
    settings = replace(SETTINGS, epochs=10**6, checkpoint_minutes=1e9)
    launch(Job(store, splits, Path("FOLDER/run"), settings), splits, 1, fresh=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_training_processes_end_with_the_one_that_started_them_and_on_sigterm_save_first(tmp_path, number):
    code = LAUNCHED.replace("FOLDER", str(tmp_path))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while "epoch 1/" not in (line := run.stdout.readline()):
        assert line
    processes = psutil.Process(run.pid).children(recursive=True)
    assert len(processes) >= 2
    run.send_signal(number)
    run.stdout.close() if number == signal.SIGKILL else run.stdout.read()
    run.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)  # torchrun takes its time
    for process in alive:
        process.kill()
    assert not alive
    assert number == signal.SIGKILL or list(tmp_path.glob("run/checkpoints/seed1/step-*.pt"))
