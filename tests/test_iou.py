"""IoU over episodes: exact counts, pooled over images, intervals by subject."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from blosam_monai.iou import IoUAccumulator


def random_episodes(rng, count=12, classes=("liver", "spleen"), shape=(7, 9)):
    """Episodes (class, subject, pred, label), the label covering a share of its own of the picture."""
    for number in range(count):
        label = rng.random(shape) < rng.uniform(0.02, 0.6)
        pred = label ^ (rng.random(shape) < rng.uniform(0, 0.3))
        yield classes[number % len(classes)], f"patient {number % 5}", pred, label


def accumulate(episodes, fold="0", into=None) -> IoUAccumulator:
    iou = into or IoUAccumulator()
    for name, subject, pred, label in episodes:
        iou.add(pred, label, name=name, subject=subject, fold=fold)
    return iou


def brute_iou(episodes, value=True) -> float:
    """Pixel by pixel: those that are ``value`` in both, of those that are in either."""
    pixels = [pair for _, _, pred, label in episodes for pair in zip(pred.flat, label.flat, strict=True)]
    return sum(p == value and t == value for p, t in pixels) / sum(p == value or t == value for p, t in pixels)


def test_it_equals_a_count_of_the_pixels_of_all_episodes():
    episodes = list(random_episodes(np.random.default_rng(0)))
    iou = accumulate(episodes)
    own = {name: brute_iou([e for e in episodes if e[0] == name]) for name in ("liver", "spleen")}
    assert iou.class_iou() == {"0": pytest.approx(own, abs=1e-15)}
    assert iou.mean_iou() == pytest.approx(sum(own.values()) / 2, abs=1e-15)
    assert iou.binary_iou() == pytest.approx((brute_iou(episodes) + brute_iou(episodes, False)) / 2, abs=1e-15)


def test_foreground_and_background_are_those_of_scikit_learn():
    episodes = list(random_episodes(np.random.default_rng(1)))
    label, pred = (np.concatenate([e[n].ravel() for e in episodes]) for n in (3, 2))
    assert accumulate(episodes).binary_iou() == pytest.approx(jaccard_score(label, pred, average="macro"), abs=1e-15)


def test_it_is_not_the_mean_over_images():
    """Images with 1 of 1 and 1 of 9 pixels right: 2 of 10 together, 0.556 on average."""
    iou = IoUAccumulator()
    whole = np.ones((3, 3), bool)
    iou.add(np.arange(9).reshape(3, 3) == 4, np.arange(9).reshape(3, 3) == 4, name="a", subject="1")
    iou.add(np.arange(9).reshape(3, 3) == 4, whole, name="a", subject="2")
    assert iou.mean_iou() == 0.2


def test_folds_are_averaged_after_their_classes():
    """Fold 0: classes of 1 and 0 give 0.5; fold 1: its only class 0.25. Mean 0.375, not the mean of three, 0.417."""
    iou = IoUAccumulator()
    right, wrong = np.array([1, 0, 0, 0]), np.array([0, 1, 0, 0])
    iou.add(right, right, name="a", subject="1", fold="0")
    iou.add(wrong, right, name="b", subject="1", fold="0")
    iou.add(np.ones(4), right, name="c", subject="1", fold="1")
    assert iou.mean_iou() == 0.375


def test_counts_above_what_float32_holds_stay_exact():
    """2^24 + 1 pixels right and as many wrong: float32 would lose the last one."""
    iou, size = IoUAccumulator(), 2**12
    everything, single = torch.ones(size, size, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    iou.add(everything, everything, name="a", subject="1")
    iou.add(single, single, name="a", subject="1")
    iou.add(single, ~single, name="a", subject="1")
    assert iou.class_iou()["0"]["a"] == (2**24 + 1) / (2**24 + 2)


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    iou = accumulate([("a", "1", np.array([1, 1]), np.array([1, 0]))])
    iou.add(np.zeros(2), np.zeros(2), name="b", subject="1")
    assert math.isnan(iou.class_iou()["0"]["b"])
    assert iou.mean_iou() == 0.5


def test_the_interval_is_of_iou_accumulated_inside_each_draw_of_subjects():
    """Of five subjects there are 5^5 draws, all alike likely: the interval is the percentiles of their IoU."""
    right = {"1": (1, 1), "2": (2, 8), "3": (5, 30), "4": (9, 10), "5": (20, 40)}  # pixels right, pixels labelled
    iou = IoUAccumulator()
    for subject, (hit, size) in right.items():
        iou.add(np.arange(40) < hit, np.arange(40) < size, name="a", subject=subject)
    draws = np.array(list(itertools.product(right.values(), repeat=5)))  # (draws, subjects, 2)
    expected = np.percentile(draws[:, :, 0].sum(1) / draws[:, :, 1].sum(1), [2.5, 97.5])
    of_means = np.percentile((draws[:, :, 0] / draws[:, :, 1]).mean(1), [2.5, 97.5])
    found = iou.summary()
    assert [found["mean_iou_low"], found["mean_iou_high"]] == pytest.approx(expected, abs=0.02)
    assert abs(of_means - expected).max() > 0.1  # so the test can tell


def test_episodes_of_one_subject_are_drawn_together():
    """Twenty episodes of one subject say nothing of another: no interval."""
    iou = accumulate([("a", "1", pred, label) for _, _, pred, label in random_episodes(np.random.default_rng(2), 20)])
    assert math.isnan(iou.summary()["mean_iou_low"])


def test_folds_run_apart_and_read_together_equal_one_count(tmp_path):
    together, paths = IoUAccumulator(), []
    for fold in range(2):
        episodes = list(random_episodes(np.random.default_rng(fold), classes=(f"a{fold}", f"b{fold}")))
        accumulate(episodes, str(fold), together)
        paths.append(tmp_path / f"{fold}.csv")
        accumulate(episodes, str(fold)).write(paths[-1])
    assert IoUAccumulator.read(*paths).summary() == together.summary()
    with pytest.raises(ValueError, match=r"0\.csv: fold 0 and class a0 are in another file too; drop one"):
        IoUAccumulator.read(paths[0], paths[0])


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"pred: shape \(2, 2\), label \(2, 3\); count both on the same grid"):
        IoUAccumulator().add(np.ones((2, 2)), np.ones((2, 3)), name="a", subject="1")


def test_nothing_counted_has_no_score():
    with pytest.raises(ValueError, match="IoU: nothing was counted"):
        IoUAccumulator().mean_iou()
