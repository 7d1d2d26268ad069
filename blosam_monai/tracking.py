"""The MLflow run of a training or an evaluation, and what it keeps. Nothing in it names a patient unless asked."""

from __future__ import annotations

import atexit
import csv
import json
import logging
import os
import platform
import re
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
from mlflow.exceptions import MlflowException
from monai.engines import Evaluator
from monai.handlers import MLFlowHandler
from monai.utils.enums import CommonKeys

from blosam_monai import __version__
from blosam_monai.data.pairing import SECTIONS
from blosam_monai.engines.bilevel_trainer import UPPER_LOSS, BilevelEvents
from blosam_monai.files import PathLike, file_sha256
from blosam_monai.handlers import case_id, first_output, task_means
from blosam_monai.metrics import write_rows
from blosam_monai.networks.segmenter import Segmenter

logger = logging.getLogger(__name__)


class RunHandler(MLFlowHandler):
    """One MLflow run for one run of an engine: new, unique by name, never left RUNNING.

    On MONAI's handler, which writes every number on its own (25 ms each), joins whatever run is not finished and leaves
    a crashed run RUNNING. Here metrics go out in batches, a crash ends the run as FAILED, and what is resumed continues
    its own run.

    Args:
        tracking_uri, experiment_name, run_name, experiment_param: as in ``MLFlowHandler``; a run name that is
            taken gets a number.
        numbers: what is logged of the engine's output, at every iteration.
        seconds: metrics are sent at least this often.
    """

    default_tracking_params: list[str] = []  # noqa: RUF012 (all settings are in experiment_param)

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        *,
        numbers: Sequence[str] = (),
        experiment_param: Mapping[str, Any] | None = None,
        seconds: float = 5.0,
    ) -> None:
        environment = os.environ.pop("MLFLOW_TRACKING_URI", None)  # MONAI lets it beat the argument
        try:
            super().__init__(
                tracking_uri=tracking_uri,
                experiment_name=experiment_name,
                run_name=run_name,
                experiment_param={**(experiment_param or {}), **versions()},
            )
        finally:
            if environment is not None:
                os.environ["MLFLOW_TRACKING_URI"] = environment
        self.numbers = tuple(numbers)
        self.seconds = seconds
        self.resume_run_id: str | None = None
        self.cur_run: Any = None
        self._pending: list[Metric] = []
        self._logged_to: dict[str, int] = {}
        self._sent = time.monotonic()
        self._created = int(time.time() * 1000)

    def attach(self, engine: Engine) -> None:
        """Attach to the engine."""
        super().attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def start(self, engine: Engine) -> None:
        """Create the run, or go on with the one of the training that is resumed."""
        if self.cur_run is not None:
            return
        self._set_experiment()
        if self.resume_run_id:
            try:
                self.client.update_run(self.resume_run_id, status="RUNNING")
            except MlflowException as error:
                raise ValueError(
                    f"tracking_uri: run {self.resume_run_id}, which is resumed, is not in this store ({error}); give "
                    "the store that it began in."
                ) from error
            self.cur_run = self.client.get_run(self.resume_run_id)
        else:
            self.cur_run = self._new_run()
        atexit.register(self._end, "FAILED")  # a crash outside the trainer
        params = dict(self.experiment_param or {})
        self._delete_exist_param_in_dict(params)
        self._log_params(params)

    def close(self, *paths: PathLike) -> None:
        """Log files, and the contents of folders, and end the run as FINISHED; called when everything is done."""
        self._flush()
        for path in paths:
            log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
            log(self.cur_run.info.run_id, str(path))
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
        return self.client.create_run(self.experiment.experiment_id, run_name=name)

    def _default_iteration_log(self, engine: Engine) -> None:
        first = first_output(engine)
        metrics = {name: float(first[name]) for name in self.numbers if name in first}
        self._log_metrics(metrics, engine.state.iteration)

    def _default_epoch_log(self, engine: Engine) -> None:
        details = getattr(engine.state, "metric_details", {})
        others = {k: v for k, v in engine.state.metrics.items() if k not in details and np.isscalar(v)}
        self._log_metrics(others, engine.state.epoch)

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        now, step = int(time.time() * 1000), step or 0
        for name, value in metrics.items():
            name = re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)  # what MLflow allows
            if self._is_new(name, step):
                self._pending.append(Metric(name, float(value), now, step))
        if time.monotonic() - self._sent > self.seconds:
            self._flush()

    def _is_new(self, name: str, step: int) -> bool:
        """Whether a resumed run has not logged this step before it stopped; it repeats those after the saved epoch."""
        if self.resume_run_id is None:
            return True
        if name not in self._logged_to:
            history = self.client.get_metric_history(self.resume_run_id, name)
            self._logged_to[name] = max((metric.step for metric in history), default=-1)
        return step > self._logged_to[name]

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


