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


# A trained encoder

TRAINED_ENCODERS = {  # how it trains -> what of a block trains
    "lora": {"lora_a", "lora_b"},
    "gated": {"lora_a", "lora_b", "gate"},
    "adapter": {"weight", "bias"},
}


def with_trained_encoder(how: str, **options) -> PromptSam:
    return PromptSam("tiny", 64, "random", ("lung", "heart"), train_encoder=how, **options)


@pytest.mark.parametrize("how", [*TRAINED_ENCODERS, "full"])
def test_before_its_first_step_a_trained_encoder_is_sams(how):
    frozen, image = PromptSam("tiny", 64, "random", ("lung", "heart")), normalised(picture(64))
    with torch.no_grad():
        torch.testing.assert_close(with_trained_encoder(how)(image), frozen(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", [*TRAINED_ENCODERS, "full"])
def test_the_gradient_reaches_what_trains_in_the_encoder(how):
    network = perturb(with_trained_encoder(how))
    network.decoder(normalised(picture(64))).square().sum().backward()
    trained = {name: p for name, p in network.sam.image_encoder.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    if how == "full":
        assert len(trained) == len(list(network.sam.image_encoder.parameters()))
    else:
        assert {name.rpartition(".")[2] for name in trained} == TRAINED_ENCODERS[how]


def test_gates_of_the_encoder_are_of_the_upper_level_with_the_decoders():
    network = with_trained_encoder("gated", train_decoder="gated", lora_rank=2)
    gates = {id(p) for p in network.gate_parameters()}
    assert len(gates) == len(network.sam.image_encoder.blocks) + 14
    assert gates <= {id(p) for p in network.upper_parameters()}
    assert not gates & {id(p) for p in network.lower_parameters()}


@pytest.mark.parametrize("how", [*TRAINED_ENCODERS, "full"])
def test_a_trained_encoder_comes_back_with_the_decoders(how):
    network, again = perturb(with_trained_encoder(how)), with_trained_encoder(how)
    again.decoder.load_adapter_state(network.decoder.adapter_state())
    image = normalised(picture(64))
    with torch.no_grad():
        assert torch.equal(again(image), network(image))


def test_a_state_without_the_encoders_tensors_is_refused():
    state = PromptSam("tiny", 64, "random", ("lung", "heart")).decoder.adapter_state()
    with pytest.raises(ValueError, match=r"adapters: these tensors differ from the network's: \['encoder\."):
        with_trained_encoder("lora").decoder.load_adapter_state(state)


def test_the_embedding_of_a_trained_encoder_is_the_image():
    network, image = with_trained_encoder("lora"), normalised(picture(64))
    assert network.encode(image) is image
    assert network.encoder_id is None
    assert network.decoder.shared


def test_the_seed_decides_where_the_encoders_updates_start():
    states = [with_trained_encoder("lora", seed=seed).decoder.adapter_state() for seed in (1, 1, 2)]
    name = next(name for name in states[0] if name.startswith("encoder.") and name.endswith("lora_a"))
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_a_trained_encoder_fits_no_plain_sam():
    with pytest.raises(ValueError, match="merge: only a frozen encoder with SAM's own decoder fits a plain SAM"):
        with_trained_encoder("lora").merge()


def test_gates_of_the_encoder_are_kept_as_plain_low_rank_that_computes_the_same():
    """Of two gates a block closes one, the other, both or none."""
    network = perturb(with_trained_encoder("gated", train_decoder="gated", lora_rank=2))
    gates = [layer.gate for layer in network.sam.image_encoder.modules() if hasattr(layer, "gate")]
    closed = [(0,), (1, 2), (0, 1, 2, 3), (), (3,), (2, 3)]  # of q, q, v, v
    for gate, places in zip(gates, closed, strict=True):
        gate.data[list(places)] = 0
    state, changed = network.decoder.exported(network.decoder.adapter_state())
    assert changed["encoder_rank"] == [1, 2, 1, 1, 0, 0, 2, 2, 2, 1, 2, 0]
    options = {key: value for key, value in changed.items() if key != "effective_ranks"}
    plain = build_network({**network.settings, **options}, "random")
    plain.decoder.load_adapter_state(state)
    image = normalised(picture(64))
    with torch.no_grad():
        torch.testing.assert_close(plain(image), network(image), atol=1e-5, rtol=0)


def test_settings_of_a_trained_encoder_rebuild_the_network():
    network = with_trained_encoder("adapter", train_decoder="full")
    again = build_network(network.settings, "random")
    assert again.decoder.adapter_state().keys() == network.decoder.adapter_state().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_encoder": "all"}, "train_encoder: 'all' is not one of frozen, lora, gated, adapter, full"),
        ({"train_encoder": "lora", "encoder_rank": [4] * 3}, "lora_rank: 3 ranks given for 6 layers of 2 blocks"),
        ({"train_decoder": "linear_probe"}, "prompt: a linear_probe has none; give prompt=none"),
        ({"train_decoder": "linear_probe", "prompt": "none", "mask_prompt": True}, "a linear_probe has none"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptSam("tiny", 64, "random", **options)


def test_a_linear_probe_stands_in_the_place_of_sams_decoder():
    network = PromptSam("tiny", 64, "random", ("lung", "heart"), prompt="none", train_decoder="linear_probe")
    encoder = sum(p.numel() for p in network.sam.image_encoder.parameters())
    assert network.count_parameters() == (2 * 129, encoder + 2 * 129)
    with torch.no_grad():
        assert network(normalised(picture(64))).shape == (1, 2, 64, 64)
