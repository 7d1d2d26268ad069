"""Intervals and p-values against hand-worked cases, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.statistics_error import simulate, two_way, wilcoxon_of_one_draw
from blosam_monai.bench.statistics import (
    arrange_scores,
    few_draws_warning,
    holm,
    p_value,
    percentile_interval,
    superiority,
    two_way_bootstrap,
)

NAN = math.nan
EXPERIMENTS = 1000


def row(dice: float, **others) -> dict:
    return {
        "data": "lungs",
        "method": "a",
        "draw": 0,
        "task": "lung",
        "case": "1",
        "subject": "1",
        "dice": dice,
    } | others


def binomial_margin(p: float) -> float:
    """Four standard deviations of a share of ``EXPERIMENTS``."""
    return 4 * math.sqrt(p * (1 - p) / EXPERIMENTS)


def test_the_two_way_bootstrap_calls_equal_methods_different_in_five_of_a_hundred_experiments():
    share = np.mean(two_way(simulate(10, experiments=EXPERIMENTS)) < 0.05)
    assert share == pytest.approx(0.05, abs=binomial_margin(0.05))


def test_the_per_image_test_calls_equal_methods_different_in_forty_of_a_hundred_experiments():
    share = np.mean(wilcoxon_of_one_draw(simulate(10, experiments=EXPERIMENTS)) < 0.05)
    assert share == pytest.approx(0.42, abs=binomial_margin(0.42))  # P(|Z| > 1.96 r), r = 0.66 / hypot(1.5, 0.66)


def test_the_interval_of_the_mean_covers_the_truth_in_95_of_a_hundred_experiments():
    scores = 70 + simulate(10, experiments=EXPERIMENTS)
    resampled = two_way_bootstrap(scores, range(scores.shape[2]), resamples=1000)
    covered = [low <= 70 <= high for low, high in map(percentile_interval, resampled.T)]
    assert np.mean(covered) == pytest.approx(0.95, abs=binomial_margin(0.05))


def test_resampled_means_have_the_distribution_of_all_possible_resamples():
    table = np.array([[0.1, 0.5, NAN], [0.2, 0.9, 0.3]])
    subjects = ["x", "y", "y"]
    means = []
    for draws in itertools.product(range(2), repeat=2):
        for drawn in itertools.product("xy", repeat=2):
            cases = [case for subject in drawn for case in range(3) if subjects[case] == subject]
            means.append(np.nanmean([table[draw, case] for draw in draws for case in cases]))
    values, counts = np.unique(np.round(means, 9), return_counts=True)
    resampled = np.round(two_way_bootstrap(table[None], subjects, resamples=20_000)[:, 0], 9)
    found, times = np.unique(resampled, return_counts=True)
    assert found.tolist() == values.tolist()
    assert times / 20_000 == pytest.approx(counts / len(means), abs=0.015)  # 4 SD of a share of 1/4


def test_a_resample_without_anything_known_is_not_a_number():
    diagonal = np.array([[[0.4, NAN], [NAN, 0.6]]])
    resampled = two_way_bootstrap(diagonal, range(2), resamples=4000)
    assert np.isnan(resampled).mean() == pytest.approx(
        1 / 8, abs=0.021
    )  # of 16: draw 0 twice with case 1 twice, or 1, 0
    assert percentile_interval(resampled[:, 0]) == (0.4, 0.6)


def test_tables_of_a_bootstrap_get_the_same_draws_and_subjects():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 6))
    resampled = two_way_bootstrap(np.stack([first, second, first - second]), range(6), resamples=1500)
    assert resampled[:, 2] == pytest.approx(resampled[:, 0] - resampled[:, 1], abs=1e-12)


def test_p_is_twice_the_share_of_the_rarer_side():
    assert p_value(np.array([-1.0, 1, 2, 3, 4, 5, 6, 7, 8])) == pytest.approx(2 * (1 + 1) / (1 + 9))


def test_p_is_never_zero():
    assert p_value(np.ones(999)) == pytest.approx(2 / 1000)


def test_p_of_methods_that_are_equal_in_every_case_is_one():
    assert p_value(np.zeros(999)) == 1


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons():
    # 4 comparisons: 4 * .005 = .02; 3 * .011 = .033; 2 * .02 = .04; 1 * .03 = .03, raised to .04 of the one before
    assert holm([0.03, 0.005, NAN, 0.02, 0.011]) == pytest.approx([0.04, 0.02, NAN, 0.04, 0.033], nan_ok=True)


def test_holm_stays_at_one():
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_superiority_counts_pairs_and_half_of_the_ties():
    a, b = np.random.default_rng(0).integers(0, 4, (2, 5, 7)).astype(float)
    a[1, 2] = NAN
    pairs = [(a[d, c], b[d, c]) for d in range(5) for c in range(7) if (d, c) != (1, 2)]
    wins, ties = sum(x > y for x, y in pairs), sum(x == y for x, y in pairs)
    assert ties > 3
    assert superiority(a - b) == pytest.approx((wins + ties / 2) / 34)


def test_rows_stand_in_their_draw_and_case():
    rows = [row(0.5, draw=3), row(0.7, case="2"), row(0.9, method="b", case="2", draw=3)]
    (scores,) = arrange_scores(rows, "dice")
    assert (scores.draws, scores.cases, scores.subjects) == ([0, 3], [("1", "1"), ("1", "2")], ["1", "1"])
    expected = {"a": [[NAN, 0.7], [0.5, NAN]], "b": [[NAN, NAN], [NAN, 0.9]]}
    for method, table in expected.items():
        np.testing.assert_array_equal(scores.tables[method, "lungs", "lung"], table)


def test_data_sets_of_the_same_subjects_are_drawn_together_and_others_alone():
    sets = {"near": "12", "teeth": "89", "far": "34", "all": "1234"}
    rows = [row(0.5, data=data, case=f"{data} {case}", subject=case) for data, those in sets.items() for case in those]
    found = [{data for _, data, _ in scores.tables} for scores in arrange_scores(rows, "dice")]
    assert sorted(found, key=len) == [{"teeth"}, {"near", "far", "all"}]


def test_a_case_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="a on lungs, draw 0: a case is there twice"):
        arrange_scores([row(0.5), row(0.6)], "dice")


@pytest.mark.parametrize(("draws", "said"), [(1, "no interval"), (3, "below p = 0.25"), (5, "below p = 0.0625")])
def test_few_draws_are_warned_of_with_the_reason(draws, said):
    assert said in few_draws_warning(draws)


def test_ten_draws_are_enough():
    assert few_draws_warning(10) is None
