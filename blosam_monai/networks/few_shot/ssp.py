"""SSP: the query's own confident places make prototypes for the rest of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blosam_monai.networks.few_shot.prototypes import (
    PrototypeHead,
    class_masks,
    class_prototypes,
    cosine_logits,
    foreground_logit,
    masked_average,
    unit,
    upsampled_cross_entropy,
)

ALPHA = 10.0  # of the cosines
THRESHOLDS = (0.6, 0.7)  # probability from which a place of the query is sure: background, foreground
FALLBACK = 12  # places taken where none is sure: the most probable
ADAPTIVE_SCALE = 2.0  # of the cosines in the softmax over sure background places
SUPPORT_WEIGHT = 0.2  # of the supports' own loss


class SSP(PrototypeHead):
    """Self-support prototypes: segment once from the support, then again from what was sure in the query.

    With FP and BP the support's prototypes: the foreground's is ``0.5 FP + 0.5 SSFP``, SSFP the mean of the sure
    foreground places; the background's is ``0.3 SSBP + 0.7 ASBP``, SSBP the mean of the sure background places and
    ASBP, another one for each place, their mean weighted by likeness to it. In the paper blocks 2 and 3 of the
    backbone (ResNet-50) learn. On frozen features only ``projection`` does; without it the head has no parameter.

    Args:
        channels: C of the features.
        projection: channels of a learned 1 x 1 convolution (C times as many parameters); None: training-free.
        refine: do the same once more from the second segmentation, and mix the logits 0.7 to 0.3.

    Source: Fan et al. 2022 (Self-Support Few-Shot Semantic Segmentation); its published code for the constants and the
    mixture of the refinement.
    """

    def __init__(self, channels: int, *, projection: int | None = None, refine: bool = False) -> None:
        super().__init__(channels, projection=projection)
        self.refine = refine

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """(E, K, C, h, w), mask (E, K, h, w) in [0, 1], (E, C, h, w) -> foreground logit (E, h, w)."""
        return self._segment(self.project(support), mask, self.project(query))[-1]

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Cross-entropies, (E,): the query, the query from its true prototypes, 0.2 times each support from its own.

        With ``refine`` both segmentations of the query count.
        """
        support, query = self.project(support), self.project(query)
        maps = self._segment(support, mask, query)
        h, w = query.shape[-2:]
        true = F.adaptive_avg_pool2d(label.to(query.dtype), (h, w))  # (E, h, w)
        maps.append(_self_segment(query, true))
        own = _self_segment(support, mask).flatten(0, 1)
        shots = upsampled_cross_entropy(own, mask.flatten(0, 1)).unflatten(0, mask.shape[:2])
        return sum((upsampled_cross_entropy(logit, label) for logit in maps), SUPPORT_WEIGHT * shots.mean(1))

    def _segment(self, support: Tensor, mask: Tensor, query: Tensor) -> list[Tensor]:
        """Foreground logits (E, h, w): from self-support prototypes and, with ``refine``, the refined ones after."""
        prototypes = class_prototypes(support, mask)
        first = foreground_logit(cosine_logits(query, prototypes, alpha=ALPHA))
        background, foreground = prototypes[..., None, None].unbind(1)  # (E, C, 1, 1)
        background_1, foreground_1 = _self_support(query, first, foreground)
        logit = _logit(query, background_1, foreground_1)
        if not self.refine:
            return [logit]
        background_2, foreground_2 = _self_support(query, logit, foreground)
        refined = _logit(
            query,
            0.5 * background + 0.2 * background_1 + 0.3 * background_2,
            0.5 * foreground + 0.2 * foreground_1 + 0.3 * foreground_2,
        )
        return [logit, 0.7 * refined + 0.3 * logit]


def _self_segment(features: Tensor, mask: Tensor) -> Tensor:
    """Features (..., C, h, w) segmented by the prototypes of their own mask (..., h, w) -> (..., h, w)."""
    prototypes = masked_average(features, class_masks(mask))
    return foreground_logit(cosine_logits(features, prototypes, alpha=ALPHA))


def _logit(query: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """Query (E, C, h, w), prototypes (E, C, h, w) or (E, C, 1, 1) -> foreground logit (E, h, w)."""
    place = unit(query, 1)
    return ALPHA * ((place * unit(foreground, 1)).sum(1) - (place * unit(background, 1)).sum(1))


def _self_support(query: Tensor, logit: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Prototypes from what a logit (E, h, w) is sure of: background (E, C, h, w), foreground (E, C, 1, 1)."""
    sure = sure_places(logit)
    own_background, own_foreground = masked_average(query, sure)[..., None, None].unbind(1)  # (E, C, 1, 1)
    adaptive = _adaptive_background(query, sure[:, 0])
    return 0.3 * own_background + 0.7 * adaptive, 0.5 * foreground + 0.5 * own_foreground


@torch.no_grad()
def sure_places(logit: Tensor) -> Tensor:
    """Where a logit (E, h, w) is sure, as masks of the two classes (E, 2, h, w) of 0 and 1; neither is ever empty."""
    probability = class_masks(logit.sigmoid()).flatten(2)  # (E, 2, h w)
    sure = probability > probability.new_tensor(THRESHOLDS)[:, None]
    likeliest = probability.topk(min(FALLBACK, probability.shape[-1])).indices
    fallback = torch.zeros_like(sure).scatter(2, likeliest, True)
    sure = torch.where(sure.any(-1, keepdim=True), sure, fallback)
    return sure.to(logit.dtype).unflatten(2, logit.shape[1:])


def _adaptive_background(query: Tensor, sure: Tensor) -> Tensor:
    """For each place of (E, C, h, w) the mean of the sure places (E, h, w), softmax of 2 cosines -> (E, C, h, w)."""
    pixels = query.flatten(2).mT  # (E, h w, C)
    likeness = unit(pixels, -1)
    seen = sure.flatten(1)[:, None].bool()  # (E, 1, h w)
    mean = F.scaled_dot_product_attention(likeness, likeness, pixels, attn_mask=seen, scale=ADAPTIVE_SCALE)
    return mean.mT.unflatten(2, query.shape[-2:])
