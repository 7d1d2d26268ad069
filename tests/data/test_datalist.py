"""Data lists: drawn with a seed, disjoint by subject, every class in both halves, checked when read."""

import hashlib
import itertools
import json
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.datalist import (
    load_datalist,
    make_datalist,
    write_datalist,
)
from blosam_monai.data.pairing import SECTIONS, items_of_list, pair_folders
from blosam_monai.data.supports import Case

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
        "blosam_monai.data.datalist.survey",
        lambda item, *_, **__: Case(np.array([[1, int(item["subject"] in ("120", "250"))]])),
    )
    monkeypatch.setattr("blosam_monai.data.datalist.content_sha256", lambda path: "")
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
    with pytest.raises(
        ValueError, match="all supports are of one subject, two are needed; label a second, or add shared_subjects=true"
    ):
        draw(folder(["12"] * 4, subjects=["a"] * 4))


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


# Volumes


@pytest.fixture
def volumes(tmp_path):
    """Makes volumes of 12 axial slices, 8 x 6 pixels: lung on slices 2 to 5, heart on 7 to 9; named v0, v1, ..."""

    def make(count: int, subjects: list[str] | None = None, spacing=(1, 1, 3)) -> tuple[Path, list[dict[str, str]]]:
        rng = np.random.default_rng(0)
        label = np.zeros((6, 8, 12), dtype=np.uint8)  # i, j, k as NIfTI stores them
        label[1:4, 2:6, 2:6], label[2:5, 3:6, 7:10] = 1, 2
        items = []
        for number in range(count):
            item = {"image": f"images/v{number}.nii.gz", "label": f"labels/v{number}.nii.gz"}
            image = rng.normal(size=label.shape).astype(np.float32)
            for key, values in (("image", image), ("label", label)):
                (tmp_path / item[key]).parent.mkdir(exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), tmp_path / item[key])
            items.append({**item, "subject": subjects[number] if subjects else f"v{number}"})
        return tmp_path, items

    return make


LUNG_SLICES, HEART_SLICES = {2, 3, 4, 5}, {7, 8, 9}


def test_supports_of_volumes_are_slices_and_each_half_has_every_class(volumes):
    data = volumes(8)
    for seed in range(20):
        content = draw(data, seed=seed, n_validation=2)
        for section in ("lower", "upper", "validation"):
            slices = {item["slice"] for item in content[section]}
            assert len(content[section]) == 2
            assert slices & LUNG_SLICES
            assert slices & HEART_SLICES
        assert len(content["testing"]) == 2
        assert not any("slice" in item for item in content["testing"])
        subjects = [item["subject"] for section in SECTIONS for item in content[section]]
        assert len(subjects) == len(set(subjects))
    assert content["slice_axis"] == "axial"


def test_the_slices_are_those_that_show_the_class_in_the_file(volumes):
    """Of LAS axes, k is z and not reversed: slice 17 upright is slice 17 of the file."""
    data = volumes(4)
    for seed in range(10):
        content = draw(data, seed=seed)
        for item in content["lower"] + content["upper"]:
            stored = np.asarray(nibabel.load(data[0] / item["label"]).dataobj)
            assert stored[:, :, item["slice"]].any()


def test_slices_are_counted_in_the_upright_stack_along_the_axis_asked_for(volumes):
    """j runs to the back in RAS reversed: upright coronal slices run to the back, j to the front."""
    data = volumes(4)
    content = draw(data, slice_axis="coronal")
    assert content["slice_axis"] == "coronal"
    for item in content["lower"] + content["upper"]:
        stored = np.asarray(nibabel.load(data[0] / item["label"]).dataobj)
        assert stored[:, 8 - 1 - item["slice"], :].any()


def test_volumes_that_disagree_on_their_axis_need_one(volumes):
    dataset_dir, items = volumes(4)
    for key in ("image", "label"):
        values = np.asarray(nibabel.load(dataset_dir / items[2][key]).dataobj)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 4, 1, 1.0])), dataset_dir / items[2][key])
    with pytest.raises(ValueError, match=r"along axial \(as .*\), coronal \(as images/v2.*\); give one for all"):
        draw((dataset_dir, items))
    assert draw((dataset_dir, items), slice_axis="axial")["slice_axis"] == "axial"


def test_an_axis_for_pictures_is_refused(folder):
    with pytest.raises(ValueError, match="slice_axis: axial asked for, but every image is a single slice"):
        draw(folder(["12"] * 4), slice_axis="axial")
    assert "slice_axis" not in draw(folder(["12"] * 4))


