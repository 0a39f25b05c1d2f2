"""The same run on other devices and processes, and stopped by SIGTERM and gone on with on others again.

    python benchmarks/meshes.py [--folder=FOLDER]

The run is tests/smallest.py; several processes talk through gloo (launch/local_cluster.py). SIGTERM goes to one process
alone. Printed: the largest difference of any row of a loss from the run on one device.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kills import ROOT, Runs, results
from machine import machine

LOSSES = ("pretrain/loss", "sft/loss", "reward/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/kl")
OVERRIDES = ("--config.sft.steps=10",)  # as many as the other stages, which leaves time to stop it
QUICK = "--xla_backend_optimization_level=0"  # halves the time that this is mostly about, that of compiling


class Leg(NamedTuple):
    """A part of a run: processes, devices of each, the stage in which SIGTERM comes and the process that gets it.

    `mesh`: devices along data, fsdp and tensor.
    """

    processes: int
    devices: int
    stage: str = ""
    victim: int = 0
    mesh: tuple[int, int, int] = (-1, 1, 1)

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(f"--config.mesh.{a}={n}" for a, n in zip(("data", "fsdp", "tensor"), self.mesh, strict=True))


STRAIGHT = {
    "1 device": Leg(1, 1),
    "8 devices, data 8": Leg(1, 8),
    "fsdp 8": Leg(1, 8, mesh=(1, 8, 1)),
    "data 2, fsdp 2, tensor 2": Leg(1, 8, mesh=(2, 2, 2)),
    "fsdp 2, tensor 4": Leg(1, 8, mesh=(1, 2, 4)),
    "2 processes of 2 devices": Leg(2, 2),
}
STOPPED = {
    "8, then 4, then 1": (Leg(1, 8, "sft"), Leg(1, 4, "reward"), Leg(1, 1)),
    "2 of 2, then 1 of 4, then 2 of 2, then 1 of 4": (
        Leg(2, 2, "sft", 1),
        Leg(1, 4, "reward"),
        Leg(2, 2, "ppo", 0),
        Leg(1, 4),
    ),
    "2 of 2, three times": (Leg(2, 2, "reward", 0), Leg(2, 2, "ppo", 1), Leg(2, 2)),
}


def launcher(leg: Leg) -> tuple[tuple[str, ...], dict[str, str]]:
    """Command and environment that give a leg its processes and devices."""
    if leg.processes == 1:
        return (), {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={leg.devices}"}
    script = str(ROOT / "launch" / "local_cluster.py")
    command = (sys.executable, script, "-n", str(leg.processes), "--devices", str(leg.devices), "--")
    return command, {"XLA_FLAGS": QUICK}


def members(process: subprocess.Popen, leg: Leg) -> list[int]:
    """The process ids of a leg, by LFJAX_PROCESS_ID."""
    if leg.processes == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in children)  # started in this order


def wait_for(process: subprocess.Popen, folder: Path) -> None:
    """Returns once the folder is there: a stage makes that of its checkpoints before its first step."""
    deadline = time.monotonic() + 1200
    while not folder.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{folder} did not appear; exit code {process.poll()}")
        time.sleep(0.002)


def travel(runs: Runs, name: str, legs: tuple[Leg, ...]) -> list[dict]:
    """Runs the legs one after the other; of each but the last: its exit code, where each process says it stopped."""
    stops = []
    for leg in legs:
        command, environment = launcher(leg)
        if not leg.stage:
            runs.finish(name, command, leg.options, **environment)
            continue
        said = len(runs.said(name)) if stops else 0
        process = runs.start(name, command, leg.options, **environment)
        wait_for(process, runs.folder / name / "checkpoints" / leg.stage)
        os.kill(members(process, leg)[leg.victim], signal.SIGTERM)
        code = process.wait(timeout=600)
        text = runs.said(name)[said:]
        places = re.findall(r"stage (\w+) stopped and saved at step (\d+)", text)
        saved = {path.name for path in (runs.folder / name / "checkpoints" / leg.stage).iterdir()}
        rows = len((runs.folder / name / "metrics.jsonl").read_text().splitlines())
        stops.append({"leg": leg, "code": code, "places": places, "saved": saved, "rows": rows, "text": text})
    return stops


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path, *, relative: bool = True) -> dict[str, float]:
    """The largest difference of each loss over all rows; relative, those of at most 1e-5 left out, or absolute.

    Raises:
      ValueError: not the same rows, or none of the losses.
    """
    found: dict[str, float] = {}
    for a, b in zip(rows(one), rows(other), strict=True):
        if (a["stage"], a["step"]) != (b["stage"], b["step"]):
            raise ValueError(f"{other}: {b['stage']} {b['step']} where {a['stage']} {a['step']} was expected")
        for name in LOSSES:
            if name in a:
                gap = abs(a[name] - b[name])
                if relative:
                    gap = 0.0 if gap <= 1e-5 else gap / max(abs(a[name]), abs(b[name]))
                found[name] = max(found.get(name, 0.0), gap if math.isfinite(gap) else math.inf)
    if set(found) != set(LOSSES):
        raise ValueError(f"{other}: no {', '.join(set(LOSSES) - set(found))}")
    return found


def same(one: Path, other: Path) -> bool:
    """Whether logs and parameters are the same, bit for bit."""
    return results(one) == results(other)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        began = time.perf_counter()
        runs = Runs(arguments.folder or Path(nowhere), *OVERRIDES)
        for name, leg in STRAIGHT.items():
            travel(runs, name, (leg,))
        for name, legs in STOPPED.items():
            travel(runs, name, legs)
        names = [name.partition("/")[0] for name in LOSSES[:3]] + ["policy", "value", "KL"]
        print(f"{machine()}; {time.perf_counter() - began:.0f} s\n")
        print("| run | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
        for name in (*STRAIGHT, *STOPPED):
            found = difference(runs.folder / "1 device", runs.folder / name, relative=False)
            print(f"| {name} | " + " | ".join(f"{found[loss]:.1e}" if found[loss] else "0" for loss in LOSSES) + " |")


if __name__ == "__main__":
    main()
