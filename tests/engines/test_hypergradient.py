"""The slope of the upper loss along phi, against brute force, closed forms and the published equation."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from blosam_monai.engines.hypergradient import (
    METHODS,
    LowerStep,
    adamw_jacobian,
    exact,
    finite_difference,
    first_order,
    task_norm,
)
from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.networks.prompt_decoder import PromptDecoder

LOSS = TaskDiceCELoss()
LR = 5e-3


class Problem:
    """SAM's mask decoder in float64 with its AdamW and one batch of D1 and of D2."""

    def __init__(self, sam, *, seeds=(0, 1), batches=None):
        self.network = PromptDecoder(sam, tasks=len(seeds), seed=seeds).double()
        self.lower, self.upper = make_batches() if batches is None else batches
        self.optimizer = torch.optim.AdamW(self.theta, lr=LR, weight_decay=0.1)
        self.upper_optimizer = torch.optim.AdamW(self.phi, lr=LR, weight_decay=0.1)

    theta = property(lambda self: self.network.lower_parameters())
    phi = property(lambda self: self.network.upper_parameters())

    def lower_loss(self) -> torch.Tensor:
        return LOSS(self.network(self.lower[0]), self.lower[1])

    def upper_loss(self) -> torch.Tensor:
        return LOSS(self.network(self.upper[0]), self.upper[1])

    def train(self, steps: int) -> "Problem":
        """Steps of both levels, so that no moment, weight or prompt is special."""
        for _ in range(steps):
            descend(self.optimizer, self.lower_loss(), self.theta)
            descend(self.upper_optimizer, self.upper_loss(), self.phi)
        return self

    def commit(self, **options: float) -> LowerStep:
        """The lower step, keeping the graph of its gradient; options of ``adamw_jacobian``."""
        name_of = {id(p): name for name, p in self.network.named_parameters()}
        before = [p.detach().clone().requires_grad_() for p in self.theta]
        values = {name_of[id(p)]: value for p, value in zip(self.theta, before, strict=True)}
        loss = LOSS(functional_call(self.network, values, (self.lower[0],)), self.lower[1])
        gradient = descend(self.optimizer, loss, before, create_graph=True)
        jacobian = adamw_jacobian(self.optimizer, self.theta, **options)
        return LowerStep(self.lower_loss, self.theta, before, gradient, jacobian)


def descend(optimizer, loss, variables, *, create_graph=False) -> tuple[torch.Tensor, ...]:
    """A step of an optimizer along the gradient by ``variables``, which stand for its parameters."""
    gradient = torch.autograd.grad(loss.sum(), variables, create_graph=create_graph)
    for p, g in zip(optimizer.param_groups[0]["params"], gradient, strict=True):
        p.grad = g.detach()
    optimizer.step()
    return gradient


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch of D1 and one of D2: embedding (1, 256, 4, 4) and label (1, 2, 16, 16), a disc for each task."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    batches = []
    for shift in (0.0, 3.0):
        label = torch.stack([((y - 5 - shift) ** 2 + (x - 4 - 2 * t) ** 2 < 16).double() for t in range(2)])
        batches.append((torch.randn(1, 256, 4, 4, generator=generator, dtype=torch.float64), label[None]))
    return batches


