"""Pretraining of the tiny SAM on drawn images alone: what made the weights in this package, and makes them again.

First the encoder learns from subject ensembles (``data.ensembles``), where the same structure is seen in several
subjects, by two objectives:

- *few-shot segmentation*: from the embeddings of some subjects a linear classifier of the ensemble's structures is
  fitted in closed form (ridge regression), and must segment the other subjects: what a few labelled images ask for.
- *contrast*: places of the same structure in different subjects are nearer to each other than to other structures.

Then, the encoder frozen, the decoder learns to draw the mask of a structure from a *prompt*: a point, a box, or an
exemplar, the mean embedding of that structure in another subject, added to the mask token. The last is what
fine-tuning without prompts asks of the mask token.

Sources: Bertinetto et al. 2019 (R2-D2), the ridge regression; Khosla et al. 2020 (SupCon), the contrast; Kirillov et
al. 2023 (SAM), the prompts; randomised synthesis: see ``data.ensembles``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from blosam_monai.data.ensembles import OUTSIDE, Ensemble, draw_ensemble
from blosam_monai.files import PathLike, atomic, check_output_dir
from blosam_monai.handlers import ProgressHandler, TrainingState, check_state
from blosam_monai.metrics import write_rows
from blosam_monai.networks.sam import PIXEL_MEAN, PIXEL_STD, RANDOM, build_sam
from blosam_monai.tracking import RunHandler

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

LEAST_PLACES = 8  # side of the smallest embedding; in a smaller one some ensembles fill no place wholly
CELLS = 2  # a place of the embedding is labelled in 2 x 2 cells, so that it must know where in it a border runs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights; those in the package were made with the values in ``configs/pretrain.json``.

    Args:
        sam_model, image_size: see ``build_sam``.
        steps: of the encoder, each on ``ensembles`` times ``subjects`` images.
        decoder_steps: of the decoder, after these, on as many images.
        masks: drawn in a step of the decoder.
        few_shot, contrast: weights of the encoder's objectives.
        ridge: see ``few_shot_loss``.
        temperature: see ``contrast_loss``.
        lr, decoder_lr: highest learning rates of AdamW, reached after ``warmup`` steps.
        weight_decay: of AdamW.
        max_norm: of the gradient.
        seed: of the images, and of the small maps that only pretraining needs; SAM starts as ``random`` does.
    """

    sam_model: str
    image_size: int
    steps: int
    decoder_steps: int
    ensembles: int
    subjects: int
    masks: int
    few_shot: float
    contrast: float
    ridge: float
    temperature: float
    lr: float
    decoder_lr: float
    warmup: int
    weight_decay: float
    max_norm: float
    seed: int


