"""What happens around the iterations: scores of cases, manifest, curves, the best adapters, exact resume, progress."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.utils.enums import CommonKeys
from torch import Tensor
from tqdm import tqdm

from blosam_monai.data.readers import case_stem
from blosam_monai.data.writers.pictures import write_overlay
from blosam_monai.engines.bilevel_trainer import UPPER_LOSS
from blosam_monai.engines.case_evaluator import FAILED, KEPT, CaseEvents
from blosam_monai.errors import one_line, without_names
from blosam_monai.files import PathLike, atomic, case_hash, file_sha256
from blosam_monai.metrics import TABLES, case_scores, write_rows, write_table
from blosam_monai.networks.adapters import save_adapters
from blosam_monai.networks.segmenter import Segmenter, State
from blosam_monai.outputs import MANIFEST
from blosam_monai.transforms import picture_of

logger = logging.getLogger(__name__)

SELECTIONS = ("last", "upper", "validation")
CURVES = "curves.csv"


def case_id(item: Mapping[Any, Any]) -> str:
    """What a case is called in logs and in MLflow: the first 12 digits of its image's SHA-256, and its slice."""
    path = item["source"] if "source" in item else item["image"]
    return case_hash(path) + slice_suffix(item.get("slice"))


def slice_suffix(number: Any) -> str:
    """What a slice adds to the name of its volume; nothing for an image that is not one of several."""
    return "" if number is None else f"_slice{int(number):03d}"


def task_means(engine: Engine, metric: str) -> Tensor:
    """Mean of a metric of an engine for each task (T,), from its details (cases, T); not-a-number cases left out."""
    return torch.as_tensor(engine.state.metric_details[metric]).nanmean(dim=0).cpu()


def first_output(engine: Engine) -> Mapping[str, Any]:
    """The engine's output for the first case of its batch, which holds the losses; empty where every case failed."""
    output = engine.state.output
    return output if isinstance(output, dict) else (output or [{}])[0]


