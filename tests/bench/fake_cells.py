"""Stands in for ``blosam_monai.bench.cells``: notes each cell that it begins, so that a test can count."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blosam_monai.bench.runner import Cell, run_grid

SECONDS = 0.03  # a cell takes


class FakeResult(NamedTuple):
    cell: Cell
    rows: list[dict[str, Any]]
    record: dict[str, Any]


def make_cells(folder: Path, *, draws: int = 4, data: Sequence[str] = ("lungs", "teeth")) -> list[Cell]:
    """Cells of a method that stacks and of one that does not; what they note goes to ``folder``."""
    return [
        Cell(
            *(method, method, {"max_epochs": 2}, name, str(folder), str(folder / "list.json")),
            n_shot=4,
            draw=draw,
            seed=draw,
            fingerprint="0123abcd",
        )
        for name in data
        for draw in range(draws)
        for method in ("stacked", "single")
    ]


def stacks(cell: Cell) -> bool:
    return cell.preset in ("stacked", "blosam")


def run_cells(cells: Sequence[Cell], *, device: str) -> Iterator[FakeResult]:
    """A Dice of (draw + 1) / 10 and of twice that, for two cases; a cell whose key is a file in ``fail`` fails."""
    for cell in cells:
        note(cell, "ledger", f"{cell.key}")
    for cell in cells:
        time.sleep(SECONDS)
        if Path(cell.dataset_dir, "fail", cell.key).exists():
            raise ValueError(f"{cell.dataset_dir}/Doe.png: is cut short.")
        rows = [
            {
                "task": "lung",
                "case": f"Doe{n}",
                "case_id": f"id{n}",
                "subject": f"Doe{n}",
                "dice": n * (cell.draw + 1) / 10,
            }
            for n in (1, 2)
        ]
        record = {"seconds": SECONDS, "trained_parameters": 7, "total_parameters": 70, "sam_weights": "scratch"}
        record |= {"curve": [], "oracle": False}
        record |= {"device": device, "threads": os.environ.get("OMP_NUM_THREADS"), "hd95": float("nan")}
        yield FakeResult(cell, rows, record)


def run_cells_together(cells: Sequence[Cell], *, device: str) -> Iterator[FakeResult]:
    """As ``run_cells``, but waits until another device has begun too."""
    note(cells[0], device, "began")
    folder, until = Path(cells[0].dataset_dir), time.monotonic() + 20
    while not all((folder / other).exists() for other in ("cpu:0", "cpu:1")) and time.monotonic() < until:
        time.sleep(0.01)
    yield from run_cells(cells, device=device)


def die(cells: Sequence[Cell], *, device: str) -> Iterator[FakeResult]:
    """Ends the process as the operating system does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield from ()


def note(cell: Cell, file: str, line: str) -> None:
    with open(Path(cell.dataset_dir, file), "a", encoding="utf-8") as opened:
        opened.write(line + "\n")


if __name__ == "__main__":  # OUTPUT_DIR WORKERS; killed by a test
    output_dir = Path(sys.argv[1])
    run_grid(make_cells(output_dir), output_dir, run_cells=run_cells, stacks=stacks, workers=int(sys.argv[2]))
