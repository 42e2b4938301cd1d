"""Linear SVR, weights, both fusions, saving and the run: on made-up features with a known age signal."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.model_selection import GridSearchCV, GroupKFold, ParameterGrid
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.models.settings import COLUMNS
from brainage_nb.models.svr import (
    GRID,
    PUBLISHED,
    EarlyFusion,
    LateFusion,
    LinearKernel,
    VggSvr,
    Weighting,
    average_triplets,
    find_positions,
    fit_svr,
    inner_folds,
    learn_weights,
    make_svr,
    predict_out_of_fold,
    score_weights,
    train_vgg_svr,
)
from brainage_nb.models.vgg16 import FeatureSettings, WeightsError, extract_features, vgg16_features
from brainage_nb.volumes.settings import PreprocessingSettings

FEW = {"C": (1.0, 98.0), "epsilon": (0.064,)}
SMALL = FeatureSettings(image_size=32)
POSITIONS, FEATURES = 4, 512


def made_up(n=40, seed=0, noise=(0.3, 1.0, 4.0, 30.0)):
    """Scans (positions, features) whose features follow age, the first position best; ages; subjects."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n)
    pattern = rng.normal(0, 1, (POSITIONS, FEATURES))
    rows = (age[:, None, None] - 50) / 15 * pattern + 3
    rows += rng.normal(0, 1, rows.shape) * np.array(noise)[None, :, None]
    return list(rows.astype(np.float16)), age, np.array([f"{i:03d}" for i in range(n)])


# --- the SVR --------------------------------------------------------------------------------------------


def test_the_weight_vector_predicts_what_the_support_vectors_do():
    scans, age, _ = made_up()
    features = np.stack([rows[1] for rows in scans]).astype(np.float32)
    coef, intercept, centre = fit_svr(features[:30], age[:30], **PUBLISHED)
    folded = features[30:].astype(float) @ coef + intercept
    scaler = StandardScaler().fit(features[:30])
    train, test = scaler.transform(features[:30]), scaler.transform(features[30:])
    unit = np.mean(np.sum(train**2, axis=1))
    reference = SVR(kernel="linear", **PUBLISHED).fit(train / unit**0.5, age[:30])
    np.testing.assert_allclose(folded, reference.predict(test / unit**0.5), atol=0.02)
    pipeline = make_svr(**PUBLISHED).fit(features[:30], age[:30])
    np.testing.assert_allclose(folded, pipeline.predict(features[30:]), atol=1e-3)
    assert features[:30].mean(axis=0) @ coef + intercept == pytest.approx(centre, abs=1e-3)


def test_the_kernel_has_a_mean_diagonal_of_one_so_that_c_matters():
    scans, age, subjects = made_up(noise=(8, 8, 8, 8))
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    kernel = LinearKernel().fit(features)
    assert kernel.transform(features).diagonal().mean() == pytest.approx(1)
    assert kernel.unit_ == pytest.approx(FEATURES, rel=1e-3)
    predicted = predict_out_of_fold(features, age, subjects, {"C": (0.1, 98.0), "epsilon": (1.0,)})
    assert np.std(predicted[0]) < 0.5 * np.std(predicted[1])
    with pytest.raises(ValueError, match="constant"):
        LinearKernel().fit(np.ones_like(features))


def test_a_grid_search_by_scikit_learn_gives_the_same_errors():
    scans, age, subjects = made_up()
    features = np.stack([rows[2] for rows in scans]).astype(np.float32)
    grid = {"svr__C": FEW["C"], "svr__epsilon": FEW["epsilon"]}
    search = GridSearchCV(make_svr(), grid, cv=GroupKFold(5), scoring="neg_mean_absolute_error")
    search.fit(features, age, groups=subjects)
    mae = np.abs(predict_out_of_fold(features, age, subjects, FEW) - age).mean(axis=1)
    np.testing.assert_allclose(-search.cv_results_["mean_test_score"], mae, rtol=1e-4)


