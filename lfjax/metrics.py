"""Host side of metrics: windows of Means fetched once a log interval, the run's log files, the progress bar.

The only place that writes run logs. `metrics.jsonl` and `samples.jsonl` hold nothing that depends on the clock, and
equal floats give equal text, so two runs can be compared byte for byte.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.progress
import rich.text

from lfjax import files
from lfjax.config import InputError
from lfjax.files import read_json, write_json
from lfjax.terminal import visible
from lfjax.trackers import SHOWN, Tracker
from lfjax.types import Mean

METRICS, TIMING, SAMPLES, SUMMARY = "metrics.jsonl", "timing.jsonl", "samples.jsonl", "summary.json"


class Window:
    """Adds up the Means of the steps of one log interval, without waiting for the device until `fetch`.

    Sums and weights are added one step after the other in float64 on the host, so that a run stopped inside an interval
    and resumed from `pending()` gives the same bits as one that was not.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._waiting: list[Mapping[str, Mean]] = []

    def add(self, metrics: Mapping[str, Mean]) -> None:
        """Takes a step's metrics, name -> Mean of scalars; device arrays stay where they are."""
        self._waiting.append(metrics)

    def _collect(self) -> None:
        waiting, self._waiting = self._waiting, []
        for metrics in jax.device_get(waiting):
            for name, (value, weight) in metrics.items():
                total, weights = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + float(value), weights + float(weight))

    def fetch(self) -> dict[str, float]:
        """Everything added since the last fetch, name -> sum / weight, in one transfer; what never counted is left out.

        The squared error of texts that nobody rated is no 0.
        """
        self._collect()
        sums, self._sums = self._sums, {}
        return {name: total / weight for name, (total, weight) in sorted(sums.items()) if weight}

    def pending(self) -> dict[str, list[float]]:
        """The interval's state so far, name -> [sum, weight], for a checkpoint. Waits for the device."""
        self._collect()
        return {name: list(pair) for name, pair in sorted(self._sums.items())}

    def restore(self, pending: Mapping[str, Sequence[float]]) -> None:
        """Goes on from what `pending` gave."""
        self._waiting = []
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in pending.items()}


