r"""The slope of the upper loss along phi: pure functions of the two losses and of one committed lower step.

Names as in docs/explanation/bilevel.md. The lower step is one AdamW update of theta on the lower loss L1 at fixed phi,
theta -> theta+; the upper loss is L2(theta+, phi). With v = dL2/dtheta+ and D = dtheta+/dg, the derivative of the
update by its gradient g (elementwise, for AdamW diagonal; minus the step size for plain gradient descent),

    dL2/dphi = dL2/dphi at fixed theta+  +  d/dphi <g(theta, phi), D v>.

``first_order`` drops the second term, ``exact`` takes it by double backward, ``finite_difference`` from two more
gradients of L1. Every tensor carries a leading task axis T; tasks do not mix, so norms and step lengths are per task.
Source: Zhang et al. 2024, eq. 6 to 9 (eq. 9 corrected); Liu et al. 2019 (DARTS), eq. 7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

Tensors = Sequence[Tensor]
Loss = Callable[[], Tensor]  # the loss of each task (T,) at the present values of theta and phi


@dataclass
class LowerStep:
    """A committed lower step: what the upper level needs to look back through it.

    Attributes:
        loss: L1 on the batch of that step.
        theta: the parameters, already holding theta+.
        before: their values before the step (``finite_difference``).
        gradient: g before the step, with its graph if the method is ``exact``.
        jacobian: D (``exact``, ``finite_difference``).
    """

    loss: Loss
    theta: Tensors
    before: Tensors
    gradient: Tensors
    jacobian: Tensors


class Hypergradient(NamedTuple):
    """The slope along phi, tensors like phi, and the upper loss (T,) it was taken of."""

    gradient: list[Tensor]
    upper_loss: Tensor


def first_order(upper_loss: Loss, phi: Tensors, step: LowerStep) -> Hypergradient:
    """dL2/dphi with theta+ held fixed: BLO-SAM's main setting."""
    loss = upper_loss()
    return Hypergradient(list(torch.autograd.grad(loss.sum(), phi)), loss.detach())


def exact(upper_loss: Loss, phi: Tensors, step: LowerStep, *, max_ratio: float = 10.0) -> Hypergradient:
    """dL2/dphi through the committed step, by double backward through its gradient's graph.

    Args:
        upper_loss, phi, step: see the module.
        max_ratio: the second-order term is shortened to at most this multiple of the first-order term, task by task: an
            AdamW step is nearly a sign function where its second moment is tiny, and the slope there explodes.
    """
    first, direction, loss = _upper_gradients(upper_loss, phi, step)
    second = torch.autograd.grad(step.gradient, phi, grad_outputs=direction, materialize_grads=True)
    return Hypergradient(_add_limited(first, second, max_ratio), loss)


def finite_difference(
    upper_loss: Loss, phi: Tensors, step: LowerStep, *, radius: float = 1e-4, max_ratio: float = 10.0
) -> Hypergradient:
    """As ``exact``, the second-order term from central differences of dL1/dphi along D v around the old theta.

    Args:
        upper_loss, phi, step, max_ratio: see ``exact``.
        radius: length of the displacement of theta, task by task. The paper's 0.01 crosses many kinks of SAM's ReLUs.
            At 1e-4 float64 is right to 1e-8. In float32 rounding prevails in the first steps, where D is large in
            elements that hardly count (the error exceeds the value), and is 1 % after 20 steps; ``exact`` is not
            affected.
    """
    first, direction, loss = _upper_gradients(upper_loss, phi, step)
    length = task_norm(direction)
    scale = torch.where(length > 0, radius / length, 0.0)
    slopes = []
    for sign in (1.0, -1.0):
        with _displaced(step, direction, sign * scale):
            slopes.append(torch.autograd.grad(step.loss().sum(), phi))
    inverse = torch.where(length > 0, length / (2 * radius), 0.0)
    second = [_by_task(inverse, above) * (above - below) for above, below in zip(*slopes, strict=True)]
    return Hypergradient(_add_limited(first, second, max_ratio), loss)


METHODS: dict[str, Callable[[Loss, Tensors, LowerStep], Hypergradient]] = {
    "first_order": first_order,
    "finite_difference": finite_difference,
    "exact": exact,
}


@torch.no_grad()
def adamw_jacobian(optimizer: AdamW, parameters: Tensors, *, floor: float = 1e-4) -> list[Tensor]:
    r"""D = dtheta+/dg of the AdamW step just taken, elementwise; call it between ``step`` and ``zero_grad``.

    With bias corrections b1, b2 and s = sqrt(v / b2) of the updated moments m, v,

        D = -lr [(1 - beta1) / (b1 (s + eps)) - m / b1 (1 - beta2) / b2 g / (s (s + eps)^2)].

    Args:
        optimizer: holds the state of that step.
        parameters: theta, each with the ``grad`` of that step.
        floor: s is taken no smaller than this fraction of its root mean square over the tensor, task by task. An
            element that has never had a gradient would otherwise have a slope of 1e8.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    result = []
    for p in parameters:
        group, state = group_of[id(p)], optimizer.state[p]
        if group["amsgrad"] or group["maximize"]:
            raise ValueError("optimizer: the slope of AdamW's step is known without amsgrad and maximize only.")
        (beta1, beta2), eps, t = group["betas"], group["eps"], float(state["step"])
        b1, b2 = 1 - beta1**t, 1 - beta2**t
        s = (state["exp_avg_sq"] / b2).sqrt()
        rms = s.square().flatten(1).mean(1).sqrt()
        lowest = _by_task(floor * rms, s).expand_as(s)
        s = torch.maximum(s, lowest)
        bound = s == lowest  # at the floor s no longer depends on g: the second part of the slope vanishes
        second = torch.where(
            bound, 0.0, state["exp_avg"] / b1 * (1 - beta2) / b2 * p.grad / (s * (s + eps).square()).clamp_min(1e-45)
        )
        slope = torch.where(s > 0, (1 - beta1) / (b1 * (s + eps)) - second, 0.0)
        result.append(-group["lr"] * slope)
    return result


def task_norm(tensors: Tensors) -> Tensor:
    """Euclidean norm of tensors (T, ...) taken together, task by task: (T,)."""
    return torch.stack([t.detach().flatten(1).square().sum(1) for t in tensors]).sum(0).sqrt()


def _upper_gradients(upper_loss: Loss, phi: Tensors, step: LowerStep) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """First-order term, direction D v, and upper loss (T,)."""
    loss = upper_loss()
    gradients = torch.autograd.grad(loss.sum(), [*phi, *step.theta])
    first, v = gradients[: len(phi)], gradients[len(phi) :]
    return list(first), [d * g for d, g in zip(step.jacobian, v, strict=True)], loss.detach()


def _add_limited(first: Tensors, second: Tensors, max_ratio: float) -> list[Tensor]:
    length, limit = task_norm(second), max_ratio * task_norm(first)
    share = torch.where(length > limit, limit / length, 1.0)
    return [a + _by_task(share, b) * b.detach() for a, b in zip(first, second, strict=True)]


@contextmanager
def _displaced(step: LowerStep, direction: Tensors, scale: Tensor) -> Iterator[None]:
    """Theta at ``before + scale * direction``; theta+ is restored exactly, also after an error."""
    after = [p.detach().clone() for p in step.theta]
    with torch.no_grad():
        for p, old, d in zip(step.theta, step.before, direction, strict=True):
            p.copy_(old + _by_task(scale, d) * d)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(step.theta, after, strict=True):
                p.copy_(value)


def _by_task(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))  # (T,) -> (T, 1, ...)