def test_the_published_point_is_in_the_grid():
    assert PUBLISHED == {"C": 98.0, "epsilon": 0.064}
    assert PUBLISHED in list(ParameterGrid(GRID))


def test_inner_folds_never_part_a_subject():
    subjects = np.repeat([f"{i}" for i in range(10)], 2)
    for train, held_out in inner_folds(subjects):
        assert not set(subjects[train]) & set(subjects[held_out])
    with pytest.raises(ValueError, match=r"4 training subjects.*at least 5"):
        inner_folds(["a", "b", "c", "d", "d"])


def test_an_out_of_fold_prediction_ignores_the_scans_own_age():
    scans, age, subjects = made_up()
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    changed = age.copy()
    _, held_out = next(inner_folds(subjects))
    changed[held_out] = 0
    before, after = (predict_out_of_fold(features, ages, subjects, FEW) for ages in (age, changed))
    np.testing.assert_array_equal(before[:, held_out], after[:, held_out])
    others = np.setdiff1d(np.arange(len(age)), held_out)
    assert np.abs(before[:, others] - after[:, others]).max() > 1


def test_scaling_is_learned_inside_each_fold():
    scans, age, subjects = made_up()
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    _, held_out = next(inner_folds(subjects))
    one, moved = held_out[0], features.copy()
    moved[one] *= 100  # an outlier must not change what the other held-out scans of its fold get
    before, after = (predict_out_of_fold(rows, age, subjects, FEW) for rows in (features, moved))
    np.testing.assert_allclose(before[:, held_out[1:]], after[:, held_out[1:]], atol=1e-3)


def test_a_feature_active_in_one_training_scan_cannot_throw_a_prediction():
    scans, age, _ = made_up(60, noise=(3, 3, 3, 3))
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    features[:, :100] = 0
    features[0, :100] = 0.05
    age[0] = 95 - age[0]  # so that the SVR leans on whatever sets this scan apart
    model = make_svr(**PUBLISHED).fit(features[:50], age[:50])
    usual = model.predict(features[50:])
    features[50:, :100] = 3  # new scans in which these features happen to be active
    assert np.abs(model.predict(features[50:]) - usual).max() < 5


def test_the_best_choice_is_the_lowest_error_and_of_equals_the_first():
    scans, age, subjects = made_up()
    fusion = EarlyFusion({"C": (1e-3, 98.0, 1000.0), "epsilon": (0.064,)}).fit(scans, age, subjects)
    mae = fusion.grid_["mae"]
    assert fusion.choice_ == PUBLISHED
    assert mae[1] == pytest.approx(mae[2], abs=1e-3) and mae[0] > mae[1] == fusion.inner_mae_


# --- weights of triplets --------------------------------------------------------------------------------


def noisy_predictions(n=60, sd=(1.0, 4.0, 16.0), seed=0):
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n)
    return age[:, None] + rng.normal(0, 1, (n, len(sd))) * sd, age, np.arange(n).astype(str)


def test_better_regressors_weigh_more():
    predicted, age, _ = noisy_predictions()
    found = learn_weights(predicted, age)
    assert found.weights[0] > found.weights[1] > found.weights[2] >= 0
    assert found.weights.sum() == pytest.approx(1)
    assert found.slope == pytest.approx(1, abs=0.1)


def test_weights_stretch_regressors_that_pull_towards_the_mean():
    predicted, age, _ = noisy_predictions(sd=(0.5, 0.5, 0.5))
    shrunk = age.mean() + 0.5 * (predicted - age.mean())
    fusion = learn_weights(shrunk, age)
    assert fusion.slope == pytest.approx(2, abs=0.05)
    np.testing.assert_allclose(fusion.combine(shrunk), age, atol=3)


def test_regressors_that_say_the_same_share_the_weight():
    predicted, age, _ = noisy_predictions(n=20, sd=(4.0,))
    twins = np.hstack([predicted, predicted + np.linspace(-0.1, 0.1, 20)[:, None]])
    np.testing.assert_allclose(learn_weights(twins, age).weights, [0.5, 0.5], atol=0.05)


