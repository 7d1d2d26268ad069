"""The whole network against ``segment_anything``: untouched, trained and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blosam_monai.networks.adapters import build_network
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.sam import build_sam, import_segment_anything


def perturb(network: PromptSam) -> PromptSam:
    """Move every trainable tensor of every task off its start, each by its own noise."""
    generator = torch.Generator().manual_seed(0)
    for p in (*network.lower_parameters(), *network.upper_parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return network


def picture(side: int) -> Tensor:
    """An RGB picture (3, S, S) with intensities 0 to 255."""
    return 255 * torch.rand(3, side, side, generator=torch.Generator().manual_seed(3))


def normalised(image: Tensor) -> Tensor:
    """(3, S, S) -> (1, 3, S, S), with the mean and standard deviation of the SAM paper's code."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return ((image - mean[:, None, None]) / std[:, None, None])[None]


def randomise_positions(network: PromptSam) -> None:
    """Fill the encoder's position tables, which start at zero in a SAM that nobody trained."""
    torch.manual_seed(2)
    for name, p in network.sam.image_encoder.named_parameters():
        if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            p.data.normal_(std=0.1)


def assert_gives_the_masks_of(sam, network: PromptSam) -> None:
    """The logits of ``network`` are those of ``segment_anything.Sam`` without prompts, to 1e-5."""
    side = network.image_size
    image = picture(side)
    reference = sam([{"image": image, "original_size": (side, side)}], multimask_output=False)[0]
    with torch.no_grad():
        embedding = network.encode(normalised(image))
        low, full = network.decoder(embedding), network.decode(embedding)
    torch.testing.assert_close(low, reference["low_res_logits"], atol=1e-5, rtol=0)
    expected = sam.postprocess_masks(reference["low_res_logits"], (side, side), (side, side))
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=0)
    assert torch.equal(full > 0, reference["masks"])


@pytest.mark.parametrize("model", ["tiny", "small_vit"])
@pytest.mark.parametrize("image_size", [64, 256, pytest.param(1024, marks=pytest.mark.slow)])
def test_around_an_untouched_sam_it_gives_the_masks_of_that_sam(small_vit, image_size, model):
    network = PromptSam(model, image_size, "random")
    randomise_positions(network)
    assert_gives_the_masks_of(build_sam_with(network), network)


def build_sam_with(network: PromptSam):
    """A second SAM with the weights of the network's."""
    sam = build_sam(network.settings["sam_model"], network.image_size, "random")
    sam.load_state_dict(network.sam.state_dict())
    return sam


@pytest.mark.slow
def test_vit_b_at_1024_gives_the_masks_of_the_sam_that_meta_builds():
    network = PromptSam("vit_b", 1024, "random")
    randomise_positions(network)
    sam = import_segment_anything().sam_model_registry["vit_b"]().eval()
    sam.load_state_dict(network.sam.state_dict())
    assert_gives_the_masks_of(sam, network)


def test_an_image_goes_in_and_one_logit_a_task_comes_out_at_its_size():
    network = PromptSam("tiny", 64, "random", ("lung", "heart"))
    with torch.no_grad():
        assert network(torch.zeros(3, 3, 64, 64)).shape == (3, 2, 64, 64)


def test_only_the_two_levels_train():
    network = PromptSam("tiny", 64, "random")
    trained = {id(p) for p in (*network.lower_parameters(), *network.upper_parameters())}
    assert {id(p) for p in network.parameters() if p.requires_grad} == trained


def test_vit_b_trains_the_papers_number_of_parameters():
    network = PromptSam("vit_b", 256, "random")
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 237_568 + 256


@pytest.mark.parametrize(("model", "side"), [("tiny", 32), ("small_vit", 16)])
def test_masks_are_drawn_on_a_grid_of_four_pixels_to_a_place_of_the_embedding(small_vit, model, side):
    network = PromptSam(model, 64, "random")  # an embedding of 8 x 8 at a stride of 8, of 4 x 4 at a stride of 16
    with torch.no_grad():
        logits = network.decoder(network.encode(torch.zeros(1, 3, 64, 64)))
    assert network.grid_size == side
    assert logits.shape == (1, 1, side, side)


def test_the_encoder_keeps_no_graph():
    network = PromptSam("tiny", 64, "random")
    assert not network.encode(torch.zeros(1, 3, 64, 64, requires_grad=True)).requires_grad


@pytest.mark.parametrize("model", ["tiny", "small_vit"])
def test_a_merged_task_gives_the_same_masks_in_sam_predictor(small_vit, model):
    network = perturb(PromptSam(model, 64, "random", ("lung", "heart")))
    sam = build_sam(model, 64, "random")
    sam.load_state_dict(network.merge("heart"), strict=True)
    predictor = import_segment_anything().SamPredictor(sam)
    image = picture(64)
    predictor.set_torch_image(image[None], (64, 64))
    full, _, low = predictor.predict_torch(None, None, multimask_output=False, return_logits=True)
    with torch.no_grad():
        embedding = network.encode(normalised(image))
        torch.testing.assert_close(network.decoder(embedding)[:, 1:], low, atol=1e-4, rtol=0)
        torch.testing.assert_close(network.decode(embedding)[:, 1:], full, atol=1e-4, rtol=0)


def test_a_task_is_merged_by_name_as_by_number():
    network = perturb(PromptSam("tiny", 64, "random", ("lung", "heart")))
    by_number = network.merge(1)
    assert all(torch.equal(value, by_number[name]) for name, value in network.merge("heart").items())
    assert not torch.equal(
        network.merge("lung")["mask_decoder.mask_tokens.weight"], by_number["mask_decoder.mask_tokens.weight"]
    )


def test_a_merged_file_starts_a_new_network_with_the_same_masks(tmp_path):
    network = perturb(PromptSam("tiny", 64, "random"))
    torch.save(network.merge(), tmp_path / "merged.pth")
    again = PromptSam("tiny", 64, tmp_path / "merged.pth")
    image = normalised(picture(64))
    with torch.no_grad():
        torch.testing.assert_close(again(image), network(image), atol=1e-4, rtol=0)


def test_merging_a_task_of_another_name_is_refused():
    with pytest.raises(ValueError, match="task 'liver' is not one of lung, heart"):
        PromptSam("tiny", 64, "random", ("lung", "heart")).merge("liver")


def test_the_settings_rebuild_the_network():
    network = PromptSam("tiny", 64, "random", ["lung"], prompt="both:2", head="two_token", lora_rank=2)
    again = build_network(network.settings, "random")
    shapes = [{name: value.shape for name, value in n.state_dict().items()} for n in (network, again)]
    assert shapes[0] == shapes[1]
    assert again.settings == network.settings