class Objectives(nn.Module):
    """The objectives around a SAM, with the small maps that only pretraining needs.

    Args:
        sam: the network to train.
        recipe: the objectives' weights and numbers.
    """

    def __init__(self, sam: Sam, recipe: Recipe) -> None:
        super().__init__()
        channels = sam.prompt_encoder.embed_dim
        self.sam, self.recipe = sam, recipe
        self.projection = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, 64))
        self.exemplar = nn.Linear(channels, channels)  # from the mean embedding of a structure to a mask token
        self.log_scale = nn.Parameter(torch.tensor(8.0).log())  # of the classifier's answers, before the softmax

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What the encoder's objectives train."""
        return [*self.sam.image_encoder.parameters(), *self.projection.parameters(), self.log_scale]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """What the decoder's objective trains."""
        parts = (self.sam.prompt_encoder, self.sam.mask_decoder, self.exemplar)
        return [parameter for part in parts for parameter in part.parameters()]

    def encoder_losses(self, ensembles: Sequence[Ensemble], rng: np.random.Generator) -> dict[str, Tensor]:
        """Ensembles -> ``loss``, a scalar, and the two that it weighs."""
        recipe = self.recipe
        pairs = list(zip(*self._encode(ensembles), strict=True))
        few_shot = [few_shot_loss(f, c, rng, self.log_scale.exp(), recipe.ridge) for f, c in pairs]
        contrast = [contrast_loss(self.projection(f), c, rng, recipe.temperature) for f, c in pairs]
        losses = {"few_shot": torch.stack(few_shot).mean(), "contrast": torch.stack(contrast).mean()}
        return {
            CommonKeys.LOSS: recipe.few_shot * losses["few_shot"] + recipe.contrast * losses["contrast"],
            **losses,
        }

    def decoder_losses(self, ensembles: Sequence[Ensemble], rng: np.random.Generator) -> dict[str, Tensor]:
        """Ensembles -> ``loss`` of the masks drawn, a scalar; the encoder gets no gradient."""
        with torch.no_grad():
            features, cells = self._encode(ensembles)
        with torch.autocast(features[0].device.type, torch.bfloat16):
            logits, mask = self._draw_masks(features, ensembles, cells, rng)
        return {CommonKeys.LOSS: mask_loss(logits.float(), mask)}

    def _encode(self, ensembles: Sequence[Ensemble]) -> tuple[list[Tensor], list[Tensor]]:
        """Features (S, h, w, C) and cells (S, h, w, 4) of each ensemble."""
        image = torch.cat([ensemble.image for ensemble in ensembles])
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        with torch.autocast(image.device.type, torch.bfloat16):
            embedding = self.sam.image_encoder((image - mean) / std).float()  # (E S, C, h, w)
        features = embedding.permute(0, 2, 3, 1).split([len(e.label) for e in ensembles])
        return list(features), [to_cells(e.label, 2 * embedding.shape[-1]) for e in ensembles]

    def _draw_masks(
        self,
        features: Sequence[Tensor],
        ensembles: Sequence[Ensemble],
        cells: Sequence[Tensor],
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Masks of structures drawn at random, from exemplars and from prompts: logits and mask, each (M, G, G)."""
        choices = _common_structures(cells)
        exemplars, prompted = [], []
        for number in range(self.recipe.masks):
            e, shown, query, common = choices[int(rng.integers(len(choices)))]
            structure = int(rng.choice(common))
            image, label = features[e][query].permute(2, 0, 1), ensembles[e].label[query]
            mask = label == structure
            target = torch.where(label == OUTSIDE, float(OUTSIDE), mask.float())
            if number % 2:
                known = pure(cells[e][shown])
                places = features[e][shown]
                mean = places[known == structure].mean(0) - places[known != OUTSIDE].mean(0)
                exemplars.append((image, self.exemplar(mean), None, target))
            else:
                prompted.append((image, None, self._prompt(mask, rng), target))
        drawn = [self._decode(group) for group in (exemplars, prompted) if group]
        logits = torch.cat(drawn)  # (M, G, G)
        target = torch.stack([target for *_, target in exemplars + prompted])[:, None]
        stride = target.shape[-1] // logits.shape[-1]
        return logits, target[:, 0, stride // 2 :: stride, stride // 2 :: stride]

    def _prompt(self, mask: Tensor, rng: np.random.Generator) -> Tensor:
        """SAM's embedding of a point in the mask or of the box around it, (2, C); a point is padded, as SAM pads it."""
        encoder = self.sam.prompt_encoder
        rows, columns = mask.nonzero(as_tuple=True)
        if rng.random() < 0.5:
            place = int(rng.integers(len(rows)))
            point = torch.stack([columns[place], rows[place]]).float()[None, None]  # (1, 1, 2)
            sparse, _ = encoder(points=(point, torch.ones(1, 1, device=mask.device)), boxes=None, masks=None)
        else:
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()[None]
            sparse, _ = encoder(points=None, boxes=box, masks=None)
        return sparse[0]

    def _decode(self, group: Sequence[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]) -> Tensor:
        """A mask of each image by SAM's decoder, its token moved or prompts beside it; logits (M, G, G)."""
        decoder, encoder = self.sam.mask_decoder, self.sam.prompt_encoder
        images, moves, prompts, _ = zip(*group, strict=True)
        embedding = torch.stack(images)  # (M, C, h, w)
        batch, channels, h, w = embedding.shape
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).repeat(batch, 1, 1)  # (M, 5, C)
        if moves[0] is not None:
            tokens = tokens + F.pad(torch.stack(moves)[:, None], (0, 0, 1, tokens.shape[1] - 2))
        if prompts[0] is not None:
            tokens = torch.cat([tokens, torch.stack(prompts)], 1)
        source = embedding + encoder.no_mask_embed.weight[0][:, None, None]
        queries, keys = decoder.transformer(source, encoder.get_dense_pe().expand(batch, -1, -1, -1), tokens)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(batch, channels, h, w))  # (M, C / 8, 4h, 4w)
        kernel = decoder.output_hypernetworks_mlps[0](queries[:, 1])
        return (kernel[:, None] @ upscaled.flatten(2)).reshape(batch, 4 * h, 4 * w)


