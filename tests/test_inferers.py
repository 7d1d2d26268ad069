"""How engines call the network: embeddings, pictures, volumes."""

import numpy as np
import pytest
import torch

from blosam_monai.inferers import EmbeddingInferer, SliceStreamInferer
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.transforms import PreprocessImaged, RestoreSized, binarise_tasks, merge_tasks


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = PromptSam("tiny", 64, "random", ["a", "b"]).eval()
    for parameter in (*network.lower_parameters(), *network.upper_parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)  # so that the two tasks differ
    return network


@pytest.fixture(scope="module")
def volume():
    """(1, 5, 20, 30), 0 to 255."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 5, 20, 30)).astype(np.uint8))


def one_by_one(volume: torch.Tensor, network: PromptSam, spacing=(1.0, 1.0)) -> torch.Tensor:
    """Logits (T, D, H, W) by the transforms of single pictures."""
    planes = []
    for plane in volume.unbind(1):
        item = {"image": plane.float().repeat(3, 1, 1), "native_size": plane.shape[1:], "spacing": spacing}
        item = PreprocessImaged(64)(item)
        with torch.no_grad():
            item["pred"] = network(item["image"][None])[0]
        planes.append(RestoreSized()(item)["pred"])
    return torch.stack(planes, dim=1)


class CountingNetwork(torch.nn.Module):
    """Stands in for a network of one task: its logit is the gray value; counts calls and slices."""

    tasks = ("gray",)
    prompted = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, image):
        self.batches.append(len(image))
        return image.mean(1, keepdim=True)


def test_decoding_an_embedding_equals_the_network_on_its_image(network):
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = EmbeddingInferer()(network.encode(image), network)
        assert logits.shape == (2, 2, 64, 64)
        assert torch.equal(logits, network(image))


def test_a_volume_is_its_slices_as_pictures_one_by_one(network, volume):
    expected = one_by_one(volume, network)
    logits = SliceStreamInferer(64)(volume, network)
    assert logits.shape == (2, 5, 20, 30)
    assert logits.dtype == torch.float16
    assert (logits.float() - expected).abs().max() < 2e-3 * expected.abs().max()
    assert torch.equal(SliceStreamInferer(64, decide=merge_tasks)(volume, network), merge_tasks(expected))
    assert torch.equal(SliceStreamInferer(64, decide=binarise_tasks)(volume, network), binarise_tasks(expected))


def test_a_picture_is_a_volume_of_one_slice_in_full_precision(network, volume):
    logits = SliceStreamInferer(64)(volume[:, 2:3].float(), network)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, one_by_one(volume[:, 2:3], network), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_the_size_of_the_batch_changes_nothing_but_the_number_of_calls(volume, batch_size):
    counting = CountingNetwork()
    logits = SliceStreamInferer(64, batch_size=batch_size)(volume, counting)
    assert counting.batches == [batch_size] * (5 // batch_size) + ([5 % batch_size] if 5 % batch_size else [])
    assert torch.allclose(logits, SliceStreamInferer(64)(volume, CountingNetwork()), atol=1e-2)


def test_pixels_that_are_not_square_are_made_square(network, volume):
    """Slices of 20 x 30 pixels of 3 x 2 mm are square: the whole input is used."""
    logits = SliceStreamInferer(64, decide=lambda plane: plane)(volume, network, spacing=(1, 3, 2))
    assert torch.allclose(logits, one_by_one(volume, network, (3.0, 2.0)), atol=1e-5)
    assert PreprocessImaged(64)({"image": torch.rand(3, 20, 30), "spacing": (3.0, 2.0)})["input_size"].tolist() == [
        64,
        64,
    ]


def test_averaging_is_the_mean_over_the_slices_along_three_axes(network):
    """By hand: the other two stacks are cut and turned as radiologists look at them, their results turned back."""
    volume = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 6, 7, 8)).astype(np.uint8))
    axial = one_by_one(volume, network)
    coronal = one_by_one(volume.permute(0, 2, 1, 3).flip(2), network).flip(2).permute(0, 2, 1, 3)
    sagittal = one_by_one(volume.permute(0, 3, 1, 2).flip(2), network).flip(2).permute(0, 2, 3, 1)
    expected = (axial + coronal + sagittal) / 3
    mean = SliceStreamInferer(64, average_axes=True)(volume, network, slice_axis="axial")
    assert (mean.float() - expected).abs().max() < 5e-3 * expected.abs().max()
    decided = SliceStreamInferer(64, average_axes=True, decide=merge_tasks)(volume, network)
    assert torch.equal(decided, merge_tasks(mean.float()))


def test_a_batch_of_cases_is_its_cases(network, volume):
    both = torch.stack([volume, volume.flip(1)])
    found = SliceStreamInferer(64, decide=merge_tasks)(both, network)
    assert torch.equal(found[1], SliceStreamInferer(64, decide=merge_tasks)(volume.flip(1), network))


def test_neighbours_along_one_axis_are_not_averaged_over_three():
    with pytest.raises(ValueError, match="average_axes: the model was trained with neighbours=2 along one axis"):
        SliceStreamInferer(64, average_axes=True, neighbours=2)


class PromptedNetwork(torch.nn.Module):
    """Stands in for an oracle: notes the prompts of every slice, (T, 8)."""

    tasks = ("a", "b")
    prompted = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.prompts = []

    def forward(self, image, prompts):
        self.prompts.extend(prompts)
        return image[:, :2]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_network_that_takes_prompts_gets_those_of_each_slices_own_label(batch_size):
    """Slices as large as the input. A block of 3 x 3 moves down by 10 a slice; slice 1 alone shows the second task."""
    label = torch.zeros(2, 3, 64, 64)
    for d in range(3):
        label[0, d, 10 * d + 5 : 10 * d + 8, 20:23] = 1
    label[1, 1] = label[0, 1]
    network = PromptedNetwork()
    volume = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    SliceStreamInferer(64, batch_size=batch_size)(volume, network, label=label)
    for d, (first, second) in enumerate(network.prompts):
        top = 10 * d + 5
        assert first[:2].tolist() == [21, top + 1]  # the middle, x before y
        assert first[4:].tolist() == [20, top, 22, top + 2]
        assert torch.equal(second, first) if d == 1 else second.isnan().all()
    assert len(network.prompts) == 3


def test_a_network_that_takes_no_prompts_never_sees_the_label(volume):
    label = torch.full((1, 5, 20, 30), torch.nan)  # would be an error to look at
    found = SliceStreamInferer(64)(volume, CountingNetwork(), label=label)
    assert torch.equal(found, SliceStreamInferer(64)(volume, CountingNetwork()))


def test_prompts_of_one_axis_are_not_averaged_over_three(volume):
    with pytest.raises(ValueError, match="average_axes: prompts from a label belong to one axis"):
        SliceStreamInferer(64, average_axes=True)(volume, PromptedNetwork(), label=torch.zeros(2, 5, 20, 30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_volume_on_cuda_is_the_volume_on_the_cpu(network, volume):
    expected = SliceStreamInferer(64)(volume, network)
    try:
        found = SliceStreamInferer(64, batch_size=4)(volume, network.cuda())
    finally:
        network.cpu()
    assert found.device.type == "cpu"
    assert (found.float() - expected.float()).abs().max() < 1e-2 * expected.abs().max()


def test_an_unknown_preprocessing_is_refused():
    with pytest.raises(ValueError, match="preprocess: 'zoom' is not one of sam, paper"):
        SliceStreamInferer(64, "zoom")
