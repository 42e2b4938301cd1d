"""Training: right, resumable at any step, and honest about where it runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from brainage_nb.evaluation.runs import read_run
from brainage_nb.models import compute as preflight
from brainage_nb.models.fit import Trainer, VolumeDataset, huber_loss
from brainage_nb.models.network import OwnNetwork
from brainage_nb.models.resume import StopRequests
from brainage_nb.models.run import Job, make_accelerator, write_predictions
from brainage_nb.models.settings import TrainingFailed, TrainingRefused, TrainingSettings, list_members
from brainage_nb.models.train import launch, train
from brainage_nb.predict.saving import _collect_networks
from brainage_nb.volumes.settings import AugmentationSettings, list_changes, name_run
from brainage_nb.volumes.store import StoreError
from brainage_nb.workspace import open_workspace, read_json, write_csv, write_json
from tests.models.conftest import TINY, make_tiny_cohort

pytestmark = pytest.mark.filterwarnings("ignore:TRAINING ON THE CPU")


class StopAfter(StopRequests):
    """Asks to stop at given steps, as a session that ends would."""

    steps_left = 10**9

    def asked(self, accelerator):
        StopAfter.steps_left -= 1
        self.reason = "time" if StopAfter.steps_left <= 0 else ""
        return bool(self.reason)


def same(first, second):
    """Whether two runs are bit-identical but for the seconds they took."""
    pd.testing.assert_frame_equal(
        first.history.drop(columns="seconds"), second.history.drop(columns="seconds"), check_exact=True
    )
    pd.testing.assert_frame_equal(first.predictions, second.predictions, check_exact=True)


def forgetful_network():
    """A small network with dropout, and without BatchNorm."""
    convolution = torch.nn.Conv3d(1, 4, kernel_size=5, stride=2)
    return torch.nn.Sequential(
        convolution, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(2), torch.nn.Flatten(),
        torch.nn.Dropout(0.2), torch.nn.Linear(32, 1),
    )  # fmt: skip


def steady_network():
    return forgetful_network().eval().apply(lambda part: setattr(part, "p", 0.0))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """Folder and result of a whole run whose network draws random numbers of its own in every step."""
    folder = tmp_path_factory.mktemp("forgetful")
    cohort = make_tiny_cohort(folder / "volumes")
    return folder / "run", train(*cohort, folder / "run", TINY, network=forgetful_network)


def make_trainer(tiny, settings, folder):
    job = Job(*tiny, folder, settings)
    accelerator = make_accelerator(settings)
    volumes = VolumeDataset(job.store, job.scans, accelerator.device)
    return job.make_trainer(volumes, job.members[0], accelerator, folder)


def weights(folder):
    return next(folder.glob("checkpoints/*/weights.safetensors")).read_bytes()


def test_a_run_learns_the_planted_age(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    settings = replace(tiny_settings, epochs=25, augmentation=None)
    result = train(store, splits, tmp_path / "run", settings)
    assert result.complete
    error = (result.predictions["predicted_age"] - result.predictions["age"]).abs()
    assert error.groupby(result.predictions["split"]).mean().max() < 6
    assert result.history["val_mae"].iloc[-1] < result.history["val_mae"].iloc[0] / 2


def test_predictions_have_a_row_a_scan_in_the_contract_s_columns(tiny, whole, run):
    store, splits = tiny
    result = whole[1]
    assert list(result.predictions) == [
        "scan_id", "subject_id", "session_id", "split", "fold", "seed", "variant", "age", "predicted_age"
    ]  # fmt: skip
    assert sorted(result.predictions["scan_id"]) == sorted(splits["scan_id"])
    assert set(result.predictions["fold"]) == {-1}
    assert set(result.predictions["variant"]) == {"single"} == {result.settings["variant"]}
    assert result.settings["fingerprint"] == store.fingerprint
    assert {path.name for path in run.iterdir()} == {
        "settings.json", "history.csv", "predictions.csv", "checkpoints"
    }  # fmt: skip


def test_stored_weights_give_the_predictions_of_the_table(tiny, tiny_settings, tmp_path):

    from brainage_nb.models.network import build_network

    store, splits = tiny
    result = train(store, splits, tmp_path / "run", replace(tiny_settings, flip_averaging=True))
    network = build_network(tiny_settings, splits["age"].to_numpy()).eval()
    stored = load_file(tmp_path / "run" / "checkpoints" / "seed0" / "weights.safetensors")
    assert stored["conv1.weight"].dtype == torch.float16
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    volumes = torch.from_numpy(store.read(list(result.predictions["scan_id"]))).float()[:, None]
    with torch.no_grad():
        age = (network(volumes) + network(volumes.flip(2))) / 2
    np.testing.assert_allclose(age.numpy(), result.predictions["predicted_age"], atol=1e-3)


def test_a_finished_run_is_not_trained_again_unless_fresh(tiny, tiny_settings, whole, run):
    calls = []
    again = train(*tiny, run, tiny_settings, on_epoch=calls.append)
    assert not calls and "complete" in again.notes[0]
    same(whole[1], again)
    same(whole[1], train(*tiny, run, tiny_settings, fresh=True, on_epoch=calls.append))
    assert [len(history) for history in calls] == [1, 2, 3]


def test_volumes_that_rotted_are_not_trained_on(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    shard = store.folder / "shard-0001.npy"
    content = bytearray(shard.read_bytes())
    content[1000:1008] = bytes(8)
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard-0001\.npy; S016\)\. Run notebook 03 again"):
        train(store, splits, tmp_path / "run", tiny_settings)
    assert not (tmp_path / "run").exists()


def test_other_settings_are_named_and_refused_unless_fresh(tiny, tiny_settings, run):
    store, splits = tiny
    with pytest.raises(TrainingRefused, match=r"learning_rate: was 0.003, now 0.1.*fresh=True"):
        train(store, splits, run, replace(tiny_settings, learning_rate=0.1))
    with pytest.raises(TrainingRefused, match=r"ages or splits in splits\.csv have changed since"):
        train(store, splits.assign(age=splits["age"] + 1), run, tiny_settings)
    changed_place = replace(tiny_settings, precision="fp32", checkpoint_minutes=1.0)
    assert "complete" in train(store, splits, run, changed_place).notes[0]


def test_predictions_edited_by_hand_are_written_anew_without_training(tiny, tiny_settings, run):
    path, calls = run / "predictions.csv", []
    content = path.read_bytes()
    path.write_bytes(content.replace(b"S029", b"S030", 1))
    with pytest.warns(UserWarning, match=r"predictions\.csv not as this run wrote it"):
        train(*tiny, run, tiny_settings, on_epoch=calls.append)
    assert not calls and path.read_bytes() == content


def test_replaced_scan_files_are_named_and_a_run_that_recorded_none_goes_on(tiny, tiny_settings, run):
    store, splits = tiny
    store.index["source_sha256"] = "another"
    with pytest.raises(TrainingRefused, match="scan files behind the volumes have changed"):
        train(store, splits, run, tiny_settings)
    path = run / "settings.json"
    content = read_json(path)
    del content["identity"]["scan_files"]
    write_json(content | {"identity": content["identity"] | {"copies_1": "4mm-48-0 0"}}, path)
    with pytest.raises(TrainingRefused, match="learned from copies without skull as well, which are no lo"):
        train(store, splits, run, tiny_settings)
    write_json(content, path)
    shutil.rmtree(run / "checkpoints")  # they recorded it too
    assert "complete" in train(store, splits, run, tiny_settings).notes[0]


def test_splits_with_a_subject_in_two_of_them_are_refused(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    splits.loc[5, "subject_id"] = splits.loc[0, "subject_id"]
    with pytest.raises(ValueError, match="1 subjects are in two splits"):
        train(store, splits, tmp_path / "run", tiny_settings)


def test_a_run_older_than_a_setting_goes_on_where_that_is_left_at_its_default(tiny, tiny_settings, run):
    path = run / "settings.json"
    content = read_json(path)
    del content["identity"]["linear"]
    write_json(content, path)
    assert train(*tiny, run, tiny_settings).complete
    with pytest.raises(TrainingRefused, match="linear: was False, now True"):
        train(*tiny, run, replace(tiny_settings, linear=True))


@pytest.mark.parametrize("stops", [(1,), (4,), (5, 3), (2, 2, 2, 2, 2, 1)])
def test_stopping_at_any_step_changes_nothing(tiny, tiny_settings, forgetful, tmp_path, monkeypatch, stops):
    folder, whole = forgetful
    monkeypatch.setattr("brainage_nb.models.train.StopRequests", StopAfter)
    for steps in stops:
        StopAfter.steps_left = steps
        part = train(*tiny, tmp_path / "parts", tiny_settings, network=forgetful_network)
        assert not part.complete
        assert "all is saved" in part.notes[-1]
        assert part.predictions.empty
    StopAfter.steps_left = 10**9
    same(whole, train(*tiny, tmp_path / "parts", tiny_settings, network=forgetful_network))
    assert weights(folder) == weights(tmp_path / "parts")


def test_a_crash_goes_on_from_the_last_checkpoint(tiny, tiny_settings, whole, tmp_path):
    store, splits = tiny
    settings = replace(tiny_settings, checkpoint_minutes=0.0)

    def crash(history):
        if len(history) == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(store, splits, tmp_path / "crashed", settings, on_epoch=crash)
    assert len(list((tmp_path / "crashed" / "checkpoints" / "seed0").glob("step-*.pt"))) == 2
    went_on = train(store, splits, tmp_path / "crashed", tiny_settings)
    same(whole[1], went_on)
    assert "seed0 went on from step" in went_on.notes[-1]
    assert not list((tmp_path / "crashed").rglob("step-*.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_sigterm_save_first(tiny, tiny_settings, whole, tmp_path, number):
    arrived = []

    def outer(received, _frame):
        arrived.append(received)
        raise KeyboardInterrupt

    before = signal.signal(number, outer)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(*tiny, tmp_path / "cut", tiny_settings, on_epoch=lambda _: os.kill(os.getpid(), number))
    finally:
        signal.signal(number, before)
    assert arrived == ([signal.SIGTERM] if number == signal.SIGTERM else [])
    assert len(list((tmp_path / "cut").rglob("step-*.pt"))) == 1
    same(whole[1], train(*tiny, tmp_path / "cut", tiny_settings))


def test_max_minutes_ends_cleanly(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    result = train(store, splits, tmp_path / "run", replace(tiny_settings, max_minutes=1e-6))
    assert not result.complete
    assert "max_minutes" in result.notes[-1]
    assert train(store, splits, tmp_path / "run", replace(tiny_settings, max_minutes=60)).complete


@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_batches_that_are_read_ahead_are_those_asked_for(tiny, n):
    store, _ = tiny
    volumes = VolumeDataset(store, pd.DataFrame({"scan_id": store.scan_ids, "age": 50.0}))
    rows = [np.array([29, 0]), np.array([3]), np.array([17, 16, 15]), *np.arange(5)[:, None]][:n]
    for batch, wanted in zip(volumes.batches(rows), rows, strict=True):
        expected = store.read([store.scan_ids[row] for row in wanted]).astype(np.float32)
        assert np.array_equal(batch[:, 0].numpy(), expected)


def test_a_batch_that_does_not_fit_is_an_error_with_advice(tiny, tiny_settings, tmp_path, monkeypatch):
    def no_room(self, volumes, age, batch_total):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trainer, "compute_gradients", no_room)
    with pytest.raises(TrainingFailed, match=r"5 volume\(s\) at once do not fit.*batch_size.*spacing_mm"):
        train(*tiny, tmp_path / "run", tiny_settings)


def test_folds_hold_out_every_subject_once_and_leave_the_test_split_alone(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    result = train(store, splits, tmp_path / "run", replace(tiny_settings, epochs=1, folds=3, seeds=(0, 1)))
    rows = result.predictions
    single, mean = rows[rows["variant"] == "single"], rows[rows["variant"] == "mean"]
    assert result.settings["variant"] == "mean"
    dealt = splits[splits["split"] != "test"]
    held_out = single[(single["split"] != "test") & (single["seed"] == 1)]
    assert sorted(held_out["scan_id"]) == sorted(dealt["scan_id"])
    assert set(single[single["split"] == "test"].groupby("scan_id").size()) == {6}
    assert sorted(mean["scan_id"]) == sorted(splits["scan_id"])
    assert set(mean["seed"]) == {-1}
    assert set(mean.loc[mean["split"] == "test", "fold"]) == {-1}
    one = mean[mean["split"] != "test"].iloc[0]
    own = single[single["scan_id"] == one["scan_id"]]
    assert set(own["fold"]) == {one["fold"]}
    assert np.isclose(own["predicted_age"].mean(), one["predicted_age"])


def test_a_stopped_sweep_goes_on_with_the_members_that_are_missing(
    tiny, tiny_settings, tmp_path, monkeypatch
):
    store, splits = tiny
    settings = replace(tiny_settings, epochs=2, seeds=(4, 5))
    whole = train(store, splits, tmp_path / "whole", settings)
    monkeypatch.setattr("brainage_nb.models.train.StopRequests", StopAfter)
    StopAfter.steps_left = 11  # 8 steps of the first member, 3 of the second
    assert not train(store, splits, tmp_path / "parts", settings).complete
    finished = tmp_path / "parts" / "checkpoints" / "seed4"
    assert sorted(path.name for path in finished.iterdir()) == [
        "history.csv", "predictions.csv", "weights.safetensors"
    ]  # fmt: skip
    StopAfter.steps_left = 10**9
    same(whole, train(store, splits, tmp_path / "parts", settings))


def test_a_diverging_run_says_what_to_set(tiny, tiny_settings, tmp_path):
    settings = replace(tiny_settings, learning_rate=1e12, weight_decay=1.0, epochs=9)
    with pytest.raises(TrainingFailed, match=r"learning_rate \(1e\+12\)"):
        train(*tiny, tmp_path / "run", settings)


def test_a_run_folder_of_another_kind_is_refused(tiny, tiny_settings, tmp_path):
    write_json({"variant": "late"}, tmp_path / "run" / "settings.json")
    with pytest.raises(TrainingRefused, match="another kind"):
        train(*tiny, tmp_path / "run", tiny_settings)


def test_scans_without_volume_are_left_out_and_said(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    more = pd.concat([splits, splits.tail(1).assign(scan_id="GONE", subject_id="GONE")])
    with pytest.warns(UserWarning, match=r"1 of 31 scans have no volume in the store.*GONE"):
        result = train(store, more, tmp_path / "run", replace(tiny_settings, epochs=1))
    assert len(result.predictions) == 30


def test_a_run_of_one_modality_never_reads_the_volumes_of_another(tiny, tiny_settings, tmp_path):
    store, splits = tiny
    with pytest.raises(TrainingRefused, match=r"modality = 'T2w', and these volumes are of T1w"):
        train(store, splits, tmp_path / "run", replace(tiny_settings, modality="T2w"))
    with pytest.raises(ValueError, match="modality: 't2' is none of T1w, T2w"):
        replace(tiny_settings, modality="t2")
    assert name_run("resnet18", "resnet18", "T1w") == "resnet18"
    assert name_run("resnet18", "resnet18", "T2w") == "resnet18_t2w"
    assert name_run("mine", "resnet18", "T2w") == "mine"


def test_a_required_gpu_that_is_missing_raises_with_the_reason(tiny_settings, monkeypatch):
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: "PyTorch sees no GPU")
    with pytest.raises(TrainingRefused, match=r"PyTorch sees no GPU.*GPU runtime"):
        preflight.choose_device(TrainingSettings(device="cuda"))
    with pytest.warns(UserWarning, match="TRAINING ON THE CPU"):
        assert preflight.choose_device(TrainingSettings()).type == "cpu"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_is_what_the_card_does_natively(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert preflight.choose_precision(TrainingSettings(), torch.device("cuda")) == precision
    assert preflight.choose_precision(TrainingSettings(), torch.device("cpu")) == "fp32"
    with pytest.raises(TrainingRefused, match="needs a GPU"):
        preflight.choose_precision(TrainingSettings(precision="bf16"), torch.device("cpu"))


def test_a_job_that_does_not_fit_the_disk_is_refused_with_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(TrainingRefused, match=r"2\.79 GB of disk needed.*15 model.*1\.0 GB free"):
        preflight.check_disk(tmp_path, 33_161_409, 15)


def test_settings_survive_json_and_refuse_what_is_unknown():
    settings = TrainingSettings(seeds=(3, 4), widths=(4, 4, 8, 8), augmentation=None)
    assert TrainingSettings.from_json(settings.to_json()) == settings
    assert TrainingSettings.from_json(TrainingSettings().to_json()) == TrainingSettings()
    with pytest.raises(ValueError, match="learning_rat"):
        TrainingSettings.from_json({"learning_rat": 1})
    with pytest.raises(ValueError, match="folds = 1: expected"):
        TrainingSettings(folds=1)


def test_the_best_epoch_comes_from_neither_the_held_out_fold_nor_the_test_split(tiny, tiny_settings):
    test = set(np.flatnonzero(tiny[1]["split"] == "test"))
    for member in list_members(tiny[1], replace(tiny_settings, folds=3)):
        assert not test & (set(member.train) | set(member.validation))
        assert not set(member.predicted) & set(member.train)
        assert not set(member.predicted) & set(member.validation)


def test_the_folds_of_the_table_train_and_another_number_is_refused(tiny, tiny_settings):
    splits = tiny[1].reset_index(drop=True)
    is_test = splits["split"] == "test"
    splits["fold"] = (splits.index % 3).where(~is_test, -1)
    for member in list_members(splits, replace(tiny_settings, folds=3)):
        assert set(splits["fold"].iloc[member.predicted]) == {member.fold, -1}
    with pytest.raises(ValueError, match=r"in 3 folds \(0, 1, 2\).* Set folds = 3 here, or deal others in"):
        list_members(splits, replace(tiny_settings, folds=5))
    of_two = splits[splits["fold"] != 1]  # nobody of one fold has such a scan
    assert [one.fold for one in list_members(of_two, replace(tiny_settings, folds=2))] == [0, 2]


def test_a_recipe_gives_defaults_and_what_is_asked_beside_it_is_done():
    best = TrainingSettings.of_recipe("best", epochs=7)
    assert (best.linear, best.keep, best.epochs, best.recipe) == (True, "last", 7, "best")
    asked = TrainingSettings.of_recipe("best", linear=False, weight_decay=2)
    assert (asked.linear, asked.keep, asked.recipe) == (False, "last", "best with linear=False")
    changed = TrainingSettings.of_recipe("best", linear=False, augmentation=AugmentationSettings(blur_mm=2))
    assert list_changes(changed, "best") == "linear=False instead of True; blur_mm=2.0 instead of 4.0"
    assert TrainingSettings.of_recipe("reference") == TrainingSettings()
    assert TrainingSettings().recipe == "reference"
    with pytest.raises(ValueError, match="expected one of reference, best"):
        TrainingSettings.of_recipe("bset")


@pytest.mark.parametrize(
    ("recipe", "asked", "told"),
    [
        ("reference", {"inner_fraction": 0.2}, "folds is 0"),
        ("best", {"keep": "best"}, "inner_fraction = 0.0: expected"),
        ("best", {"loss": "hubr"}, "Did you mean huber"),
        ("best", {"weight_decay": -1}, "no number below 0"),
        ("best", {"epochs": float("nan")}, "a whole number"),
    ],
)
def test_a_setting_that_would_change_nothing_or_is_none_is_refused(recipe, asked, told):
    with pytest.raises(ValueError, match=told):
        TrainingSettings.of_recipe(recipe, **asked)


def test_where_no_epoch_is_chosen_all_others_are_trained_on_and_the_last_epoch_is_kept(
    tiny, tiny_settings, tmp_path
):
    settings = replace(tiny_settings, folds=3, keep="last", inner_fraction=0.0, learning_rate=1e-7)
    scans = tiny[1].reset_index(drop=True)
    rest = set(np.flatnonzero(scans["split"] != "test"))
    for member in list_members(scans, settings):
        assert set(member.train) | set(member.validation) == rest
        assert set(member.validation) <= set(member.predicted) and not set(member.train) & set(
            member.predicted
        )
    with pytest.raises(ValueError, match="inner_fraction"):
        replace(settings, keep="best")
    scans.loc[scans["split"] == "val", "age"] = scans.loc[scans["split"] == "train", "age"].mean()
    best, last = (  # who learns gets worse at people who all have the mean age
        train(
            tiny[0], scans, tmp_path / keep, replace(tiny_settings, epochs=3, learning_rate=0.03, keep=keep)
        )
        for keep in ("best", "last")
    )
    assert best.history["val_mae"].equals(last.history["val_mae"])
    assert best.history["val_mae"].idxmin() < 2
    assert not best.predictions["predicted_age"].equals(last.predictions["predicted_age"])


@pytest.mark.slow  # chosen steps, a crash, signals and torn writes are tested above and in test_resume
def test_a_run_killed_at_a_random_moment_or_in_a_write_ends_bit_for_bit_the_same():
    script = Path(__file__).parents[2] / "benchmarks" / "resume.py"
    command = [sys.executable, script, "--runs", "2", "--kills", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["holds"]
    assert outcome["kills"] >= 1


def test_several_processes_on_a_cpu_are_refused(tiny, tiny_settings, tmp_path):
    with pytest.raises(TrainingRefused, match="processes = 2: several processes train on GPUs only"):
        train(*tiny, tmp_path / "run", replace(tiny_settings, processes=2))


@pytest.mark.slow
def test_a_failing_launch_shows_its_last_lines(tiny, tiny_settings, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    settings = replace(tiny_settings, init_from=str(tmp_path / "broken.pth"))
    with pytest.raises(TrainingFailed, match="rank0"):
        launch(Job(*tiny, tmp_path / "run", settings), tiny[1], 2, fresh=False)


def test_the_average_of_no_time_follows_the_weights_and_its_statistics_are_those_of_the_data(
    tiny, tiny_settings, tmp_path
):
    trainer = make_trainer(tiny, replace(tiny_settings, ema_epochs=0.0), tmp_path)
    trainer.train_epoch(StopRequests(), lambda _: None)
    average = trainer.average.module
    for own, averaged in zip(trainer.network.parameters(), average.parameters(), strict=True):
        assert torch.equal(own, averaged)
    batches = list(trainer.volumes.batches(trainer.draw_precise_batches()))
    stem = average.conv1(torch.cat(batches)).detach()
    running = trainer.network.bn1.running_var
    assert ((running / stem.var((0, 2, 3, 4)) - 1).abs() > 0.1).any()  # four steps of a tenth lag behind
    trainer._validate()
    assert not average.training and average.bn1.momentum == 0.1
    assert torch.allclose(average.bn1.running_mean, stem.mean((0, 2, 3, 4)), atol=1e-3)
    assert torch.allclose(average.bn1.running_var, stem.var((0, 2, 3, 4)), rtol=0.02)


def test_the_average_forgets_with_its_time_constant(tiny, tiny_settings, tmp_path):
    average = make_trainer(tiny, replace(tiny_settings, ema_epochs=25.0), tmp_path).average  # 100 steps
    model = torch.nn.Linear(1, 1, bias=False)
    average = type(average)(model, multi_avg_fn=average.multi_avg_fn)
    torch.nn.init.constant_(model.weight, 0.0)
    average.update_parameters(model)
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(100):
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - np.exp(-1), abs=1e-3)


# --- a network, a loss, a loop of one's own --------------------------------------------------------------


def test_a_network_of_one_s_own_learns_is_recorded_and_its_bundle_refused(tiny, tiny_settings, tmp_path):
    from monai.networks.nets import Regressor

    network = Regressor((1, 16, 16, 16), (1,), channels=(4, 8), strides=(2, 2))
    settings = replace(tiny_settings, epochs=25, augmentation=None)
    result = train(*tiny, tmp_path / "runs" / "own", settings, network=network)
    error = (result.predictions["predicted_age"] - result.predictions["age"]).abs()
    assert error.groupby(result.predictions["split"]).mean().max() < 9 < tiny[1]["age"].std()
    assert result.settings["own"] == {"network": "monai.networks.nets.regressor.Regressor", "loss": ""}
    with pytest.raises(TrainingRefused, match=r"own_network: was 'monai.*Regressor', now None"):
        train(*tiny, tmp_path / "runs" / "own", settings)
    with pytest.raises(ValueError, match=r"network of your own.*runs nothing"):
        _collect_networks(tmp_path / "runs" / "own", result.settings)


def squared(predicted, age):
    return (predicted - age) ** 2


def test_a_loss_of_one_s_own_is_what_is_minimised(tiny, tiny_settings, tmp_path):
    settings = replace(tiny_settings, linear=True)
    result = train(*tiny, tmp_path / "run", settings, loss=squared)
    assert result.settings["own"]["loss"] == f"{__name__}.squared"
    assert result.settings["settings"]["loss"] == "own"
    assert (result.history["train_loss"] >= result.history["train_mae"] ** 2).all()
    with pytest.raises(ValueError, match=r"The loss gives \(\) for 5 ages"):
        train(*tiny, tmp_path / "mean", settings, loss=lambda *ages: squared(*ages).mean())


@pytest.mark.parametrize(
    ("changes", "own", "told"),
    [
        ({"loss": "own"}, {}, "give it as train"),
        ({"cluster": "local", "seeds": (1, 2)}, {"loss": squared}, "in this process only"),
    ],
)
def test_what_a_network_or_loss_of_one_s_own_cannot_do_is_refused(
    tiny, tiny_settings, tmp_path, changes, own, told
):
    with pytest.raises(TrainingRefused, match=told):
        train(*tiny, tmp_path / "run", replace(tiny_settings, **changes), **own)


def test_a_loop_by_hand_over_the_stored_volumes_writes_what_notebook_06_evaluates(tiny, tmp_path):
    store, splits = tiny
    train_set = VolumeDataset(store, splits[splits["split"] == "train"])
    volume, age = train_set[3]
    assert volume.shape == (1, 16, 16, 16) and volume.dtype == torch.float32 == age.dtype
    assert np.array_equal(volume[0].numpy(), store[splits[splits["split"] == "train"].iloc[3]["scan_id"]])
    torch.manual_seed(0)
    network, optimiser = OwnNetwork(steady_network(), 50.0, 15.0), None
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(20):
        for volumes, ages in torch.utils.data.DataLoader(train_set, batch_size=6, shuffle=True):
            optimiser.zero_grad()
            huber_loss(network(volumes), ages).mean().backward()
            optimiser.step()
    with torch.no_grad():
        batches = torch.utils.data.DataLoader(VolumeDataset(store, splits), batch_size=6)
        predicted = np.concatenate([network(volumes).numpy() for volumes, _ in batches])
    folder = write_predictions(splits, predicted, tmp_path / "runs" / "by_hand", store)
    ws = open_workspace(tmp_path)
    for name in ("splits.csv", "cohort.csv"):
        write_csv(splits.assign(source="tiny"), ws.path(name))
    write_csv(splits.assign(kept=True, reason="", flags="", detail=""), ws.path("cleaning.csv"))
    run = read_run(ws, folder.name)
    mean = np.abs(run.predictions["predicted_age"] - run.predictions["age"]).mean()
    assert mean < 9
