"""A text longer than a model's context, cut so that every token is a target once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """One row: its tokens, and how many of the last of them are targets here."""

    tokens: list[int]
    targets: int


def windows(start: Sequence[int], text: Sequence[int], *, context: int, stride: int) -> Iterator[Window]:
    """Rows `start` + a stretch of `text`, of at most `context` + 1 tokens, whose targets are all of `text` once each.

    The first row has as many targets as fit, each later one the next `stride`; it begins as early as fits, so that a
    target has at least context + 1 - len(start) - stride tokens of text before it, or all there are. Without `start`
    nothing predicts the text's first token, which is then no target.

    Raises:
      ValueError: stride is below 1 or leaves no room for `start`.
    """
    room = context + 1 - len(start)  # for tokens of the text
    if not 1 <= stride <= context - max(len(start) - 1, 0):
        raise ValueError(f"stride is {stride}; at context {context} after {len(start)} tokens it must be 1 to {room}")
    done = min(len(text), room)
    if done > (not start):
        yield Window([*start, *text[:done]], done - (not start))
    while done < len(text):
        end = min(done + stride, len(text))
        yield Window([*start, *text[end - room : end]], end - done)
        done = end
