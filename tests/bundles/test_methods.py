"""Every method through the command line: trained, read back, and on real images. No accuracy is claimed."""

from __future__ import annotations

import csv
import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blosam_monai.__main__ import main
from blosam_monai.methods import list_methods, read_method

ORACLES = [name for name in list_methods() if read_method(name).get("oracle")]
TRAINED = [name for name in list_methods() if not name.startswith("sam_oracle")]
FAST = ("blosam_arena", "panet", "med_sa")  # an oracle, a memory and a network of another form than was trained
SMALL = {  # of the methods that have a size to choose, or start at nothing
    "dynunet": {"width": 4},
    "swinunetr2d": {"width": 12},
    **{name: {"lora_rank": 2} for name in ("arena", "arena_encoder", "blosam_arena")},
    "rpmms": {"max_epochs": 8},  # before that it finds nothing
    "hsnet": {"max_epochs": 25},  # likewise
    "components_all": {"max_epochs": 25},  # likewise
}


def call(verb: str, **options: object) -> int:
    return main([verb, *(str(word) for key, value in options.items() for word in (f"--{key}", value))])


def train(method: str, datalist: Path, dataset_dir: Path, output_dir: Path, **options: object) -> int:
    settings = {"image_size": 64, "max_epochs": 2, "overlays": "false", "use_mlflow": "false"}
    where = {"data_list": datalist, "dataset_dir": dataset_dir, "output_dir": output_dir}
    return call("train", method=method, **where, **{**settings, **SMALL.get(method, {}), **options})


def dice_of(folder: Path, section: str) -> dict[tuple[str, str], float]:
    """Dice by case and task, as the table of a training or an evaluation has it."""
    with open(folder / "cases.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["section"] == section]
    return {(row["case"], row["task"]): float(row["dice"]) for row in rows}


def refusal(capsys, status: int) -> str:
    """The one line in which the command line says why it refused."""
    assert status == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blosam: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED],
)
def trained(request, phantoms, tmp_path_factory) -> tuple[str, Path]:
    """A method, and the output of its training."""
    output_dir = tmp_path_factory.mktemp(request.param) / "run"
    assert train(request.param, phantoms / "list.json", phantoms, output_dir) == 0
    return request.param, output_dir


def test_a_trained_method_read_back_from_its_file_scores_as_it_did_in_memory(trained, phantoms, tmp_path):
    """The table of the training is of the network in memory, picture by picture; that of `evaluate` of the file."""
    status = call(
        "evaluate",
        model=trained[1],
        data_list=phantoms / "list.json",
        dataset_dir=phantoms,
        section="validation",
        output_dir=tmp_path / "scores",
        **{"overlays": "false", "use_mlflow": "false"},
    )
    assert status == 0
    before, after = (dice_of(folder, "validation") for folder in (trained[1], tmp_path / "scores"))
    assert len(before) == 2 * 2
    assert any(before.values())  # or there would be nothing to compare
    assert after == pytest.approx(before, abs=1e-3)


def test_a_trained_method_segments_a_picture_without_its_label_unless_it_is_an_oracle(
    trained, phantoms, tmp_path, capsys
):
    method, model = trained
    image = sorted((phantoms / "images").iterdir())[0]
    status = call("predict", model=model, input=image, output_dir=tmp_path / "masks", overlays="false")
    if method in ORACLES:
        assert status == 1
        assert "it takes its prompts from labels (an oracle), and segments nothing" in capsys.readouterr().err
        assert not list((tmp_path / "masks").glob("*.png"))
    else:
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{image.stem}.png"))
        assert mask.shape == (224, 288)
        assert set(np.unique(mask)) <= {0, 1, 2}


@pytest.mark.parametrize("method", [name for name in ORACLES if name.startswith("sam_oracle")])
def test_an_oracle_that_trains_nothing_is_refused_by_train(method, phantoms, tmp_path, capsys):
    status = train(method, phantoms / "list.json", phantoms, tmp_path / "run")
    assert "this method trains nothing; score it with `blosam bench`" in refusal(capsys, status)
    assert not (tmp_path / "run" / "models").exists()


SETS = {
    "lung_cxr": [],
    "dental_panoramic": [],
    "kvasir_seg_256": [],
    "car_parts": ["--label_names", '{"body": 1, "wheel": 2, "light": 3, "window": 4}'],
    "msd_hippocampus": ["--slice_axis", "sagittal"],
}


@pytest.mark.slow
def test_every_method_trains_and_scores_on_real_images(real_data, tmp_path):
    """Every data set with 2, 4 and 8 shots; each with two methods or more, and every method somewhere."""
    lists = {}
    for name, options in SETS.items():
        folders = ("imagesTr", "labelsTr") if name == "msd_hippocampus" else ("images", "labels")
        data = real_data / name
        pair = ["--images", str(data / folders[0]), "--labels", str(data / folders[1]), "--dataset_dir", str(data)]
        for n_shot in (2, 4, 8):
            lists[name, n_shot] = tmp_path / f"{name}_{n_shot}.json"
            drawn = ["--n_shot", str(n_shot), "--n_testing", "1", "--output", str(lists[name, n_shot])]
            assert main(["datalist", *pair, *options, *drawn]) == 0
    places, methods = list(lists) * 2, cycle(TRAINED)
    assert len(places) >= len(TRAINED)
    for number, ((name, n_shot), method) in enumerate(zip(places, methods, strict=False)):
        run = tmp_path / str(number)
        assert train(method, lists[name, n_shot], real_data / name, run, max_epochs=1) == 0, (method, name, n_shot)
        table = json.loads((run / "cases.json").read_text(encoding="utf-8"))
        assert len({row["case_id"] for row in table}) == n_shot, (method, name)
        assert all(0 <= row["dice"] <= 1 for row in table), (method, name)
