"""BiOpt: prototypes that a few gradient steps fit to the query; an outer loop learns where the steps start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blosam_monai.networks.few_shot.prototypes import (
    ALPHA,
    PrototypeHead,
    class_prototypes,
    cosine_logits,
    foreground_logit,
    inverse_length,
    masked_average,
    predicted_masks,
    unit,
    upsampled_cross_entropy,
)

REDUCTIONS = ("mean", "sum")


class BiOpt(PrototypeHead):
    """Support prototypes P_s, the query's own P', their learned mixture P_0, and gradient steps from it to P_q.

    P_s segments the query; P' is the query's average in that segmentation (P_s for a class that it lacks).
    ``omega = sigmoid(FC([P_s; P']))``, elementwise, and ``P_0 = omega P_s + (1 - omega) P'``. The inner loop fits P_0
    to the segmentation M_q that P_0 itself makes: P <- P - lr dCE(20 cos(query, P), M_q) / dP. The paper's Eq. 6 prints
    M_q with a minus before the cosine, a leftover of PANet's distance; that would train for the opposite classes, so
    it is a plus here, as in the paper's other equations. FC starts at zero: omega is 0.5.

    Parameters: FC has 2 C^2 + C, 131,328 at C = 256. In the paper the backbone learns as well.

    Args:
        channels: C of the features.
        projection: channels of a learned 1 x 1 convolution, which then is FC's C; None leaves it out.
        steps: of the inner loop.
        inner_lr: lr of the inner loop.
        inner_reduction: ``mean`` or ``sum`` of the cross-entropy over the pixels; the paper writes a sum. With features
            of length 1 the steps of a sum are N times as long and easily go too far.
        normalise: give features and prototypes P_s, P' length 1 before they are averaged and mixed. The gradient of a
            cosine is as one over the prototype's length, so that on long features a step of 0.1 does nothing.
        first_order: take the steps of the inner loop as constants in the outer gradient.
        train_free: no FC; omega is 0.5 and nothing learns.

    Source: Liu et al. 2020 (BiOpt), Eqs. 3 to 7.
    """

    def __init__(
        self,
        channels: int,
        *,
        projection: int | None = None,
        steps: int = 10,
        inner_lr: float = 0.1,
        inner_reduction: str = "mean",
        normalise: bool = True,
        first_order: bool = False,
        train_free: bool = False,
    ) -> None:
        super().__init__(channels, projection=projection)
        if inner_reduction not in REDUCTIONS:
            raise ValueError(f"inner_reduction: {inner_reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        if train_free and (first_order or projection):
            raise ValueError("train_free: set with first_order or projection, which are of training; leave them out.")
        self.steps, self.inner_lr, self.inner_reduction = steps, inner_lr, inner_reduction
        self.normalise, self.first_order = normalise, first_order
        self.weight_generator: nn.Linear | None = None
        if not train_free:
            width = projection or channels
            self.weight_generator = nn.Linear(2 * width, width)
            nn.init.zeros_(self.weight_generator.weight)
            nn.init.zeros_(self.weight_generator.bias)

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """(E, K, C, h, w), mask (E, K, h, w) in [0, 1], (E, C, h, w) -> foreground logit (E, h, w)."""
        return self.predictions(support, mask, query)["P_q"]

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Cross-entropies of the segmentations from P_s, P_0 and P_q against the label (E, H, W), added -> (E,)."""
        maps = self.predictions(support, mask, query)
        return torch.stack([upsampled_cross_entropy(maps[name], label) for name in ("P_s", "P_0", "P_q")]).sum(0)

    def predictions(self, support: Tensor, mask: Tensor, query: Tensor) -> dict[str, Tensor]:
        """The foreground logits (E, h, w) of the four sets of prototypes: ``P_s``, ``P'``, ``P_0``, ``P_q``.

        Their scores apart show whether the query's own segmentation helped or drifted.
        """
        support, query = self._features(support), self._features(query)
        first = self._scaled(class_prototypes(support, mask))  # (E, 2, C)
        maps = {"P_s": _segment(query, first)}
        own = self._own(query, maps["P_s"], first)
        start = self._mix(first, own)
        maps |= {"P'": _segment(query, own), "P_0": _segment(query, start)}
        final = optimise(
            query,
            start,
            predicted_masks(maps["P_0"]),
            steps=self.steps,
            lr=self.inner_lr,
            reduction=self.inner_reduction,
            first_order=self.first_order,
        )
        return maps | {"P_q": _segment(query, final)}

    def _features(self, features: Tensor) -> Tensor:
        features = self.project(features)
        return unit(features, -3) if self.normalise else features

    def _scaled(self, prototypes: Tensor) -> Tensor:
        return unit(prototypes, -1) if self.normalise else prototypes

    def _own(self, query: Tensor, logit: Tensor, first: Tensor) -> Tensor:
        """P' (E, 2, C): the query's average in its first segmentation, P_s for a class without a pixel there."""
        predicted = predicted_masks(logit)
        present = predicted.amax((-2, -1))[..., None] > 0  # (E, 2, 1)
        return torch.where(present, self._scaled(masked_average(query, predicted)), first)

    def _mix(self, first: Tensor, own: Tensor) -> Tensor:
        """P_0 (E, 2, C) of P_s and P'."""
        if self.weight_generator is None:
            return (first + own) / 2
        omega = self.weight_generator(torch.cat((first, own), dim=-1)).sigmoid()  # (E, 2, C)
        return omega * first + (1 - omega) * own


def _segment(query: Tensor, prototypes: Tensor) -> Tensor:
    return foreground_logit(cosine_logits(query, prototypes))


def optimise(
    query: Tensor, prototypes: Tensor, target: Tensor, *, steps: int, lr: float, reduction: str, first_order: bool
) -> Tensor:
    """Gradient steps on the prototypes of each episode: they shall segment the query as ``target`` says.

    The gradient of the cross-entropy is written out, not asked of autograd: it needs no graph, so that evaluation
    works under ``no_grad`` and ``inference_mode``, and the way back through the loop is a plain backward pass.

    Args:
        query: features (E, C, h, w).
        prototypes: where the steps start (E, 2, C).
        target: masks of the two classes (E, 2, h, w).
        steps: how many.
        lr: of a step; plain gradient descent.
        reduction: ``mean`` or ``sum`` over the pixels of a query.
        first_order: the result's derivative by ``prototypes`` is the identity, and by ``query`` zero.
    """
    if first_order:
        with torch.no_grad():
            end = optimise(query, prototypes, target, steps=steps, lr=lr, reduction=reduction, first_order=False)
        return prototypes + (end - prototypes).detach()
    places, goal = unit(query, 1).flatten(2), target.flatten(2)  # (E, C, N), (E, 2, N)
    scale = ALPHA / goal.shape[-1] if reduction == "mean" else ALPHA
    for _ in range(steps):
        prototypes = prototypes - lr * scale * _gradient(prototypes, places, goal)
    return prototypes


def _gradient(prototypes: Tensor, places: Tensor, goal: Tensor) -> Tensor:
    """d(summed cross-entropy of ALPHA cos) / d(prototypes), over ALPHA: a cosine's gradient is tangent, over length."""
    inverse = inverse_length(prototypes, -1)  # (E, 2, 1)
    direction = prototypes * inverse
    error = (ALPHA * direction @ places).softmax(1) - goal  # (E, 2, N)
    pull = error @ places.mT  # (E, 2, C)
    return (pull - direction * (direction * pull).sum(-1, keepdim=True)) * inverse
