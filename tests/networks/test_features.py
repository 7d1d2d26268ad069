"""ResNet features against torchvision's own network, and what is refused of a file of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blosam_monai.networks.features import LAYERS, ResNetFeatures, pack, read_weights, unpack
from blosam_monai.networks.sam import import_segment_anything
from blosam_monai.transforms import preprocess_picture


def torchvision_resnet(**options) -> nn.Module:
    """torchvision's own ResNet-50 in evaluation mode, with statistics as after a training."""
    import_segment_anything()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50(weights=None, **options)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(1.0, 3.0)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Undilated, as it comes."""
    return torchvision_resnet()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(model.state_dict(), path)
    return path


def picture() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: nn.Module, *names: str) -> list[Tensor]:
    """What the named modules of a model return for the picture."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found.update({name: y}))
        for name in names
    ]
    model(picture())
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


def assert_equal_to(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def dilated(model) -> nn.Module:
    """torchvision's network with output stride 8 and the same weights."""
    dilated = torchvision_resnet(replace_stride_with_dilation=[False, True, True])
    dilated.load_state_dict(model.state_dict())
    return dilated


def test_layer4_is_that_of_the_dilated_network_before_its_last_relu(dilated, weights):
    found = ResNetFeatures(64, weights, layers="layer4")(picture())
    assert (found < 0).any()
    assert_equal_to(found.relu(), outputs(dilated, "layer4")[0])


def test_layer3_is_that_of_the_dilated_network(dilated, weights):
    assert_equal_to(ResNetFeatures(64, weights, layers="layer3")(picture()), outputs(dilated, "layer3")[0])


def test_layers_2_and_3_are_concatenated(dilated, weights):
    expected = torch.cat(outputs(dilated, "layer2", "layer3"), dim=1)
    assert_equal_to(ResNetFeatures(64, weights, layers="layer2+3")(picture()), expected)


def test_the_pyramid_is_of_the_13_bottlenecks_of_the_undilated_network_before_their_last_relu(model, weights):
    features = ResNetFeatures(64, weights, layers="pyramid")
    names = [f"layer{layer}.{block}" for layer, count in ((2, 4), (3, 6), (4, 3)) for block in range(count)]
    found = features.unpack(features(picture()))
    assert len(found) == 13
    assert all((one < 0).any() for one in found)
    for one, expected in zip(found, outputs(model, *names), strict=True):
        assert_equal_to(one.relu(), expected)


@pytest.mark.parametrize("layers", LAYERS)
def test_the_shapes_are_those_of_the_maps(layers):
    features = ResNetFeatures(96, layers=layers)
    maps = features.unpack(features(torch.zeros(1, 3, 96, 96)))
    assert [tuple(one.shape[1:]) for one in maps] == features.shapes


def test_training_mode_changes_nothing_and_nothing_trains(weights):
    features = ResNetFeatures(64, weights, layers="layer3")
    before = features.eval()(picture())
    assert torch.equal(features.train()(picture()), before)
    assert not any(p.requires_grad for p in features.parameters())


def test_sams_preprocessing_is_what_torchvisions_imagenet_weights_expect():
    import_segment_anything()
    from torchvision.models import ResNet50_Weights
    from torchvision.transforms.functional import normalize

    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    image = 255 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, _ = preprocess_picture(image, 64, "sam")
    torch.testing.assert_close(found, normalize(image / 255, preset.mean, preset.std), atol=1e-5, rtol=0)


def test_maps_of_several_sizes_are_packed_and_come_back():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    rows = pack(maps)
    assert rows.shape == (2, 3 * 16 + 5 * 4)
    for found, one in zip(unpack(rows[None], [(3, 4, 4), (5, 2, 2)]), maps, strict=True):
        assert torch.equal(found[0], one)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows hold 7 values, maps of \[\(2, 2, 2\)\] 8"):
        unpack(torch.zeros(1, 7), [(2, 2, 2)])


def test_weights_are_random_by_name_seeded_and_flagged(caplog):
    features = [ResNetFeatures(64, layers="layer3", seed=seed)(picture()) for seed in (0, 0, 1)]
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    assert ResNetFeatures(64).weights == "random"
    assert "ResNet-50 has random weights" in caplog.text


def test_a_safetensors_file_is_read_as_a_pth_file(model, weights, tmp_path):
    save_file(model.state_dict(), tmp_path / "resnet50.safetensors")
    found, expected = read_weights(tmp_path / "resnet50.safetensors")[0], read_weights(weights)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"layers": "layer5"}, "layers: 'layer5' is not one of"), ({"image_size": 100}, "image_size: 100 is no positive")],
)
def test_what_resnet_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNetFeatures(**{"image_size": 64, **arguments})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights: .*resnet50\.pth does not exist"):
        ResNetFeatures(64, tmp_path / "resnet50.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_refused_in_one_line(weights, tmp_path, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as tensors") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_weights(tmp_path / "whole.pth")


def test_a_checkpoint_that_wraps_the_state_dict_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match="holds no flat state dict"):
        read_weights(tmp_path / "wrapped.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer4.2.conv3.weight"), r"1 tensors missing \(first: layer4.2.conv3.weight\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 tensors not known \(first: extra\)"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), r"1 tensors of another shape \(first: bn1.bias\)"),
    ],
)
def test_the_file_of_another_network_is_refused_naming_a_tensor(model, tmp_path, change, message):
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        ResNetFeatures(64, tmp_path / "other.pth")
