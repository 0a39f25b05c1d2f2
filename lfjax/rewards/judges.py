"""Ridge regression as a judge: fitted to ratings that no training saw, where a config names no judge of its own.

It reads words and pairs of words, so it knows what people who rated these texts praise in them, and nothing else. How
well it does is told of texts that it was not fitted to either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lfjax.records import Record, mean_ratings
from lfjax.rewards.baselines import fit_ridge
from lfjax.rewards.intervals import Bootstrap, Resampled, prompt_keys
from lfjax.rewards.points import gap_of

FOLDS = 5
FEWEST = 20  # rated answers


class RatingJudge(NamedTuple):
    """What gives texts ratings, in rating points, and how it does on texts that it was not fitted to.

    `accuracy`: the share of pairs of held-out answers `gap` rating points apart that it puts in people's order.
    """

    ratings_of: Callable[[Sequence[str]], np.ndarray]
    accuracy: Resampled
    gap: float


def judged_text(record: Record, prompt: str, response: str) -> str:
    """What a judge of texts reads: prompt and response as one text, but a chat's response alone.

    The prompt of a chat is a template's words and its system text, which are no part of an answer.
    """
    return prompt + response if isinstance(record.prompt, str) else response


def fit_rating_judge(records: Sequence[Record], scale: tuple[float, float]) -> RatingJudge | None:
    """A judge from the ratings of these records; None: there are fewer than FEWEST, or all are equal.

    Its accuracy is cross-validated in FOLDS parts, the answers to a prompt in one of them, on pairs of answers an
    eighth of the scale apart.
    """
    rated = [
        (key, judged_text(record, record.prompt_text, record.responses[i]), value)
        for key, record in zip(prompt_keys(records), records, strict=True)
        for i, value in mean_ratings(record).items()
    ]
    if len(rated) < FEWEST or len({value for *_, value in rated}) < 2:
        return None
    keys, texts, ratings = (list(column) for column in zip(*rated, strict=True))
    truth, gap = np.asarray(ratings, np.float64), gap_of(None, scale)
    told = Bootstrap(keys).pair_accuracy(keys, _of_others(keys, texts, truth), truth, gap)
    return RatingJudge(fit_ridge(texts, ratings), told, gap)


def _of_others(keys: list[str], texts: list[str], ratings: np.ndarray) -> np.ndarray:
    """What a fit to the other folds says of each text, [N].

    Less the mean of these folds: it is low where the fold's own is high, and would turn its pairs around.
    """
    clusters = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    owners = np.arange(len(keys)) if len(clusters) == 1 else np.array([clusters[key] for key in keys])
    fold = np.random.default_rng(0).permutation(owners.max() + 1)[owners] % FOLDS
    said = np.zeros(len(texts))
    for part in np.unique(fold):
        others, own = np.flatnonzero(fold != part), np.flatnonzero(fold == part)
        fit = fit_ridge([texts[i] for i in others], ratings[others])
        said[own] = fit([texts[i] for i in own]) - ratings[others].mean()
    return said
