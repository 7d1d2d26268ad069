"""What every segmenter is: a frozen encoder and a trained decoder; an image in, one mask a task out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


class SharedDecoder(nn.Module):
    """Base of trained parts whose tasks share tensors: embedding -> logits (B, T, G, G), trained at one level.

    What trains is what requires a gradient when training begins.

    Args:
        tasks: number of tasks, T.
    """

    shared = True

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def lower_parameters(self) -> list[nn.Parameter]:
        """Theta: all that trains."""
        return [p for p in self.parameters() if p.requires_grad]

    def upper_parameters(self) -> list[nn.Parameter]:
        """Phi: nothing."""
        return []

    def adapter_state(self) -> State:
        """What training changes: the trained tensors and the floating-point buffers (statistics, memories)."""
        kept = [*((n, p) for n, p in self.named_parameters() if p.requires_grad), *self.named_buffers()]
        return {name: value.detach() for name, value in kept if value.is_floating_point()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``adapter_state``; raises ValueError naming what is missing, foreign or misshapen."""
        load_tensors(self.adapter_state(), state)

    def exported(self, state: State) -> tuple[State, dict[str, Any]]:
        """What is kept on disk of a state, and the settings in which a network that takes it differs from this."""
        return state, {}


class Segmenter(nn.Module):
    """Image (B, 3, S, S), preprocessed -> logits (B, T, S, S), one foreground logit a task.

    A subclass sets ``decoder`` and, where a part is frozen, ``encode`` and ``encoder_id``. One that freezes nothing has
    its image for embedding.

    Args:
        tasks: names of the tasks, in the order of the output channels.
        image_size: S in pixels.
        settings: what rebuilds it, but for weights; JSON.
    """

    NAME = ""  # in the settings of a saved model
    decoder: Any
    sam_weights = "none"  # else ``random`` or the SHA-256 of SAM's checkpoint
    pretrained = "none"  # of a network without SAM: ``scratch`` or the SHA-256 of the weights it started from
    encoder_id: str | None = None  # SHA-256 of the frozen encoder: with the image, all that decides an embedding
    prompted = False  # whether it takes prompts from a label, and segments nothing without

    def __init__(self, tasks: Sequence[str], image_size: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.tasks, self.image_size = list(tasks), image_size
        self.settings = {"network": self.NAME, "image_size": image_size, "tasks": self.tasks, **settings}

    @property
    def grid_size(self) -> int:
        """Side G of the masks as the decoder draws them, in pixels."""
        return self.image_size

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) -> embedding: what the frozen part makes of it, without a graph."""
        return image

    def decode(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Embedding -> logits at input size (B, T, S, S); embedding and prompts of one that is ``prompted``."""
        logits = self.decoder(inputs)  # (B, T, G, G)
        size = (self.image_size, self.image_size)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Image (B, 3, S, S), preprocessed -> logits (B, T, S, S).

        Raises:
            ValueError: no prompts for a network that takes them, or prompts for one that does not.
        """
        if not self.prompted:
            if prompts is not None:
                raise ValueError("prompts: this network takes none; leave them out.")
            return self.decode(self.encode(image))
        if prompts is None:
            raise ValueError(
                "model: it takes its prompts from labels (an oracle), and segments nothing without; use another method."
            )
        return self.decode((self.encode(image), prompts))

    def lower_parameters(self) -> list[nn.Parameter]:
        """Theta: what the lower level trains."""
        return list(self.decoder.lower_parameters())

    def upper_parameters(self) -> list[nn.Parameter]:
        """Phi: what the upper level trains."""
        return list(self.decoder.upper_parameters())

    def count_parameters(self) -> tuple[int, int]:
        """Numbers trained, and in all."""
        trained = sum(p.numel() for p in (*self.lower_parameters(), *self.upper_parameters()))
        return trained, sum(p.numel() for p in self.parameters())

    def gate_parameters(self) -> list[nn.Parameter]:
        """Of what trains, the gates that decide ranks (ARENA)."""
        trained = {id(p) for p in (*self.lower_parameters(), *self.upper_parameters())}
        return [p for name, p in self.named_parameters() if id(p) in trained and is_gate(name)]


def is_gate(name: str) -> bool:
    """Whether a parameter of this name is a gate of a low-rank update."""
    return name.replace("/", ".").rpartition(".")[2].startswith("gate")


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names; raises ValueError naming what is missing, foreign or misshapen."""
    if own.keys() != state.keys():
        raise ValueError(f"adapters: these tensors differ from the network's: {sorted(own.keys() ^ state.keys())}.")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"adapters: {name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}.")
    for name, value in own.items():
        value.copy_(state[name])
