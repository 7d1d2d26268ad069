"""Each recipe fits the layout that it describes, and draws the classes that it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.class_lists import fold_classes
from blosam_monai.data.datalist_command import run
from blosam_monai.data.recipes import read_recipe
from blosam_monai.data.supports import survey
from blosam_monai.data.tasks import task_values
from blosam_monai.parser import build_parser

RECIPES = Path(__file__).resolve().parents[2] / "data_lists"
NAMES = sorted(path.stem for path in RECIPES.glob("*.json"))


def draw(name, folder, *arguments, n_shot=2):
    """The list that ``blosam datalist --recipe`` draws."""
    parser = build_parser()[0]
    output = Path(folder, "list.json")
    given = ["datalist", "--dataset_dir", str(folder), "--output", str(output), "--n_shot", str(n_shot), *arguments]
    options = parser.parse_args(given)
    options.recipe = str(RECIPES / f"{name}.json")
    run(options, {"recipe": None, **vars(parser.parse_args(["datalist"]))})
    return json.loads(output.read_text())


def areas(datalist, folder):
    """Pixels or voxels of each task, by the stem of the image, over all drawn items; supports as whole images."""
    values = task_values(datalist["labels"])
    items = [item for section in ("lower", "upper", "testing") for item in datalist[section]]
    found = {}
    for item in items:
        whole = {key: item[key] for key in ("image", "label", "subject")}
        case = survey(whole, folder, values, coding=datalist["label_coding"], slice_axis=datalist.get("slice_axis"))
        found[item["subject"]] = dict(zip(values, case.areas.sum(axis=0).tolist(), strict=True))
    return found


def left_for_tests(datalist):
    return [item["subject"] for item in datalist["testing"]]


def script(title):
    """The code block of a heading of the README."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^### {title}\n.*?^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def mask(pixels, size=16, value=255):
    """A square picture whose first pixels have a value."""
    values = np.zeros(size * size, dtype=np.uint8)
    values[:pixels] = value
    return values.reshape(size, size)


def index_map(counts, size=16):
    """A square picture that shows each value so often."""
    values = np.repeat(list(counts), list(counts.values()))
    return np.pad(values, (0, size * size - len(values))).reshape(size, size)


def save_volume(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(values, dtype=np.uint8).reshape(8, 8, 8), np.eye(4)), path)


def test_faces_are_cut_into_the_five_parts_of_the_paper(tmp_path, monkeypatch):
    for number in (0, 7, 999, 1000, 28000, 29999):
        save(tmp_path / f"CelebA-HQ-img/{number}.jpg", np.full((16, 16, 3), 90))
        parts = {"l_brow": 10, "r_brow": 5, "hair": 40, "mouth": 1, "u_lip": 2, "skin": 99}
        for row, (part, pixels) in enumerate(parts.items()):
            folder = tmp_path / f"CelebAMask-HQ-mask-anno/{number // 2000}"
            save(folder / f"{number:05d}_{part}.png", np.roll(mask(pixels, 512), row, axis=0))
    monkeypatch.chdir(tmp_path)
    exec(script("CelebAMask-HQ"), {})
    datalist = draw("celebamask_hq", tmp_path)
    assert sorted(left_for_tests(datalist)) == ["28000", "29999"]
    assert areas(datalist, tmp_path)["28000"] == {"brow": 15, "eye": 0, "hair": 40, "nose": 0, "mouth": 3}


def test_both_lungs_become_one_mask_and_dark_on_the_film(tmp_path, monkeypatch):
    for number, fold in ((1, 1), (2, 2), (3, 1)):
        film = np.full((2048, 2048), 4095, dtype=">u2")
        film[:, 1024:] = 0
        (tmp_path / "All247images").mkdir(exist_ok=True)
        film.tofile(tmp_path / f"All247images/JPCLN00{number}.IMG")
        for side, pixels in (("left lung", 30), ("right lung", 50)):
            lung = mask(pixels, 1024) if side == "left lung" else mask(pixels, 1024)[::-1]
            save(tmp_path / f"fold{fold}/masks/{side}/JPCLN00{number}.gif", lung)
    monkeypatch.chdir(tmp_path)
    exec(script("JSRT"), {})
    datalist = draw("jsrt_lungs", tmp_path)
    assert len(datalist["testing"]) == 1
    assert list(areas(datalist, tmp_path).values()) == [{"lung": 80}] * 3
    assert np.asarray(Image.open(tmp_path / "images/JPCLN002.png"))[0, [0, 1023]].tolist() == [0, 255]


