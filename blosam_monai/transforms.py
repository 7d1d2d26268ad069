"""From files to network input and from logits to label maps: dictionary transforms of one item.

An item has the keys ``image label pred embedding`` and, beside them, ``source`` (path of the image file),
``native_size`` and ``input_size`` ((H, W) in pixels, as tensors of two): what puts a prediction back on its own grid.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from scipy.ndimage import zoom
from torch import Tensor
from torch.nn import functional as F

from blosam_monai.data.readers import read_image, read_label
from blosam_monai.data.writers import write_label, write_overlay
from blosam_monai.files import PathLike
from blosam_monai.networks.sam import PIXEL_MEAN, PIXEL_STD

Item = dict[Hashable, Any]
Labels = Mapping[str, int | Sequence[int]]  # name -> label value, or values of a union; "background" is 0

PREPROCESS = ("sam", "paper")
MERGE_RULES = ("argmax", "separate")


def task_values(labels: Labels, tasks: Sequence[str] | None = None) -> dict[str, list[int]]:
    """The label values of each task, in task order; without ``tasks``, of every label but background.

    >>> task_values({"background": 0, "wheel": 2, "glass": [3, 4]})
    {'wheel': [2], 'glass': [3, 4]}

    Raises:
        ValueError: a task that is not among the labels, none at all, or one twice.
    """
    values = {name: [int(v) for v in ([value] if isinstance(value, int) else value)] for name, value in labels.items()}
    values = {name: numbers for name, numbers in values.items() if name != "background" and numbers != [0]}
    chosen = list(values) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [name for name in chosen if name not in values]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"tasks: {chosen} must be some of the labels {', '.join(values)}, each once.")
    return {name: values[name] for name in chosen}


class LoadCased(Transform):
    """Read an item's files: paths become ``image`` (3, H, W), 0 to 255, and, where there is one, ``label`` (T, H, W).

    Args:
        labels: the data list's names and values.
        tasks: names of the tasks, see ``task_values``.
        label_coding: see ``read_label``.

    Raises:
        ValueError: label and image differ in size, or the label holds a value that the list does not name.
    """

    def __init__(self, labels: Labels, tasks: Sequence[str] | None = None, label_coding: str = "index") -> None:
        self.values = task_values(labels, tasks)
        self.known = {v for values in task_values(labels).values() for v in values}
        self.coding = label_coding
        if label_coding == "threshold" and len(self.known) != 1:
            raise ValueError(
                f"label_coding: threshold tells one class from background, the list names {len(self.known)}."
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Read the files of one item."""
        item = dict(data)
        image = read_image(item["image"])
        item |= {"image": torch.from_numpy(image), "source": str(item["image"])}
        item["native_size"] = torch.tensor(image.shape[1:])
        if "label" in item:
            item["label"] = self._read_tasks(item["label"], image.shape[1:])
        return item

    def _read_tasks(self, path: PathLike, size: tuple[int, ...]) -> Tensor:
        label = read_label(path, self.coding)
        if label.shape != size:
            raise ValueError(f"{path}: label has shape {label.shape}, its image {tuple(size)}; export the label again.")
        if self.coding == "threshold":
            label = label * next(iter(self.known))
        foreign = sorted(set(np.unique(label).tolist()) - self.known - {0})
        if foreign:
            raise ValueError(
                f"{path}: label value {foreign[0]} is not in the data list's labels ({sorted(self.known)}); add it "
                'there, or set "label_coding": "threshold" for masks of 0 and 255.'
            )
        return torch.from_numpy(
            np.stack([np.isin(label, values) for values in self.values.values()]).astype(np.float32)
        )