def clear_training(output_dir: PathLike, ckpt_dir: PathLike) -> None:
    """Remove the model and the results of a training that is replaced, lest they be taken for those of the next."""
    _clear(Path(output_dir), [*TABLES, CURVES])
    _clear(Path(ckpt_dir), ["model.safetensors", "model.json"])


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove these files, and the overlays."""
    for path in (*(folder / name for name in names), *(folder / "overlays").glob("*.png")):
        path.unlink(missing_ok=True)


class CaseTableHandler:
    """Score every case of an evaluator on its own grid; overlays as it goes, the tables at the end.

    Args:
        output_dir: folder of ``cases.csv``, ``cases.json``, ``summary.json`` and ``overlays``.
        tasks: names of the tasks.
        settings: what the summary says beside the scores (weights, data list, thresholds).
        nsd_tolerance: mm, or pixels where the image has no spacing, see ``case_scores``.
        overlays: write prediction and label over each image (of a volume, the slice with most of both).
        overwrite: replace an earlier table.
        model: file of the adapters, where their hash is not yet among the settings: the summary says it.
    """

    def __init__(
        self,
        output_dir: PathLike,
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        *,
        nsd_tolerance: float = 2.0,
        overlays: bool = True,
        overwrite: bool = False,
        model: PathLike | None = None,
    ) -> None:
        self.output_dir, self.tasks, self.overlays, self.model = Path(output_dir), list(tasks), overlays, model
        if (self.output_dir / "cases.csv").exists() and not overwrite:
            raise FileExistsError(f"output_dir: {output_dir} holds scores; choose another or add overwrite=true.")
        self.settings = {**settings, "nsd_tolerance": nsd_tolerance}
        self.nsd_tolerance = nsd_tolerance
        self.rows: list[dict[str, Any]] = []
        self._case_of: dict[str, str] = {}  # name in the table -> image

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def clear(self, engine: Engine) -> None:
        """Forget the cases of an earlier run; what it wrote goes, lest it be taken for what this one could not."""
        self.rows.clear()
        self._case_of.clear()
        _clear(self.output_dir, TABLES)

    def score(self, engine: Engine) -> None:
        """Score the cases of this iteration; predictions are binary, (T, H, W) or (T, D, H, W)."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            pred, label = (output[key].cpu() for key in (CommonKeys.PRED, CommonKeys.LABEL))
            spacing = None if item["unit"] == "pixel" else [float(size) for size in item["spacing"]]
            if pred.ndim == 4 and pred.shape[1] == 1:  # one slice has an area, not a volume
                pred, label, spacing = pred[:, 0], label[:, 0], spacing and spacing[1:]
            scores = case_scores(pred, label, spacing=spacing, nsd_tolerance=self.nsd_tolerance)
            identity = case_id(item)
            name = self._name(item, identity)
            for t, task in enumerate(self.tasks):
                self.rows.append(
                    {
                        "case": name,
                        "case_id": identity,
                        "subject": item["subject"],
                        "section": item["section"],
                        "task": task,
                        "unit": item["unit"],
                        **{score: float(values[t]) for score, values in scores.items()},
                        "label_empty": int(not label[t].any()),
                        "pred_empty": int(not pred[t].any()),
                    }
                )
            if self.overlays:
                self._draw(name, item, pred, label)

    def write(self, engine: Engine) -> None:
        """Write the tables; log their summary."""
        if not self.rows:
            return  # every case failed; the manifest says why
        failed = sum(case.status == FAILED for case in getattr(engine, "cases", ()))
        hashed = {} if self.model is None else {"model_sha256": file_sha256(self.model)}
        summary = write_table(self.output_dir, self.rows, {**self.settings, **hashed, "failed_cases": failed})
        self._warn_of_supports()
        if self.settings.get("oracle"):
            logger.warning("oracle: the prompts were taken from the labels; the scores are not those of a new image")
        units = " and ".join(sorted({row["unit"] for row in self.rows}))
        for section, by_task in summary.items():
            for task in self.tasks:
                numbers = by_task[task]
                logger.info(
                    "%s, %s: Dice %.3f (SD %.3f), HD95 %.1f %s, NSD %.3f; %d cases, %d empty labels",
                    *(section, task, numbers["dice_mean"], numbers["dice_sd"], numbers["hd95_mean"], units),
                    *(numbers["nsd_mean"], numbers["cases"], numbers["empty_labels"]),
                )

    def _warn_of_supports(self) -> None:
        supports = {identity[:12] for identity in self.settings.get("supports", ())}  # images, whichever slice of them
        rows = [row for row in self.rows if row["section"] in ("validation", "testing")]
        if trained_on := {row["case"] for row in rows if row["case_id"][:12] in supports}:
            logger.warning("%d of the cases were trained on: the scores may be too high", len(trained_on))

    def _name(self, item: Mapping[str, Any], identity: str) -> str:
        """What the table calls a case: stem and slice, and the hash where another image has the same."""
        name = case_stem(item["source"]) + slice_suffix(item.get("slice"))
        if self._case_of.setdefault(name, item["source"]) != item["source"]:
            name = f"{name}_{identity}"
        return name

    def _draw(self, name: str, item: Mapping[str, Any], pred: Tensor, label: Tensor) -> None:
        shown = 0
        if pred.ndim == 4:
            shown = int((pred > 0).sum(dim=(0, 2, 3)).add((label > 0).sum(dim=(0, 2, 3))).argmax())
            pred, label = pred[:, shown], label[:, shown]
        picture = item["picture"] if "picture" in item else item[CommonKeys.IMAGE][:, shown]
        path = self.output_dir / "overlays" / f"{name}.png"
        write_overlay(path, picture_of(picture).numpy(), pred.numpy(), label.numpy())


