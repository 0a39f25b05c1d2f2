"""Batches of given answers, in pairs or alone, as a pure function of (seed, step). NumPy only.

As in `lfjax.data.batching`, `steps_per_epoch` is the same in every epoch and epoch e is shuffled, and its pairs drawn,
by `np.random.default_rng((seed, e))`. Batches are of a few lengths: an epoch's rows are sorted by length within windows
of some batches, and the batches shuffled again. Rows beyond the last full batch sit out an epoch, other ones each time;
fewer rows than a batch are filled up with rows that do not count.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lfjax.data.answers import Answer, Judged, Pair, Paired, drawn_pairs
from lfjax.types import Answers, KtoBatch, PreferenceBatch

WINDOW = 16  # batches sorted by length together
NEAR = 64  # answers that are looked through for one to another prompt


class LengthSorted:
    """The order of rows whose lengths differ; see the module.

    Args:
      rows: an epoch's rows from its generator; as many in every epoch.
      lengths: targets of each answer. buckets: lengths T that batches have.
    """

    def __init__(
        self, rows: Callable[[np.random.Generator], list], lengths: Sequence[int], *, batch_size: int,
        buckets: Sequence[int], seed: int,
    ):  # fmt: skip
        self._rows, self._lengths, self._batch_size, self._seed = rows, lengths, batch_size, seed
        longest = max(lengths)
        used = bisect.bisect_left(sorted(buckets), longest) + 1
        self.buckets = sorted(buckets)[:used]
        self._epoch, self._batches = -1, []
        self.steps_per_epoch = len(self._of(0))

    def at(self, step: int) -> tuple[int, list]:
        """(T, the step's rows)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._of(epoch)[index]

    def once(self, rows: Sequence[Any]) -> Iterator[tuple[int, list[int]]]:
        """(T, places in `rows`) of batches that hold each row once, the shortest first."""
        return by_length([self._length(row) for row in rows], self.buckets, self._batch_size)

    def _of(self, epoch: int) -> list[tuple[int, list]]:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            rows, size = self._rows(rng), self._batch_size
            rows = [rows[i] for i in rng.permutation(len(rows))]
            rows = rows[: max(len(rows) // size * size, min(len(rows), size))]
            window = WINDOW * size
            parts = [sorted(rows[i : i + window], key=self._length) for i in range(0, len(rows), window)]
            batches = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
            self._epoch = epoch
            self._batches = [(self._bucket(batches[i]), batches[i]) for i in rng.permutation(len(batches))]
        return self._batches

    def _length(self, row) -> int:
        return max(self._lengths[place] for place in row[:2])

    def _bucket(self, rows: list) -> int:
        return bucket_of(self.buckets, max(map(self._length, rows)))


def by_length(lengths: Sequence[int], buckets: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(the bucket, `size` places or fewer) until each place in `lengths` was there once, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield bucket_of(buckets, lengths[places[-1]]), places


def bucket_of(buckets: Sequence[int], length: int) -> int:
    """The smallest of the ascending lengths that holds so many targets."""
    return buckets[bisect.bisect_left(buckets, length)]


def answer_rows(answers: Sequence[Answer], places: Sequence[int], length: int, pad_id: int, ref=None) -> Answers:
    """The answers at `places` (-1: none) in rows of `length` targets, right-padded.

    Args:
      ref: log-probabilities of all answers under the reference; None: 0.
    """
    tokens = np.full((len(places), length + 1), pad_id, np.int32)
    loss_mask, mask = (np.zeros((len(places), length), bool) for _ in range(2))
    logprobs = np.zeros(len(places), np.float32)
    for row, place in enumerate(places):
        if place >= 0:
            whole, start = answers[place]
            tokens[row, : len(whole)] = whole
            mask[row, : len(whole) - 1] = True
            loss_mask[row, start - 1 : len(whole) - 1] = True
            logprobs[row] = 0.0 if ref is None else ref[place]
    fields: tuple[Any, ...] = (tokens, loss_mask, mask, logprobs)
    return Answers(*fields)


class _Batches:
    """What batches of answers share.

    Args:
      answers: each sequence once. rows, batch_size, buckets, seed: as of `LengthSorted`.
      first: the rows of the first epoch.
    Attributes:
      ref: [answers] float32, log-probabilities under the reference; None until they are known.
    """

    def __init__(
        self, answers: Sequence[Answer], rows: Callable[[np.random.Generator], list], first: Sequence[Any], *,
        batch_size: int, buckets: Sequence[int], seed: int, pad_id: int,
    ):  # fmt: skip
        self.answers, self.batch_size, self.pad_id, self._first = answers, batch_size, pad_id, first
        self.ref: np.ndarray | None = None
        lengths = [len(answer.tokens) - 1 for answer in answers]
        self._order = LengthSorted(rows, lengths, batch_size=batch_size, buckets=buckets, seed=seed)
        self.steps_per_epoch, self.buckets = self._order.steps_per_epoch, self._order.buckets

    def length_at(self, step: int) -> int:
        """T of the step's batch."""
        return self._order.at(step)[0]

    def batch_at(self, step: int):
        """The step's rows, as `build` gives them."""
        length, rows = self._order.at(step)
        return self.build(rows, length)

    def evaluation(self) -> Iterator[tuple[list[int], Any]]:
        """(places, batch) of the first epoch's rows, each once; a last batch is filled with rows that do not count."""
        for length, places in self._order.once(self._first):
            yield places, self.build([self._first[i] for i in places], length)

    def build(self, rows: Sequence[Any], length: int):
        """These rows, filled up to a batch, of `length` targets."""
        raise NotImplementedError


class PairBatches(_Batches):
    """Pairs of answers: those that people made, and in every epoch others drawn from the rated answers of a prompt.

    Args:
      min_gap, per_answer: as of `drawn_pairs`. seed, shape: as of `_Batches`.
    Attributes:
      pairs: of the first epoch: what a held-out split is judged on.
    """

    def __init__(self, paired: Paired, *, seed: int, min_gap: float, per_answer: int = 1, **shape: Any):
        def rows(rng: np.random.Generator) -> list[Pair]:
            return [*paired.given, *drawn_pairs(paired.rated, rng, min_gap=min_gap, per_answer=per_answer)]

        self.pairs = rows(np.random.default_rng((seed, 0)))
        super().__init__(paired.answers, rows, self.pairs, seed=seed, **shape)

    def build(self, rows: Sequence[Pair], length: int) -> PreferenceBatch:
        """These pairs, filled up to a batch, in rows of `length` targets."""
        filled = [*rows, *[Pair(-1, -1, 0.0)] * (self.batch_size - len(rows))]
        places = [pair.chosen for pair in filled], [pair.rejected for pair in filled]
        sides = [answer_rows(self.answers, side, length, self.pad_id, self.ref) for side in places]
        margin = np.array([pair.margin for pair in filled], np.float32)
        fields: tuple[Any, ...] = tuple(np.stack(pair, axis=1) for pair in zip(*sides, strict=True))
        fields += (margin, np.arange(self.batch_size) < len(rows))
        return PreferenceBatch(*fields)


class KtoBatches(_Batches):
    """Answers that people called good or bad, each with the answer of another prompt to its own prompt.

    Whose answer that is does not change from epoch to epoch, so that a reference is asked once.

    Attributes:
      answers: the judged ones, then the mismatched.
      calls: (place, place of its mismatched answer, whether good).
    """

    def __init__(self, judged: Judged, *, buckets: Sequence[int], **shape: Any):
        own, most = judged.answers, max(buckets) + 1
        answers = [*own, *(mismatched(own, place, most) for place in range(len(own)))]
        self.calls = [(place, len(own) + place, good) for place, good in judged.calls]
        super().__init__(answers, lambda rng: list(self.calls), self.calls, buckets=buckets, **shape)

    def build(self, rows: Sequence[tuple[int, int, bool]], length: int) -> KtoBatch:
        """These answers, filled up to a batch, in rows of `length` targets."""
        filled = [*rows, *[(-1, -1, False)] * (self.batch_size - len(rows))]
        own, other, good = zip(*filled, strict=True)
        sides = [answer_rows(self.answers, places, length, self.pad_id, self.ref) for places in (own, other)]
        fields: tuple[Any, ...] = (*sides, np.array(good), np.arange(self.batch_size) < len(rows))
        return KtoBatch(*fields)


def mismatched(answers: Sequence[Answer], place: int, most: int) -> Answer:
    """The prompt of the answer at `place` with the next answer to another prompt, in at most `most` tokens."""
    whole, start = answers[place]
    prompt = whole[:start]
    others = (answers[(place + step) % len(answers)] for step in range(1, min(len(answers), NEAR) + 1))
    other = next((a for a in others if a.tokens[: a.start] != prompt), answers[(place + 1) % len(answers)])
    answer = other.tokens[other.start :]
    room = max(most - start, 1)
    return Answer((*prompt, *(answer if len(answer) <= room else (*answer[: room - 1], answer[-1]))), start)
