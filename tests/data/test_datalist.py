"""Data lists: drawn with a seed, disjoint by subject, every class in both halves, checked when read."""

import hashlib
import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.datalist import (
    SECTIONS,
    find_coding,
    items_of_list,
    load_datalist,
    make_datalist,
    pair_folders,
    split_halves,
    write_datalist,
)

LABELS = {"background": 0, "lung": 1, "heart": 2}


@pytest.fixture
def folder(tmp_path):
    """Makes a data set of pictures 8 x 12: one string of class digits an image, as ``["12", "1"]``."""

    def make(classes: list[str], subjects: list[str] | None = None) -> tuple[Path, list[dict[str, str]]]:
        items = []
        for number, digits in enumerate(classes):
            label = np.zeros((8, 12), dtype=np.uint8)
            for digit in digits:
                label[int(digit), :] = int(digit)
            image = label * 20
            image[7, 0] = 255
            item = {
                "image": f"images/{number:02d}.png",
                "label": f"labels/{number:02d}.png",
                "subject": subjects[number] if subjects else f"s{number}",
            }
            for key, pixels in (("image", image), ("label", label)):
                (tmp_path / item[key]).parent.mkdir(exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / item[key])
            items.append(item)
        return tmp_path, items

    return make


def draw(folder_and_items, labels=LABELS, *, n_shot=4, seed=0, **options):
    dataset_dir, items = folder_and_items
    return make_datalist(items, labels, dataset_dir=dataset_dir, n_shot=n_shot, seed=seed, **options)


