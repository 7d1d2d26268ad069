"""Episodes: who supports whom, what a list holds, and that nobody supports himself."""

import json
from collections import Counter

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from blosam_monai.data.class_lists import ClassLists, Picture, fold_classes
from blosam_monai.data.embeddings import EncodeImaged
from blosam_monai.data.episodes import (
    EncodeScalesd,
    Episodes,
    InSupportEpisodes,
    ScaledEpisodes,
    draw_episodes,
)

# Inside the support set


def make_items(count, tasks=2):
    return [
        {"embedding": torch.full((3, 2, 2), float(i)), "label": torch.full((tasks, 8, 8), float(i))}
        for i in range(count)
    ]


def test_every_image_is_the_query_once_and_the_others_support_it():
    episodes = InSupportEpisodes(make_items(4))
    assert len(episodes) == 4
    for i, episode in enumerate(episodes[n] for n in range(4)):
        others = [n for n in range(4) if n != i]
        assert episode["embedding"].unique().tolist() == episode["label"].unique().tolist() == [i]
        assert episode["support"][:, 0, 0, 0].tolist() == episode["mask"][:, 0, 0, 0].tolist() == others
        assert episode["support"].shape == (3, 3, 2, 2)
        assert episode["mask"].shape == (3, 2, 8, 8)


def test_packed_embeddings_are_stacked_as_they_are():
    items = [{**item, "embedding": item["embedding"].flatten()} for item in make_items(3)]
    assert InSupportEpisodes(items)[0]["support"].shape == (2, 12)


def test_one_image_makes_no_episode():
    with pytest.raises(ValueError, match="n_shot: 1 labelled image; an episode needs 2"):
        InSupportEpisodes(make_items(1))


# Lists: pictures of 16 x 16 pixels; an object of n rows has an area of n / 16 of the picture

LABELS = {"background": 0, "disc": 1, "bar": 2, "ring": 3}


def write_case(folder, name, rows: dict[int, int]):
    """A picture and its label: rows of each value, from the top."""
    label = np.zeros((16, 16), np.uint8)
    start = 0
    for value, count in rows.items():
        label[start : start + count] = value
        start += count
    for part, values in (("images", label * 60), ("labels", label)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / part / f"{name}.png")
    return {"image": f"images/{name}.png", "label": f"labels/{name}.png"}


def write_list(folder, sections: dict[str, list[tuple[str, dict[int, int]]]], name="list", labels=LABELS):
    """A list of cases (subject, rows): sections -> JSON."""
    content = {"name": name, "labels": labels}
    for section, cases in sections.items():
        content[section] = [
            {**write_case(folder, f"{name}_{section}_{n}", rows), "subject": subject}
            for n, (subject, rows) in enumerate(cases)
        ]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def lists(tmp_path) -> ClassLists:
    """Subjects a to f train, g to j test; two pictures each; b and c show the ring."""
    training = [(s, {1: 4, 2: 2 + n, **({3: 1} if s in "bc" else {})}) for s in "abcdef" for n in range(2)]
    testing = [(s, {1: 1, 2: 5, 3: 3 + n}) for s in "ghij" for n in range(2)]
    path = write_list(tmp_path, {"training": training, "testing": testing})
    return ClassLists(path, tmp_path)


def drawn(lists, part="training", classes=("disc", "bar"), **options):
    given = {"n_shot": 1, "count": 60, "seed": 0, **options}
    return draw_episodes(lists, lists.survey(part), classes, **given)


def subjects_of(listed, episode):
    return listed.items[episode.query]["subject"], [listed.items[n]["subject"] for n in episode.support]


@pytest.mark.parametrize("n_shot", [1, 3, 5])
def test_supports_are_of_other_subjects_than_the_query_and_of_as_many_as_there_are(lists, n_shot):
    listed = drawn(lists, n_shot=n_shot)
    for episode in listed.episodes:
        query, supports = subjects_of(listed, episode)
        assert query not in supports
        assert len(set(supports)) == len(supports) == n_shot


def test_more_supports_than_subjects_take_a_second_picture_of_some(lists):
    """Five other subjects, two pictures each: seven supports are five subjects, two of them twice."""
    listed = drawn(lists, n_shot=7)
    for episode in listed.episodes:
        query, supports = subjects_of(listed, episode)
        assert sorted(Counter(supports).values()) == [1, 1, 1, 2, 2]
        assert len(set(episode.support)) == 7
        assert query not in supports


def test_episodes_of_the_test_use_no_subject_of_the_training(lists):
    assert {item["subject"] for item in drawn(lists).items} <= set("abcdef")
    assert {item["subject"] for item in drawn(lists, "testing").items} <= set("ghij")


