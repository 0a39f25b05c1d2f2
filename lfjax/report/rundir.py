"""Reads a run directory, complete or not, into plain Python data. What it cannot read it leaves out and names."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from lfjax import files
from lfjax.config import InputError
from lfjax.report.catalogue import FORMS, Figure

STAGES = "stages.json"  # what a report has to know of the run's stages
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json")  # one of them is in every run directory
MOST_LOG_BYTES = 32 * 2**20  # of a log; of a longer one its beginning and its end are read
MOST_ROW_BYTES = 4 * 2**20
MOST_JSON_BYTES = 4 * 2**20
MOST_STAGES = 50
MOST_METRICS = 1000  # of a stage
MOST_NAME = 200  # characters of what a stage or a figure is called
Known = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # (config) -> what `stages.json` would hold
LARGEST = 1e300  # of a figure: sums and differences of such are finite
LAST_STEP = 2**53


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is known of one stage: "done", "started" or "missing"; seconds and compiled programs where recorded.

    `parts`: of the seconds, those of "train", "evaluate", "save" and "compile". `matmul_gflops`: a CPU's rate of a
    float32 matmul when the stage ended.
    """

    name: str
    state: str
    seconds: float | None = None
    programs: int | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    matmul_gflops: float | None = None


@dataclasses.dataclass(frozen=True)
class About:
    """What a stage's declaration (`lfjax.run.stage.Stage`, whose fields these are) tells a report."""

    title: str = ""
    makes: str = ""
    builds: bool = False
    unit: str = "steps"
    compares: bool = False
    told: str = ""
    scored_by: str = ""
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The contents of a run directory. `series` is stage -> metric -> [(step, value)], by step, finite values only.

    `summary` holds figures, texts and null alone; `left_out` says in a line each what could not be read.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    series: dict[str, dict[str, list[tuple[int, float]]]]
    timing: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    stages: list[Stage]
    left_out: list[str] = dataclasses.field(default_factory=list)
    known: dict[str, About] = dataclasses.field(default_factory=dict)

    def about(self, stage: str) -> About:
        """What is known of a stage."""
        return self.known.get(stage) or About(title=stage)

    @property
    def figures(self) -> dict[str, Figure]:
        """What the metrics of the run's stages are called."""
        return {name: figure for about in self.known.values() for name, figure in about.figures.items()}

    @property
    def scored(self) -> str:
        """The last stage that raises a score, "" where none does."""
        return next((s.name for s in reversed(self.stages) if self.about(s.name).scored_by), "")

    @property
    def compared(self) -> str:
        """The last stage that compares models before and after, "" where none does."""
        return next((s.name for s in reversed(self.stages) if self.about(s.name).compares), "")

    def named(self, leaf: str) -> str:
        """The figure or metric with this last part, of the latest stage that has one; the leaf itself where none has.

        Stages call alike what is alike: "score" may be ppo/score.
        """
        metrics = (name for found in self.series.values() for name in found)
        found = [name for name in (*self.summary, *metrics) if name.rpartition("/")[2] == leaf]
        places = {stage.name: place for place, stage in enumerate(self.stages)}
        return max(found, key=lambda name: places.get(name.rpartition("/")[0], -1), default=leaf)

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


