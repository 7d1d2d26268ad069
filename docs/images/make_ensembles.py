"""Draw docs/images/ensembles.png: four ensembles, three subjects each and two of their label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from blosam_monai.data.ensembles import draw_ensemble

SEEDS = (0, 1, 4, 7)


def main() -> None:
    """Write the picture."""
    colours = np.random.default_rng(3).integers(40, 255, (64, 3)).astype(np.uint8)
    colours[-1] = 0  # padding
    rows = []
    for seed in SEEDS:
        image, label = draw_ensemble((2, seed), subjects=3)
        pictures = image.permute(0, 2, 3, 1).byte().numpy()
        rows.append(np.concatenate([*pictures, *colours[label[:2].numpy()]], axis=1))
    halves = [np.concatenate(rows[:2]), np.concatenate(rows[2:])]
    picture = Image.fromarray(np.concatenate(halves, axis=1)).resize((1280, 256), Image.Resampling.LANCZOS)
    picture.save(Path(__file__).with_name("ensembles.png"), optimize=True)


if __name__ == "__main__":
    main()
