"""From files to network input and from logits to label maps: dictionary transforms of one item.

An item has the keys ``image label pred embedding``. A case is a stack of upright slices, ``image`` (C, D, H, W) and
``label`` (T, D, H, W), D = 1 for a picture; training is on single slices, (3, H, W) and (T, H, W). Beside them stand
``source`` (path of the image), ``spacing`` (mm, or 1 where the unit is the pixel), ``native_size`` and ``input_size``
((H, W) in pixels) and, of a case, ``grid``: what puts a prediction back into its file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from scipy.ndimage import binary_fill_holes, zoom
from scipy.ndimage import label as connected_components
from torch import Tensor
from torch.nn import functional as F

from blosam_monai.data.geometry import Image, check_slice_axis, choose_slice_axis, spacing, upright
from blosam_monai.data.readers import dicom, read_image, read_label
from blosam_monai.data.tasks import Labels, check_names, check_values, known_values, task_values
from blosam_monai.data.windows import Window, check_window, display_stack, window_channels
from blosam_monai.files import case_hash
from blosam_monai.networks.prompted_sam import label_prompts
from blosam_monai.networks.sam import PIXEL_MEAN, PIXEL_STD

logger = logging.getLogger(__name__)

Item = dict[Hashable, Any]

PREPROCESS = ("sam", "paper")
MERGE_RULES = ("argmax", "separate")


class LoadCased(Transform):
    """Read an item's files: paths become ``image`` (C, D, H, W), 0 to 255, and, if any, ``label`` (T, D, H, W).

    An item with the key ``slice`` becomes that slice alone. What the readers had to decide is logged under the case's
    hash and kept as ``notes``.

    Args:
        labels: the data list's names and values.
        tasks: names of the tasks, see ``task_values``.
        label_coding: see ``read_label``.
        window, neighbours: see ``data.windows``.
        slice_axis: ``axial``, ``coronal`` or ``sagittal``; None: as the volume was acquired.
        counted_along: axis along which the items count their ``slice``; default: ``slice_axis``.
        series, allow: see ``read_image``; an item's own ``series`` comes first.

    Raises:
        ValueError: image or label cannot be used, or the label holds a value that the list does not name.
    """

    def __init__(
        self,
        labels: Labels,
        tasks: Sequence[str] | None = None,
        label_coding: str = "index",
        *,
        window: Window = None,
        neighbours: int = 0,
        slice_axis: str | None = None,
        counted_along: str | None = None,
        series: str | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.values = task_values(labels, tasks)
        self.labels, self.known = labels, known_values(labels)
        self.coding = label_coding
        self.window, self.neighbours, self.slice_axis = check_window(window), neighbours, slice_axis
        self.series, self.allow = series, (allow,) if isinstance(allow, str) else tuple(allow)
        if neighbours and window_channels(window) == 3:
            raise ValueError(f"neighbours: {neighbours} asked for beside three windows; an image has three channels.")
        self.counted_along = counted_along or slice_axis
        dicom.check_flaws(self.allow)
        if slice_axis is not None:
            check_slice_axis(slice_axis)
        check_values(labels, label_coding)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Read the files of one item."""
        item = dict(data)
        image = read_image(item["image"], series=item.get("series", self.series), allow=self.allow)
        slice_axis = self.slice_axis or choose_slice_axis(image)
        orientation, number = upright(image, slice_axis), item.get("slice")
        if number is not None and self.counted_along not in (None, slice_axis):
            raise ValueError(
                f"slice_axis: {slice_axis} asked for, the slices of the list are {self.counted_along}; leave it out."
            )
        stack = display_stack(image, orientation, self.window, neighbours=self.neighbours, number=number)
        sizes = spacing(image.affine)
        notes = image.notes
        if "label" in item:
            item["label"], more = self._read_tasks(item["label"], image, number, orientation.apply)
            notes += more
        identity = case_hash(item["image"]) if notes else ""
        for note in notes:
            logger.warning("case %s: %s", identity, note)
        return item | {
            "image": torch.from_numpy(stack),
            "source": str(item["image"]),
            "spacing": torch.tensor([sizes[axis] for axis in orientation.order], dtype=torch.float64),
            "unit": "pixel" if image.affine is None else "mm",
            "slice_axis": slice_axis,
            "orientation": orientation,
            "grid": replace(image, values=np.broadcast_to(np.uint8(0), image.shape)),  # all but the voxels
            "notes": notes,
        }

    def _read_tasks(self, path: Any, image: Image, number: int | None, turned: Any) -> tuple[Tensor, tuple[str, ...]]:
        label = read_label(path, self.coding, image=image)
        if self.coding == "threshold":
            masks = [label.mask([1])]
        else:
            if isinstance(label.values, Mapping):
                label = replace(
                    label,
                    notes=(*label.notes, *check_names(path, label.names, self.labels, self.coding)),
                )
            else:
                self._check_known(path, label.counts())
            masks = [label.mask(values) for values in self.values.values()]
        chosen = slice(None) if number is None else slice(number, number + 1)
        stack = np.stack([turned(mask)[chosen] for mask in masks]).astype(np.uint8)
        return torch.from_numpy(stack), label.notes

    def _check_known(self, path: Any, counts: Mapping[Any, int]) -> None:
        foreign = sorted(set(counts) - self.known)
        if foreign:
            raise ValueError(
                f"{path}: label value {foreign[0]} is not in the data list's labels ({sorted(self.known - {0})}); add "
                f'it there ("background": [0, {foreign[0]}] if it is none of yours), or set "label_coding": '
                '"threshold" for masks of 0 and 255.'
            )


