"""Low-rank adaptation against the arithmetic written out, and against the paper's counts."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from blosam_monai.networks.lora import (
    GatedLoRALinear,
    LoRALinear,
    QKVLoRALinear,
    add_lora,
    add_qkv_lora,
    effective_ranks,
    gate_parameters,
    lora_parameters,
    merge_lora,
    prune_lora,
)


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


# --- a rank for each layer, gates


def attentions(depth: int = 2, width: int = 6) -> nn.Module:
    """``depth`` layers named qkv, width -> 3 width, one after the other with a sum of their blocks between."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.tanh(q * k + v)

    return nn.Sequential(*(Attention() for _ in range(depth)))


def randomised(module: nn.Module) -> nn.Module:
    """Factors and gates set to noise, so that every one of them matters."""
    for tensor in (*lora_parameters(module), *gate_parameters(module)):
        nn.init.normal_(tensor)
    return module


WAYS = {
    "plain": lambda net: add_lora(net, ("qkv",), rank=3),
    "gated": lambda net: add_lora(net, ("qkv",), rank=3, gated=True),
    "by block": lambda net: add_qkv_lora(net, rank=3, blocks=("q", "v")),
    "by block, gated": lambda net: add_qkv_lora(net, rank=3, blocks=("v", "q"), gated=True),
}


@pytest.fixture(params=WAYS)
def adapted(request):
    """Two fused layers, adapted in each of the ways, nothing at its start value, double precision."""
    torch.manual_seed(0)
    net = attentions()
    assert WAYS[request.param](net) == 2
    return randomised(net).double()


def test_each_layer_takes_its_own_rank_and_rank_zero_leaves_it_plain():
    net = attentions(3)
    assert add_lora(net, ("qkv",), rank=[2, 0, 1]) == 2
    assert [type(layer.qkv) for layer in net] == [LoRALinear, nn.Linear, LoRALinear]
    assert effective_ranks(net) == {"0.qkv": 2, "2.qkv": 1}


def test_ranks_of_another_number_than_layers_are_refused():
    with pytest.raises(ValueError, match="2 ranks given for 3 layers"):
        add_lora(attentions(3), ("qkv",), rank=[1, 2])
    with pytest.raises(ValueError, match="3 ranks given for 3 layers of 2 blocks"):
        add_qkv_lora(attentions(3), rank=[1, 2, 3])


def test_a_refused_rank_leaves_the_network_as_it_was():
    net = attentions(3)
    with pytest.raises(ValueError, match="lora_rank: -1"):
        add_lora(net, ("qkv",), rank=[1, -1, 1])
    assert {type(layer.qkv) for layer in net} == {nn.Linear}


def test_the_gated_update_is_b_times_the_gates_times_a():
    layer = GatedLoRALinear(nn.Linear(2, 1), 2)
    for tensor, value in (
        (layer.linear.weight, [[1.0, 2.0]]),
        (layer.linear.bias, [10.0]),
        (layer.lora_a, [[3.0, 4.0], [1.0, 0.0]]),
        (layer.lora_b, [[5.0, 7.0]]),
        (layer.gate, [0.5, 2.0]),
    ):
        tensor.data = torch.tensor(value)
    # W x + b = -1 + 10; A x = (-1, 1); gates (0.5, 2): 5 * 0.5 * -1 + 7 * 2 * 1.
    assert layer(torch.tensor([1.0, -1.0])).item() == -1 + 10 - 2.5 + 14


def test_a_gated_layer_starts_as_the_layer_that_it_wraps_with_open_gates():
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 18), torch.randn(4, 5, 6)
    for layer in (GatedLoRALinear(linear, 4), QKVLoRALinear(linear, 2, gated=True)):
        assert torch.equal(layer(x), linear(x))
        assert layer.gate.tolist() == [1.0] * 4


