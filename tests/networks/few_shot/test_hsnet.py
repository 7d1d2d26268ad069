"""HSNet: its size, its 4-D convolutions against a whole kernel, its votes against the published rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.networks.features import ResNetFeatures, pack
from blosam_monai.networks.few_shot.hsnet import CenterPivotConv4d, HSNet, correlation, vote

SHAPES = [(6, 8, 8), (6, 8, 8), (5, 4, 4), (4, 2, 2)]  # four maps of three sizes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*batch: int, seed: int) -> Tensor:
    """Packed features (*batch, L) of ``SHAPES``."""
    maps = [random(*shape, seed=seed + i).expand(1, *shape) for i, shape in enumerate(SHAPES)]
    packed = pack(maps)[0]
    return packed + 0.5 * random(*batch, len(packed), seed=seed)


def episode(episodes: int, shots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed supports, their masks (a square), packed queries."""
    mask = torch.zeros(episodes, shots, 8, 8)
    mask[..., 2:6, 1:5] = 1
    return rows(episodes, shots, seed=1), mask, rows(episodes, seed=9)


def head(channels: int | None = None) -> HSNet:
    """Of a single map, or of the packed ones."""
    torch.manual_seed(0)
    return HSNet(15, shapes=SHAPES) if channels is None else HSNet(channels)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_on_resnets_pyramid_it_learns_the_published_2_574_million_parameters():
    shapes = ResNetFeatures(64, layers="pyramid").shapes
    assert round(count(HSNet(3584, shapes=shapes)) / 1e6, 3) == 2.574


def test_a_single_map_needs_fewer_weights_in_the_first_convolutions_only():
    per_map = [2 * 16 * kernel**2 for kernel in (5, 5, 3)]  # 16 channels, over the query and over the support
    dropped = sum(maps * weights for maps, weights in zip((4 - 1, 6 - 1, 3 - 1), per_map, strict=True))
    assert count(HSNet(256)) == 2_573_794 - dropped


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 4)])
def test_the_4d_convolution_is_that_of_a_whole_kernel_with_entries_at_the_two_centres_only(kernel, stride):
    torch.manual_seed(0)
    convolution = CenterPivotConv4d(2, 3, kernel=kernel, stride=stride)
    centre = kernel // 2
    whole = torch.zeros(3, 2, kernel, kernel, kernel, kernel)
    whole[:, :, :, :, centre, centre] += convolution.query.weight.detach()
    whole[:, :, centre, centre, :, :] += convolution.support.weight.detach()
    x = random(1, 2, 5, 4, 7, 6)
    padded = F.pad(x, [centre] * 8)
    expected = sum(
        torch.einsum(
            "oi,nihwyx->nohwyx", whole[:, :, a, b, c, d], padded[:, :, a : a + 5, b : b + 4, c : c + 7, d : d + 6]
        )
        for a, b, c, d in product(range(kernel), repeat=4)
    )[..., ::stride, ::stride]
    expected = expected + (convolution.query.bias + convolution.support.bias)[:, None, None, None, None]
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), expected, atol=1e-5, rtol=0)


def test_a_correlation_is_the_positive_part_of_a_cosine_with_the_masked_support():
    support, query = random(1, 2, 3, 2, 2), random(1, 3, 2, 2, seed=1)
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]])
    found = correlation(support, mask, query)
    for k, a, b, c, d in product(range(2), repeat=5):
        cosine = F.cosine_similarity(support[0, k, :, c, d], query[0, :, a, b], dim=0)
        assert float(found[0, k, a, b, c, d]) == pytest.approx(max(0, float(cosine * mask[0, k, c, d])), abs=1e-6)


def test_a_finer_mask_weighs_a_place_by_the_mean_of_its_pixels():
    support, query = torch.ones(1, 1, 2, 1, 1), torch.tensor([[[[3.0]], [[0.0]]]])
    empty, half = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert float(correlation(support, empty, query)) == 0
    assert float(correlation(support, half, query)) == pytest.approx(0.5**0.5)  # a cosine knows no length


def published_vote(logits: Tensor) -> Tensor:
    """Binary predictions added up, divided by the most votes of a place, at least 1: foreground from 0.5 on."""
    votes = sum((shot > 0).float() for shot in logits)
    return votes / max(1.0, float(votes.max())) >= 0.5


