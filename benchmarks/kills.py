"""kill -9, twenty times and in every stage of one run: it ends with the bits of a run that nobody disturbed.

    python benchmarks/kills.py [--folder=FOLDER] [--seed=0]

The run is tests/smallest.py with more steps and a checkpoint every other one. In every stage kills fall at any moment,
in those that train also while a checkpoint is being written; after one of these the newest whole one is cut short.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import smallest  # noqa: E402

TRAINED = ("pretrain", "sft", "reward", "ppo")
RESULTS = ("metrics.jsonl", "samples.jsonl", *(f"models/{stage}/model.safetensors" for stage in TRAINED))
PLAN = {stage: ("save", "save", "any", "any") if stage in TRAINED else ("any", "any") for stage in smallest.STAGES}
LONGEST = {True: 4.0, False: 0.2}  # seconds to a kill, in a training stage or another
CUT = "cannot be read"  # what a run says of a checkpoint that was cut short
OVERRIDES = (
    *(f"--config.{stage}.save_every=2" for stage in TRAINED),
    *(f"--config.{stage}.steps=30" for stage in ("pretrain", "sft", "reward")),
    "--config.ppo.steps=16",
    "--config.run.tensorboard=True",
)


class Runs:
    """Run directories in one folder, whose processes share the records and every compiled program."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder, self.overrides = folder, overrides
        folder.mkdir(parents=True, exist_ok=True)
        self.records = smallest.write_records(folder / "rated.jsonl")

    def start(self, name: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """Starts `lfjax train` on folder/name; what it prints is added to folder/name.log."""
        given = [f"--config={smallest.PATH}", f"--workdir={self.folder / name}", f"--config.data.path={self.records}"]
        command = [*launcher, sys.executable, "-m", "lfjax.cli", "train", *given, *self.overrides]
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


def current(workdir: Path) -> str | None:
    """The first stage that is not finished; None where all are."""
    left = (s for s in smallest.STAGES if not (workdir / "checkpoints" / s / "FINISHED").exists())
    return next(left, None)


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


def kill(process: subprocess.Popen, workdir: Path, stage: str, delay: float | None) -> bool:
    """Kills in this stage: `delay` seconds after its first write, or (None) while its third checkpoint is written.

    A stage without checkpoints has nothing to be written before its end: there the delay counts from its beginning.
    Returns False if the process had ended, or the stage had before its moment came.
    """
    before, deadline, order = None, time.monotonic() + 1200, smallest.STAGES.index
    while process.poll() is None and time.monotonic() < deadline:
        now = current(workdir)
        if now is None or order(now) > order(stage):
            break
        if now == stage:
            before = before or written(workdir)
            whole, begun = checkpoints(workdir, stage)
            if delay is None and begun and len(whole) >= 2:
                break
            if delay is not None and (stage not in TRAINED or written(workdir) != before):
                time.sleep(delay)
                break
        time.sleep(0.001)
    process.kill()
    return process.wait(timeout=60) < 0


def cut_newest(workdir: Path, stage: str) -> None:
    """Halves the largest file of the newest whole checkpoint."""
    whole, _ = checkpoints(workdir, stage)
    largest = max((path for path in whole[-1].rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def experiment(folder: Path, seed: int = 0) -> dict:
    """Kills by stage, those of them while a checkpoint was written, checkpoints cut short, and what was different."""
    runs, rng = Runs(folder, *OVERRIDES), random.Random(seed)
    runs.finish("straight")
    workdir = folder / "killed"
    kills, saving, cut = Counter(), Counter(), Counter()
    for stage, plan in PLAN.items():
        for how in plan:
            delay = None if how == "save" else rng.uniform(0.0, LONGEST[stage in TRAINED])
            if current(workdir) is None or not kill(runs.start("killed"), workdir, stage, delay):
                continue
            where = current(workdir) or "evaluate"
            kills[where] += 1
            whole, begun = checkpoints(workdir, where)
            saving[where] += bool(begun)
            if how == "save" and begun and len(whole) >= 2 and not cut[where]:
                cut_newest(workdir, where)
                cut[where] += 1
    runs.finish("killed")
    straight = folder / "straight"
    differing = [name for name in RESULTS if (straight / name).read_bytes() != (workdir / name).read_bytes()]
    one, other = (json.loads((path / "summary.json").read_text()) for path in (straight, workdir))
    differing += [n for n in one.keys() | other.keys() if not n.startswith("time/") and one.get(n) != other.get(n)]
    left = [str(p) for p in workdir.rglob("*") if p.name.endswith(("tmp", ".tmp")) or p.name.startswith(".")]
    lines = [line for line in runs.said("killed").splitlines() if CUT in line]
    return {"kills": kills, "saving": saving, "cut": cut, "said": lines, "differing": differing, "left": left}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are kept; default: nowhere")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        began = time.perf_counter()
        found = experiment(arguments.folder or Path(nowhere), arguments.seed)
        seconds = time.perf_counter() - began
    print(f"{machine()}; seed {arguments.seed}; {seconds:.0f} s\n")
    print("| stage | kills | while a checkpoint was written | newest checkpoint cut short |\n|---|---|---|---|")
    for stage in smallest.STAGES:
        print(f"| {stage} | {found['kills'][stage]} | {found['saving'][stage]} | {found['cut'][stage]} |")
    totals = [found[key].total() for key in ("kills", "saving", "cut")]
    print("| **all** | " + " | ".join(f"**{total}**" for total in totals) + " |\n")
    differing = found["differing"]
    print(f"Differs from the straight run: {', '.join(differing) if differing else 'nothing'}.")
    return 1 if differing or found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
