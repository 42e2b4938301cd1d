"""Linear SVR, fusion rules, both fusions, saving and the run: on made-up features with a known age signal."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from brainage_nb.models.svr import (
    COLUMNS,
    GRID,
    PUBLISHED,
    Choice,
    Fusion,
    VggSvr,
    best_choice,
    compare_rules,
    fit_early,
    fit_late,
    fit_svr,
    inner_folds,
    learn_fusion,
    out_of_fold,
    positions_in_use,
    scaled_kernel,
    score_grid,
    train_vgg_svr,
)
from brainage_nb.models.vgg16 import FeatureSettings, WeightsError, extract_features, vgg16_features

FEW = (Choice(1.0, 0.064), PUBLISHED)
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
    model = fit_svr(features[:30], age[:30], PUBLISHED)
    scaler = StandardScaler().fit(features[:30])
    train, test = scaler.transform(features[:30]), scaler.transform(features[30:])
    unit = np.mean(np.sum(train**2, axis=1))
    reference = SVR(kernel="linear", C=PUBLISHED.C, epsilon=PUBLISHED.epsilon).fit(
        train / unit**0.5, age[:30]
    )
    np.testing.assert_allclose(model.predict(features[30:]), reference.predict(test / unit**0.5), atol=0.02)


def test_the_kernel_has_a_mean_diagonal_of_one_so_that_c_matters():
    scans, age, subjects = made_up(noise=(8, 8, 8, 8))
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    kernel, unit = scaled_kernel(StandardScaler().fit_transform(features))
    assert kernel.diagonal().mean() == pytest.approx(1)
    assert unit == pytest.approx(FEATURES, rel=1e-3)
    predicted = out_of_fold(features, age, subjects, (Choice(0.1, 1.0), Choice(98.0, 1.0)))
    assert np.std(predicted[0]) < 0.5 * np.std(predicted[1])


def test_the_published_point_is_in_the_grid():
    assert PUBLISHED == (98.0, 0.064)
    assert PUBLISHED in GRID


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
    before, after = (out_of_fold(features, ages, subjects, FEW) for ages in (age, changed))
    np.testing.assert_array_equal(before[:, held_out], after[:, held_out])
    others = np.setdiff1d(np.arange(len(age)), held_out)
    assert np.abs(before[:, others] - after[:, others]).max() > 1


def test_scaling_is_learned_inside_each_fold():
    scans, age, subjects = made_up()
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    _, held_out = next(inner_folds(subjects))
    one, moved = held_out[0], features.copy()
    moved[one] *= 100  # an outlier must not change what the other held-out scans of its fold get
    before, after = (out_of_fold(rows, age, subjects, FEW) for rows in (features, moved))
    np.testing.assert_allclose(before[:, held_out[1:]], after[:, held_out[1:]], atol=1e-3)


def test_a_feature_active_in_one_training_scan_cannot_throw_a_prediction():
    scans, age, _ = made_up(60, noise=(3, 3, 3, 3))
    features = np.stack([rows[0] for rows in scans]).astype(np.float32)
    features[:, :100] = 0
    features[0, :100] = 0.05
    age[0] = 95 - age[0]  # so that the SVR leans on whatever sets this scan apart
    model = fit_svr(features[:50], age[:50], PUBLISHED)
    usual = model.predict(features[50:])
    features[50:, :100] = 3  # new scans in which these features happen to be active
    assert np.abs(model.predict(features[50:]) - usual).max() < 5


def test_the_best_choice_is_the_lowest_error_and_of_equals_the_first():
    age = np.array([50.0, 60.0])
    predicted = np.array([[55.0, 65.0], [51.0, 61.0], [51.0, 61.0]])
    grid = (Choice(1, 1), Choice(10, 1), Choice(98, 1))
    scores = score_grid(predicted, age, grid)
    assert scores["mae"].tolist() == [5, 1, 1]
    assert best_choice(scores) == 1


# --- fusion rules ---------------------------------------------------------------------------------------


def noisy_predictions(n=60, sd=(1.0, 4.0, 16.0), seed=0):
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n)
    return age[:, None] + rng.normal(0, 1, (n, len(sd))) * sd, age, np.arange(n).astype(str)


@pytest.mark.parametrize("rule", ["nnls", "inverse_error"])
def test_better_regressors_weigh_more(rule):
    predicted, age, _ = noisy_predictions()
    fusion = learn_fusion(predicted, age, rule)
    assert fusion.weights[0] > fusion.weights[1] > fusion.weights[2] >= 0
    assert fusion.weights.sum() == pytest.approx(1)
    assert fusion.slope == pytest.approx(1, abs=0.1)


def test_nnls_stretches_regressors_that_pull_towards_the_mean():
    predicted, age, _ = noisy_predictions(sd=(0.5, 0.5, 0.5))
    shrunk = age.mean() + 0.5 * (predicted - age.mean())
    fusion = learn_fusion(shrunk, age, "nnls")
    assert fusion.slope == pytest.approx(2, abs=0.05)
    np.testing.assert_allclose(fusion.combine(shrunk), age, atol=3)


def test_regressors_that_say_the_same_share_the_weight():
    predicted, age, _ = noisy_predictions(n=20, sd=(4.0,))
    twins = np.hstack([predicted, predicted + np.linspace(-0.1, 0.1, 20)[:, None]])
    np.testing.assert_allclose(learn_fusion(twins, age, "nnls").weights, [0.5, 0.5], atol=0.05)


def test_a_missing_position_scales_the_other_weights_up():
    fusion = Fusion("nnls", 50.0, 1.0, np.array([0.5, 0.25, 0.25]))
    predicted = np.array([[60.0, 70, 80], [np.nan, 70, 80], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(fusion.combine(predicted), [67.5, 75.0, np.nan])
    np.testing.assert_allclose(fusion.contributions(predicted)[1], [np.nan, 10.0, 15.0])


def test_useless_regressors_give_everyone_the_mean_age():
    age = np.linspace(20, 80, 30)
    fusion = learn_fusion(100 - age[:, None] * np.ones((1, 3)), age, "nnls")
    np.testing.assert_allclose(fusion.combine(np.full((2, 3), 33.0)), 50.0)


def test_every_rule_is_scored_on_subjects_it_did_not_learn_from():
    rng = np.random.default_rng(3)
    age = rng.uniform(20, 80, 30)
    noise = 50 + rng.normal(0, 15, (30, 25))  # nothing to learn, many weights to fit it with
    scores = compare_rules(noise, age, np.arange(30).astype(str)).set_index("rule")["mae"]
    fitted = np.abs(learn_fusion(noise, age, "nnls").combine(noise) - age).mean()
    assert scores["nnls"] > fitted
    assert set(scores.index) == {"nnls", "inverse_error", "median"}


# --- early and late fusion ------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [fit_early, fit_late])
def test_a_planted_age_signal_is_found(fit):
    scans, age, subjects = made_up(60, noise=(0.3, 0.3, 1.0, 1.0))
    model = fit(scans[:40], age[:40], subjects[:40], FEW)
    assert np.abs(model.predict(scans[40:]) - age[40:]).mean() < 3
    assert model.inner_mae < 3


def test_positions_without_brain_in_most_scans_are_not_used():
    scans, _, _ = made_up()
    for rows in scans[:30]:
        rows[3] = np.nan
    assert positions_in_use(scans).tolist() == [0, 1, 2]


def test_late_fusion_trusts_the_positions_that_know_the_age():
    scans, age, subjects = made_up(60)
    late = fit_late(scans, age, subjects, FEW)
    assert late.by_position["mae"].idxmin() in (0, 1)
    assert late.fusion.weights[:2].sum() > 0.6
    assert late.fusion.weights[3] == late.fusion.weights.min()
    assert late.by_position["n_scans"].tolist() == [60] * 4


def test_a_scan_without_one_position_gets_an_age_near_the_one_it_had():
    scans, age, subjects = made_up(60)
    late = fit_late(scans[:50], age[:50], subjects[:50], FEW)
    fewer = [rows.copy() for rows in scans[50:]]
    for rows in fewer:
        rows[np.argmax(late.fusion.weights)] = np.nan
    assert np.abs(late.predict(fewer) - late.predict(scans[50:])).max() < 10
    assert np.isnan(late.predict([np.full_like(scans[0], np.nan)])).all()


@pytest.mark.parametrize("fit", [fit_early, fit_late])
def test_contributions_add_up_to_the_predicted_age(fit):
    scans, age, subjects = made_up()
    scans[0][2] = np.nan
    model = fit(scans, age, subjects, FEW)
    start = model.svr.intercept if fit is fit_early else model.fusion.centre
    each = model.contributions(scans[0])
    assert np.isnan(each[2])
    assert start + np.nansum(each) == pytest.approx(model.predict(scans[:1])[0], abs=1e-3)


# --- the run --------------------------------------------------------------------------------------------


class Store(dict):
    def __init__(self, volumes):
        super().__init__(volumes)
        self.scan_ids, self.fingerprint, self.spacing_mm = list(volumes), "store-a", 8.0
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
def cache(store, network, tmp_path_factory):
    return extract_features(store, tmp_path_factory.mktemp("features"), network, settings=SMALL).cache


def permuted(splits, names):
    chosen = splits["split"].isin(names)
    return splits.assign(age=splits["age"].where(~chosen, splits["age"].max() - splits["age"] + 20))


def everything_learned(run):
    """Weights, scalers, kernel choices, fusion coefficients and the headline, as one comparable text."""
    model = VggSvr.load(run.folder / "model")
    arrays = [
        array for svr in [model.early.svr, *model.late.svrs] for array in (svr.mean, svr.scale, svr.weight)
    ]
    arrays += [model.late.fusion.weights, model.early.positions, model.late.positions]
    intercepts = [model.early.svr.intercept, *[svr.intercept for svr in model.late.svrs]]
    choices = [
        model.variant,
        model.early.choice,
        model.late.choice,
        model.early.inner_mae,
        model.late.inner_mae,
    ]
    fusion = model.late.fusion
    return json.dumps([[a.tolist() for a in arrays], intercepts, choices, fusion.centre, fusion.slope])


def test_validation_and_test_labels_change_nothing_that_is_learned(cohort, cache, network, tmp_path):
    plain = train_vgg_svr(cache, cohort, tmp_path / "a", network)
    other = train_vgg_svr(cache, permuted(cohort, ["val", "test"]), tmp_path / "b", network)
    assert not plain.predictions["age"].equals(other.predictions["age"])
    pd.testing.assert_series_equal(plain.predictions["predicted_age"], other.predictions["predicted_age"])
    assert everything_learned(plain) == everything_learned(other)
    learned = train_vgg_svr(cache, permuted(cohort, ["train"]), tmp_path / "c", network)
    assert everything_learned(plain) != everything_learned(learned)


def test_with_folds_test_labels_change_nothing_that_is_learned(cohort, cache, network, tmp_path):
    fold = np.where(cohort["split"] == "test", -1, np.arange(len(cohort)) % 2)
    folded = cohort.assign(fold=fold)
    plain = train_vgg_svr(cache, folded, tmp_path / "a", network)
    other = train_vgg_svr(cache, permuted(folded, ["test"]), tmp_path / "b", network)
    assert everything_learned(plain) == everything_learned(other)
    rows = plain.predictions
    pd.testing.assert_series_equal(rows["predicted_age"], other.predictions["predicted_age"])
    assert (rows.groupby("variant").size() == len(cohort)).all()
    assert (
        (rows["fold"] == rows["scan_id"].map(cohort.set_index("scan_id").index.get_loc) % 2)
        .where(rows["split"] != "test", rows["fold"] == -1)
        .all()
    )


def test_an_out_of_fold_row_ignores_its_own_fold(cohort, cache, network, tmp_path):
    fold = np.where(cohort["split"] == "test", -1, np.arange(len(cohort)) % 2)
    folded = cohort.assign(fold=fold)
    changed = folded.assign(age=folded["age"].where(fold != 0, 100 - folded["age"]))
    before = train_vgg_svr(cache, folded, tmp_path / "a", network).predictions.set_index(
        ["scan_id", "variant"]
    )
    after = train_vgg_svr(cache, changed, tmp_path / "b", network).predictions.set_index(
        ["scan_id", "variant"]
    )
    own, other = before["fold"] == 0, before["fold"] == 1
    pd.testing.assert_series_equal(before["predicted_age"][own], after["predicted_age"][own])
    assert (before["predicted_age"] - after["predicted_age"])[other].abs().max() > 1


def test_predictions_carry_the_agreed_columns_and_both_variants(cohort, cache, network, tmp_path):
    run = train_vgg_svr(cache, cohort, tmp_path, network)
    written = pd.read_csv(tmp_path / "predictions.csv", dtype={"scan_id": str})
    assert tuple(written.columns) == COLUMNS
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


def test_the_headline_has_the_lower_inner_error(cohort, cache, network, tmp_path):
    settings = train_vgg_svr(cache, cohort, tmp_path, network).settings
    inner = {name: settings[name]["inner_cv_mae_years"] for name in ("early", "late")}
    assert settings["variant"] == min(inner, key=inner.get)


def test_a_second_run_fits_nothing_and_other_splits_say_what_changed(cohort, cache, network, tmp_path):
    first = train_vgg_svr(cache, cohort, tmp_path, network)
    again = train_vgg_svr(cache, cohort, tmp_path, network)
    assert again.reused
    pd.testing.assert_frame_equal(again.predictions, first.predictions, check_dtype=False)
    changed = train_vgg_svr(cache, permuted(cohort, ["test"]), tmp_path, network)
    assert not changed.reused
    assert len(changed.changed) == 1
    assert changed.changed[0].startswith("splits:")


def test_a_scan_without_features_is_left_out_with_its_reason(cohort, cache, network, tmp_path):
    extra = pd.concat([cohort, cohort.tail(2).assign(scan_id=["x1", "x2"], subject_id=["x1", "x2"])])
    failed = pd.DataFrame({"scan_id": ["x1"], "reason": ["no brain"]})
    run = train_vgg_svr(cache, extra, tmp_path, network, failed=failed)
    assert run.left_out["scan_id"].tolist() == ["x1", "x2"]
    assert run.left_out["reason"][0] == "no brain"
    assert not run.predictions["scan_id"].isin(["x1", "x2"]).any()
    assert run.settings["n_left_out"] == 2


def test_features_of_another_network_are_refused(cohort, cache, tmp_path):
    with pytest.raises(ValueError, match="other weights"):
        train_vgg_svr(cache, cohort, tmp_path, vgg16_features("random_projection", seed=3))


# --- the saved model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_network", [False, True])
def test_a_saved_model_predicts_from_volumes_what_the_run_wrote(
    cohort, cache, store, network, tmp_path, with_network
):
    run = train_vgg_svr(cache, cohort, tmp_path / "run", network)
    first = VggSvr.load(run.folder / "model")
    np.testing.assert_allclose(first.late.fusion.weights, run.by_position["weight"])
    first.save(tmp_path / "copy", with_network=with_network)
    model = VggSvr.load(tmp_path / "copy")
    ids = ["s30", "s31"]
    for variant in ("early", "late"):
        written = run.predictions.query("variant == @variant").set_index("scan_id").loc[ids, "predicted_age"]
        found = model.predict([store[scan_id] for scan_id in ids], variant)
        np.testing.assert_allclose(found, written, atol=0.05)
        contributions = model.contributions(store["s30"], variant)
        start = model.early.svr.intercept if variant == "early" else model.late.fusion.centre
        assert start + contributions["years"].sum() == pytest.approx(found[0], abs=1e-2)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".joblib", ".pickle")]


def test_a_model_is_not_used_with_another_network(cohort, cache, network, tmp_path):
    run = train_vgg_svr(cache, cohort, tmp_path, network)
    facts = run.folder / "model" / "vgg_svr.json"
    described = json.loads(facts.read_text())
    described["network"]["seed"] = 5
    facts.write_text(json.dumps(described))
    with pytest.raises(WeightsError, match="fitted with"):
        VggSvr.load(run.folder / "model")
