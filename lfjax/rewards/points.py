"""Between the points of a file's ratings and the scores that a model learns: the same learning on every scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from lfjax.data.examples import RewardExample

GAPS = 8  # least gaps of a pair that a scale holds, where nobody says how many points one has


class Points(NamedTuple):
    """Between the file's rating points and the scores of training: nats = (rating - mean) / unit."""

    mean: float  # points
    unit: float  # points a nat


def gap_of(given: float | None, scale: tuple[float, float]) -> float:
    """Rating points between two answers of a pair: what the config gives, else an eighth of the scale."""
    return (scale[1] - scale[0]) / GAPS if given is None else given


def rating_mean(examples: list[RewardExample]) -> float | None:
    """The mean over every rated answer; None where nothing is rated."""
    ratings = [r for example in examples for r in example.ratings if r is not None]
    return math.fsum(ratings) / len(ratings) if ratings else None


def rating_deviation(examples: list[RewardExample]) -> float | None:
    """The deviation (biased) of the ratings, exactly 0 where all are equal; None where nothing is rated."""
    ratings = [r for example in examples for r in example.ratings if r is not None]
    if not ratings or min(ratings) == max(ratings):
        return 0.0 if ratings else None
    mean = math.fsum(ratings) / len(ratings)
    return math.sqrt(math.fsum((r - mean) ** 2 for r in ratings) / len(ratings))


def shifted(examples: list[RewardExample], mean: float, unit: float = 1.0) -> list[RewardExample]:
    """The examples with `mean` taken from every rating, which is then so many `unit`s, as margins are; copies."""
    return [
        dataclasses.replace(
            example,
            ratings=[None if r is None else (r - mean) / unit for r in example.ratings],
            margin=example.margin / unit,
        )
        for example in examples
    ]


def told_in_points(step: Callable, metric: str, unit: float) -> Callable:
    """The step, which learns in nats, with its squared error `metric` in rating points."""

    def told(*arguments, **keywords):
        state, metrics = step(*arguments, **keywords)
        error = metrics.get(metric)
        return state, metrics if error is None else {**metrics, metric: error._replace(sum=error.sum * unit**2)}

    return told


def scaled_head(params, factor: float):
    """The parameters of a model whose scores are `factor` times as large."""
    return {**params, "head": {name: leaf * factor for name, leaf in params["head"].items()}}
