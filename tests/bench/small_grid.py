"""A grid of two methods on eight pictures of 8 x 8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LUNGS = {
    **{"name": "lungs", "dataset_dir": "lungs", "images": "images", "labels": "labels"},
    **{"label_names": {"lung": 255}, "label_coding": "threshold"},
}
GRID = {"name": "study", "methods": ["blosam", "joint"], "data": [LUNGS], "shots": [2, 4], "draws": 2}


def write_lungs(folder: Path) -> None:
    """Pictures and labels of 255 into ``lungs``."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "lungs" / kind).mkdir(parents=True)
    for number in range(8):
        label = np.zeros((8, 8), np.uint8)
        label[2:6, : number + 1] = 255
        pictures = {"labels": label, "images": rng.integers(256, size=(8, 8), dtype=np.uint8)}
        for kind, values in pictures.items():
            Image.fromarray(values).save(folder / "lungs" / kind / f"lung_{number}.png")


def write_grid(folder: Path, **changes: Any) -> Path:
    """``GRID`` as a file, changed; a value of None removes the key."""
    content = {key: value for key, value in {**GRID, **changes}.items() if value is not None}
    path = folder / "grid.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
