"""The whole chain on two processes gives what one process gives."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import smallest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOSSES = ("pretrain/loss", "sft/loss", "reward/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/kl")


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_give_one_processs_losses_through_every_stage(tmp_path):
    records = smallest.write_records(tmp_path / "rated.jsonl")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT / "tests")}
    launchers = {"one": [], "two": [sys.executable, "launch/local_cluster.py", "-n", "2", "--devices", "1", "--"]}
    for name, launcher in launchers.items():
        train = [sys.executable, "-m", "lfjax.cli", "train", f"--config={smallest.PATH}"]
        command = [*launcher, *train, f"--workdir={tmp_path / name}", f"--config.data.path={records}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in two]
    compared = 0
    for a, b in zip(one, two, strict=True):
        for name in LOSSES:
            if name in a:
                assert math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=1e-5), (a["stage"], a["step"], name)
                compared += 1
    assert compared > 20