def test_several_slices_of_a_volume_are_different_and_in_one_half(volumes):
    data = volumes(8)
    for seed in range(20):
        content = draw(data, n_shot=8, seed=seed, slices_per_volume=2)
        for half in ("lower", "upper"):
            names = [item["image"] for item in content[half]]
            assert sorted(names.count(name) for name in set(names)) == [2, 2]
            assert len({(item["image"], item["slice"]) for item in content[half]}) == 4
        assert len(content["testing"]) == 4


def test_more_slices_of_a_volume_are_taken_where_there_are_too_few_volumes(volumes):
    data = volumes(3, ["a", "b", "b"])
    for seed in range(10):
        content = draw(data, n_shot=6, seed=seed)
        halves = [{item["subject"] for item in content[half]} for half in ("lower", "upper")]
        assert sorted(halves, key=len) in ([{"a"}, {"b"}], [{"b"}, {"a"}])
        assert len(content["lower"] + content["upper"]) == 6
        assert content["testing"] == []


def test_supports_are_never_all_of_one_volume_while_there_are_two(volumes):
    data = volumes(2)
    content = draw(data, n_shot=2, slices_per_volume=7)
    assert content["lower"][0]["subject"] != content["upper"][0]["subject"]


def test_one_volume_can_be_shared_by_the_halves_if_asked_for_but_none_of_its_slices(volumes):
    one = dataset_dir, _ = volumes(1)
    with pytest.raises(ValueError, match="all supports are of one subject"):
        draw(one)
    for seed in range(5):
        datalist = draw(one, seed=seed, shared_subjects=True)
        lower, upper = ([item["slice"] for item in datalist[half]] for half in ("lower", "upper"))
        assert (len(lower), len(upper), len({*lower, *upper})) == (2, 2, 4)
        assert datalist["testing"] == []
        read = load_datalist(save(dataset_dir, datalist), dataset_dir)
        assert read["shared_subjects"] is True


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda d: d["upper"].append(d["lower"][0]), r"slice \d+ of .* is in lower and in upper; keep it in one"),
        (lambda d: d["testing"].append({**d["lower"][0]}), "is in lower and in testing; keep it in one of them"),
    ],
)
def test_shared_halves_share_neither_slices_nor_tests(volumes, change, finding):
    dataset_dir, items = volumes(1)
    datalist = draw((dataset_dir, items), shared_subjects=True)
    change(datalist)
    with pytest.raises(ValueError, match=finding):
        load_datalist(save(dataset_dir, datalist), dataset_dir)


def test_more_slices_than_show_a_class_are_refused(volumes):
    """7 of 12 slices of each of two volumes show a class."""
    data = volumes(2)
    assert len(draw(data, n_shot=14)["lower"]) == 7
    with pytest.raises(ValueError, match="n_shot: 15 asked for, 14 slices have a label that is not empty"):
        draw(data, n_shot=15)
    with pytest.raises(ValueError, match="n_shot: 25 asked for, 24 labelled images found"):
        draw(data, n_shot=25)


def test_a_list_of_slices_is_read_back(volumes):
    data = volumes(6)
    write_datalist(data[0] / "list.json", draw(data, n_validation=1))
    read = load_datalist(data[0] / "list.json", data[0])
    assert all(isinstance(item["slice"], int) for item in read["lower"] + read["upper"] + read["validation"])
    assert read["allow"] == []


