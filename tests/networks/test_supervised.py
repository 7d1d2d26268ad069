"""The supervised baselines: their size, batch size 1, and what they start from."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.networks.sam import import_segment_anything
from blosam_monai.networks.supervised import SupervisedNet

ARCHITECTURES = ("deeplabv3", "swinunetr2d", "dynunet")
WIDTHS = {"deeplabv3": None, "swinunetr2d": 12, "dynunet": 4}
TORCHVISION_DEEPLABV3 = 42_004_074  # torchvision's documented count, of 21 classes


def small(architecture: str, tasks: tuple[str, ...] = ("lung",), **options) -> SupervisedNet:
    """The network at 64 pixels, as narrow as it gets."""
    return SupervisedNet(architecture, 64, tasks, width=WIDTHS[architecture], **options)


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def picture(batch: int = 1, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_deeplabv3_has_as_many_parameters_as_torchvisions_with_its_auxiliary_head():
    network = SupervisedNet("deeplabv3", 64)
    per_class = 2 * (256 + 1)  # a 1 x 1 convolution of 256 channels with bias, in the main and the auxiliary head
    assert count(network.parameters()) == TORCHVISION_DEEPLABV3 - 20 * per_class  # 41.99 M, as in the paper


def test_all_of_deeplabv3_trains_but_the_auxiliary_head():
    network = SupervisedNet("deeplabv3", 64)
    auxiliary = 1024 * 256 * 9 + 2 * 256 + 256 + 1  # 3 x 3 convolution, norm, 1 x 1 convolution with bias
    trained, whole = count(network.lower_parameters()), count(network.parameters())
    assert trained == whole - auxiliary


@pytest.mark.parametrize(
    ("architecture", "image_size", "width", "millions"),
    [("swinunetr2d", 256, 48, 25.1), ("swinunetr2d", 256, 24, 6.3), ("dynunet", 224, 32, 20.6)],
)
def test_monai_networks_have_the_published_number_of_parameters(architecture, image_size, width, millions):
    network = SupervisedNet(architecture, image_size, width=width)
    assert round(count(network.lower_parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_goes_in_and_one_logit_a_task_comes_out_at_its_size(architecture):
    network = small(architecture, ("lung", "heart"))
    with torch.no_grad():
        assert network(picture(2)).shape == (2, 2, 64, 64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_image_gives_every_trained_tensor_a_gradient(architecture):
    network = small(architecture).train()
    loss = TaskDiceCELoss()(network.decoder(picture()), torch.ones(1, 1, 64, 64))
    gradients = torch.autograd.grad(loss.sum(), network.lower_parameters())  # raises where a tensor has no part
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_is_segmented_the_same_alone_and_in_a_batch(architecture):
    network = small(architecture).eval()
    images = picture(2)
    with torch.no_grad():
        torch.testing.assert_close(network(images)[:1], network(images[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_few_steps_on_one_image_lower_its_loss(architecture):
    torch.manual_seed(0)
    network = small(architecture).train()
    image, label = picture(), torch.zeros(1, 1, 64, 64)
    label[..., 16:48, 16:48] = 1
    image = image + 3 * label
    optimizer = torch.optim.AdamW(network.lower_parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = TaskDiceCELoss()(network.decoder(image), label).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_settings_and_the_trained_tensors_rebuild_the_network(architecture):
    network = small(architecture, seed=1)
    settings = {key: value for key, value in network.settings.items() if key != "network"}
    again = SupervisedNet(**settings, seed=2)
    again.decoder.load_adapter_state(network.decoder.adapter_state())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(picture()), network.eval()(picture()), atol=0, rtol=0)


def test_the_seed_decides_the_start_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    first, same, other = (small("dynunet", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(picture()), same(picture()))
    assert not torch.equal(first(picture()), other(picture()))


@pytest.fixture(scope="module")
def torchvision_model() -> nn.Module:
    """torchvision's own DeepLabV3 with statistics and weights as after a pre-training."""
    import_segment_anything()
    from torchvision.models.segmentation import deeplabv3_resnet50

    torch.manual_seed(0)
    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pretrained_backbone_gives_torchvisions_features_also_while_training(torchvision_model, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = torchvision_model.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    network = SupervisedNet("deeplabv3", 64, weights=path).train()
    with torch.no_grad():
        found = network.decoder.net.backbone(picture())["out"]
        torch.testing.assert_close(found, torchvision_model.backbone(picture())["out"], atol=1e-4, rtol=1e-4)


def test_the_state_of_a_pretrained_network_carries_its_backbones_statistics(torchvision_model, tmp_path):
    torch.save(torchvision_model.state_dict(), tmp_path / "weights.pth")
    network = SupervisedNet("deeplabv3", 64, weights=tmp_path / "weights.pth")
    mean = network.decoder.adapter_state()["net.backbone.bn1.running_mean"]
    assert torch.equal(mean, torchvision_model.backbone.bn1.running_mean)


def test_weights_are_known_by_their_hash_and_scratch_by_its_name(tmp_path):
    network = small("dynunet", seed=1)
    path = tmp_path / "weights.pth"
    torch.save(network.decoder.net.state_dict(), path)
    again = small("dynunet", ("a", "b"), weights=path)
    assert network.pretrained == "scratch"
    assert again.pretrained == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_network_starts_from_another_of_its_kind_whatever_its_tasks(tmp_path):
    network = small("dynunet", ("a", "b"), seed=1)
    torch.save(network.decoder.net.state_dict(), tmp_path / "weights.pth")
    again = small("dynunet", weights=tmp_path / "weights.pth")
    state, taken = network.decoder.adapter_state(), again.decoder.adapter_state()
    differ = {
        name for name in state if state[name].shape != taken[name].shape or not torch.equal(state[name], taken[name])
    }
    assert differ == {name for name in state if name.startswith("net.output_block.")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "unet"}, "architecture: 'unet' is not one of deeplabv3, swinunetr2d, dynunet."),
        ({"architecture": "dynunet", "image_size": 80}, "image_size: 80 does not suit dynunet"),
        ({"architecture": "swinunetr2d", "image_size": 32}, "image_size: 32 does not suit swinunetr2d"),
        ({"architecture": "deeplabv3", "width": 8}, "width: 8 asked of deeplabv3"),
        ({"architecture": "swinunetr2d", "width": 32}, "width: 32 does not suit swinunetr2d; .* multiple of 12"),
        ({"architecture": "dynunet", "norm": "group"}, "norm: 'group' asked of dynunet"),
        ({"architecture": "deeplabv3", "norm": "batch"}, "norm: 'batch' is not one of group, frozen_batch"),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SupervisedNet(**{"image_size": 64, **arguments})
