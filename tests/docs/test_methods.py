"""The list of methods in the documents is complete, and its numbers are those of the networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from blosam_monai.methods import compose_config, list_methods, read_method

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/methods.md"


def rows() -> dict[str, str]:
    """The row of each method."""
    return {line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}


def test_every_method_has_one_row_and_no_other_is_listed():
    names = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").replace("| `method` |", ""), re.MULTILINE)
    assert sorted(names) == list_methods()


def test_the_oracles_are_those_under_their_heading():
    section = PAGE.read_text(encoding="utf-8").split("## Oracles")[1].split("\n## ")[0]
    told = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(told[1:]) == [name for name in list_methods() if "oracle" in read_method(name)]


@pytest.mark.parametrize("name", list_methods())
def test_as_many_numbers_train_as_the_row_says(name):
    """One task, 256 pixels, with the tiny SAM: the last number of the row."""
    parser = ConfigParser(compose_config(name, {}))
    parser.update({"sam_checkpoint": "random", "task_names": ["lung"], "seed": 0})
    counts = [int(n.replace(" ", "")) for n in re.findall(r"\| (\d+(?: \d{3})*) (?=\|)", rows()[name])]
    assert parser.get_parsed_content("network_def").count_parameters()[0] == counts[-1]
