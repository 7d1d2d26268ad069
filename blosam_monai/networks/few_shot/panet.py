"""PANet: one prototype a class, and an alignment loss in which support and query swap roles."""

from __future__ import annotations

from torch import Tensor

from blosam_monai.networks.few_shot.prototypes import (
    PrototypeHead,
    class_prototypes,
    cosine_logits,
    foreground_logit,
    masked_average,
    predicted_masks,
    upsampled_cross_entropy,
)


class PANet(PrototypeHead):
    """Masked average of the support's features, cosine times 20 with the query's.

    In the paper the backbone (VGG-16) learns. On frozen features only ``projection`` does; without it the head has no
    parameter and there is nothing to train.

    Args:
        channels: C of the features.
        projection: channels of a learned 1 x 1 convolution (C times as many parameters); None: training-free.

    Source: Wang et al. 2019 (PANet), sections 3.3 to 3.5.
    """

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """(E, K, C, h, w), mask (E, K, h, w) in [0, 1], (E, C, h, w) -> foreground logit (E, h, w)."""
        return self._segment(self.project(support), mask, self.project(query))

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy of the query plus that of the supports, segmented from the query's own prediction -> (E,).

        An episode whose query is predicted to be of one class only has no alignment loss.
        """
        support, query = self.project(support), self.project(query)
        logit = self._segment(support, mask, query)
        return upsampled_cross_entropy(logit, label) + self._alignment(support, mask, query, logit)

    def _segment(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        return foreground_logit(cosine_logits(query, class_prototypes(support, mask)))

    def _alignment(self, support: Tensor, mask: Tensor, query: Tensor, logit: Tensor) -> Tensor:
        E, K = mask.shape[:2]
        predicted = predicted_masks(logit)  # (E, 2, h, w)
        prototypes = masked_average(query, predicted)  # (E, 2, C)
        logits = foreground_logit(cosine_logits(support, prototypes[:, None]))  # (E, K, h, w)
        shots = upsampled_cross_entropy(logits.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (E, K))
        return shots.mean(1) * predicted.amax((-2, -1)).amin(1)