def save(folder: Path, content: dict) -> Path:
    (folder / "list.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "list.json"


def classes_of(items, dataset_dir) -> set[int]:
    found = set()
    for item in items:
        with Image.open(Path(dataset_dir, item["label"])) as picture:
            found |= set(np.unique(np.asarray(picture)).tolist()) - {0}
    return found


# Drawing


def test_a_seed_gives_the_same_list_again(folder):
    data = folder(["12"] * 10)
    assert draw(data, seed=7, n_validation=2) == draw(data, seed=7, n_validation=2)


def test_seeds_give_different_supports(folder):
    data = folder(["12"] * 10)
    lists = [draw(data, seed=seed) for seed in range(10)]
    assert len({tuple(item["image"] for item in content["lower"] + content["upper"]) for content in lists}) >= 8


def test_over_many_seeds_every_image_is_drawn(folder):
    data = folder(["12"] * 8)
    drawn = {item["image"] for seed in range(20) for item in draw(data, seed=seed)["lower"]}
    assert len(drawn) == 8  # the chance to miss one in 20 draws of 2 of 8 is below 3 %, and the seeds are fixed


def test_no_subject_is_in_two_sections_whatever_the_seed(folder):
    data = folder(["12"] * 12, subjects=[f"s{i // 2}" for i in range(12)])
    for seed in range(30):
        content = draw(data, seed=seed, n_validation=2)
        of_section = {section: {item["subject"] for item in content[section]} for section in SECTIONS}
        everyone = [subject for subjects in of_section.values() for subject in subjects]
        assert len(everyone) == len(set(everyone))
        assert len(content["lower"] + content["upper"]) == 4
        assert len(of_section["lower"] | of_section["upper"]) == 4  # different subjects while there are enough


def test_no_image_is_listed_twice_and_none_is_lost(folder):
    content = draw(folder(["12"] * 9), n_validation=2)
    listed = [item["image"] for section in SECTIONS for item in content[section]]
    assert sorted(listed) == [f"images/{i:02d}.png" for i in range(9)]
    assert [len(content[section]) for section in SECTIONS] == [2, 2, 2, 3]


def test_other_images_of_a_support_subject_are_not_tested_on(folder):
    data = folder(["12"] * 6, subjects=["a", "a", "a", "b", "b", "c"])
    for seed in range(10):
        content = draw(data, n_shot=3, seed=seed)
        assert content["testing"] == []


def test_validation_images_are_drawn_too(folder):
    """Of 6 images that are left after the supports, 2: not the first 2 at every seed."""
    data = folder(["12"] * 10)
    first = 0
    for seed in range(10):
        content = draw(data, seed=seed, n_validation=2)
        left = sorted(item["image"] for item in content["validation"] + content["testing"])
        first += sorted(item["image"] for item in content["validation"]) == left[:2]
    assert first <= 3  # expected: 10 / 15


def test_n_testing_limits_the_test_set(folder):
    assert len(draw(folder(["12"] * 10), n_testing=3)["testing"]) == 3


def test_every_class_is_in_both_halves_where_two_images_show_it(folder):
    data = folder(["1"] * 14 + ["12", "12"])
    for seed in range(10):
        content = draw(data, seed=seed)
        for half in ("lower", "upper"):
            assert classes_of(content[half], data[0]) == {1, 2}


def test_a_class_of_two_in_three_hundred_images_is_in_both_halves(monkeypatch):
    """Chance alone finds such a draw once in 11 000. No file is read: 300 labels are stood in for."""
    items = [{"image": f"{i}.png", "label": f"{i}.png", "subject": str(i)} for i in range(300)]
    monkeypatch.setattr(
        "blosam_monai.data.datalist._classes",
        lambda path, values, coding: {"lung", "heart"} if path.stem in ("120", "250") else {"lung"},
    )
    monkeypatch.setattr("blosam_monai.data.datalist.file_sha256", lambda path: "")
    for seed in range(4):
        content = make_datalist(items, LABELS, dataset_dir=".", n_shot=4, seed=seed)
        for half in ("lower", "upper"):
            assert sum(item["image"] in ("120.png", "250.png") for item in content[half]) == 1


def test_a_class_that_one_image_shows_is_said_to_be_absent_from_a_half(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="blosam_monai"):
        content = draw(folder(["1"] * 6 + ["12"]))
    (message,) = [record.getMessage() for record in caplog.records]
    half = "upper" if any(item["image"] == "images/06.png" for item in content["lower"]) else "lower"
    assert message == f"class heart is in no image of the {half} set; label one more image that shows it."


def test_images_with_an_empty_label_are_no_supports(folder):
    data = folder(["", "", "", "12", "12", "12"])
    for seed in range(10):
        content = draw(data, n_shot=2, seed=seed)
        assert {item["image"] for item in content["lower"] + content["upper"]} <= {
            f"images/{i:02d}.png" for i in (3, 4, 5)
        }


def test_hashes_are_those_of_hashlib(folder):
    data = folder(["12"] * 5)
    content = draw(data)
    assert len(content["sha256"]) == 10
    for file, found in content["sha256"].items():
        assert found == hashlib.sha256((data[0] / file).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("classes", "options", "finding"),
    [
        (["12"] * 4, {"n_shot": 1}, "n_shot: 1 is too few; at least 2"),
        (["12"] * 4, {"n_shot": 5}, "n_shot: 5 asked for, 4 labelled images found"),
        (["12", "1", "", ""], {"n_shot": 3}, "n_shot: 3 asked for, 2 images have a label that is not empty"),
        (["12"] * 5, {"n_validation": 2}, "n_validation: 2 asked for, 1 images are left"),
    ],
)
def test_a_draw_that_cannot_be_made_is_refused(folder, classes, options, finding):
    with pytest.raises(ValueError, match=finding):
        draw(folder(classes), **options)


def test_supports_of_one_subject_are_refused(folder):
    with pytest.raises(ValueError, match="all supports are of one subject; two are needed"):
        draw(folder(["12"] * 4, subjects=["a"] * 4))


# Halves


@pytest.mark.parametrize("count", range(2, 10))
def test_halves_are_equal_and_of_an_odd_number_d2_has_one_more(count):
    items = [{"image": str(i), "label": str(i), "subject": str(i)} for i in range(count)]
    for seed in range(20):
        lower, upper = split_halves(items, seed=seed)
        assert (len(lower), len(upper)) == (count // 2, count - count // 2)


def test_halves_are_disjoint_by_subject_and_lose_nothing():
    rng = np.random.default_rng(0)
    for seed in range(200):
        count = int(rng.integers(2, 9))
        subjects = ["first", "second", *rng.integers(0, 4, count).astype(str)]
        items = [{"image": str(i), "label": str(i), "subject": s} for i, s in enumerate(subjects)]
        lower, upper = split_halves(items, seed=seed)
        assert lower
        assert upper
        assert not {item["subject"] for item in lower} & {item["subject"] for item in upper}
        assert sorted(int(item["image"]) for item in lower + upper) == list(range(len(items)))


def test_halves_do_not_depend_on_the_order_of_the_items():
    items = [{"image": str(i), "label": str(i), "subject": str(i)} for i in range(6)]
    names = [{item["image"] for item in split_halves(order, seed=3)[0]} for order in (items, items[::-1])]
    assert names[0] == names[1]


# Reading


def test_a_written_list_is_read_back_with_absolute_paths(folder):
    data = folder(["12"] * 6)
    content = draw(data, n_validation=1)
    write_datalist(data[0] / "list.json", content)
    read = load_datalist(data[0] / "list.json", data[0])
    for section in ("lower", "upper", "validation"):
        assert [i["image"] for i in read[section]] == [str(data[0] / i["image"]) for i in content[section]]
        assert {i["section"] for i in read[section]} == {section}
    assert (read["labels"], read["label_coding"]) == (LABELS, "index")


def test_a_list_of_only_training_is_split_by_the_seed(folder):
    dataset_dir, items = folder(["12"] * 6)
    path = save(dataset_dir, {"labels": LABELS, "training": items})
    halves = [load_datalist(path, dataset_dir, seed=seed) for seed in (0, 0, 1, 2, 3)]
    names = [tuple(sorted(item["image"] for item in content["lower"])) for content in halves]
    assert names[0] == names[1]
    assert len(set(names)) >= 2
    assert all((len(content["lower"]), len(content["upper"])) == (3, 3) for content in halves)


def test_a_decathlon_list_is_read(folder):
    """Labels are value -> name, subjects are file names, ``test`` holds plain paths."""
    dataset_dir, items = folder(["12"] * 4)
    training = [{"image": f"./{item['image']}", "label": f"./{item['label']}"} for item in items]
    labels = {"0": "background", "1": "lung", "2": "heart"}
    path = save(dataset_dir, {"name": "chest", "labels": labels, "training": training, "test": ["./imagesTs/x.png"]})
    found, content = items_of_list(path)
    assert content["labels"] == LABELS
    assert [item["subject"] for item in found] == ["00", "01", "02", "03"]
    read = load_datalist(path, dataset_dir)
    assert len(read["lower"] + read["upper"]) == 4


def test_an_nnunet_list_with_regions_is_read(folder):
    """Labels are name -> value or values (regions); an image is a list of one channel."""
    dataset_dir, items = folder(["12"] * 4)
    training = [{"image": [item["image"]], "label": item["label"]} for item in items]
    path = save(dataset_dir, {"labels": {"background": 0, "chest": [1, 2], "heart": 2}, "training": training})
    found, content = items_of_list(path)
    assert content["labels"] == {"background": 0, "chest": [1, 2], "heart": 2}
    assert [item["image"] for item in found] == [item["image"] for item in items]
    assert draw((dataset_dir, found), content["labels"])["labels"]["chest"] == [1, 2]


def test_an_image_of_several_channel_files_is_refused(folder):
    dataset_dir, items = folder(["12"] * 2)
    items[1]["image"] = ["a_0000.png", "a_0001.png"]
    with pytest.raises(ValueError, match="training has an item of 2 image files; one file an item is read"):
        items_of_list(save(dataset_dir, {"labels": LABELS, "training": items}))


def test_a_union_is_found_where_any_of_its_values_is(folder, caplog):
    data = folder(["1", "2"] * 4)
    with caplog.at_level(logging.WARNING, logger="blosam_monai"):
        draw(data, {"background": 0, "chest": [1, 2]})
    assert caplog.records == []


def test_a_subject_expression_reads_existing_lists(folder):
    dataset_dir, _ = folder(["12"] * 2)
    items = [{"image": f"p{i // 2}_view{i}.png", "label": "x.png"} for i in range(4)]
    found, _ = items_of_list(save(dataset_dir, {"labels": LABELS, "training": items}), subject="^(p[0-9]+)_")
    assert [item["subject"] for item in found] == ["p0", "p0", "p1", "p1"]


def spoil_subject(content):
    content["upper"][0]["subject"] = content["lower"][0]["subject"]


def spoil_item(content):
    content["lower"][0] = {"image": "x.png"}


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (spoil_subject, "subject s[0-9] is in lower and in upper; keep it in one of them"),
        (spoil_item, 'an item of lower is not {"image": ..., "label": ...}'),
        (lambda c: c.pop("labels"), '"labels" is missing; give names and values'),
        (lambda c: c.update(labels=["lung"]), r"labels: \['lung'\] is not names and values"),
        (lambda c: c.update(label_coding="rgb"), "label_coding 'rgb' is not one of index, threshold"),
        (lambda c: c.update(upper=[]), "2 support images of 2 subjects; at least 2 of 2 subjects"),
        (lambda c: c.update(lower=[], upper=[]), "0 support images of 0 subjects"),
        (lambda c: c["sha256"].update({c["lower"][0]["image"]: "0" * 64}), "has changed since .* make the list again"),
        (lambda c: c["labels"].update(liver=3), "tasks: liver is in no label of the lower and upper set"),
    ],
)
def test_a_list_that_does_not_hold_is_refused_in_one_line(folder, spoil, finding):
    data = folder(["12"] * 6)
    content = draw(data, dict(LABELS))
    spoil(content)
    with pytest.raises(ValueError, match=finding) as error:
        load_datalist(save(data[0], content), data[0])
    assert "\n" not in str(error.value)


