"""Figures of a reward model and of its baselines on held-out answers, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lfjax.data.duplicates import SPLITS
from lfjax.records import mean_ratings
from lfjax.rewards import baselines, lexicon
from lfjax.rewards.intervals import SHARE, Bootstrap, Resampled, prompt_keys


def pair_figures(scores, examples, min_gap: float, prefix: str, *, unit: float = 1.0) -> dict[str, float]:
    """The figures of `pair_estimates`, every answer being one of many to one prompt."""
    prompts = ("",) * (1 + max(e.record for e in examples))
    return told(*pair_estimates(scores, examples, min_gap, prompts, unit=unit), prefix)


def pair_estimates(
    scores, examples, min_gap: float, prompts: Sequence[str], *, unit: float = 1.0
) -> tuple[dict[str, Resampled], dict[str, int]]:
    """(figures, numbers of pairs): pair accuracy by ratings over all examples, and within records by ranks.

    calibration_error is that of the pairs by ratings, or by ranks where there are none; so is pair_accuracy.

    Args:
      scores, examples, min_gap: in rating points. unit: of these, so many are a nat of the odds.
      prompts: of the records that the examples are of, each a cluster.
    """
    draws, owners = Bootstrap(prompts), [prompts[e.record] for e in examples]
    rated = [
        (key, s, r)
        for key, row, e in zip(owners, scores, examples, strict=True)
        for s, r in zip(row, e.ratings, strict=True)
        if r is not None
    ]
    out, pairs = {}, {}
    if rated:
        keys, *columns = zip(*rated, strict=True)
        values, ratings = (np.asarray(column, np.float64) for column in columns)
        out["pair_accuracy"] = draws.pair_accuracy(keys, values, ratings, min_gap)
        pairs["pairs"] = out["pair_accuracy"].n
        out["mse"] = draws.mean(keys, (values - ratings) ** 2)
        out["rating_slope"] = draws.slope(keys, values, ratings)
        out["calibration_error"] = draws.calibration_error(keys, values / unit, ratings, min_gap)
    ranked = [
        (key, float(row[i] - row[j]))
        for key, row, e in zip(owners, scores, examples, strict=True)
        for i, first in enumerate(e.ranks)
        for j, second in enumerate(e.ranks)
        if first is not None and second is not None and first < second
    ]
    if ranked:
        keys, differences = zip(*ranked, strict=True)
        accuracy = draws.mean(keys, np.heaviside(differences, 0.5))  # equal scores are half right
        out["ranked_pair_accuracy"], pairs["ranked_pairs"] = accuracy, accuracy.n
        if not pairs.get("pairs"):
            out["pair_accuracy"] = accuracy
            out["calibration_error"] = draws.calibration_error_of(keys, np.array(differences) / unit)
    return out, pairs


def told(found: Mapping[str, Resampled], pairs: Mapping[str, int], prefix: str) -> dict[str, float]:
    """Figures with their intervals, and the numbers of pairs."""
    bounds = {"mse": (0.0, math.inf), "rating_slope": (-math.inf, math.inf)}
    out = {f"{prefix}{name}": float(count) for name, count in pairs.items()}
    for name, figure in found.items():
        out |= figure.figures(f"{prefix}{name}", bounds.get(name, SHARE))
    return out


def reward_baselines(records, min_gap: float) -> dict[str, dict[str, Resampled]]:
    """Split -> the pair accuracy of a lexicon and of a ridge regression on words, of the same held-out pairs."""
    rated = {
        name: [(key, r.prompt_text + r.responses[i], v) for key, r in zip(prompt_keys(records[name]), records[name],
               strict=True) for i, v in mean_ratings(r).items()]
        for name in SPLITS
    }  # fmt: skip
    held_out = {name: rated[name] for name in ("validation", "test") if rated["train"] and rated[name]}
    texts = [text for rows in held_out.values() for _, text, _ in rows]
    if not texts:
        return {}
    _, train_texts, ratings = zip(*rated["train"], strict=True)
    guesses = {"lexicon": lexicon.compound_scores(texts), "ridge": baselines.ridge_scores(train_texts, ratings, texts)}
    found, first = {}, 0
    for name, rows in held_out.items():
        (keys, _, truth), part = zip(*rows, strict=True), slice(first, first + len(rows))
        draws, first = Bootstrap(prompt_keys(records[name])), first + len(rows)
        found[name] = {b: draws.pair_accuracy(keys, guess[part], truth, min_gap) for b, guess in guesses.items()}
    return found


def beside_baselines(own: Resampled | None, rivals: Mapping[str, Mapping[str, Resampled]]) -> dict[str, float]:
    """The baselines' pair accuracy in both splits, and how far the model's own is above them on the test split."""
    out = {}
    for split, prefix in (("validation", "reward/validation_"), ("test", "reward/")):
        out |= told({f"pair_accuracy_{name}": rival for name, rival in rivals.get(split, {}).items()}, {}, prefix)
    for name, rival in rivals.get("test", {}).items():
        out |= {} if own is None else (own - rival).figures(f"reward/pair_accuracy_over_{name}")
    return out
