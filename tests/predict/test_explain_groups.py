from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from brainage_nb.predict.explain import (
    REGIONS,
    age_group_maps,
    coarse_regions,
    cube_to_template,
    group_figure,
    localisation,
    planted_change,
    planted_check,
    read_maps,
    region_table,
)
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.settings import PreprocessingSettings

SETTINGS = PreprocessingSettings(spacing_mm=4.0, size=48)
BEST = PreprocessingSettings.of_recipe("best", spacing_mm=4.0, size=48)
REGISTERED = PreprocessingSettings(spacing_mm=4.0, size=48, to_mni=True)


class Store(dict):
    fingerprint = "same"


def store_and_bundle(n=6):
    volumes = {f"{k}": np.full((48, 48, 48), float(k), np.float16) for k in range(n)}
    settings = SimpleNamespace(fingerprint="same", spacing_mm=4.0, size=48, to_mni=False)
    reference = SimpleNamespace(mean_volume=np.zeros((48, 48, 48), np.float16))
    return Store(volumes), SimpleNamespace(settings=settings, reference=reference, channels={}, model=None)


def test_the_middle_of_the_cube_lies_where_it_should_in_template_space():
    middle = cube_to_template(SETTINGS) @ [23.5, 23.5, 23.5, 1]
    np.testing.assert_allclose(middle[:3], [0, -20, 0])


def test_registered_volumes_lie_where_their_registration_put_them():
    np.testing.assert_allclose(cube_to_template(REGISTERED), mni_grid(4.0, 48))


def test_groups_are_means_over_the_ages_of_their_band_by_the_usual_method(monkeypatch):
    store, bundle = store_and_bundle()
    monkeypatch.setattr("brainage_nb.predict.explain.integrated_gradients", lambda m, v, mean, **_: v - mean)
    scans = pd.DataFrame({"scan_id": list("543210"), "age": [59, 55, 50, 30, 25, 20]})
    groups = age_group_maps(bundle, store, scans)
    assert [(group.low, group.high, group.n) for group in groups] == [(20, 30, 3), (50, 59, 3)]
    assert [group.heat.max() for group in groups] == pytest.approx([1, 4])
    assert [group.volume.max() for group in groups] == pytest.approx([1, 4])
    assert [group.n for group in age_group_maps(bundle, store, scans, per_band=2)] == [2, 2]
    figure = group_figure(bundle, groups)
    assert len(figure.axes) == 6 and "years" in figure._suptitle.get_text()


def test_volumes_of_another_preprocessing_are_refused():
    store, bundle = store_and_bundle()
    store.fingerprint = "other"
    with pytest.raises(ValueError, match="expects same"):
        age_group_maps(bundle, store, pd.DataFrame({"scan_id": [], "age": []}))


def test_regions_get_the_heat_that_lies_in_them():
    labels = np.repeat([0, 1, 2], 4)
    heat = np.repeat([9.0, 1.0, -3.0], 4)
    table = region_table(heat, labels, ["one", "two"]).set_index("region")
    assert table.loc["two", ["share", "density"]].tolist() == pytest.approx([0.75, 1.5])
    assert table["sum"].to_dict() == {"two": -12, "one": 4} and table.index[0] == "two"


@pytest.mark.parametrize("settings", [SETTINGS, REGISTERED, PreprocessingSettings(spacing_mm=2.0, size=96)])
def test_coarse_regions_lie_where_anatomy_puts_them_and_add_up_to_the_whole_map(settings):
    labels, affine = coarse_regions(settings), cube_to_template(settings)

    def at(*mm):
        return REGIONS[labels[tuple(np.round(np.linalg.solve(affine, [*mm, 1])[:3]).astype(int))] - 1]

    assert at(-30, 45, 20) == "frontal" and at(40, -50, 50) == "parietal" and at(10, -90, 5) == "occipital"
    assert at(-55, -20, -15) == "temporal" and at(20, -65, -40) == "cerebellum and brain stem"
    assert at(8, 12, 12) == "ventricles and around them" and at(0, 0, 90) == "outside the brain"
    assert len(np.unique(labels)) == len(REGIONS)
    heat = np.random.default_rng(0).normal(size=labels.shape)
    assert region_table(heat, labels)["sum"].sum() == pytest.approx(heat.sum())


