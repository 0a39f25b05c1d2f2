"""Reads a run directory, complete or not, into plain Python data."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from lfjax.config import InputError

STAGE_ORDER = ("tokenizer", "pretrain", "sft", "reward", "classify", "ppo", "evaluate")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is known of one stage: "done", "started" or "missing"; seconds and compiled programs where recorded.

    `parts`: of the seconds, those of "train", "evaluate", "save" and "compile".
    """

    name: str
    state: str
    seconds: float | None = None
    programs: int | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The contents of a run directory. `series` is stage -> metric -> [(step, value)], by step, finite values only."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    series: dict[str, dict[str, list[tuple[int, float]]]]
    timing: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    stages: list[Stage]

    @property
    def complete(self) -> bool:
        """Whether every stage of the config is done."""
        return all(stage.state == "done" for stage in self.stages)

    def state(self, stage: str) -> str:
        """The stage's state, "" where the run has no such stage."""
        return next((found.state for found in self.stages if found.name == stage), "")

    def points(self, metric: str) -> list[tuple[int, float]]:
        """The metric's points in the first stage that logged more than one of them, else whatever there is."""
        found = [metrics[metric] for metrics in self.series.values() if metric in metrics]
        return max(found, key=lambda points: len(points) > 1, default=[])


def read(workdir: str | os.PathLike) -> RunDir:
    """Reads `workdir`.

    Raises:
      InputError: not a run directory, or a file in it that is broken other than by a torn last line.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory; give the --workdir of a run")
    if not any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "summary.json")):
        raise InputError(f"{folder}: not a run directory (no config.json, metrics.jsonl or summary.json in it)")
    config, summary = _json(folder / "config.json"), _json(folder / "summary.json")
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in _rows(folder / "metrics.jsonl"):
        metrics = series.setdefault(str(row["stage"]), {})
        for name, value in row.items():
            if name not in ("stage", "step") and isinstance(value, (int, float)):
                metrics.setdefault(name, []).append((int(row["step"]), float(value)))
    timing: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(folder / "timing.jsonl"):
        timing.setdefault(str(row["stage"]), []).append({k: v for k, v in row.items() if isinstance(v, (int, float))})
    named = config.get("stages") or ()
    if not isinstance(named, (list, tuple)):
        raise InputError(f"{folder / 'config.json'}: field 'stages': found {named!r}; a list of names is expected")
    order = [str(stage) for stage in named]
    order = order or [stage for stage in STAGE_ORDER if stage in {*series, *timing}]
    order += [stage for stage in {**series, **timing} if stage not in order]
    return RunDir(
        name=folder.resolve().name,
        config=config,
        summary=summary,
        series={stage: series[stage] for stage in order if stage in series},
        timing=timing,
        samples=list(_rows(folder / "samples.jsonl")),
        stages=_stages(folder, order, series, timing),
    )


def _stages(folder: pathlib.Path, order: list[str], series, timing) -> list[Stage]:
    """A stage is done where its FINISHED file says so, or a later stage has begun."""
    finished = {stage: _json(folder / "checkpoints" / stage / "FINISHED") for stage in order}
    begun = [stage in series or stage in timing or bool(finished[stage]) for stage in order]
    stages = []
    for index, stage in enumerate(order):
        done = bool(finished[stage]) or any(begun[index + 1 :])
        rows = sum(row.get("seconds") or 0.0 for row in timing.get(stage, ()))
        seconds = finished[stage].get("seconds")
        seconds = seconds if isinstance(seconds, (int, float)) else rows or None
        state = "done" if done else "started" if begun[index] else "missing"
        programs = finished[stage].get("programs")
        programs = sum(programs.values()) if isinstance(programs, dict) else None
        stages.append(Stage(stage, state, seconds, programs, finished[stage].get("parts") or {}))
    return stages


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore or delete the file") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: a {type(found).__name__}; a JSON object is expected")
    return found


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The file's rows; a last line without its line feed is still being written and is left out."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["stage"], str) or not isinstance(row["step"], int):
                raise TypeError("field 'stage' is not a string or 'step' not an integer")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                return
            raise InputError(f"{path}:{number}: not a row of this log ({error}); mend or delete the line") from error
        yield row
