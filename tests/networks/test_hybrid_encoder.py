"""The hybrid encoder of the tiny SAM: shapes, size, normalisation, position tables, SAM's own blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blosam_monai.networks.hybrid_encoder import HybridEncoder
from blosam_monai.networks.sam import build_sam, import_segment_anything

Block = import_segment_anything().modeling.image_encoder.Block
WIDTH, DEPTH, HEADS, CHANNELS = 192, 6, 6, 128  # of the tiny SAM


def ramp(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)


@pytest.fixture(scope="module")
def small() -> HybridEncoder:
    """One block of 32 channels, 16 out, for images of 64 pixels. Shared: tests must not change it."""
    torch.manual_seed(0)
    return HybridEncoder(64, 32, 1, 2, out_channels=16, block=Block).eval()


@pytest.mark.parametrize("image_size", [64, 256, pytest.param(512, marks=pytest.mark.slow)])
def test_the_embedding_has_128_channels_and_a_place_for_8_pixels(image_size):
    encoder = build_sam("tiny", image_size, "random").image_encoder
    with torch.no_grad():
        embedding = encoder(torch.randn(1, 3, image_size, image_size))
    assert embedding.shape == (1, 128, image_size // 8, image_size // 8)
    assert torch.isfinite(embedding).all()


@pytest.mark.parametrize("image_size", [64, 256, 512])
def test_the_parameters_are_those_counted_by_hand(image_size):
    side = image_size // 16
    stem = (
        *(9 * 3 * 32, 2 * 32),  # kernel and the scale and shift of its normalisation, to stride 2
        *(9 * 32 * 64, 2 * 64),  # to stride 4
        *(2 * 9 * 64 * 64, 2 * 2 * 64),  # residual: two of each
        *(9 * 64 * 128, 2 * 128),  # to stride 8
        *(2 * 9 * 128 * 128, 2 * 2 * 128),
    )
    to_tokens = (9 * 128 * WIDTH, 2 * WIDTH)  # to stride 16
    block = (
        2 * 2 * WIDTH,  # two normalisations
        *(WIDTH * 3 * WIDTH, 3 * WIDTH),  # queries, keys, values
        *(WIDTH * WIDTH, WIDTH),  # projection
        *(WIDTH * 4 * WIDTH, 4 * WIDTH, 4 * WIDTH * WIDTH, WIDTH),  # two layers, four times as wide between
        2 * (2 * side - 1) * WIDTH // HEADS,  # relative positions along rows and columns
    )
    out = (
        2 * WIDTH,  # normalisation of the tokens
        *(WIDTH * CHANNELS, CHANNELS),  # from the tokens
        *(128 * CHANNELS, CHANNELS),  # from the stem
        *(2 * 9 * CHANNELS * CHANNELS, 2 * 2 * CHANNELS),  # residual
        *(CHANNELS * CHANNELS, 2 * CHANNELS),  # last kernel, last normalisation
    )
    expected = sum(stem) + sum(to_tokens) + side**2 * WIDTH + DEPTH * sum(block) + sum(out)
    encoder = build_sam("tiny", image_size, "random").image_encoder
    assert sum(p.numel() for p in encoder.parameters()) == expected


def test_every_place_has_mean_zero_and_deviation_one_over_its_channels(small):
    """Before training: scale one, shift zero."""
    with torch.no_grad():
        embedding = small(torch.randn(2, 3, 64, 64)).numpy()
    assert abs(embedding.mean(1)).max() < 1e-5
    assert abs(embedding.var(1) - 1).max() < 1e-3


def test_every_place_sees_the_whole_picture(small):
    """The blocks attend globally: a pixel in one corner moves the embedding in the other."""
    image = torch.randn(1, 3, 64, 64)
    touched = image.clone()
    touched[..., 0, 0] += 10
    with torch.no_grad():
        difference = (small(touched) - small(image)).abs().amax(1)[0]
    assert (difference > 0).all()


def test_detail_finer_than_a_token_reaches_the_embedding(small):
    """A tenth of its variance, or more, is lost where 2 x 2 places, as many as a token covers, are averaged."""
    with torch.no_grad():
        embedding = small(torch.randn(1, 3, 64, 64))
        smooth = nn.functional.interpolate(
            nn.functional.avg_pool2d(embedding, 2), scale_factor=2, mode="bilinear", align_corners=False
        )
    assert float((embedding - smooth).var() / embedding.var()) > 0.1


def test_it_has_the_fused_projection_of_sam_that_low_rank_updates_look_for():
    sam = build_sam("tiny", 64, "random")
    assert len(sam.image_encoder.blocks) == DEPTH
    for block in sam.image_encoder.blocks:
        assert isinstance(block, Block)
        assert isinstance(block.attn.qkv, nn.Linear)
        assert (block.attn.qkv.in_features, block.attn.qkv.out_features) == (WIDTH, 3 * WIDTH)
        assert block.window_size == 0


@pytest.mark.parametrize("image_size", [128, 256])
def test_its_position_tables_are_resized_to_another_image_size(image_size, tmp_path):
    state = build_sam("tiny", 64, "random").state_dict()
    state["image_encoder.pos_embed"] = (10 * ramp(4)[:, None] + ramp(4))[None, :, :, None].expand(1, 4, 4, WIDTH)
    for name in [name for name in state if ".rel_pos_" in name]:
        state[name] = ramp(7)[:, None].expand(7, WIDTH // HEADS)
    torch.save(state, tmp_path / "tiny.pth")
    encoder = build_sam("tiny", image_size, tmp_path / "tiny.pth").image_encoder
    side = image_size // 16
    centres = ((ramp(side) + 0.5) * 4 / side - 0.5).clamp(0, 3)  # of the new cells, counted in the old ones
    torch.testing.assert_close(encoder.pos_embed[0, :, :, 5].detach(), 10 * centres[:, None] + centres)
    steps = ((ramp(2 * side - 1) + 0.5) * 7 / (2 * side - 1) - 0.5).clamp(0, 6)
    for block in encoder.blocks:
        torch.testing.assert_close(block.attn.rel_pos_h[:, 3].detach(), steps)
        torch.testing.assert_close(block.attn.rel_pos_w[:, 3].detach(), steps)


def test_convolutions_do_not_care_for_the_image_size():
    """All that depends on it are tables of positions."""
    small, large = (build_sam("tiny", size, "random").image_encoder.state_dict() for size in (64, 256))
    differing = {name for name, value in small.items() if value.shape != large[name].shape}
    relative = {f"blocks.{i}.attn.rel_pos_{axis}" for i in range(DEPTH) for axis in "hw"}
    assert differing == {"pos_embed", *relative}
    assert math.prod(large["pos_embed"].shape) == 16 * math.prod(small["pos_embed"].shape)
