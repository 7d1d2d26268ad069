"""The verb ``blosam bench``: a grid checked, drawn, run to the end, tracked and summarised."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from tqdm import tqdm

from blosam_monai.bench.grid import LISTS, Grid, draw_lists, grid_cells, load_grid
from blosam_monai.bench.runner import CELLS, FAILED, LOCKS, Cell, Folder, RunCells, check_workers, run_grid
from blosam_monai.bench.statistics import few_draws_warning
from blosam_monai.bench.tracking import GridTracker
from blosam_monai.errors import tell
from blosam_monai.files import PathLike, atomic, check_output_dir
from blosam_monai.methods import list_methods, read_method

logger = logging.getLogger(__name__)

CASES = "cases.csv"
FIGURES = "figures"
# What a bench writes into its folder, all of which --overwrite removes; of its folders, those that are empty then.
_FOLDERS = (CELLS, FAILED, LISTS, LOCKS, FIGURES)
_PLACE = "*_*_*shot_draw*"
_WRITTEN = (
    *(f"{CELLS}/{_PLACE}", f"{CELLS}/.*.part", f"{FAILED}/{_PLACE}.txt", f"{LISTS}/*_*shot_draw*.json"),
    *(f"{LOCKS}/*.lock", f"{FIGURES}/shots.png", f"{FIGURES}/methods_*shot.png", f"{FIGURES}/cost_*shot.png"),
    *(f"{FIGURES}/curves_*_*shot.png", "mlruns", "mlruns.db", "grid_id.txt"),
    *(CASES, "table.md", "table.tex", "table.csv", "papers.md"),
)


def run(options: argparse.Namespace) -> str:
    """Run the verb; returns what is to be said in the end.

    Raises:
        FileNotFoundError, ValueError: what does not hold, and the remedy; or, after the tables are written, how many
            cells are not finished.
    """
    from blosam_monai.bench import cells as training

    if options.list_methods:
        return methods_table(training.stacks)
    if options.grid is None or options.output_dir is None:
        raise ValueError("bench: give --grid and --output_dir, or --list_methods.")
    return bench(
        options.grid,
        options.output_dir,
        run_cells=training.run_cells,
        stacks=training.stacks,
        check=training.check,
        dataset_dirs=_named_folders(options.dataset_dir),
        devices=options.device or _best_device(),
        workers=options.workers,
        overwrite=options.overwrite,
        use_mlflow=options.use_mlflow,
        tracking_uri=options.tracking_uri,
        tables_only=options.tables_only,
    )


def bench(
    grid_file: PathLike,
    output_dir: PathLike,
    *,
    run_cells: RunCells,
    stacks: Callable[[Cell], bool],
    check: Callable[[Cell], None],
    dataset_dirs: Mapping[str, str] | None = None,
    devices: Sequence[str] = ("cpu",),
    workers: int | None = None,
    overwrite: bool = False,
    use_mlflow: bool = True,
    tracking_uri: str | None = None,
    tables_only: bool = False,
) -> str:
    """Run a grid to the end, or go on where it stopped, and summarise it.

    Args:
        grid_file: see docs/reference/grid.md.
        output_dir: for everything that is written.
        run_cells, stacks, devices: see ``run_grid``.
        check: raises ValueError for a cell whose settings contradict each other.
        dataset_dirs: see ``load_grid``.
        workers: processes; default: one for each device.
        overwrite: remove an earlier run from the folder first.
        use_mlflow, tracking_uri: whether and where to track; default: SQLite in ``output_dir``.
        tables_only: train nothing; summarise what is finished.

    Returns:
        What was done, in a line.

    Raises:
        FileNotFoundError, ValueError: see ``run``.
    """
    if overwrite and tables_only:
        raise ValueError("overwrite, tables_only: what is removed can not be summarised; give one of them.")
    folder, workers = Folder(output_dir), len(devices) if workers is None else workers
    check_workers(workers, devices)
    _check_folder(folder)
    grid = load_grid(grid_file, dataset_dirs=dataset_dirs)
    if overwrite:
        _begin_anew(grid, folder, check)
    with _at_work(folder):
        cells = grid_cells(grid, draw_lists(grid, output_dir))
        _check_cells(cells, check)
        _tell_before(grid, cells, folder)
        table = Path(output_dir, "table.md")
        if tables_only:
            summarise(grid, cells, output_dir)
            return f"{len(folder.finished(cells))} of {len(cells)} cells; tables: {table}"
        tracker = GridTracker.open(grid, output_dir, tracking_uri=tracking_uri) if use_mlflow else None
        with _Watch(cells, output_dir, tracker) as watch:
            watch.missing = run_grid(
                cells,
                output_dir,
                run_cells=run_cells,
                stacks=stacks,
                devices=devices,
                workers=workers,
                after=watch.look,
                lost=watch.lost.append,
            )
            watch.files = summarise(grid, cells, output_dir)
    if watch.missing:
        raise ValueError(
            f"bench: {len(watch.missing)} of {len(cells)} cells are not finished{_why(watch)}; the same command tries "
            "them again. The tables are of the others."
        )
    return f"{len(cells)} cells; tables: {table}"


def summarise(grid: Grid, cells: Sequence[Cell], output_dir: PathLike) -> list[Path]:
    """Write the rows of all finished cells, tables and figures; returns the files that name no case.

    Args:
        grid: checked.
        cells: its cells, finished or not.
        output_dir: of the grid.
    """
    from blosam_monai.bench.figures import draw_figures
    from blosam_monai.bench.paper_tables import write_beside_papers
    from blosam_monai.bench.tables import summarise_grid, write_tables
    from blosam_monai.metrics import write_rows

    planned = [_place(cell) | {"oracle": bool(read_method(cell.preset).get("oracle"))} for cell in cells]
    rows, records = read_results(cells, output_dir)
    if rows:
        write_rows(Path(output_dir, CASES), rows)
    table = summarise_grid(rows, records, grid.reference, planned=planned, score=grid.score)
    beside = table if grid.score == "dice" else []  # the papers' tables are of Dice
    files = [*write_tables(output_dir, table), *write_beside_papers(output_dir, beside)]
    for name, why_not in draw_figures(table, rows, records, Path(output_dir, FIGURES)).items():
        if why_not is None:
            files.append(Path(output_dir, FIGURES, name))
        else:
            Path(output_dir, FIGURES, name).unlink(missing_ok=True)
            logger.info("%s: %s", name, why_not)
    return files


def read_results(cells: Sequence[Cell], output_dir: PathLike) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the finished cells hold, each with its place: the rows of all test cases, and a record for each cell.

    Args:
        cells: those asked for, in the order wanted.
        output_dir: of the grid.
    """
    folder = Folder(output_dir)
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    versions = set()
    places = list(dict.fromkeys(cell.dataset_dir for cell in cells))
    for cell in folder.finished(cells):
        own, content = folder.load(cell)
        versions.add(content["blosam_monai_version"])
        place = _place(cell) | {"oracle": bool(content["record"].get("oracle"))}
        # Sets drawn from one folder share their subjects; in another folder the same name is somebody else.
        whose = {key: f"{places.index(cell.dataset_dir)}/" for key in ("case", "subject")}
        rows += [
            place | {k: whose.get(k, "") + value if k in _TEXT else _number(value) for k, value in row.items()}
            for row in own
        ]
        records.append(content["record"] | place)
    if len(versions) > 1:
        logger.warning("cells were made by the versions %s of this package.", ", ".join(sorted(versions)))
    _warn_of_changed_tests(records)
    return rows, records


