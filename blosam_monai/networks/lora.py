"""Low-rank adaptation (LoRA): frozen linear layers with a small trainable update."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update: ``y = W x + b + B A x``; (..., in_features) -> (..., out_features).

    ``lora_a`` (rank, in_features) starts random, ``lora_b`` (out_features, rank) at zero, so that the layer starts as
    the one it wraps. No scaling by alpha / rank, as in BLO-SAM. Source: Hu et al. 2022, eq. 3.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"lora_rank: {rank} must be at least 1.")
        self.linear = linear
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> nn.Linear:
        """The plain linear layer that computes the same: weight ``W + B A``."""
        linear = nn.Linear(self.linear.in_features, self.linear.out_features)
        linear.weight.data = (self.linear.weight + self.lora_b @ self.lora_a).detach()
        linear.bias.data = self.linear.bias.detach().clone()
        return linear


def add_lora(module: nn.Module, names: Collection[str], *, rank: int) -> int:
    """Wrap every linear layer of one of these names below ``module``, in place; return how many were wrapped."""
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    for parent, name, child in layers:
        setattr(parent, name, LoRALinear(child, rank))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer named {' or '.join(sorted(names))}.")
    return len(layers)


def merge_lora(module: nn.Module) -> None:
    """Fold every ``LoRALinear`` below ``module`` into a plain linear layer, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())


def lora_parameters(module: nn.Module) -> list[Tensor]:
    """The low-rank factors below ``module``, in module order: A, B, A, B, ..."""
    return [
        factor for layer in module.modules() if isinstance(layer, LoRALinear) for factor in (layer.lora_a, layer.lora_b)
    ]
