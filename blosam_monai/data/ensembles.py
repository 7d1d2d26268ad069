"""An endless, seeded stream of labelled images that nobody was photographed for: subject ensembles for pretraining.

An ensemble is one drawn anatomy, a label map of blobs, bodies, shells, curves, rows and mirrored pairs, seen in several
subjects: deformed smoothly, with their own intensities, textures, bias field, blur, noise and window. What stays is
what a few labelled images share with the next patient. Labels carry no names; they agree within an ensemble only.

Source of the idea: learning from randomised synthesis, SynthMorph (Hoffmann et al. 2022), UniverSeg (Butoi et al.
2023), anatomix (Dey et al. 2025). Nothing here was taken from their code.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blosam_monai.networks.sam import PIXEL_MEAN

OUTSIDE = -1  # label of pixels beyond the picture: padding
_COARSE = 64  # objects are drawn as smooth functions on a grid of this side, then enlarged and cut at zero
_MAX_OBJECTS = 12
_TEXTURES = 4  # fields that a class mixes: pixel noise, grain, clouds, stripes


class Ensemble(NamedTuple):
    """Subjects of one drawn anatomy: image (S, 3, H, W) float32, 0 to 255; label (S, H, W) int64, -1 is padding."""

    image: Tensor
    label: Tensor


def draw_ensemble(seed: int | tuple[int, ...], *, subjects: int, size: int = 256, device: str = "cpu") -> Ensemble:
    """Draw an anatomy and show it in so many subjects; the same seed gives the same pixels on the same device.

    Args:
        seed: any number, or several (of a stream and the place in it).
        subjects: images to draw, S.
        size: side in pixels, a multiple of 8, at least 32.
        device: where the pixels are computed.

    Raises:
        ValueError: another size.
    """
    if size < 32 or size % 8:
        raise ValueError(f"size: {size} is not a multiple of 8 of at least 32 pixels.")
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    anatomy = _draw_anatomy(rng, generator, size)
    label = _deform(anatomy, rng, generator, subjects)
    return Ensemble(*_crop(_paint(label, rng, generator), label, rng))


# Anatomy: one label map.


def _draw_anatomy(rng: np.random.Generator, generator: torch.Generator, size: int) -> Tensor:
    """Label map (H, W) int64: regions of the ground, perhaps a body upon it, and objects."""
    regions = int(rng.choice([1, 1, 2, 3, 4]))
    fields = _smooth(generator, regions, int(rng.integers(3, 7)), size)
    ground = _highest(fields)
    label = ground
    count = int(rng.integers(2, _MAX_OBJECTS + 1))
    names = regions + np.minimum(np.arange(count), rng.integers(1, count + 1))  # the last ones may share a label
    if rng.random() < 0.5:  # a body that holds everything, on an empty ground
        inside = _enlarge(_body(rng, generator)[None], size)[0] > 0
        label = torch.where(inside, 1 + ground, 0)
        names = names + 1
    for field, name in zip(_enlarge(_objects(rng, generator, count), size), names, strict=True):
        label[field > 0] = int(name)
    return label


def _body(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Implicit function (64, 64) of a large, slightly irregular ellipse, positive inside."""
    y, x = _grid(generator.device)
    ry, rx = rng.uniform(0.6, 1.1, 2)
    wobble = _smooth(generator, 1, 4, _COARSE)[0]
    return 1 - ((y / ry) ** 2 + (x / rx) ** 2) + 0.15 * wobble


