import copy

import numpy as np
import pytest
import torch

from brainage_nb.models.network import VoxelRegression
from brainage_nb.predict.explain import LAYERS, edge_map, grad_cam, occlusion, randomised
from tests.models.tiny_bundle import networks


@pytest.fixture(scope="module")
def network():
    return networks()[0]


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)


def test_maps_have_the_volumes_shape_and_a_largest_magnitude_of_one(network, volume):
    for layers in (LAYERS[:3], ("layer4",)):
        heat = grad_cam([network], volume, layers)
        assert heat.shape == volume.shape and np.abs(heat).max() == pytest.approx(1)


def test_a_mirrored_head_gives_the_mirrored_map(network, volume):
    mirrored = np.ascontiguousarray(volume[::-1])
    np.testing.assert_allclose(grad_cam([network], mirrored)[::-1], grad_cam([network], volume), atol=1e-5)
    plain = grad_cam([network], volume, flip_averaging=False)
    assert np.abs(grad_cam([network], mirrored, flip_averaging=False)[::-1] - plain).max() > 1e-3


def test_elementwise_maps_of_the_last_layer_add_up_to_the_score(network, volume):
    """After the last layer come a mean and a linear step, so gradient times activation sums to the age's
    part.
    """
    batch = torch.from_numpy(volume)[None, None]
    from brainage_nb.predict.explain import _cams

    with torch.no_grad():
        expected = float(network(batch) - network.age_mean - network.age_sd * network.fc.bias)
    assert float(_cams(network, batch, ["layer4"], elementwise=True)[0].sum()) == pytest.approx(
        expected, rel=1e-4
    )


def test_randomised_weights_change_the_map_and_leave_the_model_alone(network, volume):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    heat, drawn = grad_cam([network], volume), grad_cam([randomised(network)], volume)
    assert np.corrcoef(heat.ravel(), drawn.ravel())[0, 1] < 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_regression_beside_a_network_is_in_the_map_and_drawn_anew_too(volume):
    network = copy.deepcopy(networks()[0])
    alone = grad_cam([network], volume)
    weight = torch.zeros(24, 24, 24)
    weight[3:6, 15:18, 10:12] = 1.0
    network.linear = VoxelRegression(weight, torch.zeros(24, 24, 24), 0.0)
    added = np.abs(grad_cam([network], np.ones_like(volume), flip_averaging=False))
    assert added[3:6, 15:18, 10:12].min() > 3 * np.median(added)
    assert np.abs(grad_cam([network], volume) - alone).max() > 1e-3
    network.linear.centre += 1  # a volume that is as usual everywhere
    assert np.abs(grad_cam([network], np.ones_like(volume), flip_averaging=False) - added).max() > 0.1
    drawn = randomised(network).linear.weight
    assert drawn[12:].abs().min() > 0 and (weight[12:] == 0).all()


class OneVoxel(torch.nn.Module):
    """A model whose age is 40 plus ten times one voxel; it counts the volumes it is given."""

    def __init__(self):
        super().__init__()
        self.given = 0

    def forward(self, x):
        self.given += len(x)
        return 40 + 10 * x[:, 0, 7, 7, 7]


def test_occlusion_finds_the_only_place_that_matters_and_says_its_years():
    volume = np.zeros((16, 16, 16), np.float32)
    volume[1:15, 1:15, 1:15] = 1.0
    volume[7, 7, 7] = 28.0
    heat = occlusion([OneVoxel()], volume, edge=4, flip_averaging=False)
    assert heat[7, 7, 7] == pytest.approx(10 * (28 - (63 + 28) / 64))  # covered by the mean of a cube
    assert heat.max() == heat[7, 7, 7]
    assert heat.shape == volume.shape and np.abs(heat[:4]).max() < 1e-3 > np.abs(heat[11:]).max()
    both = occlusion([OneVoxel()], volume, edge=4)
    assert both[7, 7, 7] == pytest.approx(heat[7, 7, 7] / 2, rel=0.02)  # the mirror image has it elsewhere


def test_occlusion_of_plain_background_costs_nothing():
    volume = np.zeros((24, 24, 24), np.float32)
    volume[8:16, 8:16, 8:16] = 1.0
    model = OneVoxel()
    occlusion([model], volume, edge=4, flip_averaging=False)
    assert model.given < 300  # of 1331 cubes


def test_many_threads_may_share_a_network(network, volume):
    from concurrent.futures import ThreadPoolExecutor

    batch = torch.from_numpy(volume)[None, None]
    expected, age = grad_cam([network], volume), float(network(batch).detach())

    def both(_):
        with torch.inference_mode():
            assert float(network(batch)) == pytest.approx(age, abs=1e-4)
        return grad_cam([network], volume)

    with ThreadPoolExecutor(4) as pool:
        for heat in pool.map(both, range(12)):
            np.testing.assert_allclose(heat, expected, atol=1e-5)


def test_an_unknown_layer_is_refused(network, volume):
    with pytest.raises(ValueError, match="layer9"):
        grad_cam([network], volume, ["layer9"])


def test_edges_are_where_intensity_changes():
    volume = np.zeros((12, 12, 12))
    volume[6:] = 1
    assert set(edge_map(volume).max(axis=(1, 2)).argsort()[-2:]) == {5, 6}


def test_the_published_form_is_monais(network, volume):
    from monai.visualize import GradCAM

    class WithClasses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return self.inner(x)[:, None]

    batch = torch.from_numpy(volume)[None, None].requires_grad_()
    theirs = GradCAM(WithClasses().eval(), "inner.layer2", postprocessing=lambda x: x)(batch, class_idx=0)
    theirs = theirs[0, 0].detach().numpy()
    ours = grad_cam([network], volume, ["layer2"], elementwise=False, flip_averaging=False)
    # Theirs has a ReLU on the coarse map, ours has none; where their map is positive after it, both agree.
    from brainage_nb.predict.explain import _cams

    coarse = torch.relu(_cams(network, batch.detach(), ["layer2"], elementwise=False)[0])
    expected = torch.nn.functional.interpolate(coarse, size=volume.shape, mode="trilinear")[0, 0].numpy()
    scale = np.abs(expected).max() or 1.0
    np.testing.assert_allclose(theirs / scale, expected / scale, atol=0.05)
    assert ours.shape == theirs.shape


def test_heat_inside_of_a_thin_open_shell_of_grey_matter_is_drawn():
    from brainage_nb.predict.explain import _near_head, strongest

    radius = np.linalg.norm(np.indices((24,) * 3) - 11.5, axis=0)
    volume = np.where(radius < 9, 1e-3, 0).astype(np.float16)  # white matter is hardly grey, but not cut away
    volume[(radius > 8) & (radius < 9)] = 1
    volume[:, :, 11:13][radius[:, :, 11:13] > 8] = 0
    heat = np.where(radius < 2, 1.0, 0.0)
    assert _near_head(volume)[radius < 8].all() and not _near_head(volume)[radius > 11].any()
    assert strongest(volume, heat) == (11, 11, 11)
