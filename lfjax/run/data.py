"""The feedback records of a run, read once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import jax

from lfjax import terminal
from lfjax.config import Config, InputError
from lfjax.data.sources import Splits, load_records, rating_scale
from lfjax.data.table import table
from lfjax.records import Record

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # that a message tries


class Data:
    """The records that a config's `data` section names; read on first use."""

    def __init__(self, section: Config):
        self._section, self._told = section, False

    @functools.cached_property
    def records(self) -> Splits:
        """The feedback records: train, validation, test, and counts of what was left out."""
        return load_records(self._section)

    def tell(self) -> None:
        """Prints what there is, by split and kind of feedback, and what was left out; once."""
        if jax.process_index() == 0 and not self._told:
            self._told = True
            for line in table(self.records.counts):
                terminal.note(line)

    @functools.cached_property
    def rating_scale(self) -> tuple[float, float] | None:
        """The one scale of all the ratings; None where there are none."""
        return rating_scale([*self.records.train, *self.records.validation, *self.records.test])

    def file(self, split: str) -> str:
        """Where the records of a split come from, for messages."""
        data = self._section
        own = None if split == "train" else data[f"{split}_path"]
        return f"config.data.path {own or data.path}" if data.path else f"config.data.source {data.source!r}"

    def larger(self, split: str, enough: Callable[[list[Record]], bool]) -> str:
        """How a config gives a held-out split what is `enough`, as the end of a message; "" where nothing does."""
        data, key = self._section, f"{split}_fraction"
        if split == "train" or data[f"{split}_path"]:
            return ""
        if data.source == "vader":
            return ", or raise config.data.max_records" if data.max_records else ""
        for fraction in filter(lambda fraction: fraction > data[key], FRACTIONS):
            try:
                found = load_records(SimpleNamespace(**{**data.to_dict(), key: fraction}))
            except InputError:
                continue
            if enough(found[split]) and enough(found.train):
                return f", or set config.data.{key} to {fraction:g}, which would do"
        return ""

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
