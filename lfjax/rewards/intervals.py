"""How far a held-out figure can be trusted: 95 % intervals by a seeded bootstrap over prompts.

Answers to one prompt are alike, so prompts are drawn with replacement, whole, and a figure is computed of each draw:
its spread is the figure's own. All figures of one `Bootstrap` see the same draws, so that the difference of two is
paired. The spread is laid around the figure itself (a draw repeats what it holds, which makes a diversity or an
absolute error differ on average), and widened by Student's t and sqrt(m / (m - 1)), as m prompts vary too little.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 13; whole clusters: Field and Welsh
2007, JRSS B 69; the widening: Hesterberg 2015, arXiv:1411.5279, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from lfjax.losses.ratings import least_gap
from lfjax.records import Record
from lfjax.rewards import baselines, calibration, diversity

LEVEL = 0.95
DRAWS, SLOW_DRAWS = 1000, 200  # the fewer for figures of which a draw takes longer
MOST_CLUSTERS = 4000  # more are drawn in so many groups
MOST_ANSWERS = 2000  # of more, pairs are taken among so many
MOST_EXACT = 400  # of more answers, what a draw changes in pairs is taken as linear, which errs by their inverse
SHARE = (0.0, 1.0)  # the bounds of a share
PARTS = ("n", "low", "high")  # what stands beside a figure, behind "_"


class Resampled(NamedTuple):
    """A figure, of how many things it is, what it is of every draw [R], and how many clusters were drawn from."""

    value: float
    n: int
    drawn: np.ndarray
    clusters: int

    def __sub__(self, other: Resampled) -> Resampled:  # type: ignore[override]
        """The difference, paired: both are of the same draws."""
        count = min(len(self.drawn), len(other.drawn))
        drawn = self.drawn[:count] - other.drawn[:count]
        return Resampled(self.value - other.value, min(self.n, other.n), drawn, min(self.clusters, other.clusters))

    def map(self, function: Callable) -> Resampled:
        """An increasing function of the figure."""
        return self._replace(value=float(function(self.value)), drawn=function(self.drawn))

    def interval(self, bounds: tuple[float, float] = (-math.inf, math.inf)) -> tuple[float, float]:
        """(low, high) of the 95 % interval, inside `bounds`; NaN where nothing can be drawn from.

        Of a share that is 0 or 1 no draw differs: its interval is the exact one of as many independent cases as there
        are clusters (Clopper and Pearson 1934).
        """
        drawn = self.drawn[np.isfinite(self.drawn)]
        if self.clusters < 2 or len(drawn) < 2:
            return math.nan, math.nan
        tail = (1.0 - LEVEL) / 2.0
        t, z = scipy.special.stdtrit(self.clusters - 1, 1.0 - tail), scipy.special.ndtri(1.0 - tail)
        stretch = float(t / z) * math.sqrt(self.clusters / (self.clusters - 1))
        low, high = self.value + stretch * (np.quantile(drawn, (tail, 1.0 - tail)) - drawn.mean())
        if bounds == SHARE and self.value in SHARE:
            rare = 1.0 - tail ** (1.0 / self.clusters)
            low, high = (0.0, rare) if self.value == 0.0 else (1.0 - rare, 1.0)
        return max(float(low), bounds[0]), min(float(high), bounds[1])

    def figures(self, name: str, bounds: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, float]:
        """The figure with `_n`, `_low` and `_high` beside it, those that are known; {} where it is not finite."""
        if not math.isfinite(self.value):
            return {}
        low, high = self.interval(bounds)
        beside = {"low": low, "high": high} if math.isfinite(low) and math.isfinite(high) else {}
        return {name: self.value, f"{name}_n": float(self.n), **{f"{name}_{k}": v for k, v in beside.items()}}


class Bootstrap:
    """Draws of clusters; a method gives a figure of items, each of which has the key of its cluster.

    Args:
      clusters: the keys of all items that there will be. Where all are one, the items themselves are drawn.
      draws, seed: how many, always the same ones.
    """

    def __init__(self, clusters: Iterable[Hashable], *, draws: int = DRAWS, seed: int = 0):
        self._number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
        self.clusters, self._draws, self._seed = len(self._number), draws, seed
        self._times: dict[int, np.ndarray] = {}

    def mean(
        self, keys: Sequence[Hashable], values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None
    ) -> Resampled:
        """sum(weight * value) / sum(weight) over the items; a weight is 1 where none are given."""
        values = np.asarray(values, np.float64)
        weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
        total, weight = self._sums(keys, np.stack([values * weights, weights], axis=1)).T
        whole = float((values * weights).sum() / weights.sum()) if len(values) else math.nan
        return self._resampled(keys, whole, _ratio(total, weight))

    def slope(self, keys: Sequence[Hashable], scores: np.ndarray, ratings: np.ndarray) -> Resampled:
        """`calibration.rating_slope`."""
        s, r = (np.asarray(x, np.float64) - np.mean(x) for x in (scores, ratings))
        n, s1, r1, s2, sr = self._sums(keys, np.stack([np.ones_like(s), s, r, s * s, s * r], axis=1)).T
        n = np.maximum(n, 1.0)  # of a draw without any of these items
        drawn = _ratio(sr - s1 * r1 / n, s2 - s1 * s1 / n)
        return self._resampled(keys, calibration.rating_slope(scores, ratings), drawn)

    def pair_accuracy(self, keys: Sequence[Hashable], scores, ratings, min_gap: float) -> Resampled:
        """`baselines.pair_accuracy`; its n is the number of pairs."""
        scores, ratings = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
        value, pairs = baselines.pair_accuracy(scores, ratings, min_gap)
        keys, few, higher, lower = self._pairs(keys, scores, ratings, min_gap)
        right = np.heaviside(few[higher] - few[lower], 0.5)
        drawn = _ratio(*(self._of_pairs(keys, higher, lower, x) for x in (right, np.ones_like(right))))
        drawn = value + (drawn - np.nanmean(drawn) if pairs else drawn) * math.sqrt(len(few) / max(len(scores), 1))
        return self._resampled(keys, value, drawn)._replace(n=pairs)

    def calibration_error(self, keys: Sequence[Hashable], scores, ratings, min_gap: float) -> Resampled:
        """`calibration.calibration_error` of the same pairs; every draw is told in the bins of the whole."""
        keys, few, higher, lower = self._pairs(keys, np.asarray(scores), np.asarray(ratings), min_gap)
        found, bins = np.zeros(self._draws), calibration.binned_excess(few[higher] - few[lower])
        for places, excess in bins:
            found += np.abs(self._of_pairs(keys, higher[places], lower[places], excess))
        drawn = _ratio(found, self._of_pairs(keys, higher, lower, np.ones(len(higher))))
        value = sum(abs(excess.sum()) for _, excess in bins) / len(higher) if len(higher) else math.nan
        if len(few) < len(scores):
            value = calibration.calibration_error(calibration.rated_differences(scores, ratings, min_gap))
        return self._resampled(keys, float(value), drawn)._replace(n=len(higher))

    def calibration_error_of(self, keys: Sequence[Hashable], differences: np.ndarray) -> Resampled:
        """`calibration.calibration_error` of pairs that are items themselves, in the bins of the whole."""
        counts = np.zeros((len(differences), 11))
        for bin_, (places, excess) in enumerate(calibration.binned_excess(differences)):
            counts[places, bin_] = excess
        counts[:, -1] = 1.0
        error = self.of_counts(keys, counts, lambda s: {"": np.abs(s[:, :-1]).sum(axis=1) / s[:, -1]})[""]
        return error._replace(value=calibration.calibration_error(differences))

    def of_counts(
        self, keys: Sequence[Hashable], counts: np.ndarray, figures: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    ) -> dict[str, Resampled]:
        """Figures of sums: `figures` takes [R K], the sums of the items' counts [N K], and gives each as [R]."""
        counts = np.asarray(counts, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a draw without any of these items
            whole, drawn = figures(counts.sum(axis=0)[None]), figures(self._sums(keys, counts))
        return {name: self._resampled(keys, float(value[0]), drawn[name]) for name, value in whole.items()}

    def distinct2(self, keys: Sequence[Hashable], texts: Sequence[str]) -> Resampled:
        """`diversity.matched_distinct2`."""
        value = diversity.matched_distinct2(texts)
        if not math.isfinite(value):
            return self._resampled(keys, value, np.zeros(0))
        owners = self._owners(keys)
        members = [np.flatnonzero(owners == i) for i in range(owners.max() + 1)]
        order = np.random.default_rng(self._seed).integers(len(members), size=(SLOW_DRAWS, len(members)))
        rows = ((i for cluster in draw for i in members[cluster]) for draw in order)
        return self._resampled(keys, value, diversity.matched_distinct2_of(texts, rows))

    def _resampled(self, keys: Sequence[Hashable], value: float, drawn: np.ndarray) -> Resampled:
        used = len(keys) if self.clusters == 1 else len(set(keys))
        return Resampled(value, len(keys), np.asarray(drawn), used)

    def _owners(self, keys: Sequence[Hashable]) -> np.ndarray:
        """The number of each item's cluster, [N]."""
        if self.clusters == 1:
            return np.arange(len(keys)) % MOST_CLUSTERS
        return np.array([self._number[key] for key in keys], np.int64) % MOST_CLUSTERS

    def _drawn(self, items: int) -> np.ndarray:
        """How often each cluster (of one cluster, each item) is in each draw, [R clusters] float32."""
        clusters = min(items if self.clusters == 1 else self.clusters, MOST_CLUSTERS)
        if clusters not in self._times:
            drawn = np.random.default_rng(self._seed).integers(clusters, size=(self._draws, clusters))
            drawn += clusters * np.arange(self._draws)[:, None]
            times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
            self._times[clusters] = times.astype(np.float32)
        return self._times[clusters]

    def _sums(self, keys: Sequence[Hashable], values: np.ndarray) -> np.ndarray:
        """Sums of the items' values [N K] in each draw, [R K]."""
        owners, times = self._owners(keys), self._drawn(len(keys))
        own = [np.bincount(owners, column, minlength=times.shape[1]) for column in values.T]
        return times.astype(np.float64) @ np.stack(own, axis=1)

    def _pairs(self, keys: Sequence[Hashable], scores: np.ndarray, ratings: np.ndarray, min_gap: float):
        """(keys, scores, higher, lower): pairs of numbers of answers, the first rated so far above the second."""
        kept = self._some(keys)
        gap = ratings[kept][:, None] - ratings[kept][None, :]
        pairs = np.nonzero((gap > 0) & (gap >= least_gap(min_gap)))
        return [keys[i] for i in kept], scores[kept], *pairs

    def _of_pairs(self, keys: Sequence[Hashable], higher: np.ndarray, lower: np.ndarray, values: np.ndarray):
        """The sum of the pairs' values, each as often as both its answers are in a draw, [R].

        Of many answers its linear part around the whole.
        """
        if len(keys) > MOST_EXACT:
            linear = np.bincount(higher, values, len(keys)) + np.bincount(lower, values, len(keys))
            return self._sums(keys, linear[:, None])[:, 0] - values.sum()
        matrix = np.zeros((len(keys), len(keys)))
        matrix[higher, lower] = values
        times = self._drawn(len(keys))[:, self._owners(keys)].astype(np.float64)
        return np.einsum("ri,ri->r", times @ matrix, times)

    def _some(self, keys: Sequence[Hashable]) -> np.ndarray:
        """The items of as many clusters as give at most MOST_ANSWERS, always the same ones, [N'] ascending."""
        if len(keys) <= MOST_ANSWERS:
            return np.arange(len(keys))
        owners = np.arange(len(keys)) if self.clusters == 1 else np.array([self._number[key] for key in keys])
        rank = np.random.default_rng(self._seed).permutation(owners.max() + 1)[owners]
        return np.sort(np.argsort(rank, kind="stable")[:MOST_ANSWERS])


def prompt_keys(records: Sequence[Record]) -> list[str]:
    """The cluster of each record: its prompt, or its text where it has none."""
    return [record.prompt_text or record.responses[0] for record in records]


def without(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures without what stands beside them."""
    return {name: value for name, value in figures.items() if not is_beside(name, figures)}


def is_beside(name: str, figures: Iterable[str]) -> bool:
    """Whether a figure is the n, low or high of another."""
    head, _, part = name.rpartition("_")
    return part in PARTS and f"{head}_n" in figures and head in figures


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where a draw holds nothing that counts."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) != 0)
