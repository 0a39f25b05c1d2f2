"""What a run has cost, as lines for a terminal."""

from __future__ import annotations

from lfjax.report.charts import clock
from lfjax.report.rundir import RunDir, Stage


def cost_lines(run: RunDir, before: float, after: float) -> list[str]:
    """A table of the run's parts: seconds, those of them spent on compiling, and on a CPU what its matmul reached.

    Args:
      before: seconds of this process before its first stage. after: those after its last (the report).
    """
    start, end = Stage("start", "done", before), Stage("report", "done", after)
    stages = [stage for stage in run.stages if stage.seconds]
    whole = [start, *stages, end]
    seconds = sum(stage.seconds or 0.0 for stage in whole)
    compiling = {"compile": sum(stage.parts.get("compile", 0.0) for stage in stages)}
    parts = [*whole, Stage("all", "done", seconds, parts=compiling)]
    names, rates = ("part", *(part.name for part in parts)), [part.matmul_gflops for part in parts]
    columns = [
        [name.ljust(max(map(len, names))) for name in names],
        _right("time", [clock(part.seconds or 0.0) for part in parts]),
        _right("compiling", [clock(part.parts["compile"]) if "compile" in part.parts else "" for part in parts]),
    ]
    if any(rates):
        columns.append(_right("matmul, GFLOP/s", [f"{rate:.0f}" if rate else "" for rate in rates]))
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def _right(head: str, cells: list[str]) -> list[str]:
    width = max(map(len, (head, *cells)))
    return [text.rjust(width) for text in (head, *cells)]
