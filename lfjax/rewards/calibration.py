"""What a reward model's scores mean: whether its odds can be believed, and how many rating points a score is worth."""

from __future__ import annotations

import numpy as np

from lfjax.losses.ratings import least_gap


def rated_differences(scores: np.ndarray, ratings: np.ndarray, min_gap: float = 1.0, *, most: int = 2000) -> np.ndarray:
    """Score of the higher rated answer less that of the lower rated one, of all pairs that `pair_accuracy` counts. [P]

    Args:
      scores, ratings: [N], of the same answers in the same order.
      most: of more answers than this, so many are drawn, always the same ones: P grows as their square.
    """
    scores, ratings = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
    if len(ratings) > most:
        kept = np.random.default_rng(0).permutation(len(ratings))[:most]
        scores, ratings = scores[kept], ratings[kept]
    gap = ratings[:, None] - ratings[None, :]
    higher, lower = np.nonzero((gap > 0) & (gap >= least_gap(min_gap)))
    return scores[higher] - scores[lower]


def calibration_error(differences: np.ndarray, *, bins: int = 10) -> float:
    """Expected calibration error of P(the higher scored is the better answer) = sigmoid(|difference|), in [0, 1].

    sum_b n_b / P |mean probability in b - share of b where the higher scored is better|, over bins of equal count.
    Equal scores are half right. Pairs with one probability share their mean outcome, so no order of them matters.

    Args:
      differences: [P] of `rated_differences`: score of the better less that of the worse answer.
    Returns:
      0 where the odds are right; NaN where there is no pair.
    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3; bins of equal count: Nixon et al. 2019, arXiv:1904.01685; of
      preference models: Bai et al. 2022, arXiv:2204.05862, section 3.3.
    """
    if not len(differences):
        return float("nan")
    return float(sum(abs(excess.sum()) for _, excess in binned_excess(differences, bins=bins)) / len(differences))


def binned_excess(differences: np.ndarray, *, bins: int = 10) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bins of `calibration_error`: which pairs are in each, and by how much the odds of each are too high."""
    differences = np.asarray(differences, np.float64)
    probability, group, count = np.unique(
        1.0 / (1.0 + np.exp(-np.abs(differences))), return_inverse=True, return_counts=True
    )
    excess = probability - np.bincount(group, np.heaviside(differences, 0.5), minlength=len(count)) / count
    order = np.argsort(group, kind="stable")  # by probability
    return [(places, excess[group[places]]) for places in np.array_split(order, bins)]


def rating_slope(scores: np.ndarray, ratings: np.ndarray) -> float:
    """Least-squares slope of rating on score, cov(score, rating) / var(score): rating points a point of score.

    1 where scores are in rating points; above 1 where they are too flat, below 1 where they are too steep.

    Args:
      scores, ratings: [N], of the same answers in the same order.
    Returns:
      NaN where all scores are equal.
    Source: Mincer and Zarnowitz 1969, "The evaluation of economic forecasts": an unbiased forecast has slope 1.
    """
    centred = np.asarray(scores, np.float64) - np.mean(scores)
    variance = float(np.sum(centred**2))
    return float(np.sum(centred * np.asarray(ratings, np.float64))) / variance if variance > 0 else float("nan")
