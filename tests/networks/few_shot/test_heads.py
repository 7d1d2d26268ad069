"""What every prototype head promises: shapes, episodes apart from each other, finite values on anything."""

import pytest
import torch

from blosam_monai.networks.few_shot import HEADS

SMALL = {
    "biopt": {"projection": 6},
    "panet": {"projection": 6},
    "ppnet": {"projection": 6, "parts": 3},
    "rpmms": {"width": 6},
    "ssp": {"projection": 6, "refine": True},
}


def make(name):
    torch.manual_seed(0)
    return HEADS[name](4, **SMALL[name]).double()


def episodes(side=5):
    torch.manual_seed(1)
    support, query = torch.randn(3, 2, 4, side, side).double(), torch.randn(3, 4, side, side).double()
    return support, torch.rand(3, 2, side, side).double(), query, (torch.rand(3, 4 * side, 4 * side) > 0.5).double()


@pytest.mark.parametrize("name", SMALL)
def test_an_episode_does_not_depend_on_the_others_of_its_batch(name):
    head, (support, mask, query, label) = make(name), episodes()
    logit, loss = head(support, mask, query), head.loss(support, mask, query, label)
    assert (logit.shape, loss.shape) == ((3, 5, 5), (3,))
    for e in range(3):
        one = slice(e, e + 1)
        torch.testing.assert_close(head(support[one], mask[one], query[one]), logit[one])
        torch.testing.assert_close(head.loss(support[one], mask[one], query[one], label[one]), loss[one])


@pytest.mark.parametrize("name", SMALL)
def test_the_order_of_shots_does_not_matter(name):
    head, (support, mask, query, _) = make(name), episodes()
    torch.testing.assert_close(head(support.flip(1), mask.flip(1), query), head(support, mask, query))


@pytest.mark.parametrize("case", ["no foreground", "no background", "zero query", "zero support", "one pixel"])
@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_are_finite_on(case, name):
    head = make(name).float()
    support, mask, query, label = (x.float() for x in episodes(side=1 if case == "one pixel" else 5))
    mask = mask * (case != "no foreground") if case != "no background" else torch.ones_like(mask)
    query, support = query * (case != "zero query"), (support * (case != "zero support")).requires_grad_()
    loss = head.loss(support, mask, query, label)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (support, *head.parameters()))
    assert support.grad.abs().max() < 1e4


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_gradient(name):
    head, episode = make(name), episodes()
    head.loss(*episode).sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in head.parameters())


@pytest.mark.parametrize("name", ["biopt", "panet", "ppnet", "ssp"])
def test_a_square_projection_starts_as_the_head_without(name):
    torch.manual_seed(0)
    support, mask, query, _ = episodes()
    expected = HEADS[name](4).double()(support, mask, query)
    torch.testing.assert_close(HEADS[name](4, projection=4).double()(support, mask, query), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["panet", "ppnet", "ssp"])
def test_a_head_without_projection_has_nothing_to_learn(name):
    assert not list(HEADS[name](256).parameters())
    assert sum(p.numel() for p in HEADS[name](256, projection=64).parameters()) == 256 * 64
