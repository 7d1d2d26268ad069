"""Runs the cells of a grid to the end, by as many processes as like, and starts where a killed run stopped.

A cell is one method on one draw of one data set. ``output_dir/cells/<key>`` appears whole, with ``cases.csv`` and
``cell.json``, or not at all. What trains in one pass is a job; whoever works on it holds the lock of its file in
``output_dir/locks``, which the operating system lets go when the process ends, however it ends.
"""

from __future__ import annotations

import csv
import functools
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from blosam_monai import __version__
from blosam_monai.errors import one_line, root_cause, tell, without_names
from blosam_monai.files import PathLike, atomic, write_json

logger = logging.getLogger(__name__)

CELLS, FAILED, LOCKS = "cells", "failed", "locks"  # folders in output_dir
POLL_SECONDS = 1.0  # between looks at what other processes do
FINGERPRINT_DIGITS = 8


@dataclass(frozen=True)
class Cell:
    """One method on one draw of one data set.

    Args:
        method: name as shown.
        preset: name of the preset's file.
        overrides: config keys other than the preset's, ``tasks`` among them where not all labels are trained.
        data: name of the data set.
        dataset_dir: folder that the list's paths are relative to.
        data_list: file of the draw.
        n_shot, draw, seed: labelled images, number of the draw from 0, seed of the training.
        fingerprint: first digits of a SHA-256 over everything that decides the result.
        test_curve: epochs between test scores during the training; 0: none.
    """

    method: str
    preset: str
    overrides: Mapping[str, Any] = field(hash=False)
    data: str
    dataset_dir: str
    data_list: str
    n_shot: int
    draw: int
    seed: int
    fingerprint: str
    test_curve: int = 0

    @property
    def group(self) -> str:
        """What the cell shares with those of its other draws, readable, as a part of a file's name."""
        return f"{slug(self.method)}_{slug(self.data)}_{self.n_shot}shot"

    @property
    def place(self) -> str:
        """Its place in the grid, whatever its settings."""
        return f"{self.group}_draw{self.draw}"

    @property
    def key(self) -> str:
        """Name of its folder: place and fingerprint, the same at every start."""
        return f"{self.place}_{self.fingerprint}"


class Result(Protocol):
    """What ``run_cells`` gives for a cell: see ``blosam_monai.bench.cells``."""

    @property
    def cell(self) -> Cell: ...  # noqa: D102
    @property
    def rows(self) -> list[dict[str, Any]]: ...  # noqa: D102
    @property
    def record(self) -> dict[str, Any]: ...  # noqa: D102


RunCells = Callable[..., Iterable[Result]]  # run_cells(cells, device=...)


class Job(NamedTuple):
    """Cells that train in one pass, or one alone."""

    name: str
    cells: tuple[Cell, ...]


