import itertools
import math

import numpy as np
import pytest
import vader_package

from lfjax.data import vader
from lfjax.rewards import baselines, diversity, lexicon


def brute_pair_accuracy(scores, ratings, gap):
    right, pairs = 0.0, 0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if ratings[i] - ratings[j] > 0 and ratings[i] - ratings[j] >= gap - 1e-9:
            pairs += 1
            right += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return (right / pairs if pairs else math.nan), pairs


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0, 5.0])
def test_pair_accuracy_is_the_count_over_all_pairs(gap):
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 30, 60) / 10
    scores = np.round(ratings + rng.normal(size=60), 1)
    accuracy, pairs = baselines.pair_accuracy(scores, ratings, gap)
    expected, count = brute_pair_accuracy(scores, ratings, gap)
    assert pairs == count and (accuracy == pytest.approx(expected) or (math.isnan(accuracy) and count == 0))


def test_pair_accuracy_of_perfect_reversed_and_constant_scores():
    ratings = np.linspace(-4, 4, 50)
    assert baselines.pair_accuracy(ratings**3, ratings)[0] == 1.0
    assert baselines.pair_accuracy(-ratings, ratings)[0] == 0.0
    assert baselines.pair_accuracy(np.zeros(50), ratings)[0] == 0.5


def test_a_pair_exactly_the_gap_apart_counts_whatever_the_rounding():
    assert baselines.pair_accuracy([0.0, 1.0], [0.1, 1.1])[1] == 1
    assert baselines.pair_accuracy([0.0, 1.0], [0.1, 1.09])[1] == 0


def test_pair_accuracy_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="must be"):
        baselines.pair_accuracy([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        baselines.pair_accuracy([1.0, math.nan], [1.0, 2.0])


def test_ridge_learns_words_and_pairs_of_words():
    train = ["good film", "not good", "bad film", "not bad"] * 5
    scores = baselines.ridge_scores(train, [1.0, -1.0, -1.0, 1.0] * 5, ["not bad", "not good", "good film"])
    assert scores[0] > 0.5 and scores[1] < -0.5 and scores[2] > 0.5


def test_ridge_is_the_same_every_time():
    texts = [f"word{i % 7} word{i % 5}" for i in range(50)]
    ratings = [float(i % 7) for i in range(50)]
    first, second = (baselines.ridge_scores(texts, ratings, texts) for _ in range(2))
    assert np.array_equal(first, second)


def test_ridge_on_texts_without_words_gives_the_mean_rating():
    assert baselines.ridge_scores([":)", "!"], [1.0, 4.0], ["fine", "?", ""]).tolist() == [2.5, 2.5, 2.5]


def test_the_judge_calls_praise_positive_and_blame_not():
    texts = ["This is great, I love it!", "This is terrible, I hate it.", "The table has four legs.", ""]
    scores = lexicon.compound_scores(texts)
    assert scores[0] > 0.5 and scores[1] < -0.5 and scores[2] == scores[3] == 0.0
    assert lexicon.positive_share(texts) == 0.25
    with pytest.raises(ValueError, match="at least one"):
        lexicon.positive_share([])


def test_the_judge_as_a_reward_function_reads_prompt_and_response():
    scores = lexicon.vader_reward(["This is ", "This is "], ["great", "awful"], [None, None])
    assert scores == lexicon.compound_scores(["This is great", "This is awful"]).tolist()


def test_distinct2_counts_bigrams_inside_texts_only():
    assert diversity.distinct2(["a b c", "a B"]) == pytest.approx(2 / 3)  # (a b) (b c) (a b)
    assert diversity.distinct2(["a b", "c d"]) == 1.0
    assert diversity.distinct2(["a", ""]) == 0.0


def samples(words, count=600, vocabulary=40, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(0, vocabulary, words))) for _ in range(count)]


def test_plain_distinct2_rises_as_texts_shorten_and_matched_distinct2_does_not():
    long, short = samples(20), samples(5)
    assert diversity.distinct2(short) > 1.5 * diversity.distinct2(long)
    assert diversity.matched_distinct2(short) == pytest.approx(diversity.matched_distinct2(long), rel=0.05)


def test_a_collapse_to_few_words_shows():
    assert diversity.matched_distinct2(samples(2)) < 0.7 * diversity.matched_distinct2(samples(20))
    assert diversity.matched_distinct2(["is awesome ."] * 600) == 2 / 2000


def test_matched_distinct2_of_too_few_samples_is_not_a_number():
    assert math.isnan(diversity.matched_distinct2(samples(20, count=511)))
    assert diversity.matched_distinct2(samples(20, count=511), min_samples=100) > 0


def test_unique_share_ignores_case_and_spacing():
    assert diversity.unique_share(["A b", "a  B", "c"]) == pytest.approx(2 / 3)
    assert diversity.unique_share([]) == 0.0


def test_the_lexicon_and_ridge_reach_their_known_accuracy_on_the_rated_sentences(tmp_path, capsys):
    """Over twenty 5 % splits of this data ridge gets 0.82 to 0.84 and the lexicon 0.735 to 0.767."""
    splits, _ = vader.load(vader_package.fill_cache(tmp_path))
    train, test = (
        ([record.responses[0] for record in splits[name]], [record.feedback[0].value for record in splits[name]])
        for name in ("train", "test")
    )
    by_lexicon, pairs = baselines.pair_accuracy(lexicon.compound_scores(test[0]), test[1])
    by_ridge, _ = baselines.pair_accuracy(baselines.ridge_scores(*train, test[0]), test[1])
    positive = lexicon.positive_share(test[0])
    with capsys.disabled():
        print(f"\n{pairs} test pairs: lexicon {by_lexicon:.4f}, ridge {by_ridge:.4f}; positive {positive:.3f}")
    assert by_lexicon == pytest.approx(0.736, abs=0.003)
    assert by_ridge == pytest.approx(0.823, abs=0.003)
    assert positive == pytest.approx(0.523, abs=0.01)
