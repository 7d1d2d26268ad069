"""The evaluator of few-shot heads: fixed episodes of novel classes, scored on the query's own grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.inferers import Inferer, SimpleInferer
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from blosam_monai.data.readers import case_stem
from blosam_monai.files import PathLike, write_json
from blosam_monai.handlers import case_id
from blosam_monai.iou import IoUAccumulator
from blosam_monai.metrics import TABLES, case_scores, write_table
from blosam_monai.networks.few_shot.segmenter import at_places
from blosam_monai.transforms import restore_logits

logger = logging.getLogger(__name__)

COUNTS, IOU = "iou_counts.csv", "iou.json"


class EpisodicEvaluator(Evaluator):
    """Segments the query of every episode; its output is what ``EpisodeTable`` scores.

    At several scales the logits, brought to the query's own grid, are averaged. The output has ``pred`` and ``label``
    (1, H, W) bool, and ``maps``: of a head with ``predictions`` (BiOpt) each of its maps in the same way.

    Args:
        device: where the head is, and the episodes are brought.
        val_data_loader: of ``ScaledEpisodes``, ``batch_size`` 1, ``collate_fn`` no_collation.
        network: the head.
        inferer: MONAI inferer, default ``SimpleInferer``.
        val_handlers: see ``Evaluator``.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: DataLoader,
        network: Any,
        *,
        inferer: Inferer | None = None,
        val_handlers: Sequence | None = None,
    ) -> None:
        self.network = network
        self.inferer = SimpleInferer() if inferer is None else inferer
        super().__init__(
            device=torch.device(device), val_data_loader=val_data_loader, val_handlers=val_handlers, decollate=False
        )

    def _iteration(self, engine: Engine, batchdata: Sequence[Mapping]) -> dict[str, Any]:
        (episode,) = batchdata
        self.network.eval()
        with torch.no_grad():
            drawn = [self._draw(view, episode["label"].shape[-2:]) for view in episode["scales"]]
        mean = {name: torch.stack([maps[name] for maps in drawn]).mean(0) > 0 for name in drawn[0]}
        return {CommonKeys.PRED: mean.pop(CommonKeys.PRED), CommonKeys.LABEL: episode["label"], "maps": mean}

    def _draw(self, view: Mapping[str, Any], native: Sequence[int]) -> dict[str, Tensor]:
        """Logits (1, H, W) of an episode at one scale: ``pred``, and the head's own maps."""
        support, mask, query = (view[key][None].to(self.state.device) for key in ("support", "mask", "embedding"))
        mask, head = at_places(mask[:, :, 0].float(), query), self.network
        maps = head.predictions(support, mask, query) if hasattr(head, "predictions") else {}
        maps = {**maps, CommonKeys.PRED: self.inferer(support, head, mask, query)}
        side, inside = view["image_size"], view["input_size"].tolist()
        return {
            name: restore_logits(
                F.interpolate(logit[:, None], (side, side), mode="bilinear", align_corners=False)[0], inside, native
            ).cpu()
            for name, logit in maps.items()
        }


class EpisodeTable:
    """Scores every episode, and writes at the end what they amount to.

    ``cases.csv``, ``cases.json`` and ``summary.json`` are those of ``CaseTableHandler`` with a row an episode: its
    query is the case, its class the task, and ``supports`` are hashes. ``iou.json`` has mean-IoU and binary-IoU with
    their intervals, the IoU of each class, and the same two of each map; ``iou_counts.csv`` what
    ``IoUAccumulator.read`` puts together over folds. The engine's metrics are the two numbers.

    Args:
        output_dir: folder of the files.
        settings: what the files say beside the scores; ``training`` are those of the trained head.
        fold: of the classes.
        nsd_tolerance: see ``case_scores``.
        overwrite: replace earlier scores.

    Raises:
        FileExistsError: there are earlier scores.
    """

    def __init__(
        self,
        output_dir: PathLike,
        settings: Mapping[str, Any],
        *,
        fold: str | int = 0,
        nsd_tolerance: float = 2.0,
        overwrite: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir)
        if (self.output_dir / "cases.csv").exists() and not overwrite:
            raise FileExistsError(f"output_dir: {output_dir} holds scores; choose another or add overwrite=true.")
        self.settings = {**settings, "nsd_tolerance": nsd_tolerance}
        self.fold, self.nsd_tolerance = str(fold), nsd_tolerance
        self._ids: dict[tuple[str, Any], str] = {}
        self._restart()

    def attach(self, engine: Engine) -> None:
        """Attach to an ``EpisodicEvaluator``."""
        engine.add_event_handler(Events.STARTED, self.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)  # before a tracker logs the epoch's metrics

    def clear(self, engine: Engine) -> None:
        """Forget an earlier run and remove what it wrote."""
        self._restart()
        for name in (*TABLES, COUNTS, IOU):
            (self.output_dir / name).unlink(missing_ok=True)

    def score(self, engine: Engine) -> None:
        """Score the query of this iteration."""
        (episode,), output = engine.state.batch, engine.state.output
        pred, label = output[CommonKeys.PRED], output[CommonKeys.LABEL]
        query, name = episode["query"], episode["name"]
        spacing = None if query["unit"] == "pixel" else [float(size) for size in query["spacing"]]
        scores = case_scores(pred, label, spacing=spacing, nsd_tolerance=self.nsd_tolerance)
        of = {"name": name, "subject": query["subject"], "fold": self.fold}
        self.iou.add(pred, label, **of)
        for shown, mask in output["maps"].items():
            self.maps.setdefault(shown, IoUAccumulator()).add(mask, label, **of)
        self.rows.append(
            {
                "case": case_stem(query["source"]) + (f"_slice{query['slice']:03d}" if "slice" in query else ""),
                "case_id": self._identify(query),
                "subject": query["subject"],
                "section": query["section"],
                "task": name,
                "unit": query["unit"],
                **{score: float(values[0]) for score, values in scores.items()},
                "label_empty": int(not label.any()),
                "pred_empty": int(not pred.any()),
                "episode": engine.state.iteration - 1,
                "supports": " ".join(self._identify(item) for item in episode["supports"]),
            }
        )

    def write(self, engine: Engine) -> None:
        """Write the tables and log the two numbers."""
        write_table(self.output_dir, self.rows, {**self.settings, "failed_cases": 0})
        self.iou.write(self.output_dir / COUNTS)
        summary, classes = self.iou.summary(), self.iou.class_iou()[self.fold]
        text = {
            **summary,
            "episodes": len(self.rows),
            "fold": self.fold,
            "classes": classes,
            "maps": {name: counted.summary() for name, counted in self.maps.items()},
        }
        write_json(self.output_dir / IOU, text)
        if seen := set(classes) & set(self.settings.get("training", {}).get("base", ())):
            logger.warning("%d of the classes were trained on: the scores say nothing of novel ones", len(seen))
        engine.state.metrics |= {name: summary[name] for name in ("mean_iou", "binary_iou")}
        logger.info(
            "mean-IoU %.3f (%.3f to %.3f), binary-IoU %.3f (%.3f to %.3f); %d episodes, %d subjects",
            *(summary[f"{score}{end}"] for score in ("mean_iou", "binary_iou") for end in ("", "_low", "_high")),
            *(len(self.rows), summary["subjects"]),
        )

    def _restart(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.iou, self.maps = IoUAccumulator(), {}  # type: IoUAccumulator, dict[str, IoUAccumulator]

    def _identify(self, item: Mapping[str, Any]) -> str:
        key = item["source"], item.get("slice")
        if key not in self._ids:
            self._ids[key] = case_id(item)
        return self._ids[key]
