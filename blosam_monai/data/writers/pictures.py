"""Predictions as pictures. Every file appears whole or not at all."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from blosam_monai.files import PathLike, atomic

# Okabe and Ito 2008: eight colours that colour-blind readers tell apart; without black, those brightest on gray first.
COLOURS = np.array(
    [[86, 180, 233], [230, 159, 0], [0, 158, 115], [204, 121, 167], [240, 228, 66], [0, 114, 178], [213, 94, 0]],
    dtype=np.float32,
)
LINES_IN_PICTURE = 200  # an outline is this part of the longer side wide, so that it is seen in a picture made small


def write_label(path: PathLike, label: np.ndarray) -> None:
    """Write a label map of values 0 to 65535, 8 bits where they suffice: (H, W) as PNG, (D, H, W) as TIFF."""
    low, high = int(label.min(initial=0)), int(label.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"{path}: label values {low} to {high} do not fit in a PNG; use values from 0 to 65535.")
    _write_gray(path, label.astype(np.uint8 if high < 256 else np.uint16))


def write_probability(path: PathLike, probability: np.ndarray) -> None:
    """Write probabilities, 0 to 1, in 16 bits, 65535 is 1: (H, W) as PNG, (D, H, W) as TIFF of D pages.

    Raises:
        ValueError: NaN, or values outside 0 to 1.
    """
    low, high = float(probability.min()), float(probability.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"{path}: probabilities are {low:g} to {high:g}; give values from 0 to 1, without NaN.")
    _write_gray(path, np.rint(probability.astype(np.float64) * 65535).astype(np.uint16))


def _write_gray(path: PathLike, values: np.ndarray) -> None:
    with atomic(path) as part:
        if values.ndim == 2:
            Image.fromarray(values).save(part, format="PNG")
        else:
            first, *others = map(Image.fromarray, values)
            first.save(part, format="TIFF", compression="tiff_deflate", save_all=True, append_images=others)


def write_overlay(path: PathLike, image: np.ndarray, pred: np.ndarray, label: np.ndarray | None = None) -> None:
    """Write a picture with predictions tinted; where labels are given, with the outlines of both instead.

    A prediction is outlined inside of it in the colour of its task, a label outside of it, dashed in black and white:
    equal masks lie side by side, the dashes show on any background, and colour is not all that tells the two apart.

    Args:
        path: a PNG file.
        image: (3, H, W), 0 to 255.
        pred, label: (T, H, W), binary.
    """
    canvas = image.transpose(1, 2, 0).astype(np.float32).copy()  # (H, W, 3)
    width = max(2, round(max(canvas.shape) / LINES_IN_PICTURE))
    for mask, colour in zip(pred.astype(bool), _colours(len(pred)), strict=True):
        if label is None:
            canvas[mask] = 0.6 * canvas[mask] + 0.4 * colour
        else:
            canvas[mask & ~binary_erosion(mask, iterations=width, border_value=1)] = colour
    y, x = np.ogrid[: canvas.shape[0], : canvas.shape[1]]
    dashes = np.where((2 * x + y) // (6 * width) % 2, 255, 0)  # (H, W)
    for mask in [] if label is None else label.astype(bool):
        line = binary_dilation(mask, iterations=width) & ~mask
        canvas[line] = dashes[line, None]
    with atomic(path) as part:
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(part, format="PNG")


def _colours(count: int) -> np.ndarray:
    return COLOURS[np.arange(count) % len(COLOURS)]
