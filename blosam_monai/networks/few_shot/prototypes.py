"""What heads share that compare features with prototypes: pooling, cosines, starting points, and the loss.

Shapes: E episodes, K shots, C channels of the features, h x w their grid, N pixels, P prototypes. Where an axis has
two classes, the background is the first and the foreground the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALPHA = 20.0  # of the cosines, before a softmax; Wang et al. 2019 (PANet)
TINY = 1e-12  # a squared length, or a sum of weights, below this is none


class PrototypeHead(nn.Module):
    """Base of the heads: an episode's features -> one foreground logit a place.

    The features come from a frozen network. In the papers it is the backbone that learns; ``projection`` is what can
    learn in its place. It starts orthogonal, so that as many channels as the features have leave every cosine as it
    is: training starts at the training-free method.

    Args:
        channels: C.
        projection: channels of a learned 1 x 1 convolution of all features; None leaves it out.
    """

    def __init__(self, channels: int, *, projection: int | None = None) -> None:
        super().__init__()
        if projection is not None and projection < 1:
            raise ValueError(f"projection: {projection} must be at least 1, or None for no projection.")
        self.channels = channels
        self.projection: nn.Conv2d | None = None
        if projection is not None:
            self.projection = nn.Conv2d(channels, projection, 1, bias=False)
            nn.init.orthogonal_(self.projection.weight)

    def project(self, features: Tensor) -> Tensor:
        """(..., C, h, w) -> (..., C', h, w), C' of the projection if there is one."""
        if features.shape[-3] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: features have {features.shape[-3]} channels, the head was made for "
                f"{self.channels}; give it the features' channels."
            )
        if self.projection is None:
            return features
        return self.projection(features.flatten(0, -4)).unflatten(0, features.shape[:-3])

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Episode and the query's label (E, H, W) in {0, 1} -> loss (E,): the cross-entropy of the logits."""
        return upsampled_cross_entropy(self(support, mask, query), label)


def inverse_length(x: Tensor, dim: int) -> Tensor:
    """One over the Euclidean length along ``dim``, kept as an axis of size 1; 0 for a zero vector, gradient too."""
    square = x.square().sum(dim, keepdim=True)
    return torch.where(square > TINY, square.clamp_min(TINY).rsqrt(), 0.0)


def unit(x: Tensor, dim: int) -> Tensor:
    """Scaled to length 1 along ``dim``; a zero vector stays one, with gradient zero."""
    return x * inverse_length(x, dim)


def class_masks(mask: Tensor) -> Tensor:
    """Foreground (..., h, w) in [0, 1] -> background and foreground (..., 2, h, w)."""
    return torch.stack((1 - mask, mask), dim=-3)


def masked_average(features: Tensor, masks: Tensor) -> Tensor:
    """Means of (..., C, h, w) weighted by masks (..., P, h, w) -> (..., P, C); an empty mask has the zero vector."""
    total = torch.einsum("...chw,...phw->...pc", features, masks)
    return total / masks.sum((-2, -1)).clamp_min(TINY)[..., None]


def class_prototypes(support: Tensor, mask: Tensor) -> Tensor:
    """Support (E, K, C, h, w), mask (E, K, h, w) in [0, 1] -> prototypes of the two classes (E, 2, C).

    The mean, over the shots that show the class, of the shot's masked average. A class that no shot shows has the zero
    vector, whose cosine with everything is 0. Source: Wang et al. 2019 (PANet), eqs. 1 and 2.
    """
    masks = class_masks(mask)  # (E, K, 2, h, w)
    shown = (masks.sum((-2, -1)) > 0).to(support.dtype)[..., None]  # (E, K, 2, 1)
    return (shown * masked_average(support, masks)).sum(1) / shown.sum(1).clamp_min(1)


def cosine_logits(query: Tensor, prototypes: Tensor, *, alpha: float = ALPHA) -> Tensor:
    """``alpha`` times the cosine of every place of (..., C, h, w) with prototypes (..., P, C) -> (..., P, h, w)."""
    return alpha * torch.einsum("...chw,...pc->...phw", unit(query, -3), unit(prototypes, -1))


def foreground_logit(logits: Tensor) -> Tensor:
    """Logits of the two classes (..., 2, h, w) -> foreground minus background (..., h, w): softmax is its sigmoid."""
    return logits[..., 1, :, :] - logits[..., 0, :, :]


def predicted_masks(logit: Tensor) -> Tensor:
    """Foreground logit (..., h, w) -> the more probable class as two masks (..., 2, h, w) of 0 and 1, no gradient."""
    return class_masks((logit > 0).to(logit.dtype))


def upsampled_cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """Foreground logit (E, h, w), interpolated to a label (E, H, W) in [0, 1] -> mean cross-entropy (E,)."""
    if len(logit) != len(label):
        raise ValueError(f"label: {len(label)} episodes, the logits have {len(logit)}; give one label an episode.")
    if logit.shape != label.shape:
        logit = F.interpolate(logit[:, None], label.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), reduction="none").mean((1, 2))


@torch.no_grad()
def farthest_points(pixels: Tensor, weights: Tensor, count: int) -> Tensor:
    """Where a clustering starts: pixels (E, N, C), weights of each class (E, 2, N) -> (E, 2, count, C).

    The pixel farthest from the class's mean, then again and again the one farthest from all that were taken; squared
    distances count times the pixel's weight. No chance in it. A class with fewer different pixels repeats its mean; an
    empty one has zero vectors.
    """
    square = pixels.square().sum(-1)[:, None]  # (E, 1, N)
    episode = torch.arange(len(pixels), device=pixels.device)[:, None]
    mean = weights @ pixels / weights.sum(-1, keepdim=True).clamp_min(TINY)  # (E, 2, C)

    def distance(point: Tensor) -> Tensor:  # (E, 2, C) -> (E, 2, N)
        return (square - 2 * point @ pixels.mT + point.square().sum(-1, keepdim=True)).clamp_min(0)

    points: list[Tensor] = []
    nearest = distance(mean)
    for _ in range(count):
        farthest, index = (weights * nearest).max(-1)  # (E, 2)
        points.append(torch.where(farthest[..., None] > 0, pixels[episode, index], mean))
        latest = distance(points[-1])
        nearest = torch.minimum(nearest, latest) if len(points) > 1 else latest
    return torch.stack(points, dim=2)


def class_pixels(support: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Support (E, K, C, h, w), mask (E, K, h, w) -> pixels of all shots (E, N, C), N = K h w, and weights (E, 2, N)."""
    pixels = support.movedim(2, -1).flatten(1, 3)
    return pixels, class_masks(mask).movedim(2, 1).flatten(2)
