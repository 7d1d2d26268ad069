"""Parameter-efficient fine-tuning of any network: what is frozen, what trains, what is added.

The methods of ARENA's tables, side by side. Each leaves a plain network behind: what was added is low-rank updates
(``LoRALinear``) of known ranks, or nothing.

================  ==================================================================  ===================
method            trains, beside the head                                             3-D SwinUNETR, 48
================  ==================================================================  ===================
``linear_probe``  nothing                                                             0
``bitfit``        the biases of linear layers                                         12,960
``affine_norm``   scale and shift of layer normalisations                             17,280
``lora``          low-rank updates of some linear layers (``qkv``; rank 12)           69,120
``adalora``       triplets P diag(E) Q there, the least important ones masked         69,216
``arena``         gated low-rank updates there (rank 16 to start from)                92,288
``full``          everything                                                          all
================  ==================================================================  ===================

Sources: Ben Zaken et al. 2022 (BitFit; in FSEFT's reading: of attention and MLP, and not the table of relative
positions, which only sounds like a bias), Hu et al. 2022 (LoRA), Zhang et al. 2023 (AdaLoRA), Silva-Rodriguez et al.
2025 (FSEFT: the setting), Baklouti et al. 2025 (ARENA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blosam_monai.networks.lora import LoRALinear, add_lora, effective_ranks, prune_lora
from blosam_monai.networks.sam import import_segment_anything

METHODS = ("linear_probe", "bitfit", "affine_norm", "full", "lora", "adalora", "arena")
RANKS = {"lora": 12, "adalora": 12, "arena": 16}  # to start from; FSEFT: 4 for each of q, k and v in one update
TARGET_RANK = 8  # of AdaLoRA, the mean over layers at the end
ORTHOGONALITY = 0.5  # weight of AdaLoRA's regulariser; peft's default
WARM_UP, COOL_DOWN = 0.1, 0.3  # shares of AdaLoRA's steps before and after ranks are given away
# FSEFT's, of AdamW: with everything frozen but head and adapters, and with the decoder trained as well.
_LEARNING_RATES = {"linear_probe": 1e-2, "bitfit": 1e-2, "affine_norm": 1e-2, "full": 1e-4}
_LOW_RANK_RATE, _DECODER_RATE = 1e-3, 1e-4


class Adaptation:
    """A network prepared for one method; made by ``adapt``.

    A training adds ``penalty()`` to its loss, calls ``update(step)`` after every optimiser step while the gradients are
    still there, and ``finish()`` at the end. Only AdaLoRA needs the first two; of others they are zero and nothing.

    Attributes:
        network: the network, changed in place.
        method: one of ``METHODS``.
    """

    def __init__(self, network: nn.Module, method: str, head: Sequence[str], also: Sequence[str], peft_model: Any):
        self.network, self.method = network, method
        self._head, self._also, self._peft_model = tuple(head), tuple(also), peft_model

    def counts(self) -> dict[str, int]:
        """Numbers of parameters: ``total``, ``trained``, and of the latter ``head``, ``also`` and ``adapter``.

        ``also`` is what was asked for with ``train_also``, ``adapter`` what the method itself trains.
        """
        trained = {name: p.numel() for name, p in self.network.named_parameters() if p.requires_grad}
        head = sum(n for name, n in trained.items() if name.startswith(self._head))
        also = sum(n for name, n in trained.items() if self._also and name.startswith(self._also))
        total = sum(p.numel() for p in self.network.parameters())
        everything = sum(trained.values())
        return {
            "total": total,
            "trained": everything,
            "head": head,
            "also": also,
            "adapter": everything - head - also,
        }

    def penalty(self) -> Tensor:
        """AdaLoRA's regulariser, that P and Q be orthogonal: 0.5 times the mean of ``|Q Q' - I|`` and ``|P' P - I|``.

        peft adds it only to outputs that hold a loss, which a segmenter's do not.
        """
        if self._peft_model is None:
            return torch.zeros(())
        defects = []
        for layer in _adalora_layers(self.network).values():
            for gram in (layer.lora_A.default @ layer.lora_A.default.T, layer.lora_B.default.T @ layer.lora_B.default):
                defects.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return ORTHOGONALITY * torch.stack(defects).mean()

    def update(self, step: int) -> None:
        """AdaLoRA: weigh the triplets by this step's gradients and mask the least important; ``step`` counts from 1."""
        if self._peft_model is not None:
            self._peft_model.base_model.update_and_allocate(step)

    @torch.no_grad()
    def finish(self) -> dict[str, int]:
        """Prune, in place: every update becomes plain LoRA of its effective rank, or vanishes; returns these ranks.

        They are by layer name, in module order, zeros included: what ``adapt(..., "lora", rank=...)`` takes to rebuild
        the network. Empty for methods without ranks.
        """
        if self._peft_model is None:
            ranks = effective_ranks(self.network)
            prune_lora(self.network)
            return ranks
        ranks = {}
        for name, layer in _adalora_layers(self.network).items():
            parent, _, last = name.rpartition(".")
            pruned = _plain_lora(layer)
            setattr(self.network.get_submodule(parent), last, pruned)
            ranks[name] = pruned.effective_rank() if isinstance(pruned, LoRALinear) else 0
        self._peft_model = None
        return ranks