def test_classes_take_turns_and_every_subject_is_queried_equally_often(lists):
    """60 episodes of two classes and six subjects: each class 30 times, each subject of it 5 times."""
    listed = drawn(lists)
    queries = Counter((e.name, subjects_of(listed, e)[0]) for e in listed.episodes)
    assert queries == {(name, subject): 5 for name in ("disc", "bar") for subject in "abcdef"}


def test_a_list_is_fixed_by_its_seed_and_begins_as_a_longer_one(lists):
    named = lambda listed: [
        (e.name, *(listed.items[n]["image"] for n in (e.query, *e.support))) for e in listed.episodes
    ]
    whole = named(drawn(lists))
    assert named(drawn(lists, count=10)) == whole[:10]
    assert named(drawn(lists)) == whole
    assert named(drawn(lists, seed=1)) != whole


def test_pictures_show_the_class_with_the_least_area_asked_for(lists):
    """Bars of 2 and of 3 rows of 16: 8192 and 12288 pixels of 256 x 256."""
    areas = {n: {p.item["image"]: p.shares["bar"] for p in lists.survey("training")} for n in range(1)}[0]
    for least, expected in ((8192, {2 / 16, 3 / 16}), (8193, {3 / 16}), (0, {2 / 16, 3 / 16})):
        assert {areas[item["image"]] for item in drawn(lists, classes=["bar"], min_area=least).items} == expected
    with pytest.raises(ValueError, match=r"bar: shown by 0 pictures of 0 subjects \(min_area 12289\), needed are a qu"):
        drawn(lists, classes=["bar"], min_area=12289)


def test_a_class_to_avoid_is_on_no_picture_however_little_of_it(lists):
    assert {item["subject"] for item in drawn(lists, avoid=["ring"]).items} == set("adef")


def test_too_few_subjects_or_pictures_are_one_line(lists):
    with pytest.raises(ValueError, match=r"ring: shown by 4 pictures of 2 subjects .* 3 supports of other subjects;"):
        drawn(lists, classes=["ring"], n_shot=3)
    with pytest.raises(
        ValueError, match=r"ring: shown by 0 pictures .* lower min_area or n_shot, give exclude_novel=f"
    ):
        drawn(lists, classes=["ring"], avoid=["ring"])
    with pytest.raises(ValueError, match="n_shot: 0 is too little; at least 1"):
        drawn(lists, n_shot=0)


def test_episodes_hold_the_masks_of_their_class(lists):
    classes = ["disc", "bar"]
    listed = drawn(lists, classes=classes, n_shot=2, count=4)
    read = lists.reader(classes)
    items = [
        {"embedding": torch.tensor(float(n)), "label": read(item)["label"][:, 0]} for n, item in enumerate(listed.items)
    ]
    for episode, loaded in zip(listed.episodes, (Episodes(listed, items)[n] for n in range(4)), strict=True):
        value = LABELS[episode.name]
        files = [listed.items[n]["label"] for n in (episode.query, *episode.support)]
        query, *supports = (np.asarray(Image.open(file)) == value for file in files)
        assert loaded["embedding"] == episode.query
        assert loaded["support"].tolist() == list(episode.support)
        np.testing.assert_array_equal(loaded["label"][0], query)
        np.testing.assert_array_equal(loaded["mask"][:, 0], supports)


def test_a_list_without_testing_is_halved_by_subject(tmp_path):
    cases = [(s, {1: 4}) for s in "abcdef" for _ in range(2)]
    lists = ClassLists(write_list(tmp_path, {"training": cases}), tmp_path, seed=3)
    training, testing = ({p.item["subject"] for p in lists.survey(part)} for part in ("training", "testing"))
    assert len(training) == len(testing) == 3
    assert not training & testing


