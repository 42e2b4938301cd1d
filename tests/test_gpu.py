"""What only a GPU can show: training, resuming, predicting and explaining on it. Skipped without one."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainage_nb.models import resume
from brainage_nb.models.train import train
from brainage_nb.models.vgg16 import FeatureSettings, vgg16_features, volume_features
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.explain import explain
from brainage_nb.workspace import read_csv, read_json, write_json
from tests.models.conftest import make_tiny_cohort, tiny, tiny_settings  # noqa: F401 - fixtures
from tests.models.tiny_bundle import write_scan, write_tiny_bundle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def settings(tiny_settings):  # noqa: F811
    return replace(tiny_settings, device="cuda", epochs=6)


def ages_of(result):
    return result.predictions.set_index("scan_id")["predicted_age"].sort_index()


def error_of(result):
    rows = result.predictions
    return (rows["predicted_age"] - rows["age"]).abs().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_on_the_gpu_and_is_recorded(tiny, settings, tmp_path, precision):  # noqa: F811
    store, splits = tiny
    settings = replace(settings, precision=precision, epochs=30)
    result = train(store, splits, tmp_path / "run", settings)
    assert result.complete and (result.settings["precision"], result.settings["processes"]) == (precision, 1)
    assert torch.cuda.get_device_name() in result.settings["device"]
    assert error_of(result) < 9  # the mean predictor: 15
    assert np.isfinite(result.history[["train_loss", "val_mae", "gradient_norm"]]).all(axis=None)


def test_gpu_and_cpu_learn_the_same(tiny, settings, tmp_path):  # noqa: F811
    store, splits = tiny
    settings = replace(settings, precision="fp32", augmentation=None, epochs=1, learning_rate=3e-4)
    gpu = train(store, splits, tmp_path / "gpu", settings)
    cpu = train(store, splits, tmp_path / "cpu", replace(settings, device="cpu"))
    assert gpu.history["train_loss"].item() == pytest.approx(cpu.history["train_loss"].item(), rel=1e-3)
    assert ages_of(gpu).to_numpy() == pytest.approx(ages_of(cpu).to_numpy(), abs=0.2)


def test_a_run_stopped_on_the_gpu_goes_on_where_it_was(tiny, settings, tmp_path, monkeypatch):  # noqa: F811
    """Not bit for bit as on a CPU: the backward pass of 3D max pooling adds in any order on CUDA."""
    store, splits = tiny
    settings = replace(settings, precision="fp32", epochs=3, checkpoint_minutes=0.0, learning_rate=3e-4)
    whole = train(store, splits, tmp_path / "whole", settings)
    steps = iter(range(1000))

    def stop_after_the_seventh(self, _):
        self.reason = "time" if next(steps) >= 7 else ""
        return bool(self.reason)

    with monkeypatch.context() as patch:
        patch.setattr(resume.StopRequests, "asked", stop_after_the_seventh)
        assert not train(store, splits, tmp_path / "cut", settings).complete
    again = train(store, splits, tmp_path / "cut", settings)
    assert (
        again.complete and again.history["learning_rate"].tolist() == whole.history["learning_rate"].tolist()
    )
    assert again.history["train_loss"].to_numpy() == pytest.approx(whole.history["train_loss"], rel=1e-2)


def test_the_training_module_runs_under_accelerate(tmp_path, settings):
    store, splits = make_tiny_cohort(tmp_path / "volumes")
    splits.to_csv(tmp_path / "splits.csv", index=False)
    launch = (
        "-m accelerate.commands.launch --num_processes 1 --mixed_precision no -m brainage_nb.models.train"
    )
    places = {
        "--volumes": store.folder,
        "--splits": tmp_path / "splits.csv",
        "--run-folder": tmp_path / "run",
        "--settings": tmp_path / "settings.json",
    }
    write_json(settings.to_json(), tmp_path / "settings.json")
    command = [sys.executable, *launch.split(), *(str(part) for pair in places.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert torch.cuda.get_device_name() in read_json(tmp_path / "run" / "settings.json")["device"]
    assert len(read_csv(tmp_path / "run" / "predictions.csv")) == len(splits)


def test_a_bundle_gives_the_same_age_and_map_on_both(tmp_path):
    bundle, scan = write_tiny_bundle(tmp_path / "bundle", n=2), write_scan(tmp_path / "scan.nii", 3)
    on_cpu, on_gpu = load_bundle(bundle, "cpu"), load_bundle(bundle, "cuda")
    here, there = on_cpu.predict(scan), on_gpu.predict(scan)
    assert there.predicted_age == pytest.approx(here.predicted_age, abs=1e-3)
    for method in ("grad_cam", "occlusion"):
        maps = [explain(*pair, method).heat for pair in ((on_cpu, here), (on_gpu, there))]
        assert maps[1] == pytest.approx(maps[0], abs=2e-3 * float(np.abs(maps[0]).max()))


def test_vgg16_gives_the_same_features_on_both():
    volume = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float16)
    networks = [vgg16_features("random_projection").place(device) for device in ("cpu", "cuda")]
    here, there = (
        volume_features(volume, 8.0, network, FeatureSettings(image_size=32)).astype(float)
        for network in networks
    )
    assert np.array_equal(np.isnan(here), np.isnan(there)) and np.isfinite(here).any()
    assert np.nanmax(np.abs(there - here)) < 0.01 * np.nanmax(np.abs(here))