def _warn_of_changed_tests(records: Sequence[Mapping[str, Any]]) -> None:
    """Say where methods were tested on other files by the same names: their scores are not of the same images."""
    tested: dict[tuple[Any, ...], set[str]] = {}
    for record in records:
        if "tested_sha256" in record:  # not noted by earlier versions
            place = (record["data"], record["n_shot"], record["draw"])
            tested.setdefault(place, set()).add(record["tested_sha256"])
    for place in (place for place, found in tested.items() if len(found) > 1):
        logger.warning(
            "data %s, %d shots, draw %d: images or labels were changed between the tests of its methods, which do not "
            "compare; remove the older of its cells and start again, or give overwrite true.",
            *place,
        )


def methods_table(stacks: Callable[[Cell], bool]) -> str:
    """What ``--list_methods`` prints: each preset, how it trains, and what it is."""
    rows = [("method", "levels", "draws at once", "sees the label", "")]
    for name in list_methods():
        preset = read_method(name)
        cell = Cell(name, name, {}, "", "", "", n_shot=2, draw=0, seed=0, fingerprint="")
        at_once, oracle = ("yes" if found else "" for found in (stacks(cell), preset.get("oracle")))
        rows.append((name, str(preset.get("levels", "bilevel")), at_once, oracle, str(preset.get("about", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class _Watch:
    """Shows and tracks what is finished while a grid runs, and how it ended."""

    def __init__(self, cells: Sequence[Cell], output_dir: PathLike, tracker: GridTracker | None) -> None:
        self.cells, self.folder, self.tracker = cells, Folder(output_dir), tracker
        self.bar = tqdm(total=len(cells), initial=len(self.folder.finished(cells)), desc="cells", unit="cell")
        self.missing: Sequence[Cell] = ()
        self.files: Sequence[Path] = ()
        self.lost: list[int] = []  # exit codes of workers that did not end by themselves
        self._known = set(self.folder.finished(cells))

    def look(self) -> None:
        """Show and log what was finished since the last look."""
        new = [cell for cell in self.folder.finished(self.cells) if cell not in self._known]
        self._known.update(new)
        if new:
            self.bar.set_postfix_str(f"{new[-1].method}, {new[-1].data}, {new[-1].n_shot} shots", refresh=False)
            self.bar.update(len(new))
        if self.tracker is not None:
            self.tracker.log(self.cells)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.tracker is not None:
            ended = "FAILED" if kind or self.missing else "FINISHED"
            self.tracker.close("KILLED" if kind is KeyboardInterrupt else ended, self.files)


# Columns of a cell's rows that are no numbers.
_TEXT = ("section", "task", "case", "case_id", "subject")


def _place(cell: Cell) -> dict[str, Any]:
    return {"data": cell.data, "n_shot": cell.n_shot, "method": cell.method, "draw": cell.draw}


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _check_folder(folder: Folder) -> None:
    """Raise where the folder cannot be written to, or holds the results of another verb."""
    check_output_dir(folder.path)
    for name in (CASES, "mlruns.db"):
        if (folder.path / name).exists() and not any((folder.path / own).is_dir() for own in (CELLS, LISTS)):
            raise ValueError(f"output_dir: {folder.path} holds {name} of another command; choose another folder.")


def _check_cells(cells: Sequence[Cell], check: Callable[[Cell], None]) -> None:
    for cell in {cell.group: cell for cell in cells}.values():
        try:
            check(cell)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"method {cell.method}, data {cell.data}, {cell.n_shot} shots: {error}") from error


def _tell_before(grid: Grid, cells: Sequence[Cell], folder: Folder) -> None:
    """What a user should know before hours of work."""
    if warning := few_draws_warning(grid.draws):
        tell(warning)
    if outdated := folder.outdated(cells):
        tell(f"{len(outdated)} results of other settings are kept in {folder.path / CELLS} and not shown.")


def _why(watch: _Watch) -> str:
    """Where to read why cells are missing."""
    noted = watch.folder.failures(watch.missing)
    reasons = [f"see {watch.folder.path / FAILED}"] if noted else []
    if watch.lost:
        codes = ", ".join(map(str, watch.lost))
        reasons.append(f"a worker ended with exit code {codes}, perhaps for want of memory")
    return "".join(f", {reason}" for reason in reasons)


@contextlib.contextmanager
def _at_work(folder: Folder) -> Iterator[None]:
    """Hold a lock of one's own, so that nobody overwrites the folder meanwhile."""
    name = f"at_work_{uuid.uuid4().hex}"
    try:
        with folder.lock(name):
            yield
    finally:
        (folder.path / LOCKS / f"{name}.lock").unlink(missing_ok=True)


def _begin_anew(grid: Grid, folder: Folder, check: Callable[[Cell], None]) -> None:
    """Draw and check a grid elsewhere, and only then put its lists in the place of all that an earlier bench wrote."""
    with contextlib.ExitStack() as held:
        for lock in sorted((folder.path / LOCKS).glob("*.lock")):
            try:
                held.enter_context(folder.lock(lock.stem))
            except Timeout:
                raise ValueError(f"overwrite: another bench is at work in {folder.path}; stop it first.") from None
        elsewhere = held.enter_context(tempfile.TemporaryDirectory())
        lists = draw_lists(grid, elsewhere)
        _check_cells(grid_cells(grid, lists), check)
        _remove_earlier(folder.path)
        for path in lists.values():
            with atomic(folder.path / LISTS / path.name) as part:
                shutil.copyfile(path, part)


def _remove_earlier(folder: Path) -> None:
    for path in [path for pattern in _WRITTEN for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in (folder / name for name in _FOLDERS):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _named_folders(given: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` as given on the command line."""
    folders = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ValueError(f"dataset_dir: {text!r} is not NAME=FOLDER, with the name of a data set of the grid.")
        folders[name] = folder
    return folders


def _best_device() -> list[str]:
    import torch

    return ["cuda" if torch.cuda.is_available() else "cpu"]