class SliceToPictured(Transform):
    """A case of one slice -> a picture to train on: ``image`` (3, H, W), ``label`` (T, H, W), as float32.

    Raises:
        ValueError: several slices.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Turn one item."""
        item = {key: value for key, value in data.items() if key not in ("grid", "orientation", "notes")}
        depth = item["image"].shape[1]
        if depth > 1:
            raise ValueError(f'{item["source"]}: has {depth} slices; name one by "slice" in the data list.')
        item["image"] = picture_of(item["image"][:, 0])
        item["native_size"] = torch.tensor(item["image"].shape[1:])
        item["spacing"] = item["spacing"][1:]
        if "label" in item:
            item["label"] = item["label"][:, 0].float()
        return item


def picture_of(channels: Tensor) -> Tensor:
    """A slice of 1 or 3 channels (C, H, W) -> (3, H, W) float32."""
    return channels.float().expand(3, -1, -1)


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
        sizes = [float(v) for v in item.get("spacing", (1, 1))]
        item[self.keys[0]], size = preprocess_picture(item[self.keys[0]], self.image_size, self.mode, spacing=sizes)
        item["input_size"] = torch.tensor(size)
        return item


def preprocess_picture(
    image: Tensor, side: int, mode: str = "sam", *, spacing: Sequence[float] = (1, 1)
) -> tuple[Tensor, tuple[int, int]]:
    """A picture (3, H, W), 0 to 255 -> network input (3, S, S) and the (height, width) of it that hold the picture.

    ``spacing`` is the size of a pixel: what is not square in the file is made square, as SAM knows it.
    """
    height, width = image.shape[1:]
    if mode == "paper":
        squashed = zoom(image.cpu().numpy() / 255, (1, side / height, side / width), order=3)
        return torch.from_numpy(np.ascontiguousarray(squashed)).to(image.device), (side, side)
    height, width = input_size(height, width, side, spacing)
    image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return F.pad((image - mean) / std, (0, side - width, 0, side - height)), (height, width)


