"""Supervised baselines: fully trained convolutional and transformer networks, one for all tasks.

DeepLabV3 from torchvision, SwinUNETR-2D and DynUNet (the nnU-Net-like one) from MONAI. All of them train at batch
size 1, which a few-shot set asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.nets import DynUNet, SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.files import PathLike
from blosam_monai.networks.features import read_weights, take_resnet50, take_weights
from blosam_monai.networks.sam import import_segment_anything
from blosam_monai.networks.segmenter import Segmenter, SharedDecoder

logger = logging.getLogger(__name__)

SCRATCH = "scratch"  # the weights of a network that was not pre-trained
NORMS = ("group", "frozen_batch")
WIDTHS = {"deeplabv3": None, "swinunetr2d": 48, "dynunet": 32}  # channels of the first level; DeepLab's are fixed
GROUPS = 32  # Wu & He 2018
SIDE_MULTIPLE, MIN_SIDE = 32, 64  # pixels: five halvings, of which the last still has something to normalise over
BOTTLENECK_SIDE = 4  # pixels: nnU-Net pools while the side stays at least this long


class SupervisedNet(Segmenter):
    """A whole network trained on the images: (B, 3, S, S) -> logits (B, T, S, S); nothing is frozen or cached.

    Batch normalisation does not train at batch size 1: DeepLabV3's image-level pooling leaves one value a channel, and
    the statistics of four images are no estimate for others. So ``deeplabv3`` has group normalisation in its place
    (32 groups, as many parameters), or, on a pre-trained backbone, that backbone's own statistics and affine
    parameters, held fixed. SwinUNETR and DynUNet have instance normalisation.

    Args:
        architecture: ``deeplabv3`` (ResNet-50, output stride 8; its auxiliary head is kept, so that the parameters are
            those of the papers' tables, but frozen: the loss reads the main output alone), ``swinunetr2d`` or
            ``dynunet`` (plain, without deep supervision, with as many levels as nnU-Net plans for S).
        image_size: S in pixels; for the latter two a multiple of 32 from 64 on.
        tasks: names of the tasks, in the order of the output channels.
        width: channels of the first level: 48 for ``swinunetr2d`` (a multiple of 12), 32 for ``dynunet``, doubled from
            level to level, of ``dynunet`` up to 16 times. DeepLabV3 has none to choose.
        norm: of ``deeplabv3``: ``group`` or, the default with ``weights``, ``frozen_batch`` for the backbone.
        seed: seeds the start.
        weights: state dict to start from, ``.safetensors`` or ``.pth``: of a torchvision ResNet-50 or DeepLabV3, whose
            backbone is taken, or of the same MONAI network, of which all but the output layer is. None: from scratch.

    Attributes:
        pretrained: ``scratch`` or the SHA-256 of the weights' file.

    Raises:
        ValueError: an unknown architecture, an option that it does not have, a size it cannot halve, or weights of
            another network.
        FileNotFoundError: no file of weights.

    Source: Chen et al. 2017 (DeepLabV3), Hatamizadeh et al. 2022 (Swin UNETR), Isensee et al. 2021 (nnU-Net).
    """

    NAME = "supervised"

    def __init__(
        self,
        architecture: str,
        image_size: int,
        tasks: Sequence[str] = ("foreground",),
        *,
        width: int | None = None,
        norm: str | None = None,
        seed: int = 0,
        weights: PathLike | None = None,
    ) -> None:
        if architecture not in WIDTHS:
            raise ValueError(f"architecture: {architecture!r} is not one of {', '.join(WIDTHS)}.")
        build = _build_deeplab if architecture == "deeplabv3" else _build_monai
        settings: dict[str, Any] = {
            "architecture": architecture,
            "width": _check_width(architecture, width),
            "norm": _check_norm(architecture, norm, weights),
        }
        super().__init__(tasks, image_size, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build(image_size=image_size, tasks=len(tasks), **settings)
        self.pretrained = SCRATCH if weights is None else _take(net, weights)
        if weights is None:
            logger.warning("%s starts from scratch: the papers' figures are of pre-trained networks.", architecture)
        self.decoder = SupervisedDecoder(net, len(tasks))


class SupervisedDecoder(SharedDecoder):
    """The trained part, here all of the network: image (B, 3, S, S) -> logits (B, T, S, S).

    Args:
        net: the network.
        tasks: T.
    """

    def __init__(self, net: nn.Module, tasks: int) -> None:
        super().__init__(tasks)
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) -> logits (B, T, S, S)."""
        return self.net(image)


class _DeepLab(nn.Module):
    """torchvision's DeepLabV3, of which only the main output is computed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone: nn.Module = model.backbone
        self.classifier: nn.Module = model.classifier
        self.aux_classifier: nn.Module = model.aux_classifier

    def forward(self, image: Tensor) -> Tensor:
        logits = self.classifier(self.backbone(image)["out"])  # (B, T, S / 8, S / 8)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


def _build_deeplab(*, tasks: int, norm: str, **_: Any) -> nn.Module:
    import_segment_anything()  # makes torchvision importable beside a CPU torch
    from torchvision.models.segmentation import deeplabv3_resnet50  # type: ignore[import-untyped]
    from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

    model = _DeepLab(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=tasks, aux_loss=True))
    if norm == "frozen_batch":
        _replace_batch_norm(model.backbone, FrozenBatchNorm2d)
    _replace_batch_norm(model, lambda channels: nn.GroupNorm(GROUPS, channels))
    model.aux_classifier.requires_grad_(False)
    return model


def _replace_batch_norm(module: nn.Module, make: Callable[[int], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child.num_features))
        else:
            _replace_batch_norm(child, make)


def _build_monai(*, architecture: str, image_size: int, tasks: int, width: int, **_: Any) -> nn.Module:
    if image_size < MIN_SIDE or image_size % SIDE_MULTIPLE:
        raise ValueError(
            f"image_size: {image_size} does not suit {architecture}, which halves it five times; choose a multiple of "
            f"{SIDE_MULTIPLE} from {MIN_SIDE} on."
        )
    if architecture == "swinunetr2d":
        return SwinUNETR(in_channels=3, out_channels=tasks, feature_size=width, spatial_dims=2)
    halvings = plan_halvings(image_size)
    return DynUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=tasks,
        kernel_size=[3] * (halvings + 1),
        strides=[1] + [2] * halvings,
        upsample_kernel_size=[2] * halvings,
        filters=[width * 2 ** min(level, 4) for level in range(halvings + 1)],
    )


def plan_halvings(side: int) -> int:
    """How often a 2-D nnU-Net pools a side of so many pixels: while at least 4 remain, and the side can be halved.

    >>> plan_halvings(256), plan_halvings(224), plan_halvings(96)
    (6, 5, 4)
    """
    halvings = 0
    while side % 2 == 0 and side >= 2 * BOTTLENECK_SIDE:
        side, halvings = side // 2, halvings + 1
    return halvings


def _check_width(architecture: str, width: int | None) -> int | None:
    default = WIDTHS[architecture]
    if width is None or default is None:
        if width is not None:
            raise ValueError(f"width: {width} asked of {architecture}, whose width is fixed; leave it out.")
        return default
    step = 12 if architecture == "swinunetr2d" else 1
    if width < 1 or width % step:
        raise ValueError(f"width: {width} does not suit {architecture}; choose a positive multiple of {step}.")
    return width


def _check_norm(architecture: str, norm: str | None, weights: PathLike | None) -> str | None:
    if architecture != "deeplabv3":
        if norm is not None:
            raise ValueError(f"norm: {norm!r} asked of {architecture}, which normalises by instance; leave it out.")
        return None
    if norm is None:
        return "group" if weights is None else "frozen_batch"
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is not one of {', '.join(NORMS)}.")
    return norm


def _take(net: nn.Module, weights: PathLike) -> str:
    """Fill a network from a file; returns the file's SHA-256."""
    if isinstance(net, _DeepLab):
        return take_resnet50(net.backbone, weights)
    state, sha256 = read_weights(weights)
    take_weights(net, state, weights, fresh=("out.", "output_block."))
    return sha256
