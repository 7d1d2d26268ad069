"""Trains and tests the cells of a grid, by the bundle's own configuration.

Draws of a method whose tasks share no trained tensor are tasks of one network: they train in one pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import CacheDataset
from monai.utils import set_determinism
from torch import Tensor, nn
from tqdm import tqdm

from blosam_monai.bench.runner import Cell
from blosam_monai.data.datalist import load_datalist
from blosam_monai.data.embeddings import EncodeImaged, StackedDraws, with_views
from blosam_monai.data.readers import case_stem
from blosam_monai.data.tasks import task_values
from blosam_monai.errors import one_line
from blosam_monai.files import content_sha256
from blosam_monai.handlers import slice_suffix
from blosam_monai.inferers import SliceStreamInferer
from blosam_monai.methods import BUNDLE, compose_config, read_method
from blosam_monai.metrics import case_scores
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.sam import DOWNLOAD, RANDOM, find_checkpoint
from blosam_monai.networks.segmenter import Segmenter
from blosam_monai.transforms import decide_plane

_TRAINERS = ("blosam_monai.engines.bilevel_trainer.BilevelTrainer",)  # that know of draws as tasks
_ORDER_SEED = (
    0  # of the order of images and of views: one for all cells, or stacked draws would differ from single ones
)


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    Attributes:
        cell: of the grid.
        rows: a row for each test case and task.
        record: cost, weights and, if asked for, ``curve``.
    """

    cell: Cell
    rows: list[dict[str, Any]]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Draw:
    cell: Cell
    datalist: dict[str, Any]


def stacks(cell: Cell) -> bool:
    """Whether the draws of a cell's method train in one pass."""
    config = compose_config(cell.preset, cell.overrides)
    target = f"{PromptSam.__module__}.{PromptSam.__qualname__}"
    own_tensors = config["network_def"]["_target_"] == target and config["train_encoder"] == "frozen"
    return own_tensors and config["train"]["trainer"]["_target_"] in _TRAINERS and config["selection"] == "last"


def check(cell: Cell) -> None:
    """Refuse what the settings of a cell contradict or lack, before anything is trained.

    Its network is built without values, and its SAM's file is looked for.

    Raises:
        ValueError: an unknown method or key, a key that the method does not use, keys that exclude each other, or what
            the network refuses.
        FileNotFoundError: no checkpoint where one is needed.
    """
    config = compose_config(cell.preset, cell.overrides)
    if config["selection"] == "validation":
        raise ValueError("selection: the lists of a grid have no validation section; use last or upper.")
    _build_without_values(cell.preset, json.dumps(cell.overrides, sort_keys=True))
    network = config["network_def"]
    if "sam_checkpoint" in network:
        _check_checkpoint(config["sam_model"], config["sam_checkpoint"], config.get("features", "sam"))


@cache
def _build_without_values(preset: str, overrides: str) -> None:
    """Let a network refuse its settings, given as JSON; no file of weights is read."""
    config = compose_config(preset, json.loads(overrides))
    parser = ConfigParser(config)
    parser.update({"task_names": config["tasks"] or ["task"], "seed": 0, "sam_checkpoint": RANDOM, "weights": None})
    # MONAI's SwinUNETR reads numbers out of tensors while it is built.
    device = "cpu" if config.get("architecture") == "swinunetr2d" else "meta"
    with torch.device(device), _without_warnings("blosam_monai.networks"):
        try:
            parser.get_parsed_content("network_def")
        except RuntimeError as error:  # of MONAI, around what the network says
            raise ValueError(one_line(error)) from error


