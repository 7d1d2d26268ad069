"""SAM without prompts: an encoder, frozen by default, and T learned decoders behind one call."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from blosam_monai.files import PathLike
from blosam_monai.networks.encoder_adapters import add_adapters
from blosam_monai.networks.linear_probe import LinearProbe
from blosam_monai.networks.lora import add_qkv_lora, effective_ranks, prune_lora
from blosam_monai.networks.prompt_decoder import PromptDecoder
from blosam_monai.networks.sam import build_sam
from blosam_monai.networks.segmenter import Segmenter, State, is_gate, load_tensors

TRAINED_ENCODERS = ("frozen", "lora", "gated", "adapter", "full")
_ENCODER = "encoder."  # before the names of the encoder's tensors
LINEAR_PROBE = "linear_probe"  # a train_decoder: another head than SAM's


class SamSegmenter(Segmenter):
    """What rests on a SAM: its image encoder, frozen unless the decoder is an ``EncoderDecoder``, which trains it.

    Args:
        tasks, settings: see ``Segmenter``.
        sam_model, image_size, sam_checkpoint: see ``build_sam``.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        *,
        sam_model: str,
        image_size: int,
        sam_checkpoint: PathLike | None,
    ) -> None:
        super().__init__(tasks, image_size, {"sam_model": sam_model, **settings})
        self.sam = build_sam(sam_model, image_size, sam_checkpoint).requires_grad_(False)
        self.sam_weights = self.sam.weights

    @property
    def grid_size(self) -> int:
        """Side G of the masks as the decoder draws them, in pixels: four for a place of the embedding."""
        return 4 * self.sam.prompt_encoder.image_embedding_size[0]

    @cached_property
    def encoder_id(self) -> str | None:  # type: ignore[override]
        """SHA-256 of the frozen encoder's weights; None if it trains."""
        return None if isinstance(self.decoder, EncoderDecoder) else hash_weights(self.sam.image_encoder)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S), preprocessed -> embedding (B, C, h, w), h = G / 4; the image itself if that trains."""
        return image if isinstance(self.decoder, EncoderDecoder) else self.sam.image_encoder(image)


class PromptSam(SamSegmenter):
    """Image (B, 3, S, S) -> logits (B, T, S, S), one foreground logit a task; no prompt is asked of the user.

    Args:
        sam_model, image_size, sam_checkpoint: see ``build_sam``.
        tasks: names of the tasks, in the order of the output channels.
        prompt, head, mask_prompt, seed: see ``TaskDecoder``.
        lora_rank: see ``TaskDecoder``.
        encoder_rank: rank of the encoder's low-rank updates, or one for each q and v of each block (0: none there);
            None: ``lora_rank``.
        train_decoder: see ``TaskDecoder``; or ``linear_probe``, a linear classifier in the place of SAM's decoder.
        train_encoder: what trains in the image encoder: ``frozen`` (nothing: an image is encoded once), ``lora``
            (updates of q and v in every block, SAMed), ``gated`` (ARENA), ``adapter`` (Med-SA) or ``full``. All tasks
            then share the encoder, and nothing can be encoded beforehand.
    """

    NAME = "prompt_sam"

    def __init__(
        self,
        sam_model: str = "tiny",
        image_size: int = 256,
        sam_checkpoint: PathLike | None = None,
        tasks: Sequence[str] = ("foreground",),
        *,
        prompt: str = "dense",
        head: str = "sam",
        lora_rank: int | Sequence[int] = 4,
        train_decoder: str = "lora",
        train_encoder: str = "frozen",
        encoder_rank: int | Sequence[int] | None = None,
        mask_prompt: bool = False,
        seed: int | Sequence[int] = 0,
    ) -> None:
        if train_encoder not in TRAINED_ENCODERS:
            raise ValueError(f"train_encoder: {train_encoder!r} is not one of {', '.join(TRAINED_ENCODERS)}.")
        own = {"prompt": prompt, "head": head, "lora_rank": lora_rank, "train_decoder": train_decoder}
        own |= {"mask_prompt": mask_prompt}
        encoder_rank = lora_rank if encoder_rank is None else encoder_rank
        trained = {"train_encoder": train_encoder, "encoder_rank": encoder_rank}
        super().__init__(
            tasks, {**own, **trained}, sam_model=sam_model, image_size=image_size, sam_checkpoint=sam_checkpoint
        )
        if train_decoder == LINEAR_PROBE:
            if prompt != "none" or mask_prompt:
                raise ValueError("prompt: a linear_probe has none; give prompt=none and mask_prompt=false.")
            self.decoder = LinearProbe(self.sam.mask_decoder.transformer_dim, len(tasks))
        else:
            self.decoder = PromptDecoder(self.sam, tasks=len(tasks), seed=seed, **own)
        if train_encoder != "frozen":
            first_seed = seed if isinstance(seed, int) else seed[0]
            make_trainable(self.sam.image_encoder, train_encoder, rank=encoder_rank, seed=first_seed)
            self.decoder = EncoderDecoder(self.sam.image_encoder, self.decoder)

    def count_parameters(self) -> tuple[int, int]:
        """Numbers trained, and in all: those of the encoder and of what decodes, each once."""
        trained, _ = super().count_parameters()
        decoder = self.decoder.decoder if isinstance(self.decoder, EncoderDecoder) else self.decoder
        frozen = [p for p in self.sam.image_encoder.parameters() if not p.requires_grad]
        if isinstance(decoder, PromptDecoder):
            frozen += decoder.frozen_parameters()
        return trained, trained + sum(p.numel() for p in frozen)

    def merge(self, task: int | str = 0) -> dict[str, Tensor]:
        """One task (number or name) folded into a plain ``segment_anything`` state dict."""
        if not isinstance(self.decoder, PromptDecoder):
            raise ValueError("merge: only a frozen encoder with SAM's own decoder fits a plain SAM.")
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"merge: task {task!r} is not one of {', '.join(self.tasks)}.")
            task = self.tasks.index(task)
        return self.decoder.merge(self.sam, task)


class EncoderDecoder(nn.Module):
    """A trained encoder before T decoders: image (B, 3, S, S) -> logits (B, T, G, G). The tasks share the encoder.

    Args:
        encoder: image -> embedding; what requires a gradient trains.
        decoder: embedding -> logits.
    """

    shared = True

    def __init__(self, encoder: nn.Module, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder, self.tasks = encoder, decoder, decoder.tasks

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Image, or image and prompts where the decoder takes them -> logits."""
        if isinstance(inputs, tuple):
            return self.decoder((self.encoder(inputs[0]), inputs[1]))
        return self.decoder(self.encoder(inputs))

    def lower_parameters(self) -> list[nn.Parameter]:
        """Theta: of the encoder, without its gates, and of the decoder."""
        trained = [p for name, p in self.encoder.named_parameters() if p.requires_grad and not is_gate(name)]
        return [*trained, *self.decoder.lower_parameters()]

    def upper_parameters(self) -> list[nn.Parameter]:
        """Phi: the encoder's gates, and that of the decoder."""
        gates = [p for name, p in self.encoder.named_parameters() if p.requires_grad and is_gate(name)]
        return [*gates, *self.decoder.upper_parameters()]

    def adapter_state(self) -> State:
        """The trained tensors: ``encoder.<name>``, those of the encoder, and those of the decoder."""
        trained = {f"{_ENCODER}{n}": p.detach() for n, p in self.encoder.named_parameters() if p.requires_grad}
        return {**trained, **self.decoder.adapter_state()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``adapter_state``; raises ValueError naming what is missing, foreign or misshapen."""
        load_tensors(self.adapter_state(), state)

    def exported(self, state: State) -> tuple[State, dict[str, Any]]:
        """What is kept on disk of a state, see ``PromptDecoder.exported``: gates of the encoder are pruned likewise."""
        own = {name.removeprefix(_ENCODER): v for name, v in state.items() if name.startswith(_ENCODER)}
        kept, changed = self.decoder.exported({n: v for n, v in state.items() if not n.startswith(_ENCODER)})
        if any(is_gate(name) for name in own):
            encoder = copy.deepcopy(self.encoder)
            load_tensors({n: p.detach() for n, p in encoder.named_parameters() if p.requires_grad}, own)
            ranks = effective_ranks(encoder)
            prune_lora(encoder)
            own = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
            shown = {f"{_ENCODER}{name}": [rank] for name, rank in ranks.items()}
            changed = {**changed, "effective_ranks": {**shown, **changed.get("effective_ranks", {})}}
            changed |= {"train_encoder": "lora", "encoder_rank": list(ranks.values())}
        return {**{f"{_ENCODER}{name}": value for name, value in own.items()}, **kept}, changed


def make_trainable(encoder: Any, how: str, *, rank: Any, seed: int) -> None:
    """Let a part of SAM's frozen image encoder train, in place; see ``train_encoder`` of ``PromptSam``."""
    if how == "adapter":
        add_adapters(encoder, seed=seed)
    elif how == "full":
        encoder.requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_qkv_lora(encoder.blocks, rank=rank, gated=how == "gated")


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
