"""PPNet: several prototypes a class, one for each part of it that k-means finds."""

from __future__ import annotations

import torch
from torch import Tensor

from blosam_monai.networks.few_shot.prototypes import (
    TINY,
    PrototypeHead,
    class_pixels,
    class_prototypes,
    cosine_logits,
    farthest_points,
)

GLOBAL_WEIGHT = 0.8  # of the class's prototype, added to each of its parts


class PPNet(PrototypeHead):
    """Each class has ``parts`` prototypes, and at each place the score of the one that fits best.

    A part is the mean of a cluster of the class's pixels (all shots together) plus 0.8 times the class's prototype. The
    paper's graph refinement of the parts with unlabelled images and its semantic branch are left out, and its backbone
    (ResNet-50), which learns, is frozen here: only ``projection`` can learn.

    Args:
        channels: C of the features.
        projection: channels of a learned 1 x 1 convolution (C times as many parameters); None: training-free.
        parts: prototypes of a class.
        iterations: of k-means.

    Source: Liu et al. 2020 (Part-aware Prototype Network).
    """

    def __init__(self, channels: int, *, projection: int | None = None, parts: int = 5, iterations: int = 20) -> None:
        super().__init__(channels, projection=projection)
        if parts < 1:
            raise ValueError(f"parts: {parts} must be at least 1.")
        self.parts, self.iterations = parts, iterations

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """(E, K, C, h, w), mask (E, K, h, w) in [0, 1], (E, C, h, w) -> foreground logit (E, h, w)."""
        support, query = self.project(support), self.project(query)
        pixels, weights = class_pixels(support, mask)
        centres = k_means(pixels, weights, self.parts, iterations=self.iterations)  # (E, 2, parts, C)
        parts = centres + GLOBAL_WEIGHT * class_prototypes(support, mask)[:, :, None]
        scores = cosine_logits(query, parts.flatten(1, 2)).unflatten(1, (2, self.parts))
        background, foreground = scores.amax(2).unbind(1)
        return foreground - background


def k_means(pixels: Tensor, weights: Tensor, count: int, *, iterations: int) -> Tensor:
    """Centres of each class's pixels: (E, N, C), weights (E, 2, N) -> (E, 2, count, C).

    Lloyd's algorithm with weighted pixels from ``farthest_points``; a centre that no pixel is nearest to stays where it
    is, a pixel as near to two centres counts for both. The gradient takes the last clusters as given.
    """
    with torch.no_grad():
        centres = farthest_points(pixels, weights, count)
        for _ in range(iterations - 1):
            previous, centres = centres, _centres(pixels, weights, centres)
            if torch.equal(previous, centres):
                break  # as it would stay
    return _centres(pixels, weights, centres)


def _centres(pixels: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """One iteration: the weighted means of the pixels nearest to each centre."""
    with torch.no_grad():
        product = (centres.flatten(1, 2) @ pixels.mT).unflatten(1, centres.shape[1:3])
        distance = centres.square().sum(-1, keepdim=True) - 2 * product  # (E, 2, count, N) but for the pixel's square
        nearest = distance == distance.amin(2, keepdim=True)  # argmin along this axis is slow
        share = weights[:, :, None] * nearest
        mass = share.sum(-1, keepdim=True)
    means = (share.flatten(1, 2) @ pixels).unflatten(1, share.shape[1:3]) / mass.clamp_min(TINY)
    return torch.where(mass > 0, means, centres)
