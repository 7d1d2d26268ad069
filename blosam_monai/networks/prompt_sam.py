"""SAM without prompts: a frozen encoder and T learned decoders behind one call; the bundle's ``network_def``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.files import PathLike
from blosam_monai.networks.prompt_decoder import PromptDecoder
from blosam_monai.networks.sam import build_sam


class PromptSam(nn.Module):
    """Image (B, 3, S, S) -> logits (B, T, S, S), one foreground logit a task; no prompt is asked of the user.

    Args:
        sam_model, image_size, sam_checkpoint: see ``build_sam``.
        tasks: names of the tasks, in the order of the output channels.
        prompt, head, lora_rank, seed: see ``TaskDecoder``.
    """

    SETTINGS = ("sam_model", "image_size", "tasks", "prompt", "head", "lora_rank")  # what rebuilds it, but for weights

    def __init__(
        self,
        sam_model: str = "tiny",
        image_size: int = 256,
        sam_checkpoint: PathLike | None = None,
        tasks: Sequence[str] = ("foreground",),
        *,
        prompt: str = "dense",
        head: str = "sam",
        lora_rank: int = 4,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        self.sam = build_sam(sam_model, image_size, sam_checkpoint).requires_grad_(False)
        self.decoder = PromptDecoder(
            self.sam, tasks=len(tasks), prompt=prompt, head=head, lora_rank=lora_rank, seed=seed
        )
        self.tasks = list(tasks)
        self.image_size = image_size
        values = (sam_model, image_size, list(tasks), prompt, head, lora_rank)
        self.settings = dict(zip(self.SETTINGS, values, strict=True))

    @property
    def grid_size(self) -> int:
        """Side G of the masks as the decoder draws them, in pixels: four for a place of the embedding."""
        return 4 * self.sam.prompt_encoder.image_embedding_size[0]

    @property
    def sam_weights(self) -> str:
        """``random`` or the SHA-256 of the checkpoint file."""
        return self.sam.weights

    @cached_property
    def encoder_id(self) -> str:
        """SHA-256 of the encoder's weights: with the image, all that decides an embedding."""
        digest = hashlib.sha256()
        for name, value in self.sam.image_encoder.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S), preprocessed -> embedding (B, C, h, w), h = G / 4. Frozen, so without a graph."""
        return self.sam.image_encoder(image)

    def decode(self, embedding: Tensor) -> Tensor:
        """Embedding (B, C, h, w) -> logits at input size (B, T, S, S)."""
        logits = self.decoder(embedding)  # (B, T, 4h, 4w)
        return F.interpolate(logits, (self.image_size, self.image_size), mode="bilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S), preprocessed -> logits (B, T, S, S)."""
        return self.decode(self.encode(image))

    def lower_parameters(self) -> list[nn.Parameter]:
        """Theta: what the lower level trains."""
        return self.decoder.lower_parameters()

    def upper_parameters(self) -> list[nn.Parameter]:
        """Phi: what the upper level trains."""
        return self.decoder.upper_parameters()

    def merge(self, task: int | str = 0) -> dict[str, Tensor]:
        """One task (number or name) folded into a plain ``segment_anything`` state dict."""
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"merge: task {task!r} is not one of {', '.join(self.tasks)}.")
            task = self.tasks.index(task)
        return self.decoder.merge(self.sam, task)