def input_size(height: int, width: int, side: int, spacing: Sequence[float] = (1, 1)) -> tuple[int, int]:
    """Size in pixels of a picture whose longer side is resized to ``side``, rounded as SAM does; at least 1.

    >>> input_size(310, 700, 256)
    (113, 256)
    >>> input_size(20, 100, 256, spacing=(5, 1))  # 100 mm by 100 mm
    (256, 256)
    """
    down, across = height * spacing[0], width * spacing[1]
    scale = side / max(down, across)
    return min(side, max(1, int(down * scale + 0.5))), min(side, max(1, int(across * scale + 0.5)))


class LabelToGridd(MapTransform):
    """Label (T, H, W) -> the decoder's grid (T, G, G), where the loss is taken; nearest, as published.

    Args:
        image_size, grid_size: S and G in pixels, both of the ``Segmenter``.
    """

    def __init__(self, image_size: int, grid_size: int, keys: KeysCollection = "label") -> None:
        super().__init__(keys)
        self.image_size, self.grid_size = image_size, grid_size

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Bring the label of one preprocessed item to the grid."""
        item = dict(data)
        label = label_to_input(item[self.keys[0]], item["input_size"].tolist(), self.image_size)
        item[self.keys[0]] = F.interpolate(label[None], (self.grid_size, self.grid_size), mode="nearest-exact")[0]
        return item


def label_to_input(label: Tensor, input_size: Sequence[int], image_size: int) -> Tensor:
    """Label (T, H, W) of a picture -> (T, S, S), where the network's input has it; nearest."""
    height, width = input_size
    resized = F.interpolate(label[None], (height, width), mode="nearest-exact")[0]
    return F.pad(resized, (0, image_size - width, 0, image_size - height))