class ManifestHandler:
    """Write a line of JSON for every case, as it ends: what was written, how long it took, or why it failed.

    The file is ``manifest.jsonl`` in ``output_dir``; a later run adds to it. A case is told by its number and its hash;
    names of files only if ``log_paths``.

    Args:
        output_dir: folder of the manifest.
        log_paths: also the paths of image and outputs, and errors as they were said on the terminal.
        model: what a line says of the model, since a later run may have another: see ``describe_model``. A result that
            was kept is of the model in the line that says it was written; its own line names none.
        section: of an evaluation; every line says it.
    """

    def __init__(
        self,
        output_dir: PathLike,
        *,
        log_paths: bool = False,
        model: Mapping[str, Any] | None = None,
        section: str | None = None,
    ) -> None:
        self.path, self.log_paths, self.model = Path(output_dir) / MANIFEST, log_paths, dict(model or {})
        self.section = {} if section is None else {"section": section}

    def attach(self, engine: Engine) -> None:
        """Attach to a ``CaseEvaluator``."""
        engine.add_event_handler(CaseEvents.CASE_COMPLETED, self.note)

    def note(self, engine: Any) -> None:
        """Add the line of the last case."""
        case = engine.cases[-1]
        paths = [case.given[key] for key in (CommonKeys.IMAGE, CommonKeys.LABEL) if key in case.given]
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "number": case.number,
            "case_id": self._identify(case.given),
            "status": case.status,
            "seconds": round(case.seconds, 3),
            "outputs": [
                {"content": output.content, "format": output.format, "task": output.task, "name_id": output.name_id}
                | ({"path": str(output.path)} if self.log_paths else {})
                for output in case.outputs
            ],
            "notes": list(case.notes),
            **({} if case.status == KEPT else self.model),
            **self.section,
        }
        if case.error is not None:
            text = one_line(case.error)
            line["error"] = text if self.log_paths else without_names(text, *paths, self.path.parent)
        if self.log_paths:
            line["image"] = str(paths[0])
        self._add(line)

    def _identify(self, given: Mapping[str, Any]) -> str | None:
        """The case's hash; None where its file cannot be read, which is why the case has failed."""
        try:
            return case_id(given)
        except OSError:
            return None

    def _add(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # an earlier run was killed in mid-line
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


class CurvesHandler:
    """Keep the curves of a training in ``curves.csv``: both losses and the Dice of each task, a line an epoch.

    A loss is the mean over the iterations of its epoch. Dice is on the images' own grid, so that its curves compare:
    epoch 0 is the untrained network. The file is written whenever Dice was measured. A resumed training goes on with
    the epochs of the state it was saved in: none is lost, none is doubled.

    Args:
        output_dir: folder of the file.
        tasks: names of the tasks.
        evaluators: section (``lower upper validation``) -> evaluator of its Dice, which the trainer runs as it goes;
            None where the section is empty. The testing section is never looked at during a training.
    """

    LOSSES = (CommonKeys.LOSS.value, UPPER_LOSS)  # plain text: the state loads with ``weights_only=True``

    def __init__(self, output_dir: PathLike, tasks: Sequence[str], evaluators: Mapping[str, Evaluator | None]) -> None:
        self.path, self.tasks = Path(output_dir) / CURVES, list(tasks)
        self.evaluators = {section: e for section, e in evaluators.items() if e is not None}
        self.rows: dict[int, dict[str, float]] = {}  # by epoch
        self._losses: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, before ``TrainingState``; the evaluators are those given."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._losses.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note_losses)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._average_losses)
        engine.add_event_handler(Events.COMPLETED, self._measure_last)
        for section, evaluator in self.evaluators.items():
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._note_dice, section, engine)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.rows = state["rows"]

    def _note_losses(self, engine: Engine) -> None:
        first = first_output(engine)
        self._losses.append({name: float(first[name]) for name in self.LOSSES if name in first})

    def _average_losses(self, engine: Engine) -> None:
        """Comes after the evaluators, which the trainer runs from handlers of its own."""
        row = self._row(engine.state.epoch)
        measured = len(row) > 1
        row.update({name: fmean(losses[name] for losses in self._losses) for name in self._losses[0]})
        if measured:
            self._write()

    def _note_dice(self, evaluator: Engine, section: str, trainer: Engine) -> None:
        for metric in evaluator.state.metric_details:
            scores = zip(self.tasks, task_means(evaluator, metric).tolist(), strict=True)
            self._row(trainer.state.epoch).update({f"{section}_dice/{task}": score for task, score in scores})

    def _measure_last(self, engine: Engine) -> None:
        """At the end of the training: the last epoch is measured too when it is not one of the interval."""
        for section, evaluator in self.evaluators.items():
            if f"{section}_dice/{self.tasks[0]}" not in self._row(engine.state.epoch):
                evaluator.run(engine.state.epoch)
        self._write()

    def _row(self, epoch: int) -> dict[str, float]:
        return self.rows.setdefault(epoch, {"epoch": epoch})

    def _write(self) -> None:
        dice = [f"{section}_dice/{task}" for section in self.evaluators for task in self.tasks]
        names = ["epoch", *self.LOSSES, *dice]
        write_rows(self.path, [{name: row.get(name, "") for name in names} for _, row in sorted(self.rows.items())])


