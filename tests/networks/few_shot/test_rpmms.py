"""RPMMs: the mixture against hand-worked cases and the law of EM, and a decoder that learns."""

import pytest
import torch

from blosam_monai.networks.few_shot import RPMMs
from blosam_monai.networks.few_shot.rpmms import class_probability, mixture_means


def test_one_component_is_the_direction_of_the_weighted_mean():
    pixels = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]]])  # directions (1, 0), (0, 1), (1, 0)
    weights = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 1.0, 0.5]]])
    means = mixture_means(pixels, weights, 1)
    torch.testing.assert_close(means[0, :, 0], torch.tensor([[0.0, 1.0], [1.5 / 3.25**0.5, 1 / 3.25**0.5]]))


def test_two_groups_far_apart_have_each_its_component():
    pixels = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, -1.0], [-0.6, -0.8]]])
    weights = torch.tensor([[[0.0] * 4, [1.0, 0.5, 1.0, 1.0]]])
    means = mixture_means(pixels, weights, 2)[0, 1]
    expected = torch.tensor([[-0.6, -1.8], [1.4, 0.3]])  # the groups' weighted sums
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(means[means[:, 0].argsort()], expected)  # responsibilities are off by 1e-11


def test_no_iteration_lowers_the_likelihood():
    torch.manual_seed(0)
    pixels = torch.nn.functional.normalize(torch.randn(1, 60, 3, dtype=torch.float64), dim=-1)
    weights = torch.rand(1, 2, 60, dtype=torch.float64)

    def likelihood(iterations):
        means = mixture_means(pixels, weights, 3, iterations=iterations)[0]  # (2, 3, C)
        density = (20 * pixels[0] @ means.mT).logsumexp(-1)  # (2, N), but for constants
        return (weights[0] * density).sum(-1)

    steps = torch.stack([likelihood(i) for i in range(1, 11)])
    assert (steps.diff(dim=0) > 0).all()


def test_a_class_without_a_pixel_has_zero_directions():
    means = mixture_means(torch.rand(1, 5, 3), torch.stack((torch.ones(1, 5), torch.zeros(1, 5)), 1), 3)
    assert means[0, 1].abs().max() == 0


def test_probabilities_are_a_softmax_over_all_components_added_by_class():
    query = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    means = torch.tensor([[[[0.0, 1.0], [0.0, -1.0]], [[0.6, 0.8], [0.0, 1.0]]]])  # cosines 0, 0 and 0.6, 0
    background, foreground = class_probability(query, means).flatten().tolist()
    e = torch.e**12.0
    assert (background, foreground) == pytest.approx((2 / (3 + e), (1 + e) / (3 + e)), rel=1e-4)


@pytest.mark.parametrize(("channels", "count"), [(128, 2_465_793), (256, 2_498_561), (1024, 2_695_169)])
def test_parameters_are_as_counted_by_hand(channels, count):
    assert sum(p.numel() for p in RPMMs(channels).parameters()) == count


def test_a_later_stage_reads_the_segmentation_of_the_one_before():
    torch.manual_seed(0)
    support, mask, query = torch.randn(1, 1, 4, 6, 6), (torch.rand(1, 1, 6, 6) > 0.5).float(), torch.randn(1, 4, 6, 6)
    first, second = RPMMs(4, width=8, components=(2, 2)).stages(support, mask, query)  # all else is the same
    assert not torch.allclose(first, second)


def test_an_episode_is_learned_by_heart():
    torch.manual_seed(0)
    head = RPMMs(4, width=8)
    support, mask, query = torch.randn(1, 1, 4, 8, 8), (torch.rand(1, 1, 8, 8) > 0.5).float(), torch.randn(1, 4, 8, 8)
    label = (query[:, 0] > 0).float()
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        head.loss(support, mask, query, label).sum().backward()
        optimiser.step()
    assert ((head(support, mask, query) > 0) == label.bool()).float().mean() > 0.95


def test_no_stage_is_refused():
    with pytest.raises(ValueError, match=r"components: \[\] must be"):
        RPMMs(4, components=())
