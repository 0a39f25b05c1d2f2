"""What a run has found and what it has cost, as lines for a terminal."""

from __future__ import annotations

from lfjax.report import findings
from lfjax.report.charts import clock
from lfjax.report.rundir import RunDir, Stage
from lfjax.terminal import cell


def figure_lines(run: RunDir) -> list[str]:
    """The report's headline, and every final figure with its interval and number: "84.6 % (78 to 90, n 39)"."""
    headline, _ = findings.verdict(run, findings.comparisons(run), 0)
    rows = [f"{cell(name):40s} {cell(str(value))}" for name, value in findings.told(run).items()]
    return [line.replace("\u2212", "-").replace("\u202f", ",") for line in (headline, *rows)]


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
