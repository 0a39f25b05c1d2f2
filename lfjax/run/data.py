"""The feedback records of a run, read once."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax

from lfjax import terminal
from lfjax.config import Config
from lfjax.data.sources import Splits, left_out, load_records, rating_scale
from lfjax.records import Record


class Data:
    """The records that a config's `data` section names; read on first use."""

    def __init__(self, section: Config):
        self._section = section

    @functools.cached_property
    def records(self) -> Splits:
        """The feedback records: train, validation, test, and counts of what was left out."""
        found = load_records(self._section)
        for line in left_out(found.counts):
            note("data", line)
        return found

    @functools.cached_property
    def rating_scale(self) -> tuple[float, float] | None:
        """The one scale of all the ratings; None where there are none."""
        return rating_scale([*self.records.train, *self.records.validation, *self.records.test])

    def file(self, split: str) -> str:
        """Where the records of a split come from, for messages."""
        data = self._section
        own = None if split == "train" else data[f"{split}_path"]
        return f"config.data.path {own or data.path}" if data.path else f"config.data.source {data.source!r}"

    @property
    def figures(self) -> dict[str, float]:
        """data/*: how many records were found, merged and left out."""
        return {f"data/{name}": float(value) for name, value in self.records.counts.items()}


def note(stage: str, what: str) -> None:
    """One line on what a stage makes of its data."""
    if jax.process_index() == 0:
        terminal.note(f"note: stage {stage}: {what}")


def say(stage: str, what: str) -> None:
    """One line on what a stage is about to do, or has done."""
    if jax.process_index() == 0:
        terminal.note(f"{stage}: {what}")


def texts_of(records: Iterable[Record]) -> list[str]:
    """Prompt and response as one text, for every response that is not empty."""
    return [record.prompt_text + text for record in records for text in record.responses if text]
