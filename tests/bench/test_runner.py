"""Cells run once each, whoever is killed when; what fails is told and tried again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest

from blosam_monai.bench.runner import Cell, Folder, make_jobs, run_grid
from tests.bench import fake_cells
from tests.bench.fake_cells import make_cells, run_cells, stacks

ROOT = Path(__file__).resolve().parents[2]


def ledger(folder: Path) -> Counter:
    """How often each cell was begun."""
    path = folder / "ledger"
    return Counter(path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())


def run(folder: Path, cells: list[Cell], **options) -> list[Cell]:
    return run_grid(cells, folder, **{"run_cells": run_cells, "stacks": stacks, **options})


def test_draws_of_a_method_that_stacks_are_one_job_and_the_other_cells_one_each(tmp_path):
    jobs = make_jobs(make_cells(tmp_path, draws=3), stacks)
    assert sorted(len(job.cells) for job in jobs) == [1] * 6 + [3] * 2  # two data sets
    assert len({job.name for job in jobs}) == len(jobs)


def test_a_finished_grid_is_not_run_again(tmp_path):
    cells = make_cells(tmp_path)
    assert run(tmp_path, cells) == []
    assert run(tmp_path, cells) == []
    assert ledger(tmp_path) == Counter(cell.key for cell in cells)


def test_more_draws_run_only_what_is_new(tmp_path):
    run(tmp_path, make_cells(tmp_path, draws=2))
    run(tmp_path, make_cells(tmp_path, draws=3))
    assert set(ledger(tmp_path).values()) == {1}
    assert len(ledger(tmp_path)) == 3 * 2 * 2


def test_a_cell_is_kept_with_its_rows_and_a_record_without_nan(tmp_path):
    cells = make_cells(tmp_path, draws=2)
    run(tmp_path, cells)
    rows, content = Folder(tmp_path).load(cells[2])  # draw 1
    assert [(row["case"], float(row["dice"])) for row in rows] == [("Doe1", 0.2), ("Doe2", 0.4)]
    assert content["record"]["hd95"] is None
    assert content["cell"]["overrides"] == {"max_epochs": 2}


def test_a_cell_that_fails_takes_no_other_with_it_and_is_tried_again_at_the_next_start(tmp_path):
    cells = make_cells(tmp_path, data=("lungs",))
    bad = [cell for cell in cells if cell.draw == 2]  # one of a stack of four, and one alone
    (tmp_path / "fail").mkdir()
    for cell in bad:
        (tmp_path / "fail" / cell.key).touch()
    assert run(tmp_path, cells) == bad
    assert ledger(tmp_path)[bad[0].key] == 2  # with the other draws, then alone
    begun = ledger(tmp_path)
    for cell in bad:
        (tmp_path / "fail" / cell.key).unlink()
    assert run(tmp_path, cells) == []
    assert ledger(tmp_path) - begun == Counter(cell.key for cell in bad)
    assert list((tmp_path / "failed").iterdir()) == []


def test_a_stack_that_is_too_large_is_run_draw_by_draw_and_holds_no_memory_of_its_failure(tmp_path):
    alive = []

    class Tensor:
        """Stands in for what fills the memory of a GPU."""

    def too_large_together(cells, *, device):
        if len(cells) > 1:
            held = Tensor()
            alive.append(weakref.ref(held))
            raise MemoryError("out of memory")
        assert alive[0]() is None
        yield from run_cells(cells, device=device)

    cells = [cell for cell in make_cells(tmp_path, data=("lungs",)) if stacks(cell)]
    assert run(tmp_path, cells, run_cells=too_large_together) == []
    assert ledger(tmp_path) == Counter(cell.key for cell in cells)


def test_why_a_cell_failed_is_kept_in_one_line_without_names_and_told_with_them(tmp_path, capsys):
    cell = make_cells(tmp_path)[1]
    (tmp_path / "fail").mkdir()
    (tmp_path / "fail" / cell.key).touch()
    run(tmp_path, [cell])
    assert (tmp_path / "failed" / f"{cell.key}.txt").read_text(encoding="utf-8") == "<file>: is cut short.\n"
    assert "Doe.png: is cut short." in capsys.readouterr().err


def test_a_failure_that_is_no_users_error_is_told_with_its_traceback(tmp_path, capsys):
    def broken(cells, *, device):
        yield from ()

    missing = run(tmp_path, make_cells(tmp_path, draws=1)[:1], run_cells=broken)
    assert len(missing) == 1
    assert "RuntimeError: no result for 1 cells" in capsys.readouterr().err


def test_a_result_of_other_settings_is_neither_taken_nor_removed(tmp_path):
    old = make_cells(tmp_path, draws=1)
    run(tmp_path, old)
    new = [Cell(**{**vars(cell), "fingerprint": "ffffffff"}) for cell in old]
    assert run(tmp_path, new) == []
    assert sorted(Folder(tmp_path).outdated(new)) == sorted(cell.key for cell in old)


def test_two_workers_on_two_devices_share_the_cells_and_the_cores(tmp_path):
    cells = make_cells(tmp_path)
    options = {"devices": ("cpu:0", "cpu:1"), "workers": 2, "run_cells": fake_cells.run_cells_together}
    assert run(tmp_path, cells, **options) == []
    assert ledger(tmp_path) == Counter(cell.key for cell in cells)
    records = [Folder(tmp_path).load(cell)[1]["record"] for cell in cells]
    assert {record["device"] for record in records} == {"cpu:0", "cpu:1"}
    wanted = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    assert {record["threads"] for record in records} == {wanted}


def test_the_exit_code_of_a_worker_that_is_killed_is_told(tmp_path):
    codes: list[int] = []
    options = {"devices": ("cpu",), "workers": 2, "run_cells": fake_cells.die}
    assert run(tmp_path, make_cells(tmp_path, draws=1), **options, lost=codes.append) != []
    assert codes == [-9, -9]
    assert not (tmp_path / "failed").exists()


def test_a_job_that_another_process_holds_is_waited_for_and_not_run(tmp_path, monkeypatch):
    cells = [cell for cell in make_cells(tmp_path, draws=2, data=("lungs",)) if stacks(cell)]
    folder = Folder(tmp_path)
    lock = folder.lock(cells[0].group)
    lock.acquire()

    def other_process_ends(seconds):
        for cell in cells:
            folder.store(cell, [{"dice": 1}], {})
        lock.release()

    monkeypatch.setattr("blosam_monai.bench.runner.time.sleep", other_process_ends)
    assert run(tmp_path, cells) == []
    assert not ledger(tmp_path)


def test_a_cell_that_another_machine_has_finished_meanwhile_is_left_as_it_is(tmp_path):
    folder, cell = Folder(tmp_path), make_cells(tmp_path)[0]
    folder.store(cell, [{"dice": 1}], {})
    folder.store(cell, [{"dice": 0}], {})
    assert folder.load(cell)[0] == [{"dice": "1"}]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [cell.key]


def test_fewer_workers_than_devices_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers: 1 for 2 devices; give at least 2"):
        run(tmp_path, make_cells(tmp_path), devices=("cuda:0", "cuda:1"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_grid_killed_twice_at_random_moments_ends_with_no_cell_lost_or_run_twice(tmp_path, workers):
    chance = random.Random()  # another moment in every run of the tests
    folder, cells = Folder(tmp_path), make_cells(tmp_path)  # 16
    command = [sys.executable, "-m", "tests.bench.fake_cells", str(tmp_path), str(workers)]
    at_kill = []
    for least in (chance.randint(0, 4), chance.randint(5, 9)):
        process = subprocess.Popen(command, cwd=ROOT)
        while len(folder.finished(cells)) < least:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, fake_cells.SECONDS))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until_free(folder)
        assert len(folder.finished(cells)) < len(cells)  # its workers have not gone on without it
        at_kill.append(({cell.key for cell in folder.finished(cells)}, ledger(tmp_path)))
    subprocess.run(command, cwd=ROOT, check=True)
    assert folder.finished(cells) == cells
    for finished, begun in at_kill:
        assert {key: begun[key] for key in finished} == {key: ledger(tmp_path)[key] for key in finished}
    assert not list((tmp_path / "cells").glob(".*"))
    assert all(json.loads((folder.of(cell) / "cell.json").read_text(encoding="utf-8")) for cell in cells)


def wait_until_free(folder: Folder) -> None:
    """Until the workers of a killed process are gone too, which they notice by themselves."""
    for path in sorted((folder.path / "locks").glob("*.lock")):
        with folder.lock(path.stem).acquire(timeout=10):
            pass