def read(workdir: str | os.PathLike, known: Known | None = None) -> RunDir:
    """Reads `workdir`.

    Args:
      known: (config) -> what `stages.json` would hold, for a directory that was made before there was one.
    Raises:
      InputError: not a run directory, or nothing in it can be read; names the first file and why.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory; give the --workdir of a run")
    if not _has(folder, RUN_FILES):
        raise InputError(f"{folder}: not a run directory (no config.json, metrics.jsonl or summary.json in it)")
    left_out: list[str] = []
    config, summary = _config(folder, left_out), _summary(folder, left_out)
    if config and "stages" not in config and not left_out and not _has(folder, RUN_FILES[1:]):
        raise InputError(f"{folder}: not a run directory (config.json names no stages); give the --workdir of a run")
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    extra: set[str] = set()
    for row in _rows(folder, "metrics.jsonl", left_out):
        metrics = series.get(row["stage"])
        if metrics is None:
            metrics = series.setdefault(row["stage"], {}) if len(series) < MOST_STAGES else {}
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("stage", "step") and -LARGEST <= value <= LARGEST:
                points = metrics.get(name)
                if points is None:
                    if len(metrics) >= MOST_METRICS:
                        extra.add(name[:100])
                        continue
                    points = metrics.setdefault(name, [])
                points.append((row["step"], float(value)))
    if extra:
        left_out.append(f"{folder / 'metrics.jsonl'}: {len(extra)} metrics beyond {MOST_METRICS} of a stage")
    timing: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(folder, "timing.jsonl", left_out):
        figures = {k: v for k, v in row.items() if k in _TIMED and is_figure(v)}
        if row["stage"] in timing or len(timing) < MOST_STAGES:
            timing.setdefault(row["stage"], []).append(figures)
    samples = list(_rows(folder, "samples.jsonl", left_out))
    if left_out and not any((config, summary, series, timing, samples)):
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise InputError(f"{left_out[0]}{more}; nothing in the run directory can be shown")
    about = _abouts(folder, config, known, left_out)
    order = list(dict.fromkeys(config.get("stages", ()))) or [s for s in about if s in {**series, **timing}]
    order += [stage for stage in {**series, **timing} if stage not in order]
    if len(order) > MOST_STAGES:
        left_out.append(f"{folder}: {len(order) - MOST_STAGES} stages beyond {MOST_STAGES}")
        order = order[:MOST_STAGES]
    return RunDir(
        name=folder.resolve().name,
        config=config,
        summary=summary,
        series={stage: series[stage] for stage in order if stage in series},
        timing=timing,
        samples=samples,
        stages=_stages(folder, order, series, timing, left_out),
        left_out=left_out,
        known=about,
    )


def _has(folder: pathlib.Path, names: Iterable[str]) -> bool:
    return any((folder / name).exists() for name in names)


def stages_that_make(folder: pathlib.Path, what: tuple[str, ...], known: Known) -> list[str]:
    """The stages of a run directory whose models/<stage>/ is such a thing ("language model"), in the run's order."""
    left_out: list[str] = []
    config = _config(folder, left_out)
    about = _abouts(folder, config, known, left_out)
    return [name for name in config.get("stages") or about if name in about and about[name].makes in what]


def _abouts(folder: pathlib.Path, config: Mapping[str, Any], known: Known | None, left_out: list[str]):
    """Name -> About: of `stages.json`, else as `known` says of the config."""
    rows = _json(folder, STAGES, left_out) or (known(config) if known else {})
    return {name: _about(row) for name, row in itertools.islice(rows.items(), MOST_STAGES) if isinstance(row, Mapping)}


def _about(row: Mapping[str, Any]) -> About:
    """What is of the right kind in a stage's row; texts are cut to MOST_NAME characters."""
    given = _fields(row, About())
    figures = row.get("figures")
    rows = itertools.islice(figures.items(), MOST_METRICS) if isinstance(figures, Mapping) else ()
    return About(**{**given, "figures": {name: _figure(found) for name, found in rows if isinstance(found, Mapping)}})


def _figure(row: Mapping[str, Any]) -> Figure:
    given = _fields(row, Figure(""))
    marks = row.get("marks")
    marks = marks if isinstance(marks, (list, tuple)) else ()
    pairs = [mark for mark in marks[:MOST_MARKS] if isinstance(mark, (list, tuple)) and len(mark) == 2]
    kept = tuple((float(x), str(label)[:MOST_NAME]) for x, label in pairs if is_figure(x))
    form = given.get("form") if given.get("form") in FORMS else "number"
    return Figure(**{"title": "", **given, "form": form, "marks": kept})


