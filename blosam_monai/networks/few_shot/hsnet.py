"""HSNet: every place of the query compared with every place of the support, and 4-D convolutions over the result.

Shapes: N pairs of a query and one support, hq x wq and hs x ws their grids. What all places of one say to all places
of the other is a 4-D image with the axes (hq, wq, hs, ws).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.networks.features import Shape, unpack
from blosam_monai.networks.few_shot.prototypes import foreground_logit, unit, upsampled_cross_entropy

WIDTHS = (16, 64, 128)  # channels of the three convolutions that squeeze a level
SQUEEZES = (  # (kernel, stride over the support) of each of the three; the finest level first
    ((5, 4), (5, 4), (3, 2)),
    ((5, 4), (3, 2), (3, 2)),
    ((3, 2), (3, 2), (3, 2)),
)
GROUPS = 4


class HSNet(nn.Module):
    """Hypercorrelation squeeze network: correlations of features at three sizes -> one foreground logit a place.

    Of every pair of maps: the cosines of all places of the query with all places of the masked support, negative ones
    cut off. Correlations of one size are the channels of a level; each level's support axes are squeezed by strided
    4-D convolutions, coarse levels are added to finer ones, the support axes averaged, and a small 2-D decoder draws
    the mask at twice the finest grid. The features stay frozen; all of the head learns, from chance.

    Several shots are K one-shot predictions, as in the paper: in training the loss is their mean, a prediction is
    their vote. A place is foreground with at least half of the votes that the most voted place has, so ``forward``
    gives the logit of the shot that decides: of m votes needed, the m-th largest.

    Args:
        channels: C of a single map (SAM's embedding): the levels are that map, and averages of it over 2 x 2 and 4 x 4
            places, one correlation each (2,566,818 parameters).
        shapes: (C, h, w) of each of several maps, which count in the place of ``channels``: features then come as
            packed rows. Finest first, of three sizes, each half as fine as the last: ``ResNetFeatures.shapes`` of
            ``pyramid``, 4, 6 and 3 maps (2,573,794 parameters).

    Raises:
        ValueError: maps that are not of three sizes, or features other than those the head was made for.

    Source: Min et al. 2021 (Hypercorrelation Squeeze for Few-Shot Segmentation), section 4. The published
    votes are cast at the image's size; here at the mask's grid.
    """

    def __init__(self, channels: int, *, shapes: Sequence[Shape] | None = None) -> None:
        super().__init__()
        self.channels, self.shapes = channels, shapes
        counts = [1, 1, 1] if shapes is None else _level_counts(shapes)
        self.squeeze = nn.ModuleList(
            _convolutions((count, *WIDTHS), steps) for count, steps in zip(counts, SQUEEZES, strict=True)
        )
        last = WIDTHS[-1]
        self.mix = nn.ModuleList(_convolutions((last,) * 4, ((3, 1),) * 3) for _ in counts[1:])
        self.decoder_1 = nn.Sequential(_conv2d(last, last), nn.ReLU(), _conv2d(last, last // 2), nn.ReLU())
        self.decoder_2 = nn.Sequential(_conv2d(last // 2, last // 2), nn.ReLU(), _conv2d(last // 2, 2))

    def forward(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """Support, mask (E, K, h, w) in [0, 1], query -> foreground logit (E, h, w), the shots' vote.

        Features are packed rows (E, K, L) and (E, L), or single maps (E, K, C, h, w) and (E, C, h, w). The mask may be
        of another grid than the features: the prediction has the mask's.
        """
        logits = self._segment(support, mask, query)  # (E, K, 2h, 2w)
        return vote(F.interpolate(logits, mask.shape[-2:], mode="bilinear", align_corners=False))

    def loss(self, support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> Tensor:
        """Episode and the query's label (E, H, W) in {0, 1} -> cross-entropy (E,), the mean over the shots."""
        logits = self._segment(support, mask, query)
        E, K = logits.shape[:2]
        losses = upsampled_cross_entropy(logits.flatten(0, 1), label.repeat_interleave(K, dim=0))
        return losses.unflatten(0, (E, K)).mean(1)

    def _segment(self, support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """Foreground logits of each shot (E, K, 2h, 2w), h x w the finest grid."""
        levels = [level.flatten(0, 1) for level in self._correlations(support, mask, query)]
        squeezed = [squeeze(level) for squeeze, level in zip(self.squeeze, levels, strict=True)]
        mixed = squeezed[-1]  # (N, 128, hq, wq, hs, ws) of the coarsest level
        for finer, mix in zip(squeezed[-2::-1], self.mix, strict=True):
            mixed = mix(finer + over_query(partial(_resize, size=finer.shape[2:4]), mixed))
        x = self.decoder_1(mixed.mean((-2, -1)))  # (N, 64, h, w)
        x = self.decoder_2(_resize(x, (2 * x.shape[-2], 2 * x.shape[-1])))  # (N, 2, 2h, 2w)
        return foreground_logit(x).unflatten(0, mask.shape[:2])

    def _correlations(self, support: Tensor, mask: Tensor, query: Tensor) -> list[Tensor]:
        """Cosines of each level, finest first, each (E, K, L, hq, wq, hs, ws), L maps."""
        pairs = zip(self._levels(support), self._levels(query), strict=True)
        return [
            torch.stack([correlation(s, mask, q) for s, q in zip(of_support, of_query, strict=True)], dim=2)
            for of_support, of_query in pairs
        ]

    def _levels(self, features: Tensor) -> list[list[Tensor]]:
        """Features -> the maps of each level, finest first, each (..., C, h, w)."""
        if self.shapes is not None:
            maps = unpack(features, self.shapes)
            return [list(level) for _, level in groupby(maps, key=lambda one: one.shape[-2:])]
        if features.shape[-3] != self.channels:
            raise ValueError(
                f"HSNet: features have {features.shape[-3]} channels, the head was made for {self.channels}; give it "
                "the features' channels."
            )
        h, w = features.shape[-2:]
        return [[_average(features, (-(-h // factor), -(-w // factor)))] for factor in (1, 2, 4)]


class CenterPivotConv4d(nn.Module):
    """4-D convolution (N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs / stride, ws / stride), its kernel mostly zero.

    Of a whole 4-D kernel only the entries are kept that touch the centre of the query's window or of the support's:
    the sum of a 2-D convolution over the query and one over the support.

    Args:
        inputs, outputs: C and C'.
        kernel: side of the window, odd.
        stride: over the support's axes.

    Source: Min et al. 2021, the center-pivot 4D convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.query = _conv2d(inputs, outputs, kernel)
        self.support = _conv2d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs / stride, ws / stride), rounded up."""
        centres = x[..., :: self.stride, :: self.stride]
        return over_query(self.query, centres) + over_support(self.support, x)


def over_query(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (n, C, h, w) to the query's axes of (N, C, hq, wq, hs, ws)."""
    y = function(x.permute(0, 4, 5, 1, 2, 3).flatten(0, 2))
    return y.unflatten(0, (x.shape[0], *x.shape[4:])).permute(0, 3, 4, 5, 1, 2)


def over_support(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (n, C, h, w) to the support's axes of (N, C, hq, wq, hs, ws)."""
    y = function(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    return y.unflatten(0, (x.shape[0], *x.shape[2:4])).permute(0, 3, 1, 2, 4, 5)


def vote(logits: Tensor) -> Tensor:
    """Logits of K shots (E, K, h, w) -> (E, h, w), positive where enough shots say foreground.

    Enough is half of the most votes that any place of the episode has. Of m votes needed it is the m-th largest logit.

    >>> vote(torch.tensor([[[[3.0, -1.0, 2.0]], [[2.0, 1.0, -1.0]], [[1.0, -2.0, -3.0]]]]))  # 3, 1 and 1 votes of 3
    tensor([[[ 2., -1., -1.]]])
    """
    votes = (logits > 0).sum(1).amax((-2, -1))  # (E,)
    needed = ((votes + 1) // 2).clamp_min(1)
    place = (needed - 1)[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
    return logits.sort(dim=1, descending=True).values.gather(1, place)[:, 0]


def _level_counts(shapes: Sequence[Shape]) -> list[int]:
    counts = [len(list(level)) for _, level in groupby(shapes, key=lambda shape: tuple(shape[1:]))]
    if len(counts) != len(SQUEEZES):
        raise ValueError(f"shapes: maps of {len(counts)} sizes, HSNet needs {len(SQUEEZES)}; take ResNet's pyramid.")
    return counts


def correlation(support: Tensor, mask: Tensor, query: Tensor) -> Tensor:
    """Support (E, K, C, hs, ws) in its mask and query (E, C, hq, wq) -> cosines (E, K, hq, wq, hs, ws), at least 0."""
    masked = support * _average(mask, support.shape[-2:])[:, :, None]
    return torch.einsum("ekcyx,echw->ekhwyx", unit(masked, 2), unit(query, 1)).relu()


def _average(x: Tensor, size: Sequence[int]) -> Tensor:
    """(..., C, h, w) -> averaged onto a coarser grid (..., C, *size)."""
    return F.adaptive_avg_pool2d(x.flatten(0, -4), (size[0], size[1])).unflatten(0, x.shape[:-3])


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _conv2d(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)


def _convolutions(widths: Sequence[int], steps: Sequence[tuple[int, int]]) -> nn.Sequential:
    """4-D convolutions, each with group normalisation and ReLU; ``steps`` are their (kernel, stride)."""
    layers: list[nn.Module] = []
    for inputs, outputs, (kernel, stride) in zip(widths, widths[1:], steps, strict=False):
        layers += [
            CenterPivotConv4d(inputs, outputs, kernel=kernel, stride=stride),
            nn.GroupNorm(GROUPS, outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
