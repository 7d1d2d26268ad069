"""The segmenter of organs in volumes: MONAI's SwinUNETR in 3-D, adapted by one of the methods of ``peft``; on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor

from blosam_monai.files import PathLike
from blosam_monai.networks.adapters import read_adapters, save_adapters
from blosam_monai.networks.features import read_weights, take_weights
from blosam_monai.networks.peft import Adaptation, adapt, trained_state
from blosam_monai.networks.segmenter import load_tensors

logger = logging.getLogger(__name__)

SCRATCH = "scratch"  # the weights of a network that was not pre-trained
HEAD = ("out.",)  # the new 1 x 1 x 1 convolution; always trained
SIDE_MULTIPLE, MIN_SIDE = 32, 64  # voxels: five halvings, of which the last still has something to normalise over
# What a model is before it is trained: lets tools look at the network of the bundle.
UNTRAINED = {
    "network": "swinunetr3d",
    "tasks": ["organ"],
    "feature_size": 48,
    "method": "linear_probe",
    "train_also": [],
    "effective_ranks": {},
    "pretrained": SCRATCH,
    "sam_weights": "none",
    "roi_size": 96,
    "pixdim": 1.5,
    "window": [-175, 250],
    "labels": {"background": 0, "organ": 1},
    "label_coding": "index",
    "snomed": {},
}


class VolumeSegmenter(SwinUNETR):
    """Volume (B, 1, X, Y, Z), 0 to 1, RAS -> logits (B, T, X, Y, Z), one foreground logit a task.

    Args:
        tasks: names of the tasks, in the order of the output channels.
        feature_size: channels of the first level, a multiple of 12; 48 in FSEFT.
        use_checkpoint: keep less for the backward pass and compute it again: less memory, more time.
        checkpoint: state dict of a pre-trained SwinUNETR of this size, ``.safetensors`` or ``.pth``, of which all but
            the head is taken. None: from scratch.
        seed: of what starts at random.

    Attributes:
        pretrained: ``scratch`` or the SHA-256 of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one of another network.

    Source: Hatamizadeh et al. 2022 (Swin UNETR); Silva-Rodriguez et al. 2025 (FSEFT).
    """

    prompted = False  # takes no prompts, as a ``Segmenter`` says it
    sam_weights = "none"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        feature_size: int = 48,
        use_checkpoint: bool = False,
        checkpoint: PathLike | None = None,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                in_channels=1, out_channels=len(tasks), feature_size=feature_size, use_checkpoint=use_checkpoint
            )
        self.tasks, self.feature_size, self.pretrained = list(tasks), feature_size, SCRATCH
        if checkpoint is None:
            logger.warning("SwinUNETR starts from scratch: the figures of FSEFT and ARENA are of a foundation model.")
        else:
            state, self.pretrained = read_weights(checkpoint)
            take_weights(self, state, checkpoint, fresh=HEAD)

    def kept_state(self) -> dict[str, Tensor]:
        """What a file must hold to rebuild the network: of a pre-trained one what was trained, else everything."""
        if self.pretrained == SCRATCH:
            return {name: value.detach() for name, value in self.state_dict().items()}
        return trained_state(self)


def check_roi(roi_size: int) -> None:
    """Raise where patches of this side do not suit SwinUNETR.

    Raises:
        ValueError: the side and what would suit.
    """
    if roi_size < MIN_SIDE or roi_size % SIDE_MULTIPLE:
        raise ValueError(f"roi_size: {roi_size} voxels; choose a multiple of {SIDE_MULTIPLE} from {MIN_SIDE} on.")


def save_adapted(
    path: PathLike, network: VolumeSegmenter, adaptation: Adaptation, settings: Mapping[str, Any]
) -> dict[str, int]:
    """Prune the updates, log their ranks, write the model; returns the ranks by layer name.

    Args:
        path: the ``.safetensors`` file, see ``save_adapters``.
        network: as trained.
        adaptation: the network's.
        settings: what the file says beside the network's own.
    """
    ranks = adaptation.finish()
    for layer, rank in ranks.items():
        logger.info("effective rank of %s: %d", layer, rank)
    own = {
        "network": UNTRAINED["network"],
        "tasks": network.tasks,
        "feature_size": network.feature_size,
        "pretrained": network.pretrained,
        "sam_weights": network.sam_weights,
        "effective_ranks": ranks,
    }
    save_adapters(path, network.kept_state(), {**settings, **own})
    return ranks


def read_volume_settings(path: PathLike) -> dict[str, Any]:
    """The settings of a trained model; where there is none yet, those of the untrained default network.

    Raises:
        ValueError: a model of another network.
    """
    if not Path(path).is_file():
        return dict(UNTRAINED)
    settings = read_adapters(path)[1]
    if settings.get("network") != UNTRAINED["network"]:
        raise ValueError(f"model: {path} is a {settings.get('network')!r}, not a SwinUNETR; use the bundle it is of.")
    return settings


def build_volume_segmenter(settings: Mapping[str, Any], checkpoint: PathLike | None = None) -> VolumeSegmenter:
    """The network that the settings of a model describe, ready to take its tensors.

    Args:
        settings: see ``read_volume_settings``.
        checkpoint: the pre-trained weights that it was trained on.

    Raises:
        ValueError: other weights than those it was trained on.
    """
    network = VolumeSegmenter(settings["tasks"], feature_size=settings["feature_size"], checkpoint=checkpoint)
    if network.pretrained != settings["pretrained"]:
        raise ValueError(
            f"checkpoint: the model was trained on weights {settings['pretrained'][:12]}, these are "
            f"{network.pretrained[:12]}; give the checkpoint it was trained on."
        )
    ranks = list(settings["effective_ranks"].values())
    method = "lora" if ranks else settings["method"]
    adapt(network, method, head=HEAD, rank=ranks or None, train_also=settings["train_also"])
    return network


def load_volume_segmenter(path: PathLike, *, into: VolumeSegmenter) -> VolumeSegmenter:
    """Fill a network of ``build_volume_segmenter`` with a trained model; in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or another model's.
    """
    load_tensors(into.kept_state(), read_adapters(path)[0])
    return into.eval()
