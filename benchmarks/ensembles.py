"""Images a second of the stream that the tiny SAM is trained on, on one thread.

    python benchmarks/ensembles.py                    # 256 pixels, 4 subjects, 40 ensembles: seconds
    python benchmarks/ensembles.py --size 512 --ensembles 10

On a CPU the thread's own time counts, so that a busy machine does not. Gray and colour are timed as they come (two of
five ensembles are in colour) and apart; the goal is 200 images of 256 pixels a second. With ``--device cuda`` the
fields and pixels are computed there.
"""

from __future__ import annotations

import argparse
import time

import torch

from blosam_monai.data.ensembles import OUTSIDE, draw_ensemble


def main() -> None:
    """Time each ensemble on its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--ensembles", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.thread_time if options.device == "cpu" else time.perf_counter  # of a busy machine only our share
    draw_ensemble(0, subjects=options.subjects, size=options.size, device=options.device)  # start-up
    seconds: dict[str, list[float]] = {"all": [], "gray": [], "colour": []}
    for seed in range(options.ensembles):
        start = clock()
        image, label = draw_ensemble(seed, subjects=options.subjects, size=options.size, device=options.device)
        if options.device != "cpu":
            torch.cuda.synchronize()
        spent = clock() - start
        inside = (label != OUTSIDE)[:, None]
        colour = bool((image.diff(dim=1) * inside).any())
        for kind in ("all", "colour" if colour else "gray"):
            seconds[kind].append(spent)
    where = "1 thread" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, {options.size} pixels, {options.subjects} subjects\n")
    print("| ensembles | drawn | images/s | ms an image |\n|---|---|---|---|")
    for kind, times in ((kind, times) for kind, times in seconds.items() if times):
        rate = options.subjects * len(times) / sum(times)
        print(f"| {kind} | {len(times)} | {rate:.0f} | {1000 / rate:.1f} |")


if __name__ == "__main__":
    main()
