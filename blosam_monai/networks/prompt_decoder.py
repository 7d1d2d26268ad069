"""From image embeddings to one mask a task, without prompts: SAM's mask decoder with a learned prompt.

``TaskDecoder`` is one binary segmenter, a plain module. ``PromptDecoder`` is T of them in one pass: their trainable
tensors carry a leading task axis, everything frozen is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blosam_monai.networks.lora import add_lora, merge_lora
from blosam_monai.networks.segmenter import State, load_tensors

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

HEADS = ("sam", "two_token")
TRAINED = ("lora", "gated", "bitfit", "affine_norm", "full", "frozen")  # of the decoder; all but the last with the head
_HEAD = ("mask_tokens", "hypernetworks.", "output_upscaling.")
_GATE = ".gate"


class TaskDecoder(nn.Module):
    """One binary segmenter: image embedding (B, C, h, w) -> foreground logits (B, 4h, 4w).

    SAM's mask decoder, of which some is trained: the head (mask token(s), hyper-network(s), upscaling) with, in the
    two-way transformer, low-rank updates of the q and v projections of its seven attentions; and a learned prompt
    embedding. The IoU head of SAM is left out: no loss reads it.

    Args:
        sam: the SAM to start from; its decoder is copied, so ``sam`` stays as it is.
        prompt: ``dense`` (one vector added at every location, SAM's no-mask embedding; the paper), ``sparse:n`` (n
            prompt tokens), ``both:n``, or ``none`` (SAM's no-mask embedding as it is).
        head: ``sam`` (SAM's own single-mask token and hyper-network) or ``two_token`` (as published: two new tokens,
            background and foreground, with new hyper-networks; the logit is their difference).
        lora_rank: rank of the low-rank updates, or one for each of the 14 layers (0: none there).
        train_decoder: what trains in the transformer: ``lora``, ``gated`` (ARENA: low-rank updates whose rank is
            learned), ``bitfit`` (biases), ``affine_norm`` (layer norms), ``full``; ``frozen``: nothing, nor the head.
        mask_prompt: decode twice, the first masks going through the prompt encoder's convolutions into the second
            pass, as SAM refines; these convolutions train.
        seed: seeds what starts random: LoRA's A, and the tokens and hyper-networks of ``two_token``.

    Source: Zhang et al. 2024 (BLO-SAM), section 3; Kirillov et al. 2023 (SAM), appendix A.
    """

    iou_token: Tensor
    context_tokens: Tensor
    image_pe: Tensor
    dense_start: Tensor
    sparse_start: Tensor

    def __init__(
        self,
        sam: Sam,
        *,
        prompt: str = "dense",
        head: str = "sam",
        lora_rank: int | Sequence[int] = 4,
        train_decoder: str = "lora",
        mask_prompt: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: {head!r} is not one of {', '.join(HEADS)}.")
        if train_decoder not in TRAINED:
            raise ValueError(f"train_decoder: {train_decoder!r} is not one of {', '.join(TRAINED)}, linear_probe.")
        dense, sparse = _parse_prompt(prompt)
        decoder = sam.mask_decoder
        channels = decoder.transformer_dim
        self.head, self.channels, self.train_decoder = head, channels, train_decoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer = copy.deepcopy(decoder.transformer)
            if train_decoder in ("lora", "gated"):
                gated = train_decoder == "gated"
                add_lora(self.transformer, ("q_proj", "v_proj"), rank=lora_rank, gated=gated)
            self.output_upscaling = copy.deepcopy(decoder.output_upscaling)
            if head == "sam":
                mask_tokens, context = decoder.mask_tokens.weight[:1], decoder.mask_tokens.weight[1:]
                self.hypernetworks = nn.ModuleList([copy.deepcopy(decoder.output_hypernetworks_mlps[0])])
            else:
                mask_tokens, context = torch.randn(2, channels), torch.empty(0, channels)
                mlp = type(decoder.output_hypernetworks_mlps[0])
                self.hypernetworks = nn.ModuleList(mlp(channels, channels, channels // 8, 3) for _ in range(2))
        self.mask_tokens = nn.Parameter(mask_tokens.detach().clone())  # (1 or 2, C)
        self.register_buffer("iou_token", decoder.iou_token.weight.detach().clone())  # (1, C): attended to, as in SAM
        self.register_buffer("context_tokens", context.detach().clone())  # SAM's multi-mask tokens, likewise
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe().detach())  # (1, C, h, w)
        # The prompt is learned as the difference from where it starts, so that weight decay pulls back to SAM.
        prompt_encoder = sam.prompt_encoder
        positive_point = prompt_encoder.point_embeddings[1].weight.detach()
        self.register_buffer("dense_start", prompt_encoder.no_mask_embed.weight.detach()[0].clone())  # (C,)
        # Noise, or n equal tokens would learn the same; of a fixed seed: a saved prompt is the difference from it.
        noise = torch.randn(sparse, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("sparse_start", positive_point + 0.02 * noise)  # (n, C)
        if dense:
            self.dense_prompt = nn.Parameter(torch.zeros_like(self.dense_start))
        if sparse:
            self.sparse_prompt = nn.Parameter(torch.zeros_like(self.sparse_start))
        if mask_prompt:
            self.mask_convolutions = copy.deepcopy(prompt_encoder.mask_downscaling)
        self.requires_grad_(False)

    def lower_names(self) -> list[str]:
        """Names of theta: what trains of the transformer, the head, the convolutions of the mask prompt."""
        return [name for name, _ in self.named_parameters() if self._is_theta(name)]

    def upper_names(self) -> list[str]:
        """Names of phi: the learned prompt, and the gates that decide ranks."""
        prompts = ("dense_prompt", "sparse_prompt")
        return [name for name, _ in self.named_parameters() if name in prompts or name.endswith(_GATE)]

    def _is_theta(self, name: str) -> bool:
        if name.startswith("mask_convolutions."):
            return True
        if name.startswith(_HEAD):
            return self.train_decoder != "frozen"
        if not name.startswith("transformer."):
            return False
        module, _, last = name.rpartition(".")
        return {
            "lora": last in ("lora_a", "lora_b"),
            "gated": last in ("lora_a", "lora_b"),
            "bitfit": last == "bias",
            "affine_norm": isinstance(self.get_submodule(module), nn.LayerNorm),
            "full": True,
            "frozen": False,
        }[self.train_decoder]

    def forward(self, embedding: Tensor) -> Tensor:
        """Image embedding (B, C, h, w) -> logits (B, 4h, 4w)."""
        source = embedding + self.dense_prompt[:, None, None] if hasattr(self, "dense_prompt") else embedding
        logits = self._decode(source + self.dense_start[:, None, None])
        if hasattr(self, "mask_convolutions"):  # as in SAM, in the place of its no-mask embedding
            logits = self._decode(source + self.mask_convolutions(logits.detach()[:, None]))
        return logits

    def _decode(self, source: Tensor) -> Tensor:
        """Embedding with its dense prompt (B, C, h, w) -> logits (B, 4h, 4w)."""
        batch, channels, h, w = source.shape
        tokens = [self.iou_token, self.mask_tokens, self.context_tokens]
        if hasattr(self, "sparse_prompt"):
            tokens.append(self.sparse_start + self.sparse_prompt)
        queries = torch.cat(tokens).expand(batch, -1, -1)  # (B, N, C)
        queries, keys = self.transformer(source, self.image_pe, queries)  # (B, N, C), (B, h w, C)
        upscaled = self.output_upscaling(keys.transpose(1, 2).reshape(batch, channels, h, w))  # (B, C / 8, 4h, 4w)
        kernels = [mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.hypernetworks)]  # each (B, C / 8)
        # Masks are linear in the kernels, so foreground minus background is taken here, before the product.
        kernel = kernels[0] if self.head == "sam" else kernels[1] - kernels[0]
        return (kernel[:, None] @ upscaled.flatten(2)).reshape(batch, 4 * h, 4 * w)


class PromptDecoder(nn.Module):
    """T binary segmenters in one pass: image embedding (B, C, h, w) or (B, T, C, h, w) -> logits (B, T, 4h, 4w).

    ``theta`` (lower level) and ``phi`` (upper level) hold the trainable tensors, stacked (T, ...); the shared
    ``template`` holds what is frozen. Tasks never mix, so T tasks trained together equal T trained apart.

    Args:
        sam: see ``TaskDecoder``.
        tasks: number of tasks, T.
        seed: one seed for all tasks, or one for each.
        options: of ``TaskDecoder``.
    """

    shared = False

    def __init__(self, sam: Sam, *, tasks: int = 1, seed: int | Sequence[int] = 0, **options: Any) -> None:
        super().__init__()
        seeds = [seed] * tasks if isinstance(seed, int) else list(seed)
        if tasks < 1 or len(seeds) != tasks:
            raise ValueError(f"seed: {len(seeds)} seeds given for {tasks} tasks; give one seed or one for each task.")
        by_seed = {s: TaskDecoder(sam, seed=s, **options) for s in dict.fromkeys(seeds)}
        self.tasks = tasks
        self.template: TaskDecoder = by_seed[seeds[0]]
        starts = [dict(by_seed[s].named_parameters()) for s in seeds]
        self.theta = _stack(starts, self.template.lower_names())
        self.phi = _stack(starts, self.template.upper_names())

    def lower_parameters(self) -> list[nn.Parameter]:
        """Theta: what the lower level trains, each tensor (T, ...)."""
        return list(self.theta.values())

    def upper_parameters(self) -> list[nn.Parameter]:
        """Phi: what the upper level trains, each tensor (T, ...)."""
        return list(self.phi.values())

    def frozen_parameters(self) -> list[nn.Parameter]:
        """What all tasks share as it is."""
        trained = {*self.template.lower_names(), *self.template.upper_names()}
        return [p for name, p in self.template.named_parameters() if name not in trained]

    def forward(self, embedding: Tensor) -> Tensor:
        """Image embedding, shared (B, C, h, w) or one for each task (B, T, C, h, w) -> logits (B, T, 4h, 4w)."""
        stacked = {_dotted(name): value for name, value in (*self.theta.items(), *self.phi.items())}
        own = embedding.ndim == 5
        if own and embedding.shape[1] != self.tasks:
            raise ValueError(
                f"embedding: shape {tuple(embedding.shape)} holds not one embedding for each of the {self.tasks} tasks."
            )
        if self.tasks == 1:  # the same arithmetic without the detour through batched kernels
            single = {name: value[0] for name, value in stacked.items()}
            return functional_call(
                self.template, single, (embedding[:, 0] if own else embedding,), tie_weights=False
            ).unsqueeze(1)

        def decode(values: dict[str, Tensor], embedding: Tensor) -> Tensor:
            return functional_call(self.template, values, (embedding,), tie_weights=False)

        return torch.vmap(decode, in_dims=(0, 1 if own else None), out_dims=1)(stacked, embedding)

    def adapter_state(self) -> dict[str, Tensor]:
        """The trainable tensors, each (T, ...), under stable names: ``theta.<name>`` and ``phi.<name>``."""
        return {
            f"{level}.{_dotted(name)}": value.detach()
            for level, values in (("theta", self.theta), ("phi", self.phi))
            for name, value in values.items()
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``adapter_state``; raises ValueError naming what is missing, foreign or misshapen."""
        load_tensors(self.adapter_state(), state)

    def exported(self, state: State) -> tuple[State, dict[str, Any]]:
        """What is kept on disk of a state, and the settings in which a network that takes it differs from this.

        Gates are folded into B and those at zero dropped: what is left is plain LoRA with a rank for each layer, the
        most that any task needs there. ``effective_ranks`` says what each task needs.
        """
        if self.template.train_decoder != "gated":
            return state, {}
        pruned = {name: value for name, value in state.items() if not name.endswith(_GATE)}
        ranks: dict[str, list[int]] = {}
        for name in (name for name in state if name.endswith(_GATE)):
            layer = name.removeprefix("phi.").removesuffix(_GATE)
            a, b = f"theta.{layer}.lora_a", f"theta.{layer}.lora_b"
            gate = state[name]  # (T, r)
            ranks[layer] = (gate != 0).sum(1).tolist()
            order = (gate == 0).int().argsort(dim=1, stable=True)[:, : max(ranks[layer])]  # open gates first
            pruned[a] = state[a].gather(1, order[:, :, None].expand(-1, -1, state[a].shape[2]))
            pruned[b] = (state[b] * gate[:, None]).gather(2, order[:, None].expand(-1, state[b].shape[1], -1))
            if not max(ranks[layer]):
                del pruned[a], pruned[b]
        by_layer = [max(ranks[f"transformer.{name}"]) for name in self._lora_layers()]
        return pruned, {"train_decoder": "lora", "lora_rank": by_layer, "effective_ranks": ranks}

    def _lora_layers(self) -> list[str]:
        return [name for name, layer in self.template.transformer.named_modules() if hasattr(layer, "lora_a")]

    @torch.no_grad()
    def merge(self, sam: Sam, task: int = 0) -> dict[str, Tensor]:
        """Fold one task into a plain ``segment_anything`` state dict that predicts it without prompts.

        Raises:
            ValueError: a sparse prompt or the two-token head, which have no place in a plain SAM.
        """
        foreign = ("sparse_prompt", "mask_convolutions")
        if self.template.head != "sam" or any(hasattr(self.template, name) for name in foreign):
            raise ValueError("merge: only head=sam with prompt=dense fits a plain SAM; train with these to export.")
        if not 0 <= task < self.tasks:
            raise ValueError(f"merge: task {task} does not exist; there are {self.tasks}, counted from 0.")
        template = copy.deepcopy(self.template)
        values = {_dotted(name): value[task] for name, value in (*self.theta.items(), *self.phi.items())}
        template.load_state_dict(values, strict=False)
        merge_lora(template)
        state = {name: value.detach().clone() for name, value in sam.state_dict().items()}
        trained = {f"mask_decoder.transformer.{n}": v for n, v in template.transformer.state_dict().items()}
        trained |= {f"mask_decoder.output_upscaling.{n}": v for n, v in template.output_upscaling.state_dict().items()}
        trained |= {
            f"mask_decoder.output_hypernetworks_mlps.0.{n}": v
            for n, v in template.hypernetworks[0].state_dict().items()
        }
        state |= trained
        state["mask_decoder.mask_tokens.weight"][:1] = template.mask_tokens
        if hasattr(template, "dense_prompt"):
            state["prompt_encoder.no_mask_embed.weight"][0] = template.dense_start + template.dense_prompt
        return state


def _parse_prompt(prompt: str) -> tuple[bool, int]:
    """``dense``, ``sparse:n``, ``both:n``, ``none`` -> (dense prompt learned, number of sparse prompt tokens)."""
    kind, _, count = prompt.partition(":")
    if prompt in ("dense", "none"):
        return prompt == "dense", 0
    if kind in ("sparse", "both") and count.isdigit() and int(count) > 0:
        return kind == "both", int(count)
    raise ValueError(f"prompt: {prompt!r} is not dense, none, sparse:n or both:n (n tokens, 1 or more).")


def _stack(starts: list[dict[str, nn.Parameter]], names: list[str]) -> nn.ParameterDict:
    stacked = {name: torch.stack([start[name].detach() for start in starts]) for name in names}
    return nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value) for name, value in stacked.items()})


def _dotted(name: str) -> str:
    return name.replace("/", ".")  # torch forbids dots in the keys of a ParameterDict
