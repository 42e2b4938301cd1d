from dataclasses import replace

import numpy as np
import pytest
import torch

from brainage_nb.models import compute as preflight
from brainage_nb.models import fit as member_fit
from brainage_nb.models.compute import (
    GPU_FROM_SCANS,
    Placed,
    chosen_device,
    full_float32,
    name_of,
    working_device,
)
from brainage_nb.models.train import train
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.predictors import NetworkEnsemble
from tests.models.tiny_bundle import networks

# PyTorch's "meta" device stands where a GPU would: tensors really move there, but hold no numbers, so
# bringing them back fails.
ELSEWHERE = "meta"


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float16)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


# --- which device ---------------------------------------------------------------------------------------


def test_auto_takes_a_working_gpu_for_many_scans_only(monkeypatch):
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: "")
    assert chosen_device("auto", GPU_FROM_SCANS) == ("cuda", "")
    assert chosen_device("cpu", 1000) == ("cpu", "") and chosen_device("cuda", 1) == ("cuda", "")
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: "this PyTorch lacks kernels for it")
    assert chosen_device("auto", GPU_FROM_SCANS) == ("cpu", "this PyTorch lacks kernels for it")
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: pytest.fail("starting a GPU to look at it"))
    assert chosen_device("auto", GPU_FROM_SCANS - 1) == ("cpu", "")


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"No usable GPU: PyTorch sees no GPU\. Choose the CPU"):
        load_bundle(tmp_path, "cuda")
    with pytest.raises(ValueError, match="device = 'tpu': expected 'cpu' or 'cuda'"):
        load_bundle(tmp_path, "tpu")
    assert name_of(working_device("cpu")) == "the CPU"


def test_full_float32_switches_tf32_off_and_nothing_else():
    backend = torch.backends.cudnn

    def settings():
        return backend.enabled, backend.benchmark, backend.deterministic

    before, tf32 = settings(), backend.allow_tf32
    with full_float32():
        assert settings() == before and not backend.allow_tf32
    assert settings() == before and backend.allow_tf32 == tf32
    assert before[0] and tf32  # PyTorch's defaults; else this shows nothing


def test_training_s_last_predictions_are_in_full_float32_and_with_cudnn(
    tiny, tiny_settings, tmp_path, monkeypatch
):
    computed, seen, backend = member_fit.predict_ages, [], torch.backends.cudnn

    def watched(*arguments, **settings):
        seen.append((backend.enabled, backend.allow_tf32))
        return computed(*arguments, **settings)

    monkeypatch.setattr(member_fit, "predict_ages", watched)
    with pytest.warns(UserWarning, match="TRAINING ON THE CPU"):
        train(*tiny, tmp_path / "run", replace(tiny_settings, epochs=1))
    assert seen == [(True, True), (True, False)]  # validation, then the predictions that are kept


# --- the CPU is the reference ---------------------------------------------------------------------------


def test_the_cpu_computes_ages_exactly_as_written_here(volume):
    members = networks(2)
    ages = NetworkEnsemble(networks(2), flip_averaging=True).predict(volume)
    batch = torch.from_numpy(volume.astype(np.float32))[None, None]
    batch = torch.cat([batch, batch.flip(2)]).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        members = [member.to(memory_format=torch.channels_last_3d) for member in members]
        assert ages.tolist() == [float(member(batch).mean()) for member in members]


def test_a_batch_follows_its_networks_to_another_device_and_the_cpu_networks_stay(volume):
    ensemble, seen = NetworkEnsemble(networks(2), flip_averaging=True, device=ELSEWHERE), []
    for network in ensemble.placed._there:
        network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    with pytest.raises(RuntimeError, match="meta"):  # the number of the first cannot come back from there
        ensemble.predict(volume)
    assert seen == [ELSEWHERE]
    assert ensemble.device.type == ELSEWHERE
    assert {weight.device.type for network in ensemble.networks for weight in network.parameters()} == {"cpu"}


def test_one_thread_at_a_time_is_on_the_gpu():
    import threading
    import time
    from concurrent.futures import ThreadPoolExecutor

    inside, most, lock = [0], [0], threading.Lock()

    def compute(_):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        with lock:
            inside[0] -= 1
        return not torch.backends.cudnn.allow_tf32

    models = [Placed(0, ELSEWHERE, lambda model, device: model) for _ in range(2)]
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda k: models[k % 2].run(compute), range(12)))
    assert most[0] == 1