class SmoothMLP(nn.Module):
    """SAM's hyper-network with a smooth activation in place of its ReLU."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.layers = mlp.layers

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


def make_smooth(network: PromptDecoder) -> None:
    for layer in network.template.transformer.layers:
        layer.mlp.act = nn.GELU()
    network.template.hypernetworks = nn.ModuleList(SmoothMLP(mlp) for mlp in network.template.hypernetworks)


@pytest.fixture(scope="module")
def trained(small_sam) -> Problem:
    """Two tasks after six steps. Shared: tests work on a copy."""
    return Problem(small_sam).train(6)


@pytest.fixture
def problem(trained) -> Problem:
    return copy.deepcopy(trained)


def directions_of(phi, *, count: int = 3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    raw = [[torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in phi] for _ in range(count)]
    return [[d / task_norm(one).view(-1, *[1] * (d.ndim - 1)) for d in one] for one in raw]


def loss_after_real_step(problem: Problem, direction, length: float) -> torch.Tensor:
    """F(phi + length direction): the upper loss (T,) after a step of the real AdamW, all on copies."""
    moved = copy.deepcopy(problem)
    with torch.no_grad():
        for p, d in zip(moved.phi, direction, strict=True):
            p.add_(d, alpha=length)
    descend(moved.optimizer, moved.lower_loss(), moved.theta)
    return moved.upper_loss().detach()


@pytest.fixture(scope="module")
def brute_force(trained) -> torch.Tensor:
    """Slopes of F of each task along random directions (n, T): central differences of fourth order."""

    def central(direction, h: float) -> torch.Tensor:
        above, below = (loss_after_real_step(trained, direction, sign * h) for sign in (1, -1))
        return (above - below) / (2 * h)

    h = 1e-5
    return torch.stack([(4 * central(d, h / 2) - central(d, h)) / 3 for d in directions_of(trained.phi)])


def slopes_of(gradient) -> torch.Tensor:
    """The slope of each task along the same directions (n, T)."""
    return torch.stack(
        [sum((g * d).flatten(1).sum(1) for g, d in zip(gradient, one, strict=True)) for one in directions_of(gradient)]
    )


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_exact_is_the_slope_of_the_upper_loss_through_a_real_adamw_step(problem, brute_force):
    step = problem.commit(floor=0.0)  # the floor is no part of AdamW: see below
    found = slopes_of(exact(problem.upper_loss, problem.phi, step).gradient)
    assert relative_error(found, brute_force) <= 1e-6


def test_first_order_misses_what_goes_through_the_lower_step(problem, brute_force):
    found = slopes_of(first_order(problem.upper_loss, problem.phi, problem.commit()).gradient)
    assert relative_error(found, brute_force) > 0.1  # else the test above would find nothing


def test_the_floor_under_the_second_moments_moves_that_slope_by_less_than_a_hundredth(problem, brute_force):
    found = slopes_of(exact(problem.upper_loss, problem.phi, problem.commit()).gradient)
    assert relative_error(found, brute_force) <= 1e-2


def test_equation_9_as_printed_is_not_the_slope(problem, brute_force):
    step = problem.commit()
    v = torch.autograd.grad(problem.upper_loss().sum(), problem.theta)
    eps = 1e-4 / flat(v).norm()
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, old, d in zip(step.theta, step.before, v, strict=True):
                p.copy_(old + sign * eps * d)
        slopes.append(torch.autograd.grad(problem.lower_loss().sum(), problem.phi))
    printed = [(above - below) / (2 * eps) for above, below in zip(*slopes, strict=True)]
    assert relative_error(slopes_of(printed), brute_force) > 0.5


def test_finite_differences_converge_to_exact_with_the_square_of_the_radius(problem):
    make_smooth(problem.network)
    step = problem.commit()
    truth = flat(exact(problem.upper_loss, problem.phi, step).gradient)
    radii = np.array([3e-2, 1e-2, 3e-3, 1e-3])
    errors = [
        relative_error(flat(finite_difference(problem.upper_loss, problem.phi, step, radius=r).gradient), truth)
        for r in radii
    ]
    slope = np.polyfit(np.log(radii), np.log(errors), 1)[0]
    assert 1.8 <= slope <= 2.2


def test_finite_differences_of_the_default_radius_are_near_exact_on_the_relus_of_sam(problem):
    step = problem.commit()
    truth = flat(exact(problem.upper_loss, problem.phi, step).gradient)
    found = flat(finite_difference(problem.upper_loss, problem.phi, step).gradient)
    assert relative_error(found, truth) <= 1e-6  # no kink lies within the radius, and float64 hardly rounds


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_first_order_is_every_method_with_a_step_of_length_zero(problem, method):
    problem.optimizer.param_groups[0]["lr"] = 0.0
    step = problem.commit()
    found = METHODS[method](problem.upper_loss, problem.phi, step).gradient
    truth = torch.autograd.grad(problem.upper_loss().sum(), problem.phi)
    torch.testing.assert_close(found, list(truth), rtol=0, atol=0)


@pytest.mark.parametrize(
    "method",
    [first_order, exact, partial(finite_difference, radius=1e-2)],  # rounding grows with 1 / radius
    ids=METHODS,
)
def test_two_tasks_together_have_the_hypergradients_of_each_alone(small_sam, problem, method):
    together = method(problem.upper_loss, problem.phi, problem.commit()).gradient
    for t in range(2):
        batches = [(embedding, label[:, t : t + 1]) for embedding, label in make_batches()]
        alone = Problem(small_sam, seeds=[t], batches=batches).train(6)
        found = method(alone.upper_loss, alone.phi, alone.commit()).gradient
        assert relative_error(flat(p[t] for p in together), flat(found)) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_upper_loss_is_reported_task_by_task_at_the_new_theta(problem, method):
    step = problem.commit()
    found = METHODS[method](problem.upper_loss, problem.phi, step).upper_loss
    torch.testing.assert_close(found, problem.upper_loss().detach(), rtol=0, atol=0)


def test_finite_differences_restore_theta_to_the_bit(problem):
    step = problem.commit()
    after = [p.detach().clone() for p in problem.theta]
    finite_difference(problem.upper_loss, problem.phi, step)
    assert all(torch.equal(p, value) for p, value in zip(problem.theta, after, strict=True))


def test_finite_differences_restore_theta_to_the_bit_when_the_loss_raises(problem):
    step = problem.commit()
    after = [p.detach().clone() for p in problem.theta]

    def failing_loss():
        assert not torch.equal(problem.theta[0], after[0])  # theta stands displaced at this moment
        raise ArithmeticError("no loss today")

    step.loss = failing_loss
    with pytest.raises(ArithmeticError, match="no loss today"):
        finite_difference(problem.upper_loss, problem.phi, step)
    assert all(torch.equal(p, value) for p, value in zip(problem.theta, after, strict=True))


class Quadratic:
    """L1 = |A theta - B phi|^2 / 2, L2 = |theta - y|^2 / 2 + phi C phi / 2, theta+ = theta - step dL1; two tasks.

    By hand: dL1/dtheta = A'(A theta - B phi), so dtheta+/dphi = step A'B, and
    dL2/dphi = C phi + step B'A (theta+ - y).
    """

    def __init__(self, steps=(0.1, 0.3)) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

        self.A, self.B, self.y, self.C = normal(5, 4), normal(5, 3), normal(4, 1), torch.ones(2, 3, 1).double()
        self.phi, self.theta = normal(3, 1).requires_grad_(), normal(4, 1).requires_grad_()
        self.before = self.theta.detach().clone().requires_grad_()
        self.steps = torch.tensor(steps, dtype=torch.float64).view(2, 1, 1)
        (gradient,) = torch.autograd.grad(self.lower_loss(self.before).sum(), self.before, create_graph=True)
        with torch.no_grad():
            self.theta -= self.steps * gradient
        jacobian = -self.steps.expand_as(self.theta)
        self.step = LowerStep(lambda: self.lower_loss(self.theta), [self.theta], [self.before], [gradient], [jacobian])

    def lower_loss(self, theta):
        return (self.A @ theta - self.B @ self.phi).square().sum((1, 2)) / 2

    def upper_loss(self):
        return (self.theta - self.y).square().sum((1, 2)) / 2 + (self.C * self.phi.square()).sum((1, 2)) / 2

    def second_by_hand(self):
        return (self.steps * self.B.mT @ self.A @ (self.theta - self.y)).detach()

    def first_by_hand(self):
        return (self.C * self.phi).detach()


@pytest.mark.parametrize(("method", "tolerance"), [(exact, 1e-12), (finite_difference, 1e-9)])
def test_the_hypergradient_of_a_quadratic_is_the_one_derived_by_hand(method, tolerance):
    toy = Quadratic()
    (found,) = method(toy.upper_loss, [toy.phi], toy.step, max_ratio=math.inf).gradient
    torch.testing.assert_close(found, toy.first_by_hand() + toy.second_by_hand(), rtol=tolerance, atol=tolerance)


def test_the_first_order_term_of_a_quadratic_is_the_one_derived_by_hand():
    toy = Quadratic()
    (found,) = first_order(toy.upper_loss, [toy.phi], toy.step).gradient
    torch.testing.assert_close(found, toy.first_by_hand(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", [exact, finite_difference])
def test_a_second_order_term_that_explodes_is_shortened_in_its_own_task_only(method):
    toy = Quadratic(steps=(1e3, 0.01))
    (found,) = method(toy.upper_loss, [toy.phi], toy.step, max_ratio=2.0).gradient
    second, first = toy.second_by_hand(), toy.first_by_hand()
    expected = first + second
    assert second[1].norm() < 2 * first[1].norm()  # by construction, the second task needs no limit
    expected[0] = first[0] + second[0] * 2 * first[0].norm() / second[0].norm()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def adamw_with(gradients, *, lr=LR, weight_decay=0.1) -> tuple[torch.optim.AdamW, nn.Parameter]:
    """A parameter (T, ...) and its AdamW after steps along these gradients."""
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.randn(gradients[0].shape, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=weight_decay)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_jacobian_equals_autograd_through_a_differentiable_adamw_step(count):
    generator = torch.Generator().manual_seed(3)
    gradients = list(torch.randn(count, 2, 5, 7, generator=generator, dtype=torch.float64))
    optimizer, p = adamw_with(gradients[:-1]) if count > 1 else adamw_with([torch.zeros(2, 5, 7).double()])
    if count == 1:
        optimizer.state.clear()
    old = p.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state.get(p, {}).items()}
    m, v, t = state.get("exp_avg", 0), state.get("exp_avg_sq", 0), int(state.get("step", 0)) + 1
    g = gradients[-1].clone().requires_grad_()
    m_new, v_new = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    s = (v_new / (1 - 0.999**t)).sqrt()
    new = old * (1 - LR * 0.1) - LR * m_new / (1 - 0.9**t) / (s + 1e-8)
    (truth,) = torch.autograd.grad(new.sum(), g)  # the step is elementwise: D is diagonal

    p.grad = gradients[-1].clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), new.detach(), rtol=1e-12, atol=1e-14)  # it is AdamW
    (found,) = adamw_jacobian(optimizer, [p])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9 * LR)


def test_the_jacobian_is_bounded_at_the_first_step_where_lora_has_no_gradient_yet(small_sam):
    problem = Problem(small_sam)
    step = problem.commit()
    silent = [d for d, g in zip(step.jacobian, step.gradient, strict=True) if not g.any()]
    assert len(silent) == 14  # A of q and v of seven attentions: B starts at zero
    assert all(not d.any() for d in silent)  # the plain formula gives LR / eps = 5e5 in each element


def test_an_element_that_had_no_gradient_has_the_slope_of_the_floor():
    optimizer, p = adamw_with([torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 10.0, 10.0, 10.0]]).double()])
    (found,) = adamw_jacobian(optimizer, [p], floor=1e-4)
    rms = 0.75**0.5  # of (0, 1, 1, 1); ten times that in the second task
    expected = -LR / (1e-4 * torch.tensor([rms, 10 * rms], dtype=torch.float64) + 1e-8)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-12, atol=0)


def test_the_norm_of_a_task_runs_over_all_tensors_of_that_task_alone():
    norm = task_norm([torch.tensor([[3.0], [0.0]]), torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])])
    assert norm.tolist() == [5.0, 2.0]
