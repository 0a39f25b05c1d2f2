"""kill -9 at any moment of any stage, the same command again: every run ends with the bits of one nobody disturbed.

    python benchmarks/kills.py [--config=configs/tiny.py] [--kills=20] [--seed=0] [--folder=FOLDER] [--config.key=value]

The config runs once undisturbed. Then, for each kill, a copy of that run as it was when a stage began goes on, is
killed in that stage, and goes on to its end. Kills fall at any moment, which is mostly that of compiling; in stages
that train, in turn, also once steps have been taken, and while a checkpoint is being written: half of the time the
newest whole one is then cut short as well. A kill that comes too late is drawn again. Logs, samples, parameters and
summary are compared with those of the undisturbed run.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import smallest  # noqa: E402

from lfjax import config as configs  # noqa: E402

TINY = ROOT / "configs" / "tiny.py"
UNTRAINED = ("tokenizer", "evaluate")  # stages without checkpoints
LOGS = ("metrics.jsonl", "samples.jsonl")
HOW = ("cut", "step", "save", "any")  # the kills of a stage that trains, in turn
CUT = "cannot be read"  # what a run says of a checkpoint that was cut short
TRIES = 20  # of one kill


class Runs:
    """Run directories in one folder, whose processes share the data and every compiled program."""

    def __init__(self, folder: Path, *overrides: str, config: Path = smallest.PATH):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder, config
        self.overrides = ["--config.run.compile_cache=False", *overrides]  # the folder's own cache instead
        if config == smallest.PATH:
            self.overrides.append(f"--config.data.path={smallest.write_records(folder / 'rated.jsonl')}")
        self.stages = tuple(configs.load(str(config), self.overrides).stages)

    def start(self, name: str, launcher: tuple = (), options: tuple = (), **environment: str) -> subprocess.Popen:
        """Starts `lfjax train` on folder/name; what it prints is added to folder/name.log."""
        given = [f"--config={self.config}", f"--workdir={self.folder / name}", *self.overrides, *options]
        command = [*launcher, sys.executable, "-m", "lfjax.cli", "train", *given]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        fixed = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **cache}
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, env=os.environ | fixed | environment, stdout=log, stderr=log)

    def finish(self, name: str, *launched, **environment) -> None:
        """Starts it and waits for its end."""
        code = self.start(name, *launched, **environment).wait(timeout=1800)
        if code:
            raise RuntimeError(f"{name} ended with exit code {code}: {self.said(name)[-2000:]}")

    def said(self, name: str) -> str:
        """Everything that the processes of this run have printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def current(self, workdir: Path) -> str | None:
        """The first stage that is not finished; None where all are."""
        left = (s for s in self.stages if not (workdir / "checkpoints" / s / "FINISHED").exists())
        return next(left, None)

    def begin(self, name: str, stage: str) -> Path:
        """folder/name: the finished run "straight" as it was when this stage began."""
        workdir, later = self.folder / name, self.stages[self.stages.index(stage) :]
        shutil.rmtree(workdir, ignore_errors=True)
        (self.folder / f"{name}.log").unlink(missing_ok=True)
        if stage == self.stages[0]:
            return workdir
        gone = [f"{part}/{each}" for part in ("checkpoints", "models", "tensorboard") for each in later]
        shutil.copytree(self.folder / "straight", workdir)
        for path in (workdir / each for each in (*gone, "summary.json", "report.html")):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        for log in workdir.glob("*.jsonl"):
            lines = log.read_text().splitlines(keepends=True)
            log.write_text("".join(line for line in lines if json.loads(line)["stage"] not in later))
        return workdir


def plan(stages: tuple[str, ...], kills: int) -> list[tuple[str, str]]:
    """(stage, how) of every kill, in the order of the stages: every stage in turn, those that train twice as often."""
    every = ((turn, stage) for turn in itertools.count() for stage in stages)
    drawn = ((s, "any" if s in UNTRAINED else HOW[t % 4]) for t, s in every if s not in UNTRAINED or t % 2 == 0)
    return sorted(itertools.islice(drawn, kills), key=lambda each: stages.index(each[0]))


def written(workdir: Path) -> set:
    """Changes with whatever is written to the log files, the models and the lists of checkpoints."""
    found = set()
    for pattern in ("*.json*", "models/*", "checkpoints/*", "checkpoints/*/*"):
        for path in workdir.glob(pattern):
            try:
                status = path.stat()
            except FileNotFoundError:  # gone since it was listed
                continue
            found.add((path, status.st_ino, status.st_mtime_ns))
    return found


def checkpoints(workdir: Path, stage: str) -> tuple[list[Path], list[Path]]:
    """(whole ones, oldest first; those being written) of a stage."""
    found = list((workdir / "checkpoints" / stage).glob("[0-9]*"))
    whole = sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))
    return whole, [path for path in found if "tmp" in path.name]