def test_a_missing_position_scales_the_other_weights_up():
    fusion = Weighting(np.array([0.5, 0.25, 0.25]), 50.0, 1.0)
    predicted = np.array([[60.0, 70, 80], [np.nan, 70, 80], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(fusion.combine(predicted), [67.5, 75.0, np.nan])
    np.testing.assert_allclose(fusion.contributions(predicted)[1], [np.nan, 10.0, 15.0])


def test_useless_regressors_give_everyone_the_mean_age():
    age = np.linspace(20, 80, 30)
    fusion = learn_weights(100 - age[:, None] * np.ones((1, 3)), age)
    np.testing.assert_allclose(fusion.combine(np.full((2, 3), 33.0)), 50.0)


def test_weights_are_scored_on_subjects_they_were_not_learned_from():
    rng = np.random.default_rng(3)
    age = rng.uniform(20, 80, 30)
    noise = 50 + rng.normal(0, 15, (30, 25))  # nothing to learn, many weights to fit it with
    fitted = np.abs(learn_weights(noise, age).combine(noise) - age).mean()
    assert score_weights(noise, age, np.arange(30).astype(str)) > fitted


# --- early and late fusion ------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [EarlyFusion, LateFusion])
def test_a_planted_age_signal_is_found(fusion):
    scans, age, subjects = made_up(60, noise=(0.3, 0.3, 1.0, 1.0))
    model = fusion(FEW).fit(scans[:40], age[:40], subjects[:40])
    assert np.abs(model.predict(scans[40:]) - age[40:]).mean() < 3
    assert model.inner_mae_ < 3


def test_positions_without_brain_in_most_scans_are_not_used():
    scans, _, _ = made_up()
    for rows in scans[:30]:
        rows[3] = np.nan
    assert find_positions(scans).tolist() == [0, 1, 2]


def test_the_mean_leaves_out_triplets_without_brain():
    rows = np.array([[1.0, 10], [3, 30], [np.nan, np.nan]], dtype=np.float16)
    means = average_triplets([rows, np.full_like(rows, np.nan)], np.array([0, 1, 2]))
    assert means[0].tolist() == [2, 20]
    assert np.isnan(means[1]).all()


def test_late_fusion_trusts_the_positions_that_know_the_age():
    scans, age, subjects = made_up(60)
    late = LateFusion(FEW).fit(scans, age, subjects)
    assert late.by_position_["mae"].idxmin() in (0, 1)
    assert late.weighting_.weights[:2].sum() > 0.6
    assert late.weighting_.weights[3] == late.weighting_.weights.min()
    assert late.by_position_["n_scans"].tolist() == [60] * 4


def test_a_scan_without_one_position_gets_an_age_near_the_one_it_had():
    scans, age, subjects = made_up(60)
    late = LateFusion(FEW).fit(scans[:50], age[:50], subjects[:50])
    fewer = [rows.copy() for rows in scans[50:]]
    for rows in fewer:
        rows[np.argmax(late.weighting_.weights)] = np.nan
    assert np.abs(late.predict(fewer) - late.predict(scans[50:])).max() < 10
    assert np.isnan(late.predict([np.full_like(scans[0], np.nan)])).all()


@pytest.mark.parametrize("fusion", [EarlyFusion, LateFusion])
def test_contributions_add_up_to_the_predicted_age(fusion):
    scans, age, subjects = made_up()
    scans[0][2] = np.nan
    model = fusion(FEW).fit(scans, age, subjects)
    each = model.contributions(scans[:1])[0]
    assert np.isnan(each[2])
    assert model.weighting_.centre + np.nansum(each) == pytest.approx(model.predict(scans[:1])[0], abs=1e-3)


# --- the run --------------------------------------------------------------------------------------------


class Store(dict):
    def __init__(self, volumes):
        super().__init__(volumes)
        self.scan_ids, self.fingerprint, self.spacing_mm = list(volumes), "store-a", 8.0
        self.settings = PreprocessingSettings(spacing_mm=8.0)
        self.index = pd.DataFrame(
            {"scan_id": self.scan_ids, "sha256": [f"hash of {i}" for i in self.scan_ids]}
        )


def heads(age):
    """Heads of 24^3 voxels whose dark core grows with age, z-scored float16."""
    rng = np.random.default_rng(0)
    for years in age:
        volume = np.zeros((24, 24, 24))
        volume[4:20, 3:21, 2:22] = 1
        core = years / 16
        distance = np.abs(np.indices(volume.shape) - 12).max(axis=0)
        volume -= 0.8 * np.clip(core - distance + 0.5, 0, 1)
        volume += rng.normal(0, 0.05, volume.shape)
        yield ((volume - volume.mean()) / volume.std()).astype(np.float16)


@pytest.fixture(scope="module")
def cohort():
    age = np.round(np.random.default_rng(1).uniform(20, 80, 36), 1)
    ids = [f"s{i:02d}" for i in range(36)]
    splits = pd.DataFrame({"scan_id": ids, "subject_id": ids, "session_id": "", "age": age, "fold": -1})
    splits["split"] = ["train"] * 24 + ["val"] * 6 + ["test"] * 6
    return splits


@pytest.fixture(scope="module")
def network():
    return vgg16_features("random_projection", pooling="mean").place("cpu")


@pytest.fixture(scope="module")
def store(cohort):
    return Store(dict(zip(cohort["scan_id"], heads(cohort["age"]), strict=True)))


@pytest.fixture(scope="module")
def features(store, network, tmp_path_factory):
    return extract_features(store, tmp_path_factory.mktemp("features"), network, settings=SMALL)


@pytest.fixture(scope="module", autouse=True)
def few_choices():
    """Let a run choose among two points of the grid instead of fifteen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyFusion.__init__, "__defaults__", (FEW,))
        yield


@pytest.fixture(scope="module")
def fitted(cohort, features, network, tmp_path_factory):
    """A whole run."""
    return train_vgg_svr(features, cohort, tmp_path_factory.mktemp("fitted") / "run", network)


@pytest.fixture
def run(fitted, tmp_path):
    """A copy of that run's folder."""
    return Path(shutil.copytree(fitted.folder, tmp_path / "run"))


def permuted(splits, names):
    chosen = splits["split"].isin(names)
    return splits.assign(age=splits["age"].where(~chosen, splits["age"].max() - splits["age"] + 20))


def everything_learned(run):
    """Weights, choices, fusion coefficients and the headline, as one comparable text."""
    model = VggSvr.load(run.folder / "model")
    arrays = [
        np.asarray(array).tolist()
        for fusion in (model.early, model.late)
        for array in (fusion.positions_, fusion.coef_, fusion.intercept_, *fusion.weighting_)
    ]
    return json.dumps([arrays, {name: run.settings[name] for name in ("variant", "early", "late")}])


def test_validation_and_test_labels_change_nothing_that_is_learned(
    cohort, features, network, fitted, tmp_path
):
    plain = fitted
    other = train_vgg_svr(features, permuted(cohort, ["val", "test"]), tmp_path / "b", network)
    assert not plain.predictions["age"].equals(other.predictions["age"])
    pd.testing.assert_series_equal(plain.predictions["predicted_age"], other.predictions["predicted_age"])
    assert everything_learned(plain) == everything_learned(other)
    learned = train_vgg_svr(features, permuted(cohort, ["train"]), tmp_path / "c", network)
    assert everything_learned(plain) != everything_learned(learned)


def test_with_folds_test_labels_change_nothing_that_is_learned(cohort, features, network, tmp_path):
    fold = np.where(cohort["split"] == "test", -1, np.arange(len(cohort)) % 2)
    folded = cohort.assign(fold=fold)
    plain = train_vgg_svr(features, folded, tmp_path / "a", network)
    other = train_vgg_svr(features, permuted(folded, ["test"]), tmp_path / "b", network)
    assert everything_learned(plain) == everything_learned(other)
    rows = plain.predictions
    pd.testing.assert_series_equal(rows["predicted_age"], other.predictions["predicted_age"])
    assert (rows.groupby("variant").size() == len(cohort)).all()
    assert (
        (rows["fold"] == rows["scan_id"].map(cohort.set_index("scan_id").index.get_loc) % 2)
        .where(rows["split"] != "test", rows["fold"] == -1)
        .all()
    )


def test_one_fold_alone_leaves_nobody_to_learn_from(cohort, features, network, tmp_path):
    folded = cohort.assign(fold=np.where(cohort["split"] == "test", -1, 2))
    with pytest.raises(ValueError, match=r"in one fold \(2\), so nobody is left to learn from"):
        train_vgg_svr(features, folded, tmp_path, network)


def test_an_out_of_fold_row_ignores_its_own_fold(cohort, features, network, tmp_path):
    fold = np.where(cohort["split"] == "test", -1, np.arange(len(cohort)) % 2)
    folded = cohort.assign(fold=fold)
    changed = folded.assign(age=folded["age"].where(fold != 0, 100 - folded["age"]))
    before = train_vgg_svr(features, folded, tmp_path / "a", network).predictions.set_index(
        ["scan_id", "variant"]
    )
    after = train_vgg_svr(features, changed, tmp_path / "b", network).predictions.set_index(
        ["scan_id", "variant"]
    )
    own, other = before["fold"] == 0, before["fold"] == 1
    pd.testing.assert_series_equal(before["predicted_age"][own], after["predicted_age"][own])
    assert (before["predicted_age"] - after["predicted_age"])[other].abs().max() > 1


def test_predictions_carry_the_agreed_columns_and_both_variants(cohort, fitted):
    run = fitted
    written = pd.read_csv(run.folder / "predictions.csv", dtype={"scan_id": str})
    assert list(written.columns) == COLUMNS
    assert written.groupby("variant").size().to_dict() == {"early": 36, "late": 36}
    assert (written["fold"] == -1).all()
    assert run.settings["variant"] in ("early", "late")
    assert run.settings["fingerprint"] == "store-a"
    assert run.settings["weights"] == "random_projection"
    assert "random projection" in run.settings["title"]
    accuracy = run.accuracy("test", n_bootstrap=50)
    assert set(accuracy) == {"early", "late"}
    assert accuracy["early"]["n"] == 6
    assert accuracy["early"]["r"]["value"] > 0.8
    mean_training_age = cohort.loc[cohort["split"] == "train", "age"].mean()
    ages = cohort.loc[cohort["split"] == "test", "age"]
    expected = (ages - mean_training_age).abs().mean()
    assert accuracy["late"]["mean_predictor_mae"]["value"] == pytest.approx(expected)


def test_the_headline_has_the_lower_inner_error(fitted):
    settings = fitted.settings
    inner = {name: settings[name]["inner_cv_mae_years"] for name in ("early", "late")}
    assert settings["variant"] == min(inner, key=inner.get)


def test_a_second_run_fits_nothing_and_other_splits_say_what_changed(cohort, features, network, fitted, run):
    again = train_vgg_svr(features, cohort, run, network)
    assert again.reused
    pd.testing.assert_frame_equal(again.predictions, fitted.predictions, check_dtype=False)
    changed = train_vgg_svr(features, permuted(cohort, ["test"]), run, network)
    assert not changed.reused
    assert len(changed.changed) == 1
    assert changed.changed[0].startswith("splits:")
    path = run / "predictions.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rstrip().rindex(b"\n") + 1])  # the last row taken out
    mended = train_vgg_svr(features, permuted(cohort, ["test"]), run, network)
    assert mended.changed == ["predictions.csv: not as this run wrote it"] and path.read_bytes() == whole


@pytest.mark.parametrize("file", ["settings.json", "positions.csv", "model/vgg_svr.safetensors"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"[]\n"])
def test_a_run_with_a_damaged_file_is_fitted_again(cohort, features, network, fitted, run, file, damage):
    (run / file).write_bytes(damage((run / file).read_bytes()))
    with pytest.warns(UserWarning, match=r"settings\.json is damaged|is not whole and fitted again") as said:
        again = train_vgg_svr(features, cohort, run, network)
    assert str(said[0].message).count("is damaged") <= 1
    assert not again.reused
    pd.testing.assert_frame_equal(again.predictions, fitted.predictions)


def test_a_scan_without_features_is_left_out_with_its_reason(cohort, features, network, tmp_path):
    extra = pd.concat([cohort, cohort.tail(2).assign(scan_id=["x1", "x2"], subject_id=["x1", "x2"])])
    failed = pd.DataFrame({"scan_id": ["x1"], "reason": ["no brain"]})
    run = train_vgg_svr(replace(features, failed=failed), extra, tmp_path, network)
    assert run.left_out["scan_id"].tolist() == ["x1", "x2"]
    assert run.left_out["reason"][0] == "no brain"
    assert not run.predictions["scan_id"].isin(["x1", "x2"]).any()
    assert run.settings["n_left_out"] == 2


def test_features_of_another_network_are_refused(cohort, features, tmp_path):
    with pytest.raises(ValueError, match="other weights"):
        train_vgg_svr(features, cohort, tmp_path, vgg16_features("random_projection", seed=3))


# --- the saved model ------------------------------------------------------------------------------------


def test_a_saved_model_predicts_from_volumes_what_the_run_wrote(store, fitted, tmp_path):
    run = fitted
    first = VggSvr.load(run.folder / "model")
    np.testing.assert_allclose(first.late.weighting_.weights, run.positions["weight"])
    first.save(tmp_path / "copy")
    model = VggSvr.load(tmp_path / "copy")
    ids = ["s30", "s31"]
    for variant in ("early", "late"):
        written = run.predictions.query("variant == @variant").set_index("scan_id").loc[ids, "predicted_age"]
        found = model.predict([store[scan_id] for scan_id in ids], variant)
        np.testing.assert_allclose(found, written, atol=0.05)
        contributions = model.contributions(store["s30"], variant)
        centre = model.fusion(variant).weighting_.centre
        assert centre + contributions["years"].sum() == pytest.approx(found[0], abs=1e-2)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".joblib", ".pickle")]


