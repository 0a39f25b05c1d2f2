"""The chain of stages, which can be killed anywhere and goes on."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

from lfjax.checkpoint import FINISHED
from lfjax.config import to_plain
from lfjax.files import read_json, write_json
from lfjax.models.flops import cpu_matmul_rate
from lfjax.report.rundir import STAGES
from lfjax.run import checks
from lfjax.run.data import note, say
from lfjax.run.meter import Meter
from lfjax.run.run import Interrupted, Run
from lfjax.sharding import Step
from lfjax.signals import handled


def run_stages(run: Run) -> dict[str, float]:
    """Runs every stage that is not finished, in order; a stage returns its final figures for summary.json.

    The same command on the same directory goes on where it was. Figures of all finished stages are in summary.json.
    """

    def ask_to_stop(signum, frame):
        if run.stop_requested:  # a second one means now
            raise KeyboardInterrupt
        run.stop_requested = True

    if jax.process_index() == 0:
        sections = to_plain(run.config)
        write_json(run.workdir / STAGES, {s: run.stage(s).described(sections[s]) for s in run.stages})
    for stage, what in checks.unread(run.config, run.declared):
        note(stage, what)
    totals, run.began = [], time.perf_counter()
    with run, handled(ask_to_stop, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for stage in run.stages:
            done = run.finished(stage) or _run_stage(run, stage)
            totals.append(done)
            run.log.summary(run.data.figures | done["figures"])
            if run.stopping():
                raise Interrupted(f"stopped after stage {stage}")
        programs = functools.reduce(Counter.__or__, (Counter(done["programs"]) for done in totals))
        seconds = sum(done["seconds"] for done in totals)
        trained = sum(done["parts"].get("train", 0.0) for done in totals)
        goodput = trained / seconds if seconds else 0.0
        run.log.summary({"time/total_s": seconds, "time/goodput": goodput, "compile/count": programs.total()})
    return read_json(run.workdir / "summary.json", dict)


@contextlib.contextmanager
def _programs_told(stage: str) -> Iterator[None]:
    """A line for every program that is made inside: nothing else is heard of a stage while it compiles."""

    def told(program: str, seconds: float, cached: bool) -> None:
        say(stage, f"{program} {'read from the cache' if cached else 'compiled'} in {seconds:.1f} s")

    before, Step.told = Step.told, told
    try:
        yield
    finally:
        Step.told = before


def _run_stage(run: Run, stage: str) -> dict[str, Any]:
    run.meter = Meter()
    say(f"{stage} ({run.stages.index(stage) + 1} of {len(run.stages)})", run.stage(stage).summary)
    with _programs_told(stage):
        figures = run.stage(stage).run(run)
    done = {"figures": figures, **run.meter.read(), "config": run.config_hash}
    if jax.default_backend() == "cpu":  # what the machine gave, beside the seconds that it took
        done["matmul_gflops"] = cpu_matmul_rate() / 1e9
    if jax.process_index() == 0:
        run.checkpoint_folder(stage).mkdir(parents=True, exist_ok=True)
        write_json(run.checkpoint_folder(stage) / FINISHED, done)
    return done
