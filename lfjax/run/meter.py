"""What a stage has cost, over all the processes that worked on it; and what checkpoints keep beside their state."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from lfjax.sharding import Step


class Meter:
    """What a stage has cost over all the processes that worked on it."""

    def __init__(self):
        self._began, self._compiled, self._compiling = time.perf_counter(), Counter(Step.compiled), Step.seconds
        self._seconds, self._parts, self._programs = 0.0, defaultdict(float), Counter()

    @contextlib.contextmanager
    def part(self, name: str):
        """Adds the time inside, but for that of compiling, to a part: "train", "evaluate" or "save"."""
        began, compiling = time.perf_counter(), Step.seconds
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - began - (Step.seconds - compiling)

    def seconds(self, name: str) -> float:
        """Of a part, so far."""
        return self._parts[name]

    def restore(self, reading: Mapping[str, Any]) -> None:
        """Adds what earlier processes had read."""
        self._seconds, self._programs = reading["seconds"], Counter(reading["programs"])
        for name, seconds in reading["parts"].items():
            self._parts[name] += seconds

    def read(self) -> dict[str, Any]:
        """{"seconds", "parts": {name: seconds, "compile" among them}, "programs": {name: times compiled}}.

        A program counts once, however many processes compiled it again.
        """
        compiled = Counter(Step.compiled) - self._compiled
        compiling = self._parts.get("compile", 0.0) + Step.seconds - self._compiling
        return {
            "seconds": self._seconds + time.perf_counter() - self._began,
            "parts": {**self._parts, "compile": compiling},
            "programs": dict(sorted((self._programs | compiled).items())),
        }


def _is_number(value: Any, low: float = -1e300) -> bool:
    """Sums of such are finite."""
    return isinstance(value, (int, float)) and low <= value <= 1e300


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_counts(value: Any) -> bool:
    return _are_numbers(value) and all(type(count) is int and count >= 0 for count in value.values())


def are_figures(value: Any) -> bool:
    """Of a step or a stage: numbers that may be NaN, texts, and null where there is none."""
    kinds = (str, float, type(None))
    return isinstance(value, dict) and all(isinstance(x, kinds) or _is_number(x) for x in value.values())


def _are_pending(value: Any) -> bool:
    """What `Window.pending` gives."""
    pairs = value.values() if isinstance(value, dict) else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, float) or _is_number(x) for x in pair)
        for pair in pairs
    )


# What a `Meter` reads: field -> whether a value can be one.
READING = {"seconds": functools.partial(_is_number, low=0.0), "parts": _are_numbers, "programs": _are_counts}


def _is_reading(value: Any) -> bool:
    return isinstance(value, dict) and all(fits(value.get(key)) for key, fits in READING.items())


def _is_best(value: Any) -> bool:
    """What `Best.saved` gives beside arrays; None in older checkpoints."""
    if not isinstance(value, dict):
        return value is None
    number = value.get("value") is None or _is_number(value["value"])
    return type(value.get("step")) is int and number and are_figures(value.get("figures"))


def check_extra(step: int, extra: Mapping[str, Any]) -> None:
    """Raises ValueError where what is beside a checkpoint is not what training leaves there."""
    kinds = {"figures": are_figures, "row": are_figures, "pending": _are_pending, "meter": _is_reading}
    kinds["best"] = _is_best
    wrong = [key for key, fits in kinds.items() if not fits(extra.get(key))]
    if type(extra.get("step")) is not int or extra["step"] != step:
        wrong.insert(0, "step")
    if wrong:
        raise ValueError(f"beside/metadata: not what training leaves: no {' and no '.join(wrong)} in it")