class LabelPromptd(MapTransform):
    """Add ``prompt`` (T, 8), taken from the label of a preprocessed picture, see ``label_prompts``: an oracle.

    Args:
        image_size: S in pixels.
        prompted: whether the network takes prompts; else items pass unchanged.
    """

    def __init__(self, image_size: int, *, prompted: bool, keys: KeysCollection = "label") -> None:
        super().__init__(keys)
        self.image_size, self.prompted = image_size, prompted

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Add the prompts of one item."""
        item = dict(data)
        if self.prompted:
            height, width = item["input_size"].tolist()
            label = label_to_input(item[self.keys[0]], (height, width), self.image_size)
            item["prompt"] = label_prompts(label[:, :height, :width])  # padding is not the picture's background
        return item


class RestoreSized(MapTransform):
    """Logits at input size (T, S, S) -> logits on the picture's own grid (T, H, W)."""

    def __init__(self, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Restore the logits of one item."""
        item = dict(data)
        sizes = ([int(v) for v in item[key]] for key in ("input_size", "native_size"))
        item[self.keys[0]] = restore_logits(item[self.keys[0]], *sizes)
        return item


def restore_logits(logits: Tensor, input_size: Sequence[int], native_size: Sequence[int]) -> Tensor:
    """Logits at input size (T, S, S) -> (T, H, W) of the picture: cropped, then bilinear, as in SAM."""
    height, width = input_size
    cropped = logits[None, :, :height, :width]
    return F.interpolate(cropped, tuple(native_size), mode="bilinear", align_corners=False)[0]


class BinariseTasksd(MapTransform):
    """Logits (T, H, W) -> masks (T, H, W) of 0 and 1: foreground where the probability is above the threshold."""

    def __init__(self, threshold: float = 0.5, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)
        self.threshold = check_threshold(threshold)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Binarise the logits of one item."""
        item = dict(data)
        item[self.keys[0]] = binarise_tasks(item[self.keys[0]], self.threshold)
        return item


def check_threshold(threshold: float) -> float:
    """The threshold, if it is a probability that something can be above and below."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold} is not a probability between 0 and 1.")
    return threshold


def binarise_tasks(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Logits of T tasks (T, ...) -> masks (T, ...) of 0 and 1, uint8; tasks may overlap."""
    return (logits > _logit(threshold)).to(torch.uint8)


def merge_tasks(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Logits of T tasks (T, ...) -> task numbers (...), 1 to T, uint8; where several claim a pixel, the surest wins.

    A pixel gets the task of highest probability if that is above the threshold, else 0, background. Of equal ones the
    earlier task wins.

    >>> merge_tasks(torch.tensor([[[2.0, 0.5, -0.5]], [[1.0, 1.5, 0.0]]]))
    tensor([[1, 2, 0]], dtype=torch.uint8)
    """
    best, task = logits.max(dim=0)
    return torch.where(best > _logit(threshold), task + 1, 0).to(torch.uint8)


def decide_plane(logits: Tensor, merge: str = "separate", threshold: float = 0.5) -> Tensor:
    """Logits of a slice (T, H, W) -> task numbers (H, W) for ``argmax``, masks (T, H, W) for ``separate``."""
    return merge_tasks(logits, threshold) if merge == "argmax" else binarise_tasks(logits, threshold)


class DecideTasksd(MapTransform):
    """Where a prediction is still logits (T, D, H, W): keep them as ``logits``, decide slice by slice.

    Args:
        merge, threshold: see ``decide_plane``.
    """

    def __init__(self, merge: str = "separate", threshold: float = 0.5, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)
        self.merge, self.threshold = merge, check_threshold(threshold)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Decide one item; a decided one passes."""
        item = dict(data)
        pred = item[self.keys[0]]
        if pred.is_floating_point():
            item["logits"] = pred
            planes = [decide_plane(plane.float(), self.merge, self.threshold) for plane in pred.unbind(1)]
            item[self.keys[0]] = torch.stack(planes, dim=planes[0].ndim - 2)
        return item


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


class CleanTasksd(MapTransform):
    """Fill the holes of some tasks, keep of some the largest connected component.

    On masks (T, D, H, W) of 0 and 1 or on a merged map (D, H, W) of task numbers, uint8; there a filled hole takes
    background only. Components hang together by faces; a hole is background that no path of faces leads out of.

    Args:
        tasks: names of the T tasks.
        largest_component, fill_holes: names of the tasks this is done for; true for all, false for none.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        largest_component: bool | Sequence[str] = False,
        fill_holes: bool | Sequence[str] = False,
        keys: KeysCollection = "pred",
    ) -> None:
        super().__init__(keys)
        self.steps = [
            *((t, binary_fill_holes) for t in _chosen("fill_holes", fill_holes, tasks)),
            *((t, _largest_component) for t in _chosen("largest_component", largest_component, tasks)),
        ]

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Clean the prediction of one item, in place."""
        pred = data[self.keys[0]].numpy()
        for t, change in self.steps:
            number = 1 if pred.ndim == 4 else t + 1
            whole = pred[t] if pred.ndim == 4 else pred
            box = whole[_bounding_box(whole == number)]
            before = box == number
            after = change(before[0])[None] if len(whole) == 1 else change(before)  # one slice has holes in its plane
            box[before & ~after] = 0
            box[after & (box == 0)] = number
        return dict(data)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The box that holds a mask; empty for an empty one."""
    extents = [np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis))) for axis in range(3)]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) if e.size else slice(0, 0) for e in extents)


def _chosen(key: str, wanted: bool | Sequence[str], tasks: Sequence[str]) -> list[int]:
    """Numbers of the tasks that an option names."""
    names = list(tasks) if wanted is True else [] if wanted is False else list(wanted)
    unknown = [name for name in names if name not in tasks]
    if unknown:
        raise ValueError(f"{key}: {unknown[0]!r} is not one of the tasks {', '.join(tasks)}.")
    return [list(tasks).index(name) for name in names]


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest component; of equal ones the first. SciPy, since MONAI's needs scikit-image."""
    components, count = connected_components(mask)
    if count < 2:
        return mask
    return components == 1 + np.argmax(np.bincount(components.ravel())[1:])
