"""How often each test calls two methods different that are not: the type-I error at 5 %, simulated.

    python benchmarks/statistics_error.py                # the table of docs/explanation/statistics.md, 40 s

The difference of two methods, in Dice points, on each test image of each draw of supports, without a true difference:
what the draw does to it (SD 1.5) + what the image does to it in every draw (5) + what is left (6.2; the image's two
together 8). 147 images are the test set of JSRT in the BLO-SAM paper. Power: the same with a true difference of 2.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.stats import ttest_1samp, wilcoxon

from blosam_monai.bench.statistics import p_value, two_way_bootstrap

IMAGES = 147
DRAW_SD, IMAGE_SD, REST_SD = 1.5, 5.0, 6.2  # Dice points
POWER_AT = 2.0  # Dice points
ALPHA = 0.05
DRAWS = (3, 5, 10, 20)
RESAMPLES = 1000
BLOCK = 50  # experiments that share the resamples


def simulate(draws: int, *, experiments: int, gain: float = 0.0, seed: int = 0) -> np.ndarray:
    """Differences (experiments, draws, IMAGES)."""
    rng = np.random.default_rng(seed)
    of_draw = rng.normal(0, DRAW_SD, (experiments, draws, 1))
    of_image = rng.normal(0, IMAGE_SD, (experiments, 1, IMAGES))
    return gain + of_draw + of_image + rng.normal(0, REST_SD, (experiments, draws, IMAGES))


def two_way(differences: np.ndarray) -> np.ndarray:
    """P-values (experiments,) of the two-way bootstrap; an image is a subject of its own."""
    blocks = np.array_split(differences, max(1, len(differences) // BLOCK))
    resampled = [two_way_bootstrap(block, range(IMAGES), resamples=RESAMPLES, seed=n) for n, block in enumerate(blocks)]
    return np.array([p_value(means) for block in resampled for means in block.T])


def images_of_draw_means(differences: np.ndarray) -> np.ndarray:
    """P-values of the bootstrap over images alone."""
    return two_way(differences.mean(1, keepdims=True))  # one row to draw from


def wilcoxon_of_one_draw(differences: np.ndarray) -> np.ndarray:
    """P-values of Wilcoxon's signed-rank test over the images of the first draw."""
    return wilcoxon(differences[:, 0], axis=-1).pvalue


TESTS = {
    "Wilcoxon over the images of one draw": wilcoxon_of_one_draw,
    "Wilcoxon over all (draw, image) pairs": lambda d: wilcoxon(d.reshape(len(d), -1), axis=-1).pvalue,
    "bootstrap over images of draw means": images_of_draw_means,
    "paired t over draws": lambda d: ttest_1samp(d.mean(2), 0, axis=-1).pvalue,
    "two-way bootstrap (draws and images)": two_way,
}


def main() -> None:
    """Print the errors, then the power of the last test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    experiments = parser.parse_args().experiments
    print(f"| test | {' | '.join(f'{draws} draws' for draws in DRAWS)} |\n|---|{'---|' * len(DRAWS)}")
    for name, test in TESTS.items():
        errors = [np.mean(test(simulate(draws, experiments=experiments)) < ALPHA) for draws in DRAWS]
        print(f"| {name} | {' | '.join(f'{error:.2f}' for error in errors)} |")
    found = [np.mean(two_way(simulate(draws, experiments=experiments, gain=POWER_AT)) < ALPHA) for draws in DRAWS]
    print(f"| power of the last at +{POWER_AT:g} points | {' | '.join(f'{share:.2f}' for share in found)} |")


if __name__ == "__main__":
    main()