def test_pascal_has_a_task_a_class_and_its_borders_are_background(tmp_path, monkeypatch):
    for name in ("2007_000032", "2007_000039", "2007_000063", "2007_999999"):
        save(tmp_path / f"JPEGImages/{name}.jpg", np.zeros((16, 16, 3)))
        if name != "2007_999999":
            save(tmp_path / f"SegmentationClassAug/{name}.png", index_map({1: 7, 15: 9, 20: 3, 255: 5}))
    monkeypatch.chdir(tmp_path)
    exec(script("PASCAL-5i"), {})
    found = areas(draw("pascal_5i", tmp_path), tmp_path)
    assert len(found) == 3
    seen = {task: count for task, count in found["2007_000039"].items() if count}
    assert seen == {"aeroplane": 7, "person": 9, "tvmonitor": 3}


def test_coco_trains_on_one_section_and_tests_on_the_other(tmp_path):
    for name in ("train2014_000000000009", "train2014_000000000025", "val2014_000000000042"):
        save(tmp_path / f"images/COCO_{name}.jpg", np.zeros((16, 16, 3)))
        save(tmp_path / f"labels/COCO_{name}.png", index_map({1: 4, 80: 6}))
    datalist = draw("coco_20i", tmp_path)
    assert left_for_tests(datalist) == ["COCO_val2014_000000000042"]
    found = areas(datalist, tmp_path)["COCO_val2014_000000000042"]
    assert len(found) == 80
    assert {task: count for task, count in found.items() if count} == {"person": 4, "toothbrush": 6}


def test_cars_are_tested_on_the_authors_test_set_and_lights_are_background(tmp_path):
    for name in ("train1", "train2", "train3", "car10", "te11"):
        save(tmp_path / f"images/{name}.jpg", np.zeros((16, 16, 3)))
        save(tmp_path / f"labels/{name}.png", index_map({1: 20, 2: 8, 3: 5, 4: 12}))
    datalist = draw("car_parts", tmp_path)
    assert left_for_tests(datalist) == ["car10", "te11"]
    assert areas(datalist, tmp_path)["te11"] == {"body": 20, "wheel": 8, "window": 12}


@pytest.mark.parametrize(
    ("name", "task", "ending", "suffix"),
    [("tiktok_bodies", "body", "png", ""), ("teeth", "teeth", "png", "_pseudo"), ("teeth", "teeth", "png", "")],
)
def test_pictures_pair_with_their_masks(name, task, ending, suffix, tmp_path):
    for number in range(3):
        save(tmp_path / f"images/{number}.{ending}", np.zeros((16, 16)))
        save(tmp_path / f"masks/{number}{suffix}.{ending}", mask(10 + number))
    found = areas(draw(name, tmp_path), tmp_path)
    assert found == {"0": {task: 10}, "1": {task: 11}, "2": {task: 12}}


def test_polyps_do_not_grow_by_the_noise_of_their_jpeg(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / f"images/{name}.jpg", np.zeros((32, 32, 3)))
        square = np.zeros((32, 32, 3))
        square[5:21, 5:21] = 255
        save(tmp_path / f"masks/{name}.jpg", square)
    assert np.count_nonzero(Image.open(tmp_path / "masks/a.jpg").convert("L")) > 256  # which the published code takes
    assert areas(draw("kvasir_seg", tmp_path), tmp_path)["a"] == {"polyp": 256}


