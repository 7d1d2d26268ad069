"""A few-shot head as a segmenter: it remembers its labelled images and compares every new image with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.files import PathLike
from blosam_monai.networks.features import ResNetFeatures
from blosam_monai.networks.few_shot import HEADS
from blosam_monai.networks.prompt_sam import hash_weights
from blosam_monai.networks.sam import RANDOM, build_sam
from blosam_monai.networks.segmenter import Segmenter, SharedDecoder, State, load_tensors

SAM_FEATURES = "sam"  # the embedding of SAM; else layers of a ResNet-50, see ``ResNetFeatures``
SAME = 1e-3  # relative distance of two embeddings below which they are of one image
PYRAMID = "pyramid"  # of these layers: the maps of HSNet, packed
NOTHING_SHOWN = -100.0  # logit of a task that no remembered image shows: nothing is found


class FewShotNet(Segmenter):
    """Frozen features, a head, and the labelled images it remembers: image (B, 3, S, S) -> logits (B, T, S, S).

    Each task is an episode of one class. The model file holds the features and labels of the remembered images.

    Args:
        head: one of ``HEADS``.
        image_size: S in pixels.
        tasks: names of the tasks, in the order of the output channels.
        features: ``sam`` (the embedding of a SAM), or the ``layers`` of a ResNet-50, see ``ResNetFeatures``.
        sam_model: see ``build_sam``; of ``sam`` features.
        sam_checkpoint: file of the features' weights: see ``build_sam``, and for the others ``weights`` of
            ``ResNetFeatures``, where None is random.
        head_options: of the head.
        seed: seeds what of the head starts random.

    Raises:
        ValueError: an unknown head, option of it or features, or features that the head does not read.
    """

    NAME = "few_shot"

    def __init__(
        self,
        head: str,
        image_size: int = 256,
        tasks: Sequence[str] = ("foreground",),
        *,
        features: str = SAM_FEATURES,
        sam_model: str = "tiny",
        sam_checkpoint: PathLike | None = None,
        head_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head: {head!r} is not one of {', '.join(HEADS)}.")
        options = dict(head_options or {})
        _check_options(head, options)
        own = {"head": head, "features": features, "sam_model": sam_model, "head_options": options}
        super().__init__(tasks, image_size, own)
        if features == SAM_FEATURES:
            sam = build_sam(sam_model, image_size, sam_checkpoint).requires_grad_(False)
            self.sam_weights = sam.weights
            self.features, channels = sam.image_encoder, sam.mask_decoder.transformer_dim
            self._grid_size = 4 * sam.prompt_encoder.image_embedding_size[0]
        else:
            weights = None if sam_checkpoint == RANDOM else sam_checkpoint
            self.features = ResNetFeatures(image_size, weights, layers=features)
            self.sam_weights = self.features.weights  # of what is frozen, whatever it is
            channels, self._grid_size = self.features.shapes[0][0], image_size // 2
            if features == PYRAMID:
                if head != "hsnet":
                    raise ValueError(f"features: {PYRAMID} are for hsnet, the head is {head}; choose layer3 or layer4.")
                options["shapes"] = self.features.shapes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = RememberingDecoder(HEADS[head](channels, **options), len(tasks), self._grid_size)

    @property
    def grid_size(self) -> int:
        """Side G of the masks as the decoder draws them, in pixels."""
        return int(self._grid_size)

    @cached_property
    def encoder_id(self) -> str:  # type: ignore[override]
        """SHA-256 of the features' weights and, of a ResNet-50, which layers they are."""
        layers = "" if self.settings["features"] == SAM_FEATURES else f"{self.settings['features']} "
        return f"{layers}{hash_weights(self.features)}"

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S), preprocessed -> features (B, C, h, w), or a row of packed maps (B, L)."""
        return self.features(image)


def at_places(mask: Tensor, query: Tensor) -> Tensor:
    """Masks (E, K, G, G) averaged over the places of features (B, C, h, w): (E, K, h, w); for (B, L) as they are."""
    return F.adaptive_avg_pool2d(mask, (query.shape[-2], query.shape[-1])) if query.ndim == 4 else mask


def _check_options(head: str, options: Mapping[str, Any]) -> None:
    known = list(inspect.signature(HEADS[head]).parameters)[1:]  # the first are the channels
    for name in options:
        if name not in known:
            raise ValueError(f"head_options: {head} has no option {name!r}; choose from {', '.join(known)}.")


class RememberingDecoder(SharedDecoder):
    """Features (B, C, h, w) or (B, L) -> logits (B, T, G, G), by comparison with the remembered images.

    An image that is itself remembered is compared with the others only.

    Args:
        head: see ``networks.few_shot``.
        tasks: T.
        grid_size: G in pixels.
    """

    support: Tensor
    mask: Tensor

    def __init__(self, head: nn.Module, tasks: int, grid_size: int) -> None:
        super().__init__(tasks)
        self.head, self.grid_size = head, grid_size
        self.register_buffer("support", torch.empty(0))  # (K, C, h, w) or (K, L)
        self.register_buffer("mask", torch.empty(0))  # (K, T, G, G)

    @torch.no_grad()
    def remember(self, items: Sequence[Mapping[str, Tensor]]) -> None:
        """Take the labelled images: items with ``embedding`` and ``label`` (T, G, G)."""
        kept = [items[n] for n in range(len(items))]
        like = self.support
        self.support = torch.stack([item["embedding"] for item in kept]).to(like.device)
        self.mask = torch.stack([item["label"] for item in kept]).float().to(like.device)

    def forward(self, embedding: Tensor) -> Tensor:
        """Features -> logits (B, T, G, G)."""
        if not len(self.support):
            raise ValueError("head: no labelled images are remembered; call remember() first.")
        return torch.stack([self._segment(query) for query in embedding])

    def _segment(self, query: Tensor) -> Tensor:
        """Features (C, h, w) or (L,) of an image -> logits (T, G, G)."""
        # Another batch size changes the last bits of an embedding; no other image comes near it.
        distance = (self.support - query).flatten(1).norm(dim=1)
        others = (distance > SAME * query.norm()).nonzero()[:, 0].tolist()
        support, mask = (self.support[others], self.mask[others]) if others else (self.support, self.mask)
        masks = mask.transpose(0, 1)  # (T, K, G, G)
        logits = query.new_full((self.tasks, self.grid_size, self.grid_size), NOTHING_SHOWN)
        shown = masks.flatten(1).any(1)
        masks = at_places(masks, query[None])  # (T, K, h, w)
        if shown.any():
            episodes = int(shown.sum())
            supports = support.expand(episodes, *support.shape)
            drawn = self.head(supports, masks[shown], query.expand(episodes, *query.shape))  # (E, h, w)
            size = (self.grid_size, self.grid_size)
            logits[shown] = F.interpolate(drawn[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return logits

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``adapter_state``, the remembered images in whatever number."""
        memory = {name: value for name, value in state.items() if name in ("support", "mask")}
        sizes = (self.tasks, self.grid_size, self.grid_size)
        shapes = [tuple(value.shape) for value in memory.values()]
        some = any(len(value) for value in memory.values())
        if some and (len({shape[0] for shape in shapes}) > 1 or memory["mask"].shape[1:] != sizes):
            raise ValueError(f"adapters: the remembered images and masks {shapes} are not of {sizes}, as many of each.")
        trained = {n: value for n, value in self.adapter_state().items() if n not in memory}
        load_tensors(trained, {n: value for n, value in state.items() if n not in memory})
        for name, value in memory.items():
            setattr(self, name, value.detach().clone().to(getattr(self, name).device))

    def exported(self, state: State) -> tuple[State, dict[str, Any]]:
        """The state, and how many images are remembered."""
        return state, {"remembered": len(state["support"])}