def test_a_list_of_slices_drawn_again_keeps_the_slices(volumes):
    data = volumes(4)
    content = draw(data)
    items, found = items_of_list(save(data[0], content))
    again = draw((data[0], items), found["labels"], seed=5, slice_axis=found["slice_axis"])
    slices = [{(i["image"], i["slice"]) for i in c["lower"] + c["upper"]} for c in (content, again)]
    assert slices[0] == slices[1]


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda c: c["lower"][0].pop("slice"), r"v\d\.nii\.gz: is a volume of 12 slices, its item in lower names none"),
        (lambda c: c["validation"][0].pop("slice"), r"of 12 slices, its item in validation names none; make the list"),
        (lambda c: c["upper"][0].update(slice=12), r"slice 12 asked for, it has 12 \(0 to 11\)"),
        (lambda c: c["upper"][0].update(slice=0), "the label is empty for lung, heart; replace this image"),
        (lambda c: c.pop("slice_axis"), "slice_axis is None; write one of axial, coronal, sagittal"),
        (lambda c: c.update(slice_axis="oblique"), "slice_axis is 'oblique'; write one of axial"),
        (lambda c: c.update(allow=["tilt"]), "allow: 'tilt' is not one of missing_slices"),
        (lambda c: c.update(window=[3, 1]), r"window: \[3, 1\] is not"),
        (lambda c: c.update(snomed={"liver": ["1", "Liver"]}), "snomed: .liver. is no task; the tasks are lung, heart"),
        (lambda c: c.update(snomed={"lung": "39607008"}), "snomed: lung has .39607008.; write"),
        (lambda c: c["labels"].update(lung="Lung"), "labels: lung is 'Lung', the values of label_coding 'index' are"),
    ],
)
def test_a_list_of_slices_that_does_not_hold_is_refused_in_one_line(volumes, spoil, finding):
    data = volumes(6)
    content = draw(data, dict(LABELS), n_validation=1)
    spoil(content)
    with pytest.raises(ValueError, match=finding) as error:
        load_datalist(save(data[0], content), data[0])
    assert "\n" not in str(error.value)


def test_options_for_later_are_kept_in_the_list(folder):
    options = {"allow": ["gantry_tilt"], "snomed": {"lung": ["39607008", "Lung"]}, "window": [-1000, 400]}
    content = draw(folder(["12"] * 4), **options)
    assert {key: content[key] for key in options} == options


def test_an_unknown_flaw_to_allow_is_refused(folder):
    with pytest.raises(ValueError, match="allow: 'tilt' is not one of missing_slices"):
        draw(folder(["12"] * 4), allow=["tilt"])


def test_a_label_on_another_grid_is_counted_on_that_of_its_image(volumes):
    """The label of v0 is stored with its slices upside down: its slices are those of the image all the same."""
    dataset_dir, items = volumes(4)
    path = dataset_dir / items[0]["label"]
    values = np.asarray(nibabel.load(path).dataobj)[:, :, ::-1]
    affine = np.diag([1, 1, -3, 1.0])
    affine[2, 3] = 33
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    for seed in range(5):
        content = draw((dataset_dir, items), seed=seed)
        for item in content["lower"] + content["upper"]:
            assert item["slice"] in LUNG_SLICES | HEART_SLICES


def test_series_and_folders_of_masks_are_listed_with_their_hashes(real_data, tmp_path):
    """Two DICOM series of three slices, each with a folder of two masks; the first is changed afterwards."""
    items = []
    for name in ("p1", "p2"):
        (tmp_path / name / "ct").mkdir(parents=True)
        for file in (real_data / "dicom_seg_dcmqi_ct3" / "image").iterdir():
            shutil.copyfile(file, tmp_path / name / "ct" / file.name)
        (tmp_path / name / "masks").mkdir()
        for organ, row in (("liver", 100), ("spleen", 300)):
            mask = np.zeros((3, 512, 512), dtype=np.uint8)
            mask[1, row : row + 20] = 1
            picture = nibabel.Nifti1Image(mask.T, np.eye(4))
            picture.header.set_xyzt_units("unknown")
            picture.set_qform(None, 0)
            picture.set_sform(None, 0)
            nibabel.save(picture, tmp_path / name / "masks" / f"{organ}.nii.gz")
        items.append({"image": f"{name}/ct", "label": f"{name}/masks", "subject": name})
    labels = {"background": 0, "liver": "liver", "spleen": "spleen"}
    content = draw((tmp_path, items), labels, n_shot=2, label_coding="files")
    assert {item["slice"] for item in content["lower"] + content["upper"]} == {1}
    path = save(tmp_path, content)
    load_datalist(path, tmp_path)
    with (tmp_path / "p1" / "ct" / "01.dcm").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"p1/ct: has changed since .* was made; make the list again"):
        load_datalist(path, tmp_path)


def test_slices_of_real_volumes_show_both_parts_of_the_hippocampus(real_data):
    root = real_data / "msd_hippocampus"
    items = pair_folders(root / "imagesTr", root / "labelsTr", root)
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    content = draw((root, items), labels, n_validation=2)
    assert [len(content[section]) for section in SECTIONS] == [2, 2, 2, 14]
    for half in ("lower", "upper"):
        shown = set()
        for item in content[half]:  # the files are RAS: axial slice k is [:, :, k]
            stored = np.asarray(nibabel.load(root / item["label"]).dataobj)[:, :, item["slice"]]
            shown |= set(np.unique(stored).astype(int).tolist())
        assert shown == {0, 1, 2}


