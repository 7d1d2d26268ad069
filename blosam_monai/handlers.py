"""What happens around the iterations: scores, the best adapters, exact resume, progress, the MLflow run."""

from __future__ import annotations

import atexit
import csv
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from mlflow.entities import Metric
from mlflow.telemetry.client import set_telemetry_client
from monai.engines import Evaluator
from monai.handlers import MLFlowHandler
from monai.utils.enums import CommonKeys
from torch import Tensor
from tqdm import tqdm

from blosam_monai import __version__
from blosam_monai.data.datalist import SECTIONS
from blosam_monai.data.readers import read_image
from blosam_monai.data.writers import PathLike, atomic, write_overlay
from blosam_monai.metrics import case_scores, write_rows, write_table
from blosam_monai.networks.adapters import save_adapters
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.sam import file_sha256

set_telemetry_client()  # `python -m monai.bundle` imports MLflow before us: make it read our environment again

logger = logging.getLogger(__name__)

SELECTIONS = ("last", "upper", "validation")


def case_id(path: PathLike) -> str:
    """What a case is called in logs and in MLflow: the first 12 digits of its file's SHA-256, never a name."""
    return file_sha256(path)[:12]


def task_scores(engine: Engine, tasks: Sequence[str], metric: str) -> dict[str, float]:
    """Mean of a metric of an engine for each task, from its details (cases, T); not-a-number cases left out."""
    details = torch.as_tensor(engine.state.metric_details[metric])
    return dict(zip(tasks, details.nanmean(dim=0).tolist(), strict=True))