class Folder:
    """What an ``output_dir`` holds of cells."""

    def __init__(self, output_dir: PathLike) -> None:
        self.path = Path(output_dir)

    def of(self, cell: Cell) -> Path:
        """Where the cell is, once it is finished."""
        return self.path / CELLS / cell.key

    def finished(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells whose result is there."""
        there = set(self._names())
        return [cell for cell in cells if cell.key in there]

    def outdated(self, cells: Sequence[Cell]) -> list[str]:
        """Names of results for a place of these cells, made with other settings, lists or presets."""
        keys, places = {cell.key for cell in cells}, {cell.place for cell in cells}
        return [name for name in self._names() if name not in keys and name.rpartition("_")[0] in places]

    def store(self, cell: Cell, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        """Keep a cell's result; its folder appears whole. What was noted of an earlier failure goes."""
        part = self.of(cell).with_name(f".{cell.key}.{uuid.uuid4().hex}.part")
        part.mkdir(parents=True)
        with open(part / "cases.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        known = {name: getattr(cell, name) for name in ("method", "preset", "data", "n_shot", "draw", "seed")}
        known |= {"overrides": dict(cell.overrides), "fingerprint": cell.fingerprint}
        content = {"cell": known, "record": record, "blosam_monai_version": __version__}
        write_json(part / "cell.json", content)
        try:
            os.replace(part, self.of(cell))
        except OSError:
            if not self.of(cell).is_dir():
                raise
            shutil.rmtree(part)  # another machine has finished it, which a network drive showed too late
        self._failure(cell).unlink(missing_ok=True)

    def load(self, cell: Cell) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Rows of a finished cell, as text, and the content of its ``cell.json``."""
        with open(self.of(cell) / "cases.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return rows, json.loads((self.of(cell) / "cell.json").read_text(encoding="utf-8"))

    def clear_parts(self, cell: Cell) -> None:
        """Remove what a killed process began to write of the cell; only under the lock of its job."""
        for part in (self.path / CELLS).glob(f".{cell.key}.*.part"):
            shutil.rmtree(part)

    def note_failure(self, cell: Cell, line: str) -> None:
        """Keep why the cell failed, without names."""
        with atomic(self._failure(cell)) as part:
            part.write_text(without_names(line, *_personal(cell)) + "\n", encoding="utf-8")

    def failures(self, cells: Sequence[Cell]) -> dict[str, int]:
        """Key -> time of its failure, of those of the cells that failed when last tried."""
        there = {cell.key: self._failure(cell) for cell in cells}
        return {key: path.stat().st_mtime_ns for key, path in there.items() if path.is_file()}

    def lock(self, name: str) -> FileLock:
        """The lock of a job; the file stays."""
        (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / LOCKS / f"{name}.lock", timeout=0)

    def _names(self) -> list[str]:
        """Names of all finished cells: listed, since a network drive may answer for a single one from memory."""
        return sorted(os.listdir(self.path / CELLS)) if (self.path / CELLS).is_dir() else []

    def _failure(self, cell: Cell) -> Path:
        return self.path / FAILED / f"{cell.key}.txt"


def slug(name: str) -> str:
    """A name as a part of a file's name.

    >>> slug("BLO-SAM (exact)")
    'blo-sam-exact'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_jobs(cells: Sequence[Cell], stacks: Callable[[Cell], bool]) -> list[Job]:
    """The cells by what trains in one pass, in their order: the draws of a method that stacks, each other cell alone.

    A job has the same name in every process, whatever is left of it.
    """
    stacked = {group: stacks(cell) for group, cell in {cell.group: cell for cell in cells}.items()}
    jobs: dict[str, list[Cell]] = {}
    for cell in cells:
        jobs.setdefault(cell.group if stacked[cell.group] else cell.place, []).append(cell)
    return [Job(name, tuple(held)) for name, held in jobs.items()]


def check_workers(workers: int, devices: Sequence[str]) -> None:
    """Raise ValueError where there are fewer workers than devices."""
    if workers < len(devices):
        raise ValueError(f"workers: {workers} for {len(devices)} devices; give at least {len(devices)}.")


def run_grid(
    cells: Sequence[Cell],
    output_dir: PathLike,
    *,
    run_cells: RunCells,
    stacks: Callable[[Cell], bool],
    devices: Sequence[str] = ("cpu",),
    workers: int = 1,
    after: Callable[[], None] = lambda: None,
    lost: Callable[[int], None] = lambda code: None,
) -> list[Cell]:
    """Run the cells that are not finished; those of a job that another process works on are waited for.

    One that fails is noted in ``output_dir/failed`` and tried again at the next start; the others go on.

    Args:
        cells: of the grid.
        output_dir: see the module; several processes, on one machine or several, may share it.
        run_cells: trains and tests cells that differ only in their draw: ``run_cells(cells, device=...)`` yields a
            result for each. Where there are several workers, a function of a module.
        stacks: whether the draws of a cell's method train in one pass.
        devices: dealt to the workers in turn.
        workers: processes; one: this process.
        after: called in this process whenever cells may have been finished.
        lost: called with the exit code of a worker that did not end by itself.

    Returns:
        The cells without a result.

    Raises:
        ValueError: fewer workers than devices.
    """
    check_workers(workers, devices)
    folder = Folder(output_dir)
    if len(folder.finished(cells)) < len(cells):
        work = functools.partial(
            _work, cells, output_dir, run_cells=run_cells, stacks=stacks, known=folder.failures(cells)
        )
        if workers == 1:
            work(device=devices[0], after=after)
        else:
            tasks = [functools.partial(work, device=devices[i % len(devices)]) for i in range(workers)]
            _run_processes(tasks, after, lost)
    after()
    finished = set(folder.finished(cells))
    return [cell for cell in cells if cell not in finished]


def _work(
    cells: Sequence[Cell],
    output_dir: PathLike,
    *,
    run_cells: RunCells,
    stacks: Callable[[Cell], bool],
    device: str,
    known: Mapping[str, int],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Go through the jobs, past those that another holds, until each was this process's or another's once.

    Args:
        cells, output_dir, run_cells, stacks, after: see ``run_grid``.
        device: of this process.
        known: failures before the start; newer ones are another worker's, and not tried again.
    """
    folder = Folder(output_dir)
    pending = make_jobs(cells, stacks)
    while pending:
        busy = []
        for job in pending:
            try:
                with folder.lock(job.name):
                    _run_job(job, folder, run_cells=run_cells, device=device, known=known, after=after)
            except Timeout:
                busy.append(job)
        if len(busy) == len(pending):
            time.sleep(POLL_SECONDS)
            after()
        pending = busy


def _run_job(
    job: Job, folder: Folder, *, run_cells: RunCells, device: str, known: Mapping[str, int], after: Callable[[], None]
) -> None:
    """Run what is left of a job, whose lock is held."""
    failed = {key for key, when in folder.failures(job.cells).items() if known.get(key) != when}
    there = folder.finished(job.cells)
    left = [cell for cell in job.cells if cell not in there and cell.key not in failed]
    if not left:
        return
    for cell in left:
        folder.clear_parts(cell)
    failure = _run_pass(left, folder, run_cells=run_cells, device=device)
    if failure and len(left) > 1:  # one draw may be at fault, or all together be too large
        tell(f"{job.name}: {failure.line}\ntrying {len(left)} draws one by one")
    for cell in left:
        failure = _run_pass([cell], folder, run_cells=run_cells, device=device) if len(left) > 1 else failure
        if failure:
            tell(f"{cell.place}: {failure.line}{failure.traceback}")
            folder.note_failure(cell, failure.line)
    after()


class _Failure(NamedTuple):
    """What an error said: text, for the error itself would keep the memory of what failed."""

    line: str
    traceback: str  # of what is no user's to mend


def _run_pass(left: list[Cell], folder: Folder, *, run_cells: RunCells, device: str) -> _Failure | None:
    """Run cells in one pass and keep their results; those that are kept leave the list."""
    try:
        for result in run_cells(tuple(left), device=device):
            folder.store(result.cell, result.rows, result.record)
            left.remove(result.cell)
        if left:
            raise RuntimeError(f"no result for {len(left)} cells")
    except Exception as error:  # noqa: BLE001 (whatever is wrong with one job, the others are not)
        users = isinstance(root_cause(error), (ValueError, OSError))
        return _Failure(one_line(error), "" if users else "\n" + "".join(traceback.format_exception(error)))
    return None


def _run_processes(tasks: Sequence[Callable[[], None]], after: Callable[[], None], lost: Callable[[int], None]) -> None:
    """Run each in a process of its own, with its share of the cores; none outlives this process."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    processes = [context.Process(target=_in_child, args=(task,)) for task in tasks]
    with _threads(max(1, _cores() // len(tasks))):
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            connection.wait([p.sentinel for p in processes if p.is_alive()], POLL_SECONDS)
            after()
    finally:
        for process in processes:
            process.terminate()
            process.join()
    for number, process in enumerate(processes):
        if process.exitcode:
            logger.error("worker %d ended with exit code %d.", number, process.exitcode)
            lost(process.exitcode)


def _in_child(task: Callable[[], None]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # also when that was killed and could not say so
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    task()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within it, processes are started with so many threads each, unless the user's environment says how many."""
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def _personal(cell: Cell) -> list[str]:
    """Paths and names that a message on the cell may hold."""
    names = [cell.dataset_dir, cell.data_list]
    if Path(cell.data_list).is_file():
        content = json.loads(Path(cell.data_list).read_text(encoding="utf-8"))
        items = [item for held in content.values() if isinstance(held, list) for item in held if isinstance(item, dict)]
        names += [str(item[key]) for item in items for key in ("image", "label", "subject") if key in item]
    return names
