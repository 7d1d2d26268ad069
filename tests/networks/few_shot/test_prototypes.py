"""What the heads share: pooling, cosines, starting points, the loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from blosam_monai.networks.few_shot import prototypes as p


def test_a_masked_average_weighs_places_by_the_mask():
    features = torch.tensor([[[3.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 4.0]]])  # (2, 2, 2)
    mask = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    means = p.masked_average(features, p.class_masks(mask))
    torch.testing.assert_close(means, torch.tensor([[0.2, 2.4], [7 / 3, 0.0]]))  # by hand


def test_an_empty_mask_has_the_zero_vector_and_no_gradient():
    features = torch.rand(1, 3, 2, 2, requires_grad=True)
    mean = p.masked_average(features, torch.zeros(1, 1, 2, 2))
    assert mean.tolist() == [[[0.0, 0.0, 0.0]]]
    p.cosine_logits(features.detach(), mean).sum().backward()
    assert features.grad.abs().max() == 0


def test_shots_count_alike_whatever_their_area():
    support = torch.zeros(1, 2, 2, 1, 4)
    support[0, 0, 0], support[0, 1, 1] = 1.0, 1.0  # first shot (1, 0) everywhere, second (0, 1)
    mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 0.0]]]])
    assert p.class_prototypes(support, mask).tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


def test_a_shot_without_the_class_does_not_count_for_it():
    support = torch.zeros(1, 2, 2, 1, 2)
    support[0, 0, 0], support[0, 1, 1] = 1.0, 1.0
    mask = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    assert p.class_prototypes(support, mask).tolist() == [[[0.5, 0.5], [1.0, 0.0]]]


def test_cosine_logits_are_alpha_times_torchs_cosine():
    torch.manual_seed(0)
    query, prototypes = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 5)
    logits = p.cosine_logits(query, prototypes, alpha=20)
    for i in range(3):
        expected = 20 * F.cosine_similarity(query, prototypes[:, i, :, None, None], dim=1)
        torch.testing.assert_close(logits[:, i], expected)


def test_a_zero_vector_has_length_zero_and_gradient_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    p.unit(x, -1).sum().backward()
    assert x.grad.abs().max() == 0


def test_the_loss_is_the_two_class_cross_entropy_of_interpolated_logits():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 2, 4, 4), torch.randint(0, 2, (2, 8, 8))
    large = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, label, reduction="none").mean((1, 2))
    torch.testing.assert_close(p.upsampled_cross_entropy(p.foreground_logit(logits), label), expected)


def test_a_label_of_another_number_of_episodes_is_refused():
    with pytest.raises(ValueError, match="label: 1 episodes, the logits have 2"):
        p.upsampled_cross_entropy(torch.zeros(2, 4, 4), torch.zeros(1, 4, 4))


def test_farthest_points_of_a_line_are_its_ends_and_then_the_widest_gap():
    pixels = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [99.0]]])
    weights = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]]])
    points = p.farthest_points(pixels, weights, 3)
    assert points[0, 1, :, 0].tolist() == [10, 0, 2]  # mean 3.25: 10 is farthest; then 0; then 2, 4 from 0 squared
    assert points[0, 0, :, 0].tolist() == [99, 99, 99]  # one pixel: it repeats


def test_a_square_projection_starts_without_changing_a_cosine():
    torch.manual_seed(0)
    head, features = p.PrototypeHead(8, projection=8), torch.randn(1, 2, 8, 3, 3)
    assert not torch.allclose(head.project(features), features)
    a, b = features.flatten(3)[0, 0].T, head.project(features).flatten(3)[0, 0].T
    torch.testing.assert_close(
        F.cosine_similarity(b[:, None], b[None], dim=2), F.cosine_similarity(a[:, None], a[None], dim=2)
    )


def test_features_of_other_channels_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="features have 4 channels, the head was made for 8"):
        p.PrototypeHead(8).project(torch.zeros(1, 4, 2, 2))


def test_a_projection_to_nothing_is_refused():
    with pytest.raises(ValueError, match="projection: 0 must be at least 1"):
        p.PrototypeHead(8, projection=0)


def test_a_prototype_of_another_length_scores_the_same():
    query = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1)
    logits = p.cosine_logits(query, torch.tensor([[[5.0, 0.0], [0.0, 0.1]]]))
    assert logits.flatten().tolist() == pytest.approx([20 / math.sqrt(2)] * 2)
