"""Dice on real pictures: first order, cross-fitted and joint, the same draws for all, as one Markdown table.

    python benchmarks/real_images.py --data FOLDER --draws 5 --output docs/explanation/results_real_images.csv

FOLDER holds folders of ``images`` and ``labels`` named as in ``SETS``. Every draw takes 4 supports and tests on the
rest, at native size. All draws and classes of a set train in one run, as tasks. The interval is a two-way bootstrap
over draws and cases (10 000 resamples, percentile). With random SAM weights the figures show that the machine runs, not
accuracy.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from blosam_monai.data.datalist import make_datalist
from blosam_monai.data.embeddings import NO_CACHE, EncodeImaged, StackedDraws
from blosam_monai.data.pairing import pair_folders
from blosam_monai.engines.bilevel_trainer import BilevelTrainer
from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.networks.prompt_decoder import PromptDecoder
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.transforms import LabelToGridd, LoadCased, PreprocessImaged, RestoreSized, SliceToPictured

THRESHOLD = ({"background": 0, "foreground": 255}, "threshold")
CAR = ({"background": 0, "body": 1, "wheel": 2, "light": 3, "window": 4}, "index")
SETS: dict[str, tuple[str, Any, str | None]] = {  # name -> folder, labels and coding, prefix of the supports
    "lungs": ("lung_cxr", THRESHOLD, None),
    "lungs, Montgomery to Shenzhen": ("lung_cxr", THRESHOLD, "MCUCXR"),
    "lungs, Shenzhen to Montgomery": ("lung_cxr", THRESHOLD, "CHNCXR"),
    "teeth": ("dental_panoramic", THRESHOLD, None),
    "polyps": ("kvasir_seg_256", THRESHOLD, None),
    "car parts": ("car_parts", CAR, None),
}
METHODS = {"first_order": {}, "crossfit": {"crossfit": True}, "joint": {"joint": True}}
N_SHOT = 4


def draw_lists(folder: Path, labels: dict, coding: str, prefix: str | None, draws: int) -> list[dict]:
    """One data list a draw; across sites the supports have the prefix and the tests have not."""
    items = pair_folders(folder / "images", folder / "labels", folder)
    return [
        make_datalist(items, labels, dataset_dir=folder, n_shot=N_SHOT, seed=seed, label_coding=coding, support=prefix)
        for seed in range(draws)
    ]


def run_set(name: str, network: PromptSam, options: argparse.Namespace) -> list[dict]:
    """Train every method on all draws of a set at once; a row for each method, draw, task and test case."""
    folder_name, (labels, coding), prefix = SETS[name]
    folder = options.data / folder_name
    lists = draw_lists(folder, labels, coding, prefix, options.draws)
    load, take_slice = LoadCased(labels, None, coding), SliceToPictured()
    preprocess, encode = PreprocessImaged(network.image_size), EncodeImaged(network, cache_dir=NO_CACHE)
    to_grid, restore = LabelToGridd(network.image_size, network.grid_size), RestoreSized()
    tasks = list(load.values)

    def read(item: dict) -> dict:
        return encode(preprocess(take_slice(load({key: str(folder / item[key]) for key in ("image", "label")}))))

    supports = {half: StackedDraws([[to_grid(read(i)) for i in d[half]] for d in lists]) for half in ("lower", "upper")}
    cases = {item["subject"]: item for datalist in lists for item in datalist["testing"]}
    rows = []
    for method, settings in METHODS.items():
        start = time.perf_counter()
        network.decoder = PromptDecoder(network.sam, tasks=len(lists) * len(tasks), seed=0)
        iterations = train(network.decoder, supports, options.epochs, **settings)
        print(f"{name}, {method}: {time.perf_counter() - start:.0f} s, {iterations} iterations", file=sys.stderr)
        for subject, item in cases.items():
            case = read(item)
            with torch.no_grad():
                logits = network.decode(case["embedding"][None])[0]  # (draws x tasks, S, S)
            pred = restore({**case, "pred": logits})["pred"] > 0
            for draw, datalist in enumerate(lists):
                if item in datalist["testing"]:
                    for t, task in enumerate(tasks):
                        dice = _dice(pred[draw * len(tasks) + t], case["label"][t] > 0)
                        row = {"set": name, "method": method, "draw": draw, "task": task, "case": subject}
                        rows.append({**row, "dice": round(dice, 4)})
    return rows


def train(
    decoder: PromptDecoder,
    supports: dict[str, StackedDraws],
    epochs: int,
    *,
    joint: bool = False,
    crossfit: bool = False,
) -> int:
    """The default recipe of the bundle: AdamW 5e-3, decay 0.1, polynomial 0.9, batch 1; returns the iterations."""

    def loader(dataset: Any) -> DataLoader:
        return DataLoader(dataset, batch_size=1, sampler=DistributedSampler(dataset, num_replicas=1, rank=0, seed=0))

    lower = torch.utils.data.ConcatDataset(list(supports.values())) if joint else supports["lower"]
    optimizers = [
        torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)
        for parameters in (decoder.lower_parameters(), decoder.upper_parameters())
    ]
    trainer = BilevelTrainer(
        "cpu",
        epochs,
        loader(lower),
        decoder,
        *optimizers,
        TaskDiceCELoss(),
        upper_data_loader=None if joint else loader(supports["upper"]),
        crossfit=crossfit,
        train_handlers=[_Schedule(optimizers, epochs * len(lower))],
    )
    trainer.run()
    return trainer.state.iteration


class _Schedule:
    def __init__(self, optimizers: list, iterations: int) -> None:
        self.schedules = [torch.optim.lr_scheduler.PolynomialLR(o, iterations, power=0.9) for o in optimizers]

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events

        for schedule in self.schedules:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _, s=schedule: s.step())


def _dice(pred: torch.Tensor, label: torch.Tensor) -> float:
    """Dice by its definition, both empty counting 1 (``case_scores`` takes surfaces too, most of the time)."""
    size = int(pred.sum() + label.sum())
    return 2 * int((pred & label).sum()) / size if size else 1.0


def interval(rows: list[dict], *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean over draws, standard deviation over draws, and the 95 % two-way bootstrap interval of the mean."""
    draws = sorted({row["draw"] for row in rows})
    cases = sorted({row["case"] for row in rows})
    table = np.full((len(draws), len(cases)), np.nan)
    for row in rows:
        cell = draws.index(row["draw"]), cases.index(row["case"])
        table[cell] = row["dice"]
    rng = np.random.default_rng(seed)
    means = [
        np.nanmean(table[np.ix_(rng.integers(len(draws), size=len(draws)), rng.integers(len(cases), size=len(cases)))])
        for _ in range(resamples)
    ]
    by_draw = np.nanmean(table, axis=1)
    return float(by_draw.mean()), float(by_draw.std(ddof=1)), *map(float, np.percentile(means, [2.5, 97.5]))


def main() -> None:
    """Run the sets, write the table of cases, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV of all cases")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--sam_model", default="tiny")
    parser.add_argument("--sam_checkpoint", default="random")
    parser.add_argument("--image_size", type=int, default=256)
    options = parser.parse_args()
    network = PromptSam(options.sam_model, options.image_size, options.sam_checkpoint)
    rows: list[dict] = []
    for name in options.sets:
        rows += run_set(name, network, options)
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(
        f"SAM {options.sam_model}, weights {network.sam_weights}, {options.image_size} pixels, {N_SHOT} shots, "
        f"{options.epochs} epochs, {options.draws} draws\n"
    )
    print("| set | task | method | Dice, mean | SD over draws | 95 % interval | cases |\n|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["set"], row["task"], row["method"]) for row in rows):
        own = [row for row in rows if (row["set"], row["task"], row["method"]) == key]
        mean, sd, low, high = interval(own)
        cases = len({row["case"] for row in own})
        print(f"| {' | '.join(key)} | {mean:.3f} | {sd:.3f} | {low:.3f} to {high:.3f} | {cases} |")


if __name__ == "__main__":
    main()
