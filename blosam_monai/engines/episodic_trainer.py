"""The episodic trainer: the outer training of few-shot heads, a batch of episodes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from monai.engines.utils import IterationEvents, default_metric_cmp_fn
from monai.inferers import Inferer, SimpleInferer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from blosam_monai.engines.bilevel_trainer import BilevelEvents
from blosam_monai.engines.resumable_trainer import ResumableTrainer
from blosam_monai.networks.few_shot.segmenter import NOTHING_SHOWN, at_places


class EpisodeBatch(NamedTuple):
    """B queries and T classes as E = B T episodes of one class each; the episodes of one query are neighbours.

    Attributes:
        support: (E, K, C, h, w) embeddings, or (E, K, L).
        mask: (E, K, h, w) share of each place that is foreground, 0 to 1; (E, K, G, G) where embeddings are (L,).
        query: (E, C, h, w) embeddings, or (E, L).
        label: (E, G, G) of the query, 0 and 1.
    """

    support: Tensor
    mask: Tensor
    query: Tensor
    label: Tensor

    def chosen(self, which: Tensor) -> EpisodeBatch:
        """The episodes for which ``which`` (E,) is true."""
        return EpisodeBatch(*(value[which] for value in self))


def prepare_episode_batch(
    batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[EpisodeBatch, Tensor, Tensor]:
    """The episodes of a batch, and its query embeddings (B, ...) and labels (B, T, G, G), on the device.

    The batch holds ``support`` (B, K, ...), ``mask`` (B, K, T, G, G), ``embedding`` (B, ...), ``label`` (B, T, G, G).
    """
    support, mask, query, label = (
        batchdata[key].to(device=device, non_blocking=non_blocking, **kwargs)
        for key in ("support", "mask", "embedding", CommonKeys.LABEL)
    )
    return make_episodes(support, mask, query, label), query, label


def make_episodes(support: Tensor, mask: Tensor, query: Tensor, label: Tensor) -> EpisodeBatch:
    """Episodes of every query and class: support (B, K, ...), mask (B, K, T, G, G), query (B, ...), label (B, T, G, G).

    A support picture that does not show the class of an episode says what background looks like there, no more.
    """
    tasks = label.shape[1]
    masks = mask.float().transpose(1, 2).flatten(0, 1)  # (E, K, G, G)
    every = torch.arange(len(query), device=query.device).repeat_interleave(tasks)  # of an episode its query
    return EpisodeBatch(support[every], at_places(masks, query), query[every], label.float().flatten(0, 1))


def trainable_parameters(head: nn.Module) -> list[nn.Parameter]:
    """What of a head is trained.

    Raises:
        ValueError: nothing.
    """
    found = [p for p in head.parameters() if p.requires_grad]
    if not found:
        raise ValueError(
            f"head: {type(head).__name__} has nothing to train; give it a projection, or evaluate it as it is with "
            "train_free=true."
        )
    return found


class EpisodicTrainer(ResumableTrainer):
    """Training of a few-shot head: one optimizer step on the mean loss of the episodes of a batch.

    Every class of a query is an episode of its own; those whose supports or query do not show the class have no part in
    the mean, and a batch without any other takes no step. The mean, not the sum, so that a learning rate does not
    depend on the size of a batch and the number of classes. The engine's output has the keys ``image`` (the query's
    embedding), ``label``, ``pred`` (B, T, G, G) logits before the step, ``loss`` and ``episodes``, the number that
    counted. Works with MONAI's handlers and those of ``BilevelTrainer``, whose step of the lower level is this step.

    Args:
        device, max_epochs, non_blocking, postprocessing, key_train_metric, additional_metrics, metric_cmp_fn,
            train_handlers, decollate: as in MONAI's ``SupervisedTrainer``.
        train_data_loader: batches of episodes, see ``prepare_episode_batch``; an epoch is one pass over it.
        network: the head: called with support (E, K, C, h, w), mask (E, K, h, w) and query (E, C, h, w) it gives logits
            (E, h, w); its ``loss(support, mask, query, label (E, H, W))`` gives (E,).
        optimizer: over the parameters of the head.
        prepare_batch: batch -> (episodes, image, label).
        inferer: MONAI inferer of the predictions, default ``SimpleInferer``.

    Raises:
        ValueError: the head has nothing to train.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        network: Any,
        optimizer: torch.optim.Optimizer,
        *,
        prepare_batch: Callable[..., tuple[EpisodeBatch, Tensor, Tensor]] = prepare_episode_batch,
        inferer: Inferer | None = None,
        non_blocking: bool = False,
        postprocessing: Callable | None = None,
        key_train_metric: dict | None = None,
        additional_metrics: dict | None = None,
        metric_cmp_fn: Callable = default_metric_cmp_fn,
        train_handlers: Sequence | None = None,
        decollate: bool = True,
    ) -> None:
        trainable_parameters(network)
        self.network = network
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.optimizer = optimizer  # this name, because MONAI's handlers read its learning rate
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

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Any]:
        """One step on the episodes of a batch; fires MONAI's events."""
        episodes, image, label = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        output: dict[str, Any] = {CommonKeys.IMAGE: image, CommonKeys.LABEL: label}
        self.state.output = output
        shown = episodes.mask.flatten(1).any(1)  # (E,)
        output[CommonKeys.PRED] = self._predict(episodes, shown).view_as(label)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)

        counted = episodes.chosen(shown & episodes.label.flatten(1).any(1))
        output["episodes"] = len(counted.label)
        self.network.train()
        self.optimizer.zero_grad()
        loss = self.network.loss(*counted).mean() if output["episodes"] else image.new_zeros(())
        output[CommonKeys.LOSS] = loss.detach()
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        if output["episodes"]:
            loss.backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if output["episodes"]:
            self.optimizer.step()
        self.fire_event(BilevelEvents.LOWER_STEP_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    @torch.no_grad()
    def _predict(self, episodes: EpisodeBatch, shown: Tensor) -> Tensor:
        """Logits (E, G, G) of the episodes as they are tested: in evaluation mode."""
        logits = torch.full_like(episodes.label, NOTHING_SHOWN)
        if shown.any():
            self.network.eval()  # statistics of a batch are those of the loss
            support, mask, query, label = episodes.chosen(shown)
            drawn = self.inferer(support, self.network, mask, query)[:, None]  # (E, 1, h, w)
            logits[shown] = F.interpolate(drawn, label.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return logits
