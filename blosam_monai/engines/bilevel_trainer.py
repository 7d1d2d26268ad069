"""The bilevel trainer: one lower step on D1, one upper step on D2, every iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from ignite.engine import EventEnum
from monai.engines.utils import IterationEvents, default_metric_cmp_fn
from monai.inferers import Inferer, SimpleInferer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.utils.data import DataLoader

from blosam_monai.engines.hypergradient import METHODS, LowerStep, adamw_jacobian, task_norm
from blosam_monai.engines.resumable_trainer import ResumableTrainer

UPPER_LOSS = "upper_loss"
LEVELS = ("bilevel", "joint", "alternate", "swap")


class BilevelEvents(EventEnum):
    """Events of one iteration beside MONAI's, in the order they fire."""

    LOWER_STEP_COMPLETED = "lower_step_completed"
    UPPER_BACKWARD_COMPLETED = "upper_backward_completed"
    UPPER_STEP_COMPLETED = "upper_step_completed"


def prepare_embedding_batch(
    batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Any, Tensor]:
    """Embedding (B, C, h, w) or (B, T, C, h, w) and label (B, T, 4h, 4w) of a batch, on the device.

    Where the batch has a ``prompt``, embedding and prompt are a pair.
    """
    embedding, label, *prompt = (
        batchdata[key].to(device=device, non_blocking=non_blocking, **kwargs)
        for key in ("embedding", CommonKeys.LABEL, "prompt")
        if key in batchdata
    )
    return ((embedding, *prompt) if prompt else embedding), label


