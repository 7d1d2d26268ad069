"""The linear probe: what an embedding holds without any adaptation; the simplest baseline of all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.networks.segmenter import SharedDecoder

UPSCALING = 4  # as SAM's decoder: a place of the embedding becomes 4 x 4 pixels


class LinearProbe(SharedDecoder):
    """T linear classifiers of the places of an embedding: (B, C, h, w) or (B, T, C, h, w) -> logits (B, T, 4h, 4w).

    A 1 x 1 convolution for each task, starting at zero, and bilinear interpolation. Tasks share no tensor.

    Args:
        channels: C.
        tasks: T.
    """

    shared = False

    def __init__(self, channels: int, tasks: int) -> None:
        super().__init__(tasks)
        self.weight = nn.Parameter(torch.zeros(tasks, channels))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, embedding: Tensor) -> Tensor:
        """Embedding -> logits (B, T, 4h, 4w)."""
        layout = "btchw" if embedding.ndim == 5 else "bchw"
        logits = torch.einsum(f"{layout},tc->bthw", embedding, self.weight) + self.bias[:, None, None]
        return F.interpolate(logits, scale_factor=UPSCALING, mode="bilinear", align_corners=False)
