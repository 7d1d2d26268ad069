"""Bottleneck adapters in SAM's image encoder, as Med-SA places them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RATIO = 4  # width of a block to that of its adapters' bottleneck
SHARE = 0.5  # of the adapter beside the MLP


class Adapter(nn.Module):
    """``W2 GELU(W1 x)``, (..., D) -> (..., D), through D / 4; starts at zero, so that a block starts as it was.

    Source: Wu et al. 2023 (Medical SAM Adapter), figure 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        up = nn.Linear(width // RATIO, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.layers = nn.Sequential(nn.Linear(width, width // RATIO), nn.GELU(), up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.layers(x)


class AdaptedAttention(nn.Module):
    """An attention followed by an adapter with a skip connection: ``a + adapter(a)``, a = attention(x)."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention, self.adapter = attention, Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        attended = self.attention(x)
        return attended + self.adapter(attended)


class AdaptedMlp(nn.Module):
    """An MLP with an adapter beside it: ``mlp(x) + 0.5 adapter(x)``."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        return self.mlp(x) + SHARE * self.adapter(x)


def add_adapters(encoder: nn.Module, *, seed: int = 0) -> list[nn.Parameter]:
    """Put two adapters in every transformer block of a SAM encoder, in place; return their parameters."""
    added = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in encoder.blocks:  # type: ignore[union-attr]
            width = block.norm1.normalized_shape[0]
            block.attn, block.mlp = AdaptedAttention(block.attn, width), AdaptedMlp(block.mlp, width)
            added += [*block.attn.adapter.parameters(), *block.mlp.adapter.parameters()]
    return added
