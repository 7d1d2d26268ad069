"""SAM with prompts taken from the label: what it could do if somebody clicked on every image. An oracle.

Nothing here segments an image without its label. The scores say how far prompts would carry, never what a user gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from blosam_monai.files import PathLike
from blosam_monai.networks.prompt_sam import EncoderDecoder, SamSegmenter, make_trainable
from blosam_monai.networks.segmenter import SharedDecoder

ORACLES = ("point", "box", "both")  # both: a point inside, one outside, and the box
NOTHING_THERE = -100.0  # logit of a task whose label is empty: there is nothing to prompt for


class PromptedSam(SamSegmenter):
    """Image (B, 3, S, S) and prompts (B, T, 8) -> logits (B, T, S, S), by SAM's own mask decoder.

    Args:
        sam_model, image_size, sam_checkpoint: see ``build_sam``.
        tasks: names of the tasks, in the order of the output channels.
        oracle: which prompts of ``label_prompts`` are used: ``point`` (inside), ``box``, or ``both`` (a point inside,
            one outside, and the box).
        train_encoder: ``frozen``, or ``adapter`` (Med-SA), see ``PromptSam``.
        train_decoder: ``frozen`` or ``full``: SAM's prompt encoder and mask decoder.
        seed: seeds the adapters.

    Source: Kirillov et al. 2023 (SAM); Wu et al. 2023 (Med-SA), trained and tested with prompts from the label.
    """

    NAME = "prompted_sam"
    prompted = True

    def __init__(
        self,
        sam_model: str = "tiny",
        image_size: int = 256,
        sam_checkpoint: PathLike | None = None,
        tasks: Sequence[str] = ("foreground",),
        *,
        oracle: str = "both",
        train_encoder: str = "frozen",
        train_decoder: str = "frozen",
        seed: int = 0,
    ) -> None:
        known = {"oracle": ORACLES, "train_encoder": ("frozen", "adapter"), "train_decoder": ("frozen", "full")}
        own = {"oracle": oracle, "train_encoder": train_encoder, "train_decoder": train_decoder}
        for key, value in own.items():
            if value not in known[key]:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(known[key])}.")
        super().__init__(tasks, own, sam_model=sam_model, image_size=image_size, sam_checkpoint=sam_checkpoint)
        self.decoder = PromptedDecoder(self.sam, len(tasks), oracle)
        if train_decoder == "full":
            self.decoder.requires_grad_(True)
        if train_encoder == "adapter":
            make_trainable(self.sam.image_encoder, train_encoder, rank=None, seed=seed)
            self.decoder = EncoderDecoder(self.sam.image_encoder, self.decoder)


class PromptedDecoder(SharedDecoder):
    """SAM's prompt encoder and mask decoder: embedding (B, C, h, w) and prompts (B, T, 8) -> logits (B, T, G, G).

    Args:
        sam: whose parts are used, not copied.
        tasks: T.
        oracle: see ``PromptedSam``.
    """

    def __init__(self, sam: Any, tasks: int, oracle: str) -> None:
        super().__init__(tasks)
        self.prompt_encoder: Any = sam.prompt_encoder
        self.mask_decoder: Any = sam.mask_decoder
        self.oracle = oracle

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Embedding and prompts -> logits."""
        return torch.stack([self._segment(embedding, prompts) for embedding, prompts in zip(*inputs, strict=True)])

    def _segment(self, embedding: Tensor, prompts: Tensor) -> Tensor:
        """Embedding (C, h, w), prompts (T, 8) -> logits (T, G, G)."""
        there = ~prompts.isnan().any(1)
        side = 4 * embedding.shape[-1]
        # A batch without any prompt has no gradient, not no graph.
        nothing = 0 * (embedding.mean() + self.mask_decoder.iou_token.weight.mean())
        logits = embedding.new_full((self.tasks, side, side), NOTHING_THERE) + nothing
        if not there.any():
            return logits
        asked = prompts[there]
        points, boxes = asked[:, :4].view(-1, 2, 2), asked[:, 4:]
        kinds = torch.tensor([1, 0], device=asked.device).expand(len(asked), 2)  # SAM: 1 inside, 0 outside
        if self.oracle == "point":
            points, kinds = points[:, :1], kinds[:, :1]
        sparse, dense = self.prompt_encoder(
            points=None if self.oracle == "box" else (points, kinds),
            boxes=None if self.oracle == "point" else boxes,
            masks=None,
        )
        masks, _ = self.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )  # (asked, 1, G, G)
        return logits.masked_scatter(there[:, None, None].expand_as(logits), masks[:, 0].to(logits.dtype))


def label_prompts(label: Tensor) -> Tensor:
    """Prompts that a perfect user would give: label (T, h, w) of the picture in the network's input -> (T, 8), x, y.

    The pixel deepest inside (x, y), the pixel of the background farthest from the foreground (x, y), and the box
    (x0, y0, x1, y1) of the foreground, all at centres of pixels. Not a number where a label is empty. Deterministic:
    the first of equal ones.
    """
    return torch.stack([_prompt(mask.cpu().numpy() > 0) for mask in label]).to(label.device)


def _prompt(mask: np.ndarray) -> Tensor:
    if not mask.any():
        return torch.full((8,), torch.nan)
    padded = np.pad(mask, 1)  # outside the picture is background for the depth of the foreground
    inside = distance_transform_edt(padded)[1:-1, 1:-1]
    outside = distance_transform_edt(~mask)
    (y, x), (v, u) = (np.unravel_index(depth.argmax(), depth.shape) for depth in (inside, outside))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1], rows[-1])
    return torch.tensor([x, y, u, v, *box], dtype=torch.float32)