def test_a_model_is_not_used_with_another_network(run):
    facts = run / "model" / "vgg_svr.json"
    described = json.loads(facts.read_text())
    described["network"]["weights_sha256"] = vgg16_features("random_projection", seed=5).weights_sha256
    facts.write_text(json.dumps(described))
    with pytest.raises(WeightsError, match="fitted with"):
        VggSvr.load(run / "model")


def test_a_model_that_keeps_the_standardisation_beside_the_weights_predicts_the_same(features, cohort, run):
    folder = run / "model"
    model, arrays = VggSvr.load(folder), load_file(folder / "vgg_svr.safetensors")
    facts, old = json.loads((folder / "vgg_svr.json").read_text()), {}
    rng = np.random.default_rng(0)
    for name, fusion in (("early", model.early), ("late", model.late)):
        mean, scale = rng.uniform(0.5, 2, (2, *fusion.coef_.shape)).astype(np.float32)
        old |= {f"{name}.positions": fusion.positions_, f"{name}.mean": mean, f"{name}.scale": scale}
        old[f"{name}.weight"] = (fusion.coef_ * scale).astype(np.float32)
        facts[name] = {"intercepts": (fusion.intercept_ + (fusion.coef_ * mean).sum(axis=1)).tolist()}
    centre, slope = model.late.weighting_[1:]
    facts["late"]["fusion"] = {"rule": "nnls", "centre": centre, "slope": slope}
    save_file(old | {"late.fusion": arrays["late.weights"]}, folder / "vgg_svr.safetensors")
    (folder / "vgg_svr.json").write_text(json.dumps(facts))
    loaded, rows = VggSvr.load(folder), [features[scan_id] for scan_id in cohort["scan_id"]]
    for variant in ("early", "late"):
        expected = model.fusion(variant).predict(rows)
        np.testing.assert_allclose(loaded.fusion(variant).predict(rows), expected, atol=1e-4)
