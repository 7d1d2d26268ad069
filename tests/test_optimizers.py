"""Proximal steps against closed forms, a step by hand, and the toy problem whose true rank is known."""

import pytest
import torch
from torch import nn

from blosam_monai.networks.lora import GatedLoRALinear
from blosam_monai.optimizers import ProxAdamW, penalty_for, soft_threshold


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_the_soft_threshold_moves_towards_zero_and_stops_there():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.5])
    assert soft_threshold(values, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.5]


def test_one_step_by_hand():
    gate = parameter(1.0, -0.02, 0.5)
    optimizer = ProxAdamW([{"params": [gate], "lr": 0.1, "penalty": 0.3}], weight_decay=0.1)
    gate.grad = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    optimizer.step()
    # v - 0.1 grad = 0.8, 0.03, 0.5; then each 0.1 * 0.3 = 0.03 nearer to zero. No decay.
    torch.testing.assert_close(gate.data, torch.tensor([0.77, 0.0, 0.47], dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("lr", [0.5, 0.05])
def test_it_converges_to_the_lasso_in_closed_form_whatever_the_learning_rate(lr):
    # argmin of h (v - a)^2 / 2 + lambda |v| is S_{lambda / h}(a).
    a = torch.tensor([2.0, -0.4, 0.1, -3.0], dtype=torch.float64)
    h, penalty = torch.tensor([1.0, 1.0, 2.0, 0.5], dtype=torch.float64), 0.3
    gate = parameter(1.0, 1.0, 1.0, 1.0)
    optimizer = ProxAdamW([{"params": [gate], "lr": lr, "penalty": penalty}])
    for _ in range(1500):
        gate.grad = h * (gate.detach() - a)
        optimizer.step()
    expected = torch.tensor([2.0 - 0.3, -0.4 + 0.3, 0.0, -3.0 + 0.6], dtype=torch.float64)
    torch.testing.assert_close(gate.data, expected, atol=1e-10, rtol=0)


def test_other_groups_take_the_steps_of_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs, gate = parameter(1.0, -2.0), parameter(1.0, -2.0), parameter(1.0)
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    optimizer = ProxAdamW([{"params": [gate], "penalty": 0.1}, {"params": [ours]}], **settings)
    reference = torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn(2, dtype=torch.float64)
        ours.grad, theirs.grad, gate.grad = gradient.clone(), gradient.clone(), torch.ones(1, dtype=torch.float64)
        optimizer.step()
        reference.step()
    assert torch.equal(ours.data, theirs.data)


def test_gates_keep_no_state_and_their_gradient():
    gate = parameter(1.0)
    optimizer = ProxAdamW([{"params": [gate], "penalty": 0.1}])
    gate.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    assert gate.grad.item() == 1


def test_a_gate_without_gradient_is_left_alone():
    gate = parameter(1.0)
    ProxAdamW([{"params": [gate], "penalty": 0.1}]).step()
    assert gate.item() == 1


def test_a_schedule_scales_the_threshold_with_the_gates_own_learning_rate():
    gate, other = parameter(1.0), parameter(1.0)
    optimizer = ProxAdamW([{"params": [gate], "lr": 0.1, "penalty": 1.0}, {"params": [other]}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.5)
    steps = []
    for _ in range(2):
        before = gate.item()
        gate.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        steps.append(before - gate.item())
    assert steps == pytest.approx([0.1, 0.05])


def test_the_penalty_survives_saving_and_loading():
    gate = parameter(1.0)
    state = ProxAdamW([{"params": [gate], "lr": 0.2, "penalty": 0.7}]).state_dict()
    optimizer = ProxAdamW([{"params": [gate], "penalty": 0.0}])
    optimizer.load_state_dict(state)
    gate.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    assert gate.item() == pytest.approx(1 - 0.2 * 0.7)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    gate, other = parameter(1.0), parameter(3.0)
    optimizer = ProxAdamW([{"params": [gate], "lr": 0.1, "penalty": 0.0}, {"params": [other], "lr": 0.0}])

    def closure():
        optimizer.zero_grad()
        loss = (gate * other).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert gate.item() == pytest.approx(1 - 0.1 * 3)


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match=r"penalty: -0.1 must be 0 or more"):
        ProxAdamW([{"params": [parameter(1.0)], "penalty": -0.1}])


def test_the_penalty_of_fsefts_five_shots_is_the_notes():
    assert penalty_for(1000, 1e-2) == pytest.approx(0.3)  # T rho lambda = 3


@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-2), (10, 0.0)])
def test_a_penalty_for_no_training_is_refused(steps, lr):
    with pytest.raises(ValueError, match="train no gates"):
        penalty_for(steps, lr)


# --- the toy: a linear map 64 -> 48 of known rank, 40 examples, 32 gates


def gates_left(true_rank: int, penalty: float, *, lr: float, gate_lr: float = 0.05) -> int:
    """Effective rank after 3,000 steps on examples of a random linear map of ``true_rank``."""
    torch.manual_seed(0)
    x = torch.randn(40, 64)
    y = x @ (torch.randn(48, true_rank) @ torch.randn(true_rank, 64) / 8).T + 0.05 * torch.randn(40, 48)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    nn.init.zeros_(linear.weight)
    layer = GatedLoRALinear(linear, 32)
    factors = {"params": [layer.lora_a, layer.lora_b]}
    gates = {"params": [layer.gate], "lr": gate_lr, "penalty": penalty}
    optimizer = ProxAdamW([factors, gates], lr=lr, weight_decay=0.0)
    for _ in range(3000):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
    return layer.effective_rank()


@pytest.mark.parametrize("true_rank", [2, 6])
@pytest.mark.parametrize("penalty", [0.1, 0.2])
def test_about_the_true_rank_is_left_of_32_gates(true_rank, penalty):
    assert true_rank <= gates_left(true_rank, penalty, lr=1e-2) <= true_rank + 2


def test_with_the_posters_threshold_all_gates_stay_open():
    eta, rho, penalty = 1e-3, 0.05, 0.2
    assert gates_left(2, penalty, lr=eta, gate_lr=rho) <= 4
    assert gates_left(2, eta * penalty / rho, lr=eta, gate_lr=rho) == 32  # rho x (eta lambda / rho) = eta lambda
