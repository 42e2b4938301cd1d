import json
import shutil
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from brainage_nb.bundle_format import BundleError, zip_bundle
from brainage_nb.evaluation.evaluate import evaluate_runs, headline_table
from brainage_nb.evaluation.plots import draw_figures
from brainage_nb.evaluation.report import write_report
from brainage_nb.models.settings import RECIPES, TrainingSettings
from brainage_nb.models.train import train
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Failure
from brainage_nb.predict.predictors import round_weights
from brainage_nb.predict.saving import current_bundle, facts_of_run, save_bundle, update_bundle, write_card
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.store import VolumeStore, build_store
from brainage_nb.workspace import open_workspace, read_json, sha256_of, write_csv, write_json
from tests.evaluation.fake_workspace import (
    PREDICTION_COLUMNS,
    cohort_frame,
    simulated,
    write_run,
    write_settings,
    write_workspace,
)
from tests.models.tiny_bundle import (
    ARCHITECTURE,
    SETTINGS,
    head_array,
    manifest,
    networks,
    noisy_head,
    write_scan,
    write_tiny_bundle,
)

SPLIT = ["train"] * 10 + ["val"] * 5 + ["test"] * 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", n=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with a run of two seeds, one epoch each, on eighteen small heads."""
    ws = open_workspace(tmp_path_factory.mktemp("trained"))
    rng = np.random.default_rng(0)
    scans = pd.DataFrame(
        {"subject_id": [f"{k:03d}" for k in range(len(SPLIT))], "session_id": "", "split": SPLIT}
    )
    scans["scan_id"], scans["age"] = (
        scans["subject_id"],
        np.linspace(25, 80, len(SPLIT))[rng.permutation(len(SPLIT))],
    )
    scans["image"] = [str(write_scan(ws.path(f"{k}.nii"), k)) for k in range(len(SPLIT))]
    scans = scans.assign(sex="F", site="A", source="folder", fold=-1)
    hashes = [sha256_of(image) for image in scans["image"]]
    write_csv(scans.drop(columns=["split", "fold"]), ws.path("cohort.csv"))
    write_csv(scans.drop(columns=["source"]), ws.path("splits.csv"))
    write_csv(
        scans.assign(sha256=hashes, voxel_mm="4 x 4 x 4", kept=True),
        ws.path("cleaning.csv"),
    )
    store = build_store(scans, ws.path("volumes"), SETTINGS, n_jobs=1).store
    chosen = TrainingSettings(
        epochs=1, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], seeds=(0, 1), device="cpu",
        processes=1, augmentation=None, learning_rate=1e-3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it trains without a GPU
        train(store, scans, ws.run("resnet18"), chosen)
    return ws


@pytest.fixture(scope="module")
def saved(trained):
    return save_bundle(trained.run("resnet18"), licence="CC BY 4.0")


def test_a_saved_model_predicts_what_the_run_predicted(trained, saved):
    bundle, expected = load_bundle(saved), trained.read("runs/resnet18/predictions.csv")
    expected = expected[expected["variant"] == "mean"].set_index("scan_id")["predicted_age"]
    for row in trained.read("splits.csv").iloc[::4].itertuples():
        assert bundle.predict(row.image).predicted_age == pytest.approx(expected[row.scan_id], abs=1e-4)
    assert bundle.manifest["reproduced_within_years"] < 1e-4