def _check_checkpoint(model: str, checkpoint: str | None, features: str) -> None:
    """Raise where a file of frozen weights is not there; one that is to be fetched is fetched when it is needed."""
    if checkpoint == RANDOM or (features != "sam" and checkpoint is None):
        return
    if features == "sam" and checkpoint in (None, DOWNLOAD):
        if checkpoint is None:
            find_checkpoint(model, fetch=False)
    elif not Path(str(checkpoint)).is_file():
        raise FileNotFoundError(f"sam_checkpoint: {checkpoint} does not exist; give a file of weights.")


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Within it, the loggers below a name tell errors only."""
    named = logging.getLogger(name)
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)


def run_cells(cells: Sequence[Cell], *, device: str) -> Iterator[CellResult]:
    """Train and test cells that differ only in their draw.

    Args:
        cells: of one method, data set and number of shots.
        device: of the training and the test.
    """
    draws = [_read_draw(cell) for cell in cells]
    for group in _groups(draws) if stacks(cells[0]) else ([draw] for draw in draws):
        yield from _Run(group, device).results()


def _read_draw(cell: Cell) -> _Draw:
    load = partial(load_datalist, cell.data_list, cell.dataset_dir, seed=cell.seed, tasks=cell.overrides.get("tasks"))
    return _Draw(cell, {**load(), "testing": load(section="testing")["testing"]})


def _groups(draws: Sequence[_Draw]) -> list[list[_Draw]]:
    """The draws by the sizes of their halves: only equal ones train in one pass."""
    groups: dict[tuple[int, int], list[_Draw]] = {}
    for draw in draws:
        groups.setdefault((len(draw.datalist["lower"]), len(draw.datalist["upper"])), []).append(draw)
    return list(groups.values())


class _Run:
    """One training and its test: R draws of C classes as T = R C tasks of a network."""

    def __init__(self, draws: Sequence[_Draw], device: str) -> None:
        self.draws, self.device = draws, device
        cell = draws[0].cell
        self.config = compose_config(cell.preset, cell.overrides)
        labels, tasks = draws[0].datalist["labels"], cell.overrides.get("tasks")
        self.tasks = list(task_values(labels, tasks))
        parser = ConfigParser(self.config)
        parser.update(
            {
                "bundle_root": str(BUNDLE),
                "data_list": cell.data_list,
                "dataset_dir": cell.dataset_dir,
                "device": device,
                "seed": _ORDER_SEED,
                "use_mlflow": False,
                "task_names": [f"draw{draw.cell.draw} {task}" for draw in draws for task in self.tasks]
                if len(draws) > 1
                else self.tasks,
                "network_def#seed": [draw.cell.seed for draw in draws for _ in self.tasks]
                if len(draws) > 1
                else cell.seed,
            }
        )
        self.network: Segmenter = parser.get_parsed_content("network")
        parser.update({"network_def": self.network, "network": self.network})  # not to be built again
        self.parser = parser
        self.load = parser.get_parsed_content("load")
        self.encode = EncodeImaged(self.network, self.config["cache_dir"], remember=False)
        self.curves: list[list[dict[str, float]]] = [[] for _ in draws]
        self.seconds_of_curves = 0.0

    def results(self) -> Iterator[CellResult]:
        """Train, test, and give the result of each draw."""
        seconds = self._train()
        rows = self._test([draw.datalist["testing"] for draw in self.draws])
        hash_of = cache(content_sha256)
        trained, total = self.network.count_parameters()
        for number, draw in enumerate(self.draws):
            record = {
                "seconds": seconds / len(self.draws),
                "stacked_draws": len(self.draws),
                "trained_parameters": trained // len(self.draws),
                "total_parameters": total - trained + trained // len(self.draws),
                "sam_weights": self.network.sam_weights,
                "pretrained": self.network.pretrained,
                "oracle": bool(read_method(draw.cell.preset).get("oracle")),
                "tested_sha256": _tested_sha256(draw.datalist["testing"], hash_of),
                "effective_ranks": self._ranks(number),
                "curve": self.curves[number],
                "device": self.device,
            }
            yield CellResult(draw.cell, rows[number], record)

    def _train(self) -> float:
        """Train, if there is anything to train; seconds that it took, all draws together."""
        set_determinism(seed=self.draws[0].cell.seed)
        remember = getattr(self.network.decoder, "remember", None)
        if remember is not None:
            remember(self.parser.get_parsed_content("train#supports"))
        if not self.network.lower_parameters() and not self.network.upper_parameters():
            return 0.0
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(folder)
            start = time.perf_counter()
            trainer.run()
            _wait_for(self.device)
            return time.perf_counter() - start - self.seconds_of_curves

    def _trainer(self, folder: str) -> Engine:
        """The configuration's trainer, without what a single training writes and shows."""
        parser = self.parser
        selects = self.config["selection"] != "last"
        handlers = parser.get("train#handlers")
        parser.update(
            {
                "output_dir": folder,
                "overlays": False,
                "train#handlers": [
                    h
                    for h in handlers
                    if h["_target_"] == "LrScheduleHandler" or (selects and h["_target_"] == "ValidationHandler")
                ],
                "train#trainer#key_train_metric": None,
                "train#trainer#postprocessing": None,
                "train#trainer#decollate": False,
                **{f"train#{name}#progress": False for name, part in parser.get("train").items() if _is_cached(part)},
            }
        )
        if len(self.draws) > 1:
            transform = parser.get_parsed_content("train#preprocessing")
            one_set = self.config["levels"] in ("joint", "alternate")
            views = self.config["augment_views"]

            def stack(sections: Sequence[str]) -> StackedDraws:
                lists = [[item for s in sections for item in draw.datalist[s]] for draw in self.draws]
                data = [with_views(items, views, seed=_ORDER_SEED) for items in lists]
                return StackedDraws([CacheDataset(items, transform, progress=False) for items in data])

            parser["train#dataset"] = stack(["lower", "upper"] if one_set else ["lower"])
            if not one_set:
                parser["train#upper_dataset"] = stack(["upper"])
        trainer: Engine = parser.get_parsed_content("train#trainer")
        if selects:
            best = parser.get_parsed_content("best")
            best.attach(trainer)
            trainer.add_event_handler(Events.COMPLETED, lambda: self.network.decoder.load_adapter_state(best.best))
        interval = self.draws[0].cell.test_curve
        if interval:
            trainer.add_event_handler(Events.STARTED, lambda: self._note_curves(0))
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED(every=interval), lambda engine: self._note_curves(engine.state.epoch)
            )
        return trainer

    def _note_curves(self, epoch: int) -> None:
        """Mean Dice of each draw on the images it learns from and on its test images (the paper's figure 2)."""
        _wait_for(self.device)
        start = time.perf_counter()
        sections = {"lower_dice": "lower", "test_dice": "testing"}
        scores = {
            name: self._test([draw.datalist[section] for draw in self.draws], dice_only=True)
            for name, section in sections.items()
        }
        for number, curve in enumerate(self.curves):
            means = {name: fmean(row["dice"] for row in rows[number]) for name, rows in scores.items()}
            curve.append({"epoch": epoch, **means})
        self.seconds_of_curves += time.perf_counter() - start

    @torch.no_grad()
    def _test(self, sections: Sequence[Iterable[Mapping[str, Any]]], *, dice_only: bool = False) -> list[list[dict]]:
        """Rows of each draw for the items of its section; an item that several draws have is predicted once."""
        wanted: dict[tuple[str, Any], tuple[Mapping[str, Any], list[int]]] = {}
        for number, items in enumerate(sections):
            for item in items:
                wanted.setdefault((item["image"], item.get("slice")), (item, []))[1].append(number)
        inferer = SliceStreamInferer(
            self.network.image_size,
            self.config["preprocess"],
            decide=partial(decide_plane, threshold=0.5),
            neighbours=self.config["neighbours"],
        )
        self.network.eval()
        encoded: Any = _Encoded(self.network, self.encode)
        rows: list[list[dict]] = [[] for _ in self.draws]
        for item, numbers in tqdm(wanted.values(), "testing", leave=False, disable=dice_only):
            case = self.load(item)
            spacing = [float(size) for size in case["spacing"]]
            where = {"spacing": spacing, "slice_axis": case["slice_axis"], "label": case["label"]}
            pred = inferer(case["image"], encoded, **where)  # (T, D, H, W)
            for number in numbers:
                own = pred[number * len(self.tasks) : (number + 1) * len(self.tasks)]
                rows[number] += self._rows(case, own, dice_only=dice_only)
        return rows

    def _rows(self, case: Mapping[str, Any], pred: Tensor, *, dice_only: bool) -> list[dict]:
        """Rows of a case for one draw: scores of each task on the case's own grid."""
        label = case["label"]
        if dice_only:
            scores: Mapping[str, Any] = {"dice": [_dice(p > 0, t > 0) for p, t in zip(pred, label, strict=True)]}
        else:
            spacing = None if case["unit"] == "pixel" else [float(size) for size in case["spacing"]]
            if pred.shape[1] == 1:  # one slice has an area, not a volume
                pred, label, spacing = pred[:, 0], label[:, 0], spacing and spacing[1:]
            scores = case_scores(pred, label, spacing=spacing, nsd_tolerance=self.config["nsd_tolerance"])
        name = case_stem(case["source"]) + slice_suffix(case.get("slice"))
        return [
            {"task": task, "case": name, "subject": case["subject"]}
            | {score: float(values[t]) for score, values in scores.items()}
            for t, task in enumerate(self.tasks)
        ]

    def _ranks(self, number: int) -> dict[str, list[int]]:
        """Effective rank of each gated layer for the tasks of one draw; empty without gates."""
        state = {name: value.cpu() for name, value in self.network.decoder.adapter_state().items()}
        ranks = self.network.decoder.exported(state)[1].get("effective_ranks", {})
        own = slice(number * len(self.tasks), (number + 1) * len(self.tasks))
        return {layer: values[own] for layer, values in ranks.items()}


class _Encoded(nn.Module):
    """A network that looks its embeddings up: an image is encoded once for all methods that share an encoder."""

    def __init__(self, network: Segmenter, encode: EncodeImaged) -> None:
        super().__init__()
        self.network, self.encode = network, encode
        self.prompted, self.tasks = network.prompted, network.tasks

    def forward(self, image: Tensor, prompts: Tensor | None = None) -> Tensor:
        """As the network's."""
        found = torch.stack([self.encode({"image": one.cpu()})["embedding"] for one in image]).to(image.device)
        return self.network.decode(found if prompts is None else (found, prompts))


def _tested_sha256(items: Iterable[Mapping[str, Any]], hash_of: Callable[[str], str]) -> str:
    """SHA-256 over the images and labels of the items, in their order: whether two cells were tested on the same."""
    hashes = [hash_of(item[key]) for item in items for key in ("image", "label")]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _is_cached(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("_target_") == "CacheDataset"


def _dice(pred: Tensor, label: Tensor) -> float:
    """Dice by its definition, both empty counting 1 (``case_scores`` takes surfaces too, most of the time)."""
    size = int(pred.sum() + label.sum())
    return 2 * int((pred & label).sum()) / size if size else 1.0


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
