"""Low-rank adaptation against the arithmetic written out, and against the paper's counts."""

import copy

import pytest
import torch
from torch import nn

from blosam_monai.networks.lora import LoRALinear, add_lora, lora_parameters, merge_lora


@pytest.fixture
def transformer(small_sam):
    """A copy of SAM's two-way transformer."""
    return copy.deepcopy(small_sam.mask_decoder.transformer)


def test_a_fresh_layer_is_the_layer_that_it_wraps_bit_for_bit():
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 8), torch.randn(4, 5, 16)
    assert torch.equal(LoRALinear(linear, 4)(x), linear(x))


def test_the_update_is_b_times_a_without_scaling():
    layer = LoRALinear(nn.Linear(2, 1), 1)
    for tensor, value in (
        (layer.linear.weight, [[1.0, 2.0]]),
        (layer.linear.bias, [10.0]),
        (layer.lora_a, [[3.0, 4.0]]),
        (layer.lora_b, [[5.0]]),
    ):
        tensor.data = torch.tensor(value)
    assert layer(torch.tensor([1.0, -1.0])).item() == (1 - 2) + 10 + 5 * (3 - 4)


def test_a_starts_uniform_within_one_over_the_root_of_its_inputs():
    torch.manual_seed(0)
    a = LoRALinear(nn.Linear(256, 256), 16).lora_a  # Kaiming with slope sqrt(5): bound sqrt(6 / (6 * 256)) = 1 / 16
    assert 0.99 / 16 < a.abs().max() <= 1 / 16
    assert a.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)


def test_a_merged_layer_computes_what_the_wrapped_one_did():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(16, 8), 4).double(), torch.randn(5, 16, dtype=torch.float64)
    nn.init.normal_(layer.lora_b)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), atol=1e-12, rtol=0)


def test_a_merged_layer_keeps_no_tensor_of_the_wrapped_one():
    layer = LoRALinear(nn.Linear(4, 4), 2)
    merged = layer.merged()
    before = layer.linear.bias.clone()
    merged.bias.data += 1
    assert torch.equal(layer.linear.bias, before)


def test_fourteen_layers_of_sams_decoder_are_wrapped(transformer):
    assert add_lora(transformer, ("q_proj", "v_proj"), rank=4) == 14  # q and v of seven attentions
    wrapped = [name for name, layer in transformer.named_modules() if isinstance(layer, LoRALinear)]
    assert {name.rsplit(".", 1)[1] for name in wrapped} == {"q_proj", "v_proj"}
    assert len(wrapped) == 14


@pytest.mark.parametrize(("rank", "count"), [(1, 5_888), (4, 23_552)])
def test_the_number_of_low_rank_parameters_is_the_papers(transformer, rank, count):
    # Two self-attentions 256 -> 256 and five cross-attentions 256 -> 128, q and v: 2 r (2 * 512 + 5 * 384).
    add_lora(transformer, ("q_proj", "v_proj"), rank=rank)
    assert sum(p.numel() for p in lora_parameters(transformer)) == count


def test_a_merged_transformer_has_sams_own_tensor_names_and_its_output(transformer):
    torch.manual_seed(0)
    names = list(transformer.state_dict())
    add_lora(transformer, ("q_proj", "v_proj"), rank=4)
    for factor in lora_parameters(transformer):
        nn.init.normal_(factor, std=0.05)
    arguments = torch.randn(1, 256, 4, 4), torch.randn(1, 256, 4, 4), torch.randn(1, 6, 256)
    with torch.no_grad():
        wrapped = transformer(*arguments)
        merge_lora(transformer)
        merged = transformer(*arguments)
    assert list(transformer.state_dict()) == names
    for a, b in zip(wrapped, merged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=rf"lora_rank: {rank} must be at least 1"):
        LoRALinear(nn.Linear(2, 2), rank)


def test_names_that_no_layer_has_are_refused(transformer):
    with pytest.raises(ValueError, match="TwoWayTransformer has no linear layer named qkv"):
        add_lora(transformer, ("qkv",), rank=4)