@pytest.mark.parametrize("shots", [1, 2, 3, 5])
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 1.0])
def test_the_sign_of_the_vote_is_the_published_one(shots, shift):
    logits = random(4, shots, 6, 6, seed=shots) + shift
    found = vote(logits) > 0
    assert all(torch.equal(found[e], published_vote(logits[e])) for e in range(4))


@pytest.mark.parametrize("channels", [None, 6])
def test_the_prediction_of_an_episode_has_the_grid_of_the_mask(channels):
    support, mask, query = episode(2, 3)
    if channels == 6:
        support, query = random(2, 3, 6, 8, 8), random(2, 6, 8, 8, seed=1)
    with torch.no_grad():
        assert head(channels)(support, mask, query).shape == (2, 8, 8)


@pytest.mark.parametrize("side", [1, 3, 6, 9])
def test_a_single_map_may_have_any_side(side):
    with torch.no_grad():
        found = head(6)(random(1, 1, 6, side, side), torch.ones(1, 1, side, side), random(1, 6, side, side))
    assert found.isfinite().all()


def test_three_equal_shots_predict_what_one_does():
    support, mask, query = episode(2, 1)
    network = head()
    with torch.no_grad():
        once, thrice = network(support, mask, query), network(support.repeat(1, 3, 1), mask.repeat(1, 3, 1, 1), query)
    torch.testing.assert_close(once, thrice, atol=1e-5, rtol=0)


def test_episodes_do_not_mix():
    support, mask, query = episode(2, 2)
    network = head()
    with torch.no_grad():
        torch.testing.assert_close(
            network(support, mask, query)[1:], network(support[1:], mask[1:], query[1:]), atol=1e-5, rtol=0
        )


def test_longer_features_change_nothing():
    support, mask, query = episode(1, 2)
    network = head()
    with torch.no_grad():
        torch.testing.assert_close(
            network(10 * support, mask, 0.1 * query), network(support, mask, query), atol=1e-4, rtol=0
        )


def test_the_loss_of_several_shots_is_the_mean_of_their_losses():
    support, mask, query = episode(2, 3)
    network, label = head(), (random(2, 32, 32) > 0).float()
    with torch.no_grad():
        found = network.loss(support, mask, query, label)
        each = [network.loss(support[:, k : k + 1], mask[:, k : k + 1], query, label) for k in range(3)]
    torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-6, rtol=0)


def test_every_tensor_learns_also_from_an_empty_support():
    support, mask, query = episode(1, 2)
    mask[:, 1] = 0
    network = head()
    loss = network.loss(support, mask, query, torch.ones(1, 16, 16))
    gradients = torch.autograd.grad(loss.sum(), list(network.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A thing of side 4 somewhere before a ground, each with features of its own: (N, 3, 8, 8), mask (N, 8, 8)."""
    masks = torch.zeros(count, 8, 8)
    for mask in masks:
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        mask[top : top + 4, left : left + 4] = 1
    thing, ground = torch.tensor([1.0, 0.2, 0.0]), torch.tensor([-0.2, 1.0, 0.3])
    features = masks[..., None] * thing + (1 - masks[..., None]) * ground
    return features.movedim(-1, 1), masks


def test_it_learns_to_find_in_the_query_what_the_support_shows():
    generator = torch.Generator().manual_seed(0)
    network = head(3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(50):
        (support, mask), (query, label) = scenes(4, generator), scenes(4, generator)
        loss = network.loss(support[:, None], mask[:, None], query, label).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (support, mask), (query, label) = scenes(8, generator), scenes(8, generator)
    with torch.no_grad():
        found = network(support[:, None], mask[:, None], query) > 0
    overlap = (found & (label > 0)).sum() / (found | (label > 0)).sum()
    assert overlap > 0.8


def test_maps_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="maps of 2 sizes, HSNet needs 3"):
        HSNet(4, shapes=[(4, 8, 8), (4, 4, 4)])


def test_features_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="features have 5 channels, the head was made for 6"):
        head(6)(random(1, 1, 5, 8, 8), torch.ones(1, 1, 8, 8), random(1, 5, 8, 8))