@pytest.mark.parametrize("name", ["totalsegmentator_heart", "totalsegmentator_abdomen"])
def test_organs_of_totalsegmentator_are_found_among_its_masks(name, tmp_path):
    labels = json.loads((RECIPES / f"{name}.json").read_text())["label_names"]
    (tmp_path / "meta.csv").write_text("image_id;age\n")
    for case in ("s0000", "s0001", "s0002"):
        save_volume(tmp_path / case / "ct.nii.gz", np.arange(512) % 256)
        for number, structure in enumerate([*labels.values(), "brain"], start=1):
            organ = np.zeros((8, 8, 8))
            organ[number % 8, :number, 4] = 1
            save_volume(tmp_path / case / "segmentations" / f"{structure}.nii.gz", organ)
    datalist = draw(name, tmp_path)
    expected = {task: min(number, 8) for number, task in enumerate(labels, start=1)}
    assert areas(datalist, tmp_path) == dict.fromkeys(("s0000", "s0001", "s0002"), expected)
    assert all("slice" in item for item in datalist["lower"] + datalist["upper"])


def test_flare_trains_on_training_cases_and_tests_on_tuning_cases(tmp_path):
    organs = {value: value for value in range(1, 14)}
    for section, stem, cases in (("train", "FLARE22_Tr_000", (1, 2)), ("tuning", "FLARETs_000", (1, 6))):
        for number in cases:
            save_volume(tmp_path / section / f"images/{stem}{number}_0000.nii.gz", np.arange(512) % 256)
            values = np.zeros((8, 8, 8))
            values[:, :, 4:6] = np.pad(np.repeat(list(organs), list(organs.values())), (0, 37)).reshape(8, 8, 2)
            save_volume(tmp_path / section / f"labels/{stem}{number}.nii.gz", values)
    save_volume(tmp_path / "tuning/images/FLARETs_0009_0000.nii.gz", np.arange(512) % 256)  # nobody labelled it
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run(["sh", "-e", "-c", script("FLARE'22")], cwd=tmp_path, env=environment, check=True)
    datalist = draw("flare22", tmp_path)
    assert left_for_tests(datalist) == ["FLARETs_0001", "FLARETs_0006"]
    found = areas(datalist, tmp_path)["FLARETs_0006"]
    by_paper = [
        "spleen",
        "kidney_left",
        "gallbladder",
        "esophagus",
        "liver",
        "pancreas",
        "stomach",
        "duodenum",
        "aorta",
    ]
    assert found == dict(zip(by_paper, (3, 13, 9, 10, 1, 4, 11, 12, 5), strict=True))


@pytest.mark.parametrize(
    ("name", "folder", "classes", "n_testing"),
    [
        ("kvasir_seg", "kvasir_seg_256", {"polyp"}, 36),
        ("jsrt_lungs", "lung_cxr", {"lung"}, 36),
        ("teeth", "dental_panoramic", {"teeth"}, 20),
        ("car_parts", "car_parts", {"body", "wheel", "window"}, 0),  # all are of the training set
    ],
)
def test_recipes_fit_real_images_whose_labels_lie_in_labels(name, folder, classes, n_testing, real_data, tmp_path):
    link = tmp_path / folder
    link.mkdir()
    for part in ("images", "labels"):
        (link / part).symlink_to(real_data / folder / part)
    datalist = draw(name, link, "--labels", str(link / "labels"), n_shot=4)
    assert set(task_values(datalist["labels"])) == classes
    assert (len(datalist["lower"]), len(datalist["upper"]), len(datalist["testing"])) == (2, 2, n_testing)
    assert all(Path(item["image"]).stem == Path(item["label"]).stem for item in datalist["testing"])