def test_a_subject_in_both_parts_is_refused(tmp_path):
    path = write_list(tmp_path, {"lower": [("a", {1: 4})], "upper": [("b", {1: 4})], "testing": [("b", {1: 4})]})
    with pytest.raises(ValueError, match=r"list\.json: subject b is trained on and in testing"):
        ClassLists(path, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    path = write_list(tmp_path, {"training": [("a", {1: 4}), ("b", {1: 4})]})
    (tmp_path / "images" / "list_training_1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"list_training_1\.png: listed in .*list\.json but missing; check data"
    ):
        ClassLists(path, tmp_path)


def test_base_classes_are_those_that_are_not_novel(lists):
    assert lists.others(["bar"]) == ["disc", "ring"]
    with pytest.raises(ValueError, match=r"novel: \['baar'\] must be some of disc, bar, ring"):
        lists.expand(["baar"])
    with pytest.raises(ValueError, match="novel: disc, bar, ring are all classes there are; leave some to train on"):
        lists.others(["disc", "bar", "ring"])


def test_data_sets_are_classes_whose_subjects_stay_apart(tmp_path):
    """Two lists with subjects of the same names and labels of other values."""
    paths = [
        write_list(tmp_path / name, {"training": [(s, {value: 4}) for s in "abcd"]}, name, {"organ": value})
        for name, value in (("lungs", 1), ("teeth", 3))
    ]
    lists = ClassLists(paths, [path.parent for path in paths])
    assert lists.expand(["teeth"]) == lists.others(["lungs"]) == ["teeth/organ"]
    assert {s.split("/")[0] for s in (p.item["subject"] for p in lists.survey("training"))} == {"lungs", "teeth"}
    classes = ["lungs/organ", "teeth/organ"]
    listed = drawn(lists, classes=classes, count=8)
    read = lists.reader(classes)
    for episode in listed.episodes:
        folder = episode.name.split("/")[0]
        query = read(listed.items[episode.query])
        assert f"/{folder}/" in query["source"]
        assert query["label"][episode.task].sum() == 4 * 16


def test_slices_of_volumes_are_pictures_counted_as_they_are_read(tmp_path):
    """Volumes of 12 slices, the class on slices 3 to 6 of the file, with 3 to 6 rows."""
    items = []
    for name in "abcd":
        label = np.zeros((16, 16, 12), np.uint8)
        for z in range(3, 7):
            label[:z, :, z] = 1
        for part, values in (("image", label.astype(np.float32)), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1, 3, 1])), tmp_path / f"{name}_{part}.nii.gz")
        items.append({"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz", "subject": name})
    (tmp_path / "list.json").write_text(json.dumps({"labels": {"organ": 1}, "training": items}))
    lists = ClassLists(tmp_path / "list.json", tmp_path)
    pictures = lists.survey("training")
    assert len(pictures) == 2 * 4
    assert sorted({p.shares["organ"] for p in pictures}) == [3 / 16, 4 / 16, 5 / 16, 6 / 16]
    read = lists.reader(["organ"])
    for picture in pictures:
        assert read(picture.item)["label"].float().mean().item() == picture.shares["organ"]


def test_scales_are_encoded_each_by_its_own_network(lists):
    class Network(torch.nn.Module):
        """Means of patches of 8 pixels."""

        encoder_id = "means"

        def __init__(self, size):
            super().__init__()
            self.image_size, self.grid_size = size, size // 2
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, image):
            return torch.nn.functional.avg_pool2d(image, 8)

    classes = ["bar", "ring"]
    listed = drawn(lists, "testing", classes, count=2)
    read = lists.reader(classes)
    scale = EncodeScalesd([EncodeImaged(Network(size), "none") for size in (32, 16)])
    items = []
    for item in listed.items:
        case = read(item)
        items.append(
            scale(
                {**case, "image": case["image"][:, 0].float().expand(3, -1, -1), "label": case["label"][:, 0].float()}
            )
        )
    episode = ScaledEpisodes(listed, items)[1]
    assert episode["name"] == "ring"
    assert [one["support"].shape for one in episode["scales"]] == [(1, 3, 4, 4), (1, 3, 2, 2)]
    assert [one["mask"].shape for one in episode["scales"]] == [(1, 1, 16, 16), (1, 1, 8, 8)]
    label = np.asarray(Image.open(listed.items[listed.episodes[1].query]["label"])) == LABELS["ring"]
    np.testing.assert_array_equal(episode["label"][0], label)


def test_folds_are_lists_or_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"folds": {"0": ["disc"], "1": ["bar", "ring"]}}))
    assert fold_classes([["disc"], ["bar", "ring"]], 1) == fold_classes(recipe, "1") == ["bar", "ring"]


@pytest.mark.parametrize(
    ("folds", "fold", "message"),
    [
        (None, 0, "novel: name the classes that are kept for testing, or give folds and fold"),
        ([["disc"], ["bar"]], 2, "fold: 2 is not one of 0, 1; see folds"),
    ],
)
def test_folds_that_are_not_there_are_one_line(folds, fold, message):
    with pytest.raises(ValueError, match=message):
        fold_classes(folds, fold)


def test_a_picture_of_two_subjects_is_not_mixed_up():
    """Equal pictures of different items are different supports."""
    same = [Picture({"image": "x", "subject": s, "dataset": 0}, {"disc": 0.5}) for s in "ab"]

    class One:
        def place(self, name, classes):
            return 0

    listed = draw_episodes(One(), same, ["disc"], n_shot=1, count=3, seed=0)  # type: ignore[arg-type]
    assert len(listed.items) == 2