def adapt(
    network: nn.Module,
    method: str,
    *,
    head: Sequence[str],
    layers: Sequence[str] = ("qkv",),
    rank: int | Sequence[int] | None = None,
    train_also: Sequence[str] = (),
    target_rank: int | None = None,
    steps: int | None = None,
) -> Adaptation:
    """Prepare a network for fine-tuning, in place: freeze it, add what the method adds, let train what is to train.

    Args:
        network: any; at the start its outputs stay as they are.
        method: one of ``METHODS``.
        head: beginnings of the names of the parameters that always train, as ``out.``.
        layers: attribute names of the linear layers that get low-rank updates.
        rank: of the updates, at the start; of ``lora`` also one for each layer (0: none there). Default: ``RANKS``.
        train_also: beginnings of the names of other parameters that train, as FSEFT's ``decoder``.
        target_rank: of ``adalora``: the mean rank at the end, 8 by default.
        steps: of ``adalora``: optimiser steps of the training, which its schedule needs.

    Raises:
        ValueError: an unknown method, a name that no parameter has, or an option that the method does not have.
        ImportError: ``adalora`` without the library peft.
    """
    _check(network, method, (*head, *train_also), rank, target_rank, steps)
    network.requires_grad_(method == "full")
    peft_model = None
    if method == "bitfit":
        _train(module.bias for module in network.modules() if isinstance(module, nn.Linear))
    elif method == "affine_norm":
        _train(p for module in network.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters())
    elif method in ("lora", "arena"):
        add_lora(network, layers, rank=RANKS[method] if rank is None else rank, gated=method == "arena")
    elif method == "adalora":
        first = RANKS[method] if rank is None else rank
        peft_model = _add_adalora(network, layers, first, TARGET_RANK if target_rank is None else target_rank, steps)
    for name, parameter in network.named_parameters():
        if name.startswith((*head, *train_also)):
            parameter.requires_grad_(True)
    return Adaptation(network, method, head, train_also, peft_model)


def learning_rate(method: str, train_also: Sequence[str] = ()) -> float:
    """FSEFT's learning rate of a method; a decoder that trains as well asks for a smaller one."""
    _check_method(method)
    return _DECODER_RATE if train_also else _LEARNING_RATES.get(method, _LOW_RANK_RATE)


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that train, by name."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def _train(parameters: Any) -> None:
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(True)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}.")


def _check(
    network: nn.Module,
    method: str,
    names: Sequence[str],
    rank: int | Sequence[int] | None,
    target_rank: int | None,
    steps: int | None,
) -> None:
    _check_method(method)
    for name in names:
        if not any(parameter.startswith(name) for parameter, _ in network.named_parameters()):
            raise ValueError(f"train_also, head: no parameter of {type(network).__name__} begins with {name!r}.")
    if rank is not None and method not in RANKS:
        raise ValueError(f"lora_rank: {rank} asked of {method}, which has no rank; leave it out.")
    if rank is not None and not isinstance(rank, int) and method != "lora":
        raise ValueError(f"lora_rank: {rank} asked of {method}, which starts with one rank for all layers.")
    if method != "adalora" and (target_rank is not None or steps is not None):
        raise ValueError(f"target_rank, steps: asked of {method}; only adalora has them, leave them out.")


def _add_adalora(network: nn.Module, layers: Sequence[str], rank: Any, target_rank: int, steps: int | None) -> Any:
    """Put peft's AdaLoRA layers in place; returns peft's model, which gives the ranks away."""
    if steps is None or not 0 < target_rank < rank:
        raise ValueError(
            f"adalora: needs the number of steps (found {steps}) and a target_rank from 1 to {rank - 1} (found "
            f"{target_rank}), below the rank {rank} that it starts from."
        )
    warm_up, cool_down = int(WARM_UP * steps), int(COOL_DOWN * steps)
    if steps - warm_up - cool_down < 1:
        raise ValueError(f"adalora: {steps} steps are too few to give ranks away; train longer.")
    peft = _import_peft()
    return peft.get_peft_model(
        network,
        peft.AdaLoraConfig(
            init_r=rank,
            target_r=target_rank,
            lora_alpha=rank,  # peft divides by the rank: the update is P diag(E) Q
            target_modules=list(layers),
            tinit=warm_up,
            tfinal=cool_down,
            deltaT=1,
            total_step=steps,
            orth_reg_weight=ORTHOGONALITY,
        ),
    )


def _import_peft() -> Any:
    import_segment_anything()  # makes torchvision importable beside a CPU torch: peft's own imports reach it
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"method: adalora needs the library peft ({error}); pip install 'blosam_monai[peft]'."
        ) from error
    return peft


def _adalora_layers(network: nn.Module) -> dict[str, Any]:
    """The layers of peft by name, in module order."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_E")}


def _plain_lora(layer: Any) -> nn.Module:
    """An AdaLoRA layer as LoRA of the rank that is left: B = P diag(E) times peft's scale, A = Q."""
    values = layer.lora_E.default[:, 0]
    kept = values != 0
    if not kept.any():
        return layer.get_base_layer()
    plain = LoRALinear(layer.get_base_layer(), int(kept.sum()))
    scale = layer.scaling["default"] / (layer.ranknum.default + 1e-5)  # as in peft's forward pass
    plain.lora_a.copy_(layer.lora_A.default[kept])
    plain.lora_b.copy_(layer.lora_B.default[:, kept] * values[kept] * scale)
    return plain