def split_variables(network: Any, levels: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Theta and phi of a network with ``lower_parameters`` and ``upper_parameters``: exchanged by ``swap``.

    Where joint training has one kind of variable only it is theta, and phi is empty.

    Raises:
        ValueError: unknown levels, two levels asked of a network that has variables for one, or nothing to train.
    """
    if levels not in LEVELS:
        raise ValueError(f"levels: {levels!r} is not one of {', '.join(LEVELS)}.")
    lower, upper = network.lower_parameters(), network.upper_parameters()
    if not lower and not upper:
        raise ValueError("levels: this method trains nothing; score it with `blosam bench`.")
    if levels == "joint":
        return (lower, upper) if lower else (upper, [])
    if not lower or not upper:
        raise ValueError(f"levels: {levels} needs variables of both levels, this network has one kind; choose joint.")
    return (upper, lower) if levels == "swap" else (lower, upper)


class BilevelTrainer(ResumableTrainer):
    """Bi-level optimisation of a network: theta on the lower set D1, phi on the upper set D2.

    One iteration takes one AdamW step of theta on the lower loss at fixed phi, then one step of phi along the
    hypergradient of the upper loss. Without an upper loader it is joint training: both step on the same batch, by the
    gradient of the same loss, or, if they ``alternate``, phi by its gradient at the new theta (block descent, ARENA).
    Which tensors are theta and phi is what the two optimizers hold. Losses are per task, (T,): their sum is
    differentiated, so tasks that share no trainable tensor train as if alone. The engine's output has the keys
    ``image label pred loss upper_loss hypergradient_norm prompt_norm``, the numbers averaged over tasks. Works with
    MONAI's handlers, the gradient of theta being complete at BACKWARD_COMPLETED; own events are in ``BilevelEvents``.

    Args:
        device, max_epochs, non_blocking, postprocessing, key_train_metric, additional_metrics, metric_cmp_fn,
            train_handlers, decollate: as in MONAI's ``SupervisedTrainer``.
        train_data_loader: batches of D1 (joint training: of D1 and D2); an epoch is one pass over it.
        network: called with what ``prepare_batch`` gives, returns logits (B, T, h, w).
        optimizer: AdamW over theta.
        upper_optimizer: an optimizer over phi; None for joint training of theta alone.
        loss_function: (logits, label) -> loss of each task (T,).
        upper_data_loader: batches of D2, walked for ever, every pass in its own order; None for joint training.
        hypergradient: ``first_order``, ``finite_difference`` or ``exact``.
        alternate: see above; in joint training only.
        crossfit: D1 and D2 swap roles at every second iteration, so that theta too learns from all images.
        prepare_batch: batch -> (inputs, label); default: the image embedding.
        inferer: MONAI inferer, default ``SimpleInferer``.
        amp: bfloat16 autocast of the network, on CUDA and with ``first_order`` only.

    Source: Zhang et al. 2024 (BLO-SAM), section 3; what differs is listed in docs/explanation/differences.md.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        network: nn.Module,
        optimizer: AdamW,
        upper_optimizer: torch.optim.Optimizer | None,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        *,
        upper_data_loader: DataLoader | None = None,
        hypergradient: str = "first_order",
        alternate: bool = False,
        crossfit: bool = False,
        prepare_batch: Callable[..., tuple[Tensor, Tensor]] = prepare_embedding_batch,
        inferer: Inferer | None = None,
        non_blocking: bool = False,
        postprocessing: Callable | None = None,
        key_train_metric: dict | None = None,
        additional_metrics: dict | None = None,
        metric_cmp_fn: Callable = default_metric_cmp_fn,
        train_handlers: Sequence | None = None,
        decollate: bool = True,
        amp: bool = False,
    ) -> None:
        _check_options(hypergradient, crossfit, amp, joint=upper_data_loader is None, device=torch.device(device))
        if alternate and (upper_data_loader is not None or upper_optimizer is None):
            raise ValueError("alternate: the levels take turns on one batch; give an upper optimizer, no upper loader.")
        self.shared = getattr(network, "shared", False)
        if hypergradient != "first_order" and self.shared:
            raise ValueError(
                f"hypergradient: {hypergradient} takes one task at a time, and these tasks share trained tensors; use "
                "first_order."
            )
        self.network = network
        self.optimizer = optimizer  # this name, because MONAI's handlers read its learning rate
        self.upper_optimizer = upper_optimizer
        self.loss_function = loss_function
        self.upper_data_loader = upper_data_loader
        self.hypergradient = hypergradient
        self.alternate, self.crossfit = alternate, crossfit
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.autocast = amp
        self.theta, self.phi = _variables(optimizer), _variables(upper_optimizer)
        missing = not self.theta or not (self.phi or upper_data_loader is None)
        if missing or {id(p) for p in self.theta} & {id(p) for p in self.phi}:
            raise ValueError(
                f"optimizer, upper_optimizer: their parameter sets ({len(self.theta)} and {len(self.phi)} tensors) "
                "must be disjoint and not empty."
            )
        # Under exchanged levels phi is not the prompt.
        own = getattr(network, "upper_parameters", None)
        self.prompt: list[nn.Parameter] = self.phi if own is None else own()
        name_of = {id(p): name for name, p in network.named_parameters()}
        self.theta_names = [name_of[id(p)] for p in self.theta]
        self._upper_stream: Iterator | None = None
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            postprocessing=postprocessing,
            key_metric=key_train_metric,
            additional_metrics=additional_metrics,
            metric_cmp_fn=metric_cmp_fn,
            handlers=train_handlers,
            event_names=[BilevelEvents],
            decollate=decollate,
        )

    def run(self) -> None:
        """Train to the last epoch, see ``ResumableTrainer``."""
        self._upper_stream = None
        super().run()

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Any]:
        """One lower and one upper step (or one joint step); fires MONAI's and the bilevel events."""
        self.network.train()
        lower, upper = self._roles(self._prepare(batchdata))
        output: dict[str, Any] = {CommonKeys.IMAGE: lower[0], CommonKeys.LABEL: lower[1]}
        self.state.output = output

        step = self._lower_step(lower, output, joint=upper is None)
        if self.upper_optimizer is not None:
            if upper is not None:
                result = METHODS[self.hypergradient](lambda: self._loss(*upper)[1], self.phi, step)
                _set_gradients(self.phi, result.gradient)
                output[UPPER_LOSS] = result.upper_loss.mean()
            output["hypergradient_norm"] = self._norm([p.grad for p in self.phi if p.grad is not None])
            self.fire_event(BilevelEvents.UPPER_BACKWARD_COMPLETED)
            self.upper_optimizer.step()
            self.fire_event(BilevelEvents.UPPER_STEP_COMPLETED)
            output["prompt_norm"] = self._norm(self.prompt)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def _lower_step(self, batch: tuple[Tensor, Tensor], output: dict[str, Any], *, joint: bool) -> LowerStep:
        """AdamW step of theta on the batch's loss; in joint training phi gets its gradient from the same loss."""
        exact = self.hypergradient == "exact" and not joint
        # The optimizer writes theta in place, which would spoil a graph that is still needed: `exact` keeps copies.
        theta = [p.detach().clone().requires_grad_() for p in self.theta] if exact else self.theta
        displaces = self.hypergradient == "finite_difference" and not joint
        before = [p.detach().clone() for p in self.theta] if displaces else []
        pred, losses = self._loss(*batch, theta=theta if exact else None)
        output[CommonKeys.PRED] = pred.detach()
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        output[CommonKeys.LOSS] = losses.detach().mean()
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        wanted = [*theta, *self.phi] if joint else theta
        # What a batch does not touch (an auxiliary head, the gates of another level) has a gradient of zero.
        gradients = torch.autograd.grad(losses.sum(), wanted, create_graph=exact, materialize_grads=True)
        _set_gradients([*self.theta, *self.phi] if joint else self.theta, gradients)
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimizer.step()
        self.fire_event(BilevelEvents.LOWER_STEP_COMPLETED)
        needs_jacobian = self.hypergradient != "first_order" and not joint
        return LowerStep(
            loss=lambda: self._loss(*batch)[1],
            theta=self.theta,
            before=before,
            gradient=gradients,
            jacobian=adamw_jacobian(self.optimizer, self.theta) if needs_jacobian else [],
        )

    def _loss(self, inputs: Any, label: Tensor, theta: Iterable[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, h, w) and the loss of each task (T,), at the present parameters or with another theta."""
        network: Callable[..., Tensor] = self.network
        if theta is not None:
            replaced = dict(zip(self.theta_names, theta, strict=True))

            def network(x: Tensor) -> Tensor:
                return functional_call(self.network, replaced, (x,))

        with torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.autocast):
            pred = self.inferer(inputs, network)
        pred = pred.float() if self.autocast else pred
        return pred, self.loss_function(pred, label)

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm, the mean over tasks; of tensors that tasks share, of all of them together."""
        return task_norm([t[None] for t in tensors] if self.shared else tensors).mean()

    def _prepare(self, batchdata: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)

    def _roles(self, lower: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """The batches of the lower and upper level; none for the upper level in joint training."""
        if self.upper_data_loader is None:
            return lower, lower if self.alternate else None
        if self._upper_stream is None:
            self._upper_stream = _walk_for_ever(self.upper_data_loader, skip=self.state.iteration - 1)
        upper = self._prepare(next(self._upper_stream))
        return (upper, lower) if self.crossfit and self.state.iteration % 2 == 0 else (lower, upper)


def _walk_for_ever(loader: DataLoader, *, skip: int) -> Iterator[dict[str, Tensor]]:
    """Batches of pass after pass over a loader, from batch number ``skip`` on.

    A sampler with ``set_epoch`` (torch's ``DistributedSampler``) gets the number of the pass, so that the order is a
    function of its seed and of the number of batches taken: a resumed run sees what the uninterrupted one would.
    """
    first, offset = divmod(skip, len(loader))
    for number in count(first):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(number)
        yield from islice(loader, offset if number == first else 0, None)


def _variables(optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _set_gradients(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.detach()


def _check_options(hypergradient: str, crossfit: bool, amp: bool, *, joint: bool, device: torch.device) -> None:
    if hypergradient not in METHODS:
        raise ValueError(f"hypergradient: {hypergradient!r} is not one of {', '.join(METHODS)}.")
    if joint and (crossfit or hypergradient != "first_order"):
        raise ValueError(
            "joint training has no upper level: drop crossfit and hypergradient, or choose another method."
        )
    if amp and hypergradient != "first_order":
        raise ValueError(f"amp: the hypergradient {hypergradient} needs float32; drop amp or choose first_order.")
    if amp and device.type != "cuda":
        raise ValueError(f"amp: bfloat16 is offered on CUDA only, the device is {device.type}; drop amp.")
