"""The one door for writing predictions. Every file appears whole or not at all."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

from blosam_monai.files import PathLike, atomic

# Okabe and Ito 2008: eight colours that colour-blind readers tell apart; without black, white least confused first.
COLOURS = np.array(
    [[0, 158, 115], [230, 159, 0], [86, 180, 233], [204, 121, 167], [240, 228, 66], [0, 114, 178], [213, 94, 0]],
    dtype=np.float32,
)


def write_label(path: PathLike, label: np.ndarray) -> None:
    """Write a label map (H, W) of values 0 to 65535 as PNG, 8 bits where they suffice."""
    low, high = int(label.min(initial=0)), int(label.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"{path}: label values {low} to {high} do not fit in a PNG; use values from 0 to 65535.")
    picture = Image.fromarray(label.astype(np.uint8 if high < 256 else np.uint16))
    with atomic(path) as part:
        picture.save(part, format="PNG")


def write_overlay(path: PathLike, image: np.ndarray, pred: np.ndarray, label: np.ndarray | None = None) -> None:
    """Write a picture with each task's prediction tinted and, where given, the label outlined in white.

    Args:
        path: a PNG file.
        image: (3, H, W), 0 to 255.
        pred, label: (T, H, W), binary.
    """
    canvas = image.transpose(1, 2, 0).astype(np.float32).copy()  # (H, W, 3)
    for mask, colour in zip(pred.astype(bool), _colours(len(pred)), strict=True):
        canvas[mask] = 0.6 * canvas[mask] + 0.4 * colour
    for mask in [] if label is None else label.astype(bool):
        canvas[binary_dilation(mask, iterations=2) & ~mask] = 255
    with atomic(path) as part:
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(part, format="PNG")


def _colours(count: int) -> np.ndarray:
    return COLOURS[np.arange(count) % len(COLOURS)]
