"""Subject ensembles: seeded, in range, of every kind, and the same anatomy in every subject."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score  # comes with MLflow

from blosam_monai.data import ensembles
from blosam_monai.data.ensembles import OUTSIDE, Ensemble, draw_ensemble

SEEDS = 200
MEAN_COLOUR = torch.tensor([123.675, 116.28, 103.53])  # RGB of ImageNet, with which SAM was trained


@pytest.fixture(scope="module")
def drawn() -> list[Ensemble]:
    """Two subjects of 64 pixels of each of 200 seeds; tests must not change them."""
    return [draw_ensemble(seed, subjects=2, size=64) for seed in range(SEEDS)]


def is_gray(ensemble: Ensemble) -> bool:
    inside = (ensemble.label != OUTSIDE)[:, None]
    red, green, blue = (ensemble.image * inside).unbind(1)
    return torch.equal(red, green) and torch.equal(red, blue)


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """Adjusted Rand index of two label maps: 1 the same partition by whatever names, 0 what chance gives."""
    both = (one != OUTSIDE) & (other != OUTSIDE)
    return float(adjusted_rand_score(one[both].numpy(), other[both].numpy()))


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


# The stream


@pytest.mark.parametrize("seed", [3, (1, 0, 2)])
def test_a_seed_gives_the_same_pixels_twice_whatever_the_global_seed(seed):
    torch.manual_seed(0)
    first = draw_ensemble(seed, subjects=2, size=64)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    second = draw_ensemble(seed, subjects=2, size=64)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)


def test_the_stream_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_ensemble(0, subjects=2, size=64)
    assert torch.equal(torch.rand(3), expected)


def test_no_two_seeds_give_the_same_pixels_or_labels(drawn):
    assert len({ensemble.image.numpy().tobytes() for ensemble in drawn}) == SEEDS
    assert len({ensemble.label.numpy().tobytes() for ensemble in drawn}) == SEEDS


def test_the_place_in_the_stream_counts_and_its_order():
    images = [draw_ensemble(seed, subjects=1, size=64).image for seed in ((1, 2), (2, 1), (1, 2, 3))]
    assert not any(torch.equal(images[i], images[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize(("size", "subjects"), [(32, 2), (64, 3), (256, 2)])
def test_shapes_and_types_are_those_it_says(size, subjects):
    image, label = draw_ensemble(0, subjects=subjects, size=size)
    assert (image.shape, image.dtype) == ((subjects, 3, size, size), torch.float32)
    assert (label.shape, label.dtype) == ((subjects, size, size), torch.int64)


@pytest.mark.parametrize("size", [0, 24, 100])
def test_a_size_too_small_or_odd_is_refused_with_what_would_do(size):
    with pytest.raises(ValueError, match=rf"size: {size} is not a multiple of 8 of at least 32 pixels"):
        draw_ensemble(0, subjects=1, size=size)


def test_pixels_are_finite_and_from_0_to_255_and_reach_both(drawn):
    images = torch.cat([ensemble.image for ensemble in drawn])
    assert torch.isfinite(images).all()
    assert (float(images.min()), float(images.max())) == (0.0, 255.0)


def test_labels_are_whole_numbers_from_minus_one_and_at_least_two_are_structures(drawn):
    for ensemble in drawn:
        known = set(ensemble.label.unique().tolist()) - {OUTSIDE}
        assert len(known) >= 2
        assert min(known) >= 0
        assert max(known) < 4 + 1 + 12  # regions of the ground, the ground beyond a body, objects


# Kinds: the share of each is that of its chance in the code's own words, within four standard errors of 200 draws.


def test_two_of_five_are_in_colour(drawn):
    assert share([not is_gray(ensemble) for ensemble in drawn]) == pytest.approx(0.4, abs=0.14)


def test_three_of_ten_have_padding(drawn):
    assert share([bool((ensemble.label == OUTSIDE).any()) for ensemble in drawn]) == pytest.approx(0.3, abs=0.13)


def test_padding_lies_below_or_right_in_the_mean_colour_of_sam_and_leaves_half_the_picture(drawn):
    edges = set()
    for image, label in drawn:
        outside = label[0] == OUTSIDE
        assert torch.equal(outside.expand_as(label), label == OUTSIDE)  # in all subjects alike
        if not outside.any():
            continue
        rows, columns = outside.all(1), outside.all(0)
        assert torch.equal(outside, rows[:, None] | columns[None])
        edge, axis = (rows, "below") if rows.any() else (columns, "right")
        edges.add(axis)
        first = int(edge.float().argmax())
        assert first >= 32
        assert edge[first:].all()
        colours = image.permute(0, 2, 3, 1)[label == OUTSIDE]
        assert torch.equal(colours, MEAN_COLOUR.expand_as(colours))
    assert edges == {"below", "right"}


def test_half_or_more_have_an_empty_ground_in_all_corners_and_some_have_not(drawn):
    """A body on an empty ground in half of them; of the others two fifths have one region of ground, label 0."""
    whole = [e.label[0] for e in drawn if not (e.label == OUTSIDE).any()]
    corners = [label[[0, 0, -1, -1], [0, -1, 0, -1]] for label in whole]
    assert 0.5 < share([bool((corner == 0).all()) for corner in corners]) < 0.9


# What the subjects of an ensemble share


def test_subjects_share_the_anatomy_of_their_ensemble_and_of_no_other(drawn):
    """Deformed, so far from 1; between ensembles above 0, since bodies and objects lie in the middle more often."""
    whole = [e for e in drawn if not (e.label == OUTSIDE).any()]
    within = np.array([agreement(*e.label) for e in whole])
    between = np.array([agreement(one.label[0], two.label[1]) for one, two in itertools.pairwise(whole)])
    assert within.mean() > 0.3
    assert between.mean() < 0.15
    assert (within[1:] > between).mean() > 0.9


def test_most_structures_of_a_subject_are_in_the_other_too(drawn):
    sets = [[set(label.unique().tolist()) - {OUTSIDE} for label in ensemble.label] for ensemble in drawn]
    assert np.mean([len(one & two) / len(one | two) for one, two in sets]) > 0.9


def test_structures_look_alike_in_the_subjects_of_most_ensembles_and_not_at_all_in_some(drawn):
    """Within a modality (0.6) means agree; unless turned (0.7 of 0.2) a contrast is a line; the rest has no order."""
    correlations = []
    for image, label in drawn:
        gray = image.mean(1)
        large = [k for k in range(int(label.max()) + 1) if all((subject == k).sum() > 20 for subject in label)]
        if len(large) > 2:
            means = [[float(gray[s][label[s] == k].mean()) for k in large] for s in (0, 1)]
            correlations.append(np.corrcoef(means)[0, 1])
    assert len(correlations) > 0.9 * SEEDS
    assert 0.55 < np.mean(np.array(correlations) > 0.8) < 0.85
    assert 0.1 < np.mean(np.array(correlations) < 0.3) < 0.4


def test_a_modality_is_drawn_in_three_of_five_and_its_means_vary_by_at_most_8_percent():
    """Elsewhere brightness alone varies by 14 % (uniform over 0.5): 50 subjects tell the two apart."""
    deviations = np.array(
        [
            np.sqrt(ensembles._appearance(np.random.default_rng(seed), 50, 6, 1)[0].var(axis=0).mean())
            for seed in range(500)
        ]
    )
    modality = deviations < 0.09
    assert modality.mean() == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / 500))
    assert deviations[~modality].min() > 0.12


def test_images_of_one_ensemble_differ_more_than_their_deformation(drawn):
    """Even where two subjects have the same label, their pixels differ: noise, texture, bias, window."""
    same = [(e.label[0] == e.label[1]) & (e.label[0] != OUTSIDE) for e in drawn]
    differences = [float((e.image[0] - e.image[1]).abs().mean(0)[where].mean()) for e, where in zip(drawn, same)]  # noqa: B905
    assert min(differences) > 1  # of 255


# Fields


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_highest_field_is_the_first_of_numpys_argmax(count):
    fields = torch.randint(0, 3, (count, 16, 16), generator=torch.Generator().manual_seed(count)).float()  # with ties
    assert np.array_equal(ensembles._highest(fields).numpy(), fields.numpy().argmax(0))


@pytest.mark.parametrize(("side", "size"), [(3, 64), (4, 64), (8, 64), (33, 64), (4, 256), (12, 256), (64, 256)])
def test_smooth_fields_have_about_unit_deviation(side, size):
    """Interpolation averages, so below 1: 0.67 where noise of the grid's own side is enlarged, 0.86 at most."""
    fields = ensembles._smooth(torch.Generator().manual_seed(0), 100, side, size)
    assert fields.shape == (100, size, size)
    assert 0.6 < float(fields.std()) < 1
    assert abs(float(fields.mean())) < 0.1


def test_a_coarser_field_varies_less_from_pixel_to_pixel():
    generator = torch.Generator().manual_seed(0)
    steps = [float(ensembles._smooth(generator, 50, side, 64).diff(dim=-1).abs().mean()) for side in (3, 6, 12, 24)]
    assert steps == sorted(steps)
    assert steps[3] / steps[0] == pytest.approx(23 / 2, rel=0.2)  # intervals between the nodes across the picture


def test_blur_keeps_an_even_picture_and_the_mean_of_any():
    image = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = ensembles._blur(image.clone(), np.random.default_rng(0))
    torch.testing.assert_close(blurred.mean((1, 2, 3)), image.mean((1, 2, 3)))  # the kernel sums to one
    assert (blurred.std((1, 2, 3)) < image.std((1, 2, 3))).all()
    even = torch.full((1, 1, 16, 16), 0.3)
    torch.testing.assert_close(ensembles._blur(even.clone(), np.random.default_rng(0)), even)
