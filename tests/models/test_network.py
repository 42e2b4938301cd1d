"""The network: MONAI's arithmetic, ages of shape (batch,), started at the training ages."""

import pytest
import torch

from brainage_nb.models.network import load_pretrained, resnet18_regressor

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


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_monai_weights_load_and_give_the_same_output(shortcut):
    from monai.networks.nets.resnet import resnet18

    torch.manual_seed(0)
    theirs = resnet18(
        spatial_dims=3,
        n_input_channels=1,
        num_classes=1,
        shortcut_type=shortcut,
        bias_downsample=True,
        conv1_t_stride=2,
    )
    ours = resnet18_regressor(norm="batch", shortcut=shortcut)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {"age_mean", "age_sd"}
    volumes = torch.randn(2, 1, 33, 32, 30)
    theirs.train(), ours.train()
    assert torch.allclose(theirs(volumes)[:, 0], ours(volumes), atol=1e-4)
    theirs.eval(), ours.eval()
    assert torch.allclose(theirs(volumes)[:, 0], ours(volumes), atol=1e-4)


def test_gradients_pass_the_shortcuts():
    model = resnet18_regressor(**SMALL, shortcut="A")
    block = model.layer2[0]
    x = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    block.downsample(x).sum().backward()
    assert x.grad[:, :, ::2, ::2, ::2].eq(1).all()


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_training_and_evaluation_agree_without_batchnorm(norm):
    model = resnet18_regressor(**SMALL, norm=norm)
    volumes = torch.randn(2, 1, 40, 40, 40)
    assert torch.equal(model.train()(volumes), model.eval()(volumes))
    alone = torch.cat([model(volume[None]) for volume in volumes])
    assert torch.allclose(model(volumes), alone, atol=1e-5)


def test_features_are_what_the_head_sees():
    model = resnet18_regressor(**SMALL).eval()
    volumes = torch.randn(2, 1, 16, 16, 16)
    assert model.features(volumes).shape == (2, 32)
    assert torch.allclose(model.fc(model.features(volumes))[:, 0], model(volumes))


def test_medicalnet_files_load_all_but_the_head(tmp_path):
    source = resnet18_regressor(**SMALL, norm="batch")
    weights = {f"module.{name}": value for name, value in source.state_dict().items() if "fc" not in name}
    torch.save({"state_dict": weights}, tmp_path / "resnet_18_23dataset.pth")
    model = resnet18_regressor(**SMALL, norm="batch", age_mean=40.0)
    left = load_pretrained(model, tmp_path / "resnet_18_23dataset.pth")
    assert torch.equal(model.layer4[0].conv2.weight, source.layer4[0].conv2.weight)
    assert "fc.weight" in left
    assert model.age_mean == 40.0


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(resnet18_regressor(**SMALL, norm="group").state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="another shape"):
        load_pretrained(
            resnet18_regressor(**SMALL | {"widths": (8, 8, 16, 32)}, norm="group"), tmp_path / "small.pth"
        )
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(resnet18_regressor(**SMALL, norm="batch"), tmp_path / "small.pth")


def test_unknown_options_name_what_there_is():
    with pytest.raises(ValueError, match=r"norm='layer'.*batch.*group.*instance"):
        resnet18_regressor(norm="layer")
    with pytest.raises(ValueError, match="four stages"):
        resnet18_regressor(widths=(4, 8))


def test_importing_the_network_adds_little_to_importing_torch():
    import subprocess
    import sys

    code = (
        "import sys, torch, brainage_nb.models.network as r; "
        "print(sorted(m for m in ('monai', 'accelerate', 'pandas', 'nilearn') if m in sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"