def test_training_images_of_one_subject_are_said_to_be_so(folder):
    dataset_dir, items = folder(["12"] * 4, subjects=["a"] * 4)
    with pytest.raises(ValueError, match="4 support images of 1 subjects; at least 2 of 2 subjects"):
        load_datalist(save(dataset_dir, {"labels": LABELS, "training": items}), dataset_dir)


def test_a_missing_file_is_named_with_its_list(folder):
    data = folder(["12"] * 6)
    content = draw(data)
    (data[0] / content["upper"][0]["label"]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{content['upper'][0]['label']}: listed in .*list\.json but missing"):
        load_datalist(save(data[0], content), data[0])


def test_a_support_with_an_empty_label_is_named(folder):
    data = folder(["12"] * 5 + [""])
    content = draw(data)
    content["lower"][0] = data[1][5]
    content["sha256"] = {}
    content["testing"] = []
    with pytest.raises(ValueError, match=r"labels/05\.png: the label is empty for lung, heart; replace this image"):
        load_datalist(save(data[0], content), data[0])


def test_a_support_without_the_tasks_asked_for_is_named(folder):
    data = folder(["1"] * 4)
    with pytest.raises(ValueError, match="the label is empty for heart; replace this image"):
        load_datalist(save(data[0], draw(data)), data[0], tasks=["heart"])


def test_a_section_that_is_empty_is_refused(folder):
    data = folder(["12"] * 6)
    path = save(data[0], draw(data))
    with pytest.raises(ValueError, match="validation is empty; choose one of lower, upper, validation, testing"):
        load_datalist(path, data[0], section="validation")
    assert len(load_datalist(path, data[0], section="testing")["testing"]) == 2


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_file_that_is_no_list_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"data_list: .*x\.json (is not JSON|holds no JSON object)"):
        load_datalist(tmp_path / "x.json", tmp_path)


