"""The verb from a grid to its tables: run once, gone on with, failing, refused."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blosam_monai.__main__ import main
from blosam_monai.bench.command import bench, methods_table
from blosam_monai.bench.runner import Folder
from blosam_monai.files import file_sha256
from blosam_monai.methods import BUNDLE
from tests.bench.fake_cells import run_cells, stacks
from tests.bench.small_grid import write_grid, write_lungs


@pytest.fixture
def grid(tmp_path) -> Path:
    """A grid of two methods on eight pictures: 2 and 4 shots, 2 draws; 8 cells."""
    write_lungs(tmp_path)
    return write_grid(tmp_path)


@pytest.fixture
def undrawn(grid, monkeypatch) -> Path:
    """``grid``, of which no figures are drawn, which takes a second."""
    monkeypatch.setattr("blosam_monai.bench.figures.draw_figures", lambda *_: {})
    return grid


def run(grid: Path, **options) -> str:
    given = {"run_cells": run_cells, "stacks": stacks, "check": lambda cell: None, "use_mlflow": False}
    return bench(grid, grid.parent / "out", **{**given, **options})


def begun(grid: Path) -> list[str]:
    ledger = grid.parent / "lungs" / "ledger"
    return ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []


def read(grid: Path, name: str) -> list[dict[str, str]]:
    with open(grid.parent / "out" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fail(grid: Path, key: str) -> Path:
    marker = grid.parent / "lungs" / "fail" / key
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    return marker


def test_all_cases_and_the_tables_of_them_are_written(grid):
    assert run(grid).startswith("8 cells; tables: ")
    rows = read(grid, "cases.csv")
    places = {tuple(row[key] for key in ("data", "n_shot", "method", "draw")) for row in rows}
    assert len(rows) == 8 * 2  # of two cases each
    assert places == set(itertools.product(["lungs"], "24", ["blosam", "joint"], "01"))
    table = read(grid, "table.csv")
    assert [float(row["mean"]) for row in table] == pytest.approx([(0.1 + 0.2 + 0.2 + 0.4) / 4] * 4)
    assert {path.name for path in (grid.parent / "out" / "figures").iterdir()} >= {"shots.png"}


def test_a_second_start_goes_on_and_runs_nothing_twice(undrawn):
    run(undrawn)
    write_grid(undrawn.parent, draws=3)
    assert run(undrawn).startswith("12 cells")
    assert len(begun(undrawn)) == len(set(begun(undrawn))) == 12


def test_a_failing_cell_is_counted_in_one_line_after_the_tables_of_the_others(undrawn):
    run(undrawn)
    key = begun(undrawn)[-1]
    run(write_grid(undrawn.parent), overwrite=True)
    fail(undrawn, key)
    with pytest.raises(ValueError, match=r"^bench: 1 of 8 cells are not finished, see .*failed; the same command"):
        run(undrawn, overwrite=True)
    assert len(read(undrawn, "cases.csv")) == 7 * 2


def test_tables_of_a_part_are_written_when_asked_for_and_nothing_is_run(undrawn):
    assert run(undrawn, tables_only=True).startswith("0 of 8 cells")
    assert begun(undrawn) == []
    table = read(undrawn, "table.csv")
    assert {(row["run"], row["mean"]) for row in table} == {("False", "not run")}


def test_a_contradiction_is_said_before_anything_runs(undrawn):
    def check(cell):
        if cell.method == "joint":
            raise ValueError("crossfit: joint has one level; leave it out.")

    with pytest.raises(ValueError, match=r"^method joint, data lungs, 2 shots: crossfit: joint has one level"):
        run(undrawn, check=check)
    assert begun(undrawn) == []


def test_few_draws_are_warned_of_with_the_reason(undrawn, capsys):
    run(undrawn)
    assert "blosam: 2 draws, fewer than 10: intervals are too narrow." in capsys.readouterr().err


def test_results_of_other_settings_are_said_to_be_there_and_are_not_in_the_tables(undrawn, capsys):
    run(undrawn)
    write_grid(undrawn.parent, settings={"max_epochs": 3})
    run(undrawn)
    assert "8 results of other settings are kept" in capsys.readouterr().err
    assert len(read(undrawn, "cases.csv")) == 8 * 2
    assert len(list((undrawn.parent / "out" / "cells").iterdir())) == 16


def test_overwrite_runs_all_again_and_removes_nothing_that_is_not_its_own(undrawn):
    run(undrawn)
    (undrawn.parent / "out" / "notes.txt").touch()
    run(undrawn, overwrite=True)
    assert len(begun(undrawn)) == 2 * len(set(begun(undrawn))) == 2 * 8
    assert (undrawn.parent / "out" / "notes.txt").exists()


def test_overwrite_is_refused_while_another_bench_is_at_work(undrawn):
    run(undrawn)
    with (
        Folder(undrawn.parent / "out").lock("blosam_lungs_2shot"),
        pytest.raises(ValueError, match="overwrite: another bench is at work"),
    ):
        run(undrawn, overwrite=True)
    assert len(read(undrawn, "cases.csv")) == 16


def test_overwrite_is_refused_between_two_cells_of_another_bench_too(undrawn):
    def run_and_look(cells, *, device):
        for lock in sorted((undrawn.parent / "out" / "locks").glob("[!a]*.lock")):
            lock.unlink()  # as if no job were being worked on
        with pytest.raises(ValueError, match="overwrite: another bench is at work"):
            run(undrawn, overwrite=True)
        yield from run_cells(cells, device=device)

    run(undrawn, run_cells=run_and_look)
    assert list((undrawn.parent / "out" / "locks").glob("at_work*")) == []
    assert len(read(undrawn, "cases.csv")) == 16


def test_overwrite_removes_nothing_before_the_whole_grid_is_found_sound(undrawn):
    run(undrawn)
    too_many = write_grid(undrawn.parent, shots=[2, 12])
    with pytest.raises(ValueError, match="12 shots, draw 0: n_shot: 12 asked for"):
        run(too_many, overwrite=True)
    contradictory = write_grid(undrawn.parent)
    with pytest.raises(ValueError, match="method blosam, data lungs, 2 shots: no"):
        run(contradictory, overwrite=True, check=refuse)
    with pytest.raises(ValueError, match="workers: 1 for 2 devices"):
        run(undrawn, overwrite=True, devices=("cpu:0", "cpu:1"), workers=1)
    assert len(list((undrawn.parent / "out" / "cells").iterdir())) == 8
    assert len(read(undrawn, "cases.csv")) == 16


def refuse(cell):
    raise ValueError("no")


def test_to_remove_all_and_to_summarise_it_is_refused(undrawn):
    run(undrawn)
    with pytest.raises(ValueError, match=r"overwrite, tables_only: .* give one of them"):
        run(undrawn, overwrite=True, tables_only=True)
    assert len(list((undrawn.parent / "out" / "cells").iterdir())) == 8


def test_what_lies_beside_the_benchs_own_files_stays_at_overwrite(undrawn):
    run(undrawn)
    kept = [undrawn.parent / "out" / name for name in ("figures/mine.png", "lists/mine.json", "cells/notes.txt")]
    gone = undrawn.parent / "out" / "figures" / "cost_8shot.png"
    for path in (*kept, gone):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run(undrawn, overwrite=True)
    assert all(path.exists() for path in kept)
    assert not gone.exists()


@pytest.mark.parametrize("name", ["cases.csv", "mlruns.db"])
def test_the_folder_of_another_command_is_left_alone(undrawn, name):
    (undrawn.parent / "out").mkdir()
    (undrawn.parent / "out" / name).write_text("of a training", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"holds {name} of another command; choose another folder"):
            run(undrawn, overwrite=overwrite)
    assert [path.name for path in (undrawn.parent / "out").iterdir()] == [name]


def test_tests_on_other_labels_by_the_same_names_are_warned_of(undrawn, caplog):
    def noted(cells, *, device):
        for result in run_cells(cells, device=device):
            changed = (result.cell.method, result.cell.n_shot, result.cell.draw) == ("joint", 4, 1)
            yield result._replace(record=result.record | {"tested_sha256": "b" if changed else "a"})

    run(undrawn, run_cells=noted)
    told = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert [text.split(":")[0] for text in told] == ["data lungs, 4 shots, draw 1"]


def test_a_changed_label_of_a_support_gives_other_cells_and_is_said(undrawn, caplog):
    run(undrawn)
    drawn = json.loads((undrawn.parent / "out/lists/lungs_2shot_draw0.json").read_text(encoding="utf-8"))
    label = undrawn.parent / "lungs" / drawn["lower"][0]["label"]
    Image.fromarray(255 - np.asarray(Image.open(label))).save(label)
    run(undrawn)
    assert "data lungs, 2 shots, seed 0: 1 files of labelled images have changed" in caplog.text
    assert label.name not in caplog.text
    again = json.loads((undrawn.parent / "out/lists/lungs_2shot_draw0.json").read_text(encoding="utf-8"))
    assert again["sha256"][drawn["lower"][0]["label"]] == file_sha256(label)
    assert {"blosam_lungs_2shot_draw0", "joint_lungs_2shot_draw0"} <= {k[:-9] for k in begun(undrawn)[8:]}


def test_cells_whose_worker_was_killed_are_not_looked_for_among_those_that_failed(undrawn, monkeypatch):
    def killed(cells, output_dir, *, lost, **_):
        lost(-9)
        return list(cells)

    monkeypatch.setattr("blosam_monai.bench.command.run_grid", killed)
    with pytest.raises(ValueError, match="8 of 8 cells are not finished, a worker ended with exit code -9, perhaps"):
        run(undrawn)


def test_the_score_that_the_grid_names_is_that_of_the_tables(grid, monkeypatch):
    def scored(cells, *, device):
        for result in run_cells(cells, device=device):
            yield result._replace(rows=[row | {"hd95": 7.0} for row in result.rows])

    run(write_grid(grid.parent, score="hd95"), run_cells=scored)
    assert {(row["score"], row["mean"]) for row in read(grid, "table.csv")} == {("hd95", "7.0")}
    assert "HD95 (mm or pixels)" in (grid.parent / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "grid.json"], "bench: give --grid and --output_dir, or --list_methods."),
        (["--grid", "none.json", "--output_dir", "out"], "grid: none.json does not exist."),
        (["--grid", "none.json", "--output_dir", "out", "--dataset_dir", "lungs"], "'lungs' is not NAME=FOLDER"),
    ],
)
def test_what_the_command_line_lacks_is_said_in_a_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_every_method_is_listed_with_what_it_is():
    lines = methods_table(stacks).splitlines()
    presets = sorted((BUNDLE / "configs" / "methods").glob("*.json"))
    assert [line.split()[0] for line in lines[1:]] == [path.stem for path in presets]
    for line, path in zip(lines[1:], presets, strict=True):
        assert line.endswith(json.loads(path.read_text(encoding="utf-8"))["about"])
    of = {line.split()[0]: line.split()[1:4] for line in lines}
    assert of["blosam"][:2] == ["bilevel", "yes"]  # stacks, as the function says
    assert of["joint"][:2] == ["joint", "All"]
    assert of["sam_oracle"][:2] == ["joint", "yes"]  # sees the label
