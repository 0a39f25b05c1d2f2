import itertools
import math

import numpy as np
import pytest

from lfjax.rewards.ngram import NGram


def text_of(length, vocab, seed=0):
    """A Markov chain, so that contexts say something."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(vocab, 0.3), vocab)
    tokens = [0]
    for _ in range(length):
        tokens.append(int(rng.choice(vocab, p=rows[tokens[-1]])))
    return tokens


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_context(order):
    model = NGram(7, order=order)
    for learned in ([], [3], text_of(60, 7), [5] * 40):  # nothing, one token, much, one token again and again
        model.learn(learned)
        for context in itertools.product(range(-1, 7), repeat=order - 1):
            found = [model.probability(context, token) for token in range(7)]
            assert math.fsum(found) == pytest.approx(1.0, abs=1e-12) and min(found) > 0.0


def kneser_ney(tokens, vocab, order, context, token):
    """From the definition: sets and counts of all n-grams, made anew for every question."""
    padded = [-1] * (order - 1) + list(tokens)
    whole = [tuple(padded[i : i + order]) for i in range(1, len(tokens))]
    lists = {order: whole}
    for size in range(order - 1, 0, -1):
        lists[size] = [gram[1:] for gram in sorted(set(lists[size + 1]))]  # one of each kind: continuation counts
    p = 1.0 / vocab
    for size in range(1, order + 1):
        history = tuple(context[len(context) - size + 1 :])
        grams = lists[size]
        counts = {gram: grams.count(gram) for gram in set(grams)}
        followers = {gram: n for gram, n in counts.items() if gram[:-1] == history}
        if not followers:
            return p
        once, twice = (sum(n == k for n in counts.values()) for k in (1, 2))
        discount = (once + 1) / (once + 2 * twice + 2)
        own = max(followers.get((*history, token), 0) - discount, 0.0)
        p = (own + discount * len(followers) * p) / sum(followers.values())
    return p


@pytest.mark.parametrize("order", [1, 2, 3])
def test_is_kneser_ney_by_its_definition(order):
    tokens, model = text_of(50, 5), NGram(5, order=order)
    model.learn(tokens)
    for context in itertools.product(range(-1, 5), repeat=order - 1):
        for token in range(5):
            assert model.probability(context, token) == pytest.approx(kneser_ney(tokens, 5, order, context, token))


def test_learning_as_it_reads_never_knows_a_token_before_it_was_seen():
    tokens, reading = text_of(40, 6), NGram(6)
    found = reading.logprobs(tokens, learn=True)
    assert found[0] == pytest.approx(-math.log(6))
    for index in range(1, len(tokens)):
        before = NGram(6)
        before.learn(tokens[:index])
        assert found[index - 1] == pytest.approx(
            math.log(before.probability(([-1, -1, *tokens])[index : index + 2], tokens[index]))
        )


def test_contexts_help_where_the_text_has_them():
    train, test = text_of(3000, 8, seed=1), text_of(3000, 8, seed=1)[1500:]
    scores = []
    for order in (1, 2):
        model = NGram(8, order=order)
        model.learn(train[:1500])
        scores.append(model.logprobs(test).mean())
    assert scores[1] > scores[0] + 0.2
