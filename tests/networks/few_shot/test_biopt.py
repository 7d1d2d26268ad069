"""BiOpt: its inner loop against numerical differentiation, the sign of Eq. 6, and the outer gradient."""

import pytest
import torch
from torch.nn import functional as F

from blosam_monai.networks.few_shot import BiOpt, biopt
from blosam_monai.networks.few_shot.biopt import optimise
from blosam_monai.networks.few_shot.prototypes import (
    class_masks,
    cosine_logits,
    foreground_logit,
    predicted_masks,
    unit,
)

INNER = {"steps": 10, "lr": 0.1, "reduction": "mean", "first_order": False}


def inner_loss(query, prototypes, target):
    """What the inner loop lowers, from torch's own parts: (1, C, h, w), (1, 2, C), (1, h, w) of 0 and 1."""
    cosines = F.cosine_similarity(query[:, None], prototypes[..., None, None], dim=2)
    return F.cross_entropy(20 * cosines, target)


def numerical(function, x, epsilon=1e-6):
    """Central differences of a scalar function by every element of x."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[i] = epsilon
        shift = shift.view_as(x)
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * epsilon)
    return gradient


def noisy_episode(seed=0, noise=1.0, common=0.0, dtype=torch.float32):
    """Features of two directions, a common one and noise: support (1, 1, 8, 12, 12), mask, query, label."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, 8, generator=generator, dtype=dtype)
    directions += common * torch.randn(8, generator=generator, dtype=dtype)
    labels = torch.zeros(2, 12, 12, dtype=torch.long)
    labels[0, 2:9, 3:8], labels[1, 4:10, 1:9] = 1, 1
    features = directions[labels] + noise * torch.randn(2, 12, 12, 8, generator=generator, dtype=dtype)
    support, query = features.movedim(-1, 1)
    return support[None, None], labels[:1].to(dtype)[None], query[None], labels[1:].to(dtype)


def test_a_step_is_minus_the_numerical_gradient_of_the_cross_entropy():
    torch.manual_seed(0)
    query, prototypes = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    target = torch.randint(0, 2, (1, 4, 5))
    stepped = optimise(query, prototypes, class_masks(target.double()), **INNER | {"steps": 1, "lr": 1.0})
    gradient = numerical(lambda p: inner_loss(query, p, target), prototypes)
    torch.testing.assert_close(prototypes - stepped, gradient, rtol=1e-6, atol=1e-8)


def test_a_sum_over_pixels_is_a_mean_with_a_longer_step():
    torch.manual_seed(0)
    query, prototypes = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    target = class_masks(torch.randint(0, 2, (1, 4, 5)).double())
    summed = optimise(query, prototypes, target, **INNER | {"lr": 0.01, "reduction": "sum"})
    torch.testing.assert_close(summed, optimise(query, prototypes, target, **INNER | {"lr": 0.2}))  # 20 pixels


def test_the_printed_sign_of_equation_6_ruins_what_the_corrected_one_keeps():
    before, after, printed = [], [], []
    for seed in range(20):
        support, mask, query, label = noisy_episode(seed, noise=1.5, common=5.0)
        maps = BiOpt(8, train_free=True).predictions(support, mask, query)
        places = unit(query, 1)
        start = _start(support, mask, query)
        minus = predicted_masks(foreground_logit(-cosine_logits(places, start)))
        wrong = foreground_logit(cosine_logits(places, optimise(places, start, minus, **INNER)))
        for logit, scores in ((maps["P_0"], before), (maps["P_q"], after), (wrong, printed)):
            overlap = ((logit > 0) & (label > 0)).sum() / ((logit > 0) | (label > 0)).sum()
            scores.append(overlap.item())
    before, after, printed = (torch.tensor(scores).mean().item() for scores in (before, after, printed))
    assert printed < before / 2
    assert after == pytest.approx(before, abs=0.01)  # on noise as this there is little to gain


def test_every_inner_step_lowers_the_cross_entropy():
    support, mask, query, _ = noisy_episode(common=5.0)
    places, start = unit(query, 1), _start(support, mask, query)
    target = predicted_masks(foreground_logit(cosine_logits(places, start)))
    ends = [optimise(places, start, target, **INNER | {"steps": i}) for i in range(11)]
    losses = torch.stack([inner_loss(query, p, target[:, 1].long()) for p in ends])
    assert (losses.diff() < 0).all()


def _start(support, mask, query):
    """P_0 of the training-free head, written out."""
    places = unit(query, 1)[0].flatten(1).T
    pixels, share = unit(support, 2)[0, 0].flatten(1).T, mask.flatten()
    first = torch.stack([(pixels * m[:, None]).sum(0) for m in (1 - share, share)])
    chosen = (F.normalize(first, dim=1) @ places.T).argmax(0)
    own = torch.stack([places[chosen == c].sum(0) for c in (0, 1)])
    return (F.normalize(first, dim=1) + F.normalize(own, dim=1))[None] / 2


