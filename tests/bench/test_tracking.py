"""A grid in MLflow: nested runs, each cell once whatever is killed, and nobody's name."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from blosam_monai.bench.grid import Grid, draw_lists, grid_cells, load_grid
from blosam_monai.bench.runner import Cell, run_grid
from blosam_monai.bench.tracking import GridTracker, cell_params
from tests.bench.fake_cells import run_cells, stacks
from tests.bench.small_grid import write_grid, write_lungs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Grid, list[Cell], Path]:
    """A grid of one data set, 2 methods and 2 draws that has been run, and its folder."""
    folder = tmp_path_factory.mktemp("tracked")
    write_lungs(folder)
    grid = load_grid(write_grid(folder, shots=[2], settings={"max_epochs": 7}))
    cells = grid_cells(grid, draw_lists(grid, folder / "out"))
    run_grid(cells, folder / "out", run_cells=run_cells, stacks=stacks)
    return grid, cells, folder / "out"


@pytest.fixture(scope="module")
def runs(finished) -> dict[str, mlflow.entities.Run]:
    """All runs by name after three starts: one killed as its second cell was begun, one whole, one with nothing new."""
    grid, cells, out = finished
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def killed(*args, **kwargs):
            calls.append(kwargs)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return log_batch(*args, **kwargs)

        tracker = GridTracker.open(grid, out)
        log_batch = tracker.client.log_batch
        patch.setattr(tracker.client, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            tracker.log(cells)
        tracker._lock.release()  # as the operating system does
    for _ in range(2):
        tracker = GridTracker.open(grid, out)
        tracker.log(cells)
        tracker.close("FINISHED")
    found = tracker.client.search_runs([tracker._experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_each_finished_cell_is_one_run_below_the_grids_own(runs, finished):
    parent = runs["study"]
    children = [run for run in runs.values() if run is not parent]
    assert sorted(run.data.tags["blosam.cell"] for run in children) == sorted(cell.key for cell in finished[1])
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_cells_compare_by_place_settings_and_scores(runs):
    (joint,) = (run for name, run in runs.items() if name.startswith("joint_") and name.endswith("draw1"))
    wanted = {"method": "joint", "data": "lungs", "n_shot": "2", "draw": "1", "seed": "1", "max_epochs": "7"}
    assert joint.data.params.items() >= wanted.items()
    assert joint.data.metrics.items() >= {"trained_parameters": 7, "seconds": 0.03}.items()
    assert joint.data.metrics["dice"] == joint.data.metrics["dice/lung"] == pytest.approx((0.2 + 0.4) / 2)
    assert joint.info.end_time - joint.info.start_time == 30  # ms, as its record says


def test_nobody_and_no_folder_is_named(runs, finished):
    told = str([(run.data.params, run.data.tags, run.data.metrics) for run in runs.values()])
    assert "Doe" not in told
    assert "lung_" not in told  # the pictures' names
    assert str(finished[2].parent) not in told


def test_only_one_of_several_processes_logs_a_grid(finished):
    grid, _, out = finished
    tracker = GridTracker.open(grid, out)
    assert GridTracker.open(grid, out) is None
    tracker.close("FINISHED")


def test_no_path_of_a_file_of_weights_is_logged(tmp_path):
    write_lungs(tmp_path)
    for name in ("Doe_weights.pth", "Doe_sam.pth"):
        (tmp_path / name).touch()
    methods = [
        {"method": "deeplabv3", "weights": "Doe_weights.pth"},
        {"method": "joint", "sam_checkpoint": "Doe_sam.pth"},
    ]
    grid = load_grid(write_grid(tmp_path, shots=[2], draws=1, methods=methods))
    cells = grid_cells(grid, draw_lists(grid, tmp_path / "out"))
    told = [cell_params(cell, {"record": {}, "blosam_monai_version": "1"}) for cell in cells]
    assert [params["method"] for params in told] == ["deeplabv3", "joint"]
    assert "Doe" not in str(told)


@pytest.mark.parametrize("error", [MlflowException("no answer"), ConnectionError("no answer")])
def test_a_store_that_does_not_answer_at_the_start_does_not_stop_the_grid(finished, monkeypatch, caplog, error):
    grid, _, out = finished

    def unreachable(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "get_experiment_by_name", unreachable)
        assert GridTracker.open(grid, out) is None
    assert "no answer" in caplog.text
    tracker = GridTracker.open(grid, out)  # its lock was let go
    assert tracker is not None
    tracker.close("FINISHED")


@pytest.mark.parametrize("error", [MlflowException("no answer"), ConnectionError("no answer")])
def test_a_store_that_does_not_answer_at_the_end_does_not_stop_the_grid(finished, monkeypatch, caplog, error):
    grid, _, out = finished
    tracker = GridTracker.open(grid, out)

    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr(tracker.client, "set_terminated", unreachable)
    tracker.close("FINISHED")
    assert "no answer" in caplog.text
    again = GridTracker.open(grid, out)
    assert again is not None
    again.close("FINISHED")


def test_a_store_that_fails_does_not_stop_the_grid_and_is_tried_again(finished, monkeypatch, caplog):
    grid, cells, out = finished
    (out / "grid_id.txt").unlink(missing_ok=True)  # as a grid of another folder
    tracker = GridTracker.open(grid, out)

    def unreachable(*args, **kwargs):
        raise MlflowException("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", unreachable)
        tracker.log(cells)
    assert "no answer" in caplog.text
    tracker.log(cells)
    children = tracker._search(f"tags.`mlflow.parentRunId` = '{tracker._parent}'")
    assert [run.info.status for run in children] == ["FINISHED"] * len(cells)
    tracker.close("FINISHED")