def test_a_list_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data_list: .*x\.json does not exist; make one with `blosam datalist`"
    ):
        load_datalist(tmp_path / "x.json", tmp_path)


# Folders


@pytest.fixture
def folders(tmp_path):
    """Makes the folders ``images`` and ``labels`` with pictures of these names."""

    def make(images: list[str], labels: list[str]) -> Path:
        for name, files in (("images", images), ("labels", labels)):
            (tmp_path / name).mkdir()
            for file in files:
                Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / name / file)
        return tmp_path

    return make


def test_folders_are_paired_by_stem_whatever_the_suffix(folders):
    root = folders(["b.jpg", "a.png"], ["a.gif", "b.png"])
    assert pair_folders(root / "images", root / "labels", root) == [
        {"image": "images/a.png", "label": "labels/a.gif", "subject": "a"},
        {"image": "images/b.jpg", "label": "labels/b.png", "subject": "b"},
    ]


def test_suffixes_are_cut_off_and_subjects_found(folders):
    root = folders(["21_1_training.tif", "21_2_training.tif"], ["21_1_manual1.gif", "21_2_manual1.gif"])
    items = pair_folders(
        root / "images", root / "labels", root, image_suffix="_training", label_suffix="_manual1", subject="^([0-9]+)_"
    )
    assert [(item["image"], item["label"], item["subject"]) for item in items] == [
        ("images/21_1_training.tif", "labels/21_1_manual1.gif", "21"),
        ("images/21_2_training.tif", "labels/21_2_manual1.gif", "21"),
    ]


def test_the_folders_of_nnunet_are_paired(folders):
    root = folders(["lung_001_0000.png"], ["lung_001.png"])
    (item,) = pair_folders(root / "images", root / "labels", root, image_suffix="_0000")
    assert item == {"image": "images/lung_001_0000.png", "label": "labels/lung_001.png", "subject": "lung_001"}


