"""What is said of a reward model: figures on held-out answers."""

import numpy as np
import pytest

from lfjax.data.examples import RewardExample
from lfjax.records import Rating, Record
from lfjax.rewards.intervals import prompt_keys
from lfjax.rewards.points import rating_deviation, rating_mean, shifted
from lfjax.stages.reward_figures import beside_baselines, pair_estimates, pair_figures, reward_baselines


def example(ratings, ranks=None) -> RewardExample:
    count = len(ratings)
    return RewardExample([[1, 2]] * count, list(ratings), list(ranks or [None] * count))


def test_pairs_with_equal_scores_are_half_right_by_ratings_and_by_ranks():
    rated, ranked = example([1.0]), example([None, None, None], ranks=[0, 1, 1])
    scores = [np.array([0.5]), np.array([2.0]), np.array([0.5, 0.5, 0.1])]
    figures = pair_figures(scores, [rated, example([3.0]), ranked], 1.0, "reward/")
    assert figures["reward/pair_accuracy"] == 1.0 and figures["reward/pairs"] == 1
    assert figures["reward/ranked_pair_accuracy"] == 0.75
    assert pair_figures([np.zeros(3)], [ranked], 1.0, "")["pair_accuracy"] == 0.5


def test_the_squared_error_is_over_all_rated_answers():
    figures = pair_figures([np.array([1.0, 9.0]), np.array([0.0])], [example([2.0, None]), example([3.0])], 1.0, "")
    assert figures["mse"] == pytest.approx((1 + 9) / 2)


def test_calibration_is_that_of_the_pairs_by_ratings_and_else_of_those_by_ranks():
    rated, ranked = example([3.0, 1.0]), example([None, None], ranks=[0, 1])
    sure, unsure = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    error = 1 - 1 / (1 + np.exp(-2.0))
    assert pair_figures([sure, unsure], [rated, ranked], 1.0, "")["calibration_error"] == pytest.approx(error)
    assert pair_figures([unsure], [ranked], 1.0, "")["calibration_error"] == pytest.approx(1 - error)
    assert pair_figures([sure], [rated], 1.0, "reward/")["reward/rating_slope"] == pytest.approx(1.0)
    far = pair_figures([unsure, np.zeros(1)], [ranked, example([1.0])], 1.0, "")  # a rating, but no pair of them
    assert far["pairs"] == 0
    assert far["pair_accuracy"] == 0.0 and far["calibration_error"] == pytest.approx(1 - error)
    assert "rating_slope" not in pair_figures([unsure], [ranked], 1.0, "")


def test_centred_ratings_have_mean_zero_and_the_gaps_they_had():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 6, 40).astype(float)
    train = [example([value, None, 3.0]) for value in values] + [example([None], ranks=[0])]
    mean = rating_mean(train)
    assert mean == pytest.approx(np.mean([*values, *[3.0] * 40]))
    centred = shifted(train, mean)
    found = [r for e in centred for r in e.ratings if r is not None]
    assert np.mean(found) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose([e.ratings[0] - e.ratings[2] for e in centred[:-1]], values - 3.0)
    assert centred[-1] == train[-1] and all(e.ratings[1] is None for e in centred[:-1])
    assert [e.ratings[0] for e in train[:-1]] == values.tolist()


def test_without_ratings_there_is_no_mean_and_without_differences_no_deviation():
    ranked = example([None, None], ranks=[0, 1])
    assert rating_mean([ranked]) is None and rating_deviation([ranked]) is None
    assert rating_deviation([example([0.1]), example([0.1, 0.1])]) == 0.0


def test_ratings_and_margins_in_units_of_their_deviation():
    train = [example([1.0, 5.0]), example([None, 3.0])]
    train[1].margin = 4.0
    unit = rating_deviation(train)
    assert unit == pytest.approx(np.std([1.0, 5.0, 3.0]))
    first, second = shifted(train, 3.0, unit)
    np.testing.assert_allclose([*first.ratings, second.ratings[1]], np.array([-2.0, 2.0, 0.0]) / unit)
    assert second.margin == pytest.approx(4.0 / unit) and train[1].margin == 4.0


def test_the_odds_are_those_of_scores_in_units():
    rated, scores = [example([3.0, 1.0])], [np.array([30.0, 10.0])]
    figures = pair_figures(scores, rated, 1.0, "", unit=10.0)
    assert figures["calibration_error"] == pytest.approx(1 - 1 / (1 + np.exp(-2.0)))


def test_the_baselines_stand_beside_the_model_with_the_interval_of_the_difference():
    """A model that is the ridge itself is ahead by nothing; one that knows the ratings is ahead beyond doubt."""
    rng, words = np.random.default_rng(0), ("good", "fine", "poor", "bad")

    def record(i):
        value = int(rng.integers(0, 4))
        return Record(f"Question {i % 40}", [f"{words[value]} {rng.integers(9)}"], [Rating(0, 4.0 - value, (1.0, 4.0))])

    sizes = (("train", 60), ("validation", 30), ("test", 80))
    splits = {name: [record(i) for i in range(count)] for name, count in sizes}
    rivals = reward_baselines(splits, 1.0)
    out = beside_baselines(rivals["test"]["ridge"], rivals)
    assert out["reward/pair_accuracy_over_ridge"] == 0.0 == out["reward/pair_accuracy_over_ridge_high"]
    for figure in ("reward/pair_accuracy_ridge", "reward/validation_pair_accuracy_lexicon"):
        assert {f"{figure}{part}" for part in ("", "_n", "_low", "_high")} <= out.keys()
    known = [RewardExample([[1]], [r.feedback[0].value], [None], record=i) for i, r in enumerate(splits["test"])]
    own, _ = pair_estimates([np.array(e.ratings) for e in known], known, 1.0, prompt_keys(splits["test"]))
    ahead = beside_baselines(own["pair_accuracy"], rivals)
    assert ahead["reward/pair_accuracy_over_lexicon_low"] > 0.1
