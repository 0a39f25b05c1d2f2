"""Calibration of scores against plain loops, and on scores whose odds are known."""

import math
import time

import numpy as np
import pytest

from lfjax.rewards import baselines, calibration


def differences_by_loop(scores, ratings, gap):
    return [
        scores[i] - scores[j]
        for i in range(len(scores))
        for j in range(len(scores))
        if ratings[i] > ratings[j] and ratings[i] - ratings[j] >= gap - 1e-6
    ]


def error_by_loop(differences, bins):
    """Bins of consecutive pairs, sorted by probability; the first ones hold one pair more where they do not divide."""
    pairs = sorted((1 / (1 + math.exp(-abs(d))), d) for d in differences)
    total, place = 0.0, 0
    for b in range(bins):
        size = len(pairs) // bins + (b < len(pairs) % bins)
        part, place = pairs[place : place + size], place + size
        if part:
            said = sum(probability for probability, _ in part) / size
            right = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for _, d in part) / size
            total += size / len(pairs) * abs(said - right)
    return total


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0])
def test_differences_are_those_of_the_pairs_that_pair_accuracy_counts(gap):
    rng = np.random.default_rng(0)
    ratings, scores = rng.integers(0, 30, 50) / 10, rng.normal(size=50)
    found = calibration.rated_differences(scores, ratings, gap)
    np.testing.assert_allclose(sorted(found), sorted(differences_by_loop(scores, ratings, gap)))
    accuracy, pairs = baselines.pair_accuracy(scores, ratings, gap)
    assert len(found) == pairs and np.mean(found > 0) == pytest.approx(accuracy)


@pytest.mark.parametrize("count, bins", [(1, 10), (7, 10), (103, 10), (1000, 10), (50, 1)])
def test_the_calibration_error_is_that_of_a_loop_over_bins(count, bins):
    differences = np.random.default_rng(count).normal(0.5, 2.0, count)
    found = calibration.calibration_error(differences, bins=bins)
    assert found == pytest.approx(error_by_loop(differences.tolist(), bins), rel=1e-9)


def test_odds_that_are_right_have_no_error_and_louder_ones_have():
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 2, 200_000))
    differences = np.where(rng.random(len(size)) < 1 / (1 + np.exp(-size)), size, -size)
    assert calibration.calibration_error(differences) < 0.005
    assert calibration.calibration_error(3 * differences) > 0.1
    assert calibration.calibration_error(differences / 10) > 0.1


def test_the_order_of_pairs_that_are_equally_sure_says_nothing():
    differences = np.repeat([1.0, -1.0], 50)  # sorted outcomes would fill whole bins
    expected = 1 / (1 + math.exp(-1.0)) - 0.5
    for given in (differences, differences[::-1], np.random.default_rng(0).permutation(differences)):
        assert calibration.calibration_error(given) == pytest.approx(expected)
    assert calibration.calibration_error(np.zeros(30)) == 0.0  # equal scores: half right, and half is what they say


def test_no_pair_has_no_error_and_far_scores_are_finite():
    assert math.isnan(calibration.calibration_error(np.zeros(0)))
    assert calibration.calibration_error(np.array([1e9, 1e9])) == 0.0
    assert calibration.calibration_error(np.array([-1e9, -1e9])) == 1.0


def test_the_slope_is_that_of_a_straight_line_fitted():
    rng = np.random.default_rng(0)
    scores = rng.normal(3.0, 2.0, 40)
    ratings = 1.7 * scores + rng.normal(size=40)
    assert calibration.rating_slope(scores, ratings) == pytest.approx(np.polyfit(scores, ratings, 1)[0])
    assert calibration.rating_slope(ratings, ratings - 5.0) == pytest.approx(1.0)
    assert calibration.rating_slope(ratings / 4, ratings) == pytest.approx(4.0)
    assert math.isnan(calibration.rating_slope(np.ones(4), np.arange(4.0)))


def test_twelve_hundred_answers_take_less_than_two_seconds_and_more_are_drawn_alike():
    rng = np.random.default_rng(0)
    ratings, scores = rng.integers(-80, 80, 5000) / 20, rng.normal(size=5000)
    start = time.process_time()
    calibration.calibration_error(calibration.rated_differences(scores[:1200], ratings[:1200]))
    assert time.process_time() - start < 2.0
    first, second = (calibration.rated_differences(scores, ratings, most=300) for _ in range(2))
    assert np.array_equal(first, second) and 0 < len(first) < 300 * 299 / 2
