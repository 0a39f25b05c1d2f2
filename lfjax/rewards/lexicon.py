"""The VADER lexicon as a judge: rules and a word list, no learning, so nothing trained here can have fitted it.

Source: C. J. Hutto and E. Gilbert, VADER, ICWSM 2014; the package vaderSentiment (3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

POSITIVE = 0.05  # the authors' threshold: compound above it is positive


@functools.cache
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def compound_scores(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1]; 0 for a text without a word of the lexicon. [N] float64."""
    return np.array([_analyzer().polarity_scores(text)["compound"] for text in texts], np.float64)


def positive_share(texts: Sequence[str]) -> float:
    """The share of texts with a compound score above 0.05, in [0, 1].

    Raises:
      ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("positive_share needs at least one text")
    return float(np.mean(compound_scores(texts) > POSITIVE))


def vader_reward(prompts: Sequence[str], responses: Sequence[str], records: Sequence[object]) -> list[float]:
    """A reward function (prompts, responses, records) -> scores: the compound score of prompt + response.

    Not for runs that are judged by the same lexicon.
    """
    del records
    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return compound_scores(whole).tolist()
