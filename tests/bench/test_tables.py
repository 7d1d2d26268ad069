"""Tables say what hand-worked grids say, and of what was not run that it was not."""

import csv
import io
import itertools
import re

import numpy as np
import pytest

from blosam_monai.bench.statistics import estimate_methods, mean_estimate
from blosam_monai.bench.tables import (
    ALL_SETS,
    TABLES,
    as_csv,
    as_latex,
    as_markdown,
    caption,
    compare_with_paper,
    summarise_grid,
    weights_line,
    write_tables,
)
from blosam_monai.networks.sam import SAM_FILES, TINY_SHA256

CASES = ("1", "2", "3")
A = [[0.8, 0.6, None], [0.7, None, 0.9]]  # (draws, cases); None: a support
B = [[0.6, 0.6, None], [0.8, None, 0.4]]


def scores(method: str, table, **others) -> list[dict]:
    rows = [(d, c, value) for d, line in enumerate(table) for c, value in zip(CASES, line, strict=False)]
    cell = {"data": "lungs", "n_shot": 4, "method": method, "task": "lung", "oracle": False}
    return [
        cell | {"draw": d, "case": c, "subject": c, "dice": v, "hd95": 10 * v} | others
        for d, c, v in rows
        if v is not None
    ]


def cell(method: str, **others) -> dict:
    known = {"data": "lungs", "n_shot": 4, "method": method, "draw": 0, "seconds": 2.0, "trained_parameters": 65792}
    return known | {"total_parameters": 6_000_000, "sam_weights": TINY_SHA256} | others


def summary(rows, cells=(), reference="b", **options) -> dict:
    table = summarise_grid(rows, cells, reference, resamples=200, **options)
    return {(row["data"], row["method"]): row for row in table}


def test_mean_and_sd_over_draws_are_those_by_hand():
    row = summary(scores("a", A) + scores("b", B))["lungs", "a"]
    assert (row["draws"], row["cases"]) == (2, 3)
    assert row["mean"] == pytest.approx((0.8 + 0.6 + 0.7 + 0.9) / 4)
    assert row["sd"] == pytest.approx(0.1 / 2**0.5)  # draws: 0.7 and 0.8


def test_difference_and_superiority_are_of_the_cases_that_both_have():
    lacking = [row for row in scores("b", B) if (row["draw"], row["case"]) != (1, "3")]
    row = summary(scores("a", A) + lacking)["lungs", "a"]
    assert row["difference"] == pytest.approx((0.2 + 0 - 0.1) / 3)
    assert row["superiority"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_task_of_few_cases_counts_as_much_as_one_of_many():
    few = scores("b", [[0.1]], task="heart")
    assert summary(scores("b", B) + few)["lungs", "b"]["mean"] == pytest.approx((0.6 + 0.1) / 2)


def test_the_interval_of_the_difference_is_within_that_of_all_possible_resamples():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.4, 0.9, (2, 3, 3))
    means = [
        (a - b)[np.ix_(draws, cases)].mean()
        for draws in itertools.product(range(3), repeat=3)
        for cases in itertools.product(range(3), repeat=3)
    ]
    table = summarise_grid(scores("a", a) + scores("b", b), [], "b")
    row = next(row for row in table if row["method"] == "a")
    assert row["difference_low"] == pytest.approx(np.percentile(means, 2.5), abs=0.005)
    assert row["difference_high"] == pytest.approx(np.percentile(means, 97.5), abs=0.005)


def test_data_sets_without_a_common_subject_are_resampled_independently():
    table = np.random.default_rng(0).uniform(size=(5, 3))
    other = [row | {"subject": f"other {row['subject']}"} for row in scores("b", table, data="teeth")]
    own, _ = estimate_methods(scores("b", table) + other, "b", score="dice")
    both = mean_estimate(list(own.values()))
    assert np.var(both.resampled) == pytest.approx(np.var(own["b", "lungs"].resampled) / 2, rel=0.05)


def test_data_sets_of_the_same_subjects_are_resampled_together():
    table = np.random.default_rng(0).uniform(size=(5, 3))
    own, _ = estimate_methods(scores("b", table) + scores("b", table, data="same"), "b", score="dice")
    both = mean_estimate(list(own.values()))
    np.testing.assert_allclose(both.resampled, own["b", "lungs"].resampled)


def test_all_sets_count_each_set_once_and_need_every_one():
    teeth = scores("b", [[0.2, 0.2]], data="teeth")
    found = summary(scores("a", A) + scores("b", B) + teeth)
    assert found[ALL_SETS, "b"]["mean"] == pytest.approx((0.6 + 0.2) / 2)
    assert not found[ALL_SETS, "a"]["run"]


def test_p_is_corrected_for_all_comparisons_of_the_grid():
    better = [[0.9, 0.8, 0.9], [0.9, 0.7, 0.9]]
    rows = [row for m, t in {"b": np.zeros((2, 3)), "a": better, "c": better}.items() for row in scores(m, t)]
    found = summary(rows + [row | {"n_shot": 8} for row in rows])
    smallest = 2 / 201
    assert found["lungs", "a"]["p"] == pytest.approx(smallest)
    assert found["lungs", "a"]["p_holm"] == pytest.approx(4 * smallest)  # two methods with four and with eight images


def test_one_draw_has_no_interval_and_no_p():
    found = summary(scores("a", A[:1]) + scores("b", B[:1]))["lungs", "a"]
    assert [found[key] for key in ("sd", "low", "high", "difference_low", "p", "p_holm")] == [None] * 6


