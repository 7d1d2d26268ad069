"""Procedurally generated labelled pictures for the demo and the tests: chest films of two lungs and a heart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from blosam_monai.data.writers.pictures import write_label
from blosam_monai.files import PathLike, atomic

PHANTOM_LABELS = {"background": 0, "lung": 1, "heart": 2}


def chest_film(seed: int, height: int = 224, width: int = 288) -> tuple[np.ndarray, np.ndarray]:
    """One subject: film (H, W) and label (H, W), both uint8; label 1 lungs (dark), 2 heart, over the left lung.

    Position, size, tilt, intensities, noise and exposure vary with the seed. The heart lies right of the centre line,
    as on a film seen from the front, so that a mirrored or turned picture is told from an upright one.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height - 0.5, x / width - 0.5  # -0.5 to 0.5, rows down, columns right
    shift_y, shift_x = rng.uniform(-0.04, 0.04, 2)
    size = rng.uniform(0.9, 1.1)

    def ellipse(cy: float, cx: float, ry: float, rx: float, tilt: float) -> np.ndarray:
        dy, dx = y - cy - shift_y, x - cx - shift_x
        along, across = dy * np.cos(tilt) + dx * np.sin(tilt), dx * np.cos(tilt) - dy * np.sin(tilt)
        return (along / (ry * size)) ** 2 + (across / (rx * size)) ** 2 < 1

    tilt = rng.uniform(0.05, 0.2)
    body = ellipse(0.05, 0.0, 0.52, 0.46, 0.0)
    right = ellipse(-0.02, -0.19, rng.uniform(0.28, 0.33), rng.uniform(0.11, 0.14), -tilt)
    left = ellipse(-0.02, 0.19, rng.uniform(0.28, 0.33), rng.uniform(0.11, 0.14), tilt)
    heart = ellipse(0.12, 0.07, rng.uniform(0.13, 0.17), rng.uniform(0.09, 0.12), rng.uniform(0.3, 0.7))
    film = np.full((height, width), 20.0)
    film[body] = rng.uniform(140, 170)
    film[right | left] = rng.uniform(60, 85)
    film[heart] = rng.uniform(185, 215)
    for rib in np.arange(-0.35, 0.35, 0.09):
        arc = np.abs(y - rib - shift_y - 0.25 * x**2) < 0.012
        film[arc & body] += 15
    film = gaussian_filter(film, rng.uniform(0.8, 1.6))
    film *= 1 + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y
    film += rng.normal(0, 5, film.shape)
    label = np.zeros((height, width), dtype=np.uint8)
    label[right | left] = 1
    label[heart] = 2
    return film.clip(0, 255).astype(np.uint8), label


def write_chest_films(folder: PathLike, count: int, *, seed: int = 0) -> None:
    """Write ``count`` subjects as ``images/phantom_<n>.png`` and ``labels/phantom_<n>.png`` (index coded)."""
    for number in range(count):
        film, label = chest_film(seed * 10_000 + number)
        with atomic(Path(folder) / "images" / f"phantom_{number:03d}.png") as part:
            Image.fromarray(film).save(part, format="PNG")
        write_label(Path(folder) / "labels" / f"phantom_{number:03d}.png", label)