def to_cells(label: Tensor, side: int) -> Tensor:
    """Label (S, H, W) -> the labels at the centres of 2 x 2 cells of each place, (S, side / 2, side / 2, 4)."""
    step = label.shape[-1] // side
    centres = label[:, step // 2 :: step, step // 2 :: step]  # (S, side, side)
    folded = F.pixel_unshuffle(centres[:, None].float(), CELLS)  # (S, 4, side / 2, side / 2)
    return folded.permute(0, 2, 3, 1).long()


def pure(cells: Tensor) -> Tensor:
    """Label of a place (...) whose cells (..., 4) agree, ``OUTSIDE`` where they do not."""
    return torch.where((cells == cells[..., :1]).all(-1), cells[..., 0], OUTSIDE)


def _common_structures(cells: Sequence[Tensor]) -> list[tuple[int, int, int, list[int]]]:
    """Ensemble, one subject, another, and the structures that fill some place of both; those of two or more first.

    A single structure asks nothing, so pairs with only one are for want of others.
    """
    pairs = []
    for e, of_subjects in enumerate(cells):
        known = [set(pure(subject).unique().tolist()) - {OUTSIDE} for subject in of_subjects]
        for shown, query in permutations(range(len(known)), 2):
            pairs.append((e, shown, query, sorted(known[shown] & known[query])))
    return [pair for pair in pairs if len(pair[3]) > 1] or [pair for pair in pairs if pair[3]]


def few_shot_loss(
    features: Tensor, cells: Tensor, rng: np.random.Generator, scale: Tensor | float = 1.0, ridge: float = 0.01
) -> Tensor:
    """Cross-entropy of a linear classifier fitted on some subjects and asked about the others.

    Fitted in closed form on the places inside the picture: W = (X'X / n + ridge I)^-1 X'Y / n, with X the features and
    a one, Y the structures of the four cells, one-hot. Structures weigh by the inverse root of their size, so that
    small ones count.

    Args:
        features: (S, h, w, C), S at least 2.
        cells: structures (S, h, w, 4), ``OUTSIDE`` beyond the picture.
        rng: draws how many subjects are support, and which.
        scale: of the answers before the softmax.
        ridge: strength of the penalty.

    Source: Bertinetto et al. 2019 (R2-D2), eq. 4.
    """
    subjects, channels, classes = len(features), features.shape[-1], int(cells.max()) + 1
    order = rng.permutation(subjects)
    shots = int(rng.integers(1, subjects))
    support, query = order[:shots], order[shots:]
    inside = (cells != OUTSIDE).all(-1)  # (S, h, w)
    x = F.pad(features, (0, 1), value=1.0)  # (S, h, w, C + 1)
    known, asked = x[support][inside[support]], x[query][inside[query]]  # (n, C + 1), (m, C + 1)
    answers = F.one_hot(cells[support][inside[support]], classes).to(x.dtype).flatten(1)  # (n, 4 K)
    penalty = ridge * torch.eye(channels + 1, dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(known.T @ known / len(known) + penalty, known.T @ answers / len(known))
    logits = scale * (asked @ weight).unflatten(1, (CELLS**2, classes)).flatten(0, 1)  # (4 m, K)
    truth = cells[query][inside[query]].flatten()
    share = torch.bincount(truth, minlength=classes).clamp(min=1).rsqrt()[truth]
    return (F.cross_entropy(logits, truth, reduction="none") * share).sum() / share.sum()


def contrast_loss(
    features: Tensor, cells: Tensor, rng: np.random.Generator, temperature: float = 0.1, places: int = 96
) -> Tensor:
    """Supervised contrast of places: those of the same structure in other subjects against all others.

    Args:
        features: (S, h, w, C), of any length: normalised here.
        cells: structures (S, h, w, 4); only places whose four cells agree take part.
        rng: draws which, where there are more than ``places`` of a structure.
        temperature: of the softmax over cosines.

    Source: Khosla et al. 2020 (SupCon), eq. 2, with the mean over structures instead of places.
    """
    structure = pure(cells).flatten()
    subject = torch.arange(len(cells), device=cells.device).repeat_interleave(len(structure) // len(cells))
    chosen = []
    for name in range(int(structure.max()) + 1):
        found = (structure == name).nonzero()[:, 0]
        chosen.append(found[torch.as_tensor(rng.permutation(len(found))[:places], device=found.device)])
    taken = torch.cat(chosen)
    unit = F.normalize(features.flatten(0, 2)[taken].float(), dim=-1)
    structure, subject = structure[taken], subject[taken]
    itself = torch.eye(len(taken), dtype=torch.bool, device=taken.device)
    share = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (structure[:, None] == structure) & (subject[:, None] != subject)
    count = positive.sum(1)
    loss = -share.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    asked = count > 0
    weight = asked / torch.bincount(structure[asked], minlength=int(structure.max()) + 1).clamp(min=1)[structure]
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice loss plus cross-entropy, mean over masks: logits (M, G, G), target 0, 1 or ``OUTSIDE`` (M, G, G).

    MONAI's ``DiceCELoss`` has no padding that is left out; without any it gives the same number.
    """
    inside = (target != OUTSIDE).float()
    truth, probability = target.clamp(min=0), logits.sigmoid()
    overlap = (probability * truth * inside).sum((1, 2))
    size = ((probability + truth) * inside).sum((1, 2))
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (dice + (entropy * inside).sum((1, 2)) / inside.sum((1, 2))).mean()


class Pretrainer(Engine):
    """An Ignite engine whose step sees ensembles that the recipe's seed and the step's number decide, and nothing else.

    So a run that goes on from a saved state takes the same steps: on a CPU bit for bit, on CUDA but for the order of
    sums in the gradient of the interpolation. The engine's output is a list of one dictionary of losses, as that of
    MONAI's trainers.

    Args:
        recipe: what decides the weights.
        device: where to train; convolutions and products in bfloat16, on CPU and CUDA.
    """

    EPOCH = 50  # steps between saves of the state

    def __init__(self, recipe: Recipe, device: str | torch.device = "cpu") -> None:
        super().__init__(lambda engine, _: [engine.take_step()])
        for name in ("steps", "decoder_steps"):
            if getattr(recipe, name) % self.EPOCH:
                raise ValueError(f"{name}: {getattr(recipe, name)} is not a multiple of {self.EPOCH}.")
        if not recipe.steps + recipe.decoder_steps:
            raise ValueError("steps, decoder_steps: both are 0; give one of them a multiple of 50.")
        if recipe.subjects < 2:
            raise ValueError(f"subjects: {recipe.subjects} has no other to learn from; give 2 or more.")
        for name in ("ensembles", "masks", "warmup", "temperature", "max_norm"):
            if not getattr(recipe, name) > 0:
                raise ValueError(f"{name}: {getattr(recipe, name)} is not above 0.")
        if not recipe.few_shot + recipe.contrast:
            raise ValueError("few_shot, contrast: both are 0; give one of them a weight.")
        self.recipe, self.device = recipe, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.sam = build_sam(recipe.sam_model, recipe.image_size, RANDOM)
            self.objectives = Objectives(self.sam, recipe).to(self.device).train()
        if self.sam.prompt_encoder.image_embedding_size[0] < LEAST_PLACES:
            raise ValueError(
                f"image_size: {recipe.image_size} pixels are fewer than {LEAST_PLACES} x {LEAST_PLACES} places of the "
                f"embedding of {recipe.sam_model}, too few to hold whole structures; give a larger one."
            )
        steps = {"encoder": recipe.steps, "decoder": recipe.decoder_steps}
        self.optimizers = {
            "encoder": _adamw(self.objectives.encoder_parameters(), recipe.lr, recipe),
            "decoder": _adamw(self.objectives.decoder_parameters(), recipe.decoder_lr, recipe),
        }
        self.lr_schedulers = {
            part: LambdaLR(optimizer, partial(rate, steps=steps[part], warmup=recipe.warmup))
            for part, optimizer in self.optimizers.items()
        }
        self.state.max_epochs, self.state.epoch_length = sum(steps.values()) // self.EPOCH, self.EPOCH

    def run(self) -> None:
        """Train to the last step; after a state was loaded, from where it ended. What is finished stays as it is."""
        if self.state.epoch >= self.state.max_epochs:  # ignite would start again from the first step
            self.fire_event(Events.STARTED)
            self.fire_event(Events.COMPLETED)
            return
        super().run(max_epochs=self.state.max_epochs, epoch_length=self.state.epoch_length)

    def take_step(self) -> dict[str, float]:
        """One step of the encoder or, after its last, of the decoder; returns the losses before it."""
        recipe, step = self.recipe, self.state.iteration - 1
        device = str(self.device)
        ensembles = [
            draw_ensemble((recipe.seed, step, number), subjects=recipe.subjects, size=recipe.image_size, device=device)
            for number in range(recipe.ensembles)
        ]
        part = "encoder" if step < recipe.steps else "decoder"
        objective = self.objectives.encoder_losses if part == "encoder" else self.objectives.decoder_losses
        # NumPy ignores trailing zeros: this is also the stream of the step's ensemble 0, so the two are not
        # independent.
        losses = objective(ensembles, np.random.default_rng((recipe.seed, step)))
        found = {str(name): float(value.detach()) for name, value in losses.items()}  # no enum: the state keeps text
        if not math.isfinite(found["loss"]):
            raise ValueError(f"step {step + 1}: the loss is {found['loss']}; give a lower lr.")
        optimizer = self.optimizers[part]
        optimizer.zero_grad()
        losses[CommonKeys.LOSS].backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], recipe.max_norm)
        optimizer.step()
        self.lr_schedulers[part].step()
        return found


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: a linear rise over ``warmup`` steps, then half a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _adamw(parameters: list[nn.Parameter], lr: float, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)


def pretrain(
    output_dir: PathLike,
    recipe: Recipe,
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    tracking_uri: str | None = None,
) -> Path:
    """Train a SAM by a recipe; on a CPU the same recipe gives the same weights on the same machine.

    Written to ``output_dir``: ``<sam_model>.safetensors`` (fp16, the recipe in its header), ``losses.csv`` (one row a
    step), ``state.pt`` (to resume from) and the MLflow store.

    Args:
        output_dir: folder for everything.
        recipe: what decides the weights.
        device: where to train.
        resume: go on from the state in ``output_dir``; recipe and kind of device must be the same.
        overwrite: replace an earlier training in it.
        tracking_uri: MLflow store; default: SQLite in ``output_dir``.

    Returns:
        The path of the weights, a file for ``sam_checkpoint``.

    Raises:
        ValueError: the recipe cannot be trained, or the loss is no longer finite.
        FileExistsError, FileNotFoundError: see ``check_state``.
    """
    folder = Path(output_dir)
    state = folder / "state.pt"
    check_output_dir(folder)
    check_state(state, resume=resume, overwrite=overwrite)
    settings = dataclasses.asdict(recipe)
    trainer = Pretrainer(recipe, device)
    losses = _LossTable(folder / "losses.csv")
    tracker = RunHandler(
        tracking_uri or f"sqlite:///{(folder / 'mlruns.db').resolve()}",
        "pretraining",
        recipe.sam_model,
        numbers=(CommonKeys.LOSS, "few_shot", "contrast"),
        experiment_param={**settings, "device": device},
    )
    saved = {
        "objectives": trainer.objectives,
        **{f"{part}_optimizer": optimizer for part, optimizer in trainer.optimizers.items()},
        **{f"{part}_lr_scheduler": schedule for part, schedule in trainer.lr_schedulers.items()},
        "losses": losses,
        "tracker": tracker,
    }
    for handler in (ProgressHandler("pretraining"), losses, tracker):
        handler.attach(trainer)
    # The random stream is the device's, so a run goes on where it began.
    TrainingState(state, saved, {**settings, "device": trainer.device.type}).attach(trainer, resume=resume)
    path = folder / f"{recipe.sam_model}.safetensors"
    if not resume:
        path.unlink(missing_ok=True)  # of the training that is replaced
    trainer.run()
    save_sam(path, trainer.sam, settings)
    tracker.close(path, losses.path)
    return path


def save_sam(path: PathLike, sam: Sam, recipe: Mapping[str, Any]) -> Path:
    """Write a SAM's weights as fp16 safetensors, the recipe as JSON in the header."""
    state = {name: value.detach().cpu().half().contiguous() for name, value in sam.state_dict().items()}
    with atomic(path) as part:
        part.write_bytes(save(state, {"recipe": json.dumps(dict(recipe))}))
    return Path(path)


class _LossTable:
    """Losses of every step, saved with the state and written as CSV."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the pretrainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: write_rows(self.path, self.rows))

    def _note(self, engine: Engine) -> None:
        self.rows.append({"step": engine.state.iteration, **engine.state.output[0]})

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.rows = state["rows"]