def _fields(row: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Of a row what has the type of the default's text or flag."""
    fields = {name: value for name, value in vars(default).items() if type(value) in (str, bool)}
    found = {name: row[name] for name, value in fields.items() if type(row.get(name)) is type(value)}
    return {name: value[:MOST_NAME] if isinstance(value, str) else value for name, value in found.items()}


MOST_MARKS = 5  # of a figure
_TIMED = {"step", "seconds", "tokens_per_s", "mfu", "rollout_s", "score_s", "experience_s", "update_s"}


def is_figure(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be drawn."""
    return isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST


def _is_name(stage: str) -> bool:
    """Whether a stage can have a folder."""
    return 0 < len(stage) <= 100 and "/" not in stage and "\0" not in stage and stage not in (".", "..")


def _stages(folder: pathlib.Path, order: list[str], series, timing, left_out: list[str]) -> list[Stage]:
    """A stage is done where its FINISHED file says so, or a later stage has begun."""
    finished = {
        stage: _json(folder, f"checkpoints/{stage}/FINISHED", left_out) if _is_name(stage) else {} for stage in order
    }
    begun = [stage in series or stage in timing or bool(finished[stage]) for stage in order]
    stages = []
    for index, stage in enumerate(order):
        done = bool(finished[stage]) or any(begun[index + 1 :])
        rows = sum(row["seconds"] for row in timing.get(stage, ()) if row.get("seconds", -1.0) >= 0)
        seconds, programs, parts = (finished[stage].get(key) for key in ("seconds", "programs", "parts"))
        seconds = seconds if is_figure(seconds) and seconds >= 0 else rows or None
        state = "done" if done else "started" if begun[index] else "missing"
        counts = [int(count) for count in programs.values() if is_figure(count)] if isinstance(programs, dict) else None
        known = {k: v for k, v in parts.items() if is_figure(v)} if isinstance(parts, dict) else {}
        rate = finished[stage].get("matmul_gflops")
        rate = float(rate) if is_figure(rate) and rate > 0 else None
        stages.append(Stage(stage, state, seconds, None if counts is None else sum(counts), known, rate))
    return stages


def _json(folder: pathlib.Path, name: str, left_out: list[str]) -> dict[str, Any]:
    """The file's object; {} where there is none, or none that can be read."""
    if not os.path.lexists(folder / name):
        return {}
    try:
        return files.read_json(files.inside(folder, name), dict, most=MOST_JSON_BYTES)
    except InputError as error:
        left_out.append(str(error))
        return {}


def _config(folder: pathlib.Path, left_out: list[str]) -> dict[str, Any]:
    found = _json(folder, "config.json", left_out)
    named = found.get("stages", ())
    if isinstance(named, (list, tuple)) and all(isinstance(stage, str) for stage in named):
        return found
    left_out.append(f"{folder / 'config.json'}: field 'stages': found {_brief(named)}; a list of names is expected")
    return {key: value for key, value in found.items() if key != "stages"}


def _summary(folder: pathlib.Path, left_out: list[str]) -> dict[str, Any]:
    found = _json(folder, "summary.json", left_out)
    figures = {k: v for k, v in found.items() if v is None or isinstance(v, str) or is_figure(v)}
    wrong = [name for name in found if name not in figures]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = f"field {_brief(wrong[0])}{more}: found {_brief(found[wrong[0]])}; a figure is expected"
        left_out.append(f"{folder / 'summary.json'}: {what}")
    return figures


def _rows(folder: pathlib.Path, name: str, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """The file's rows; a last line without its line feed is still being written and is left out."""
    path = folder / name
    if not os.path.lexists(path):
        return
    seen, wrong, first, torn = False, 0, "", None
    try:
        for place, line in _lines(files.inside(folder, name), left_out):
            wrong, first = (wrong + 1, first or torn) if torn else (wrong, first)
            torn = None
            if not line.endswith(b"\n"):
                break
            try:
                row = files.json_value(line)
                if not isinstance(row, dict) or type(row.get("stage")) is not str or type(row.get("step")) is not int:
                    raise ValueError("an object with a text 'stage' and a whole number 'step' is expected")
                if abs(row["step"]) > LAST_STEP:
                    raise ValueError(f"field 'step': beyond {LAST_STEP}")
            except ValueError as error:
                torn = f"{path}:{place}: not a row of this log ({error})"
                continue
            seen = True
            yield row
    except InputError as error:
        left_out.append(f"{error}; what follows in it is not read")
    if torn and not seen:
        wrong, first = wrong + 1, first or torn
    if wrong:
        left_out.append(f"{first}; mend or delete the line" + (f" (and {wrong - 1} more)" if wrong > 1 else ""))


def _lines(path: pathlib.Path, left_out: list[str]) -> Iterator[tuple[int | str, bytes]]:
    """(number, line); of a file of more than MOST_LOG_BYTES only what is near its beginning and its end."""
    with files.open_regular(path) as file:
        size, half = os.fstat(file.fileno()).st_size, MOST_LOG_BYTES // 2

        def part(count: int) -> Iterator[bytes]:
            while count > 0 and (block := file.read(min(count, 2**20))):
                count -= len(block)
                yield block

        if size <= MOST_LOG_BYTES:
            yield from files.split_lines(part(size), path, most=MOST_ROW_BYTES)
            return
        left_out.append(f"{path}: larger than {MOST_LOG_BYTES >> 20} MB; what lies in the middle is not read")
        lines = files.split_lines(part(half), path, most=MOST_ROW_BYTES)
        yield from (pair for pair in lines if pair[1].endswith(b"\n"))
        file.seek(size - half)
        lines = files.split_lines(part(half), path, most=MOST_ROW_BYTES)
        yield from ((" near its end", line) for _, line in itertools.islice(lines, 1, None))


def _brief(value: Any) -> str:
    value = value[:60] if isinstance(value, str) else value
    text = repr(value) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
