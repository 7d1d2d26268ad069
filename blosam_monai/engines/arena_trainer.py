"""The trainer of adapted networks: MONAI's, with ARENA's second step and AdaLoRA's bookkeeping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from blosam_monai.networks.lora import gate_parameters
from blosam_monai.networks.peft import Adaptation
from blosam_monai.optimizers import ProxAdamW, penalty_for

logger = logging.getLogger(__name__)


class GateSteps:
    """The proximal steps on the gates of one training: at first gradients are only watched, then gates are closed.

    A penalty means something only beside the gradients it has to outweigh, and those of a Dice loss in a deep network
    are of the order of 1e-4: a penalty of 0.3, which suits a toy, closes every gate. So the penalty lambda is the
    largest gradient ``|dL/dv|`` of any gate during the warm-up, and the learning rate rho such that an unused gate
    closes after a third of the remaining steps: steps x mean rho x lambda = 3.

    Args:
        gates: at one, see ``GatedLoRALinear``.
        steps: optimiser steps of the whole training.
        warm_up: of these, steps at the start in which the gates stay at one.
        penalty: lambda; None: as above.
        lr: rho at the start, falling to zero by a cosine; None: as above.

    Raises:
        ValueError: no step is left after the warm-up.
    """

    def __init__(
        self,
        gates: Sequence[Any],
        *,
        steps: int,
        warm_up: int,
        penalty: float | None = None,
        lr: float | None = None,
    ) -> None:
        if not 0 < warm_up < steps:
            raise ValueError(
                f"max_epochs: {steps} steps, {warm_up} of them to warm up, leave none for the gates; add some."
            )
        self.gates, self.penalty, self.lr = list(gates), penalty, lr
        self.steps, self.warm_up = steps, warm_up
        self._largest, self._watched = 0.0, 0
        self._optimizer: ProxAdamW | None = None

    def step(self) -> None:
        """One step from the gradients that the gates hold; as long as all of these are zero, the warm-up goes on."""
        if self._optimizer is None:
            self._largest = max(self._largest, *(float(gate.grad.abs().max()) for gate in self.gates))
            self._watched += 1
            if self._watched > self.warm_up and self._largest > 0:
                self._begin()
        if self._optimizer is not None:
            self._optimizer.step()
            self._scheduler.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for gate in self.gates:
            gate.grad = None

    def _begin(self) -> None:
        left = self.steps - self._watched + 1
        if self.penalty is None:
            self.penalty = self._largest
        if self.lr is None:
            self.lr = 2 * penalty_for(left, self.penalty)  # steps x rate x penalty = 3; twice: a cosine's mean is half
        logger.info("gates: penalty %.3g, learning rate %.3g", self.penalty, self.lr)
        self._optimizer = ProxAdamW([{"params": self.gates, "penalty": self.penalty}], lr=self.lr)
        self._scheduler = CosineAnnealingLR(self._optimizer, left)


class ArenaTrainer(SupervisedTrainer):
    """Trains what an adaptation lets train; the gates, if any, by proximal steps of their own after every step.

    One iteration is a block descent: (1) AdamW on low-rank factors, head and whatever else trains; (2) a proximal step
    on the gates, see ``GateSteps``; the first epoch is their warm-up. With ``alternate`` the gates' gradient is taken
    anew at the factors that (1) has just made, as ARENA's algorithm says; without, that of the first pass is used: half
    the time, and both steps then start at the same point.

    Args:
        device, max_epochs, train_data_loader, network, inferer, train_handlers: see MONAI's ``SupervisedTrainer``.
        optimizer: of everything but the gates.
        loss_function: (pred, label) -> loss; the adaptation's penalty is added.
        adaptation: the network's, see ``networks.peft``.
        gate_penalty, gate_lr: see ``GateSteps``.
        alternate: see above.

    Source: Baklouti et al. 2025 (ARENA), with the threshold that ``blosam_monai.optimizers`` argues for.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        *,
        adaptation: Adaptation,
        gate_penalty: float | None = None,
        gate_lr: float | None = None,
        alternate: bool = True,
        inferer: Any = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            device=torch.device(device),
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=lambda pred, label: loss_function(pred, label) + adaptation.penalty(),
            inferer=inferer,
            train_handlers=train_handlers,
        )
        self.adaptation, self.alternate = adaptation, alternate
        gates = gate_parameters(network)
        epoch = self.state.epoch_length
        self.gates = (
            GateSteps(gates, steps=max_epochs * epoch, warm_up=epoch, penalty=gate_penalty, lr=gate_lr)
            if gates
            else None
        )

    def gate_settings(self) -> dict[str, float | None]:
        """What the gates were trained with, to be reported; empty without gates."""
        return {} if self.gates is None else {"gate_penalty": self.gates.penalty, "gate_lr": self.gates.lr}

    def _iteration(self, engine: Engine, batchdata: Any) -> Any:
        output = super()._iteration(engine, batchdata)
        self.adaptation.update(engine.state.iteration)
        if self.gates is not None:
            if self.alternate:
                self.gates.zero_grad()
                image, label = self.prepare_batch(batchdata, engine.state.device, self.non_blocking)
                loss = self.loss_function(self.inferer(image, self.network), label).mean()
                loss.backward(inputs=self.gates.gates)
            self.gates.step()
            self.gates.zero_grad()
        return output
