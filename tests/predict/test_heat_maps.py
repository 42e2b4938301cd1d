import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brainage_nb.models.network import VoxelRegression
from brainage_nb.predict.bundle import load_bundle
from brainage_nb.predict.cautions import Caution
from brainage_nb.predict.explain import (
    GRAD_CAM,
    INTEGRATED,
    _layer_maps,
    _near_head,
    edge_map,
    explain,
    grad_cam,
    integrated_gradients,
    occlusion,
    randomised,
    strongest,
)
from brainage_nb.predict.predictors import NetworkEnsemble
from tests.models.tiny_bundle import networks, write_scan, write_tiny_bundle


@pytest.fixture(scope="module")
def network():
    return networks()[0]


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def mean():
    return np.random.default_rng(1).normal(0.2, 0.3, size=(24, 24, 24)).astype(np.float16)


@pytest.fixture
def model(network):
    return NetworkEnsemble([network], flip_averaging=True)


def with_linear(network, weight):
    beside = copy.deepcopy(network)
    beside.linear = VoxelRegression(weight, torch.zeros(24, 24, 24), 0.0)
    return beside


# --- maps in years --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_map_in_years_adds_up_to_the_age_less_that_of_the_mean_brain(mirrored, volume, mean):
    weight = torch.from_numpy(np.random.default_rng(2).normal(0.01, 0.01, (24, 24, 24)).astype(np.float32))
    members = [with_linear(networks(2)[0], weight), networks(2)[1]]
    model = NetworkEnsemble(members, flip_averaging=mirrored)
    heat = integrated_gradients(model, volume, mean)
    owed = model.predict(volume).mean() - model.predict(mean).mean()
    assert heat.shape == volume.shape and heat.dtype == np.float32
    assert abs(owed) > 1 and heat.sum() == pytest.approx(owed, abs=0.1)


