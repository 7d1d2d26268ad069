"""Encode once, decode many: the frozen encoder as the last deterministic transform."""

from __future__ import annotations

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

from blosam_monai.networks.prompt_sam import PromptSam


class EncodeImaged(MapTransform):
    """Replace an image (3, S, S) by its ``embedding`` (C, h, w), float32 on the CPU.

    Used as the last deterministic transform. It remembers what it has encoded, by ``source`` and ``view``: however many
    data sets of a run share an image, the encoder sees each image and view once. The image is dropped.

    Args:
        network: whose frozen encoder is used, on its device.
        keys: the image.
    """

    def __init__(self, network: PromptSam, keys: KeysCollection = "image") -> None:
        super().__init__(keys)
        self.network = network
        self.embeddings: dict[tuple[str, int | None], torch.Tensor] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Encode the image of one item."""
        item = dict(data)
        image = item.pop(self.keys[0])
        name = item["source"], item.get("view")
        if name not in self.embeddings:
            device = next(self.network.parameters()).device
            self.embeddings[name] = self.network.encode(image[None].to(device))[0].float().cpu()
        item["embedding"] = self.embeddings[name]
        return item


def with_views(items: Sequence[dict[str, Any]], augment_views: int, *, seed: int) -> list[dict[str, Any]]:
    """The items, and ``augment_views`` more of each to be augmented, which carry a seed of their own as ``view``."""
    if augment_views < 0:
        raise ValueError(f"augment_views: {augment_views} must not be negative.")
    extra = [
        {**item, "view": np.random.SeedSequence([seed, number, view]).generate_state(1).item()}
        for number, item in enumerate(items)
        for view in range(1, augment_views + 1)
    ]
    return [*items, *extra]


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
