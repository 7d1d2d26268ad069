"""Grids are checked before anything runs; lists and cells are the same for all methods and at every start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blosam_monai.bench.cells import check
from blosam_monai.bench.grid import draw_lists, grid_cells, load_grid
from blosam_monai.data.recipes import read_recipe
from blosam_monai.networks.sam import TINY_FILE
from tests.bench.small_grid import LUNGS, write_grid, write_lungs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``lungs``: eight pictures with labels; ``recipe.json`` on them."""
    folder = tmp_path_factory.mktemp("grid")
    write_lungs(folder)
    recipe = {"name": "films", "license": "CC0", "images": "images", "labels": "labels", "n_testing": 3}
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return folder


def cells_of(folder: Path, output_dir: Path, **changes):
    grid = load_grid(write_grid(folder, **changes))
    return grid_cells(grid, draw_lists(grid, output_dir))


def test_cells_are_methods_times_data_times_shots_times_draws(folder, tmp_path):
    cells = cells_of(folder, tmp_path)
    assert len(cells) == len({cell.key for cell in cells}) == 2 * 1 * 2 * 2
    assert all(re.fullmatch(r"(blosam|joint)_lungs_[24]shot_draw[01]_[0-9a-f]{8}", cell.key) for cell in cells)


def test_all_methods_get_the_list_and_the_seed_of_the_draw(folder, tmp_path):
    cells = cells_of(folder, tmp_path, first_seed=5)
    of_draw = {(cell.n_shot, cell.draw, cell.data_list, cell.seed) for cell in cells}
    assert len(of_draw) == 2 * 2
    assert all(seed == 5 + draw for _, draw, _, seed in of_draw)


def test_a_list_is_the_one_that_the_command_line_draws_with_that_seed(folder, tmp_path):
    from blosam_monai.__main__ import main

    cell = cells_of(folder, tmp_path, first_seed=7)[-1]  # 4 shots, draw 1
    lungs = folder / "lungs"
    arguments = ["datalist", "--images", lungs / "images", "--labels", lungs / "labels", "--dataset_dir", lungs]
    arguments += ["--label_names", '{"lung": 255}', "--label_coding", "threshold", "--n_shot", 4, "--seed", 8]
    assert main([*map(str, arguments), "--output", str(tmp_path / "list.json")]) == 0
    drawn, wanted = (json.loads(Path(p).read_text()) for p in (cell.data_list, tmp_path / "list.json"))
    assert {key: drawn[key] for key in wanted if key != "name"} == {k: v for k, v in wanted.items() if k != "name"}


def test_a_second_start_has_the_same_cells_even_when_pictures_came_to_the_folder(folder, tmp_path):
    first = [cell.key for cell in cells_of(folder, tmp_path)]
    added = [folder / "lungs" / kind / "added.png" for kind in ("images", "labels")]
    try:
        for path in added:
            path.write_bytes((folder / "lungs" / path.parent.name / "lung_7.png").read_bytes())
        assert [cell.key for cell in cells_of(folder, tmp_path)] == first
    finally:
        for path in added:
            path.unlink()


def test_more_draws_shots_and_methods_leave_the_other_cells_as_they_are(folder, tmp_path):
    few = {cell.key for cell in cells_of(folder, tmp_path)}
    assert few < {cell.key for cell in cells_of(folder, tmp_path, draws=3, methods=["swap", "joint", "blosam"])}


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"max_epochs": 7}},
        {"methods": ["blosam", {"method": "joint", "lower_lr": 0.1}]},
        {"data": [{**LUNGS, "n_testing": 2}]},
        {"first_seed": 1},
        {"test_curve": 5},
    ],
)
def test_what_decides_a_result_changes_the_key(folder, tmp_path, changes):
    before = {cell.place: cell.key for cell in cells_of(folder, tmp_path)}
    after = {cell.place: cell.key for cell in cells_of(folder, tmp_path, **changes)}
    assert before.keys() == after.keys()
    assert any(before[place] != after[place] for place in before)


def test_a_default_written_out_and_the_place_of_the_cache_change_no_key(folder, tmp_path):
    before = [cell.key for cell in cells_of(folder, tmp_path)]
    settings = {"lower_lr": 0.005, "cache_dir": "none"}  # as train.json has it
    assert [cell.key for cell in cells_of(folder, tmp_path, settings=settings)] == before


