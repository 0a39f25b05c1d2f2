"""The loop of every training stage: dispatch, log, evaluate, save, stop. The only place where a step meets a clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from lfjax.loops.run import Interrupted, Run, TrainingFailed
from lfjax.metrics import Progress, Window


def train(
    run: Run,
    stage: str,
    state: Any,
    step: Callable[[Any, int], tuple[Any, dict]],
    *,
    total: int,
    tokens_per_step: float,
    flops_per_step: float,
    evaluate: Callable[[Any], dict[str, float]] = lambda state: {},
    learning_rate: Callable[[int], Any] | None = None,
    after: Callable[[Any, int], None] = lambda state, done: None,
    shown: str = "loss",
) -> tuple[Any, dict[str, float]]:
    """Takes `state` from where its checkpoints are to `total` steps.

    Nothing in here waits for the device but a log interval, an evaluation and a save.

    Args:
      tokens_per_step, flops_per_step: on average; model FLOPs by the rule of `lfjax.models.flops`.
      state: fresh state, sharded; also says how a checkpoint is restored.
      step: (state, index) -> (state, metrics); dispatches and returns.
      evaluate: held-out figures, stage/name -> value, every `eval_every` steps and at the end.
      after: called at the end of each step (samples, say).
      shown: the metric beside the progress bar.
    Returns:
      (final state, figures): the last evaluation's and the last log row's.
    """
    section = run.config[stage]
    checkpoints, window = run.checkpoints(stage), Window()
    start, figures, row = 0, {}, {}
    if checkpoints.latest_step() is not None:
        state, extra = checkpoints.restore(state)
        start, figures, row = extra["step"], extra["figures"], extra["row"]
        window.restore(extra["pending"])
        run.meter.restore(extra["meter"])
    run.log.cut(run.stages, stage, start if start else -1)
    last, logged, trained = time.perf_counter(), start, run.meter.seconds("train")

    def save(done: int) -> None:
        with run.meter.part("train"):  # waits for the steps under way
            pending = window.pending()
        extra = {"step": done, "figures": figures, "row": row, "pending": pending, "meter": run.meter.read()}
        with run.meter.part("save"):
            checkpoints.save(done, state, extra)

    progress, trace = Progress(stage, total, start=start, shown=jax.process_index() == 0), Trace(run, stage)
    # whatever ends the loop, saves under way are finished
    with contextlib.closing(checkpoints), contextlib.closing(trace), progress:
        for index in range(start, total):
            trace.before(index - start)
            with run.meter.part("train"):
                state, metrics = step(state, index)
            trace.after(index - start, state)
            window.add(metrics)
            done = index + 1
            if done % section.log_every == 0 or done == total:
                with run.meter.part("train"):
                    row = window.fetch()
                if learning_rate is not None:
                    row["optim/learning_rate"] = float(learning_rate(index))
                _check_finite(run, stage, state, done)
                run.log.metrics(stage, done, row)
                now, until = time.perf_counter(), run.meter.seconds("train")
                steps_per_s = (done - logged) / max(until - trained, 1e-9)
                rate, mfu = tokens_per_step * steps_per_s, flops_per_step * steps_per_s / run.peak_flops
                run.log.timing(stage, done, seconds=now - last, tokens_per_s=rate, mfu=mfu)
                figure = f"{shown} {row.get(f'{stage}/{shown}', float('nan')):.4g}"
                progress.update(done, note=figure, tokens_per_s=rate)
                last, logged, trained = now, done, until
            after(state, done)
            if done == total or (section.eval_every and done % section.eval_every == 0):
                with run.meter.part("evaluate"):
                    figures = evaluate(state)
                if figures:
                    run.log.metrics(stage, done, figures)
            if done % section.save_every == 0 or done == total:
                save(done)
            # several processes agree on a stop once a log interval: asking each other every step would cost one
            asked = run.stop_requested if jax.process_count() == 1 else done % section.log_every == 0
            if asked and done < total and run.stopping():
                save(done)
                raise Interrupted(f"stage {stage} stopped and saved at step {done} of {total}")
    last_row = {name: value for name, value in row.items() if not name.startswith("optim/")}
    return state, {**last_row, **figures}


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