def test_the_mixture_before_training_is_half_of_each():
    support, mask, query, _ = noisy_episode()
    expected = foreground_logit(cosine_logits(query, _start(support, mask, query)))
    torch.testing.assert_close(BiOpt(8).predictions(support, mask, query)["P_0"], expected)


def test_a_class_that_the_query_lacks_keeps_its_support_prototype():
    support = torch.tensor([[[[[1.0, 0.0]], [[0.0, 1.0]]]]])  # foreground (1, 0), background (0, 1)
    query = torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)  # all foreground
    own = BiOpt(2).predictions(support, torch.tensor([[[[1.0, 0.0]]]]), query)["P'"]
    assert own.flatten().tolist() == pytest.approx([20 * (1 - 1 / 5**0.5)] * 2)


def trained_head(first_order):
    """A head whose weight generator is not zero, in float64, and an episode."""
    torch.manual_seed(0)
    head = BiOpt(8, first_order=first_order, inner_lr=0.5).double()
    torch.nn.init.normal_(head.weight_generator.weight)
    return head, noisy_episode(dtype=torch.float64)


def gradients(head, episode):
    """Gradient of the loss by the weight generator's bias: of the backward pass, and by central differences."""
    bias = head.weight_generator.bias
    (gradient,) = torch.autograd.grad(head.loss(*episode).sum(), bias)

    @torch.no_grad()
    def loss(value):
        bias.copy_(value)
        return head.loss(*episode).sum()

    return gradient, numerical(loss, bias.detach().clone())


def test_the_outer_gradient_goes_through_the_inner_loop():
    gradient, expected = gradients(*trained_head(first_order=False))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_the_first_order_gradient_takes_the_inner_steps_as_constants(monkeypatch):
    head, episode = trained_head(first_order=True)
    gradient, through_the_steps = gradients(head, episode)
    assert (gradient - through_the_steps).norm() > 0.01 * gradient.norm()
    steps = {}

    def constant(query, prototypes, target, **_):
        steps.setdefault("taken", (optimise(query, prototypes, target, **INNER | {"lr": 0.5}) - prototypes).detach())
        return prototypes + steps["taken"]

    monkeypatch.setattr(biopt, "optimise", constant)
    head, episode = trained_head(first_order=True)
    _, expected = gradients(head, episode)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_the_loss_adds_three_cross_entropies_of_interpolated_logits():
    support, mask, query, label = noisy_episode()
    label = label.repeat_interleave(2, 1).repeat_interleave(2, 2)
    head = BiOpt(8)
    maps, expected = head.predictions(support, mask, query), 0.0
    for name in ("P_s", "P_0", "P_q"):
        large = F.interpolate(maps[name][:, None], (24, 24), mode="bilinear", align_corners=False)[:, 0]
        expected += F.binary_cross_entropy_with_logits(large, label)
    assert head.loss(support, mask, query, label).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_inner_loop_runs_in_evaluation(mode):
    support, mask, query, _ = noisy_episode()
    head = BiOpt(8)
    expected = head(support, mask, query).detach()
    with mode():
        torch.testing.assert_close(head(support, mask, query), expected)
        assert not torch.equal(head.predictions(support, mask, query)["P_0"], expected)


def test_normalised_features_make_the_scale_of_features_irrelevant():
    support, mask, query, _ = noisy_episode()
    expected = BiOpt(8)(support, mask, query)
    torch.testing.assert_close(BiOpt(8)(100 * support, mask, 100 * query), expected)


def test_without_normalising_the_step_shrinks_with_the_square_of_the_scale():
    support, mask, query, _ = noisy_episode(dtype=torch.float64)

    def moved(scale):
        maps = (
            BiOpt(8, normalise=False, steps=1, inner_lr=1e-3).double().predictions(scale * support, mask, scale * query)
        )
        return (maps["P_q"] - maps["P_0"]).norm().item()

    assert moved(1) / moved(10) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(("channels", "count"), [(128, 32_896), (256, 131_328), (1024, 2_098_176)])
def test_the_weight_generator_is_all_that_learns(channels, count):
    assert sum(p.numel() for p in BiOpt(channels).parameters()) == count  # 2 C^2 + C
    assert not list(BiOpt(channels, train_free=True).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_reduction": "median"}, "inner_reduction: 'median' is not one of mean, sum"),
        ({"train_free": True, "first_order": True}, "train_free: set with first_order"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BiOpt(8, **options)