def test_the_published_weights_are_the_same_however_they_are_asked_for(folder, tmp_path):
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(TINY_FILE.read_bytes())
    keys = [
        [cell.key for cell in cells_of(folder, tmp_path, settings={"sam_model": "tiny", **asked})]
        for asked in ({}, {"sam_checkpoint": "download"}, {"sam_checkpoint": str(copied)})
    ]
    assert keys[0] == keys[1] == keys[2]
    assert keys[0] != [cell.key for cell in cells_of(folder, tmp_path, settings={"sam_checkpoint": "random"})]


def test_a_list_whose_labelled_image_has_changed_is_drawn_anew(tmp_path, caplog):
    write_lungs(tmp_path)
    before = {cell.place: cell for cell in cells_of(tmp_path, tmp_path / "out")}
    drawn = json.loads(Path(before["joint_lungs_2shot_draw0"].data_list).read_text(encoding="utf-8"))
    tested = tmp_path / "lungs" / drawn["testing"][0]["label"]
    support = tmp_path / "lungs" / drawn["upper"][0]["label"]
    others = [tmp_path / "lungs" / item["label"] for item in drawn["testing"][1:]]
    tested.write_bytes(others[0].read_bytes())
    of_two_shots = [place for place in before if "_2shot_draw0" in place]
    after = {cell.place: cell.key for cell in cells_of(tmp_path, tmp_path / "out")}
    assert all(after[place] == before[place].key for place in of_two_shots)
    support.write_bytes(others[1].read_bytes())
    after = {cell.place: cell.key for cell in cells_of(tmp_path, tmp_path / "out")}
    assert all(after[place] != before[place].key for place in of_two_shots)
    assert "data lungs, 2 shots, seed 0: 1 files of labelled images have changed" in caplog.text


def test_the_folder_of_a_data_set_may_move(folder, tmp_path):
    before = [cell.key for cell in cells_of(folder, tmp_path)]
    moved = tmp_path / "moved"
    (folder / "lungs").rename(moved)
    try:
        with pytest.raises(FileNotFoundError, match=r"data lungs: dataset_dir: .*lungs does not exist"):
            load_grid(write_grid(folder))
        grid = load_grid(write_grid(folder), dataset_dirs={"lungs": str(moved)})
        assert [cell.key for cell in grid_cells(grid, draw_lists(grid, tmp_path))] == before
    finally:
        moved.rename(folder / "lungs")


def test_overrides_go_settings_then_method_and_the_tasks_of_the_data_come_along(folder, tmp_path):
    crossfit = {"method": "blosam", "name": "cross-fitted", "crossfit": True, "max_epochs": 3}
    cells = cells_of(
        folder,
        tmp_path,
        methods=["blosam", crossfit],
        settings={"max_epochs": 9, "amp": False},
        data=[{**LUNGS, "tasks": ["lung"]}],
    )
    assert cells[0].overrides == {"max_epochs": 9, "amp": False, "tasks": ["lung"]}
    assert (cells[1].method, cells[1].preset) == ("cross-fitted", "blosam")
    assert cells[1].overrides == {"max_epochs": 3, "amp": False, "crossfit": True, "tasks": ["lung"]}


def test_a_setting_reaches_the_methods_that_use_it_and_changes_no_preset(folder, tmp_path):
    settings = {"sam_model": "tiny", "prompt": "sparse:2", "max_epochs": 9}
    cells = cells_of(folder, tmp_path, methods=["blosam", "decoder_only", "deeplabv3"], settings=settings)[:3]
    assert [dict(cell.overrides) for cell in cells] == [
        settings,
        {"sam_model": "tiny", "max_epochs": 9},  # its prompt is none: that is what it is
        {"max_epochs": 9},  # it has no SAM
    ]


