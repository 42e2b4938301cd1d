from types import SimpleNamespace

import numpy as np
import pytest

from brainage_nb.predict.cautions import STATISTICS, Distance, find_head_cautions, measure_remoteness
from brainage_nb.volumes.scan_statistics import SCAN_STATISTICS

N = len(STATISTICS)


@pytest.fixture(scope="module")
def draw():
    """Descriptions (n, 18) of scans that differ in four ways, with long tails; one number constant."""
    mixing = np.random.default_rng(0).normal(0, 1, (4, N)) * np.logspace(-3, 3, N)

    def rows(n, seed):
        rng = np.random.default_rng(seed)
        made = rng.standard_t(4, (n, 4)) @ mixing + rng.normal(0, 0.1, (n, N)) * np.logspace(-3, 3, N)
        made[:, 5] = 7.0
        return made

    return rows


@pytest.mark.parametrize(("n", "far"), [(20, 1), (64, 1), (98, 1), (99, 1), (200, 2)])
def test_of_ordinary_scans_just_as_many_are_called_far_as_is_claimed(n, far, draw):
    scans = draw(n + 1, n)
    found = [measure_remoteness(np.delete(scans, k, axis=0), scan) for k, scan in enumerate(scans)]
    assert sum(one.p_value <= one.limit for one in found) == far
    assert found[0].limit == far / (n + 1)


@pytest.mark.parametrize("n", [20, 200])
def test_scans_from_elsewhere_are_further_than_all(n, draw):
    found = [measure_remoteness(draw(n, 1), scan) for scan in draw(20, 7) * 5 + 8]
    assert np.mean([one.n_nearer == n for one in found]) > 0.9


def test_that_in_which_a_scan_differs_most_is_named(draw):
    training = draw(40, 1)
    noisy = training.mean(axis=0)
    noisy[STATISTICS.index("noise")] += 20 * training[:, STATISTICS.index("noise")].std()
    found = measure_remoteness(training, noisy)
    assert (found.most_in, found.n_nearer, found.p_value) == ("noise", 40, 1 / 41)


def old_arrays(rng):
    """As a bundle of release 0.1.0 has them."""
    old = {"mean": rng.normal(size=N - 1), "scale": rng.uniform(1, 2, N - 1), "limit": np.asarray(1.5)}
    return old | {"axes": rng.normal(size=(N - 1, 5)), "whiten": rng.normal(size=(5, 5))}


def test_the_arrays_of_release_0_1_0_give_the_distance_they_gave(draw):
    old = old_arrays(np.random.default_rng(3))
    for row in draw(6, 2)[:, :-1]:
        whitened = (row - old["mean"]) / old["scale"] @ old["axes"] @ old["whiten"]
        expected = np.sqrt((whitened**2).sum() / 5) / 1.5
        assert Distance.from_arrays(old).times_too_far(row) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mean", lambda array: array * np.nan, "not finite"),
        ("precision", lambda array: array * np.nan, "not finite"),
        ("limit", lambda array: array * np.nan, "not finite"),
        ("precision", lambda array: -array, "not positive"),
        ("mean", lambda array: array[1:], "distances from training have shapes"),
    ],
)
def test_arrays_of_old_bundles_that_are_damaged_are_refused(name, change, said):
    arrays = vars(Distance.from_arrays(old_arrays(np.random.default_rng(3))))
    with pytest.raises(ValueError, match=said):
        Distance.from_arrays(arrays | {name: change(np.asarray(arrays[name]))})


@pytest.mark.parametrize("stripped", [True, False])
def test_a_head_prepared_otherwise_than_those_of_training_gives_no_age_to_use(stripped):
    head = SimpleNamespace(cut_off=[], skull_stripped=stripped)
    assert find_head_cautions(head, trained_stripped=stripped) == []
    (caution,) = find_head_cautions(head, trained_stripped=not stripped)
    assert caution.forbids_use and caution.sentence.startswith("Do not use this age")


@pytest.mark.parametrize("stripped", [True, False])
def test_a_model_of_the_brain_core_only_warns_of_a_head_prepared_otherwise(stripped):
    head = SimpleNamespace(cut_off=[], skull_stripped=stripped)
    assert find_head_cautions(head, trained_stripped=stripped, by_core=True) == []
    (caution,) = find_head_cautions(head, trained_stripped=not stripped, by_core=True)
    assert caution.code == "other_skull" and not caution.forbids_use


def test_a_scan_is_far_by_what_it_was_before_preprocessing_too(draw):
    rng = np.random.default_rng(5)
    scans = np.column_stack([draw(66, 3), 3 + 0.02 * rng.normal(size=(66, len(SCAN_STATISTICS)))])
    scans[:, -4] = np.log(2.0)  # the voxels of all are alike
    *training, one = scans
    alike = measure_remoteness(np.array(training), one)
    one[-4] += 0.01
    assert measure_remoteness(np.array(training), one).n_nearer - alike.n_nearer < 10
    one[-4] = np.log(3.0)
    far = measure_remoteness(np.array(training), one)
    assert (far.n_nearer, far.most_in) == (65, "the scan's voxels")
