"""Encoded once; views that are fixed by their seeds; draws side by side."""

import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.metrics import compute_dice

from blosam_monai.data.embeddings import AugmentViewd, EncodeImaged, StackedDraws, with_views
from blosam_monai.networks.prompt_sam import PromptSam


@pytest.fixture(scope="module")
def network():
    return PromptSam("tiny", 64, "random")


class CountingNetwork(torch.nn.Module):
    """Stands in for a network: the embedding is the mean over channels; counts the images it encodes."""

    encoder_id = "counting"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.encoded = 0

    def encode(self, image):
        self.encoded += len(image)
        return image.mean(1, keepdim=True)


def test_the_embedding_is_what_the_encoder_gives(network):
    image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    item = EncodeImaged(network, "none")({"image": image, "source": "a.png", "label": 5})
    with torch.no_grad():
        expected = network.sam.image_encoder(image[None])[0]
    assert sorted(item) == ["embedding", "label", "source"]
    assert item["embedding"].shape == (128, 8, 8)  # channels of tiny, a place for 8 pixels
    assert item["embedding"].dtype == torch.float32
    assert not item["embedding"].requires_grad
    assert torch.equal(item["embedding"], expected)


def test_each_image_and_view_is_encoded_once_however_often_it_is_asked_for():
    network = CountingNetwork()
    encode = EncodeImaged(network, "none")
    items = [
        {"image": torch.full((3, 4, 4), float(value)), "source": source, **view}
        for value, (source, view) in enumerate([("a", {}), ("b", {}), ("a", {"view": 7}), ("a", {"view": 8})])
    ]
    for _ in range(3):
        for value, item in enumerate(items):
            assert (encode(item)["embedding"] == value).all()
    assert network.encoded == 4


def test_data_sets_that_share_an_encoder_share_its_embeddings():
    network = CountingNetwork()
    encode = EncodeImaged(network, "none")
    items = [{"image": torch.full((3, 4, 4), float(i)), "source": str(i)} for i in range(5)]
    for part in (items[:4], items[1:], items):
        CacheDataset(part, encode, progress=False)
    assert network.encoded == 5


def test_the_item_given_is_not_changed():
    item = {"image": torch.ones(3, 4, 4), "source": "a"}
    EncodeImaged(CountingNetwork(), "none")(item)
    assert sorted(item) == ["image", "source"]


class TrainedFromTheImage(CountingNetwork):
    """Stands in for a network that freezes nothing."""

    encoder_id = None


def test_of_a_network_that_freezes_nothing_the_image_is_the_embedding():
    network, image = TrainedFromTheImage(), torch.ones(3, 4, 4)
    item = EncodeImaged(network)({"image": image, "label": 5})
    assert sorted(item) == ["embedding", "label"]
    assert item["embedding"] is image
    assert network.encoded == 0


def test_a_cache_is_refused_where_nothing_can_be_cached(tmp_path):
    with pytest.raises(ValueError, match=r"cache_dir: .*, but this method trains from the image; leave cache_dir out"):
        EncodeImaged(TrainedFromTheImage(), tmp_path)
    assert EncodeImaged(TrainedFromTheImage(), "none").cache is None


# Views


def scene(seed: int = 0) -> dict:
    """An image (3, 48, 64) of a bright blob on dark, and the label (1, 48, 64) of where it is bright."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    blob = ((y - 20) / 12) ** 2 + ((x - 24 - 0.4 * y) / 9) ** 2 < 1  # oblique, off the middle
    image = np.where(blob, 200.0, 30.0) + rng.uniform(-5, 5, blob.shape)
    return {
        "image": torch.from_numpy(np.stack([image] * 3)).float(),
        "label": torch.from_numpy(blob[None]).float(),
        "source": "a.png",
    }


@pytest.fixture
def files(tmp_path) -> list[dict[str, str]]:
    """Two items whose image files differ."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    return [{"image": str(tmp_path / name)} for name in "ab"]


def test_n_views_of_each_item_are_added_after_the_items(files):
    result = with_views(files, 3, seed=0)
    assert result[:2] == files
    assert [item["image"] for item in result[2:]] == [files[0]["image"]] * 3 + [files[1]["image"]] * 3
    assert len({item["view"] for item in result[2:]}) == 6