def test_a_recipe_fills_in_what_the_entry_leaves_out_and_its_licence_is_in_the_lists(folder, tmp_path):
    entry = {"name": "films", "recipe": "recipe.json", "dataset_dir": "lungs", "n_testing": 2}
    cell = cells_of(folder, tmp_path, data=[entry])[0]
    drawn = json.loads(Path(cell.data_list).read_text())
    assert (drawn["name"], drawn["license"], len(drawn["testing"])) == ("films", "CC0", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "肺"}, "name is '肺'; give one with a letter a to z or a digit 0 to 9"),
        (
            {"data": [{**LUNGS, "name": "肺"}]},
            "data has the name '肺'; give one with a letter a to z or a digit 0 to 9",
        ),
        ({"methods": [{"method": "joint", "name": "方法"}]}, "has the name '方法'; give one with a letter a to z"),
        ({"score": "dic"}, r"score: 'dic' is unknown; did you mean 'dice'\?"),
        ({"draw": 3}, r"key: 'draw' is unknown; did you mean 'draws'\?"),
        ({"shots": None}, "shots is missing; add it"),
        ({"shots": [1]}, "shots is 1; give a whole number, 2 or more"),
        ({"shots": [4, 4]}, "shots: '4' and '4' are one name"),
        ({"draws": 0}, "draws is 0; give a whole number, 1 or more"),
        ({"draws": True}, "draws is True; give a whole number"),
        ({"methods": []}, r"methods is \[\]; give a list of at least one"),
        ({"methods": ["blosm"]}, r"methods: 'blosm' is unknown; did you mean 'blosam'\?"),
        ({"methods": ["blosam", {"method": "blosam", "crossfit": True}]}, "'blosam' and 'blosam' are one name"),
        ({"methods": [{"method": "blosam", "crosfit": True}]}, r"'crosfit' is unknown; did you mean 'crossfit'\?"),
        ({"methods": [{"method": "blosam", "crossfit": "yes"}]}, "crossfit: expected true or false, found 'yes'"),
        ({"settings": {"max_epochs": 0}}, "settings: max_epochs: expected 1 or more, found '0'"),
        ({"settings": {"lower_lr": None}}, "settings: lower_lr: is null; leave it out"),
        ({"settings": {"prompt": "$exit()"}}, "which a config would take for code"),
        ({"settings": {"window": [["@x"]]}}, "which a config would take for code"),
        ({"settings": {"seed": 3}}, "seed is set by the grid for each cell; leave it out"),
        ({"settings": {"sam_checkpoint": "none.pth"}}, "sam_checkpoint: .*none.pth does not exist"),
        (
            {"settings": {"prompt": "dense"}, "methods": ["decoder_only"]},
            "prompt changes none of the methods",
        ),
        ({"reference": "swap"}, "reference: 'swap' is unknown; known: blosam, joint"),
        ({"data": [LUNGS, {**LUNGS, "name": "Lungs"}]}, "'lungs' and 'Lungs' are one name"),
        ({"data": [{**LUNGS, "n_test": 3}]}, r"'n_test' is unknown; did you mean 'n_testing'\?"),
        ({"data": [{**LUNGS, "n_testing": -1}]}, "n_testing: expected 0 or more, found '-1'"),
        ({"data": [{**LUNGS, "label_coding": "colors"}]}, '"?colors"? is not one of index'),
        ({"data": [{**LUNGS, "images": "pictures"}]}, "images: .*pictures does not exist"),
        ({"data": [{"name": "lungs", "dataset_dir": "lungs"}]}, "give either images and labels, or from, or a recipe"),
        ({"data": [{**LUNGS, "n_shot": 3}]}, "'n_shot' is unknown"),
        ({"data": [{k: v for k, v in LUNGS.items() if k != "dataset_dir"}]}, "give --dataset_dir lungs=FOLDER"),
    ],
)
def test_what_a_grid_may_not_be_is_said_in_a_line(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_grid(write_grid(folder, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": [2, 12]}, "data lungs, 12 shots, draw 0: n_shot: 12 asked for, 8 labelled images found"),
        ({"shots": [8]}, "data lungs, 8 shots, draw 0: no image is left to test on; ask for fewer shots"),
        ({"data": [{**LUNGS, "tasks": ["heart"]}]}, r"data lungs, 2 shots, draw 0: tasks: \['heart'\] must be some"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_runs(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_lists(load_grid(write_grid(folder, **changes)), tmp_path)


def test_a_folder_for_a_data_set_that_the_grid_does_not_have_is_refused(folder):
    with pytest.raises(ValueError, match=r"dataset_dir: 'lung' is unknown; did you mean 'lungs'\?"):
        load_grid(write_grid(folder), dataset_dirs={"lung": "."})


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "grids").glob("*.json")), ids=lambda path: path.stem)
def test_the_grids_of_this_project_can_be_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path))
    for name in ("resnet50.pth", "sam_vit_b_01ec64.pth"):
        Path(name).touch()  # weights that a user brings along
    folders = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["data"]:
        recipe = read_recipe(path.parent / entry["recipe"]) if "recipe" in entry else {}
        for key in ("images", "labels"):
            Path(entry["name"], entry.get(key) or recipe[key]).mkdir(parents=True)
        folders[entry["name"]] = entry["name"]
    grid = load_grid(path, dataset_dirs=folders)
    lists = {(data.name, n, draw): path for data in grid.data for n in grid.shots for draw in range(grid.draws)}
    cells = grid_cells(grid, lists)
    for cell in {cell.group: cell for cell in cells}.values():
        check(cell)
    assert len({cell.key for cell in cells}) == len(cells)
