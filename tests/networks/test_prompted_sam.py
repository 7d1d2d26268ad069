"""Prompts from a label: where they lie, and what SAM's own predictor makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blosam_monai.networks.prompted_sam import PromptedSam, label_prompts
from blosam_monai.networks.sam import import_segment_anything


def perturb(network: PromptedSam) -> PromptedSam:
    generator = torch.Generator().manual_seed(0)
    for p in network.lower_parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return network


def picture() -> Tensor:
    """An RGB picture (1, 3, 64, 64) with intensities 0 to 255."""
    return 255 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


# A point inside, one outside, and a box, of two tasks: x before y, pixels of the input.
PROMPTS = torch.tensor([[20.0, 30, 60, 5, 10, 12, 40, 50], [33, 8, 2, 61, 25, 3, 47, 19]])


# Where the prompts lie


def test_a_rectangle_is_prompted_at_its_middle_in_the_farthest_corner_and_by_its_sides():
    """Rows 1 to 5, columns 2 to 6 of 8 x 10: the corner at x = 9, y = 7 is 3 columns and 2 rows away."""
    label = torch.zeros(1, 8, 10)
    label[0, 1:6, 2:7] = 1
    assert label_prompts(label).tolist() == [[4, 3, 9, 7, 2, 1, 6, 5]]


def test_beyond_the_edge_of_the_picture_is_background_for_the_depth():
    """Columns 0 to 2 of 5 x 5: the middle column is deepest, two pixels from both sides; of its rows the first."""
    label = torch.zeros(1, 5, 5)
    label[0, :, :3] = 1
    assert label_prompts(label)[0, :2].tolist() == [1, 1]


def test_of_two_pieces_the_thicker_has_the_point_and_the_box_holds_both():
    label = torch.zeros(1, 12, 12)
    label[0, 0, 0] = 1
    label[0, 6:9, 7:10] = 1
    point, box = label_prompts(label)[0, :2], label_prompts(label)[0, 4:]
    assert point.tolist() == [8, 7]
    assert box.tolist() == [0, 0, 9, 8]


def test_an_empty_label_has_no_prompt_and_the_other_tasks_have_theirs():
    label = torch.zeros(2, 6, 6)
    label[1, 2:5, 2:5] = 1
    prompts = label_prompts(label)
    assert prompts[0].isnan().all()
    assert prompts[1, :2].tolist() == [3, 3]


# What SAM makes of them


@pytest.mark.parametrize("oracle", ["point", "box", "both"])
def test_logits_are_those_of_sam_predictor_for_the_same_prompts(oracle):
    network = PromptedSam("tiny", 64, "random", ("lung", "heart"), oracle=oracle)
    predictor = import_segment_anything().SamPredictor(network.sam)
    predictor.set_torch_image(picture(), (64, 64))
    points, boxes = PROMPTS[:, :4].reshape(2, 2, 2), PROMPTS[:, 4:]
    kinds = torch.tensor([[1, 0], [1, 0]])
    asked = {
        "point": (points[:, :1], kinds[:, :1], None),
        "box": (None, None, boxes),
        "both": (points, kinds, boxes),
    }[oracle]
    full, _, low = predictor.predict_torch(*asked, multimask_output=False, return_logits=True)
    with torch.no_grad():
        embedding = network.encode(network.sam.preprocess(picture()))
        found = network.decode((embedding, PROMPTS[None]))
        torch.testing.assert_close(network.decoder((embedding, PROMPTS[None]))[0], low[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], full[:, 0], atol=1e-5, rtol=0)


def test_the_three_oracles_ask_differently():
    image = picture() / 255
    logits = []
    for oracle in ("point", "box", "both"):
        network = PromptedSam("tiny", 64, "random", ("lung", "heart"), oracle=oracle)
        with torch.no_grad():
            logits.append(network(image, PROMPTS[None]))
    assert not any(torch.equal(logits[i], logits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_task_without_a_prompt_is_empty_and_changes_no_other():
    network = PromptedSam("tiny", 64, "random", ("lung", "heart"))
    prompts = PROMPTS.clone()
    with torch.no_grad():
        both = network(picture() / 255, prompts[None])
        prompts[0] = torch.nan
        one = network(picture() / 255, prompts[None])
    assert (one[0, 0] < -50).all()
    torch.testing.assert_close(one[0, 1], both[0, 1], atol=1e-5, rtol=0)


def test_each_image_of_a_batch_has_its_own_prompts():
    network = PromptedSam("tiny", 64, "random", ("lung", "heart"))
    images, prompts = torch.randn(2, 3, 64, 64), torch.stack([PROMPTS, PROMPTS.flip(0)])
    with torch.no_grad():
        together = network(images, prompts)
        apart = torch.cat([network(images[i : i + 1], prompts[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_without_prompts_it_says_why_it_segments_nothing():
    with pytest.raises(
        ValueError, match=r"it takes its prompts from labels \(an oracle\), and segments nothing without"
    ):
        PromptedSam("tiny", 64, "random")(picture())


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("oracle", "points", "point, box, both"),
        ("train_encoder", "lora", "frozen, adapter"),
        ("train_decoder", "lora", "frozen, full"),
    ],
)
def test_an_unknown_option_is_refused_with_those_that_are_known(option, value, known):
    with pytest.raises(ValueError, match=f"{option}: '{value}' is not one of {known}"):
        PromptedSam("tiny", 64, "random", **{option: value})


# As Med-SA trains it


def med_sa() -> PromptedSam:
    options = {"oracle": "point", "train_encoder": "adapter", "train_decoder": "full"}
    return PromptedSam("tiny", 64, "random", ("lung", "heart"), **options)


def test_an_oracle_as_it_is_trains_nothing():
    assert PromptedSam("tiny", 64, "random").count_parameters()[0] == 0


def test_med_sa_starts_as_the_plain_sam_with_the_same_prompts():
    plain = PromptedSam("tiny", 64, "random", ("lung", "heart"), oracle="point")
    with torch.no_grad():
        assert torch.equal(med_sa()(picture() / 255, PROMPTS[None]), plain(picture() / 255, PROMPTS[None]))


def test_the_embedding_of_a_trained_encoder_is_the_image():
    network, image = med_sa(), picture()
    assert network.encode(image) is image
    assert network.encoder_id is None


def test_med_sa_trains_adapters_and_decoder_and_nothing_else_of_the_encoder():
    network = perturb(med_sa())
    network.decoder((picture() / 255, PROMPTS[None])).square().sum().backward()
    encoder = network.sam.image_encoder
    assert all((".adapter." in name) == p.requires_grad for name, p in encoder.named_parameters())
    assert all(p.grad.any() for name, p in encoder.named_parameters() if ".adapter." in name)
    assert all(p.grad.any() for p in network.sam.mask_decoder.output_upscaling.parameters())


def test_the_state_of_med_sa_comes_back():
    network, again = perturb(med_sa()), med_sa()
    again.decoder.load_adapter_state(network.decoder.adapter_state())
    with torch.no_grad():
        assert torch.equal(again(picture() / 255, PROMPTS[None]), network(picture() / 255, PROMPTS[None]))