def test_views_are_a_function_of_the_seed(files):
    views = [[i["view"] for i in with_views(files[:1], 4, seed=seed)[1:]] for seed in (1, 1, 2)]
    assert views[0] == views[1]
    assert not set(views[0]) & set(views[2])


def test_an_image_has_the_same_views_whatever_it_stands_beside_and_each_slice_its_own(files):
    alone, beside = with_views(files[1:], 2, seed=0), with_views(files, 2, seed=0)
    assert [item["view"] for item in alone[1:]] == [item["view"] for item in beside[4:]]
    slices = with_views([{**files[0], "slice": n} for n in (3, 4)], 1, seed=0)
    assert slices[2]["view"] != slices[3]["view"]


def test_no_views_are_no_change_and_fewer_than_none_are_refused():
    assert with_views([{"image": "a"}], 0, seed=0) == [{"image": "a"}]
    with pytest.raises(ValueError, match="augment_views: -1 must not be negative"):
        with_views([{"image": "a"}], -1, seed=0)


def test_an_item_without_a_view_passes_untouched():
    item = scene()
    result = AugmentViewd()(item)
    assert result["image"] is item["image"]
    assert result["label"] is item["label"]


def test_a_view_is_the_same_each_time_and_its_seed_makes_it():
    augment = AugmentViewd()
    first, other, again = (augment({**scene(), "view": view}) for view in (11, 12, 11))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])
    assert torch.equal(AugmentViewd()({**scene(), "view": 11})["image"], first["image"])


def test_image_and_label_move_together_and_do_move():
    augment, before = AugmentViewd(), scene()
    moved = 0
    for view in range(20):
        after = augment({**scene(), "view": view})
        assert type(after["image"]) is torch.Tensor
        assert after["image"].shape == (3, 48, 64)
        assert set(after["label"].unique().tolist()) == {0, 1}
        image = after["image"][:1]
        bright = image > (image.min() + image.max()) / 2
        agreement = compute_dice(bright[None].float(), after["label"][None]).item()
        assert agreement > 0.95  # bilinear against nearest: at most part of the blob's edge
        moved += compute_dice(after["label"][None], before["label"][None]).item() < 0.95
    assert moved >= 10  # the others turn by less than about 3 degrees


def test_about_half_of_the_views_are_mirrored():
    blob = scene()
    blob["label"] = torch.zeros(1, 48, 64)
    blob["label"][:, 16:32, :16] = 1  # left
    augment = AugmentViewd()
    right = 0
    for view in range(40):
        columns = augment({**blob, "view": view})["label"][0].nonzero()[:, 1].float()
        right += columns.mean().item() > 32
    assert 10 <= right <= 30  # of 40 fair coins: outside with a chance of 0.2 %, and the seeds are fixed


def test_intensities_change_and_stay_in_range():
    images = [AugmentViewd()({**scene(), "view": view})["image"] for view in range(10)]
    assert all(image.min() >= 0 and image.max() <= 255 for image in images)
    assert np.std([image.max().item() for image in images]) > 5  # brightness is scaled by 0.8 to 1.2: 205 by up to 41


# Draws


def test_draws_are_stacked_as_tasks_in_their_order():
    draws = [
        [
            {
                "embedding": torch.full((5, 2, 2), 10.0 * draw + image),
                "label": torch.full((3, 8, 8), 100.0 * draw + image),
            }
            for image in range(2)
        ]
        for draw in range(4)
    ]
    stacked = StackedDraws(draws)
    assert len(stacked) == 2
    item = stacked[1]
    assert item["embedding"].shape == (4 * 3, 5, 2, 2)
    assert item["label"].shape == (4 * 3, 8, 8)
    for draw in range(4):
        for task in range(3):
            assert (item["embedding"][3 * draw + task] == 10 * draw + 1).all()
            assert (item["label"][3 * draw + task] == 100 * draw + 1).all()


def test_draws_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"draws: all must have the same number of images, found \[1, 2\]"):
        StackedDraws([[1], [1, 2]])


def test_what_is_not_to_be_remembered_is_on_disk_only(network, tmp_path):
    encode = EncodeImaged(network, tmp_path, remember=False)
    image = torch.zeros(3, network.image_size, network.image_size)
    first, again = (encode({"image": image})["embedding"] for _ in range(2))
    assert torch.equal(first, again)
    assert encode.embeddings == {}
    assert any(path.is_file() for path in tmp_path.rglob("*"))