def test_cases_of_one_subject_have_no_interval():
    rows = [row | {"subject": "x"} for row in scores("b", B)]
    assert summary(rows)["lungs", "b"]["low"] is None


def test_a_shorter_distance_is_better():
    near, far = np.full((2, 3), 0.1), np.full((2, 3), 0.5)
    table = summarise_grid(scores("a", near) + scores("b", far), [], "b", score="hd95")
    row = next(row for row in table if row["method"] == "a")
    assert (row["difference"], row["superiority"]) == (pytest.approx(-4.0), 1.0)
    assert "**1.0**" in as_markdown(table)


def test_cost_is_the_mean_over_cells():
    found = summary(scores("b", B), [cell("b"), cell("b", draw=1, seconds=4.0)])
    assert found["lungs", "b"]["seconds"] == 3.0


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="reference: c is not a method of the grid; choose from a, b"):
        summarise_grid(scores("a", A) + scores("b", B), [], "c")


PLANNED = [{"data": "lungs", "n_shot": 4, "method": method} for method in ("b", "a", "later")]
TABLE = summarise_grid(scores("b", B) + scores("a_1", A, oracle=True), [cell("b"), cell("a_1")], "b", planned=PLANNED)


@pytest.mark.parametrize("render", [as_markdown, as_latex, as_csv])
def test_what_was_not_run_says_so_in_every_number(render):
    line = next(line for line in render(TABLE).splitlines() if "later" in line)
    said = [text.strip(" \\") for text in re.split(r"[|&,]", line) if text.strip()]
    numbers = said[1:] if render is not as_csv else said[8:-1]  # of CSV, what the row is of, and the comparisons
    assert len(numbers) >= 11
    assert set(numbers) == {"not run"}


def test_no_field_of_the_csv_is_blank():
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE))))
    assert len(rows) == 4
    assert all(value for row in rows for value in row.values())


@pytest.mark.parametrize("render", [as_markdown, as_latex, as_csv])
def test_an_oracle_is_marked(render):
    assert re.search(r"a\\?_1 \(oracle\)", render(TABLE))


def test_latex_has_a_column_for_every_cell_and_no_open_command():
    lines = as_latex(TABLE).splitlines()
    columns = len(re.search(r"\{tabular\}\{(\w+)\}", "\n".join(lines))[1])
    body = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count(" & ") + 1 for line in body} == {columns}
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(lines))
    opened, closed = (re.findall(rf"\\{word}\{{(.+?)\}}", "\n".join(lines)) for word in ("begin", "end"))
    assert opened == closed[::-1]


def better_than_reference(p_holm: float, **others) -> str:
    rows = [row | {"p_holm": p_holm, "difference": 0.1} | others for row in TABLE if "a_1" in row["method"]]
    return as_markdown(rows)


def test_a_mean_is_bold_only_where_it_is_shown_to_be_better():
    assert "**0.750**" in better_than_reference(0.049, oracle=False)
    assert "**0.750**" not in better_than_reference(0.051, oracle=False)
    assert "**0.750**" not in better_than_reference(0.049, oracle=False, difference=-0.1)
    assert "**0.750**" not in better_than_reference(0.049, oracle=True)


def test_the_caption_says_what_it_is_of_and_warns_of_few_draws():
    said = " ".join(caption(TABLE))
    for words in ("data: lungs", "2 draws", "10000 resamples", "Warning: 2 draws", "tiny SAM", "Research use only"):
        assert words in said


def test_a_grid_of_which_nothing_was_run_has_tables(tmp_path):
    paths = write_tables(tmp_path, summarise_grid([], [], "b", planned=PLANNED))
    assert [path.name for path in paths] == list(TABLES)
    assert "No cell has been run." in paths[0].read_text(encoding="utf-8")


def test_only_published_weights_may_be_compared():
    assert "NOT" not in weights_line([SAM_FILES["vit_b"].sha256])
    assert "NOT comparable" in weights_line([SAM_FILES["vit_b"].sha256, "scratch"])
    assert "NOT comparable" in weights_line(["random"])


def test_ours_stands_under_the_number_of_the_paper():
    paper = {
        "title": "Table 8",
        "source": "Zhang et al. 2024",
        "unit": "Dice, %",
        "columns": ["Lung 4", "Teeth 4"],
        "rows": {"BLO-SAM": {"Lung 4": [93.7, 0.1], "Teeth 4": [73.2, 0.7]}, "SAM": {"Lung 4": [31.4, None]}},
        "notes": ["A note."],
    }
    columns, methods = {"Lung 4": ("lungs", 4), "Teeth 4": ("teeth", 4)}, {"BLO-SAM": "b", "SAM": "a_1"}
    lines = compare_with_paper(TABLE, paper, columns=columns, methods=methods).splitlines()
    assert "| BLO-SAM | paper | 93.7 ± 0.1 | 73.2 ± 0.7 |" in lines
    ours = next(line for line in lines if "| ours: b |" in line)
    assert ours.startswith("|  | ours: b | 60.0 ± 0.0 (")
    assert ours.endswith("| not run |")
    assert "| SAM | paper | 31.4 | not available |" in lines
    assert any("| ours: a_1 (oracle) | 75.0 ± 7.1" in line for line in lines)
    assert any("NOT comparable" in line for line in lines)
