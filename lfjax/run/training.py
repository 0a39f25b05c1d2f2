"""The loop of every training stage: dispatch, log, evaluate, save, stop. The only place where a step meets a clock."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax

from lfjax.checkpoint import Checkpoints
from lfjax.metrics import Progress, Window
from lfjax.rewards.intervals import without
from lfjax.run.best import Best
from lfjax.run.run import Interrupted, Run, TrainingFailed
from lfjax.sharding import Step

Work = Callable[[int], tuple[float, float]]  # (index of a step) -> (tokens, model FLOPs)


def train(
    run: Run,
    stage: str,
    state: Any,
    step: Callable[[Any, int], tuple[Any, dict]],
    *,
    total: int,
    work: Work,
    evaluate: Callable[[Any], dict[str, float]] = lambda state: {},
    learning_rate: Callable[[int], Any] | None = None,
    after: Callable[[Any, int], None] = lambda state, done: None,
    shown: str = "loss",
) -> tuple[Any, dict[str, float]]:
    """Takes `state` from where its checkpoints are to `total` steps.

    Nothing in here waits for the device but a log interval, an evaluation and a save.

    Args:
      work: (index) -> (tokens, model FLOPs) of that step, padding counted; FLOPs by the rule of `lfjax.models.flops`.
      state: fresh state, sharded; also says how a checkpoint is restored.
      step: (state, index) -> (state, metrics); dispatches and returns.
      evaluate: held-out figures, stage/name -> value, every `eval_every` steps (0: after each quarter) and at the end.
      after: called at the end of each step (samples, say).
      shown: the metric beside the progress bar.
    Returns:
      (final state, figures): the last evaluation's and the last log row's; with `keep_best` the best evaluation's.
    """
    section, best = run.config[stage], Best(run, stage, state)
    checkpoints, window = run.checkpoints(stage), Window()
    state, start, figures, row = _restored(run, checkpoints, state, window, best)
    save = functools.partial(_save, run, checkpoints, window, best)
    run.log.cut(run.stages, stage, start if start else -1)
    progress = Progress(stage, total, start=start, shown=jax.process_index() == 0, clock=_clock)
    trace = Trace(run, stage)
    pace = Pace(run, stage, work, learning_rate, progress, shown)
    # whatever ends the loop, saves under way are finished
    with contextlib.closing(checkpoints), contextlib.closing(trace), progress:
        for index in range(start, total):
            trace.before(index - start)
            with run.meter.part("train"):
                state, metrics = step(state, index)
            trace.after(index - start, state)
            window.add(metrics)
            pace.took(index)
            done = index + 1
            if done % section.log_every == 0 or done == total:
                row = pace.log(window, state, done)
            with run.meter.part("train"):  # it may wait for the steps under way
                after(state, done)
            if _evaluates(section.eval_every, done, total) and (found := _evaluated(run, stage, evaluate, state, done)):
                figures = best.seen(state, done, found)
                progress.line(f"{stage} {done}/{total}  held out: {_brief(without(figures))}")
            if done % section.save_every == 0 or done == total:
                save(state, done, figures, row)
            if done < total and _asked(run, at_log=done % section.log_every == 0):
                save(state, done, figures, row)
                raise Interrupted(f"stage {stage} stopped and saved at step {done} of {total}")
    last_row = {name: value for name, value in row.items() if not name.startswith("optim/")}
    state, figures = best.out(state, figures, total)
    return state, {**last_row, **figures}


def _clock() -> float:
    """Seconds, in which no compiling passes: what is left of a stage counts none."""
    return time.monotonic() - Step.seconds


def _evaluates(every: int, done: int, total: int) -> bool:
    """Whether held-out figures are taken after so many steps."""
    quarters = {-(-total * quarter // 4) for quarter in range(1, 5)}
    return done == total or (done % every == 0 if every else done in quarters)


def _evaluated(run: Run, stage: str, evaluate: Callable[[Any], dict[str, float]], state, done: int) -> dict[str, float]:
    """The held-out figures, which are logged without their intervals: these are in summary.json."""
    with run.meter.part("train"):
        jax.block_until_ready(state)  # the steps under way
    with run.meter.part("evaluate"):
        figures = evaluate(state)
    if figures:
        run.log.metrics(stage, done, without(figures))
    return figures


def _brief(figures: dict[str, float], most: int = 3) -> str:
    """The first of them, by their leaves."""
    shown = itertools.islice(figures.items(), most)
    return ", ".join(f"{name.rpartition('/')[2].removeprefix('validation_')} {value:.4g}" for name, value in shown)


def _restored(run: Run, checkpoints: Checkpoints, state, window: Window, best: Best):
    """(state, steps done, figures, row) of the last checkpoint; as given and empty where there is none."""
    if checkpoints.latest_step() is None:
        return state, 0, {}, {}
    tree, extra = checkpoints.restore(best.saved(state)[0])
    state = best.restore(tree, extra.get("best"))
    window.restore(extra["pending"])
    run.meter.restore(extra["meter"])
    return state, extra["step"], extra["figures"], extra["row"]


def _save(run: Run, checkpoints: Checkpoints, window: Window, best: Best, state, done: int, figures, row) -> None:
    with run.meter.part("train"):  # waits for the steps under way
        pending = window.pending()
    tree, beside = best.saved(state)
    extra = {"step": done, "figures": figures, "row": row, "pending": pending, "best": beside}
    with run.meter.part("save"):
        checkpoints.save(done, tree, {**extra, "meter": run.meter.read()})


def _asked(run: Run, *, at_log: bool) -> bool:
    """Whether to stop. Several processes agree on it once a log interval: each step would cost an exchange."""
    return (run.stop_requested if jax.process_count() == 1 else at_log) and run.stopping()


class Pace:
    """Logs the rows of a stage and how fast it is: what the steps since the row before did; arguments as of `train`."""

    def __init__(self, run: Run, stage: str, work: Work, learning_rate, progress, shown):
        self.run, self.stage, self.work = run, stage, work
        self.learning_rate, self.progress, self.shown = learning_rate, progress, shown
        run.devices.measure_peak()
        self._last, self._trained, self._tokens, self._flops = time.perf_counter(), run.meter.seconds("train"), 0.0, 0.0

    def took(self, index: int) -> None:
        """Counts a step that was dispatched."""
        tokens, flops = self.work(index)
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def log(self, window: Window, state, done: int) -> dict[str, float]:
        """Fetches the metrics since the row before, and writes and returns them; waits for the steps under way."""
        run, stage = self.run, self.stage
        with run.meter.part("train"):
            row = window.fetch()
        if self.learning_rate is not None:
            row["optim/learning_rate"] = float(self.learning_rate(done - 1))
        _check_finite(run, stage, state, done)
        run.log.metrics(stage, done, row)
        now, until = time.perf_counter(), run.meter.seconds("train")
        seconds = max(until - self._trained, 1e-9)
        rate, reached = self._tokens / seconds, self._flops / seconds
        if reached > run.devices.peak_flops:
            run.devices.measure_peak()
        mfu = reached / run.devices.peak_flops
        run.log.timing(stage, done, seconds=now - self._last, tokens_per_s=rate, mfu=mfu)
        figure = f"{self.shown} {row.get(f'{stage}/{self.shown}', float('nan')):.4g}"
        self.progress.update(done, note=figure, tokens_per_s=rate)
        self._last, self._trained, self._tokens, self._flops = now, until, 0.0, 0.0
        return row


class Trace:
    """A profile of `run.profile` steps of a stage, from its fourth on: WORKDIR/profile/STAGE, for XProf or Perfetto."""

    FIRST = 3  # compiled and warm by then

    def __init__(self, run: Run, stage: str):
        self._folder = run.workdir / "profile" / stage
        self._last = self.FIRST + run.profile - 1 if jax.process_index() == 0 else -1
        self._on = False

    def before(self, index: int) -> None:
        """Starts before the first of the steps."""
        if index == self.FIRST <= self._last:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._on = True

    def after(self, index: int, outputs: Any) -> None:
        """Waits for the last of the steps, and writes."""
        if self._on and index == self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def _check_finite(run: Run, stage: str, state: Any, done: int) -> None:
    """Stops the run once its updates have been non-finite `max_skipped` times in a row."""
    counters = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if "skipped" in jax.tree_util.keystr(path)]
    in_a_row = max((int(x) for x in jax.device_get(counters)), default=0)
    if in_a_row >= run.config.run.max_skipped:
        raise TrainingFailed(
            f"stage {stage}, step {done}: loss or gradient was not finite {in_a_row} times in a row;"
            f" lower config.{stage}.optim.learning_rate, or look at the data of these steps"
        )


class Stopwatch:
    """Seconds of the parts of one update: if on, `timed(name, outputs)` waits for the outputs; it returns them."""

    def __init__(self, before, *, on: bool):
        self.seconds: dict[str, float] = {}
        self._on, self._last = on, 0.0
        self("before", before)
        self.seconds.clear()

    def __call__(self, name: str, outputs):
        """Adds the time since the call before."""
        if self._on:
            jax.block_until_ready(outputs)
            now = time.perf_counter()
            self.seconds[f"{name}_s"], self._last = now - self._last, now
        return outputs
