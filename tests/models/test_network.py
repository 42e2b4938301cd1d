"""The network: MONAI's arithmetic, ages of shape (batch,), started at the training ages."""

import pytest
import torch

from brainage_nb.models.network import (
    OwnNetwork,
    describe_network,
    load_pretrained,
    resnet18_regressor,
)

SMALL = {"widths": (4, 8, 16, 32), "blocks": (1, 1, 1, 1)}


def test_output_is_one_age_in_years_a_volume():
    model = resnet18_regressor(**SMALL, age_mean=50.0, age_sd=15.0).eval()
    ages = model(torch.randn(3, 1, 24, 20, 28))
    assert ages.shape == (3,)
    assert torch.allclose(ages, torch.full((3,), 50.0), atol=5.0)


def test_resnet18_has_33_million_weights_and_halves_at_the_stem():
    model = resnet18_regressor()
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == 33.2
    assert model.conv1.stride == (2, 2, 2)
    assert model.conv1.kernel_size == (7, 7, 7)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_it_is_monai_s_resnet18_under_the_same_names(shortcut):
    from monai.networks.nets.resnet import resnet18

    torch.manual_seed(0)
    theirs = resnet18(
        spatial_dims=3, n_input_channels=1, num_classes=1, shortcut_type=shortcut, conv1_t_stride=2
    )
    ours = resnet18_regressor(shortcut=shortcut)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and set(missing) == {"age_mean", "age_sd"}
    volumes = torch.randn(2, 1, 33, 32, 30)
    for mode in (True, False):
        assert torch.equal(theirs.train(mode)(volumes)[:, 0], ours.train(mode)(volumes))


def test_gradients_pass_the_shortcuts():
    model = resnet18_regressor(**SMALL, shortcut="A")
    block = model.layer2[0]
    x = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    block.downsample(x).sum().backward()
    assert x.grad[:, :, ::2, ::2, ::2].eq(1).all()


def test_features_are_what_the_head_sees():
    model = resnet18_regressor(**SMALL).eval()
    volumes = torch.randn(2, 1, 16, 16, 16)
    assert model.features(volumes).shape == (2, 32)
    assert torch.allclose(model.fc(model.features(volumes))[:, 0], model(volumes))


def test_medicalnet_files_load_all_but_the_head(tmp_path):
    source = resnet18_regressor(**SMALL)
    weights = {f"module.{name}": value for name, value in source.state_dict().items() if "fc" not in name}
    torch.save({"state_dict": weights}, tmp_path / "resnet_18_23dataset.pth")
    model = resnet18_regressor(**SMALL, age_mean=40.0)
    left = load_pretrained(model, tmp_path / "resnet_18_23dataset.pth")
    assert torch.equal(model.layer4[0].conv2.weight, source.layer4[0].conv2.weight)
    assert "fc.weight" in left
    assert model.age_mean == 40.0


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(resnet18_regressor(**SMALL).state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="another shape"):
        load_pretrained(resnet18_regressor(**SMALL | {"widths": (8, 8, 16, 32)}), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(resnet18_regressor(**SMALL | {"blocks": (2, 1, 1, 1)}), tmp_path / "small.pth")


def test_unknown_options_say_so():
    with pytest.raises(ValueError, match=r"Available: \['A', 'B'\]"):
        resnet18_regressor(shortcut="C")
    with pytest.raises(ValueError, match="four stages"):
        resnet18_regressor(widths=(4, 8))


def test_a_network_is_described_part_by_part():
    table = describe_network(resnet18_regressor(), 96)
    assert table.loc["conv1", "gives"] == (64, 48, 48, 48) and table.loc["layer4", "gives"] == (512, 3, 3, 3)
    assert round(table["parameters"].sum() / 1e6, 1) == 33.2
    own = OwnNetwork(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 1)), 50.0, 10.0)
    assert describe_network(own, 2)["kind"].tolist() == ["Flatten", "Linear"]


def test_a_network_of_one_s_own_gives_one_number_a_volume_or_is_refused():
    shape = {"two": 2, "one": 1}
    networks = {name: OwnNetwork(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, n)), 50.0, 10.0)
                for name, n in shape.items()}  # fmt: skip
    assert networks["one"](torch.zeros(3, 1, 2, 2, 2)).shape == (3,)
    with pytest.raises(ValueError, match=r"gives \(3, 2\) for 3 volumes"):
        networks["two"](torch.zeros(3, 1, 2, 2, 2))
