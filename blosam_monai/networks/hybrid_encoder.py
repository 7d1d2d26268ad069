"""A small image encoder for SAM: convolutions for detail, SAM's transformer blocks for context.

SAM's own encoder cuts the picture into patches of 16 pixels with one linear map, which takes very many images to learn
from and leaves fine borders to the decoder. Convolutions learn both from few. MobileSAM (Zhang et al. 2023) also puts a
light hybrid encoder in front of SAM's prompt encoder and mask decoder.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING_STRIDE = 8  # pixels a place of the embedding stands for
TOKEN_STRIDE = 16  # pixels a token of the transformer stands for


class HybridEncoder(nn.Module):
    """Image (B, 3, S, S), preprocessed -> embedding (B, C, S / 8, S / 8), normalised over channels.

    Args:
        image_size: S in pixels, a multiple of 16; the position tables are of this size.
        width, depth, heads: of the transformer, all of whose blocks attend globally to the (S / 16)^2 tokens.
        out_channels: C.
        block: SAM's transformer block, ``segment_anything.modeling.image_encoder.Block``.
    """

    def __init__(
        self, image_size: int, width: int, depth: int, heads: int, *, out_channels: int, block: type[nn.Module]
    ) -> None:
        super().__init__()
        self.img_size = image_size  # as ImageEncoderViT names it; Sam reads it
        side = image_size // TOKEN_STRIDE
        self.stem = nn.Sequential(
            _down(3, 32), _down(32, 64), _Residual(64), _down(64, 128), _Residual(128)
        )  # stride 8
        self.to_tokens = _down(128, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            block(width, heads, norm_layer=norm, use_rel_pos=True, input_size=(side, side)) for _ in range(depth)
        )
        self.norm = norm(width)
        self.from_tokens = nn.Conv2d(width, out_channels, 1)
        self.from_stem = nn.Conv2d(128, out_channels, 1)
        self.neck = nn.Sequential(_Residual(out_channels), nn.Conv2d(out_channels, out_channels, 1, bias=False))
        self.out_norm = norm(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) -> embedding (B, C, S / 8, S / 8)."""
        detail = self.stem(image)  # (B, 128, S / 8, S / 8)
        tokens = self.to_tokens(detail).permute(0, 2, 3, 1) + self.pos_embed  # (B, S / 16, S / 16, width)
        for block in self.blocks:
            tokens = block(tokens)
        context = self.from_tokens(self.norm(tokens).permute(0, 3, 1, 2))
        context = F.interpolate(context, scale_factor=2, mode="bilinear", align_corners=False)
        merged = self.neck(context + self.from_stem(detail))  # (B, C, S / 8, S / 8)
        return self.out_norm(merged.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _down(channels: int, out_channels: int) -> nn.Sequential:
    """Half the side: convolution, normalisation over groups of channels, GELU."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, out_channels), nn.GELU()
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(8, channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)