@pytest.mark.parametrize(
    ("images", "labels", "alone"),
    [(["a.png", "b.png"], ["a.png"], "images/b"), (["a.png"], ["a.png", "c.png"], "labels/c")],
)
def test_a_file_without_partner_is_named(folders, images, labels, alone):
    root = folders(images, labels)
    with pytest.raises(ValueError, match=rf"{alone}\.png: has no partner of stem"):
        pair_folders(root / "images", root / "labels", root)


def test_two_files_of_one_stem_are_named(folders):
    root = folders(["a.png", "a.jpg"], ["a.png"])
    with pytest.raises(ValueError, match=r"a\.png: has the same stem as a\.jpg"):
        pair_folders(root / "images", root / "labels", root)


def test_two_files_that_a_suffix_makes_equal_are_named(folders):
    root = folders(["a.png", "a_0000.png"], ["a.png"])
    with pytest.raises(ValueError, match=r"a_0000\.png: has the same stem as a\.png"):
        pair_folders(root / "images", root / "labels", root, image_suffix="_0000")


def test_a_subject_expression_that_matches_nothing_is_refused(folders):
    root = folders(["a.png"], ["a.png"])
    with pytest.raises(ValueError, match=r"subject: '\[0-9\]\+' matches nothing in 'a'"):
        pair_folders(root / "images", root / "labels", root, subject="[0-9]+")


# Coding


def disc_edge() -> np.ndarray:
    """Distance from the edge of a disc of radius 20 in (64, 64), pixels: positive inside."""
    y, x = np.mgrid[:64, :64]
    return 20 - np.hypot(y - 32, x - 32)


@pytest.mark.parametrize(
    ("name", "pixels", "coding", "labels"),
    [
        ("x.png", lambda d: (d > 0) * 1, "index", {"background": 0, "foreground": 1}),
        ("x.png", lambda d: (d > 0) * 1 + (d > 9) * 2, "index", {"background": 0, "class_1": 1, "class_3": 3}),
        ("x.png", lambda d: (d > 0) * 255, "threshold", {"background": 0, "foreground": 255}),
        ("x.png", lambda d: (d * 20 + 127).clip(0, 255), "threshold", {"background": 0, "foreground": 255}),
        ("x.jpg", lambda d: (d > 0) * 255, "threshold", {"background": 0, "foreground": 255}),
    ],
    ids=["one class", "two classes", "0 and 255", "soft edge", "jpeg"],
)
def test_the_coding_of_labels_is_found(tmp_path, name, pixels, coding, labels):
    Image.fromarray(pixels(disc_edge()).astype(np.uint8)).save(tmp_path / name)
    assert find_coding([tmp_path / name]) == (coding, labels)


def test_the_coding_is_found_from_all_labels_and_not_from_the_first(tmp_path):
    for value in (0, 1, 4):
        Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(tmp_path / f"{value}.png")
    files = sorted(tmp_path.iterdir())
    assert find_coding(files) == ("index", {"background": 0, "class_1": 1, "class_4": 4})
    with pytest.raises(ValueError, match="every label file is empty"):
        find_coding(files[:1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lung_cxr", ("threshold", {"background": 0, "foreground": 255})),
        ("kvasir_seg_256", ("threshold", {"background": 0, "foreground": 255})),
        ("dental_panoramic", ("threshold", {"background": 0, "foreground": 255})),
        ("drive_vessels", ("threshold", {"background": 0, "foreground": 255})),
        ("car_parts", ("index", {"background": 0, "class_1": 1, "class_2": 2, "class_3": 3, "class_4": 4})),
    ],
)
def test_the_coding_of_real_labels_is_found(real_data, name, expected):
    assert find_coding(sorted((real_data / name / "labels").iterdir())) == expected


def test_supports_of_one_site_are_tested_on_the_other(tmp_path):
    items = []
    for site, number in itertools.product("ab", range(5)):
        for kind in ("images", "labels"):
            mask = np.zeros((8, 8), np.uint8)
            mask[2:5, 2:6] = 1
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / kind / f"{site}{number}.png")
        name = f"{site}{number}.png"
        items.append({"image": f"images/{name}", "label": f"labels/{name}", "subject": name})
    datalist = make_datalist(
        items, {"background": 0, "x": 1}, dataset_dir=tmp_path, n_shot=2, seed=3, n_validation=1, support="^a"
    )
    sites = {s: {item["subject"][0] for item in datalist[s]} for s in ("lower", "upper", "validation", "testing")}
    assert sites == {"lower": {"a"}, "upper": {"a"}, "validation": {"a"}, "testing": {"b"}}
    assert len(datalist["testing"]) == 5
