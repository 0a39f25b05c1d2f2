"""Intervals of held-out figures, against cases whose truth is known."""

import math

import numpy as np
import pytest
import scipy.special

from lfjax.records import Record
from lfjax.rewards import baselines, calibration, diversity, intervals
from lfjax.rewards.intervals import SHARE, Bootstrap, is_beside, prompt_keys, without


def covered(truth: float, make, trials: int = 300) -> float:
    """How often an interval holds the truth; `make` gives one for each random generator."""
    found = (make(np.random.default_rng(trial)) for trial in range(trials))
    return float(np.mean([low <= truth <= high for low, high in found]))


@pytest.mark.parametrize("clusters", [8, 40])
def test_the_interval_of_a_mean_holds_the_truth_where_answers_to_a_prompt_are_alike(clusters):
    """y = prompt's effect + noise with mean 1: 95 % of the intervals hold it, whose prompts are drawn whole."""

    def sample(rng):
        keys = np.repeat(np.arange(clusters), rng.integers(1, 8, clusters))
        return keys.tolist(), 1.0 + rng.normal(size=clusters)[keys] + 0.5 * rng.normal(size=len(keys))

    def by_prompt(rng):
        keys, values = sample(rng)
        return Bootstrap(keys, draws=400).mean(keys, values).interval()

    def by_answer(rng):
        keys, values = sample(rng)
        return Bootstrap(range(len(keys)), draws=400).mean(range(len(keys)), values).interval()

    assert 0.92 <= covered(1.0, by_prompt) <= 0.985
    assert covered(1.0, by_answer) < 0.85


def test_the_interval_of_a_pair_accuracy_holds_the_truth():
    """Scores are ratings with normal noise, ratings 0 or 1: a pair is in order with Phi(1 / sqrt(2))."""
    truth = float(scipy.special.ndtr(1.0 / math.sqrt(2.0)))

    def make(rng):
        ratings = np.arange(30) % 2
        found = Bootstrap(range(30), draws=300).pair_accuracy(range(30), ratings + rng.normal(size=30), ratings, 1.0)
        assert found.n == 15 * 15
        return found.interval(SHARE)

    assert 0.92 <= covered(truth, make) <= 0.985


