"""AdamW whose gates take proximal steps: an L1 penalty that ends at exact zeros.

ARENA learns the rank of a low-rank update through gates v with the penalty lambda |v|_1. Proximal gradient with step
rho minimises ``L(v) + lambda |v|_1`` by ``v <- S_{rho lambda}(v - rho dL/dv)``, S the soft threshold. The threshold is
rho times lambda with the *same* rho as the gradient step: only then are the fixed points the minimisers. The ARENA
poster prints eta lambda, eta the learning rate of the other parameters; as eta is much smaller than rho, almost no gate
then ever reaches zero (a test counts 32 of 32 left where the true rank is 2).

Adam's scaling is left out for the gates: a step that is divided by sqrt(v) has another prox, with a threshold of its
own for every gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PASSES = 3.0  # of T rho lambda: at a constant rate a gate that starts at 1 reaches 0 after a third of the training


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, elementwise: the prox of ``threshold |v|_1``."""
    return F.softshrink(values, threshold)


def penalty_for(steps: int, lr: float) -> float:
    """The penalty lambda with steps x lr x lambda = 3, for gates that start at one.

    An unused gate falls by lr x lambda a step, so below a product of 1 none can die; 2 to 5 work.

    Args:
        steps: optimiser steps of the training.
        lr: learning rate of the gates, the first one: over a polynomial schedule of power 0.9 the product is 1.6, and
            an unused gate closes after 41 % of the training.

    Raises:
        ValueError: no steps, or no learning rate.
    """
    if steps < 1 or lr <= 0:
        raise ValueError(f"gate_lr: {steps} steps of {lr} train no gates; both must be above 0.")
    return PASSES / (steps * lr)


def parameter_groups(
    parameters: Sequence[nn.Parameter], gates: Sequence[nn.Parameter], *, gate_lr: float, penalty: float
) -> list[dict[str, Any]]:
    """Groups for ``ProxAdamW``: the gates among the parameters, with what is theirs, apart from the others."""
    of_gates = {id(gate) for gate in gates}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in of_gates]}]
    groups.append({"params": [p for p in parameters if id(p) in of_gates], "lr": gate_lr, "penalty": penalty})
    return [group for group in groups if group["params"]]


class ProxAdamW(torch.optim.AdamW):
    """AdamW, and proximal gradient steps for the parameter groups that carry a ``penalty``.

    ``ProxAdamW([{"params": factors}, {"params": gates, "lr": 1e-2, "penalty": 0.3}], lr=1e-3)``: the gates take
    ``v <- soft_threshold(v - lr grad, lr penalty)``, without momentum, scaling or weight decay. Schedulers change every
    group's own lr, and the threshold with it.

    Args:
        params: parameters, or groups of them; ``penalty`` is the weight lambda of the group's L1 norm, 0 or more.
        lr, betas, eps, weight_decay: of AdamW.

    Raises:
        ValueError: a negative penalty.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with a ``penalty`` takes proximal steps."""
        penalty = param_group.get("penalty")
        if penalty is not None and not penalty >= 0:
            raise ValueError(f"penalty: {penalty} must be 0 or more.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every group; ``closure`` as in ``torch.optim``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gates = [(p, group) for group in self.param_groups if group.get("penalty") is not None for p in group["params"]]
        gradients = [gate.grad for gate, _ in gates]
        for gate, _ in gates:
            gate.grad = None  # AdamW passes over what has no gradient
        super().step()
        for (gate, group), gradient in zip(gates, gradients, strict=True):
            gate.grad = gradient
            if gradient is not None:
                lr = float(group["lr"])
                gate.copy_(soft_threshold(gate - lr * gradient, lr * group["penalty"]))
        return loss