class BilevelMLFlowHandler(RunHandler):
    """The run of a training or an evaluation: both levels, every task, what went in and what came out.

    On ``RunHandler``, which knows one engine and no tasks. No file name is logged unless ``log_paths``.

    Args:
        tracking_uri, experiment_name, run_name, experiment_param, seconds: see ``RunHandler``.
        tasks: names of the tasks.
        optimizers: name -> optimizer whose learning rate is logged.
        evaluators: name -> evaluator whose Dice of each task is logged.
    """

    NUMBERS = (CommonKeys.LOSS, UPPER_LOSS, "hypergradient_norm", "prompt_norm")

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        *,
        tasks: Sequence[str] = (),
        experiment_param: Mapping[str, Any] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        evaluators: Mapping[str, Evaluator | None] | None = None,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            tracking_uri,
            experiment_name,
            run_name,
            numbers=self.NUMBERS,
            experiment_param=experiment_param,
            seconds=seconds,
        )
        self.tasks = list(tasks)
        self.optimizers = dict(optimizers or {})
        self.evaluators = {name: e for name, e in (evaluators or {}).items() if e is not None}
        self._rates: dict[str, float] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer (or to an evaluator that runs alone); ``evaluators`` are attached to by themselves."""
        super().attach(engine)
        if self.optimizers:
            engine.add_event_handler(BilevelEvents.LOWER_STEP_COMPLETED, self._note_rates)
        for name, evaluator in self.evaluators.items():
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._log_tasks, name)

    def finish(
        self, output_dir: PathLike, data_list: PathLike, configs: Sequence[PathLike], options: Mapping[str, Any]
    ) -> None:
        """Log the scores and the artifacts, and end the run as FINISHED; called when everything is done.

        Artifacts: adapters, table of cases, overlays, data list, and the executed config: its files and, as
        ``options.json``, the values they ran with (``monai.bundle run --config_file ... --args_file options.json``).
        Unless the option ``log_paths`` is set, no name of a file, subject or folder is among them.
        """
        summary = json.loads((Path(output_dir) / "summary.json").read_text(encoding="utf-8"))
        self._log_metrics({"failed_cases": summary["settings"]["failed_cases"]})
        for section, by_task in summary["scores"].items():
            for task, numbers in by_task.items():
                known = {name: value for name, value in numbers.items() if value is not None}  # else no case has it
                self._log_metrics({f"{section}_{name}/{task}": value for name, value in known.items()})
        with tempfile.TemporaryDirectory() as folder:
            collect_record(folder, output_dir, data_list, configs, options)
            self.close(folder)

    def _default_iteration_log(self, engine: Engine) -> None:
        super()._default_iteration_log(engine)
        self._log_metrics(self._rates, engine.state.iteration)

    def _note_rates(self) -> None:
        """The learning rates that the step took, before the schedules change them."""
        self._rates = {f"lr_{name}": opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}

    def _default_epoch_log(self, engine: Engine) -> None:
        super()._default_epoch_log(engine)
        for metric in engine.state.metric_details:
            self._log_tasks(engine, metric.removesuffix("_mean_dice"))

    def _log_tasks(self, engine: Engine, name: str) -> None:
        self.start(engine)  # an evaluation before the first epoch comes before the trainer has started
        for metric in engine.state.metric_details:
            scores = dict(zip(self.tasks, task_means(engine, metric).tolist(), strict=True))
            self._log_metrics({f"{name}_dice/{task}": score for task, score in scores.items()}, engine.state.epoch)
            self._log_metrics({f"{name}_mean_dice": engine.state.metrics[metric]}, engine.state.epoch)


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


def describe_run(options: Mapping[str, Any], datalist: Mapping[str, Any], network: Segmenter) -> dict[str, Any]:
    """What decides the result of a training, to compare and to repeat it by; no path and no name among it.

    Args:
        options: the values of the config's keys, those that the method reads.
        datalist: see ``load_datalist``; ``draw`` is its seed.
        network: says which SAM weights it has.
    """
    supports = [*datalist["lower"], *datalist["upper"]]
    return {
        **{name: value for name, value in options.items() if name not in (*PATHS, *_HOW_TO_RUN)},
        "tasks": network.tasks,
        "sam_weights": network.sam_weights,
        "pretrained": network.pretrained,
        "n_shot": len(supports),
        "draw": datalist.get("seed", options["seed"]),
        "supports": [case_id(item) for item in supports],
        "data_list_name": datalist.get("name", ""),
        "data_list_sha256": file_sha256(options["data_list"]),
        "labels": datalist["labels"],
        "label_coding": datalist["label_coding"],
        "slice_axis": datalist.get("slice_axis"),
        "snomed": {task: codes for task, codes in datalist.get("snomed", {}).items() if task in network.tasks},
    }


def describe_model(path: PathLike, settings: Mapping[str, Any]) -> dict[str, str]:
    """What a result says of the model that made it: hashes of its file and of the SAM weights, and our version.

    Args:
        path: the adapters.
        settings: theirs.
    """
    return {
        "model_sha256": file_sha256(path) if Path(path).is_file() else "",  # a bundle is looked at before it is trained
        "sam_model": settings.get("sam_model", "none"),
        "sam_weights": settings["sam_weights"],
        "blosam_monai_version": __version__,
    }


def collect_record(
    folder: PathLike,
    output_dir: PathLike,
    data_list: PathLike,
    configs: Sequence[PathLike],
    options: Mapping[str, Any],
) -> None:
    """Copy what MLflow keeps of a run: cases by ``case_id``, subjects by number unless the option ``log_paths``."""
    folder, output_dir, log_paths = Path(folder), Path(output_dir), options["log_paths"]
    (folder / "overlays").mkdir(parents=True)
    for config in configs:
        _copy_config(Path(config), folder, log_paths=log_paths)
    shown = {name: value for name, value in options.items() if log_paths or name not in PATHS}
    (folder / "options.json").write_text(json.dumps(shown, indent=1, default=str), encoding="utf-8")
    for model in sorted(Path(options["ckpt_dir"]).glob("model.*")):
        shutil.copy(model, folder)
    shutil.copy(output_dir / "summary.json", folder)
    with open(output_dir / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        overlay = output_dir / "overlays" / f"{row['case']}.png"
        if overlay.is_file():  # the option `overlays` decides
            shutil.copy(overlay, folder / "overlays" / f"{row['case' if log_paths else 'case_id']}.png")
    content = json.loads(Path(data_list).read_text(encoding="utf-8"))
    if not log_paths:
        rows = [{name: value for name, value in row.items() if name not in ("case", "subject")} for row in rows]
        content = _anonymous(content)
    write_rows(folder / "cases.csv", rows)
    (folder / "data_list.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _copy_config(config: Path, folder: Path, *, log_paths: bool) -> None:
    """Copy a config; what a user wrote into it for a path is left out unless ``log_paths``."""
    if not config.is_file():
        logger.warning("%s is not there to be kept with the run; give --bundle_root.", config)
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {name: value for name, value in content.items() if log_paths or name not in PATHS}
    (folder / config.name).write_text(json.dumps(kept, indent=4), encoding="utf-8")


PATHS = (
    *("data_list", "dataset_dir", "output_dir", "ckpt_dir", "sam_checkpoint", "tracking_uri", "bundle_root"),
    *("cache_dir", "weights", "checkpoint"),
)
_HOW_TO_RUN = (
    *("device", "resume", "overwrite", "use_mlflow", "log_paths", "experiment_name", "run_name"),
    *("overlays", "nsd_tolerance"),
)
_PUBLIC = ("labels", "label_coding", "slice_axis", "window", "allow", "snomed", "shared_subjects", "n_shot", "seed")


def _anonymous(content: dict[str, Any]) -> dict[str, Any]:
    """A data list whose files are named by their hashes (numbers where it has none), its subjects numbered."""
    hashes = content.get("sha256", {})
    files: dict[str, str] = {}
    subjects: dict[str, str] = {}

    def file_name(path: str) -> str:
        return hashes[path][:12] if path in hashes else files.setdefault(path, f"file {len(files) + 1}")

    result: dict[str, Any] = {name: content[name] for name in _PUBLIC if name in content}
    for section in (section for section in (*SECTIONS, "training") if section in content):
        result[section] = [
            {
                "image": file_name(str(item["image"])),
                "label": file_name(str(item.get("label"))),
                "subject": subjects.setdefault(str(item.get("subject", item["image"])), f"subject {len(subjects) + 1}"),
                **({"slice": item["slice"]} if "slice" in item else {}),
            }
            for item in content[section] or []
            if isinstance(item, dict)
        ]
    return result