def test_a_difference_is_paired_and_of_equals_is_nothing():
    rng = np.random.default_rng(0)
    truth, keys = rng.normal(size=60), list(range(60))
    scores = truth + rng.normal(size=60)
    draws = Bootstrap(keys)
    own, same = (draws.pair_accuracy(keys, s, truth, 0.5) for s in (scores, 3.0 * scores))
    assert (own - same).interval() == (0.0, 0.0)
    before, after = draws.mean(keys, scores), draws.mean(keys, scores + 0.1 + 0.01 * rng.normal(size=60))
    low, high = (after - before).interval()
    assert 0.09 < low < high < 0.11 < before.interval()[1] - before.interval()[0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_without_an_exception_is_not_certain(share):
    """Of 39 cases, none: the exact upper bound is 1 - 0.025^(1/39)."""
    low, high = Bootstrap(range(39)).mean(range(39), np.full(39, share)).interval(SHARE)
    assert (low, high) == pytest.approx((0.0, 0.0903) if share == 0.0 else (1 - 0.0903, 1.0), abs=1e-4)


def test_of_one_prompt_the_answers_are_drawn_and_of_one_answer_nothing_is_known():
    values = np.random.default_rng(0).normal(size=30)
    one, each = (Bootstrap(k).mean(k, values).figures("x/y") for k in (["p"] * 30, list(range(30))))
    assert one == each and {*one} == {"x/y", "x/y_n", "x/y_low", "x/y_high"}
    assert Bootstrap(["p"]).mean(["p"], [1.0]).figures("x") == {"x": 1.0, "x_n": 1.0}
    assert Bootstrap([]).mean([], []).figures("x") == {}


def test_every_figure_is_the_one_that_it_is_an_interval_of():
    rng = np.random.default_rng(1)
    ratings = rng.integers(-8, 9, 90) / 2
    scores, keys = ratings + 2 * rng.normal(size=90), [int(i) for i in rng.integers(0, 40, 90)]
    draws = Bootstrap(keys)
    texts = [" ".join(map(str, rng.integers(0, 60, 12))) for _ in range(520)]
    differences, counts = calibration.rated_differences(scores, ratings, 1.0), np.stack([scores, np.ones(90)], 1)
    found = (
        (draws.pair_accuracy(keys, scores, ratings, 1.0), baselines.pair_accuracy(scores, ratings, 1.0)[0]),
        (draws.slope(keys, scores, ratings), calibration.rating_slope(scores, ratings)),
        (draws.calibration_error(keys, scores, ratings, 1.0), calibration.calibration_error(differences)),
        (Bootstrap(range(520)).distinct2(range(520), texts), diversity.matched_distinct2(texts)),
        (draws.of_counts(keys, counts, lambda s: {"a": s[:, 0] / s[:, 1]})["a"], scores.mean()),
    )
    for estimate, value in found:
        low, high = estimate.interval()
        assert estimate.value == pytest.approx(value) and low < value < high < value + 1.0


def test_draws_of_a_statistic_are_those_of_the_drawn_items():
    """The sums behind a draw, against the statistic of the items written out."""
    rng = np.random.default_rng(2)
    keys, ratings = [int(i) for i in rng.integers(0, 12, 30)], rng.normal(size=30)
    scores = ratings + rng.normal(size=30)
    draws = Bootstrap(keys, draws=20)
    times, owners = draws._drawn(30).astype(int), draws._owners(keys)
    items = [np.repeat(np.arange(30), row[owners]) for row in times]
    slope = [calibration.rating_slope(scores[i], ratings[i]) for i in items]
    np.testing.assert_allclose(draws.slope(keys, scores, ratings).drawn, slope, rtol=1e-9)
    pairs = np.array([baselines.pair_accuracy(scores[i], ratings[i], 0.5)[0] for i in items])
    whole = draws.pair_accuracy(keys, scores, ratings, 0.5)
    np.testing.assert_allclose(whole.drawn - whole.drawn.mean(), pairs - pairs.mean(), atol=1e-12)


@pytest.mark.parametrize("figure", ["pair_accuracy", "calibration_error"])
def test_of_many_answers_the_linear_part_of_a_draw_gives_the_interval_of_the_draw(figure, monkeypatch):
    rng = np.random.default_rng(4)
    ratings = rng.normal(size=500)
    scores, keys = ratings + rng.normal(size=500), [int(i) for i in rng.integers(0, 200, 500)]
    linear = getattr(Bootstrap(keys), figure)(keys, scores, ratings, 1.0).interval()
    monkeypatch.setattr(intervals, "MOST_EXACT", 500)
    exact = getattr(Bootstrap(keys), figure)(keys, scores, ratings, 1.0).interval()
    np.testing.assert_allclose(linear, exact, atol=0.05 * (exact[1] - exact[0]))


def test_of_many_answers_pairs_are_taken_among_some_and_the_interval_stays_as_narrow():
    rng = np.random.default_rng(3)
    ratings = rng.normal(size=6000)
    scores = ratings + rng.normal(size=6000)
    low, high = Bootstrap(range(6000), draws=200).pair_accuracy(range(6000), scores, ratings, 1.0).interval()
    some = slice(0, 1500)
    wide = Bootstrap(range(1500), draws=200).pair_accuracy(range(1500), scores[some], ratings[some], 1.0).interval()
    assert high - low == pytest.approx((wide[1] - wide[0]) / 2, rel=0.25)


@pytest.mark.filterwarnings("error")
def test_draws_that_hold_none_of_the_items_say_nothing_and_warn_of_nothing():
    """Two of thirty prompts have pairs: most draws hold a few answers of them, or none."""
    draws, keys, two = Bootstrap(range(30)), [0, 0, 1, 1], np.array([0.0, 1.0, 0.0, 2.0])
    for found in (draws.slope(keys, two, two), draws.pair_accuracy(keys, two, two, 0.5), draws.mean(keys, two),
                  draws.calibration_error(keys, two, two, 0.5), draws.calibration_error_of(keys, two)):  # fmt: skip
        assert np.isnan(found.drawn).any() and math.isfinite(found.value) and found.clusters == 2


def test_records_without_a_prompt_are_clusters_of_their_own():
    records = [Record("Q", ["a"]), Record("Q", ["b"]), Record("", ["a"]), Record("", ["b"])]
    assert prompt_keys(records) == ["Q", "Q", "a", "b"]


def test_what_stands_beside_a_figure_is_known_by_it():
    figures = {"a/x": 1.0, "a/x_n": 3.0, "a/x_low": 0.0, "a/x_high": 2.0, "a/clip_low": 0.2, "a/n": 1.0}
    assert without(figures) == {"a/x": 1.0, "a/clip_low": 0.2, "a/n": 1.0}
    assert is_beside("a/x_low", figures) and not is_beside("a/clip_low", figures)
