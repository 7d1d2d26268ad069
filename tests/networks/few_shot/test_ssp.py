"""SSP against the paper's steps written out pixel by pixel."""

import pytest
import torch
from torch.nn import functional as F

from blosam_monai.networks.few_shot import SSP
from blosam_monai.networks.few_shot.ssp import sure_places


def similarity(pixels, background, foreground):
    """Pixels (N, C) and prototypes (C,) or (N, C) -> logits (N, 2)."""
    pair = [F.cosine_similarity(pixels, c.expand_as(pixels), dim=1) for c in (background, foreground)]
    return 10 * torch.stack(pair, dim=1)


def mean(pixels, weight):
    return (pixels * weight[:, None]).sum(0) / weight.sum()


def self_support(pixels, logits, foreground):
    """What one query's pixels (N, C) say of themselves: background prototypes (N, C), the foreground's (C,)."""
    probability = logits.softmax(1)
    chosen = []
    for c, threshold in ((0, 0.6), (1, 0.7)):
        sure = (probability[:, c] > threshold).nonzero()[:, 0]
        chosen.append(pixels[sure if len(sure) else probability[:, c].topk(min(12, len(pixels))).indices])
    adaptive = []
    for pixel in pixels:
        weight = (2 * F.cosine_similarity(pixel[None], chosen[0], dim=1)).softmax(0)
        adaptive.append(weight @ chosen[0])
    return 0.3 * chosen[0].mean(0) + 0.7 * torch.stack(adaptive), 0.5 * foreground + 0.5 * chosen[1].mean(0)


def reference(support, mask, query, refine):
    """One episode: (K, C, h, w), (K, h, w), (C, h, w) -> logits of the query (N, 2), the last two segmentations."""
    pixels = query.flatten(1).T
    shots = [(s.flatten(1).T, m.flatten()) for s, m in zip(support, mask, strict=True)]
    foreground = torch.stack([mean(s, m) for s, m in shots]).mean(0)
    background = torch.stack([mean(s, 1 - m) for s, m in shots]).mean(0)
    b1, f1 = self_support(pixels, similarity(pixels, background, foreground), foreground)
    first = similarity(pixels, b1, f1)
    if not refine:
        return [first]
    b2, f2 = self_support(pixels, first, foreground)
    mixed = (0.5 * background + 0.2 * b1 + 0.3 * b2, 0.5 * foreground + 0.2 * f1 + 0.3 * f2)
    return [first, 0.7 * similarity(pixels, *mixed) + 0.3 * first]


def episode(spread):
    """Two episodes of two shots; the larger the spread, the less sure is anything."""
    torch.manual_seed(0)
    label = (torch.rand(2, 6, 6, dtype=torch.float64) > 0.6).double()
    mask = torch.nn.functional.avg_pool2d((torch.rand(2, 2, 12, 12, dtype=torch.float64) > 0.6).double(), 2)
    directions = torch.randn(2, 5, dtype=torch.float64)

    def features(share):
        clean = torch.stack((1 - share, share), -1) @ directions
        return (clean + spread * torch.randn_like(clean)).movedim(-1, -3)

    return features(mask), mask, features(label), label


@pytest.mark.parametrize("spread", [0.3, 5.0])
@pytest.mark.parametrize("refine", [False, True])
def test_logits_are_those_of_the_steps_written_out(spread, refine):
    support, mask, query, _ = episode(spread)
    logit = SSP(5, refine=refine)(support, mask, query)
    for e in range(2):
        expected = reference(support[e], mask[e], query[e], refine)[-1]
        torch.testing.assert_close(logit[e].flatten(), expected[:, 1] - expected[:, 0])


@pytest.mark.parametrize("refine", [False, True])
def test_the_loss_adds_query_true_prototypes_and_a_fifth_of_the_supports(refine):
    support, mask, query, label = episode(0.5)
    loss = SSP(5, refine=refine).loss(support, mask, query, label)
    for e in range(2):
        pixels, truth = query[e].flatten(1).T, label[e].flatten()
        expected = sum(F.cross_entropy(z, truth.long()) for z in reference(support[e], mask[e], query[e], refine))
        expected += F.cross_entropy(similarity(pixels, mean(pixels, 1 - truth), mean(pixels, truth)), truth.long())
        for s, m in zip(support[e].flatten(2).mT, mask[e].flatten(1), strict=True):
            own = similarity(s, mean(s, 1 - m), mean(s, m))
            expected += 0.2 / 2 * F.cross_entropy(own, torch.stack((1 - m, m), dim=1))
        assert loss[e].item() == pytest.approx(expected.item(), rel=1e-9)


def test_where_nothing_is_sure_the_twelve_likeliest_places_are_taken():
    logit = torch.linspace(-0.3, 0.3, 25).reshape(1, 5, 5)  # probabilities 0.43 to 0.57
    background, foreground = sure_places(logit)[0].flatten(1)
    assert background.tolist() == [1.0] * 12 + [0.0] * 13
    assert foreground.tolist() == [0.0] * 13 + [1.0] * 12


def test_the_thresholds_are_six_tenths_for_background_and_seven_for_foreground():
    probability = torch.tensor([[[0.35, 0.45, 0.65, 0.75]]])
    background, foreground = sure_places(probability.logit())[0].flatten(1)
    assert (background.tolist(), foreground.tolist()) == ([1, 0, 0, 0], [0, 0, 0, 1])