class RunLog:
    """The log files of one run directory. Rows are appended and flushed at once; only process 0 writes anything.

    Trackers get a copy of each row, after it is in the file; `samples` but the first `trackers.SHOWN` of a call.

    To be cut back exactly on resume, everything a loop writes for step N must be written *before* it saves
    checkpoint N: a checkpoint at N means that the rows up to and including N are in the files.
    """

    def __init__(self, workdir: str | os.PathLike, *, process: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self.workdir = pathlib.Path(workdir)
        self._writes = process == 0
        self._trackers = tuple(trackers) if self._writes else ()
        if self._writes:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics.jsonl. Non-finite figures are written as null."""
        self._append(METRICS, [{"stage": stage, "step": int(step), **dict(sorted(values.items()))}])
        for tracker in self._trackers:
            tracker.metrics(stage, step, values)

    def timing(self, stage: str, step: int, **figures: float) -> None:
        """One row of timing.jsonl: `seconds` since such a row before, rates (tokens_per_s, mfu), parts of one step."""
        self._append(TIMING, [{"stage": stage, "step": int(step), **figures}])
        for tracker in self._trackers:
            tracker.timing(stage, step, figures)

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: prompt, response, score, logprob, kl, and set "before" or "after" where compared."""
        rows = list(rows)
        self._append(SAMPLES, [{"stage": stage, "step": int(step), **row} for row in rows])
        for tracker in self._trackers if rows else ():
            tracker.samples(stage, step, rows[:SHOWN])

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Adds figures, keys "stage/name", to summary.json: one flat sorted dict, replaced atomically.

        Raises:
          InputError: the file that is there is broken, or it cannot be written.
        """
        if self._writes:
            path = self.workdir / SUMMARY
            known = read_json(path, dict) if path.exists() else {}
            write_json(path, dict(sorted({**known, **figures}.items())))
        for tracker in self._trackers:
            tracker.summary(figures)

    def cut(self, stages: Sequence[str], stage: str, step: int) -> None:
        """Forgets what a resumed run will write again.

        Keeps the rows of stages before `stage` and the rows of `stage` up to and including `step`; a torn last line
        goes. step = -1 keeps nothing of `stage`.

        Args:
          stages: the run's stages in their order; `stage` is one of them.
          stage, step: where the run goes on: the step of the restored checkpoint.
        Raises:
          InputError: a line that is not the last is not a JSON object with a stage and a step.
        """
        if not self._writes:
            return
        stages = list(stages)
        here = stages.index(stage)
        earlier, later = set(stages[:here]), stages[here + 1 :]
        for name in (METRICS, TIMING, SAMPLES):
            _rewrite(
                self.workdir / name,
                lambda row: row["stage"] in earlier or (row["stage"] == stage and row["step"] <= step),
            )
        for tracker in self._trackers:
            tracker.cut(stage, step, [*later, *([stage] if step < 0 else [])])

    def close(self, *, finished: bool = False) -> None:
        """Ends what trackers write; `finished` says whether all stages are done."""
        for tracker in self._trackers:
            tracker.close(finished=finished)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._writes and rows:
            files.append(self.workdir / name, files.encoded("".join(_line(row) for row in rows)))


def _rewrite(path: pathlib.Path, keeps: Callable[[Any], bool]) -> None:
    """Leaves the rows that `keeps` says of; a torn last line goes."""
    if path.is_symlink():
        raise files.cannot_write(path, OSError(errno.ELOOP, "a link"))
    if not path.exists():
        return
    torn: str | None = None  # what is wrong with a line: the next one makes it an error
    with files.writing(path) as file:
        for number, line in files.lines(path):
            if torn:
                raise InputError(torn)
            try:
                row = files.json_value(line)
                if line.endswith(b"\n") and keeps(row):
                    file.write(line)
            except (ValueError, KeyError, TypeError) as error:
                torn = (
                    f"{path}:{number}: not a row of this log ({error}); the file was changed by hand or by a failing "
                    "disk: mend or delete that line, or start again in another --workdir"
                )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(files.plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def perplexity(nll: float) -> float:
    """exp of mean nats a token; finite."""
    return math.exp(min(nll, 700.0))


class Progress:
    """A stage's progress bar: steps, loss, tokens/s and time left. Away from a terminal, one plain line an update.

    Use as a context manager; call `update` once a log interval. `shown=False` (processes other than 0) prints nothing.
    `clock` tells the seconds by which the time left is reckoned.
    """

    def __init__(
        self, stage: str, total: int, *, start: int = 0, shown: bool = True,
        console: rich.console.Console | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._stage, self._total, self._shown, self._seconds = stage, total, shown, clock
        self._console = console or rich.console.Console(stderr=True)
        self._first: tuple[int, float] | None = None  # (step, time) of the first update
        self._bar: rich.progress.Progress | None = None
        if shown and self._console.is_terminal:
            columns = (
                rich.progress.TextColumn("[bold]{task.description:<10}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
            )
            bar = rich.progress.Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._task = bar.add_task(stage, total=total, completed=start, figures="")
            self._bar = bar

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar:
            self._bar.refresh()
            self._bar.stop()

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None, note: str = ""
    ) -> None:
        """Shows that `step` steps are done.

        Args:
          step: steps done, of `total`.
          loss: the interval's loss, or score for PPO (`note` can say so).
          tokens_per_s: the interval's rate.
          note: further figures, ready to show.
        """
        if not self._shown:
            return
        figures = [] if loss is None else [f"loss {loss:.4g}"]
        figures += [note] if note else []
        figures += [] if tokens_per_s is None else [f"{_short(tokens_per_s)} tokens/s"]
        left = self._seconds_left(step)
        figures += [] if left is None else [f"{_clock(left)} left"]
        if self._bar:
            self._bar.update(
                self._task, completed=step, figures=rich.text.Text("  ".join(figures)).markup, refresh=True
            )
        else:
            self.line(f"{self._stage} {step}/{self._total}  " + "  ".join(figures))

    def line(self, text: str) -> None:
        """Prints one line, above the bar on a terminal."""
        if self._shown:
            self._console.print(visible(text.rstrip()), markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, step: int) -> float | None:
        now = self._seconds()
        if self._first is None:
            self._first = (step, now)
        done, elapsed = step - self._first[0], now - self._first[1]
        if step >= self._total or done <= 0:
            return None
        return elapsed / done * (self._total - step)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
