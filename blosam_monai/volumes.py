"""Whole volumes: cases of a data list brought to one grid for 3-D networks, and predictions brought back.

A case is a stack of axial slices as ``LoadCased`` reads it, (C, D, H, W), 0 to 255. A network sees it as FSEFT's did:
axes to the right, front and head (RAS), cubic voxels, 0 to 1. Here the window comes first, in 8 bits (1.7 HU of FSEFT's
window a step), there after resampling; that differs only next to voxels beyond the window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms import Orientation, Spacing, SpatialResample, Transform
from torch import Tensor

from blosam_monai.data.datalist import load_datalist
from blosam_monai.files import PathLike
from blosam_monai.transforms import LoadCased

logger = logging.getLogger(__name__)

AXES = "RAS"
_PLANES = 16  # slices brought back at once: logits of a whole CT at its own grid are gigabytes


def load_volumes(
    path: PathLike,
    dataset_dir: PathLike,
    *,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    section: str | None = None,
) -> dict[str, Any]:
    """A data list for whole volumes: as ``load_datalist``, but a slice that an item names stands for its volume.

    Args:
        path, dataset_dir, seed, tasks, section: see ``load_datalist``; only ``upper`` and ``validation`` may be empty.

    Raises:
        FileNotFoundError, ValueError: see ``load_datalist``.
    """
    wanted = [section] if section else ["lower", "upper", "validation"]
    content = load_datalist(path, dataset_dir, seed=seed, tasks=tasks, section=wanted[0])
    for name in wanted[1:]:
        if content[name]:
            content[name] = load_datalist(path, dataset_dir, seed=seed, tasks=tasks, section=name)[name]
    seen: set[str] = set()
    slices = 0
    for name in wanted:
        whole = {item["image"]: {k: v for k, v in item.items() if k != "slice"} for item in content[name]}
        slices += sum("slice" in item for item in content[name])
        content[name] = [item for image, item in whole.items() if image not in seen]
        seen |= whole.keys()
    if slices:
        logger.warning("the list names %d slices; their %d whole volumes are used, labels included", slices, len(seen))
    return content


class LoadVolumed(Transform):
    """Read an item's files as ``LoadCased`` does: a gray volume of axial slices, with sizes in mm.

    Args:
        labels, tasks, label_coding, window, series, allow: see ``LoadCased``.

    Raises:
        ValueError: what ``LoadCased`` refuses, a picture, a volume of unknown voxel size or in colour.
    """

    def __init__(self, labels: Any, tasks: Sequence[str] | None = None, label_coding: str = "index", **options: Any):
        self.load = LoadCased(labels, tasks, label_coding, slice_axis="axial", **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the files of one item."""
        item = self.load(data)
        channels, depth = item["image"].shape[:2]
        if item["unit"] != "mm" or depth < 2:
            found = f"{depth} slice" if depth < 2 else f"{depth} slices of unknown size"
            raise ValueError(f"{item['source']}: has {found}; give a volume whose file says its voxels' size in mm.")
        if channels != 1:
            raise ValueError(f"{item['source']}: gives {channels} channels; a gray volume and one window are needed.")
        return item


class CaseToVolumed(Transform):
    """A case -> ``image`` (1, D, H, W) of 0 to 1, ``label`` (T, D, H, W) and ``foreground`` (1, D, H, W), any task.

    As MONAI's tensors that know where they lie, for MONAI's transforms. ``foreground`` is what patches are drawn by:
    ``RandCropByPosNegLabeld`` takes the first of several channels for background.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, MetaTensor]:
        """Turn one item; what a network does not need is left out."""
        affine = upright_affine([float(size) for size in data["spacing"]])
        label = data["label"].float()
        return {
            "image": MetaTensor(data["image"].float() / 255, affine=affine),
            "label": MetaTensor(label, affine=affine),
            "foreground": MetaTensor(label.amax(0, keepdim=True), affine=affine),
        }


def upright_affine(spacing: Sequence[float]) -> Tensor:
    """Indices (d, h, w) of upright axial slices -> mm to the right, front and head; (4, 4).

    Slices lead to the head, rows to the back, columns to the left.
    """
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1
    return affine


class VolumeInferer(Inferer):
    """A case of axial slices (1, D, H, W), 0 to 255 -> its prediction on the same grid, by patches of the 3-D network.

    Brought to the network's grid, segmented in overlapping patches, weighted by a Gaussian, and brought back.

    Args:
        roi_size: side of a patch in voxels.
        pixdim: side of a voxel in mm.
        decide: logits of a slice (T, H, W) -> what is kept of it, (..., H, W); None: the logits, in half precision.
        overlap: of neighbouring patches, a share of their side.
        batch_size: patches in one call of the network.
    """

    def __init__(
        self,
        roi_size: int,
        pixdim: float = 1.5,
        *,
        decide: Callable[[Tensor], Tensor] | None = None,
        overlap: float = 0.25,
        batch_size: int = 1,
    ) -> None:
        self.roi_size, self.decide, self.overlap, self.batch_size = roi_size, decide, overlap, batch_size
        self.orientation = Orientation(axcodes=AXES, labels=None)
        self.spacing = Spacing(pixdim=(pixdim,) * 3, mode="bilinear")

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: Any, *args: Any, spacing: Sequence[float] = (1, 1, 1), **kwargs: Any
    ) -> Tensor:
        """Segment a case, ``spacing`` in mm of D, H and W; returns (..., D, H, W) on the CPU, see ``decide``."""
        device = next(network.parameters()).device
        affine = upright_affine(spacing)
        volume = self.spacing(self.orientation(MetaTensor(inputs.float() / 255, affine=affine)))
        logits = sliding_window_inference(
            volume.as_tensor()[None].to(device),
            (self.roi_size,) * 3,
            self.batch_size,
            network,
            overlap=self.overlap,
            mode="gaussian",
            device="cpu",
        )
        return self._bring_back(MetaTensor(logits[0].float(), affine=volume.affine), inputs.shape[1:], affine)

    def _bring_back(self, logits: MetaTensor, shape: Sequence[int], affine: Tensor) -> Tensor:
        """Logits (T, X, Y, Z) -> what ``decide`` keeps of them on the case's grid, some slices at a time."""
        resample = SpatialResample(mode="bilinear", padding_mode="border")
        kept = []
        for first in range(0, shape[0], _PLANES):
            shift = torch.eye(4, dtype=affine.dtype)
            shift[0, 3] = first
            size = (min(_PLANES, shape[0] - first), *shape[1:])
            block = resample(logits, dst_affine=affine @ shift, spatial_size=size).as_tensor()  # (T, n, H, W)
            planes = [plane.half() if self.decide is None else self.decide(plane) for plane in block.unbind(1)]
            kept.append(torch.stack(planes, dim=planes[0].ndim - 2))
        return torch.cat(kept, dim=kept[0].ndim - 3)
