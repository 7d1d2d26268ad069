"""RPMMs: mixtures of prototypes found by expectation-maximisation, and a small decoder that refines stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blosam_monai.networks.few_shot.prototypes import (
    PrototypeHead,
    class_pixels,
    cosine_logits,
    farthest_points,
    unit,
    upsampled_cross_entropy,
)

KAPPA = 20.0  # concentration of the mixture's components
ITERATIONS = 10  # of expectation-maximisation


class RPMMs(PrototypeHead):
    """A stage for each number of components, every one with the segmentation of the stage before as an input.

    The features are squeezed to ``width`` channels. A stage finds that many foreground and background prototypes in
    the pixels of all shots. Each foreground prototype is set beside the query's features and convolved, and the
    results are added up; to them come the probabilities of the two classes under the mixture, then the probability of
    the stage before, in a residual block. All stages share the decoder's weights; the last gives the logits.

    The smallest faithful build. Against the paper: one residual block, no ASPP, no dropout, a squeeze of 1 x 1, and a
    convolution of features beside a prototype that is 3 x 3 for the features and 1 x 1 for the prototype, which is
    the same everywhere; supports of all shots in one mixture. Pixels have length 1 in the mixture, as the von
    Mises-Fisher density asks.

    Parameters, W = ``width``: C W + (10 W^2 + W) + (9 W (W + 2) + W) + (9 W (W + 1) + W + 9 W^2 + W) + W + 1. For
    W = 256 that is 2,465,793 at C = 128, 2,498,561 at C = 256 and 2,695,169 at C = 1024; for W = 128, 642,305 at
    C = 256.

    Args:
        channels: C of the features.
        width: channels of the squeezed features and of the decoder.
        components: of the mixtures of each class, stage by stage.

    Source: Yang et al. 2020 (Prototype Mixture Models).
    """

    def __init__(self, channels: int, *, width: int = 256, components: Sequence[int] = (1, 3, 6)) -> None:
        super().__init__(channels, projection=width)
        if not components or min(components) < 1:
            raise ValueError(f"components: {list(components)} must be numbers of at least 1, one for each stage.")
        self.components = tuple(components)
        self.beside_features = nn.Conv2d(width, width, 3, padding=1)
        self.beside_prototype = nn.Linear(width, width, bias=False)
        self.merge = nn.Conv2d(width + 2, width, 3, padding=1)
        self.residual = nn.Sequential(
            nn.Conv2d(width + 1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.classify = nn.Conv2d(width, 1, 1)

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """(E, K, C, h, w), mask (E, K, h, w) in [0, 1], (E, C, h, w) -> foreground logit (E, h, w)."""
        return self.stages(support, mask, query)[-1]

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Cross-entropies of all stages against the label (E, H, W), added -> (E,)."""
        maps = self.stages(support, mask, query)
        return torch.stack([upsampled_cross_entropy(logit, label) for logit in maps]).sum(0)

    def stages(self, support: Tensor, mask: Tensor, query: Tensor) -> list[Tensor]:
        """An episode -> the foreground logit (E, h, w) of each stage."""
        pixels, weights = class_pixels(self.project(support).relu(), mask)
        query = self.project(query).relu()
        beside = self.beside_features(query)[:, None]  # (E, 1, W, h, w)
        history = torch.zeros_like(query[:, :1])
        maps = []
        for count in self.components:
            means = mixture_means(pixels, weights, count)  # (E, 2, count, W)
            shift = self.beside_prototype(means[:, 1])[..., None, None]  # (E, count, W, 1, 1)
            x = (beside + shift).relu().sum(1)
            x = self.merge(torch.cat((x, class_probability(query, means)), dim=1)).relu()
            x = (x + self.residual(torch.cat((x, history), dim=1))).relu()
            maps.append(self.classify(x)[:, 0])
            history = maps[-1].sigmoid()[:, None]
        return maps


def mixture_means(pixels: Tensor, weights: Tensor, count: int, *, iterations: int = ITERATIONS) -> Tensor:
    """Mean directions of a mixture of ``count`` equally likely components: (E, N, C), (E, 2, N) -> (E, 2, count, C).

    Expectation-maximisation for von Mises-Fisher densities of concentration ``KAPPA``, from ``farthest_points``;
    ``weights`` say how much of a pixel is of each class. Directions have length 1, or 0 for a class without a pixel.
    The gradient takes the last responsibilities as given.
    """
    pixels = unit(pixels, -1)
    with torch.no_grad():
        means = unit(farthest_points(pixels, weights, count), -1)
        for _ in range(iterations - 1):
            means = _maximise(pixels, weights, means)
    return _maximise(pixels, weights, means)


def _maximise(pixels: Tensor, weights: Tensor, means: Tensor) -> Tensor:
    """One iteration of expectation and maximisation."""
    with torch.no_grad():
        cosine = (means.flatten(1, 2) @ pixels.mT).unflatten(1, means.shape[1:3])  # (E, 2, count, N)
        share = (KAPPA * cosine).softmax(2) * weights[:, :, None]
    return unit((share.flatten(1, 2) @ pixels).unflatten(1, means.shape[1:3]), -1)


def class_probability(query: Tensor, means: Tensor) -> Tensor:
    """Query (E, C, h, w), mean directions (E, 2, count, C) -> probability of the two classes (E, 2, h, w)."""
    scores = cosine_logits(query, means.flatten(1, 2), alpha=KAPPA)  # (E, 2 count, h, w)
    return scores.softmax(1).unflatten(1, means.shape[1:3]).sum(2)
