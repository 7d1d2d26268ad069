"""Trained segmenters on disk: what was trained (of BLO-SAM 1 MB a task), and the settings that rebuild the rest.

Nothing is pickled. ``<name>.safetensors`` is complete in itself: its header carries the settings as JSON.
``<name>.json`` beside it is a copy for people and other tools.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blosam_monai.files import PathLike, atomic
from blosam_monai.networks.few_shot.segmenter import FewShotNet
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.prompted_sam import PromptedSam
from blosam_monai.networks.sam import RANDOM
from blosam_monai.networks.segmenter import Segmenter
from blosam_monai.networks.supervised import SupervisedNet

_HEADER = "blosam_monai"
NETWORKS: dict[str, type[Segmenter]] = {n.NAME: n for n in (PromptSam, PromptedSam, FewShotNet, SupervisedNet)}
# What a network without adapters is: lets tools look at the network of a bundle that is not trained yet.
UNTRAINED = {
    "network": PromptSam.NAME,
    "sam_model": "tiny",
    "sam_weights": RANDOM,
    "image_size": 256,
    "tasks": ["foreground"],
    "prompt": "dense",
    "head": "sam",
    "lora_rank": 4,
    "train_decoder": "lora",
    "train_encoder": "frozen",
    "encoder_rank": 4,
    "mask_prompt": False,
    "preprocess": "sam",
    "labels": {"background": 0, "foreground": 1},
    "label_coding": "index",
    "slice_axis": None,
    "window": None,
    "neighbours": 0,
    "snomed": {},
}


def save_adapters(path: PathLike, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write the tensors of ``PromptDecoder.adapter_state`` and the settings; each file appears whole or not at all."""
    path, text = Path(path), json.dumps(settings, indent=1)
    with atomic(path) as part:
        part.write_bytes(save({name: value.contiguous().cpu() for name, value in state.items()}, {_HEADER: text}))
    with atomic(path.with_suffix(".json")) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_adapters(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not written by ``save_adapters``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model: {path} does not exist; train one, or give the output_dir of a training.")
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[_HEADER])
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {path} is damaged or not a model of blosam_monai ({error}).") from error


def read_settings(path: PathLike) -> dict[str, Any]:
    """The settings of trained adapters; where there are none yet, those of the untrained default network."""
    return read_adapters(path)[1] if Path(path).is_file() else dict(UNTRAINED)


def build_network(settings: Mapping[str, Any], sam_checkpoint: PathLike | None = None) -> Segmenter:
    """The network that the settings of a model describe, as before its training.

    Args:
        settings: see ``read_settings``; those of a model of an earlier version lack what it did not know.
        sam_checkpoint: see ``build_sam``.

    Raises:
        ValueError: a network that this version does not know.
    """
    name = settings.get("network", PromptSam.NAME)
    if name not in NETWORKS:
        raise ValueError(f"network: {name!r} is not one of {', '.join(NETWORKS)}; the model is of a newer version.")
    arguments = inspect.signature(NETWORKS[name]).parameters
    given = {key: value for key, value in settings.items() if key in arguments and key != "seed"}
    if "sam_checkpoint" in arguments:
        unasked = sam_checkpoint is None and settings.get("sam_weights") == RANDOM
        given["sam_checkpoint"] = RANDOM if unasked else sam_checkpoint
    return NETWORKS[name](**given)


def load_network(path: PathLike, sam_checkpoint: PathLike | None = None, *, into: Segmenter | None = None) -> Segmenter:
    """The trained network in evaluation mode, rebuilt from what was trained and the SAM it was trained on.

    Args:
        path: the file that ``save_adapters`` wrote.
        sam_checkpoint: see ``build_sam``.
        into: a network of ``build_network`` to fill instead of building one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another network, or other SAM weights than those the adapters were trained on.
    """
    state, settings = read_adapters(path)
    network = into or build_network(settings, sam_checkpoint)
    for key, value in network.settings.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{key}: {path} was trained with {settings[key]!r}, found {value!r}; drop {key}.")
    if network.sam_weights != settings["sam_weights"]:
        raise ValueError(
            f"sam_checkpoint: {path} was trained on SAM weights {settings['sam_weights'][:12]}, these are "
            f"{network.sam_weights[:12]}; give the checkpoint it was trained on."
        )
    network.decoder.load_adapter_state(state)
    return network.eval()


def export_model_pt(path: PathLike, network: Segmenter) -> None:
    """Write the adapters as the ``model.pt`` that ``monai.bundle.load`` and MONAI Label look for.

    The one file in a pickle's wrapping, for tools that read no other: plain tensors under the names of ``network``'s
    own state dict, loading with ``weights_only=True``.

    Raises:
        ValueError: a few-shot network, whose remembered images have no place in an untrained one.
    """
    if isinstance(network, FewShotNet):
        raise ValueError("model.pt: a few-shot network remembers images and is read by load_network only.")
    kept = {id(p) for p in (*network.lower_parameters(), *network.upper_parameters())}
    if network.decoder.shared:  # statistics of a normalisation; a PromptDecoder's buffers are SAM's
        kept |= {id(b) for b in network.decoder.buffers() if b.is_floating_point()}
    tensors = (*network.named_parameters(), *network.named_buffers())
    with atomic(path) as part:
        torch.save({name: value.detach().cpu() for name, value in tensors if id(value) in kept}, part)
