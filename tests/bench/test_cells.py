"""Cells of a grid: draws in one pass against draws one by one, and what is tested of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from blosam_monai.bench.cells import check, run_cells, stacks
from blosam_monai.bench.runner import Cell
from blosam_monai.data.datalist import make_datalist, write_datalist
from blosam_monai.data.pairing import pair_folders
from blosam_monai.data.phantoms import PHANTOM_LABELS

SMALL = {"image_size": 64, "max_epochs": 4}


@pytest.fixture(scope="module")
def lists(phantoms, tmp_path_factory) -> list[Path]:
    """Two draws of four shots, tested on two films each."""
    folder = tmp_path_factory.mktemp("lists")
    items = pair_folders(phantoms / "images", phantoms / "labels", phantoms)
    for seed in range(2):
        drawn = make_datalist(items, PHANTOM_LABELS, dataset_dir=phantoms, n_shot=4, n_testing=2, seed=seed)
        write_datalist(folder / f"{seed}.json", drawn)
    return [folder / f"{seed}.json" for seed in range(2)]


@pytest.fixture
def cells(lists, phantoms) -> list[Cell]:
    """A cell of BLO-SAM for each draw."""
    where = {"data": "phantoms", "dataset_dir": str(phantoms), "n_shot": 4, "fingerprint": "0123abcd"}
    return [
        Cell("blosam", "blosam", SMALL, data_list=str(path), draw=draw, seed=draw + 5, **where)
        for draw, path in enumerate(lists)
    ]


def of(cells: list[Cell], preset: str, **overrides) -> list[Cell]:
    return [replace(cell, method=preset, preset=preset, overrides={**cell.overrides, **overrides}) for cell in cells]


def run(*cells: Cell):
    return list(run_cells(list(cells), device="cpu"))


def assert_same_rows(found: list[dict], expected: list[dict]) -> None:
    """The same cases in the same order; the scores of a pixel or two apart, as single precision adds up."""
    names = ("task", "case", "subject")
    assert [[row[n] for n in names] for row in found] == [[row[n] for n in names] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["dice"] == pytest.approx(b["dice"], abs=2e-3)


def test_draws_in_one_pass_score_as_draws_one_by_one(cells):
    together = run(*cells)
    assert [result.record["stacked_draws"] for result in together] == [2, 2]
    assert any(row["dice"] > 0.1 for row in together[0].rows)  # or there would be nothing to compare
    for result, cell in zip(together, cells, strict=True):
        (alone,) = run(cell)
        assert result.cell == cell
        assert_same_rows(result.rows, alone.rows)
        assert result.record["trained_parameters"] == alone.record["trained_parameters"]
        assert result.record["total_parameters"] == alone.record["total_parameters"]


def test_the_cases_of_a_cell_are_those_of_its_lists_testing_section(cells, lists):
    for result, path in zip(run(*of(cells, "linear_probe", max_epochs=1)), lists, strict=True):
        testing = [Path(item["image"]).stem for item in json.loads(path.read_text(encoding="utf-8"))["testing"]]
        assert [row["case"] for row in result.rows] == [case for case in testing for _ in range(2)]
        assert [row["task"] for row in result.rows] == ["lung", "heart"] * len(testing)


def test_a_subset_of_the_tasks_is_trained_and_tested(cells):
    (result,) = run(*of(cells[:1], "linear_probe", tasks=["heart"], max_epochs=1))
    assert {row["task"] for row in result.rows} == {"heart"}
    assert result.record["trained_parameters"] == 128 + 1  # channels of tiny, and a bias


def test_a_linear_probe_stacks_too(cells):
    probes = of(cells, "linear_probe", batch_size=2)
    together = run(*probes)
    assert together[0].record["stacked_draws"] == 2
    (alone,) = run(probes[1])
    assert_same_rows(together[1].rows, alone.rows)


def test_the_best_epoch_on_d2_is_chosen_draw_by_draw(cells):
    chosen = of(cells, "blosam", selection="upper", val_interval=1, max_epochs=2)
    assert not stacks(chosen[0])
    results = run(*chosen)
    assert [result.record["stacked_draws"] for result in results] == [1, 1]
    assert all(len(result.rows) == 4 for result in results)


def test_curves_are_noted_before_the_training_and_at_their_interval(cells):
    for result in run(*(replace(cell, test_curve=2) for cell in of(cells, "blosam"))):
        assert [point["epoch"] for point in result.record["curve"]] == [0, 2, 4]
        last = result.record["curve"][-1]
        mean = sum(row["dice"] for row in result.rows) / len(result.rows)
        assert last["test_dice"] == pytest.approx(mean, abs=1e-6)  # scored by other code


def test_a_method_whose_draws_share_an_encoder_runs_one_by_one(cells):
    samed = of(cells, "samed", max_epochs=1)
    assert not stacks(samed[0])
    results = run(*samed)
    assert [result.record["stacked_draws"] for result in results] == [1, 1]
    assert all(len(result.rows) == 4 for result in results)


def test_learned_ranks_are_recorded_for_each_task_of_each_draw(cells):
    for result in run(*of(cells, "arena", lora_rank=2, max_epochs=1)):
        ranks = result.record["effective_ranks"]
        assert len(ranks) == 14
        assert all(len(layer) == 2 and set(layer) <= {0, 1, 2} for layer in ranks.values())


def test_an_oracle_is_scored_without_training_and_marked(cells):
    (result,) = run(*of(cells[:1], "sam_oracle"))
    assert result.record["oracle"]
    assert result.record["seconds"] == 0
    assert result.record["trained_parameters"] == 0
    assert len(result.rows) == 4


def test_a_few_shot_head_remembers_the_images_of_its_draw(cells):
    (result,) = run(*of(cells[:1], "panet", max_epochs=1))
    assert len(result.rows) == 4
    assert not result.record["oracle"]


@pytest.mark.parametrize(
    ("preset", "overrides", "stacked"),
    [
        ("blosam", {}, True),
        ("joint", {}, True),
        ("arena", {}, True),
        ("linear_probe", {}, True),
        ("blosam", {"train_encoder": "lora"}, False),
        ("blosam", {"selection": "upper"}, False),
        ("dynunet", {}, False),
        ("panet", {}, False),
        ("sam_oracle", {}, False),
    ],
)
def test_draws_stack_where_tasks_share_no_trained_tensor(cells, preset, overrides, stacked):
    assert stacks(of(cells[:1], preset, **overrides)[0]) == stacked


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("blosam", {"selection": "validation"}, "selection: the lists of a grid have no validation section"),
        ("joint", {"crossfit": True}, "crossfit, hypergradient: joint is joint training"),
        ("arena", {"hypergradient": "exact"}, "crossfit, hypergradient: arena is joint training"),
        ("joint", {"selection": "upper"}, "selection: joint trains on all images, D2 too; use last"),
        ("blosam", {"width": 8}, "width: the method blosam does not use it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_trained(cells, preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        check(of(cells[:1], preset, **overrides)[0])


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("blosam", {"image_size": 65}, "image_size: 65 is not a positive multiple of 16"),
        ("panet", {"head_options": {"projecton": 8}}, "head_options: panet has no option 'projecton'; choose from pro"),
        ("blosam", {"sam_model": "vit_h"}, "SAM vit_h needs Meta's checkpoint, which is not on this machine"),
        ("blosam", {"sam_model": "vit_b", "sam_checkpoint": "gone.pth"}, "sam_checkpoint: gone.pth does not exist"),
    ],
)
def test_what_a_network_would_refuse_is_refused_before_anything_is_trained(cells, preset, overrides, message, caplog):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(of(cells[:1], preset, **overrides)[0])
    assert "random weights" not in caplog.text  # of what is never used


def test_the_hash_of_what_was_tested_is_that_of_the_images_and_labels(cells, lists):
    (result,) = run(*of(cells[:1], "sam_oracle_box"))
    drawn = json.loads(lists[0].read_text(encoding="utf-8"))
    hashes = [drawn["sha256"][item[key]] for item in drawn["testing"] for key in ("image", "label")]
    assert result.record["tested_sha256"] == hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def test_a_cell_that_agrees_passes(cells):
    for preset, overrides in (("crossfit", {}), ("blosam", {"hypergradient": "exact", "selection": "upper"})):
        check(of(cells[:1], preset, **overrides)[0])
