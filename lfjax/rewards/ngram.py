"""What a language model has to beat: an n-gram over the same tokens, which can learn as it reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class NGram:
    """Interpolated Kneser-Ney over ids 0 .. vocab_size - 1, with one discount D an order.

    p(w | h) = (max(c(h w) - D, 0) + D * types(h) * p(w | h')) / c(h), where h' is h without its first token, and the
    last of them is uniform. c counts occurrences at the highest order, and below it the different tokens that stood
    before; D = (n1 + 1) / (n1 + 2 n2 + 2) from the numbers of n-grams counted once and twice, the ones added so that
    it is never 0. Before a text stands a mark that is no token.

    Source: Kneser and Ney 1995; Chen and Goodman 1999, "An empirical study of smoothing techniques", section 3.
    """

    def __init__(self, vocab_size: int, *, order: int = 3):
        """Knows nothing: every id is as likely as another."""
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order is {order} and vocab_size {vocab_size}; both must be at least 1")
        self.vocab_size, self.order = vocab_size, order
        # of each length of context: context -> counts of what followed, and their sum; n-grams counted once and twice
        self._counts: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in range(order)]
        self._totals: list[dict[tuple[int, ...], int]] = [{} for _ in range(order)]
        self._once, self._twice = [0] * order, [0] * order

    def learn(self, tokens: Sequence[int], begin: int = 1) -> None:
        """Counts every token from index `begin` on, in the context before it."""
        for gram in self._grams(tokens, begin):
            self._count(gram)

    def logprobs(self, tokens: Sequence[int], begin: int = 1, *, learn: bool = False) -> np.ndarray:
        """log p(token | the order - 1 before it), in nats, of every token from `begin` on: [N - begin] float64.

        Args:
          learn: count each token right after it was predicted, so that a text is its own training data and no token is
            known before it was seen.
        """
        found = []
        for gram in self._grams(tokens, begin):
            found.append(self.probability(gram[:-1], gram[-1]))
            if learn:
                self._count(gram)
        return np.log(np.asarray(found, np.float64))

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | the last order - 1 ids of `context`); -1 stands for the mark before a text."""
        context = tuple(context)
        p = 1.0 / self.vocab_size
        for length in range(min(self.order, len(context) + 1)):
            before = context[len(context) - length :]
            counts = self._counts[length].get(before)
            if counts is None:
                break  # nor has a longer one been seen
            discount = (self._once[length] + 1) / (self._once[length] + 2 * self._twice[length] + 2)
            kept = max(counts.get(token, 0) - discount, 0.0)
            p = (kept + discount * len(counts) * p) / self._totals[length][before]
        return p

    def _grams(self, tokens: Sequence[int], begin: int):
        padded = (-1,) * (self.order - 1) + tuple(tokens)
        return (padded[index : index + self.order] for index in range(begin, len(tokens)))

    def _count(self, gram: tuple[int, ...]) -> None:
        token = gram[-1]
        for length in range(self.order - 1, -1, -1):
            before = gram[self.order - 1 - length : -1]
            counts = self._counts[length].setdefault(before, {})
            count = counts[token] = counts.get(token, 0) + 1
            self._totals[length][before] = self._totals[length].get(before, 0) + 1
            self._once[length] += (count == 1) - (count == 2)
            self._twice[length] += (count == 2) - (count == 3)
            if count > 1:
                break  # one more of a known n-gram is no new token before a shorter one
