"""How varied a set of samples is: distinct-2, plain and matched.

Words are what white space parts, lower-cased, so texts of different tokenizers compare. A bigram never spans two texts.

Source: Li et al. 2016, arXiv:1510.03055 (distinct-n).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

MATCHED_BIGRAMS = 2000
MIN_SAMPLES = 512


def _bigrams(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        yield from itertools.pairwise(text.lower().split())


def distinct2(texts: Iterable[str]) -> float:
    """Unique bigrams over all bigrams, in [0, 1]; 0 where there is none.

    It falls with the number of bigrams, so shorter texts look more varied: compare by `matched_distinct2`.
    """
    bigrams = list(_bigrams(texts))
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def matched_distinct2(texts: Sequence[str], *, bigrams: int = MATCHED_BIGRAMS, min_samples: int = MIN_SAMPLES) -> float:
    """Unique bigrams among the first `bigrams` of the pooled texts, over `bigrams`: comparable whatever the length.

    Texts too short to fill the number are measured over it all the same, so a collapse to a word or two shows.

    Args:
      texts: samples in a fixed order, such as one of each held-out prompt.
      bigrams: how many are looked at.
      min_samples: how many texts there must be.
    Returns:
      A share in [0, 1]; nan with fewer than `min_samples` texts, which would not be comparable.
    """
    if len(texts) < min_samples:
        return float("nan")
    return len(set(itertools.islice(_bigrams(texts), bigrams))) / bigrams


def matched_distinct2_of(
    texts: Sequence[str], selections: Iterable[Iterable[int]], *, bigrams: int = MATCHED_BIGRAMS
) -> np.ndarray:
    """`matched_distinct2` of each selection, the numbers of its texts in their order: [R]."""
    numbers: dict[tuple[str, str], int] = {}
    coded = [np.array([numbers.setdefault(b, len(numbers)) for b in _bigrams([text])], np.int64) for text in texts]
    found = []
    for selection in selections:
        parts, size = [np.zeros(0, np.int64)], 0
        for text in selection:
            parts.append(coded[text])
            size += len(coded[text])
            if size >= bigrams:
                break
        found.append(len(np.unique(np.concatenate(parts)[:bigrams])) / bigrams)
    return np.array(found)


def unique_share(texts: Sequence[str]) -> float:
    """Different texts (white space and case aside) over texts, in [0, 1]; 0 where there is none."""
    return len({plain(text) for text in texts}) / len(texts) if texts else 0.0


def plain(text: str) -> str:
    """The text without what `unique_share` takes no notice of."""
    return " ".join(text.lower().split())
