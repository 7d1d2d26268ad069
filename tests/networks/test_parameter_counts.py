"""How many numbers each method trains around ViT-B at 256 pixels: the papers' counts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.prompted_sam import PromptedSam
from blosam_monai.networks.sam import import_segment_anything
from blosam_monai.networks.segmenter import Segmenter

BUILT = {
    "blosam": lambda: PromptSam("vit_b", 256, "random"),
    "two_token": lambda: PromptSam("vit_b", 256, "random", head="two_token"),
    "samed": lambda: PromptSam("vit_b", 256, "random", train_encoder="lora", train_decoder="full"),
    "ft_sam": lambda: PromptSam("vit_b", 256, "random", train_encoder="full", train_decoder="full"),
    "med_sa": lambda: PromptedSam("vit_b", 256, "random", train_encoder="adapter", train_decoder="full"),
    "linear_probe": lambda: PromptSam("vit_b", 256, "random", prompt="none", train_decoder="linear_probe"),
}


@cache
def build(method: str) -> Segmenter:
    """The network of a method, its tensors without values: nothing is computed here. Tests must not change it."""
    with torch.device("meta"):
        return BUILT[method]()


def trained(method: str, *parts: str) -> int:
    """Numbers trained in the tensors whose names hold one of these parts."""
    network = build(method)
    own = {id(p) for p in (*network.lower_parameters(), *network.upper_parameters())}
    named = {id(p): (name.replace("/", "."), p) for name, p in network.named_parameters() if id(p) in own}
    return sum(p.numel() for name, p in named.values() if any(part in name for part in parts))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        (("lora_a", "lora_b"), 23_552),
        (("output_upscaling",), 73_952),
        (("hypernetworks",), 139_808),
        (("mask_tokens",), 256),
        (("prompt",), 256),
    ],
)
def test_the_parts_of_blosam_have_the_papers_sizes(parts, count):
    assert trained("blosam", *parts) == count


def test_the_published_binary_network_trains_half_a_million_numbers_with_sams_iou_head():
    lower = sum(p.numel() for p in build("two_token").lower_parameters())
    modeling = import_segment_anything().modeling
    iou_head = modeling.mask_decoder.MLP(256, 256, 2, 3)  # two masks; its gradient is always zero, so it is left out
    assert lower == 377_632
    assert round((lower + size(iou_head)) / 1e6, 2) == 0.51


def test_samed_trains_low_rank_updates_of_q_and_v_in_the_encoder():
    assert trained("samed", "image_encoder") == 147_456  # 12 blocks x 2 x 2 x 4 x 768


def test_med_sa_has_two_adapters_in_each_of_twelve_blocks():
    one = sum(p.numel() for p in build("med_sa").sam.image_encoder.blocks[0].mlp.adapter.parameters())
    assert one == 295_872
    assert trained("med_sa", "adapter") == 24 * one
    assert round(24 * one / 1e6, 2) == 7.10


def test_full_fine_tuning_trains_all_of_sams_encoder_and_decoder():
    modeling = import_segment_anything().modeling
    with torch.device("meta"):  # as Meta builds them, at 256 pixels
        options = {"qkv_bias": True, "use_rel_pos": True, "window_size": 14, "global_attn_indexes": (2, 5, 8, 11)}
        encoder = modeling.ImageEncoderViT(img_size=256, embed_dim=768, depth=12, num_heads=12, **options)
        transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    assert trained("ft_sam", "image_encoder") == size(encoder)
    assert trained("ft_sam", "transformer") == size(transformer)
    head, prompt = 73_952 + 139_808 + 256, 256
    assert build("ft_sam").count_parameters()[0] == size(encoder) + size(transformer) + head + prompt


def test_a_linear_probe_is_a_weight_for_each_channel_and_a_bias():
    assert build("linear_probe").count_parameters()[0] == 257
