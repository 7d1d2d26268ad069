"""PANet against cases worked by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from blosam_monai.networks.few_shot import PANet

# Supports (3, 0) (1, 0) (0, 2) (0, 4) with mask 1, 1/2, 0, 0: prototypes (7/3, 0) and (0.2, 2.4). The query has pixels
# (1, 0) (1, 1) (0, 1) (1, -1).
SUPPORT = torch.tensor([[[[[3.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 4.0]]]]])
MASK = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]])
QUERY = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, -1.0]]]])
BACKGROUND = math.hypot(0.2, 2.4)
LOGIT = [
    20 * (1 - 0.2 / BACKGROUND),
    20 * (1 / math.sqrt(2) - 2.6 / (math.sqrt(2) * BACKGROUND)),
    20 * (0 - 2.4 / BACKGROUND),
    20 * (1 / math.sqrt(2) + 2.2 / (math.sqrt(2) * BACKGROUND)),
]


def test_a_two_by_two_episode_has_the_logits_worked_out_by_hand():
    assert PANet(2)(SUPPORT, MASK, QUERY).flatten().tolist() == pytest.approx(LOGIT, rel=1e-5)


def test_the_loss_is_that_of_the_query_and_of_the_support_segmented_from_it():
    label = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    query_loss = sum(math.log1p(math.exp(-z)) for z in (LOGIT[0], -LOGIT[1], -LOGIT[2], LOGIT[3])) / 4
    # predicted foreground: (1, 0) and (1, -1), mean (1, -1/2); background: (1, 1) and (0, 1), mean (1/2, 1)
    foreground, background = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 1.0])
    pixels = SUPPORT[0, 0].flatten(1).T
    pair = [20 * F.cosine_similarity(pixels, c[None], dim=1) for c in (background, foreground)]
    truth = torch.stack((1 - MASK.flatten(), MASK.flatten()), dim=1)
    support_loss = F.cross_entropy(torch.stack(pair, dim=1), truth).item()
    loss = PANet(2).loss(SUPPORT, MASK, QUERY, label)
    assert loss.tolist() == pytest.approx([query_loss + support_loss], rel=1e-5)


def test_a_query_predicted_as_background_only_has_no_alignment_loss():
    query = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    loss = PANet(2).loss(SUPPORT, MASK, query, torch.zeros(1, 2, 2))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(LOGIT[1]))], rel=1e-4)
