"""Dice with four labelled images: what the weights of the encoder and the method are worth, the same draws for all.

    python benchmarks/few_shot.py --data FOLDER --draws 10 --output cases.csv
    python benchmarks/few_shot.py --sets "phantom chest films" "phantom CT slices" --draws 5 --output phantoms.csv

FOLDER holds folders of images and labels named as in ``SETS``; phantoms are generated. Every draw takes 4 supports and
tests on the rest, at native size; of a volume it takes the slice with the largest label. All draws and classes of a set
train in one run, as tasks. What the output already holds is not run again, so a killed run goes on. Intervals are
two-way bootstraps over draws and cases (10 000 resamples, percentile); of a gain, of the paired differences.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from blosam_monai.data.datalist import make_datalist
from blosam_monai.data.embedding_cache import NO_CACHE
from blosam_monai.data.embeddings import EncodeImaged, StackedDraws
from blosam_monai.data.pairing import pair_folders
from blosam_monai.data.phantoms import CT_LABELS, PHANTOM_LABELS, write_chest_films, write_ct_slices
from blosam_monai.engines.bilevel_trainer import BilevelTrainer
from blosam_monai.files import atomic
from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.networks.prompt_decoder import PromptDecoder
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.transforms import LabelToGridd, LoadCased, PreprocessImaged, RestoreSized, SliceToPictured

THRESHOLD = ({"background": 0, "foreground": 255}, "threshold")
CAR = ({"background": [0, 3, 4], "body": 1, "wheel": 2}, "index")
HIPPOCAMPUS = ({"background": 0, "anterior": 1, "posterior": 2}, "index")
FILMS, CT = (PHANTOM_LABELS, "index"), (CT_LABELS, "index")
PICTURES, VOLUMES = ("images", "labels"), ("imagesTr", "labelsTr")
SETS: dict[str, tuple[str, tuple[str, str], Any, str | None]] = {  # name -> folder, its two, labels, prefix of supports
    "lungs": ("lung_cxr", PICTURES, THRESHOLD, None),
    "lungs, Montgomery to Shenzhen": ("lung_cxr", PICTURES, THRESHOLD, "MCUCXR"),
    "lungs, Shenzhen to Montgomery": ("lung_cxr", PICTURES, THRESHOLD, "CHNCXR"),
    "teeth": ("dental_panoramic", PICTURES, THRESHOLD, None),
    "polyps": ("kvasir_seg_256", PICTURES, THRESHOLD, None),
    "car parts": ("car_parts", PICTURES, CAR, None),
    "hippocampus slices": ("msd_hippocampus", VOLUMES, HIPPOCAMPUS, None),
    "phantom chest films": ("phantom_films", PICTURES, FILMS, None),
    "phantom CT slices": ("phantom_ct", PICTURES, CT, None),
}
PHANTOMS = {"phantom_films": write_chest_films, "phantom_ct": write_ct_slices}
METHODS = {"first_order": {}, "crossfit": {"crossfit": True}, "joint": {"joint": True}}
WEIGHTS = {"shipped": None, "random": "random"}  # of the tiny SAM: sam_checkpoint
N_SHOT = 4


class Set:
    """A data set read once: its draws and its cases."""

    def __init__(self, name: str, data: Path, draws: int) -> None:
        folder_name, (images, masks), (labels, coding), prefix = SETS[name]
        self.folder = data / folder_name
        if folder_name in PHANTOMS:
            PHANTOMS[folder_name](self.folder, 24)
        slice_axis = "axial" if images == VOLUMES[0] else None
        self.load = LoadCased(labels, None, coding, slice_axis=slice_axis)
        self.tasks = list(self.load.values)
        items = pair_folders(self.folder / images, self.folder / masks, self.folder)
        if slice_axis:
            items = [item | {"slice": self._fullest_slice(item)} for item in items]
        self.lists = [
            make_datalist(
                items,
                labels,
                dataset_dir=self.folder,
                n_shot=N_SHOT,
                seed=seed,
                label_coding=coding,
                support=prefix,
                slice_axis=slice_axis,
            )
            for seed in range(draws)
        ]
        self.cases = {item["subject"]: item for datalist in self.lists for item in datalist["testing"]}

    def read(self, item: dict) -> dict:
        """A picture, or the slice of a volume that the item names."""
        paths = {key: str(self.folder / item[key]) for key in ("image", "label")}
        return dict(SliceToPictured()(self.load({**item, **paths})))

    def _fullest_slice(self, item: dict) -> int:
        paths = {key: str(self.folder / item[key]) for key in ("image", "label")}
        return int(self.load(paths)["label"].sum((0, 2, 3)).argmax())


def run_set(images: Set, method: str, network: PromptSam, epochs: int) -> list[dict]:
    """Train on all draws of a set at once; a row for each draw, task and test case."""
    preprocess, encode = PreprocessImaged(network.image_size), EncodeImaged(network, cache_dir=NO_CACHE)
    to_grid, restore = LabelToGridd(network.image_size, network.grid_size), RestoreSized()

    def read(item: dict) -> dict:
        return dict(encode(preprocess(images.read(item))))

    supports = {
        half: StackedDraws([[to_grid(read(item)) for item in datalist[half]] for datalist in images.lists])
        for half in ("lower", "upper")
    }
    network.decoder = PromptDecoder(network.sam, tasks=len(images.lists) * len(images.tasks), seed=0)
    train(network.decoder, supports, epochs, **METHODS[method])
    rows = []
    for subject, item in images.cases.items():
        case = read(item)
        with torch.no_grad():
            logits = network.decode(case["embedding"][None])[0]  # (draws x tasks, S, S)
        pred = restore({**case, "pred": logits})["pred"] > 0
        for draw, datalist in enumerate(images.lists):
            if item in datalist["testing"]:
                for t, task in enumerate(images.tasks):
                    dice = _dice(pred[draw * len(images.tasks) + t], case["label"][t] > 0)
                    rows.append({"draw": draw, "task": task, "case": subject, "dice": round(dice, 4)})
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


def tables(rows: list[dict], task_of: Callable[[dict], tuple]) -> dict[tuple, np.ndarray]:
    """Dice of each task as (draws, cases), nan where a case was a support or is of another site.

    Cases are those of the whole folder, so that sets of the same images stand in the same columns.
    """
    cases = {
        folder: sorted({row["case"] for row in rows if SETS[row["set"]][0] == folder})
        for folder in dict.fromkeys(SETS[row["set"]][0] for row in rows)
    }
    found: dict[tuple, np.ndarray] = {}
    for row in rows:
        columns = cases[SETS[row["set"]][0]]
        table = found.setdefault(task_of(row), np.full((int(row["draws"]), len(columns)), np.nan))
        table[int(row["draw"]), columns.index(row["case"])] = float(row["dice"])
    return found


def resampled_means(by_task: dict[tuple, np.ndarray], *, resamples: int = 10_000) -> np.ndarray:
    """Mean of each task with draws and cases drawn again, (resamples, tasks).

    Tasks on the images of one folder get the same draws and cases: they are not independent.
    """
    means = np.empty((resamples, len(by_task)))
    folders = [SETS[task[0]][0] for task in by_task]
    for folder in dict.fromkeys(folders):
        rng = np.random.default_rng(0)
        own = [number for number, other in enumerate(folders) if other == folder]
        stacked = np.stack([list(by_task.values())[number] for number in own])  # (tasks, draws, cases)
        _, draws, cases = stacked.shape
        for i in range(resamples):
            again = np.ix_(range(len(own)), rng.integers(draws, size=draws), rng.integers(cases, size=cases))
            means[i, own] = np.nanmean(stacked[again], axis=(1, 2))
    return means


def print_dice(rows: list[dict]) -> None:
    """Dice of every task, and the mean over tasks, by method and weights."""
    print("| set | task | method | weights | Dice, mean | SD over draws | 95 % interval | cases |")
    print("|---|---|---|---|---|---|---|---|")
    for method, weights in dict.fromkeys((row["method"], row["weights"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["weights"]) == (method, weights)]
        by_task = tables(chosen, lambda row: (row["set"], row["task"]))
        means = resampled_means(by_task)
        for number, (task, table) in enumerate(by_task.items()):
            cases = int((~np.isnan(table)).any(0).sum())
            spread = np.nanmean(table, axis=1).std(ddof=1)
            print(
                f"| {' | '.join(task)} | {method} | {weights} | {_figures(table, means[:, number], spread)} | {cases} |"
            )
        overall = np.mean([np.nanmean(table) for table in by_task.values()])
        print(f"| **all** | **mean of {len(by_task)}** | {method} | {weights} | {_figures(overall, means.mean(1))} | |")


def print_gain(rows: list[dict]) -> None:
    """Gain of the shipped over the random weights, case by case: of each task, and the mean over tasks."""
    print("| set | task | method | gain | 95 % interval |\n|---|---|---|---|---|")
    for method in dict.fromkeys(row["method"] for row in rows):
        both = tables([row for row in rows if row["method"] == method], lambda r: (r["set"], r["task"], r["weights"]))
        pairs = {key[:2]: (both[key], both.get((*key[:2], "random"))) for key in both if key[2] == "shipped"}
        gains = {task: shipped - random for task, (shipped, random) in pairs.items() if random is not None}
        if not gains:
            continue
        means = resampled_means(gains)
        for number, (task, table) in enumerate(gains.items()):
            low, high = np.percentile(means[:, number], [2.5, 97.5])
            print(f"| {' | '.join(task)} | {method} | {np.nanmean(table):+.3f} | {low:+.3f} to {high:+.3f} |")
        low, high = np.percentile(means.mean(1), [2.5, 97.5])
        overall = np.mean([np.nanmean(table) for table in gains.values()])
        print(f"| **all** | **mean of {len(gains)}** | {method} | {overall:+.3f} | {low:+.3f} to {high:+.3f} |")


def _figures(values: np.ndarray, resampled: np.ndarray, spread: float | None = None) -> str:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{np.nanmean(values):.3f} | {'' if spread is None else f'{spread:.3f}'} | {low:.3f} to {high:.3f}"


def run(networks: dict[str, PromptSam], options: argparse.Namespace) -> list[dict]:
    """Run what the output does not hold yet; returns all that it holds then."""
    rows: list[dict] = []
    if options.output.is_file():
        with options.output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    with tempfile.TemporaryDirectory() as generated:
        for name in options.sets:
            data = Path(generated) if SETS[name][0] in PHANTOMS else options.data
            images = Set(name, data, options.draws)
            for weights, method in itertools.product(networks, options.methods):
                cell = {"set": name, "weights": weights, "method": method, "sam_weights": networks[weights].sam_weights}
                cell |= {key: str(getattr(options, key)) for key in ("draws", "epochs", "image_size")}
                if any(cell.items() <= row.items() for row in rows):
                    continue
                start = time.perf_counter()
                rows += [cell | row for row in run_set(images, method, networks[weights], options.epochs)]
                print(f"{name}, {weights}, {method}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
                with atomic(options.output) as part, part.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
    others = {row["sam_weights"] for row in rows} - {network.sam_weights for network in networks.values()}
    if others:
        raise ValueError(f"{options.output}: holds rows of other weights ({', '.join(others)}); give another --output.")
    return rows


def main() -> None:
    """Run, then print the tables of all that the output holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="needless for phantoms alone")
    parser.add_argument("--output", type=Path, required=True, help="CSV of all cases")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--sets", nargs="*", choices=list(SETS), default=[name for name in SETS if SETS[name][0] not in PHANTOMS]
    )
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=["first_order"])
    parser.add_argument("--weights", nargs="*", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--image_size", type=int, default=256)
    options = parser.parse_args()
    if options.data is None and any(SETS[name][0] not in PHANTOMS for name in options.sets):
        parser.error("--data: give the folder of the real images, or --sets of phantoms alone.")
    networks = {name: PromptSam("tiny", options.image_size, WEIGHTS[name]) for name in options.weights}
    rows = run(networks, options)
    for weights, network in networks.items():
        print(f"{weights}: {network.sam_weights}")
    print(f"{options.image_size} pixels, {N_SHOT} shots, {options.epochs} epochs, {options.draws} draws\n")
    print_dice(rows)
    print()
    print_gain(rows)


if __name__ == "__main__":
    main()