class PreprocessImaged(MapTransform):
    """Image (3, H, W), 0 to 255 -> network input (3, S, S); also sets ``input_size``, the part that holds the image.

    ``sam``: the longer side is resized to S (bilinear, anti-aliased), SAM's mean and deviation, zeros right and below.
    ``paper``: squashed to S x S by a cubic spline, scaled to [0, 1]. Sources: ``segment_anything.SamPredictor``;
    BLO-SAM's published code. MONAI's ``Resized`` and ``Invertd`` do not resample as either of them.
    """

    def __init__(self, image_size: int, mode: str = "sam", keys: KeysCollection = "image") -> None:
        super().__init__(keys)
        if mode not in PREPROCESS:
            raise ValueError(f"preprocess: {mode!r} is not one of {', '.join(PREPROCESS)}.")
        self.image_size, self.mode = image_size, mode

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Preprocess the image of one item."""
        item = dict(data)
        image, side = item[self.keys[0]], self.image_size
        height, width = image.shape[1:]
        if self.mode == "paper":
            squashed = zoom(image.numpy() / 255, (1, side / height, side / width), order=3)
            item[self.keys[0]] = torch.from_numpy(np.ascontiguousarray(squashed))
            item["input_size"] = torch.tensor((side, side))
            return item
        height, width = input_size(height, width, side)
        image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        item[self.keys[0]] = F.pad((image - mean) / std, (0, side - width, 0, side - height))
        item["input_size"] = torch.tensor((height, width))
        return item


def input_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size in pixels of a picture whose longer side is resized to ``side``, rounded as SAM does; at least 1.

    >>> input_size(310, 700, 256)
    (113, 256)
    """
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class LabelToGridd(MapTransform):
    """Label (T, H, W) -> the decoder's grid (T, S / 4, S / 4), where the loss is taken; nearest, as published."""

    def __init__(self, image_size: int, keys: KeysCollection = "label") -> None:
        super().__init__(keys)
        self.image_size = image_size

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Bring the label of one preprocessed item to the grid."""
        item = dict(data)
        height, width = item["input_size"].tolist()
        label = F.interpolate(item[self.keys[0]][None], (height, width), mode="nearest-exact")
        label = F.pad(label, (0, self.image_size - width, 0, self.image_size - height))
        grid = self.image_size // 4
        item[self.keys[0]] = F.interpolate(label, (grid, grid), mode="nearest-exact")[0]
        return item


class RestoreSized(MapTransform):
    """Logits at input size (T, S, S) -> logits on the image's own grid (T, H, W): cropped, then bilinear, as in SAM."""

    def __init__(self, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Restore the logits of one item."""
        item = dict(data)
        height, width = (int(v) for v in item["input_size"])
        native = [int(v) for v in item["native_size"]]
        logits = item[self.keys[0]][None, :, :height, :width]
        item[self.keys[0]] = F.interpolate(logits, native, mode="bilinear", align_corners=False)[0]
        return item


class BinariseTasksd(MapTransform):
    """Logits (T, H, W) -> masks (T, H, W) of 0 and 1: foreground where the probability is above the threshold."""

    def __init__(self, threshold: float = 0.5, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)
        self.threshold = check_threshold(threshold)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Binarise the logits of one item."""
        item = dict(data)
        item[self.keys[0]] = (item[self.keys[0]].float().sigmoid() > self.threshold).float()
        return item


def check_threshold(threshold: float) -> float:
    """The threshold, if it is a probability that something can be above and below."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold} is not a probability between 0 and 1.")
    return threshold


def merge_tasks(probabilities: Tensor, values: Sequence[Sequence[int]], threshold: float = 0.5) -> Tensor:
    """Probabilities of T tasks (T, H, W) -> one label map (H, W): where several tasks claim a pixel, the surest wins.

    A pixel gets the (first) label value of the task of highest probability, if that is above the threshold; background,
    0, otherwise. Of equal probabilities the earlier task wins.

    >>> merge_tasks(torch.tensor([[[0.9, 0.6, 0.4]], [[0.7, 0.8, 0.5]]]), [[1], [3, 4]])
    tensor([[1, 3, 0]])
    """
    best, task = probabilities.max(dim=0)
    table = torch.tensor([v[0] for v in values], device=task.device)
    return torch.where(best > threshold, table[task], 0)


class SavePredictiond(MapTransform):
    """Write an item's logits (T, H, W) as masks of the image's own size, named by the image file's stem.

    ``argmax``: one PNG with the list's label values, merged by ``merge_tasks``. ``separate``: one PNG a task,
    ``<stem>_<task>.png``, 0 and 255, tasks may overlap. An existing file is replaced only if ``overwrite``.

    Args:
        output_dir: folder of the masks; overlays go to its subfolder ``overlays``.
        labels, tasks: as in ``LoadCased``.
        merge: ``argmax`` or ``separate``.
        threshold: probability above which a pixel is foreground.
        overlays: also write the image with the masks tinted.
        overwrite: replace existing files.
    """

    def __init__(
        self,
        output_dir: PathLike,
        labels: Labels,
        tasks: Sequence[str] | None = None,
        *,
        merge: str = "argmax",
        threshold: float = 0.5,
        overlays: bool = True,
        overwrite: bool = False,
        keys: KeysCollection = "pred",
    ) -> None:
        super().__init__(keys)
        if merge not in MERGE_RULES:
            raise ValueError(f"merge: {merge!r} is not one of {', '.join(MERGE_RULES)}.")
        self.output_dir = Path(output_dir)
        self.values = task_values(labels, tasks)
        self.merge, self.threshold = merge, check_threshold(threshold)
        self.overlays, self.overwrite = overlays, overwrite

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Write the masks of one item; the item passes unchanged."""
        source = Path(data["source"])
        probabilities = data[self.keys[0]].float().sigmoid().cpu()
        masks = probabilities > self.threshold
        if self.merge == "argmax":
            merged = merge_tasks(probabilities, list(self.values.values()), self.threshold)
            labels = {self.output_dir / f"{source.stem}.png": merged.numpy()}
        else:
            named = zip(self.values, masks, strict=True)
            labels = {self.output_dir / f"{source.stem}_{_plain(name)}.png": 255 * mask.numpy() for name, mask in named}
        for path in labels:
            if path.resolve() == source.resolve():
                raise ValueError(f"output_dir: {self.output_dir} is the folder of the images; choose another.")
            if path.exists() and not self.overwrite:
                raise FileExistsError(f"{path}: exists; choose another output_dir or add overwrite=true.")
        for path, label in labels.items():
            write_label(path, label)
        if self.overlays:
            write_overlay(self.output_dir / "overlays" / f"{source.stem}.png", read_image(source), masks.numpy())
        return dict(data)


def _plain(name: str) -> str:
    """A task's name as part of a file name on any system."""
    return re.sub(r"[^\w\-. ]", "_", name)
