"""Med-SA's adapters: at the start nothing, then what the paper's figure says."""

from __future__ import annotations

import copy

import numpy as np
import torch
from scipy.special import erf
from torch import nn

from blosam_monai.networks.encoder_adapters import AdaptedAttention, AdaptedMlp, Adapter, add_adapters


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        p.data.normal_()
    return module


def by_hand(adapter: Adapter, x: np.ndarray) -> np.ndarray:
    """W2 GELU(W1 x + b1) + b2 in double precision, GELU by its definition with the error function."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in adapter.parameters())
    hidden = x @ w1.T + b1
    return hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ w2.T + b2


def test_an_adapter_goes_through_a_quarter_of_the_width():
    adapter = Adapter(8)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(2, 8), (2,), (8, 2), (8,)]


def test_an_adapter_is_two_matrices_with_a_gelu_between():
    adapter, x = filled(Adapter(8)), torch.randn(3, 8)
    found = adapter(x).detach().double().numpy()
    np.testing.assert_allclose(found, by_hand(adapter, x.double().numpy()), atol=1e-5)


def test_behind_the_attention_an_adapter_has_a_skip_connection():
    block, x = filled(AdaptedAttention(nn.Linear(8, 8, bias=False), 8)), torch.randn(2, 3, 8)
    attended = x.double().numpy() @ block.attention.weight.detach().double().numpy().T
    expected = attended + by_hand(block.adapter, attended)
    np.testing.assert_allclose(block(x).detach().double().numpy(), expected, atol=1e-4)


def test_beside_the_mlp_an_adapter_counts_half():
    block, x = filled(AdaptedMlp(nn.Linear(8, 8, bias=False), 8)), torch.randn(2, 3, 8)
    plain = x.double().numpy() @ block.mlp.weight.detach().double().numpy().T
    expected = plain + 0.5 * by_hand(block.adapter, x.double().numpy())
    np.testing.assert_allclose(block(x).detach().double().numpy(), expected, atol=1e-4)


def test_an_encoder_with_new_adapters_is_the_encoder_it_was(small_sam):
    encoder, image = copy.deepcopy(small_sam.image_encoder), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(image)
        added = add_adapters(encoder)
        assert torch.equal(encoder(image), before)
    assert len(added) == 2 * 2 * 4  # blocks, adapters, tensors


def test_only_the_adapters_train_and_the_seed_decides_where_they_start(small_sam):
    encoders = [copy.deepcopy(small_sam.image_encoder).requires_grad_(False) for _ in range(3)]
    first, same, other = (add_adapters(e, seed=seed) for e, seed in zip(encoders, (1, 1, 2), strict=True))
    assert {id(p) for p in encoders[0].parameters() if p.requires_grad} == {id(p) for p in first}
    assert all(torch.equal(p, q) for p, q in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
