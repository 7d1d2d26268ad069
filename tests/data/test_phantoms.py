"""The generated films: labelled, all different, and different on the two sides."""

import numpy as np
import pytest

from blosam_monai.data.phantoms import PHANTOM_LABELS, chest_film, write_chest_films
from blosam_monai.data.readers import list_cases, read_image, read_label

SEEDS = range(25)


@pytest.fixture(scope="module")
def films():
    return [chest_film(seed, 112, 144) for seed in SEEDS]


def test_a_seed_gives_the_same_film_again():
    for first, second in zip(chest_film(3), chest_film(3), strict=True):
        assert np.array_equal(first, second)


def test_every_seed_gives_another_film(films):
    assert len({film.tobytes() for film, _ in films}) == len(SEEDS)
    assert len({label.tobytes() for _, label in films}) == len(SEEDS)


def test_film_and_label_have_the_size_asked_for():
    film, label = chest_film(0, 48, 80)
    assert (film.shape, film.dtype) == ((48, 80), np.uint8)
    assert (label.shape, label.dtype) == ((48, 80), np.uint8)


def test_every_film_shows_both_classes(films):
    for _, label in films:
        assert set(np.unique(label)) == set(PHANTOM_LABELS.values())
        assert 0.10 < (label == 1).mean() < 0.30  # ellipses of half axes about 0.30 x 0.125, twice, less the heart
        assert 0.02 < (label == 2).mean() < 0.08  # about 0.15 x 0.105


def test_lungs_are_dark_and_the_heart_is_bright(films):
    for film, label in films:
        assert film[label == 1].mean() + 50 < film[label == 2].mean()


def test_the_heart_lies_right_of_the_lungs_middle_so_that_a_mirrored_film_is_told(films):
    for _, label in films:
        assert np.nonzero(label == 2)[1].mean() > np.nonzero(label == 1)[1].mean() + 3
        assert np.nonzero(label == 2)[0].mean() > np.nonzero(label == 1)[0].mean() + 3  # and lower down


def test_written_films_are_read_back(tmp_path):
    write_chest_films(tmp_path, 2, seed=5)
    names = ["phantom_000.png", "phantom_001.png"]
    assert [p.name for p in list_cases(tmp_path / "images")] == names
    assert [p.name for p in list_cases(tmp_path / "labels")] == names
    film, label = chest_film(50_001)
    assert np.array_equal(read_image(tmp_path / "images" / names[1]).values[0], film)
    assert np.array_equal(read_label(tmp_path / "labels" / names[1]).values[0], label)
