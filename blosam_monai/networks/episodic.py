"""A few-shot network between its training on episodes and its use: its trained head, or none, and other image sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blosam_monai.files import PathLike
from blosam_monai.networks.adapters import build_network, read_adapters, save_adapters
from blosam_monai.networks.few_shot.segmenter import FewShotNet
from blosam_monai.networks.segmenter import Segmenter

_STEP = 32  # pixels: every image size of SAM and of ResNet is a multiple of it
_NEEDED = ("head", "head_options", "features", "sam_model", "image_size")  # that a head was trained with


def save_head(path: PathLike, network: FewShotNet, settings: Mapping[str, Any]) -> None:
    """Write a network's head with its settings and ``settings``; what images the network remembers is left out."""
    own = {**network.settings, "sam_weights": network.sam_weights}
    save_adapters(path, _head_state(network), {**own, **settings})


def load_head(path: PathLike, network: FewShotNet) -> None:
    """Fill a network's head, whatever the network's tasks, and put it into evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or trained with another head or other features.
    """
    state, settings = read_adapters(path)
    if "head_options" not in settings:
        raise ValueError(f"model: {path} holds no few-shot head; give the ckpt_dir of a training of bundles/biopt.")
    found = json.loads(json.dumps(network.settings))  # tuples as the file has them
    for key in _NEEDED:
        if settings[key] != found[key]:
            raise ValueError(f"{key}: {path} was trained with {settings[key]!r}, found {found[key]!r}; drop {key}.")
    if settings["sam_weights"] != network.sam_weights:
        raise ValueError(
            f"sam_checkpoint: {path} was trained on weights {settings['sam_weights'][:12]}, these "
            f"are {network.sam_weights[:12]}; give the file it was trained on."
        )
    kept = network.decoder.adapter_state()
    network.decoder.load_adapter_state({**{name: kept[name] for name in ("support", "mask")}, **state})
    network.eval()


def check_train_free(network: FewShotNet) -> None:
    """Raise where a head needs training: what is left of it by chance is no method.

    Raises:
        ValueError: how many numbers it has to train.
    """
    count = sum(value.numel() for value in _head_state(network).values())
    if count:
        raise ValueError(
            f"train_free: {network.settings['head']} has {count} numbers to train; train it, or leave out what is "
            "learned of it (head_options)."
        )


def scaled_networks(
    network: FewShotNet, scales: Sequence[float], *, sam_checkpoint: PathLike | None
) -> list[Segmenter]:
    """The network at other image sizes, for its features: a test at several scales, as [0.7, 1, 1.3] in BiOpt.

    Sizes are the nearest multiples of 32 pixels; of scale 1 it is the network itself.

    Args:
        network: with features of one map; the rows of several, as of ``pyramid``, are of one image size.
        scales: of the image size.
        sam_checkpoint: that of the network.

    Raises:
        ValueError: no scale, one that is not positive, two of the same size, or packed features.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: {list(scales)} must be positive numbers, as [1] or [0.7, 1, 1.3].")
    side, device = network.image_size, next(network.parameters()).device
    sizes = [side if s == 1 else max(_STEP, round(side * s / _STEP) * _STEP) for s in scales]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"scales: {list(scales)} are {sizes} pixels; drop those that are the same.")
    if sizes != [side] and network.settings["features"] == "pyramid":
        raise ValueError("scales: a head on features=pyramid is of one image size; give scales=[1].")
    own = {**network.settings, "sam_weights": network.sam_weights}
    return [
        network if size == side else build_network({**own, "image_size": size}, sam_checkpoint).to(device)
        for size in sizes
    ]


def _head_state(network: FewShotNet) -> dict[str, Tensor]:
    """What is trained of a network: all but the images that it remembers."""
    return {name: value for name, value in network.decoder.adapter_state().items() if name.startswith("head.")}
