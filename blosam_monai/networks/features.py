"""Frozen convolutional features for few-shot heads: torchvision's ResNet-50, from a file of weights or random."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blosam_monai.files import PathLike, file_sha256
from blosam_monai.networks.sam import RANDOM, import_segment_anything

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]  # (C, h, w) of a map

LAYERS = ("layer4", "layer3", "layer2+3", "pyramid")
STRIDE = 32  # pixels to a place of the last layer, undilated: an image is a multiple of it


class ResNetFeatures(nn.Module):
    """ResNet-50, frozen: image (B, 3, S, S), preprocessed -> the embedding that a few-shot head reads.

    The input is normalised by ImageNet's mean and deviation, which are SAM's: ``PreprocessImaged`` with ``sam``.
    Batch normalisation uses its stored statistics, in training mode too.

    Args:
        image_size: S in pixels, a multiple of 32.
        weights: torchvision's ResNet-50 (or DeepLabV3-ResNet-50, whose backbone is taken), ``.pth`` or
            ``.safetensors``; None: random weights, which show that the machine runs, not accuracy.
        layers: which maps the embedding is. ``layer4``: (B, 2048, S/8, S/8), dilated, without the last ReLU (BiOpt);
            ``layer3``: (B, 1024, S/8, S/8), dilated (SSP); ``layer2+3``: both, concatenated, (B, 1536, S/8, S/8)
            (RPMMs); ``pyramid``: what the 13 bottlenecks of layers 2 to 4 give before their last ReLU, undilated, 4 at
            S/8, 6 at S/16 and 3 at S/32 (HSNet), as one row (B, L) that ``unpack`` takes apart.
        seed: seeds random weights.

    Attributes:
        weights: ``random`` or the SHA-256 of the file.
        shapes: (C, h, w) of each map.

    Raises:
        ValueError: unknown layers, an image size that 32 does not divide, or a file of another network.
        FileNotFoundError: no such file.

    Source: He et al. 2016; Liu et al. 2020 (BiOpt), Fan et al. 2022 (SSP), Min et al. 2021 (HSNet), their backbones.
    """

    def __init__(
        self, image_size: int, weights: PathLike | None = None, *, layers: str = "layer4", seed: int = 0
    ) -> None:
        super().__init__()
        if layers not in LAYERS:
            raise ValueError(f"layers: {layers!r} is not one of {', '.join(LAYERS)}.")
        if image_size < STRIDE or image_size % STRIDE:
            raise ValueError(f"image_size: {image_size} is no positive multiple of {STRIDE} pixels, as ResNet needs.")
        self.layers = layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = _resnet50(dilated=layers != "pyramid")
        if weights is None:
            self.weights = RANDOM
            logger.warning("ResNet-50 has random weights: it shows that the machine runs, not accuracy.")
        else:
            self.weights = take_resnet50(self.net, weights)
        self.requires_grad_(False)
        self.shapes = _shapes(layers, image_size)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) -> one map (B, C, S/8, S/8), of ``pyramid`` a row (B, L)."""
        net = self.net
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))  # (B, 256, S / 4, S / 4)
        if self.layers == "pyramid":
            maps = []
            for block in (*net.layer2, *net.layer3, *net.layer4):
                maps.append(_before_last_relu(block, x))
                x = maps[-1].relu()
            return pack(maps)
        second = net.layer2(x)  # (B, 512, S / 8, S / 8)
        third = net.layer3(second)  # (B, 1024, S / 8, S / 8)
        if self.layers == "layer2+3":
            return torch.cat((second, third), dim=1)
        if self.layers == "layer3":
            return third
        return _before_last_relu(net.layer4[-1], net.layer4[:-1](third))  # (B, 2048, S / 8, S / 8)

    def unpack(self, embedding: Tensor) -> list[Tensor]:
        """The maps of an embedding of this network: (..., L) or (..., C, h, w) -> each (..., C, h, w)."""
        return unpack(embedding, self.shapes) if self.layers == "pyramid" else [embedding]


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Maps, each (B, C, h, w) of its own size -> one row an image (B, L)."""
    return torch.cat([one.flatten(1) for one in maps], dim=1)


def unpack(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Rows (..., L) -> the maps that were packed, each (..., C, h, w).

    Raises:
        ValueError: a length that is not that of the shapes.
    """
    lengths = [math.prod(shape) for shape in shapes]
    if packed.shape[-1] != sum(lengths):
        raise ValueError(f"embedding: its rows hold {packed.shape[-1]} values, maps of {list(shapes)} {sum(lengths)}.")
    parts = packed.split(lengths, dim=-1)
    return [part.reshape(*packed.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _shapes(layers: str, image_size: int) -> list[Shape]:
    side = image_size // 8
    if layers == "pyramid":
        blocks = ((4, 512, side), (6, 1024, side // 2), (3, 2048, side // 4))
        return [(channels, size, size) for count, channels, size in blocks for _ in range(count)]
    return [({"layer4": 2048, "layer3": 1024, "layer2+3": 512 + 1024}[layers], side, side)]


def _resnet50(*, dilated: bool) -> Any:
    """ResNet-50 without its classifier; dilated, its output stride is 8 instead of 32."""
    import_segment_anything()  # makes torchvision importable beside a CPU torch
    from torchvision.models import resnet50  # type: ignore[import-untyped]
    from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

    dilation = [False, dilated, dilated]
    net = resnet50(weights=None, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=dilation)
    del net.fc
    return net


def _before_last_relu(block: Any, x: Tensor) -> Tensor:
    """What a bottleneck adds up: its three convolutions and its shortcut, before the ReLU that ends it."""
    y = block.relu(block.bn1(block.conv1(x)))
    y = block.relu(block.bn2(block.conv2(y)))
    y = block.bn3(block.conv3(y))
    return y + (x if block.downsample is None else block.downsample(x))


def read_weights(path: PathLike) -> tuple[dict[str, Tensor], str]:
    """The tensors of a ``.safetensors`` or ``.pth`` file, without pickle's code, and the SHA-256 of its bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no flat state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist; give a file of pre-trained weights or leave it out.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"weights: {path} cannot be read as tensors ({type(error).__name__}); it is damaged or another kind of "
            "file: replace it."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} holds no flat state dict of tensors; save the network's state_dict() alone.")
    return dict(state), file_sha256(path)


def take_weights(network: nn.Module, state: Mapping[str, Tensor], path: PathLike, fresh: tuple[str, ...] = ()) -> None:
    """Copy a state dict into a network, all but the parts whose names begin with ``fresh``.

    Raises:
        ValueError: tensors that are missing, foreign or misshapen.
    """
    state = {name: value for name, value in state.items() if not name.startswith(fresh)}
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(fresh)}
    counters = {name for name in (*state, *own) if name.endswith("num_batches_tracked")}
    unique = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}  # one of several names
    problems = {
        "missing": sorted((own.keys() & unique) - state.keys() - counters),
        "not known": sorted(state.keys() - own.keys() - counters),
        "of another shape": sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape),
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"weights: {path} is not of this network: {len(names)} tensors {problem} (first: {names[0]}); give the "
                "weights of this architecture, or leave them out to start from scratch."
            )
    network.load_state_dict(state, strict=False)


def take_resnet50(backbone: nn.Module, path: PathLike) -> str:
    """Fill the convolutional part of a ResNet-50 from torchvision's ResNet-50 or DeepLabV3 file; returns its SHA-256.

    Raises:
        FileNotFoundError, ValueError: see ``read_weights`` and ``take_weights``.
    """
    state, sha256 = read_weights(path)
    take_weights(
        backbone,
        {name.removeprefix("backbone."): value for name, value in state.items()},
        path,
        fresh=("fc.", "classifier.", "aux_classifier."),
    )
    return sha256
