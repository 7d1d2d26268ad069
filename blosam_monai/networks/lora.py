"""Low-rank adaptation (LoRA): frozen linear layers with a small trainable update, of a fixed or a learned rank.

``LoRALinear`` is the plain update, ``GatedLoRALinear`` ARENA's, whose rank is learned through gates, ``QKVLoRALinear``
keeps the updates of a fused query-key-value layer apart. Forward passes are plain arithmetic on the layer's own
parameters, so that ``torch.func.functional_call``, ``vmap`` and double backward go through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QKV = ("q", "k", "v")  # the blocks of a fused layer, in the order of its outputs (SAM's ViT, MONAI's Swin)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update: ``y = W x + b + B A x``; (..., in_features) -> (..., out_features).

    ``lora_a`` (rank, in_features) starts random, ``lora_b`` (out_features, rank) at zero, so that the layer starts as
    the one it wraps. No scaling by alpha / rank, as in BLO-SAM. Source: Hu et al. 2022, eq. 3.
    """

    gate: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"lora_rank: {rank} must be at least 1.")
        self.linear = linear
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.register_parameter("gate", None)
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.linear(x) + F.linear(self._project(x), self.lora_b)

    def merged(self) -> nn.Linear:
        """The plain linear layer that computes the same: weight ``W + B A``, or ``W + B diag(v) A``."""
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, bias=self.linear.bias is not None)
        linear.weight.data = (self.linear.weight + self._update()).detach()
        if self.linear.bias is not None:
            linear.bias.data = self.linear.bias.detach().clone()
        return linear

    def effective_rank(self) -> int:
        """Rank of the update: its rank, or the number of gates that are not zero."""
        return self.lora_a.shape[0] if self.gate is None else int(self.gate.count_nonzero())

    def _project(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., rank): ``A x``, times the gates where there are any."""
        projected = F.linear(x, self.lora_a)
        return projected if self.gate is None else projected * self.gate

    def _gated_b(self) -> Tensor:
        """``B diag(v)``, or ``B`` where there are no gates."""
        return self.lora_b if self.gate is None else self.lora_b * self.gate

    def _update(self) -> Tensor:
        """What is added to the weight, (out_features, in_features)."""
        return self._gated_b() @ self.lora_a


class GatedLoRALinear(LoRALinear):
    """A frozen linear layer plus an update of learned rank: ``y = W x + b + B diag(v) A x``.

    ``gate`` v (rank,) starts at one. An L1 penalty on it, by proximal steps (``blosam_monai.optimizers.ProxAdamW``),
    sets gates to exactly zero; what is left is the effective rank. Gates at one with B at zero is the start that finds
    the true rank over a wide range of penalties; gates at zero can stay there for ever.
    Source: ARENA (Baklouti et al. 2025), the poster's W0 + B Diag(v) A.
    """

    gate: nn.Parameter

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear, rank)
        self.gate = nn.Parameter(linear.weight.new_ones(rank))

    @torch.no_grad()
    def pruned(self) -> nn.Linear | LoRALinear:
        """The same layer without its zero gates: plain LoRA (B := B diag(v)), or the wrapped layer if none is left."""
        kept = self.gate.ne(0)
        if not kept.any():
            return self.linear
        layer = LoRALinear(self.linear, int(kept.sum()))
        layer.lora_a.copy_(self.lora_a[kept])
        layer.lora_b.copy_(self._gated_b()[:, kept])
        return layer


class QKVLoRALinear(LoRALinear):
    """A frozen fused layer, D -> 3 D, with an own update for each of some of its blocks: q, k and v.

    LoRA on ``q`` and ``v`` alone, as everybody places it where the three are separate layers. One ``LoRALinear`` around
    the whole layer is the other reading: a single update whose rank the three share (FSEFT). ``lora_a`` (R, D) and
    ``lora_b`` (D, R) hold the factors of the blocks one after the other, R their ranks together, ``gate`` (R,) too.

    Args:
        linear: the fused layer; its outputs are q, k and v, in this order.
        rank: of each block, or one rank for each of ``blocks`` (0: no update of this block).
        blocks: the blocks that get an update.
        gated: gates as in ``GatedLoRALinear``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int | Sequence[int],
        *,
        blocks: Sequence[str] = ("q", "v"),
        gated: bool = False,
    ) -> None:
        if linear.out_features % len(QKV):
            raise ValueError(
                f"qkv: a layer of {linear.out_features} outputs has no three equal blocks; use LoRALinear."
            )
        if not blocks or len(set(blocks)) != len(blocks) or not set(blocks) <= set(QKV):
            raise ValueError(f"blocks: {tuple(blocks)} are not different ones of {', '.join(QKV)}.")
        ranks = [rank] * len(blocks) if isinstance(rank, int) else list(rank)
        if len(ranks) != len(blocks) or min(ranks) < 0:
            raise ValueError(f"lora_rank: {ranks} are not {len(blocks)} ranks of 0 or more, one for each of {blocks}.")
        super().__init__(linear, sum(ranks))
        by_block = dict(zip(blocks, ranks, strict=True))
        self.ranks = {block: by_block[block] for block in QKV if by_block.get(block)}
        self.blocks = tuple(sorted(blocks, key=QKV.index))  # also those without an update
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features // len(QKV), sum(ranks)))
        if gated:
            self.gate = nn.Parameter(linear.weight.new_ones(sum(ranks)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 3 D)."""
        projected = dict(zip(self.ranks, self._split(self._project(x)), strict=True))  # each (..., rank)
        factors = dict(zip(self.ranks, self._split(self.lora_b), strict=True))  # each (D, rank)
        fused = self.linear(x).chunk(len(QKV), dim=-1)
        return torch.cat(
            [
                part + F.linear(projected[block], factors[block]) if block in factors else part
                for block, part in zip(QKV, fused, strict=True)
            ],
            dim=-1,
        )

    def effective_ranks(self) -> dict[str, int]:
        """Rank of the update of each of ``blocks``."""
        if self.gate is None:
            return {block: self.ranks.get(block, 0) for block in self.blocks}
        left = {
            block: int(gate.count_nonzero()) for block, gate in zip(self.ranks, self._split(self.gate), strict=True)
        }
        return {block: left.get(block, 0) for block in self.blocks}

    @torch.no_grad()
    def pruned(self) -> nn.Linear | QKVLoRALinear:
        """The same layer without its zero gates: plain LoRA on its blocks, or the wrapped layer if none is left."""
        ranks = self.effective_ranks()
        if not any(ranks.values()):
            return self.linear
        layer = QKVLoRALinear(self.linear, list(ranks.values()), blocks=self.blocks)
        kept = slice(None) if self.gate is None else self.gate != 0
        layer.lora_a.copy_(self.lora_a[kept])
        layer.lora_b.copy_(self._gated_b()[:, kept])
        return layer

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """(..., R) -> one (..., rank) for each block with an update."""
        return values.split(list(self.ranks.values()), dim=-1)

    def _update(self) -> Tensor:
        a = dict(zip(self.ranks, self.lora_a.split(list(self.ranks.values())), strict=True))
        b = dict(zip(self.ranks, self._split(self._gated_b()), strict=True))
        zero = self.linear.weight.new_zeros(self.lora_b.shape[0], self.linear.in_features)
        return torch.cat([b[block] @ a[block] if block in a else zero for block in QKV])


def add_lora(module: nn.Module, names: Collection[str], *, rank: int | Sequence[int], gated: bool = False) -> int:
    """Wrap the linear layers of these names below ``module``, in place; return how many were wrapped.

    Args:
        module: the network.
        names: attribute names of the layers.
        rank: of every layer, or one for each in module order, as ``effective_ranks`` lists them (0: leave it plain).
        gated: with gates, to learn the rank; ``rank`` is then the largest.

    Raises:
        ValueError: no such layer, a rank below one, or not one rank for each layer.
    """
    layers = _linear_layers(module, names)
    ranks = [rank] * len(layers) if isinstance(rank, int) else list(rank)
    if len(ranks) != len(layers):
        raise ValueError(f"lora_rank: {len(ranks)} ranks given for {len(layers)} layers; give one for each.")
    wrapper = GatedLoRALinear if gated else LoRALinear
    wrapped = [
        (parent, name, wrapper(child, r))
        for (parent, name, child), r in zip(layers, ranks, strict=True)
        if r or isinstance(rank, int)
    ]
    for parent, name, layer in wrapped:
        setattr(parent, name, layer)
    return len(wrapped)


def add_qkv_lora(
    module: nn.Module, *, rank: int | Sequence[int], blocks: Sequence[str] = ("q", "v"), gated: bool = False
) -> int:
    """Wrap every fused layer named ``qkv`` below ``module`` in a ``QKVLoRALinear``, in place; return how many.

    Args:
        module: the network.
        rank: of every block, or one for each block of each layer in module order, as ``effective_ranks`` lists them.
        blocks: the blocks that get an update.
        gated: with gates, to learn the ranks; ``rank`` is then the largest.

    Raises:
        ValueError: no such layer, a rank below one, or not one rank for each block of each layer.
    """
    layers = _linear_layers(module, ("qkv",))
    width = len(blocks)
    ranks = [rank] * (width * len(layers)) if isinstance(rank, int) else list(rank)
    if len(ranks) != width * len(layers):
        raise ValueError(
            f"lora_rank: {len(ranks)} ranks given for {len(layers)} layers of {width} blocks; give one for each block."
        )
    wrapped = []
    for i, (parent, name, child) in enumerate(layers):
        own = ranks[width * i : width * (i + 1)]
        if any(own) or isinstance(rank, int):
            wrapped.append((parent, name, QKVLoRALinear(child, own, blocks=blocks, gated=gated)))
    for parent, name, layer in wrapped:
        setattr(parent, name, layer)
    return len(wrapped)


def merge_lora(module: nn.Module) -> None:
    """Fold every low-rank update below ``module`` into a plain linear layer, in place."""
    _replace(module, LoRALinear.merged)


def prune_lora(module: nn.Module) -> None:
    """Drop the zero gates of every gated layer below ``module``, in place: what is left is plain LoRA."""
    _replace(module, lambda layer: layer.pruned() if isinstance(layer, GatedLoRALinear | QKVLoRALinear) else layer)


def lora_parameters(module: nn.Module) -> list[Tensor]:
    """The low-rank factors below ``module``, in module order: A, B, A, B, ...; no gates."""
    return [factor for _, layer in _lora_layers(module) for factor in (layer.lora_a, layer.lora_b)]


def gate_parameters(module: nn.Module) -> list[Tensor]:
    """The gates below ``module``, in module order."""
    return [layer.gate for _, layer in _lora_layers(module) if layer.gate is not None]


def effective_ranks(module: nn.Module) -> dict[str, int]:
    """Rank of every update below ``module``, by layer name, in module order; of a fused layer by ``name.block``.

    Its values are what ``add_lora`` or ``add_qkv_lora`` takes as ``rank`` to rebuild the pruned network.
    """
    ranks: dict[str, int] = {}
    for name, layer in _lora_layers(module):
        if isinstance(layer, QKVLoRALinear):
            ranks |= {f"{name}.{block}": rank for block, rank in layer.effective_ranks().items()}
        else:
            ranks[name] = layer.effective_rank()
    return ranks


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def _linear_layers(module: nn.Module, names: Collection[str]) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of these names below ``module``, each with its parent and its name there."""
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer named {' or '.join(sorted(names))}.")
    return layers


def _replace(module: nn.Module, new: Callable[[LoRALinear], nn.Module]) -> None:
    """Put ``new(layer)`` in the place of every low-rank layer below ``module``."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, new(child))