def test_high_heat_on_the_planted_places_scores_one_and_noise_a_half():
    rng = np.random.default_rng(0)
    planted = (rng.random(8000) > 0.8).astype(float)

    def scores(heat):
        return localisation(heat, planted, 0.3)

    share = planted.mean()
    assert scores(planted) == pytest.approx({"planted": share, "auc": 1, "ap": 1})
    assert scores(-planted)["auc"] == 0  # lowering where it should raise ranks last
    noise = scores(rng.random(planted.shape))
    assert noise["auc"] == pytest.approx(0.5, abs=0.03) and noise["ap"] == pytest.approx(share, abs=0.03)
    with pytest.raises(ValueError, match="needs both kinds"):
        localisation(planted, np.ones(planted.shape), 0.3)


def test_read_with_its_sign_a_map_of_chance_directions_finds_half_and_without_it_nearly_all():
    rng, ages = np.random.default_rng(0), np.linspace(20, 80, 12)
    planted = np.where(rng.random(8000) > 0.8, rng.random(8000), 0)
    true = np.outer(ages - 45, planted) + rng.normal(0, 0.1, (12, 8000))  # 45 is the training mean, not 50
    chance = true * rng.choice([-1, 1], 8000)
    auc = {
        (name, read): localisation(read_maps(maps, ages, read), planted, 0.3)["auc"]
        for name, maps in {"true": true, "chance": chance, "reversed": -true}.items()
        for read in ("signed", "absolute", "either sign")
    }
    assert auc["true", "signed"] > 0.99 and auc["reversed", "signed"] < 0.01
    assert auc["chance", "signed"] == pytest.approx(0.5, abs=0.05)
    assert auc["chance", "absolute"] > 0.99 and auc["chance", "either sign"] > 0.99
    np.testing.assert_allclose(read_maps(true, ages, "signed"), planted, atol=0.01)  # years per year


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, modality="T2w"),
        pytest.param(BEST, marks=pytest.mark.slow),
    ],
)
def test_ageing_changes_the_input_around_the_ventricles_and_hardly_outside_the_brain(settings):
    planted, labels = planted_change(settings), coarse_regions(settings)
    near, outside = (planted[labels == 1 + REGIONS.index(name)] for name in REGIONS[5:])
    assert planted.shape == (48,) * 3 and planted.max() == 1
    assert (near > 0.3).mean() > 1.5 * (planted[labels < 7] > 0.3).mean() and outside.max() < 0.3


def test_the_check_stands_between_what_knows_nothing_and_what_the_heads_show(tmp_path, monkeypatch):
    rng, affine = np.random.default_rng(0), cube_to_template(SETTINGS)
    ball = np.exp(-(np.linalg.norm(np.indices((48,) * 3) - 24, axis=0) ** 2) / 60).astype(np.float32)
    ids, ages = [f"{k:02d}" for k in range(30)], np.linspace(20, 80, 30)
    pd.DataFrame({"scan_id": ids, "subject_id": ids, "brain_age": ages}).to_csv(
        tmp_path / "truth.csv", index=False
    )
    noise = rng.normal(5 * np.roll(ball, 12, axis=1), 0.3, (30, 48, 48, 48))  # bright there at every age
    store = Store(zip(ids, (noise + 0.05 * ages[:, None, None, None] * ball).astype(np.float16), strict=True))
    splits = pd.DataFrame(
        {"scan_id": ids, "age": ages, "image": ids, "split": ["train", "test", "train"] * 10}
    )
    makers = [
        ("the answer", ("signed", "absolute"), lambda volume: volume - 3 * ball),
        ("nothing", ("absolute",), lambda volume: rng.random(volume.shape)),
        ("ceiling", ("either sign",), np.asarray),
    ]
    monkeypatch.setattr("brainage_nb.predict.explain._map_makers", lambda *_: makers)
    monkeypatch.setattr("brainage_nb.predict.explain._planted_place", lambda *_: affine)
    monkeypatch.setattr("brainage_nb.predict.explain.planted_change", lambda _: ball)
    bundle = SimpleNamespace(settings=SETTINGS)
    table = planted_check(bundle, store, tmp_path, splits, str, per_map=6)
    table = table.set_index(["map", "read", "above"]).sort_index()
    assert len(table) == 8 and table["n"].groupby("map").first().to_dict() == {
        "the answer": 6, "nothing": 6, "ceiling": 18,
    }  # fmt: skip
    assert (table.loc["the answer", "signed"]["ap"] > 0.8).all() and (table.loc["ceiling"]["ap"] > 0.9).all()
    assert (table.loc["the answer", "absolute"]["ap"] < 0.6).all()  # the place bright at every age is in it
    nothing = table.loc["nothing"]
    assert nothing["auc"].tolist() == pytest.approx([0.5] * 2, abs=0.1) and (nothing["ap"] < 0.1).all()
    assert table[["auc_se", "ap_se"]].gt(0).all(axis=None) and table["auc_se"].max() < 0.1