def test_the_regression_beside_the_network_is_saved_too(trained, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    store = VolumeStore(next(path for path in ws.path("volumes").iterdir() if path.is_dir()))
    chosen = TrainingSettings(
        epochs=2, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], device="cpu", processes=1,
        augmentation=None, learning_rate=1e-3, **RECIPES["best"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it trains without a GPU
        result = train(store, ws.read("splits.csv"), ws.run("soft"), chosen)
    bundle, rows = load_bundle(save_bundle(ws.run("soft"))), result.predictions.set_index("scan_id")
    assert bundle.manifest["trained_by_recipe"] == "best"
    assert bundle.manifest["architecture"]["linear_edge"] == SETTINGS.size
    image = ws.path("0.nii")
    assert bundle.predict(image).predicted_age == pytest.approx(rows["predicted_age"]["000"], abs=1e-4)
    bundle.model.flip_averaging = False
    assert abs(bundle.predict(image).predicted_age - rows["predicted_age"]["000"]) > 1e-4


def test_where_everybody_teaches_all_are_in_the_bundle_and_judged_out_of_fold(trained, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    store = VolumeStore(next(path for path in ws.path("volumes").iterdir() if path.is_dir()))
    chosen = TrainingSettings(
        epochs=1, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], device="cpu", processes=1,
        augmentation=None, learning_rate=1e-3, keep="last", inner_fraction=0.0, folds=3, final=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it trains without a GPU
        rows = train(store, ws.read("splits.csv"), ws.run("final"), chosen).predictions
    single = rows[rows["variant"] == "single"]
    assert sorted(single["scan_id"]) == sorted(ws.read("splits.csv")["scan_id"])
    assert set(rows["split"]) == {"train"} and set(single["fold"]) == {0, 1, 2}
    manifest = load_bundle(save_bundle(ws.run("final"))).manifest
    assert (manifest["training"]["n_subjects"], len(manifest["members"])) == (len(SPLIT), 3)
    assert list(manifest["figures"]) == ["out_of_fold"]
    assert {"kind": "out-of-fold", "n_calibration": len(SPLIT)}.items() <= manifest["interval"].items()
    write_csv(ws.read("cleaning.csv").assign(reason="", detail="", flags=""), ws.path("cleaning.csv"))
    evaluation = evaluate_runs(ws, "final,resnet18", n_bootstrap=20)
    assert list(headline_table(evaluation.results).index) == ["resnet18, test", "final, out of fold"]
    assert {"a": "final", "b": "resnet18"}.items() <= evaluation.comparisons.iloc[-1].to_dict().items()
    write_report(evaluation, draw_figures(evaluation))
    page = ws.path("evaluation", "report.html").read_text(encoding="utf-8")
    assert "everybody taught, and no test split is claimed" in page


def test_training_starts_from_a_bundle_but_not_from_one_that_saw_its_test_scans(trained, saved, tmp_path):
    from brainage_nb.models.settings import TrainingRefused
    from brainage_nb.volumes.store import current_store

    store, splits = current_store(trained.path("volumes")), trained.read("splits.csv")
    settings = TrainingSettings(
        epochs=1, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], device="cpu", processes=1,
        augmentation=None, learning_rate=1e-12, ema_epochs=0.0,
        init_from=str(zip_bundle(saved, tmp_path / "m.zip")),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrainingRefused, match="has learned from 5 of the 8 scans"):
            train(store, splits, tmp_path / "leak", settings)
        inside = replace(settings, init_from=str(saved / "member-00.safetensors"))
        with pytest.raises(TrainingRefused, match="has learned from"):
            train(store, splits, tmp_path / "leak", inside)
        kept = sorted(trained.run("resnet18").rglob("*"))
        for start in (str(saved), str(saved / "nowhere.pth")):  # refused before anything is deleted
            with pytest.raises(TrainingRefused):
                train(store, splits, trained.run("resnet18"), replace(settings, init_from=start), fresh=True)
        assert sorted(trained.run("resnet18").rglob("*")) == kept
        others = splits.assign(split=["train" if s != "test" else "val" for s in splits["split"]])
        result = train(store, others, tmp_path / "run", settings)
    assert result.complete
    start = load_bundle(saved).model.networks[0].state_dict()["layer4.0.conv2.weight"].numpy()
    weights = load_file(next(tmp_path.glob("run/checkpoints/*/weights.safetensors")))
    np.testing.assert_allclose(weights["layer4.0.conv2.weight"].astype(float), start, atol=1e-3)


def test_a_bundle_that_started_from_another_knows_whom_that_one_had_seen(trained, saved, tmp_path):
    from brainage_nb.models.network import list_training_people
    from brainage_nb.models.settings import TrainingRefused
    from brainage_nb.volumes.store import current_store

    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "heir"))
    store, splits = current_store(ws.path("volumes")), ws.read("splits.csv")
    settings = TrainingSettings(
        epochs=1, widths=ARCHITECTURE["widths"], blocks=ARCHITECTURE["blocks"], device="cpu", processes=1,
        augmentation=None, init_from=str(saved),
    )  # fmt: skip
    strangers = splits[splits["split"] == "test"].assign(split=["train", "train", "val"])
    judged = splits.assign(split=["val" if subject == "003" else "train" for subject in splits["subject_id"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_csv(strangers, ws.path("splits.csv"))
        train(store, strangers, ws.run("heir"), settings)
        heir = save_bundle(ws.run("heir"))
        with pytest.raises(TrainingRefused, match="has learned from 1 of the 1 scans"):
            train(store, judged, tmp_path / "leak", replace(settings, init_from=str(heir)))
    bundle = load_bundle(heir)
    assert bundle.manifest["training"]["n_subjects"] == 3
    assert bundle.trained_on(["003", "016", "nobody"]) == [True, True, False]
    assert [len(list_training_people(path)) for path in (saved, heir, "weights.pth")] == [1, 2, 0]


@pytest.fixture(scope="module")
def svr_saved(trained):
    """A bundle of VGG16 features and SVR, trained on the same heads."""
    from brainage_nb.models.svr import train_vgg_svr
    from brainage_nb.models.vgg16 import FeatureSettings, extract_features, vgg16_features
    from brainage_nb.volumes.store import current_store

    network = vgg16_features("random_projection", pooling="mean", seed=1).place()
    splits = trained.read("splits.csv")
    features = extract_features(
        current_store(trained.path("volumes")),
        trained.path("features"),
        network,
        settings=FeatureSettings(image_size=32),
        scan_ids=splits["scan_id"],
    )
    run = train_vgg_svr(features, splits, trained.run("vgg16_svr"), network)
    return save_bundle(run.folder)


def test_a_saved_svr_predicts_what_its_run_predicted(trained, svr_saved):
    bundle, expected = load_bundle(svr_saved), trained.read("runs/vgg16_svr/predictions.csv")
    assert bundle.manifest["kind"] == "vgg16_svr"
    expected = expected[expected["variant"] == bundle.model.variant].set_index("scan_id")["predicted_age"]
    for row in trained.read("splits.csv").iloc[::4].itertuples():
        assert bundle.predict(row.image).predicted_age == pytest.approx(expected[row.scan_id], abs=1e-4)
    assert expected.std() > 0.1


def test_a_damaged_svr_is_refused(svr_saved, tmp_path):
    shutil.copytree(svr_saved, tmp_path / "damaged")
    file = tmp_path / "damaged" / "vgg_svr.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    with pytest.raises(BundleError, match="vgg_svr"):
        load_bundle(tmp_path / "damaged")


def test_a_zipped_bundle_predicts_the_same(trained, saved, tmp_path):
    packed = zip_bundle(saved, tmp_path / "model.zip")
    scan = trained.path("17.nii")
    assert load_bundle(packed).predict(scan) == load_bundle(saved).predict(scan)


def test_the_bundle_says_on_whom_it_was_trained_and_hides_who_they_are(trained, saved):
    bundle = load_bundle(saved)
    training = bundle.manifest["training"]
    assert (training["n_subjects"], sum(training["age_counts"])) == (15, 15)
    assert training["voxel_mm"] == [4.0, 4.0]
    assert bundle.trained_on(["000", "014", "015", "000 "]) == [True, True, False, False]
    text = (saved / "bundle.json").read_text()
    assert '"000"' not in text and str(trained.root) not in text


def test_a_training_scan_is_recognised_by_its_content(trained, saved, tmp_path):
    bundle = load_bundle(saved)
    copy = shutil.copy(trained.path("3.nii"), tmp_path / "renamed.nii")
    assert "training_scan" in [caution.code for caution in bundle.predict(copy).warnings]
    assert "training_scan" not in [
        caution.code for caution in bundle.predict(trained.path("17.nii")).warnings
    ]


def test_interval_and_correction_come_from_validation_rows_alone(trained, saved):
    manifest = load_bundle(saved).manifest
    assert manifest["interval"]["n_calibration"] == 5
    assert manifest["interval"]["quantile"] is None and "cannot support" in manifest["interval"]["support"]
    assert manifest["correction"] or "slope" in manifest["correction_refused"]
    result = load_bundle(saved).predict(trained.path("17.nii"))
    assert result.high == np.inf and result.to_dict()["high"] is None
    assert "few_calibration_subjects" in [caution.code for caution in result.warnings]


def test_the_bundle_takes_the_interval_of_the_report_and_keeps_it_when_saved_again(trained, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    bundle = save_bundle(ws.run("resnet18"))
    copied = shutil.copytree(bundle, tmp_path / "elsewhere")
    found = evaluate_runs(ws, "resnet18", level=0.5, n_bootstrap=20)
    write_json(found.results, ws.path("evaluation", "results.json"))
    calibration = found.runs["resnet18"].calibration
    assert "copies made before keep their own (90%)" in update_bundle(ws.run("resnet18"), calibration)
    row = found.predictions.set_index("scan_id").loc["017"]
    result = load_bundle(bundle).predict(ws.path("17.nii"))
    assert (result.low, result.high) == pytest.approx((row["low"], row["high"]), abs=1e-3)
    assert result.level == 0.5 and load_bundle(copied).interval.level == 0.9
    assert "50% conformal interval" in (bundle / "README.md").read_text()
    said = update_bundle(ws.run("resnet18"), calibration)
    calibrated = "calibrated on 5 subjects (validation, who also chose the epoch); by chance alone"
    assert said.startswith(f"the bundle gives this 50% conformal interval, {calibrated}")
    shutil.rmtree(bundle)
    assert "no bundle" in update_bundle(ws.run("resnet18"), calibration) and not bundle.exists()
    again = load_bundle(current_bundle(ws.run("resnet18")))
    assert again.interval.to_dict() == calibration.interval.to_dict()


@pytest.mark.parametrize("folds", [False, True])
def test_the_correction_carries_its_own_error_of_the_scans_that_judge_the_run(folds, tmp_path):
    scans = cohort_frame(120)
    scans = scans[scans["split"] != "test"] if folds else scans
    ws = write_workspace(tmp_path, scans)
    if folds:
        rows = scans.assign(
            fold=np.arange(len(scans)) % 4, seed=0, variant="single", predicted_age=simulated(scans)
        )
        write_csv(rows[PREDICTION_COLUMNS], ws.run("run") / "predictions.csv")
        write_settings(ws, "run", "single")
    else:
        write_run(ws, "run", scans, simulated(scans))
    found = evaluate_runs(ws, n_bootstrap=5).runs["run"]
    kept = facts_of_run(found.run, ws)["correction"]
    assert kept["mae"] == pytest.approx(found.corrected[found.run.judged_on]["mae"]["value"])
    card = write_card(manifest(correction=kept))
    assert f"for comparing gaps: such ages err by {kept['mae']:.1f} years" in card


def test_a_channel_that_never_fires_does_not_keep_a_model_from_its_bundle(trained, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    file = next(ws.run("resnet18").glob("checkpoints/*/weights.safetensors"))
    weights = load_file(file)
    weights["layer4.0.bn2.running_var"][0] = 0
    save_file(weights, file)
    load_bundle(save_bundle(ws.run("resnet18")))


@pytest.mark.parametrize("torn", ["", "[]"])
def test_a_torn_bundle_of_a_run_is_none_and_is_saved_again(torn, trained, saved, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    run = ws.run("resnet18")
    (run / "bundle" / "bundle.json").write_text(torn)
    calibration = evaluate_runs(ws, "resnet18", n_bootstrap=20).runs["resnet18"].calibration
    assert "no bundle of this training yet" in update_bundle(run, calibration)
    assert load_bundle(current_bundle(run)).manifest["training"]["n_subjects"] == 15


def test_the_card_states_figures_licence_and_use(saved):
    card = (saved / "README.md").read_text()
    for said in (
        "15 people",
        "mean predictor",
        "90% conformal interval, calibrated on 5 subjects (validation",
        "CC BY 4.0",
        "not a medical device",
    ):
        assert said in card


def test_the_card_says_what_one_test_scan_leaves_undefined(saved):
    manifest = read_json(saved / "bundle.json")
    unknown = {"value": None, "low": None, "high": None}
    one = {"value": 3.0, "low": None, "high": None}
    manifest["figures"]["test"] |= {"n": 1, "mae": one, "r": unknown, "mean_predictor_mae": one}
    assert "| test | 1 | 3.00 | not defined | 3.00 |" in write_card(manifest)


def test_nothing_that_a_maker_wrote_is_markup_in_the_card():
    figures = manifest()["figures"]["test"]
    licence = "*free*\n# big [here](javascript:x) <script>x</script> `y` under_score _z_"
    card = write_card(manifest(licence=licence, figures={"a|b": figures}))
    assert (
        r"\*free\* \# big [here]\(javascript:x) &lt;script&gt;" in card and r"'y' under_score \_z\_." in card
    )
    assert r"| a\|b | 50 | 5.00 [4.00, 6.00] |" in card


def test_a_run_that_is_not_finished_has_no_bundle(trained, tmp_path):
    ws = open_workspace(shutil.copytree(trained.root, tmp_path / "copy"))
    shutil.rmtree(ws.path("runs", "resnet18", "checkpoints"))
    with pytest.raises(FileNotFoundError, match="no finished model"):
        save_bundle(ws.run("resnet18"))


def test_large_weights_are_rounded_to_half_precision_where_they_fit_and_norms_stay_exact():
    (network,) = networks()
    assert {name for name, array in round_weights(network).items() if array.dtype == np.float32} >= {
        "bn1.running_var", "fc.bias", "age_sd",
    }  # fmt: skip
    assert round_weights(network)["conv1.weight"].dtype == np.float16
    network.fc.weight.data *= 1e6
    rounded = round_weights(network)
    np.testing.assert_array_equal(rounded["fc.weight"], network.fc.weight.numpy(force=True))


# --- one prediction -------------------------------------------------------------------------------------


def test_gap_interval_and_corrections_follow_from_the_prediction(tiny, tmp_path):
    result = load_bundle(tiny).predict(write_scan(tmp_path / "a.nii.gz", 5), age=44)
    assert result.predicted_age == pytest.approx(np.mean(result.members))
    assert (result.low, result.high) == pytest.approx((result.predicted_age - 8, result.predicted_age + 8))
    assert result.corrected_age == pytest.approx((result.predicted_age - 10) / 0.8)
    assert result.corrected_mae == result.to_dict()["corrected_mae"] == 6.5
    assert "(such ages err by 6.5 on average)" in result.frame().to_string()
    assert result.gap == pytest.approx(result.predicted_age - 44)
    assert result.adjusted_gap == pytest.approx(result.predicted_age - (10 + 0.8 * 44))


def test_the_true_age_does_not_change_the_prediction(tiny, tmp_path):
    bundle, scan = load_bundle(tiny), write_scan(tmp_path / "a.nii", 5)
    assert bundle.predict(scan, age=20).predicted_age == bundle.predict(scan, age=80).predicted_age
    assert bundle.predict(scan).gap is None


@pytest.mark.parametrize("age", [-1, 500, np.inf])
def test_an_age_that_is_none_is_refused(age, tiny, tmp_path):
    with pytest.raises(ValueError, match="expected years from 0 to 120"):
        load_bundle(tiny).predict(tmp_path / "a.nii", age=age)


def test_one_bad_scan_does_not_end_the_rest(tiny, tmp_path):
    scans = [write_scan(tmp_path / f"{k}.nii", k) for k in range(4)]
    scans[1].write_text("no scan")
    scans.insert(3, tmp_path / "missing.nii")
    bundle = load_bundle(tiny)
    results = list(bundle.predict_many(scans, [30, 40, 999, 50, 60], n_jobs=1))
    assert [isinstance(result, Failure) for result in results] == [False, True, True, True, False]
    assert [result.code for result in results[1:4]] == ["unreadable", "failed", "missing"]
    assert results[0] == bundle.predict(scans[0], 30) and results[4] == bundle.predict(scans[4], 60)


def codes(bundle, scan, age=None):
    return [caution.code for caution in load_bundle(bundle).predict(scan, age).warnings]


def test_a_scan_like_the_training_scans_raises_no_warning_but_disagreement(tiny, tmp_path):
    assert codes(tiny, write_scan(tmp_path / "a.nii", 9), age=50) == ["members_disagree"]


def test_what_is_no_head_of_that_kind_is_noticed(tiny, tmp_path):
    inverted = 900 - np.clip(head_array(1), 0, 900).astype(np.int16)
    noise = np.random.default_rng(0).integers(0, 1000, (48, 48, 48)).astype(np.int16)
    for name, array in {"inverted": inverted, "noise": noise}.items():
        assert "unlike_training" in codes(tiny, write_scan(tmp_path / f"{name}.nii", array=array)), name


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bundle with distances, from thirty training scans."""
    return write_tiny_bundle(tmp_path_factory.mktemp("measured") / "bundle", n_scans=30)


def test_a_noisy_head_is_far_from_the_training_scans_and_another_head_is_not(measured, tmp_path):
    noisy = write_scan(tmp_path / "noisy.nii", array=noisy_head(40))
    result = load_bundle(measured).predict(noisy)
    assert result.warnings[0].code == "far_from_training"
    assert result.do_not_use_because == result.warnings[0].sentence == result.frame()["value"]["read first"]
    assert "than all 30 compared" in result.do_not_use_because and "one in 31" in result.do_not_use_because
    assert result.to_dict()["do_not_use_because"] == result.do_not_use_because
    other = load_bundle(measured).predict(write_scan(tmp_path / "a.nii", 41))
    assert other.warnings == () and other.do_not_use_because == "" and "read first" not in other.frame().index


def test_what_is_no_head_at_all_is_said_once(measured, tmp_path):
    noise = np.random.default_rng(0).integers(0, 1000, (48, 48, 48)).astype(np.int16)
    found = codes(measured, write_scan(tmp_path / "noise.nii", array=noise))
    assert [code for code in found if "training" in code] == ["far_from_training"]


def with_array(bundle, target, file, name, change):
    """A copy of a bundle with one array changed, and the manifest made to fit."""
    shutil.copytree(bundle, target)
    arrays = load_file(target / file)
    arrays[name] = change(arrays[name].copy())
    save_file(arrays, target / file)
    manifest = json.loads((target / "bundle.json").read_text())
    manifest["files"][file] = {"sha256": sha256_of(target / file), "bytes": (target / file).stat().st_size}
    write_json(manifest, target / "bundle.json")
    return target


def filled(value):
    """Put a value into an array's first place."""
    return lambda array: np.where(np.arange(array.size).reshape(array.shape) == 0, value, array).astype(
        array.dtype
    )


@pytest.mark.parametrize(
    ("file", "name", "change", "said"),
    [
        ("reference.safetensors", "mean", filled(np.inf), "damaged: mean of reference"),
        ("reference.safetensors", "mean", lambda mean: mean[1:], "reference volume"),
        ("reference.safetensors", "image.rows", lambda rows: rows[:, 1:], r"has shape \(30, 17\)"),
        ("reference.safetensors", "image.rows", lambda rows: rows[:3], "expected 20 to 1000 rows of 18"),
        ("reference.safetensors", "image.rows", filled(1e300), "numbers below a million"),
        ("reference.safetensors", "image.rows", filled(np.nan), "damaged: image.rows"),
        ("member-00.safetensors", "conv1.weight", filled(np.nan), "damaged: conv1.weight"),
        ("member-00.safetensors", "bn1.running_var", filled(0), "bn1.running_var holds .* not positive"),
        ("member-00.safetensors", "age_sd", lambda sd: np.asarray(-sd), "age_sd holds .* not positive"),
        ("member-00.safetensors", "fc.weight", lambda array: array[:, 1:], "fc.weight has shape"),
    ],
)
def test_damaged_arrays_are_refused(file, name, change, said, measured, tmp_path):
    with pytest.raises(BundleError, match=said):
        load_bundle(with_array(measured, tmp_path / "bundle", file, name, change))


def test_odd_voxels_and_ages_out_of_range_are_noticed(tiny, tmp_path):
    thick = write_scan(tmp_path / "thick.nii", array=head_array()[:, :, ::4])
    assert "coarse_voxels" not in codes(tiny, write_scan(tmp_path / "a.nii"))
    import nibabel as nib

    nib.save(nib.Nifti1Image(head_array()[:, :, ::4], np.diag([4.0, 4, 16, 1])), thick)
    assert "extreme_voxel_size" in codes(tiny, thick)
    assert "true_age_outside_training" in codes(tiny, write_scan(tmp_path / "b.nii"), age=95)


# --- hostile scans --------------------------------------------------------------------------------------


def test_a_header_that_disagrees_with_itself_is_warned_of_with_what_it_says(tiny, tmp_path):
    image = nib.load(write_scan(tmp_path / "a.nii"))
    image.set_qform(image.affine, code=1)
    image.set_sform(np.diag([-1.1, 1.1, 1.1, 1.0]) @ image.affine, code=1)
    nib.save(image, tmp_path / "b.nii")
    found = {
        caution.code: caution.sentence for caution in load_bundle(tiny).predict(tmp_path / "b.nii").warnings
    }
    for words in ("size", "side", "sform", "qform", "pixdim", "Used was the sform"):
        assert words in found["header_disagrees"]


def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tiny, tmp_path):
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    for name in ("absurd.nii", "absurd.nii.gz", "without_ending"):
        path = tmp_path / name
        content = header.binaryblock + b"\0" * 1000
        if name.endswith(".gz"):
            import gzip

            content = gzip.compress(content)
        path.write_bytes(content)
        with pytest.raises(ScanError) as caught:
            load_bundle(tiny).predict(path)
        assert caught.value.code == "too_large"
        assert "claims 30000" in caught.value.sentence


# --- hostile bundles ------------------------------------------------------------------------------------


def changed(bundle, target, **changes):
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, target)
    path = target / "bundle.json"
    write_json(json.loads(path.read_text()) | changes, path)
    return target


MANY = {"salt": "00", "subjects": [], "images": []}
TRAINING, INTERVAL, CORRECTION = (manifest()[name] for name in ("training", "interval", "correction"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "script"}, "kind: 'script'"),
        ({"run": "r" * 300}, "run: .*too long"),
        ({"architecture": ARCHITECTURE | {"widths": [10**9] * 4}}, "widths"),
        ({"architecture": ARCHITECTURE | {"widths": [8, 8, 8, 8]}}, "has shape"),
        ({"architecture": ARCHITECTURE | {"blocks": [64, 64, 64, 64]}}, "the file holds"),
        ({"architecture": ARCHITECTURE | {"shortcut": "B"}}, "missing or left over"),
        ({"architecture": ARCHITECTURE | {"surprise": 1}}, "surprise"),
        ({"architecture": ARCHITECTURE | {"norm": "group"}}, "architecture.norm: 'batch' was expected"),
        ({"architecture": ARCHITECTURE | {"outputs": 65}}, "outputs: 1 was expected"),
        ({"architecture": ARCHITECTURE | {"linear_edge": 10**6}}, "linear_edge"),
        ({"architecture": ARCHITECTURE | {"linear_edge": 48}}, "the file holds"),
        ({"shift_averaging": 1}, "shift_averaging: 0 was expected"),
        ({"architecture": "resnet"}, "architecture: 'resnet' is not of type 'object'"),
        ({"members": []}, "members: "),
        ({"members": [{"file": "../../etc/passwd"}]}, "file: .*does not match"),
        ({"members": [{"file": "member-00.safetensors"}] * 2}, "two are one file"),
        ({"members": [{"file": f"member-{k:02d}.safetensors"} for k in range(60)]}, "members: .*too long"),
        ({"preprocessing": {}}, "preprocessing: .fingerprint"),
        ({"preprocessing": SETTINGS.to_json() | {"fingerprint": "other"}}, "other steps"),
        ({"training": None}, "training: None is not of type 'object'"),
        ({"training": TRAINING | {"age_low": 90}}, "youngest age is above the oldest"),
        ({"training": TRAINING | {"voxel_mm": [1.0, 0.5]}}, "voxel_mm is not the smallest"),
        ({"training": TRAINING | {"age_counts": [1]}}, "age_counts do not fit age_edges"),
        ({"training": TRAINING | {"n_subjects": 10**400}}, "n_subjects"),
        ({"interval": {"level": 0.9}}, "quantile"),
        ({"interval": INTERVAL | {"quantile": -1}}, "interval.quantile"),
        ({"interval": INTERVAL | {"quantile": 10**9}}, "interval.quantile"),
        ({"interval": INTERVAL | {"level": 1}}, "interval.level"),
        ({"correction": {"slope": 1}}, "intercept"),
        ({"correction": CORRECTION | {"slope": 0}}, "correction.slope"),
        ({"correction": CORRECTION | {"mae": -1}}, "correction.mae"),
        ({"correction": CORRECTION | {"slope": "0.8"}}, "correction.slope"),
        ({"reference": {}}, "likeness"),
        ({"seen": MANY | {"salt": "not hex"}}, "seen.salt"),
        ({"seen_before": [MANY] * 99}, "seen_before: .*too long"),
        ({"position": {"part": [], "age": [1], "predicted_age": []}}, "different lengths"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_with_a_reason(changes, said, tiny, tmp_path):
    with pytest.raises(BundleError, match=said):
        load_bundle(changed(tiny, tmp_path / "changed", **changes))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" * 5000])
def test_numbers_that_are_none_are_refused(number, tiny, tmp_path):
    bundle = changed(tiny, tmp_path / "changed")
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"slope": 0.8', f'"slope": {number}'))
    with pytest.raises(BundleError, match="not readable JSON"):
        load_bundle(bundle)


def test_figures_of_unknown_shape_are_left_out_with_a_word(tiny, tmp_path):
    known = manifest()["figures"]
    bundle = changed(tiny, tmp_path / "changed", figures=known | {"val": {"n": "many"}})
    with pytest.warns(UserWarning, match=r"figures are left out .figures\.val"):
        assert load_bundle(bundle).manifest["figures"] == known


def test_a_network_larger_than_its_file_is_refused_before_it_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("brainage_nb.predict.predictors.resnet18_regressor", pytest.fail)
    claimed = ARCHITECTURE | {"widths": [2048] * 4, "blocks": [64] * 4}
    with pytest.raises(BundleError, match="the file holds"):
        load_bundle(changed(tiny, tmp_path / "changed", architecture=claimed))


def test_loading_a_bundle_needs_little_beyond_torch_and_monai(tiny):
    import subprocess
    import sys

    code = (
        "import sys, monai.networks.nets; before = set(sys.modules);"
        "from brainage_nb.predict.bundle import load_bundle; load_bundle(sys.argv[1]);"
        "print({'sklearn', 'matplotlib', 'joblib', 'nilearn', 'pickle5'} & (set(sys.modules) - before))"
    )
    run = [sys.executable, "-c", code, str(tiny)]
    found = subprocess.run(run, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"
