"""The episodic evaluator: logits on the query's own grid, averaged over scales, and what the tables hold."""

import csv
import json

import numpy as np
import pytest
import torch
from monai.data.utils import no_collation
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from blosam_monai.engines.episodic_evaluator import EpisodeTable, EpisodicEvaluator
from blosam_monai.iou import IoUAccumulator


class Head(nn.Module):
    """The logit is the query's only channel; the maps are that and its contrary."""

    def forward(self, support, mask, query):
        assert mask.shape[-2:] == query.shape[-2:]
        return query[:, 0]

    def predictions(self, support, mask, query):
        return {"same": query[:, 0], "contrary": -query[:, 0]}


def view(values, size=32, inside=(32, 16)) -> dict:
    """A query whose embedding are these values on a grid of 4 pixels a place; its picture fills the left half."""
    side = size // 4
    return {
        "support": torch.zeros(2, 1, side, side),
        "mask": torch.ones(2, 1, 2 * side, 2 * side, dtype=torch.bool),
        "embedding": values[None],
        "label": torch.zeros(1, 2 * side, 2 * side),
        "input_size": torch.tensor(inside),
        "image_size": size,
    }


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "query.png"
    Image.fromarray(np.zeros((64, 32), np.uint8)).save(path)
    return path


def make_episode(picture, scales, label, *, subject="a", name="liver") -> dict:
    item = {"source": str(picture), "subject": subject, "section": "testing", "unit": "pixel", "spacing": [1.0, 1.0]}
    return {"name": name, "supports": [item], "query": item, "label": label, "scales": scales}


def evaluate(episodes, *handlers) -> EpisodicEvaluator:
    loader = DataLoader(episodes, batch_size=1, collate_fn=no_collation)
    evaluator = EpisodicEvaluator("cpu", loader, Head(), val_handlers=handlers)
    evaluator.run()
    return evaluator


def half(size=32, rows=None) -> torch.Tensor:
    """Logits: 1 in the first rows (default half), -1 below, and 9 right of the picture, where nothing is looked at."""
    side = size // 4
    values = -torch.ones(side, side)
    values[: side // 2 if rows is None else rows] = 1
    values[:, side // 2 :] = 9
    return values


def test_predictions_are_brought_to_the_grid_of_the_query(picture):
    """The picture of 64 x 32 pixels, half of whose rows are foreground; bilinear, its edge is where it was."""
    label = torch.zeros(1, 64, 32, dtype=torch.bool)
    label[:, :32] = True
    inside = make_episode(picture, [view(half())], label)
    output = evaluate([inside]).state.output
    assert output["pred"].shape == (1, 64, 32)
    assert output["pred"][:, :28, :12].all()  # off the border to what is right of the picture, which bleeds in
    assert not output["pred"][:, 36:, :12].any()


def test_scales_are_averaged_before_the_threshold(picture):
    """1 at one scale and -3 at the other are -1 together."""
    label = torch.zeros(1, 64, 32, dtype=torch.bool)
    scales = [view(torch.ones(8, 8)), view(torch.full((16, 16), -3.0), 64, (64, 32))]
    assert not evaluate([make_episode(picture, scales, label)]).state.output["pred"].any()
    scales[1] = view(torch.full((16, 16), -0.5), 64, (64, 32))
    assert evaluate([make_episode(picture, scales, label)]).state.output["pred"].all()


@pytest.fixture
def scored(picture, tmp_path):
    """Three episodes of two classes, two subjects: 2048 pixels predicted, of which 512, 1024 and 2048 are right."""
    episodes = []
    for rows, subject, name in ((16, "a", "liver"), (32, "b", "liver"), (64, "b", "spleen")):
        label = torch.zeros(1, 64, 32, dtype=torch.bool)
        label[:, :rows] = True
        episodes.append(make_episode(picture, [view(torch.ones(8, 8))], label, subject=subject, name=name))
    evaluate(episodes, EpisodeTable(tmp_path / "scores", {"n_shot": 1}, fold="2"))
    return tmp_path / "scores"


def test_the_two_numbers_are_of_all_pixels(scored):
    """Liver 1536 of 4096, spleen 2048 of 2048; together 3584 of 6144, no background is found of 2560."""
    found = json.loads((scored / "iou.json").read_text())
    assert found["classes"] == {"liver": 0.375, "spleen": 1.0}
    assert found["mean_iou"] == 0.6875
    assert found["binary_iou"] == pytest.approx(3584 / 6144 / 2)
    assert (found["episodes"], found["subjects"], found["fold"]) == (3, 2, "2")


def test_every_map_of_the_head_is_counted_apart(scored):
    maps = json.loads((scored / "iou.json").read_text())["maps"]
    assert {name: numbers["mean_iou"] for name, numbers in maps.items()} == {"same": 0.6875, "contrary": 0.0}


def test_the_table_has_a_row_an_episode_and_says_who_supported(scored):
    with (scored / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["subject"], row["episode"]) for row in rows] == [
        ("liver", "a", "0"),
        ("liver", "b", "1"),
        ("spleen", "b", "2"),
    ]
    assert [float(row["dice"]) for row in rows] == [pytest.approx(d) for d in (0.4, 2 / 3, 1.0)]
    assert {row["supports"] for row in rows} == {rows[0]["case_id"]}
    assert json.loads((scored / "summary.json").read_text())["settings"]["n_shot"] == 1


def test_the_counts_are_read_for_the_mean_over_folds(scored):
    assert IoUAccumulator.read(scored / "iou_counts.csv").class_iou() == {"2": {"liver": 0.375, "spleen": 1.0}}


def test_scores_of_a_class_that_was_trained_on_are_told(picture, tmp_path, caplog):
    label = torch.ones(1, 64, 32, dtype=torch.bool)
    table = EpisodeTable(tmp_path / "scores", {"training": {"base": ["liver", "kidney"]}})
    evaluate([make_episode(picture, [view(torch.ones(8, 8))], label)], table)
    assert "1 of the classes were trained on" in caplog.text


def test_earlier_scores_are_kept_unless_they_may_be_replaced(scored):
    with pytest.raises(FileExistsError, match="holds scores; choose another or add overwrite=true"):
        EpisodeTable(scored, {})
    EpisodeTable(scored, {}, overwrite=True)
