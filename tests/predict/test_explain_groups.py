from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from brainage_nb.predict.explain import (
    REGIONS,
    age_group_maps,
    coarse_regions,
    cube_to_template,
    in_template,
    localisation,
    region_table,
    template_grid,
)
from brainage_nb.volumes.registration import mni_grid
from brainage_nb.volumes.settings import PreprocessingSettings


class Store(dict):
    fingerprint, settings = "same", PreprocessingSettings(spacing_mm=4.0, size=48)


def store_and_bundle(n=6):
    volumes = {f"{k}": np.full((48, 48, 48), float(k), np.float16) for k in range(n)}
    return Store(volumes), SimpleNamespace(settings=SimpleNamespace(fingerprint="same"))


def test_the_middle_of_the_cube_lies_where_it_should_in_template_space():
    middle = cube_to_template(PreprocessingSettings(spacing_mm=4.0, size=48)) @ [23.5, 23.5, 23.5, 1]
    np.testing.assert_allclose(middle[:3], [0, -20, 0])


def test_a_known_affine_puts_a_voxel_at_its_template_place():
    heat = np.zeros((48, 48, 48))
    heat[10, 20, 30] = 1
    _, grid = template_grid()
    affine = grid.copy()
    affine[:3, 3] += 4.0 * np.array([2, 3, 4])  # the cube begins two, three, four template voxels in
    assert np.argwhere(in_template(heat, affine) > 0.5).tolist() == [[12, 23, 34]]


def test_groups_are_means_over_the_ages_of_their_band():
    store, bundle = store_and_bundle()
    scans = pd.DataFrame({"scan_id": list("012345"), "age": [20, 25, 30, 50, 55, 59]})
    groups = age_group_maps(bundle, store, scans, bands=((0, 40), (40, 60), (60, 99)), make=lambda v: v)
    assert [(group.low, group.high, group.n) for group in groups] == [(20, 30, 3), (50, 59, 3)]
    assert [group.heat.max() for group in groups] == pytest.approx([1, 4])


def test_volumes_of_another_preprocessing_are_refused():
    store, bundle = store_and_bundle()
    store.fingerprint = "other"
    with pytest.raises(ValueError, match="expects same"):
        age_group_maps(bundle, store, pd.DataFrame({"scan_id": [], "age": []}))


def test_regions_get_the_heat_that_lies_in_them():
    labels = np.repeat([0, 1, 2], 4)
    heat = np.repeat([9.0, 1.0, -3.0], 4)
    table = region_table(heat, labels, ["one", "two"]).set_index("region")
    assert table.loc["two", "share"] == pytest.approx(0.75) and table.loc["two", "density"] == pytest.approx(
        1.5
    )
    assert table.loc["two", "mean_heat"] == -3 and table.index[0] == "two"


def test_coarse_regions_lie_where_anatomy_puts_them():
    labels, (_, affine) = coarse_regions(), template_grid()

    def at(*mm):
        return REGIONS[labels[tuple(np.round(np.linalg.solve(affine, [*mm, 1])[:3]).astype(int))] - 1]

    assert at(-30, 45, 20) == "frontal" and at(40, -50, 50) == "parietal" and at(10, -90, 5) == "occipital"
    assert at(-55, -20, -15) == "temporal" and at(20, -65, -40) == "cerebellum and brain stem"
    assert at(8, 12, 12) == "ventricles and around them" and at(0, 0, 94) == "outside the brain"
    assert len(np.unique(labels)) == len(REGIONS)


def test_heat_on_the_planted_places_scores_one_and_noise_a_half():
    rng = np.random.default_rng(0)
    planted = (rng.random((20, 20, 20)) > 0.8).astype(float)
    inside = np.ones(planted.shape, bool)
    assert localisation(-planted, planted, inside) == 1  # absolute: heat that lowers the age counts too
    assert localisation(1 - planted, planted, inside) == 0
    assert localisation(rng.random(planted.shape), planted, inside) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="needs both kinds"):
        localisation(planted, np.ones(planted.shape), inside)


def test_registered_volumes_lie_where_their_registration_put_them():
    registered = PreprocessingSettings(spacing_mm=4.0, size=48, to_mni=True)
    np.testing.assert_allclose(cube_to_template(registered), mni_grid(4.0, 48))
