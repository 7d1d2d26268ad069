"""Encode once, decode many: the frozen encoder as the last deterministic transform."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandFlipd,
    RandRotated,
    RandScaleIntensityd,
)
from torch.utils.data import Dataset

from blosam_monai.data.embedding_cache import NO_CACHE, EmbeddingCache, open_cache
from blosam_monai.files import PathLike, content_sha256
from blosam_monai.networks.segmenter import Segmenter

ENCODING_VERSION = 1  # of the code that encodes: to be raised when its results change


class EncodeImaged(MapTransform):
    """Replace an image (3, S, S) by its ``embedding`` (C, h, w), float32 on the CPU.

    Used as the last deterministic transform. What the network would see, to the bit, is the address of its embedding:
    however many data sets of a run share an image, the encoder sees it once, and with a cache on disk once for all runs
    and methods. The image is dropped. Of a network that freezes nothing, the image is the embedding.

    Args:
        network: whose frozen encoder is used, on its device.
        cache_dir: folder of the cache on disk; None: ``embeddings`` in the cache of the package; ``none``: no cache.
        keys: the image.
        remember: keep all embeddings in memory too; a test looks at each image once.
    """

    def __init__(
        self,
        network: Segmenter,
        cache_dir: PathLike | None = None,
        keys: KeysCollection = "image",
        *,
        remember: bool = True,
    ) -> None:
        super().__init__(keys)
        self.network, self.remember = network, remember
        self.encodes = network.encoder_id is not None
        if cache_dir not in (None, NO_CACHE) and not self.encodes:
            raise ValueError(f"cache_dir: {cache_dir}, but this method trains from the image; leave cache_dir out.")
        self.cache = open_cache(cache_dir) if self.encodes else None
        self.embeddings: dict[str, torch.Tensor] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Encode the image of one item."""
        item = dict(data)
        image = item.pop(self.keys[0])
        if not self.encodes:
            item["embedding"] = image
            return item
        key = self._key(image)
        item["embedding"] = self.embeddings[key] if key in self.embeddings else self._find(key, image)
        if self.remember:
            self.embeddings[key] = item["embedding"]
        return item

    def _find(self, key: str, image: torch.Tensor) -> torch.Tensor:
        embedding = self.cache.get(key) if self.cache else None
        if embedding is None:
            device = next(self.network.parameters()).device
            embedding = self.network.encode(image[None].to(device))[0].float().cpu()
            if self.cache:
                self.cache.put(key, embedding)
        return embedding

    def _key(self, image: torch.Tensor) -> str:
        """Hash of input and encoder: file, slice, window, view, preprocessing and size are all in the input."""
        pixels = hashlib.sha256(image.contiguous().numpy().data).hexdigest()
        device = next(self.network.parameters()).device.type  # the last bits differ
        parts = {"input": pixels, "shape": str(tuple(image.shape)), "dtype": str(image.dtype), "device": device}
        return EmbeddingCache.key({**parts, "encoder": str(self.network.encoder_id), "version": ENCODING_VERSION})


def with_views(items: Sequence[dict[str, Any]], augment_views: int, *, seed: int) -> list[dict[str, Any]]:
    """The items, and ``augment_views`` more of each to be augmented, which carry a seed of their own as ``view``.

    It comes from the image itself and its slice: whatever the method and the half, an image has the same views.
    """
    if augment_views < 0:
        raise ValueError(f"augment_views: {augment_views} must not be negative.")
    extra = [
        {**item, "view": np.random.SeedSequence([seed, identity, view]).generate_state(1).item()}
        for item, identity in ((item, _identify(item)) for item in (items if augment_views else ()))
        for view in range(1, augment_views + 1)
    ]
    return [*items, *extra]


def _identify(item: Mapping[str, Any]) -> int:
    """A number of an item's image and slice."""
    return int(content_sha256(item["image"])[:12], 16) * 10_000 + item.get("slice", 0)


class AugmentViewd(MapTransform):
    """A fixed random change of an item with a ``view`` seed: flip, rotation to 15 degrees, contrast, brightness.

    The same seed gives the same view, so that every view is encoded once; items without a seed pass unchanged. Flips
    exchange left and right: leave ``augment_views`` at 0 for tasks that tell them apart.
    """

    def __init__(self) -> None:
        super().__init__(("image", "label"))
        self.change = Compose(
            [
                RandFlipd(self.keys, spatial_axis=1, prob=0.5),
                RandRotated(
                    self.keys, range_x=np.pi / 12, prob=1.0, mode=("bilinear", "nearest"), padding_mode="border"
                ),
                RandAdjustContrastd("image", gamma=(0.7, 1.4), prob=1.0),
                RandScaleIntensityd("image", factors=0.2, prob=1.0),
            ]
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change image (3, H, W) and label (T, H, W) together."""
        result = dict(data)
        if result.get("view") is not None:
            self.change.set_random_state(seed=result["view"])
            changed = self.change({key: result[key] for key in self.keys})
            result["image"] = changed["image"].as_tensor().clamp(0, 255)
            result["label"] = changed["label"].as_tensor()
        return result


class StackedDraws(Dataset):
    """Repeats of a few-shot draw as tasks: item i holds the i-th support image of every draw.

    From R data sets of items with ``embedding`` (C, h, w) and ``label`` (T, H, W) comes one with ``embedding``
    (R T, C, h, w) and ``label`` (R T, H, W): R draws train in one run.
    """

    def __init__(self, draws: Sequence[Dataset]) -> None:
        lengths = {len(draw) for draw in draws}  # type: ignore[arg-type]
        if len(lengths) != 1:
            raise ValueError(f"draws: all must have the same number of images, found {sorted(lengths)}.")
        self.draws = draws

    def __len__(self) -> int:
        return len(self.draws[0])  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        items = [draw[index] for draw in self.draws]
        return {
            "embedding": torch.cat([i["embedding"].expand(len(i["label"]), -1, -1, -1) for i in items]),
            "label": torch.cat([i["label"] for i in items]),
        }