def kill(runs: Runs, name: str, stage: str, how: str, *, delay: float, whole: int) -> bool:
    """Starts the run and kills it in this stage.

    Args:
      how: "any": `delay` seconds after the process has first written something; "step": so long after the stage's first
        row; "save" or "cut": while a checkpoint is being written and there are `whole` others.
    Returns:
      False if the kill came too late: the stage or the run had ended, or the checkpoint was whole.
    """
    workdir, deadline = runs.folder / name, time.monotonic() + 1200
    before, process = written(workdir), runs.start(name)
    while process.poll() is None and time.monotonic() < deadline and runs.current(workdir) == stage:
        if written(workdir) != before if how == "any" else how == "step" and last_step(workdir, stage):
            time.sleep(delay)
            break
        found, begun = checkpoints(workdir, stage)
        if how in ("save", "cut") and begun and len(found) >= whole:
            break
        time.sleep(0.001)
    process.kill()
    if process.wait(timeout=60) > 0:
        raise RuntimeError(f"{name} ended by itself: {runs.said(name)[-2000:]}")
    in_time = process.returncode < 0 and runs.current(workdir) == stage
    return in_time and (how in ("any", "step") or bool(checkpoints(workdir, stage)[1]))


def cut_newest(workdir: Path, stage: str) -> None:
    """Halves the largest file of the newest whole checkpoint."""
    whole, _ = checkpoints(workdir, stage)
    largest = max((path for path in whole[-1].rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def last_step(workdir: Path, stage: str) -> int:
    """The last step of the stage that has left a row or a checkpoint, whole or begun; 0 if none has."""
    log = workdir / LOGS[0]
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [int(path.name.partition(".")[0]) for kind in checkpoints(workdir, stage) for path in kind]
    return max([0, *steps, *(row["step"] for row in rows if row["stage"] == stage)])


def results(workdir: Path) -> dict[str, bytes]:
    """Logs and parameters: name -> content."""
    files = [workdir / name for name in LOGS] + sorted(workdir.glob("models/*/model.safetensors"))
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files if path.exists()}


def differing(straight: Path, workdir: Path) -> list[str]:
    """Files and figures that are not those of the other run, and what was left half-written."""
    found = []
    figures = ({k: v for k, v in json.loads((w / "summary.json").read_text()).items() if not k.startswith("time/")}
               for w in (straight, workdir))  # fmt: skip
    for one, other in ((results(straight), results(workdir)), tuple(figures)):
        found += [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    left = [path for path in workdir.rglob("*") if path.name.endswith("tmp") or path.name.startswith(".")]
    return found + [f"{path.relative_to(workdir)} (left behind)" for path in left]


def experiment(runs: Runs, kills: int, seed: int = 0) -> Iterator[dict]:
    """For each kill {"stage", "step", "saving", "cut", "said": lines on a checkpoint cut short, "differing"}."""
    runs.finish("straight")
    straight, rng = runs.folder / "straight", random.Random(seed)
    for number, (stage, how) in enumerate(plan(runs.stages, kills), start=1):
        name = f"killed{number}"
        took = json.loads((straight / "checkpoints" / stage / "FINISHED").read_text())
        longest = took["seconds"] if how == "any" else took["seconds"] - took["parts"]["compile"]
        for attempt in range(TRIES):
            workdir = runs.begin(name, stage)
            delay, whole = rng.uniform(0.0, longest * 0.7**attempt), 2 if how == "cut" else rng.randrange(3)
            if kill(runs, name, stage, how, delay=delay, whole=whole):
                break
        else:
            raise RuntimeError(f"{TRIES} kills of stage {stage} came too late")
        row = {"stage": stage, "step": last_step(workdir, stage), "saving": bool(checkpoints(workdir, stage)[1])}
        if how == "cut":
            cut_newest(workdir, stage)
        runs.finish(name)
        said = [line for line in runs.said(name).splitlines() if CUT in line]
        yield {**row, "cut": how == "cut", "said": said, "differing": differing(straight, workdir)}
        shutil.rmtree(workdir)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are kept; default: nowhere")
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args()
    began, equal = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as nowhere:
        runs = Runs(arguments.folder or Path(nowhere), *overrides, config=arguments.config.resolve())
        print(f"{machine()}; {arguments.config}; seed {arguments.seed}\n")
        print("| kill | stage | step | while saving | newest checkpoint damaged | equal |\n|---|---|---|---|---|---|")
        for number, row in enumerate(experiment(runs, arguments.kills, arguments.seed), start=1):
            answers = ["yes" if row[key] else "no" for key in ("saving", "cut")]
            equal += not row["differing"]
            answers.append(", ".join(row["differing"]) or "yes")
            print(f"| {number} | {row['stage']} | {row['step']} | {' | '.join(answers)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s\n{arguments.kills} kills, {equal} equal runs")
    return 0 if equal == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