def _objects(rng: np.random.Generator, generator: torch.Generator, count: int) -> Tensor:
    """Implicit functions (N, 64, 64), positive inside: blobs, boxes, shells and curves, alone, mirrored or in rows.

    Later ones lie over earlier ones, and shrink, so that they nest and touch.
    """

    def draw(low: float, high: float) -> Tensor:
        return torch.as_tensor(rng.uniform(low, high, (count, 1, 1)), dtype=torch.float32, device=generator.device)

    y, x = (axis.expand(count, -1, -1) for axis in _grid(generator.device))
    arrangement = rng.choice(["alone", "mirrored", "row"], count, p=[0.55, 0.25, 0.2])
    shape = rng.choice(["blob", "box", "shell", "curve"], count, p=[0.6, 0.1, 0.12, 0.18])

    def where(names: np.ndarray, value: str, yes: Tensor, no: Tensor) -> Tensor:
        chosen = torch.as_tensor(names == value, device=generator.device)[:, None, None]
        return torch.where(chosen, yes, no)

    radius = torch.as_tensor(rng.uniform(0.08, 0.5, (count, 1, 1)) ** 1.2, dtype=torch.float32).to(generator.device)
    radius = radius * torch.linspace(1.3, 0.6, count, device=generator.device)[:, None, None]
    y = y - draw(-0.6, 0.6) + draw(-0.5, 0.5) * x**2  # rows bend
    middle, offset, period = draw(-0.15, 0.15), draw(0.1, 0.6), draw(0.15, 0.4)
    row = torch.remainder(x - middle, period) - period / 2
    row = torch.where((x - middle).abs() < draw(0.3, 0.9), row, torch.full_like(x, 9.0))
    x = where(arrangement, "mirrored", (x - middle).abs() - offset, where(arrangement, "row", row, x - draw(-0.6, 0.6)))
    radius = where(arrangement, "row", torch.minimum(radius, 0.7 * period), radius)

    angle = draw(-1.6, 1.6)
    along = (x * angle.cos() + y * angle.sin()) / radius
    across = (y * angle.cos() - x * angle.sin()) / (radius * draw(0.35, 1.0))
    wobble = _smooth(generator, count, int(rng.integers(4, 9)), _COARSE) * draw(0.0, 0.45)
    disc = 1 - (along**2 + across**2) + wobble
    box = 1 - torch.maximum(along.abs(), across.abs()) ** 2
    shell = draw(0.1, 0.35) - disc.abs()
    wave = across * radius - draw(0.0, 0.3) * (draw(1.0, 5.0) * along + draw(0.0, 6.0)).sin() * radius + 0.1 * wobble
    curve = torch.minimum(draw(0.015, 0.05) - wave.abs(), 1.5 - along.abs())
    return where(shape, "blob", disc, where(shape, "box", box, where(shape, "shell", shell, curve)))


# Subjects: the map deformed.


