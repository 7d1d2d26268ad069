"""Each method trains what it says and counts as in the papers; AdaLoRA against peft itself."""

import copy

import pytest
import torch
from torch import nn

from blosam_monai.networks.lora import GatedLoRALinear, LoRALinear, gate_parameters, merge_lora
from blosam_monai.networks.peft import METHODS, adapt, learning_rate, trained_state


class Attention(nn.Module):
    """A layer with everything that the methods look for: fused qkv, MLP, norm, a table that only sounds like a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(5, 2))
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.mlp(torch.tanh(q * k + v))


class Network(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Attention(width), Attention(width))
        self.decoder = nn.Conv1d(width, width, 1)
        self.out = nn.Conv1d(width, 1, 1)

    def forward(self, x):
        """(B, N, width) -> (B, 1, N)."""
        return self.out(self.decoder(self.encoder(x).transpose(1, 2)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


HEAD = ["out.weight", "out.bias"]


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("linear_probe", []),
        ("bitfit", [f"encoder.{i}.{name}" for i in (0, 1) for name in ("qkv.bias", "mlp.bias")]),
        ("affine_norm", [f"encoder.{i}.norm.{name}" for i in (0, 1) for name in ("weight", "bias")]),
        ("lora", [f"encoder.{i}.qkv.{name}" for i in (0, 1) for name in ("lora_a", "lora_b")]),
        ("arena", [f"encoder.{i}.qkv.{name}" for i in (0, 1) for name in ("lora_a", "lora_b", "gate")]),
    ],
)
def test_a_method_trains_its_own_parameters_and_the_head(network, method, trained):
    adapt(network, method, head=("out.",))
    assert set(trained_state(network)) == {*trained, *HEAD}


def test_full_fine_tuning_trains_everything(network):
    adapt(network, "full", head=("out.",))
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "adalora"])
def test_an_adapted_network_starts_as_it_was(network, method):
    x = torch.randn(2, 5, 8)
    before = network(x)
    adapt(network, method, head=("out.",))
    assert torch.equal(network(x), before)


def test_a_decoder_trains_too_where_it_is_asked_for(network):
    counts = adapt(network, "bitfit", head=("out.",), train_also=("decoder",)).counts()
    # Biases 2 x (24 + 8), decoder 8 x 8 + 8, head 8 + 1.
    assert (counts["adapter"], counts["also"], counts["head"]) == (64, 72, 9)
    assert counts["trained"] == 64 + 72 + 9
    assert counts["total"] == sum(p.numel() for p in network.parameters())


def test_pruning_leaves_plain_lora_that_is_rebuilt_from_its_ranks(network):
    fresh = copy.deepcopy(network)
    adaptation = adapt(network, "arena", head=("out.",), rank=3)
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    first, second = gate_parameters(network)
    first.data[1] = 0
    second.data[:] = 0
    x = torch.randn(2, 5, 8)
    before = network(x)
    ranks = adaptation.finish()
    assert ranks == {"encoder.0.qkv": 2, "encoder.1.qkv": 0}
    assert not [m for m in network.modules() if isinstance(m, GatedLoRALinear)]
    adapt(fresh, "lora", head=("out.",), rank=list(ranks.values()))
    assert fresh.load_state_dict(trained_state(network), strict=False).unexpected_keys == []
    torch.testing.assert_close(fresh(x), before)


def test_learning_rates_are_those_of_fseft():
    assert [learning_rate(m) for m in ("lora", "bitfit", "full")] == [1e-3, 1e-2, 1e-4]
    assert {learning_rate(m, ("decoder",)) for m in METHODS} == {1e-4}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prompt", {}, "method: 'prompt' is not one of"),
        ("bitfit", {"rank": 4}, "lora_rank: 4 asked of bitfit"),
        ("arena", {"rank": [4, 4]}, "one rank for all layers"),
        ("lora", {"steps": 10}, "only adalora"),
        ("lora", {"train_also": ("decode5",)}, "begins with 'decode5'"),
        ("lora", {"layers": ("q_proj",)}, "no linear layer named q_proj"),
        ("adalora", {}, "needs the number of steps"),
        ("adalora", {"steps": 100, "rank": 4, "target_rank": 4}, "below the rank 4"),
    ],
)
def test_what_a_method_cannot_do_is_refused(network, method, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(network, method, head=("out.",), **options)


def test_without_peft_adalora_says_how_to_get_it(network, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'blosam_monai\[peft\]'"):
        adapt(network, "adalora", head=("out.",), steps=100)


# --- MONAI's SwinUNETR at FSEFT's size


@pytest.fixture(scope="module")
def swin_unetr():
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=1, feature_size=48)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "count"),
    # D = 48, 96, 192, 384, two blocks each: biases 9 D a block; norms 4 D a block and 16 D a merging; rank r: 4 r D.
    [
        ("linear_probe", 0),
        ("bitfit", 2 * 9 * 720),
        ("affine_norm", 2 * 4 * 720 + 16 * 720),
        ("lora", 2 * 12 * 4 * 720),
        ("arena", 2 * 16 * 4 * 720 + 8 * 16),
    ],
)
def test_parameters_of_swin_unetr_are_counted_as_in_the_papers(swin_unetr, method, count):
    expected = {"linear_probe": 0, "bitfit": 12_960, "affine_norm": 17_280, "lora": 69_120, "arena": 92_288}
    assert adapt(copy.deepcopy(swin_unetr), method, head=("out.",)).counts()["adapter"] == count == expected[method]


@pytest.mark.slow
def test_fsefts_decoder_has_19_6_million_parameters(swin_unetr):
    counts = adapt(copy.deepcopy(swin_unetr), "lora", head=("out.",), train_also=("decoder",)).counts()
    assert counts["also"] / 1e6 == pytest.approx(19.6, abs=0.05)


# --- AdaLoRA, peft's


@pytest.fixture
def peft():
    from blosam_monai.networks.sam import import_segment_anything

    import_segment_anything()  # as the code under test: peft's imports reach torchvision
    return pytest.importorskip("peft")


def trained_adalora(network, steps=60, rank=4, target_rank=2):
    """Some steps on a regression; the adaptation, before it is finished."""
    torch.manual_seed(0)
    adaptation = adapt(network, "adalora", head=("out.",), rank=rank, target_rank=target_rank, steps=steps)
    x, y = torch.randn(4, 5, 8), torch.randn(4, 1, 5)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (nn.functional.mse_loss(network(x), y) + adaptation.penalty()).backward()
        optimizer.step()
        adaptation.update(step)
    return adaptation


@pytest.mark.slow
def test_adalora_starts_as_the_network_was_and_trains_its_triplets(network, peft):
    x = torch.randn(2, 5, 8)
    before = network(x)
    adaptation = adapt(network, "adalora", head=("out.",), rank=4, target_rank=2, steps=100)
    torch.testing.assert_close(network(x), before)
    assert adaptation.counts()["adapter"] == 2 * (4 * 8 + 4 + 24 * 4)  # Q, E, P of two layers


@pytest.mark.slow
def test_adaloras_penalty_is_the_one_that_peft_adds_to_a_loss(network, peft):
    from types import SimpleNamespace

    adaptation = adapt(network, "adalora", head=("out.",), rank=4, target_rank=2, steps=100)
    model = adaptation._peft_model.base_model
    plain = model.model.forward
    model.model.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
    theirs = model.forward().loss.item()
    model.model.forward = plain
    assert adaptation.penalty().item() == pytest.approx(theirs, rel=1e-6)
    assert theirs > 0.1


@pytest.mark.slow
def test_adaloras_ranks_reach_the_budget_exactly(network, peft):
    ranks = trained_adalora(network).finish()
    assert sum(ranks.values()) == 2 * 2  # two layers of mean rank 2, of 4 to start from
    assert list(ranks) == ["encoder.0.qkv", "encoder.1.qkv"]


@pytest.mark.slow
def test_what_adalora_leaves_is_plain_lora_that_computes_what_peft_did(network, peft):
    adaptation = trained_adalora(network)
    x = torch.randn(2, 5, 8)
    before = network(x)
    adaptation.finish()
    assert {type(layer.qkv) for layer in network.encoder} <= {LoRALinear, nn.Linear}
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=0)
    merge_lora(network)
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_lora_of_ours_is_lora_of_pefts(network, peft):
    theirs = copy.deepcopy(network)
    adapt(network, "lora", head=("out.",), rank=3)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=3, target_modules=["qkv"]), theirs)
    for ours, other in zip(network.encoder, theirs.encoder, strict=True):
        nn.init.normal_(ours.qkv.lora_b)
        other.qkv.lora_A.default.weight.data.copy_(ours.qkv.lora_a.data)
        other.qkv.lora_B.default.weight.data.copy_(ours.qkv.lora_b.data)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(network(x), theirs(x))
