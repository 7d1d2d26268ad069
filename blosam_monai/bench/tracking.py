"""A grid in MLflow: a run for the grid and, below it, one for each finished cell. No path and no name of a case."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import mlflow
from filelock import Timeout
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from monai.utils import path_to_sqlite_uri, path_to_uri

from blosam_monai.bench.grid import Grid
from blosam_monai.bench.runner import Cell, Folder
from blosam_monai.errors import one_line
from blosam_monai.files import PathLike, atomic
from blosam_monai.tracking import PATHS, versions

logger = logging.getLogger(__name__)

EXPERIMENT = "blosam_bench"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: `mlflow ui` nests by it
GRID_TAG, CELL_TAG = "blosam.grid", "blosam.cell"
GRID_ID = "grid_id.txt"  # in output_dir: what finds the grid's run again, in any store
_NO_ANSWER = (MlflowException, OSError)  # of a store: what it refuses, and what the network does
_NUMBERS = ("seconds", "trained_parameters", "total_parameters")


class GridTracker:
    """Logs the finished cells of a grid, each once, whenever asked, and after any number of kills.

    The store itself says what is logged: a cell's run carries its key as a tag and is FINISHED. While one process of
    several that share the folder logs, the others do not.

    Args:
        grid: checked.
        output_dir: of the grid.
        tracking_uri: of MLflow; None: SQLite in ``output_dir``.
    """

    def __init__(self, grid: Grid, output_dir: PathLike, *, tracking_uri: str | None = None) -> None:
        self.folder = Folder(output_dir)
        self._lock = self.folder.lock("mlflow")
        self._lock.acquire()
        try:
            self._begin(grid, Path(output_dir).absolute(), tracking_uri)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, grid: Grid, path: Path, tracking_uri: str | None) -> None:
        """Find or make the grid's run, and what of it is there."""
        self.client = mlflow.MlflowClient(tracking_uri=tracking_uri or path_to_sqlite_uri(str(path / "mlruns.db")))
        self._experiment = self._find_experiment(None if tracking_uri else path_to_uri(path / "mlruns"))
        self._parent = self._find_parent(grid, path)
        children = self._search(f"tags.`{PARENT_TAG}` = '{self._parent}'")
        self._begun = {run.data.tags.get(CELL_TAG): run.info.run_id for run in children}
        self._logged = {run.data.tags.get(CELL_TAG) for run in children if run.info.status == "FINISHED"}

    @classmethod
    def open(cls, grid: Grid, output_dir: PathLike, *, tracking_uri: str | None = None) -> GridTracker | None:
        """A tracker, or None where another process logs the grid at this moment, or the store does not answer."""
        try:
            return cls(grid, output_dir, tracking_uri=tracking_uri)
        except Timeout:
            logger.info("another process logs this grid to MLflow; this one does not.")
        except _NO_ANSWER as error:
            logger.warning("MLflow: %s; nothing is logged until the command is started again.", one_line(error))
        return None

    def log(self, cells: Sequence[Cell]) -> None:
        """Log those of the cells that are finished and were not logged yet; a store that fails is tried again."""
        for cell in (cell for cell in self.folder.finished(cells) if cell.key not in self._logged):
            try:
                self._log_cell(cell)
            except _NO_ANSWER as error:  # the grid goes on; what is not logged is at the next call
                logger.warning("MLflow: %s", one_line(error))
                return
            self._logged.add(cell.key)

    def close(self, status: str, files: Sequence[PathLike] = ()) -> None:
        """Keep files with the grid's run and end it: FINISHED, FAILED or KILLED; a store that fails is warned of."""
        try:
            for file in files:
                self.client.log_artifact(self._parent, str(file))
            self.client.set_terminated(self._parent, status)
        except _NO_ANSWER as error:
            logger.warning("MLflow: %s; the next start logs what is missing.", one_line(error))
        finally:
            self._lock.release()

    def _log_cell(self, cell: Cell) -> None:
        rows, content = self.folder.load(cell)
        ended = int((self.folder.of(cell) / "cell.json").stat().st_mtime * 1000)  # ms
        run_id = self._begun.get(cell.key)
        if run_id is None:
            began = ended - int(1000 * (content["record"].get("seconds") or 0))
            tags = {PARENT_TAG: self._parent, CELL_TAG: cell.key}
            run_id = self.client.create_run(self._experiment, began, tags, cell.place).info.run_id
            self._begun[cell.key] = run_id
        metrics = [Metric(_allowed(k), float(v), ended, 0) for k, v in cell_metrics(rows, content["record"]).items()]
        params = [Param(key, str(value)) for key, value in cell_params(cell, content).items()]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        self.client.set_terminated(run_id, "FINISHED", ended)

    def _find_experiment(self, artifacts: str | None) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        return str(found.experiment_id if found else self.client.create_experiment(EXPERIMENT, artifacts))

    def _find_parent(self, grid: Grid, output_dir: Path) -> str:
        """The grid's run: the one that an earlier start began, or a new one."""
        if not (output_dir / GRID_ID).is_file():
            with atomic(output_dir / GRID_ID) as part:
                part.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        grid_id = (output_dir / GRID_ID).read_text(encoding="utf-8").strip()
        found = self._search(f"tags.`{GRID_TAG}` = '{grid_id}'")
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        run_id = self.client.create_run(self._experiment, run_name=grid.name, tags={GRID_TAG: grid_id}).info.run_id
        params = {
            "methods": ", ".join(method.name for method in grid.methods),
            "data": ", ".join(data.name for data in grid.data),
            "shots": ", ".join(map(str, grid.shots)),
            "reference": grid.reference,
        }
        params |= {"draws": str(grid.draws), "first_seed": str(grid.first_seed)} | versions()
        self.client.log_batch(run_id, params=[Param(*pair) for pair in params.items()])
        return str(run_id)

    def _search(self, filter_string: str) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self._experiment], filter_string, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs


def cell_metrics(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, float]:
    """``dice/<task>``: mean over cases; ``dice``: mean over tasks; and what the record has of cost."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    means = {f"dice/{task}": fmean(float(row["dice"]) for row in rows if row["task"] == task) for task in tasks}
    cost = {name: record[name] for name in _NUMBERS if record.get(name) is not None}
    return {"dice": fmean(means.values()), **means, **cost}


def cell_params(cell: Cell, content: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a cell from others: its place in the grid, its settings, its SAM weights."""
    return {
        **{key: value for key, value in cell.overrides.items() if key not in PATHS},
        **{"method": cell.method, "preset": cell.preset, "data": cell.data, "n_shot": cell.n_shot, "draw": cell.draw},
        **{"seed": cell.seed, "fingerprint": cell.fingerprint},
        **{key: content["record"][key] for key in ("oracle", "sam_weights") if key in content["record"]},
        "blosam_monai_version": content["blosam_monai_version"],
    }


def _allowed(name: str) -> str:
    """A metric's name as MLflow takes it."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