# Kept apart, spelt rightly


def test_one_image_spelt_in_two_ways_is_one_image(folder):
    dataset_dir, items = folder(["12"] * 4)
    halves = {"lower": items[:1], "upper": [{**items[0], "image": f"./{items[0]['image']}", "subject": "other"}]}
    with pytest.raises(ValueError, match=r"image .*00.png is in lower and in upper"):
        load_datalist(save(dataset_dir, {"labels": LABELS, **halves}), dataset_dir)
    with pytest.raises(ValueError, match=r"00.png: is of the subjects s0 and other; name one"):
        draw((dataset_dir, [*items, *halves["upper"]]))


def test_training_slices_of_one_subject_are_shared_if_asked_for(volumes):
    dataset_dir, items = volumes(1)
    slices = [{**items[0], "slice": n} for n in (2, 3, 7, 8)]
    content = {"labels": LABELS, "slice_axis": "axial", "training": slices, "shared_subjects": True}
    read = load_datalist(save(dataset_dir, content), dataset_dir)
    assert sorted(item["slice"] for half in ("lower", "upper") for item in read[half]) == [2, 3, 7, 8]
    assert len(read["lower"]) == 2


def stack(path: Path, pages: int = 4) -> None:
    values = [np.full((4, 4), page, dtype=np.uint8) for page in range(pages)]
    values[0][0] = 9
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values[0] // 9).save(
        path, save_all=True, append_images=[Image.fromarray(v // 2) for v in values[1:]]
    )


def test_stacks_without_geometry_have_no_slice_axis(tmp_path):
    items = [{"image": f"images/{n}.tif", "label": f"labels/{n}.tif", "subject": str(n)} for n in range(2)]
    for item in items:
        stack(tmp_path / item["image"])
        stack(tmp_path / item["label"])
    content = draw((tmp_path, items), {"background": 0, "cell": 1}, n_shot=2)
    assert "slice_axis" not in content
    assert all("slice" in item for item in content["lower"] + content["upper"])
    assert len(load_datalist(save(tmp_path, content), tmp_path)["lower"]) == 1
    with pytest.raises(ValueError, match="slice_axis: coronal asked for, but no image says how it lies in the patient"):
        draw((tmp_path, items), {"background": 0, "cell": 1}, n_shot=2, slice_axis="coronal")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"shared_subjects": "false"}, "shared_subjects is 'false', not true or false"),
        ({"training": [{"image": "a", "label": "b"}]}, "has training beside lower or upper; keep training"),
        ({"sha256": [1]}, r"sha256 is \[1\], not an object"),
        ({"snomed": [1]}, r"snomed is \[1\], not an object"),
        ({"allow": "gantry_tilt"}, "allow: 'gantry_tilt' is not a list of names"),
        ({"allow": [1]}, r"allow: \[1\] is not a list of names"),
        ({"windw": [0, 1]}, "has the key 'windw'; did you mean 'window'"),
        ({"upper": 5}, "upper is 5, not a list"),
        ({"testing": [{"image": "a", "label": "b", "subjct": "x"}]}, "has the key 'subjct'; did you mean 'subject'"),
    ],
    ids=str,
)
def test_a_key_of_another_kind_is_refused_in_one_line(folder, change, finding):
    data = folder(["12"] * 6)
    with pytest.raises(ValueError, match=finding):
        load_datalist(save(data[0], {**draw(data), **change}), data[0])


@pytest.mark.parametrize("key", ["allow", "sha256", "snomed", "window", "name"])
def test_null_is_as_good_as_nothing(folder, key):
    data = folder(["12"] * 6)
    assert len(load_datalist(save(data[0], {**draw(data), key: None}), data[0])["lower"]) == 2


def test_the_support_expression_is_on_the_patient_of_a_tree(volumes):
    dataset_dir, items = volumes(4)
    for number, item in enumerate(items):
        folder = dataset_dir / f"{'AB'[number // 2]}{number}"
        folder.mkdir()
        (dataset_dir / item["image"]).rename(folder / "ct.nii.gz")
        item["image"] = f"{folder.name}/ct.nii.gz"
    content = draw((dataset_dir, items), n_shot=2, support="^A")
    assert sorted(item["image"] for item in content["testing"]) == ["B2/ct.nii.gz", "B3/ct.nii.gz"]