def _deform(anatomy: Tensor, rng: np.random.Generator, generator: torch.Generator, subjects: int) -> Tensor:
    """Label map (H, W) -> one smoothly deformed map a subject (S, H, W)."""
    size = anatomy.shape[-1]
    angle = rng.normal(0, 0.1, subjects)
    zoom = np.exp(rng.normal(0, 0.1, (subjects, 2)))
    matrix = np.zeros((subjects, 2, 3))
    matrix[:, 0, 0], matrix[:, 0, 1] = zoom[:, 0] * np.cos(angle), -np.sin(angle)
    matrix[:, 1, 0], matrix[:, 1, 1] = np.sin(angle), zoom[:, 1] * np.cos(angle)
    matrix[:, :, 2] = rng.normal(0, 0.08, (subjects, 2))
    theta = torch.as_tensor(matrix, dtype=torch.float32, device=anatomy.device)
    grid = F.affine_grid(theta, [subjects, 1, _COARSE, _COARSE], align_corners=False)  # (S, 64, 64, 2)
    for side, strength in ((4, rng.uniform(0.02, 0.12)), (10, rng.uniform(0.0, 0.04))):
        grid = grid + strength * _smooth(generator, 2 * subjects, side, _COARSE).view(
            subjects, 2, _COARSE, _COARSE
        ).permute(0, 2, 3, 1)
    grid = _enlarge(grid.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    maps = anatomy.float().expand(subjects, 1, size, size)
    moved = F.grid_sample(maps, grid, mode="nearest", padding_mode="border", align_corners=False)
    return moved[:, 0].long()


# Pixels: intensities, textures, the way of the picture to the screen.


def _paint(label: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Label maps (S, H, W) -> images (S, 3, H, W), 0 to 255."""
    subjects, size, device = label.shape[0], label.shape[-1], label.device
    classes = int(label.max()) + 1
    channels = 3 if rng.random() < 0.4 else 1
    means, mixes = _appearance(rng, subjects, classes, channels)
    table = torch.as_tensor(np.concatenate([means, mixes], -1), dtype=torch.float32, device=device)  # (S, K, C + 4)
    offset = torch.arange(subjects, device=device)[:, None, None] * classes
    shown = table.flatten(0, 1).index_select(0, (label + offset).flatten())  # (S H W, C + 4)
    shown = shown.view(subjects, size, size, -1).permute(0, 3, 1, 2)
    image = (shown[:, channels:] * _textures(rng, generator, subjects, size)).sum(1, keepdim=True)
    image = shown[:, :channels] + image.add_(_clutter(rng, generator, subjects, size))
    bias = _smooth(generator, subjects, 3, size)[:, None].mul_(_scalar(rng, 0.0, 0.25, subjects, device)).add_(1)
    image = _blur(image.mul_(bias), rng)
    noise = torch.randn((subjects, channels, size, size), generator=generator, device=device)
    image.add_(noise.mul_(_scalar(rng, 0.0, 0.05, subjects, device)))
    gamma, low, high = (_scalar(rng, *bounds, subjects, device) for bounds in ((-0.4, 0.4), (-0.1, 0.1), (0.85, 1.2)))
    image.sub_(low).div_(high - low).clamp_(0, 1).pow_(gamma.exp()).mul_(255)
    image = _marks(image, rng)
    return image.expand(-1, 3, -1, -1)


def _appearance(rng: np.random.Generator, subjects: int, classes: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean intensity (S, K, C), 0 to 1, and share of each texture (S, K, 4) of every class in every subject.

    How far subjects agree is drawn for the ensemble: as within one modality, or not at all, as between modalities.
    """
    mean = rng.uniform(0, 1, (1, classes, 1)) + (rng.normal(0, 0.2, (1, classes, channels)) if channels > 1 else 0)
    mix = np.abs(rng.normal(0, 1, (1, classes, _TEXTURES))) * rng.choice([0.0, 0.03, 0.1], (1, classes, _TEXTURES))
    agreement = rng.choice(["modality", "contrast", "none"], p=[0.6, 0.2, 0.2])
    if agreement == "none":
        mean = rng.uniform(0, 1, (subjects, classes, 1)) + 0.2 * rng.normal(0, 1, (subjects, classes, channels))
        mix = np.repeat(mix, subjects, 0) * rng.uniform(0.3, 2, (subjects, 1, _TEXTURES))
        return mean, mix
    mean = mean + rng.normal(0, rng.uniform(0.01, 0.08), (subjects, classes, channels))
    if agreement == "contrast":  # other exposure, other order of the gray values
        mean = rng.uniform(0.4, 1, (subjects, 1, 1)) * mean + rng.uniform(-0.2, 0.3, (subjects, 1, 1))
        turned = rng.random((subjects, 1, 1)) < 0.3
        mean = np.where(turned, 1 - mean, mean)
    return mean, mix * np.exp(rng.normal(0, 0.2, (subjects, classes, _TEXTURES)))


def _textures(rng: np.random.Generator, generator: torch.Generator, subjects: int, size: int) -> Tensor:
    """Fields (S, 4, H, W) of unit strength: pixel noise, grain, clouds, stripes."""
    device = generator.device
    pixel = torch.randn((subjects, size, size), generator=generator, device=device)
    grain = _smooth(generator, subjects, size // 4, size)
    clouds = _smooth(generator, subjects, int(rng.integers(12, 33)), size)
    y, x = _grid(device, size)
    wave, turn = rng.uniform(10, 60), rng.uniform(0, np.pi)  # in radians a half picture; one way for the ensemble
    bend = 3 * clouds if rng.random() < 0.5 else 0
    stripes = 1.4 * torch.sin(wave * (x * np.cos(turn) + y * np.sin(turn)) + bend).expand(subjects, size, size)
    return torch.stack([pixel, grain, clouds, stripes], 1)


def _clutter(rng: np.random.Generator, generator: torch.Generator, subjects: int, size: int) -> Tensor:
    """What lies over or under the anatomy and belongs to nobody's label (S, 1, H, W): ribs, tubes, shadows."""
    if rng.random() < 0.4:
        return torch.zeros((subjects, 1, 1, 1), device=generator.device)
    each = 2
    fields = _enlarge(_objects(rng, generator, subjects * each), size) > 0
    strength = torch.as_tensor(rng.normal(0, 0.12, (subjects, each, 1, 1)), dtype=torch.float32)
    return (fields.view(subjects, each, size, size) * strength.to(generator.device)).sum(1, keepdim=True)


def _blur(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Each subject out of focus by its own amount, in place: mixed with its binomial mean over 3 pixels, then 5."""
    for reach in (1, 2):
        amount = _scalar(rng, 0.0, 1.0, len(image), image.device)
        mean = image
        for axis in (-2, -1):  # slices are five times faster here than a convolution
            around = torch.roll(mean, reach, axis)
            size = mean.shape[axis]
            around.narrow(axis, 0, size - reach).add_(mean.narrow(axis, reach, size - reach))
            around.narrow(axis, size - reach, reach).add_(mean.narrow(axis, 0, reach))
            mean = torch.lerp(mean, around.mul_(0.5), 0.5, out=around)
        image.lerp_(mean, amount)
    return image


def _marks(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Burnt-in letters, black borders and round fields of view, in some subjects."""
    size = image.shape[-1]
    for picture in image:
        if rng.random() < 0.25:  # a line of letters: cells of random dots
            letters = int(rng.integers(1, 6))
            dots = torch.as_tensor(rng.random((7, 6 * letters)) < 0.5).to(image.device)
            scale = int(rng.integers(1, 3))
            dots = dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:, : size // 2]
            top, left = (int(rng.integers(0, size - side)) for side in dots.shape)
            picture[:, top : top + dots.shape[0], left : left + dots.shape[1]][:, dots] = float(rng.uniform(200, 255))
        if rng.random() < 0.1:
            y, x = _grid(image.device, size)
            picture *= (y**2 + x**2 < rng.uniform(1.0, 1.6)).float()
        if rng.random() < 0.1:
            border = int(rng.integers(2, size // 10))
            picture[:, :border], picture[:, -border:] = 0, 0
    return image


def _crop(image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Some pictures are not square: beyond them, below or to the right, lies padding of SAM's mean colour."""
    size = label.shape[-1]
    if rng.random() < 0.3:
        image = image.contiguous()  # gray channels share their memory until one of them is written to
        edge = int(rng.uniform(0.5, 0.95) * size)
        cut = (..., slice(edge, None), slice(None)) if rng.random() < 0.5 else (..., slice(None), slice(edge, None))
        label[cut] = OUTSIDE
        image[cut] = torch.tensor(PIXEL_MEAN, device=image.device)[:, None, None]
    return image, label


# Fields.


def _highest(fields: Tensor) -> Tensor:
    """Which of the fields (N, H, W) is highest, (H, W) int64; a chain of maxima is ten times faster than argmax."""
    best, highest = torch.zeros(fields.shape[1:], dtype=torch.int64, device=fields.device), fields[0]
    for number, field in enumerate(fields[1:], start=1):
        best = torch.where(field > highest, number, best)
        highest = torch.maximum(highest, field)
    return best


def _grid(device: torch.device | str, side: int = _COARSE) -> tuple[Tensor, Tensor]:
    """Rows (side, 1) and columns (1, side), -1 to 1."""
    axis = torch.linspace(-1, 1, side, device=device)
    return axis[:, None].expand(side, side), axis[None].expand(side, side)


def _smooth(generator: torch.Generator, count: int, side: int, size: int) -> Tensor:
    """Smooth random fields (N, size, size) of about unit deviation that vary over a ``side``-th of the picture."""
    noise = torch.randn((1, count, side, side), generator=generator, device=generator.device)
    middle = min(_COARSE, size)
    if side < middle:
        noise = F.interpolate(noise, (middle, middle), mode="bicubic", align_corners=True)
    return _enlarge(noise[0], size)


def _enlarge(fields: Tensor, size: int) -> Tensor:
    """(N, h, w) or (S, C, h, w) -> side ``size``, bilinear."""
    if fields.shape[-1] == size:
        return fields
    batch = fields if fields.ndim == 4 else fields[None]
    enlarged = F.interpolate(batch, (size, size), mode="bilinear", align_corners=True)
    return enlarged if fields.ndim == 4 else enlarged[0]


def _scalar(rng: np.random.Generator, low: float, high: float, subjects: int, device: torch.device) -> Tensor:
    """One number a subject, (S, 1, 1, 1)."""
    return torch.as_tensor(rng.uniform(low, high, (subjects, 1, 1, 1)), dtype=torch.float32, device=device)
