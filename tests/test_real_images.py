"""The command line on real pictures: lists, training, scores and masks. No accuracy is claimed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blosam_monai.__main__ import main

CAR_LABELS = '{"body": 1, "wheel": 2, "light": 3, "window": 4}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "options", "tasks", "values"),
    [
        ("lung_cxr", ["--support", "MCUCXR"], ["foreground"], {0, 255}),  # train at one site, test at the other
        ("dental_panoramic", [], ["foreground"], {0, 255}),
        ("kvasir_seg_256", [], ["foreground"], {0, 255}),
        ("car_parts", ["--label_names", CAR_LABELS], ["body", "wheel", "light", "window"], {0, 1, 2, 3, 4}),
    ],
)
def test_from_real_folders_to_masks(folder, options, tasks, values, real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = real_data / folder
    pair = ["--images", str(data / "images"), "--labels", str(data / "labels"), "--dataset_dir", str(data)]
    assert main(["datalist", *pair, *options, "--n_testing", "6", "--output", "list.json"]) == 0
    listed = ["--data_list", "list.json", "--dataset_dir", str(data), "--use_mlflow", "false"]
    assert main(["train", *listed, "--output_dir", "run", "--max_epochs", "20"]) == 0
    assert main(["evaluate", *listed, "--model", "run", "--output_dir", "scores"]) == 0
    scores = json.loads(Path("scores/summary.json").read_text())["scores"]["testing"]
    assert list(scores) == [*tasks, "all"]
    assert {scores[task]["cases"] for task in tasks} == {6}
    assert scores["all"]["dice_mean"] > 0
    for item in json.loads(Path("list.json").read_text())["testing"][:2]:
        source = data / item["image"]
        assert main(["predict", "--model", "run", "--input", str(source), "--output_dir", "masks"]) == 0
        with Image.open(source) as image, Image.open(Path("masks", f"{source.stem}.png")) as mask:
            assert mask.size == image.size
            assert set(np.unique(np.asarray(mask))) <= values
