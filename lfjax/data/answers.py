"""Answers of records, each once, with where it begins in its sequence; what people said of them, in pairs or alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lfjax.data.examples import complete, judgements
from lfjax.losses.ratings import least_gap
from lfjax.records import Record
from lfjax.tokenizers import Tokenizer


class Answer(NamedTuple):
    """A complete sequence: BOS + prompt + answer + EOS."""

    tokens: tuple[int, ...]
    start: int  # tokens before the answer


class Pair(NamedTuple):
    """Two answers, as places in a list of them."""

    chosen: int
    rejected: int
    margin: float  # how much better the chosen one is; 0 where nobody said


@dataclasses.dataclass
class Paired:
    """The answers of records in pairs.

    Attributes:
      answers: each sequence once.
      given: pairs that people made, by a preference, a ranking or an edit.
      rated: of every prompt with several rated answers, (place, mean rating) of each, from which pairs are drawn.
      counts: what was read and left out: answers, cut (of them), empty, equal_pairs.
    """

    answers: list[Answer]
    given: list[Pair]
    rated: list[list[tuple[int, float]]]
    counts: Counter[str]


class Collected:
    """Answers by their sequence."""

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self.answers: list[Answer] = []
        self.counts: Counter[str] = Counter()
        self._places: dict[Answer, int] = {}
        self._tokenizer, self._most = tokenizer, max_length

    def place(self, record: Record, text: str) -> int | None:
        """Where the answer is in `answers`; None for an empty one, which nothing is learnt from."""
        self.counts["answers"] += 1
        if not text:
            self.counts["empty"] += 1
            return None
        made = complete(record, text, self._tokenizer, self._most)
        self.counts["cut"] += made.cut
        answer = Answer(tuple(made.tokens), min(made.start, len(made.tokens) - 1))
        place = self._places.setdefault(answer, len(self.answers))
        if place == len(self.answers):
            self.answers.append(answer)
        return place


def paired_answers(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    scale: tuple[float, float] = (0.0, 1.0),
    neighbours: bool = False,
) -> Paired:
    """Pairs of preferences, rankings and edits, and the rated answers of every prompt.

    Answers that are equal, in the file or once cut, are one: a pair of them is none, and is counted. Ties in a ranking
    make no pair. Ratings of one answer count as their mean; answers of different records with one prompt are rated
    together (of texts without a prompt that is all of them).

    Args:
      max_length: of a complete sequence, in tokens; longer ones lose the prompt's start, then the answer's end.
      scale: of the run's ratings, for labels true and false.
      neighbours: of a ranking only answers next to each other; else every two.
    """
    collected, given = Collected(tokenizer, max_length), []
    ratings: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for texts, values, ranks, margin in judgements(record, scale):
            places = [collected.place(record, text) for text in texts]
            for place, value in zip(places, values, strict=True):
                if place is not None and value is not None:
                    ratings.setdefault(repr(record.prompt), {}).setdefault(place, []).append(value)
            for better, worse in _ordered(ranks, neighbours):
                chosen, rejected = places[better], places[worse]
                if chosen is None or rejected is None:
                    continue
                if chosen == rejected:
                    collected.counts["equal_pairs"] += 1
                else:
                    given.append(Pair(chosen, rejected, margin))
    means = [[(place, math.fsum(v) / len(v)) for place, v in group.items()] for group in ratings.values()]
    return Paired(collected.answers, given, [group for group in means if len(group) > 1], collected.counts)


def _ordered(ranks: Sequence[int | None], neighbours: bool) -> list[tuple[int, int]]:
    """(better, worse) places of a ranking; none of a judgement without ranks."""
    ranked = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
    steps = {rank: number for number, rank in enumerate(sorted({rank for rank, _ in ranked}))}
    found = []
    for (a, i), (b, j) in itertools.permutations(ranked, 2):
        if steps[a] < steps[b] and (not neighbours or steps[b] - steps[a] == 1):
            found.append((i, j))
    return found


def drawn_pairs(
    rated: Iterable[Sequence[tuple[int, float]]], rng: np.random.Generator, *, min_gap: float, per_answer: int
) -> list[Pair]:
    """`per_answer` pairs of every answer with another of its prompt at least `min_gap` rating points away, at random.

    As many whatever the generator: (number of answers that have a partner) x `per_answer`. n answers take n log n
    steps: their square is never made. The pair's margin is the gap.
    """
    found = []
    for group in rated:
        places = np.array([place for place, _ in group])
        values = np.array([value for _, value in group], np.float64)
        order = np.argsort(values, kind="stable")
        places, values = places[order], values[order]
        gap = least_gap(min_gap)
        sides = ("right", "left") if gap > 0 else ("left", "right")  # equal ratings are never apart
        below = np.searchsorted(values, values - gap, side=sides[0])  # so many lie far enough below
        above = np.searchsorted(values, values + gap, side=sides[1])  # from here on they lie far enough above
        partners = below + len(values) - above
        for own in np.flatnonzero(partners):
            for choice in rng.integers(partners[own], size=per_answer):
                other = choice if choice < below[own] else above[own] + choice - below[own]
                better, worse = (own, other) if values[own] > values[other] else (other, own)
                margin = float(values[better] - values[worse])
                found.append(Pair(int(places[better]), int(places[worse]), margin))
    return found


@dataclasses.dataclass
class Judged:
    """Answers that people called good or bad, each once for each of the two that it was called.

    Attributes:
      answers: each sequence once.
      calls: (place, whether good).
      counts: as of `Paired`; "undecided": rated at the threshold.
    """

    answers: list[Answer]
    calls: list[tuple[int, bool]]
    counts: Counter[str]


def judged_answers(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    threshold: float,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Judged:
    """What people called good or bad: labels, ratings above or below a threshold, both answers of a pair.

    A label true is good and false is bad, a number is as a rating; a mean rating at the threshold says nothing. Of a
    preference, an edit and a ranking's ends the better answer is good and the other bad, where they differ.

    Args: as of `paired_answers`.
      threshold: in rating points.
    """
    collected, calls = Collected(tokenizer, max_length), {}
    for record in records:
        for texts, values, ranks, _ in judgements(record, scale):
            places = [collected.place(record, text) for text in texts]
            for place, value in zip(places, values, strict=True):
                if place is not None and value is not None:
                    collected.counts["undecided"] += value == threshold
                    calls |= {(place, value > threshold): None} if value != threshold else {}
            ordered = _ordered(ranks, neighbours=False)
            ends = {i for i, _ in ordered} ^ {j for _, j in ordered}  # above all others or below all others
            for better, worse in ordered:
                chosen, rejected = places[better], places[worse]
                if chosen == rejected:
                    collected.counts["equal_pairs"] += 1
                elif {better, worse} <= ends and chosen is not None and rejected is not None:
                    calls |= {(chosen, True): None, (rejected, False): None}
    return Judged(collected.answers, list(calls), collected.counts)


def is_called(record: Record) -> bool:
    """Whether `judged_answers` can find a call in it: a label that is no word, a rating, or an order of answers."""
    return any(True for _ in judgements(record))