@pytest.mark.parametrize(
    ("name", "shots", "n_testing"),
    [  # the paper, section 4 and its appendix
        ("celebamask_hq", [4, 8], 2000),
        ("car_parts", [2, 4], 100),
        ("tiktok_bodies", [4, 8], 2000),
        ("teeth", [4, 8], 70),
        ("kvasir_seg", [4, 8], 500),
        ("jsrt_lungs", [2, 4], 147),
    ],
)
def test_shots_and_tests_are_those_of_the_paper(name, shots, n_testing):
    paper = json.loads((RECIPES / f"{name}.json").read_text())["paper"]
    assert (paper["shots"], paper["testing"]) == (shots, n_testing)


@pytest.mark.parametrize("name", ["pascal_5i", "coco_20i", "coco_20i_consecutive"])
def test_each_class_is_novel_in_one_of_four_folds(name):
    folds = [fold_classes(RECIPES / f"{name}.json", number) for number in range(4)]
    known = json.loads((RECIPES / f"{name}.json").read_text())["label_names"].keys() - {"background"}
    assert len({len(fold) for fold in folds}) == 1
    assert sorted(task for fold in folds for task in fold) == sorted(known)


@pytest.mark.parametrize(
    ("name", "fold", "first"),
    [
        ("pascal_5i", 1, ["bus", "car", "cat"]),  # the sixth to eighth of VOC
        ("coco_20i", 1, ["bicycle", "bus", "traffic light"]),  # the second, sixth, tenth of COCO
        ("coco_20i_consecutive", 1, ["elephant", "bear", "zebra"]),  # the 21st to 23rd
    ],
)
def test_folds_are_those_of_the_field(name, fold, first):
    assert fold_classes(RECIPES / f"{name}.json", fold)[:3] == first


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_the_data_are_and_how_they_lie(name):
    content = json.loads((RECIPES / f"{name}.json").read_text())
    read_recipe(RECIPES / f"{name}.json")
    assert content["name"] == name
    assert {"description", "license", "url", "layout", "prepare", "paper", "label_names", "label_coding"} <= set(
        content
    )
    assert f"[{name}]({name}.json)" in (RECIPES / "README.md").read_text()


def test_the_readme_names_every_key_of_a_recipe():
    from blosam_monai.data.recipes import _INFORMATION, _OPTIONS

    section = (RECIPES / "README.md").read_text().split("Keys:")[1].split("## ")[0]
    assert set(re.findall(r"`(\w+)`", section.split("Any other key")[0])) - {"dataset_dir", "blosam", "shots"} >= {
        *_OPTIONS,
        *_INFORMATION,
    }


def test_options_go_before_the_recipe_and_what_it_tells_is_kept(tmp_path):
    for number in range(3):
        save(tmp_path / f"images/{number}.png", np.zeros((16, 16)))
        save(tmp_path / f"masks/{number}.png", mask(5))
    datalist = draw("teeth", tmp_path, "--label_names", '{"tooth": 255}', "--n_testing", "0")
    assert datalist["labels"] == {"background": 0, "tooth": 255}
    assert datalist["testing"] == []
    assert datalist["name"] == "teeth"
    assert datalist["description"].startswith("Children's dental panoramic radiographs")
    assert datalist["license"].startswith("as stated")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"label_sufix": "_m"}, "no key 'label_sufix'; did you mean 'label_suffix'"),
        ({"n_shot": 4}, "no key 'n_shot'; known are"),
        ({"n_testing": "70"}, "n_testing is '70', not a whole number"),
        ({"subject": "("}, "subject '(' is not a regular expression"),
        ({"labels": ""}, "labels is missing"),
    ],
)
def test_a_recipe_that_does_not_hold_is_refused_in_one_line(content, said, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "images": "images", "labels": "labels", **content}))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_recipe(path)
    assert "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_beside_a_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave it out with --from"):
        draw("teeth", tmp_path, "--from", "list.json")


def test_a_recipe_of_ours_is_known_by_its_name():
    assert read_recipe("kvasir_seg", "data") == read_recipe(RECIPES / "kvasir_seg.json", "data")
    with pytest.raises(
        FileNotFoundError, match=r"recipe: .*gone\.json does not exist; give a file, or one of car_parts"
    ):
        read_recipe("gone")