class Linear(torch.nn.Module):
    """An age that is a weighted sum over voxels."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("age_mean", torch.tensor(40.0))
        self.weight = weight

    def forward(self, volumes):
        return self.age_mean + (volumes[:, 0] * self.weight).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_map_in_years_of_a_linear_model_is_exact_at_every_voxel(mirrored, volume, mean):
    weight = np.random.default_rng(3).normal(size=volume.shape).astype(np.float32)
    model = NetworkEnsemble([Linear(torch.from_numpy(weight))], flip_averaging=mirrored)
    used = (weight + weight[::-1]) / 2 if mirrored else weight  # the mirror image's age is averaged in
    expected = (volume - mean.astype(np.float32)) * used
    np.testing.assert_allclose(integrated_gradients(model, volume, mean), expected, atol=1e-4)


def test_steps_are_added_until_the_sum_is_right(model, volume, mean):
    rough = integrated_gradients(model, 9 * volume, mean, within_years=100)
    owed = model.predict(9 * volume).mean() - model.predict(mean).mean()
    fine = integrated_gradients(model, 9 * volume, mean)
    assert abs(fine.sum() - owed) < 0.1 < abs(rough.sum() - owed)


def test_a_scan_is_explained_in_years_and_the_sum_is_said(tmp_path):
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle", n=2))
    prediction = bundle.predict(write_scan(tmp_path / "a.nii", 5))
    explanation = explain(bundle, prediction)
    mean_age = bundle.model.predict(bundle.reference.mean_volume).mean()
    owed = prediction.predicted_age - mean_age
    assert explanation.method == INTEGRATED and explanation.heat.sum() == pytest.approx(owed, abs=0.1)
    assert f"{owed:+.1f} years (predicted {prediction.predicted_age:.1f}," in explanation.words
    assert f"the mean training brain {mean_age:.1f})" in explanation.words
    assert "could not be placed" not in explanation.words
    shown = explanation.picture(prediction)._suptitle.get_text()
    assert "years per cm³" in shown and "What moved this age away" in shown
    assert "Orange raises the age, blue lowers it" in shown and "NOT TO BE USED" not in shown
    forbidden = replace(prediction, warnings=(Caution.of("extreme_voxel_size", size="9 x 9 x 9"),))
    assert "years, NOT TO BE USED" in explanation.picture(forbidden)._suptitle.get_text()


def test_a_map_that_does_not_add_up_says_what_is_missing(tmp_path, monkeypatch):
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle"))
    prediction = bundle.predict(write_scan(tmp_path / "a.nii", 5))
    heat = explain(bundle, prediction).heat
    heat[0, 0, 0] += 2
    monkeypatch.setattr("brainage_nb.predict.explain.integrated_gradients", lambda *_: heat)
    assert "-2.0 years could not be placed" in explain(bundle, prediction).words


@pytest.mark.parametrize("asked", ["", INTEGRATED])
def test_a_bundle_without_the_mean_volume_gives_grad_cam_and_says_why(asked, tmp_path):
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle"))
    bundle.reference = SimpleNamespace(mean_volume=None)
    prediction = SimpleNamespace(volume=np.ones((24, 24, 24), np.float16))
    explanation = explain(bundle, prediction, asked)
    assert explanation.method == GRAD_CAM and "without the mean training volume" in explanation.words
    assert explain(bundle, prediction, GRAD_CAM).words == ""  # who asks for it is told nothing


def test_the_mean_volume_comes_with_the_bundle_and_a_wrong_one_is_refused(tmp_path):
    from brainage_nb.predict.cautions import Reference

    volumes = [np.full((24, 24, 24), value, np.float16) for value in (1, 2, 6)]
    fitted = Reference.fit(volumes)
    assert fitted.mean_volume.dtype == np.float16 and (fitted.mean_volume == 3).all()
    arrays = fitted.arrays()
    read = Reference.from_parts(fitted.to_dict(), arrays, 24)
    np.testing.assert_array_equal(read.mean_volume, fitted.mean_volume)
    for wrong in (fitted.mean_volume[1:], fitted.mean_volume * np.nan, fitted.mean_volume.astype(int)):
        with pytest.raises(ValueError, match="reference volume mean_volume"):
            Reference.from_parts(fitted.to_dict(), arrays | {"mean_volume": wrong}, 24)


# --- Grad-CAM -------------------------------------------------------------------------------------------


def test_grad_cams_have_the_volumes_shape_and_a_largest_magnitude_of_one(model, volume):
    heat = grad_cam(model, volume)
    assert heat.shape == volume.shape and np.abs(heat).max() == pytest.approx(1)


@pytest.mark.parametrize("make", [grad_cam, integrated_gradients])
def test_a_mirrored_head_gives_the_mirrored_map_where_the_model_averages_over_both(make, network, volume):
    mirrored = np.ascontiguousarray(volume[::-1])
    given = () if make is grad_cam else (np.zeros_like(volume),)
    for averaged in (True, False):
        model = NetworkEnsemble([network], flip_averaging=averaged)
        apart = np.abs(make(model, mirrored, *given)[::-1] - make(model, volume, *given)).max()
        assert (apart < 1e-4) if averaged else (apart > 1e-3)


def test_layer_maps_are_activation_times_the_gradient_that_the_network_itself_has(network, volume):
    batch = torch.from_numpy(volume)[None, None]
    kept = []

    def keep(_module, _inputs, output):
        kept.append(output)
        output.retain_grad()

    handles = [getattr(network, name).register_forward_hook(keep) for name in ("layer1", "layer2", "layer3")]
    network(batch.clone().requires_grad_()).sum().backward()
    for handle in handles:
        handle.remove()
    for layer, found in zip(kept, _layer_maps(network, batch), strict=True):
        torch.testing.assert_close(found, (layer * layer.grad).sum(dim=1, keepdim=True).detach())


def test_randomised_weights_change_the_map_and_leave_the_model_alone(network, model, volume):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn = NetworkEnsemble([randomised(network)], flip_averaging=True)
    assert np.corrcoef(grad_cam(model, volume).ravel(), grad_cam(drawn, volume).ravel())[0, 1] < 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_regression_beside_a_network_is_in_the_map_and_drawn_anew_too(network, model, volume):
    weight = torch.zeros(24, 24, 24)
    weight[3:6, 15:18, 10:12] = 1.0
    both = NetworkEnsemble([with_linear(network, weight)], flip_averaging=False)
    added = np.abs(grad_cam(both, np.ones_like(volume)))
    assert added[3:6, 15:18, 10:12].min() > 3 * np.median(added)
    assert np.abs(grad_cam(both, volume) - grad_cam(model, volume)).max() > 1e-3
    both.networks[0].linear.centre += 1  # a volume that is as usual everywhere
    assert np.abs(grad_cam(both, np.ones_like(volume)) - added).max() > 0.1
    drawn = randomised(both.networks[0]).linear.weight
    assert drawn[12:].abs().min() > 0 and (weight[12:] == 0).all()


def test_many_threads_may_share_a_network(network, model, volume, mean):
    from concurrent.futures import ThreadPoolExecutor

    batch = torch.from_numpy(volume)[None, None]
    expected, age = grad_cam(model, volume), float(network(batch).detach())
    years = integrated_gradients(model, volume, mean, within_years=100)

    def both(_):
        with torch.inference_mode():
            assert float(network(batch)) == pytest.approx(age, abs=1e-4)
            return grad_cam(model, volume), integrated_gradients(model, volume, mean, within_years=100)

    with ThreadPoolExecutor(4) as pool:
        for heat, in_years in pool.map(both, range(8)):
            np.testing.assert_allclose(heat, expected, atol=1e-5)
            np.testing.assert_allclose(in_years, years, atol=1e-4)


# --- occlusion ------------------------------------------------------------------------------------------


class OneVoxel:
    """A model whose age is 40 plus ten times one voxel; it counts the volumes it is given."""

    given = 0

    def predict(self, volume):
        self.given += 1
        return np.array([40 + 10 * volume[7, 7, 7]])


def test_occlusion_finds_the_only_place_that_matters_and_says_its_years():
    volume = np.zeros((16, 16, 16), np.float32)
    volume[1:15, 1:15, 1:15] = 1.0
    volume[7, 7, 7] = 28.0
    heat = occlusion(OneVoxel(), volume, edge=4)
    assert heat[7, 7, 7] == pytest.approx(10 * (28 - (63 + 28) / 64))  # covered by the mean of a cube
    assert heat.max() == heat[7, 7, 7]
    assert heat.shape == volume.shape and np.abs(heat[:4]).max() < 1e-3 > np.abs(heat[11:]).max()
    usual = occlusion(OneVoxel(), volume, np.full(volume.shape, 3, np.float16), edge=4)
    assert usual[7, 7, 7] == pytest.approx(10 * (28 - 3))  # covered by the mean training volume


def test_occlusion_of_plain_background_costs_nothing():
    volume = np.zeros((24, 24, 24), np.float32)
    volume[8:16, 8:16, 8:16] = 1.0
    model = OneVoxel()
    occlusion(model, volume, edge=4)
    assert model.given < 300  # of 1331 cubes


# --- beside them ----------------------------------------------------------------------------------------


def test_edges_are_where_intensity_changes():
    volume = np.zeros((12, 12, 12))
    volume[6:] = 1
    assert set(edge_map(volume).max(axis=(1, 2)).argsort()[-2:]) == {5, 6}


def test_heat_inside_of_a_thin_open_shell_of_grey_matter_is_drawn():
    radius = np.linalg.norm(np.indices((24,) * 3) - 11.5, axis=0)
    volume = np.where(radius < 9, 1e-3, 0).astype(np.float16)  # white matter is hardly grey, but not cut away
    volume[(radius > 8) & (radius < 9)] = 1
    volume[:, :, 11:13][radius[:, :, 11:13] > 8] = 0
    heat = np.where(radius < 2, 1.0, 0.0)
    assert _near_head(volume)[radius < 8].all() and not _near_head(volume)[radius > 11].any()
    assert strongest(volume, heat) == (11, 11, 11)
