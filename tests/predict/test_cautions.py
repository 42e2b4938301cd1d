import numpy as np
import pytest

from brainage_nb.predict.cautions import Distance

N = 17


@pytest.fixture(scope="module")
def draw():
    """Statistics (n, 17) of scans that differ in four ways, one number constant."""
    mixing = np.random.default_rng(0).normal(0, 1, (4, N)) * np.logspace(-3, 3, N)

    def rows(n, seed):
        rng = np.random.default_rng(seed)
        made = rng.normal(0, 1, (n, 4)) @ mixing + rng.normal(0, 0.1, (n, N)) * np.logspace(-3, 3, N)
        made[:, 5] = 7.0
        return made

    return rows


def test_scans_like_those_of_training_are_rarely_called_far(draw):
    distance = Distance.fit(draw(200, 1))
    assert (distance.measure(draw(400, 5)) > distance.limit).mean() < 0.06


def test_scans_from_elsewhere_are_called_far(draw):
    distance = Distance.fit(draw(200, 1))
    assert (distance.measure(draw(50, 7) * 3 + 8) > distance.limit).mean() > 0.9


def test_a_distance_is_mahalanobis_in_standard_deviations():
    rows = np.random.default_rng(0).normal(5, 2, (2000, N))
    distance = Distance.fit(rows)
    expected = np.sqrt((((rows - 5) / 2) ** 2).mean(axis=1))
    np.testing.assert_allclose(distance.measure(rows), expected, rtol=0.1)


def test_the_arrays_of_release_0_1_0_give_the_distance_they_gave(draw):
    rng = np.random.default_rng(3)
    old = {"mean": rng.normal(size=N), "scale": rng.uniform(1, 2, N), "limit": 1.5}
    old |= {"axes": rng.normal(size=(N, 5)), "whiten": rng.normal(size=(5, 5))}
    rows = draw(6, 2)
    whitened = (rows - old["mean"]) / old["scale"] @ old["axes"] @ old["whiten"]
    expected = np.sqrt((whitened**2).sum(axis=1) / 5)
    np.testing.assert_allclose(Distance.from_arrays(old).measure(rows), expected)


@pytest.mark.parametrize("name", ["mean", "precision", "limit"])
def test_content_that_is_not_finite_is_refused(name, draw):
    arrays = {name: np.asarray(value) for name, value in vars(Distance.fit(draw(60, 1))).items()}
    with pytest.raises(ValueError, match="not finite"):
        Distance.from_arrays(arrays | {name: arrays[name] * np.nan})