class BestAdapters:
    """Keep the adapters of each task: its best so far by an evaluator's Dice, or the last.

    Tasks that share trained tensors are kept together: their best is that of their mean Dice.

    Args:
        network: whose decoder is kept.
        path: the ``.safetensors`` file, see ``save_adapters``.
        settings: what the file says beside the network's own settings.
        selection: ``last``, ``upper`` (best Dice on D2, as published) or ``validation``.
        evaluator: gives the Dice of each task, on D2 or on the validation set; None for ``last``.
        metric: name of the evaluator's metric, with details (cases, T).
    """

    def __init__(
        self,
        network: Segmenter,
        path: PathLike,
        settings: Mapping[str, Any],
        *,
        selection: str = "last",
        evaluator: Evaluator | None = None,
        metric: str = "val_mean_dice",
    ) -> None:
        if selection not in SELECTIONS:
            raise ValueError(f"selection: {selection!r} is not one of {', '.join(SELECTIONS)}.")
        if selection != "last" and evaluator is None:
            raise ValueError(f"selection: {selection} needs a {selection} set that is not empty; use last.")
        self.network, self.path, self.settings = network, Path(path), dict(settings)
        self.selection, self.metric = selection, metric
        self.evaluator = None if selection == "last" else evaluator
        self.best = {name: value.cpu().clone() for name, value in network.decoder.adapter_state().items()}
        self.score = torch.full((len(network.tasks),), -torch.inf)
        self.epoch = torch.zeros(len(network.tasks), dtype=torch.long)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; the evaluator is the one given."""
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.compare)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def compare(self, evaluator: Engine) -> None:
        """Take over the tasks whose Dice is above their best, and write the file if there are any."""
        scores = task_means(evaluator, self.metric)
        if self.network.decoder.shared:
            scores = scores.nanmean().expand_as(scores)
        scores = scores.nan_to_num(-torch.inf)
        better = scores > self.score
        if better.any():
            self._take(better, evaluator.state.epoch)
            self.score = torch.where(better, scores, self.score)
            self.save()

    def finish(self, engine: Engine) -> None:
        """At the end of the training: write what was selected."""
        if self.evaluator is not None and self.evaluator.state.epoch != engine.state.epoch:
            self.evaluator.run(engine.state.epoch)  # the last epoch is judged too when it is not one of the interval
        if self.selection == "last":
            self._take(torch.ones_like(self.score, dtype=torch.bool), engine.state.epoch)
        self.save()
        for layer, ranks in self.network.decoder.exported(self.best)[1].get("effective_ranks", {}).items():
            logger.info("effective rank of %s: %s", layer, ", ".join(map(str, ranks)))

    def save(self) -> None:
        """Write the kept adapters."""
        chosen = {
            "selection": self.selection,
            "selected_epoch": dict(zip(self.network.tasks, self.epoch.tolist(), strict=True)),
        }
        if self.selection != "last":
            chosen["selected_dice"] = dict(zip(self.network.tasks, self.score.tolist(), strict=True))
        state, changed = self.network.decoder.exported(self.best)
        own = {**self.network.settings, "sam_weights": self.network.sam_weights, **changed}
        save_adapters(self.path, state, {**self.settings, **own, **chosen})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, so that a worse model never replaces a better one."""
        return {"best": self.best, "score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.best, self.score, self.epoch = state["best"], state["score"], state["epoch"]

    def _take(self, tasks: Tensor, epoch: int) -> None:
        for name, value in self.network.decoder.adapter_state().items():
            if self.network.decoder.shared:
                self.best[name] = value.cpu().clone()
            else:
                self.best[name][tasks] = value.cpu()[tasks]
        self.epoch[tasks] = epoch


def check_preset(method: str, preset: str) -> None:
    """Refuse a method whose preset was not loaded: the name alone changes nothing."""
    if method != preset:
        raise ValueError(
            f"method: {method} was asked for, the configs are those of {preset}; add configs/methods/{method}.json to "
            f"config_file, or use `blosam train --method {method}`."
        )


def check_state(path: PathLike, *, resume: bool, overwrite: bool) -> None:
    """Refuse to resume what is not there, or to train over what is; asked before anything is read or written."""
    exists = Path(path).is_file()
    trained = exists or Path(path).with_name("model.safetensors").is_file()
    if resume and not exists:
        raise FileNotFoundError(f"resume: {path} does not exist; start without resume.")
    if trained and not resume and not overwrite:
        raise FileExistsError(
            f"output_dir: {Path(path).parent} holds an earlier training; choose another output_dir, go on with "
            "resume=true, or replace it with overwrite=true."
        )


class AdapterState:
    """The trained tensors of a network, as an object of ``TrainingState``."""

    def __init__(self, network: Segmenter) -> None:
        self.network = network

    def state_dict(self) -> State:
        """The tensors."""
        return dict(self.network.decoder.adapter_state())

    def load_state_dict(self, state: State) -> None:
        """Restore ``state_dict``."""
        self.network.decoder.load_adapter_state(state)


class TrainingState:
    """Save the whole state of a training as it goes, and restore it exactly.

    Everything that changes during training is in the objects given; the order of the images is a function of seed and
    iteration (``DistributedSampler``). A run that was killed goes on from the last saved epoch to the same weights, bit
    for bit. Attach last, so that what the other handlers did in an epoch is saved with it.

    Args:
        path: the state file, a ``torch.save`` of tensors, numbers and text that loads with ``weights_only=True``.
        objects: name -> object with ``state_dict`` and ``load_state_dict``.
        settings: the run's settings; a resumed run must have the same.
        interval: epochs between saves.
    """

    def __init__(self, path: PathLike, objects: Mapping[str, Any], settings: Mapping[str, Any], *, interval: int = 1):
        self.path, self.objects, self.interval = Path(path), dict(objects), interval
        self.settings = json.loads(json.dumps(dict(settings), default=str))

    def attach(self, trainer: Engine, *, resume: bool = False) -> None:
        """Attach to the trainer; restore the saved state first if ``resume`` (``check_state`` has found it there)."""
        if resume:
            self._restore(trainer)
        else:  # or a run that is stopped before its first save would go on as the one that it replaced
            trainer.add_event_handler(Events.STARTED, lambda: self.path.unlink(missing_ok=True))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Save after this epoch, if it is one of the interval or the last."""
        epoch, last = engine.state.epoch, engine.state.max_epochs
        if epoch % self.interval and epoch != last:
            return
        state = {name: item.state_dict() for name, item in self.objects.items()}
        with atomic(self.path) as part:
            torch.save({"epoch": epoch, "settings": self.settings, "objects": state}, part)

    def _restore(self, trainer: Engine) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"resume: {self.path} is damaged ({type(error).__name__}); start again.") from error
        changed = [k for k in self.settings if state["settings"].get(k) != self.settings[k]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"resume: {key} was {state['settings'].get(key)!r} and is now {self.settings[key]!r}; go on with the "
                "same settings, or train anew in another output_dir."
            )
        for name, item in self.objects.items():
            if name in state["objects"]:  # a run that was not tracked before may be tracked now
                item.load_state_dict(state["objects"][name])
        trainer.state.epoch = state["epoch"]
        trainer.state.iteration = state["epoch"] * trainer.state.epoch_length


class ProgressHandler:
    """A progress bar over all iterations of a run, with the losses."""

    def __init__(self, name: str = "training") -> None:
        self.name = name
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        state = engine.state
        self.bar = tqdm(total=state.max_epochs * state.epoch_length, initial=state.iteration, desc=self.name)

    def _advance(self, engine: Engine) -> None:
        assert self.bar is not None
        self.bar.update()
        first = first_output(engine)
        shown = {k: f"{float(first[k]):.3f}" for k in (CommonKeys.LOSS, UPPER_LOSS) if k in first}
        self.bar.set_postfix(shown, refresh=False)

    def _end(self, engine: Engine) -> None:
        assert self.bar is not None
        self.bar.close()
