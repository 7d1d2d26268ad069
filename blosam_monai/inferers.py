"""Inferers: how an engine calls the network."""

from __future__ import annotations

from typing import Any

from monai.inferers import Inferer
from torch import Tensor

from blosam_monai.networks.prompt_sam import PromptSam


class EmbeddingInferer(Inferer):
    """Decode image embeddings that were computed before: (B, C, h, w) -> logits (B, T, S, S)."""

    def __call__(self, inputs: Tensor, network: PromptSam, *args: Any, **kwargs: Any) -> Tensor:
        """Decode a batch of embeddings."""
        return network.decode(inputs)