def test_updates_by_block_leave_the_other_block_alone_and_are_those_of_three_separate_layers():
    torch.manual_seed(0)
    fused = nn.Linear(6, 18).double()
    layer = randomised(nn.ModuleList([QKVLoRALinear(fused, [2, 1], blocks=("v", "q"))]))[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    a, b = layer.lora_a.detach(), layer.lora_b.detach()  # q has rank 1 and comes first, v has rank 2
    w, bias = fused.weight.detach(), fused.bias.detach()
    q = x @ (w[:6] + b[:, :1] @ a[:1]).T + bias[:6]
    k = x @ w[6:12].T + bias[6:12]
    v = x @ (w[12:] + b[:, 1:] @ a[1:]).T + bias[12:]
    torch.testing.assert_close(layer(x), torch.cat((q, k, v), -1), atol=1e-12, rtol=0)


def test_merging_changes_no_output(adapted):
    x = torch.randn(4, 6, dtype=torch.float64)
    before = adapted(x)
    merge_lora(adapted)
    assert {type(layer.qkv) for layer in adapted} == {nn.Linear}
    torch.testing.assert_close(adapted(x), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("way", ["gated", "by block, gated"])
def test_pruning_drops_closed_gates_and_changes_no_output(way):
    torch.manual_seed(0)
    net, x = attentions(3).double(), torch.randn(4, 6, dtype=torch.float64)
    WAYS[way](net)
    randomised(net.double())
    first, second, third = gate_parameters(net)
    first.data[:2] = 0
    second.data[:] = 0
    before, ranks = net(x), effective_ranks(net)
    prune_lora(net)
    torch.testing.assert_close(net(x), before, atol=1e-12, rtol=0)
    assert gate_parameters(net) == []
    assert type(net[1].qkv) is nn.Linear
    lost = lora_parameters(net)[0].shape[0], lora_parameters(net)[2].shape[0]
    assert lost == (len(first) - 2, len(third))
    assert sum(ranks.values()) == len(first) - 2 + len(third)


@pytest.mark.parametrize("way", ["gated", "by block, gated"])
def test_a_pruned_network_is_rebuilt_as_plain_lora_from_its_ranks(way):
    torch.manual_seed(0)
    net = attentions(3)
    WAYS[way](net)
    first, second, _ = gate_parameters(randomised(net))
    first.data[0] = 0
    second.data[:] = 0
    ranks = list(effective_ranks(net).values())
    prune_lora(net)
    fresh = attentions(3)
    if "block" in way:
        add_qkv_lora(fresh, rank=ranks)
    else:
        add_lora(fresh, ("qkv",), rank=ranks)
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(fresh(x), net(x))


def test_effective_ranks_of_fused_layers_are_told_by_block():
    net = attentions(1)
    add_qkv_lora(net, rank=2, blocks=("q", "v"), gated=True)
    gate_parameters(net)[0].data = torch.tensor([0.0, 0.0, 1.0, -1.0])  # q first
    assert effective_ranks(net) == {"0.qkv.q": 0, "0.qkv.v": 2}


def test_stacked_tasks_map_over_the_updates_as_separate_networks_do(adapted):
    trained = {id(p) for p in (*lora_parameters(adapted), *gate_parameters(adapted))}
    names = [name for name, p in adapted.named_parameters() if id(p) in trained]
    tasks = [{name: torch.randn_like(adapted.get_parameter(name)) for name in names} for _ in range(3)]
    x = torch.randn(4, 6, dtype=torch.float64)
    apart = torch.stack([functional_call(adapted, task, (x,)) for task in tasks])
    stacked = {name: torch.stack([task[name] for task in tasks]) for name in names}
    together = torch.vmap(lambda values: functional_call(adapted, values, (x,)))(stacked)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)
    assert (apart[0] - apart[1]).abs().max() > 0.1


def test_second_derivatives_are_those_of_finite_differences(adapted):
    trained = {id(p) for p in (*lora_parameters(adapted), *gate_parameters(adapted))}
    names = [name for name, p in adapted.named_parameters() if id(p) in trained]
    x = torch.randn(2, 6, dtype=torch.float64)

    def loss(*values):
        return functional_call(adapted, dict(zip(names, values, strict=True)), (x,)).square().sum()

    values = tuple(adapted.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("blocks", [(), ("q", "q"), ("q", "x")])
def test_blocks_that_a_fused_layer_has_not_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks: "):
        QKVLoRALinear(nn.Linear(6, 18), 2, blocks=blocks)


def test_a_layer_without_three_equal_blocks_is_refused():
    with pytest.raises(ValueError, match="20 outputs"):
        QKVLoRALinear(nn.Linear(6, 20), 2)


def test_a_layer_without_bias_keeps_none_when_merged():
    assert LoRALinear(nn.Linear(4, 4, bias=False), 1).merged().bias is None


# --- the counts of the papers


def test_q_and_v_of_vit_b_have_147456_parameters_at_rank_4():
    # 12 layers x (q, v) x (A 4 x 768 + B 768 x 4); the encoder as build_sam assembles it, without memory for weights.
    from blosam_monai.networks.sam import SAM_SIZES, _image_encoder

    with torch.device("meta"):
        encoder = _image_encoder(SAM_SIZES["vit_b"], 256)
    assert add_qkv_lora(encoder, rank=4) == 12
    assert sum(p.numel() for p in lora_parameters(encoder)) == 12 * 2 * (4 * 768 + 768 * 4) == 147_456


def test_one_joint_update_of_the_eight_swin_blocks_has_69120_parameters_at_rank_12():
    # Two blocks at each width 48, 96, 192, 384; A 12 x D and B 3 D x 12: 2 x 12 x 4 x (48 + 96 + 192 + 384).
    from monai.networks.nets import SwinUNETR

    net = SwinUNETR(in_channels=1, out_channels=2, feature_size=48)
    assert add_lora(net, ("qkv",), rank=12) == 8
    assert sum(p.numel() for p in lora_parameters(net)) == 2 * 12 * 4 * (48 + 96 + 192 + 384) == 69_120


def test_the_fourteen_projections_of_sams_decoder_have_224_gates_at_rank_16(transformer):
    add_lora(transformer, ("q_proj", "v_proj"), rank=16, gated=True)
    assert sum(p.numel() for p in gate_parameters(transformer)) == 14 * 16
