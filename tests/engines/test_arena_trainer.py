"""ARENA's iteration against its steps written out, on a network of one gated layer."""

import pytest
import torch
from monai.data import DataLoader, Dataset
from torch import nn

from blosam_monai.engines.arena_trainer import ArenaTrainer, GateSteps
from blosam_monai.networks.lora import gate_parameters, lora_parameters
from blosam_monai.networks.peft import adapt


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6)
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.qkv(x)))


def prepared(method="arena"):
    torch.manual_seed(0)
    network = Network()
    adaptation = adapt(network, method, head=("out.",), rank=3)
    nn.init.normal_(lora_parameters(network)[1])  # B: from zero the gates have no gradient
    return network, adaptation


def trainer_of(network, adaptation, **options):
    generator = torch.Generator().manual_seed(1)
    items = [{"image": torch.randn(5, 4, generator=generator), "label": torch.randn(5, 1, generator=generator)}] * 2
    gates = {id(gate) for gate in gate_parameters(network)}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in gates]
    return ArenaTrainer(
        "cpu",
        2,
        DataLoader(Dataset(items), batch_size=1),
        network,
        torch.optim.SGD(others, lr=0.1),
        nn.functional.mse_loss,
        adaptation=adaptation,
        **options,
    ), (items[0]["image"][None], items[0]["label"][None])


@pytest.mark.parametrize("alternate", [True, False])
def test_an_iteration_is_a_step_of_the_factors_and_a_proximal_step_of_the_gates(alternate):
    network, adaptation = prepared()
    trainer, (x, y) = trainer_of(network, adaptation, alternate=alternate, gate_penalty=0.05, gate_lr=0.2)
    trainer.run()
    network, _ = prepared()
    gate, factors = gate_parameters(network)[0], lora_parameters(network)
    others = [*factors, network.out.weight, network.out.bias]
    for step in range(4):
        first = torch.autograd.grad(nn.functional.mse_loss(network(x), y), [*others, gate])
        with torch.no_grad():
            for p, g in zip(others, first, strict=False):
                p -= 0.1 * g
        gradient = torch.autograd.grad(nn.functional.mse_loss(network(x), y), gate)[0] if alternate else first[-1]
        if step >= 2:  # after the first epoch of two; the cosine's two rates are 0.2 and 0.1
            rate = 0.2 if step == 2 else 0.1
            with torch.no_grad():
                moved = gate - rate * gradient
                gate.copy_(moved.sign() * (moved.abs() - rate * 0.05).clamp(min=0))
    torch.testing.assert_close(gate_parameters(trainer.network)[0], gate)
    torch.testing.assert_close(lora_parameters(trainer.network)[0], factors[0])


def test_gates_stay_at_one_for_the_first_epoch():
    network, adaptation = prepared()
    trainer, _ = trainer_of(network, adaptation)
    trainer.state.max_epochs = 1
    trainer.run()
    assert gate_parameters(network)[0].tolist() == [1, 1, 1]


def test_the_penalty_is_the_largest_gradient_of_the_warm_up_and_the_rate_follows_from_it():
    gate = nn.Parameter(torch.ones(2))
    gates = GateSteps([gate], steps=12, warm_up=2)
    for gradient in ([0.5, -2.0], [1.0, 0.0], [0.0, 0.0]):
        gate.grad = torch.tensor(gradient)
        gates.step()
    assert gates.penalty == 2.0
    assert gates.lr == pytest.approx(2 * 3 / (10 * 2.0))


def test_a_gate_without_gradient_closes_after_about_a_third_of_the_steps():
    gate = nn.Parameter(torch.ones(1))
    gates = GateSteps([gate], steps=310, warm_up=10)
    closed = None
    for step in range(310):
        gate.grad = torch.full((1,), 0.7 if step < 10 else 0.0)
        gates.step()
        if closed is None and gate.item() == 0:
            closed = step - 10
    # The cosine's first steps are twice its mean: of 3 units the first is used up after 300 / 6 to 300 / 3 steps.
    assert 50 <= closed <= 100


def test_gates_wait_until_one_of_them_has_a_gradient():
    gate = nn.Parameter(torch.ones(1))
    gates = GateSteps([gate], steps=6, warm_up=1)
    for gradient in (0.0, 0.0, 4.0):  # the last is the first of four steps that are left
        assert gate.item() == 1
        gate.grad = torch.tensor([gradient])
        gates.step()
    assert (gates.penalty, gates.lr) == (4.0, 2 * 3 / (4 * 4.0))
    assert gate.item() == 0  # 1 - 0.375 x 4, then 1.5 nearer to zero


def test_a_training_of_one_epoch_leaves_no_step_for_the_gates():
    with pytest.raises(ValueError, match="leave none for the gates"):
        GateSteps([nn.Parameter(torch.ones(1))], steps=5, warm_up=5)


def test_methods_without_gates_train_as_with_monais_trainer():
    network, adaptation = prepared("lora")
    trainer, (x, y) = trainer_of(network, adaptation)
    assert trainer.gate_settings() == {}
    trainer.run()
    network, _ = prepared("lora")
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(trainer.network.out.weight, network.out.weight)
