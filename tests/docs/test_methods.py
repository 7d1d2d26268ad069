"""The list of methods in the documents is complete, and its numbers are those of the networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from blosam_monai.methods import compose_config, list_methods, read_method

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/methods.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \|.*", re.MULTILINE)
NUMBERS = re.compile(r"\| (\d+(?: \d{3})*) (?=\|)")
WITHOUT_SAM = ("deeplabv3", "swinunetr2d", "dynunet")


def listed(text: str) -> dict[str, str]:
    """The row of each method in a text; heads of tables are none."""
    return {row[1]: row[0] for row in ROW.finditer(text) if row[1] != "method"}


def test_every_method_is_listed_and_nothing_else():
    assert sorted(listed(PAGE)) == list_methods()


def test_the_oracles_are_those_under_their_heading():
    section = PAGE.split("## Oracles")[1].split("\n## ")[0]
    assert sorted(listed(section)) == [name for name in list_methods() if "oracle" in read_method(name)]


@pytest.mark.parametrize(
    ("name", "model"),
    [(n, m) for n in list_methods() for m in (("tiny",) if n in WITHOUT_SAM else ("vit_b", "tiny"))],
)
def test_as_many_numbers_train_as_the_row_says(name, model):
    """One task, 256 pixels. Tensors on ``meta`` have no values: nothing is computed here."""
    parser = ConfigParser(compose_config(name, {}))
    parser.update({"sam_model": model, "sam_checkpoint": "random", "task_names": ["lung"], "seed": 0})
    with torch.device("cpu" if name == "swinunetr2d" else "meta"):  # MONAI reads numbers out of tensors while it builds
        network = parser.get_parsed_content("network_def")
    told = [int(number.replace(" ", "")) for number in NUMBERS.findall(listed(PAGE)[name])]
    assert network.count_parameters()[0] == told[-2 if model == "vit_b" else -1]