class CaseTableHandler:
    """Score every case of an evaluator on its own grid; write ``cases.csv``, ``summary.json`` and overlays at the end.

    Args:
        output_dir: folder of the table.
        tasks: names of the tasks.
        settings: what the summary says beside the scores (weights, data list, thresholds).
        nsd_tolerance: pixels, see ``case_scores``.
        overlays: write prediction and label over each image.
    """

    def __init__(
        self,
        output_dir: PathLike,
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        *,
        nsd_tolerance: float = 2.0,
        overlays: bool = True,
    ) -> None:
        self.output_dir, self.tasks, self.overlays = Path(output_dir), list(tasks), overlays
        self.settings = {**settings, "nsd_tolerance_pixels": nsd_tolerance}
        self.nsd_tolerance = nsd_tolerance
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def score(self, engine: Engine) -> None:
        """Score the cases of this iteration; predictions are binary (T, H, W)."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            source, pred, label = item["source"], output[CommonKeys.PRED].cpu(), output[CommonKeys.LABEL].cpu()
            scores = case_scores(pred, label, nsd_tolerance=self.nsd_tolerance)
            for t, task in enumerate(self.tasks):
                self.rows.append(
                    {
                        "case": Path(source).stem,
                        "case_id": case_id(source),
                        "section": item["section"],
                        "task": task,
                        **{name: float(values[t]) for name, values in scores.items()},
                        "label_empty": int(not label[t].any()),
                        "pred_empty": int(not pred[t].any()),
                    }
                )
            if self.overlays:
                path = self.output_dir / "overlays" / f"{Path(source).stem}.png"
                write_overlay(path, read_image(source), pred.numpy(), label.numpy())

    def write(self, engine: Engine) -> None:
        """Write the table; log its summary."""
        for section, by_task in write_table(self.output_dir, self.rows, self.settings).items():
            logger.info("%s: %s", section, json.dumps(by_task))


class BestAdapters:
    """Keep the adapters of each task: its best so far by an evaluator's Dice, or the last.

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
        network: PromptSam,
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
        self.best = {name: value.clone() for name, value in network.decoder.adapter_state().items()}
        self.score = torch.full((len(network.tasks),), -torch.inf)
        self.epoch = torch.zeros(len(network.tasks), dtype=torch.long)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; the evaluator is the one given."""
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.compare)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def compare(self, evaluator: Engine) -> None:
        """Take over the tasks whose Dice is above their best, and write the file if there are any."""
        details = torch.as_tensor(evaluator.state.metric_details[self.metric])
        scores = details.nanmean(dim=0).nan_to_num(-torch.inf).cpu()
        better = scores > self.score
        if better.any():
            self._take(better, evaluator.state.epoch)
            self.score = torch.where(better, scores, self.score)
            self.save()

    def finish(self, engine: Engine) -> None:
        """At the end of the training: write what was selected."""
        if self.selection == "last":
            self._take(torch.ones_like(self.score, dtype=torch.bool), engine.state.epoch)
        self.save()

    def save(self) -> None:
        """Write the kept adapters."""
        chosen = {
            "selection": self.selection,
            "selected_epoch": dict(zip(self.network.tasks, self.epoch.tolist(), strict=True)),
        }
        if self.selection != "last":
            chosen["selected_dice"] = dict(zip(self.network.tasks, self.score.tolist(), strict=True))
        settings = {**self.network.settings, "sam_weights": self.network.sam_weights, **self.settings, **chosen}
        save_adapters(self.path, self.best, settings)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, so that a worse model never replaces a better one."""
        return {"best": self.best, "score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.best, self.score, self.epoch = state["best"], state["score"], state["epoch"]

    def _take(self, tasks: Tensor, epoch: int) -> None:
        for name, value in self.network.decoder.adapter_state().items():
            self.best[name][tasks] = value.cpu()[tasks]
        self.epoch[tasks] = epoch


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

    def prepare(self, trainer: Engine, *, resume: bool, overwrite: bool) -> None:
        """Restore the state if ``resume``; else refuse to write over an earlier training unless ``overwrite``."""
        if resume:
            self._restore(trainer)
        elif self.path.exists() and not overwrite:
            raise FileExistsError(
                f"output_dir: {self.path.parent} holds an earlier training; choose another output_dir, go on with "
                "resume=true, or replace it with overwrite=true."
            )
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
        if not self.path.is_file():
            raise FileNotFoundError(f"resume: {self.path} does not exist; start without resume.")
        try:
            state = torch.load(self.path, map_location=trainer.state.device, weights_only=True)
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
        first = engine.state.output[0] if isinstance(engine.state.output, list) else {}
        shown = {k: f"{float(first[k]):.3f}" for k in (CommonKeys.LOSS, "upper_loss") if k in first}
        self.bar.set_postfix(shown, refresh=False)

    def _end(self, engine: Engine) -> None:
        assert self.bar is not None
        self.bar.close()


class BilevelMLFlowHandler(MLFlowHandler):
    """One MLflow run for a training: both levels, every task, what went in and what came out.

    On MONAI's handler, which knows one optimizer, writes every number on its own (25 ms each), joins whatever run is
    not finished and leaves a crashed run RUNNING. Here a run is new and unique by name, metrics go out in batches, a
    crash ends it as FAILED, and a resumed training continues its own run. No file name is logged unless ``log_paths``.

    Args:
        tracking_uri, experiment_name, run_name, experiment_param: as in ``MLFlowHandler``; a run name that is
            taken gets a number.
        tasks: names of the tasks.
        optimizers: name -> optimizer whose learning rate is logged.
        evaluators: name -> evaluator whose Dice of each task is logged.
        seconds: metrics are sent at least this often.
    """

    default_tracking_params: list[str] = []  # noqa: RUF012 (all settings are in experiment_param)
    NUMBERS = ("loss", "upper_loss", "hypergradient_norm", "prompt_norm")

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        *,
        tasks: Sequence[str] = (),
        experiment_param: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        evaluators: Mapping[str, Evaluator | None] | None = None,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            tracking_uri=tracking_uri,
            experiment_name=experiment_name,
            run_name=run_name,
            experiment_param={**(experiment_param or {}), **versions()},
        )
        self.tasks, self.tags = list(tasks), dict(tags or {})
        self.optimizers = dict(optimizers or {})
        self.evaluators = {name: e for name, e in (evaluators or {}).items() if e is not None}
        self.seconds = seconds
        self.resume_run_id: str | None = None
        self.cur_run: Any = None
        self._pending: list[Metric] = []
        self._sent = time.monotonic()
        self._created = int(time.time() * 1000)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer (or to an evaluator that runs alone); ``evaluators`` are attached to by themselves."""
        super().attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        for name, evaluator in self.evaluators.items():
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._log_tasks, name)

    def start(self, engine: Engine) -> None:
        """Create the run, or go on with the one of the training that is resumed."""
        if self.cur_run is not None:
            return
        self._set_experiment()
        if self.resume_run_id:
            self.client.update_run(self.resume_run_id, status="RUNNING")
            self.cur_run = self.client.get_run(self.resume_run_id)
        else:
            self.cur_run = self._new_run()
        atexit.register(self._end, "FAILED")  # a crash outside the trainer
        params = dict(self.experiment_param or {})
        self._delete_exist_param_in_dict(params)
        self._log_params(params)

    def finish(self, output_dir: PathLike, data_list: PathLike, *, log_paths: bool = False) -> None:
        """Log the artifacts and end the run as FINISHED; called when everything is done.

        Artifacts: adapters, settings, data list, table of cases, overlays. Without ``log_paths`` no name of a file,
        subject or folder is among them.
        """
        scores = json.loads((Path(output_dir) / "summary.json").read_text(encoding="utf-8"))["scores"]
        for section, by_task in scores.items():
            for task, numbers in by_task.items():
                self._log_metrics({f"{section}_{name}/{task}": value for name, value in numbers.items()})
        with tempfile.TemporaryDirectory() as folder:
            collect_record(folder, output_dir, data_list, self.experiment_param or {}, log_paths=log_paths)
            self._flush()
            self.client.log_artifacts(self.cur_run.info.run_id, folder)
        self._end("FINISHED")

    def state_dict(self) -> dict[str, Any]:
        """The run's id, so that a resumed training continues it."""
        return {"run_id": self.cur_run.info.run_id if self.cur_run else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.resume_run_id = state["run_id"]

    def _new_run(self) -> Any:
        """A run of a name of its own; the one MONAI's ``--tracking mlflow`` has just opened for us is taken over."""
        runs = self.client.search_runs([self.experiment.experiment_id], max_results=50_000)
        names = {run.info.run_name for run in runs}
        for run in runs:
            if run.info.run_name == self.run_name and run.info.start_time >= self._created:
                return run
        name, number = self.run_name, 2
        while name in names:
            name, number = f"{self.run_name}-{number}", number + 1
        return self.client.create_run(self.experiment.experiment_id, run_name=name, tags=self.tags)

    def _default_iteration_log(self, engine: Engine) -> None:
        first = engine.state.output[0] if isinstance(engine.state.output, list) else engine.state.output
        metrics = {name: float(first[name]) for name in self.NUMBERS if name in first}
        metrics |= {f"lr_{name}": opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        self._log_metrics(metrics, engine.state.iteration)

    def _default_epoch_log(self, engine: Engine) -> None:
        self._log_metrics({k: v for k, v in engine.state.metrics.items() if np.isscalar(v)}, engine.state.epoch)
        for metric in engine.state.metric_details:
            self._log_tasks(engine, metric.removesuffix("_mean_dice"))

    def _log_tasks(self, engine: Engine, name: str) -> None:
        self.start(engine)  # an evaluation before the first epoch comes before the trainer has started
        for metric in engine.state.metric_details:
            scores = task_scores(engine, self.tasks, metric)
            self._log_metrics({f"{name}_dice/{task}": score for task, score in scores.items()}, engine.state.epoch)
            self._log_metrics({f"{name}_mean_dice": engine.state.metrics[metric]}, engine.state.epoch)

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        self._pending += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        if time.monotonic() - self._sent > self.seconds:
            self._flush()

    def _flush(self) -> None:
        while self._pending:  # MLflow takes at most 1000 metrics in one call
            batch, self._pending = self._pending[:1000], self._pending[1000:]
            self.client.log_batch(self.cur_run.info.run_id, metrics=batch)
        self._sent = time.monotonic()

    def _fail(self, engine: Engine, error: Exception) -> None:
        self._end("FAILED")
        raise error

    def _end(self, status: str) -> None:
        atexit.unregister(self._end)
        if self.cur_run is not None:
            self._flush()
            self.client.set_terminated(self.cur_run.info.run_id, status)
            self.cur_run = None
            self._dispose_sqlite_store()


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "blosam_monai_version": __version__,
        "torch_version": torch.__version__,
        "monai_version": monai.__version__,
        "mlflow_version": mlflow.__version__,
        "python_version": platform.python_version(),
        "cpu_count": str(os.cpu_count()),
    }


def collect_record(
    folder: PathLike, output_dir: PathLike, data_list: PathLike, settings: Mapping[str, Any], *, log_paths: bool
) -> None:
    """Copy what MLflow keeps of a run: cases by ``case_id``, subjects by number unless ``log_paths``."""
    folder, output_dir = Path(folder), Path(output_dir)
    (folder / "overlays").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1, default=str), encoding="utf-8")
    for model in sorted((output_dir / "models").glob("model.*")):
        shutil.copy(model, folder)
    shutil.copy(output_dir / "summary.json", folder)
    with open(output_dir / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for case, name in {row["case"]: row["case"] if log_paths else row["case_id"] for row in rows}.items():
        shutil.copy(output_dir / "overlays" / f"{case}.png", folder / "overlays" / f"{name}.png")
    content = json.loads(Path(data_list).read_text(encoding="utf-8"))
    if not log_paths:
        rows = [{name: value for name, value in row.items() if name != "case"} for row in rows]
        content = _anonymous(content)
    write_rows(folder / "cases.csv", rows)
    (folder / "data_list.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


_PUBLIC = ("labels", "label_coding", "n_shot", "seed")


def _anonymous(content: dict[str, Any]) -> dict[str, Any]:
    """A data list whose files are named by their hashes and whose subjects are numbered."""
    hashes = content.get("sha256", {})
    sections = [section for section in (*SECTIONS, "training") if section in content]
    subjects: dict[str, str] = {}
    result: dict[str, Any] = {name: content[name] for name in _PUBLIC if name in content}
    for section in sections:
        result[section] = [
            {
                "image": hashes.get(item["image"], "")[:12],
                "label": hashes.get(item["label"], "")[:12],
                "subject": subjects.setdefault(str(item.get("subject", item["image"])), f"subject {len(subjects) + 1}"),
            }
            for item in content[section]
        ]
    return result
