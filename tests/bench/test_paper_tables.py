"""The papers' numbers are kept as printed, with their source, and stand beside ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blosam_monai.bench.paper_tables import beside_papers, paper_table, paper_tables, write_beside_papers
from blosam_monai.bench.tables import summarise_grid

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem for path in (ROOT / "data_lists").glob("*.json")}


@pytest.mark.parametrize(
    ("name", "method", "column", "printed"),
    [
        ("blo_sam_medical", "BLO-SAM", "teeth, 4 shots", [73.2, 0.7]),
        ("blo_sam_medical", "Med-SA", "polyps, 4 shots", [33.5, 3.5]),
        ("blo_sam_medical", "SAMed", "teeth, 8 shots", [75.1, 2.2]),
        ("blo_sam_medical_means", "SAMed", "teeth, 8 shots", [76.4, None]),
        ("blo_sam_bodies", "BLO-SAM", "body, 8 shots", [85.1, None]),
        ("blo_sam_full_fine_tuning", "FT-SAM", "body, 4 shots", [47.5, None]),
        ("blo_sam_cost", "HSNet", "trained, M", [2.6, None]),
        ("biopt_pascal", "BiOpt, ResNet-50", "5 shots", [64.16, None]),
        ("biopt_coco", "BiOpt, ResNet-50", "COCO-B, 1 shot", [33.15, None]),
        ("arena_novel", "ARENA", "average", [49.8, None]),
        ("arena_flare", "LoRA", "second table", [76.65, None]),
    ],
)
def test_numbers_are_those_of_the_papers(name, method, column, printed):
    assert paper_table(name)["rows"][method][column] == printed


def test_the_medical_table_is_complete_and_blo_sam_is_best_in_each_column_as_the_paper_says():
    paper = paper_table("blo_sam_medical")
    assert len(paper["rows"]) == 8
    for column in paper["columns"]:
        means = {method: cells[column][0] for method, cells in paper["rows"].items()}
        assert max(means, key=means.get) == "BLO-SAM"


def test_three_scales_are_what_the_main_table_of_biopt_reports():
    scales = paper_table("biopt_scales")["rows"]
    assert scales["three scales"]["1 shot"] == paper_table("biopt_pascal")["rows"]["BiOpt, ResNet-50"]["1 shot"]
    assert scales["one scale"]["1 shot"] == [56.04, None]


@pytest.mark.parametrize("name", paper_tables())
def test_each_cell_of_a_table_is_there_or_said_to_be_unknown(name):
    paper = paper_table(name)
    assert list(paper) == ["title", "source", "unit", "columns", "rows", "ours", "methods", "notes"]
    assert re.search(r"arXiv \d{4}\.\d{5}", paper["source"])
    unknown = False
    for cells in paper["rows"].values():
        assert list(cells) == paper["columns"]
        for cell in cells.values():
            unknown = unknown or cell is None
            assert cell is None or (len(cell) == 2 and 0 <= cell[0] <= 105 and (cell[1] is None or 0 < cell[1] < 10))
    if unknown:
        assert any("not available to us" in note for note in paper["notes"])


@pytest.mark.parametrize("name", paper_tables())
def test_our_column_is_a_recipe_and_a_number_of_shots(name):
    paper = paper_table(name)
    assert set(paper["ours"]) in (set(), set(paper["columns"]))
    assert set(paper["methods"]) <= set(paper["rows"])
    for column, ours in paper["ours"].items():
        assert ours["data"] in RECIPES
        assert str(ours["n_shot"]) in re.findall(r"\d+", column)


def test_shots_of_a_table_are_those_of_its_recipe():
    for name in ("blo_sam_medical", "blo_sam_faces", "blo_sam_cars", "blo_sam_bodies"):
        shots: dict[str, list[int]] = {}
        for ours in paper_table(name)["ours"].values():
            shots.setdefault(ours["data"], []).append(ours["n_shot"])
        for data, asked in shots.items():
            assert asked == json.loads((ROOT / "data_lists" / f"{data}.json").read_text())["paper"]["shots"]


@pytest.mark.parametrize(("name", "said"), [("blo_sam_medicl", "did you mean blo_sam_medical?"), ("x", "choose from")])
def test_an_unknown_table_is_refused(name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        paper_table(name)


def table(data):
    """Of two draws of two cases; the means of the draws are 0.6 and 0.7."""
    place = {"data": data, "n_shot": 4, "method": "blosam"}
    scores = {(0, "a"): 0.5, (0, "b"): 0.7, (1, "a"): 0.6, (1, "b"): 0.8}
    rows = [
        {**place, "draw": draw, "task": "polyp", "case": case, "subject": case, "oracle": False, "dice": dice}
        for (draw, case), dice in scores.items()
    ]
    costs = {"seconds": 1.0, "trained_parameters": 1, "total_parameters": 1, "sam_weights": "random"}
    return summarise_grid(rows, [{**place, "draw": draw, **costs} for draw in (0, 1)], "blosam", resamples=100)


def test_ours_stands_under_the_papers_and_what_was_not_run_is_said():
    text = beside_papers(table("kvasir_seg"))
    assert "| BLO-SAM | paper | 73.2 ± 0.7 | 77.3 ± 0.2 | 59.7 ± 0.2 |" in text
    assert re.search(r"^\|  \| ours.*\| not run \| not run \| 65.0 ± 7.1 \(.*\) \| not run \|", text, re.MULTILINE)
    assert "Table 3" in text  # of the same data
    assert "ARENA" not in text


def test_data_of_no_paper_leave_no_file(tmp_path):
    assert beside_papers(table("my lungs")) == ""
    (written,) = write_beside_papers(tmp_path, table("teeth"))
    assert "65.0 ± 7.1" in written.read_text(encoding="utf-8")
    assert write_beside_papers(tmp_path, table("my lungs")) == []
    assert not written.exists()
