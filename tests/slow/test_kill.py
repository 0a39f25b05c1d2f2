"""kill -9 at random moments of every stage, the same command again, and the run ends with the same bits."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import smallest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stages")]

TRAINED = ("pretrain", "sft", "reward", "ppo")
RESULTS = ("metrics.jsonl", "samples.jsonl", *(f"models/{stage}/model.safetensors" for stage in TRAINED))
KILLS = 3  # a stage
# More steps, and a checkpoint every other one: a stage spends its time in saves, where a kill hurts most.
OVERRIDES = (
    *(f"--config.{stage}.save_every=2" for stage in TRAINED),
    *(f"--config.{stage}.steps=30" for stage in ("pretrain", "sft", "reward")),
    "--config.ppo.steps=16",
    "--config.run.tensorboard=True",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir) starts the command in its own process; programs are compiled once for all of them."""
    folder = tmp_path_factory.mktemp("kills")
    records = smallest.write_records(folder / "rated.jsonl")
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def process(workdir: pathlib.Path) -> subprocess.Popen:
        given = (f"--config={smallest.PATH}", f"--workdir={workdir}", f"--config.data.path={records}", *OVERRIDES)
        command = [sys.executable, "-m", "lfjax.cli", "train", *given]
        with (folder / f"{workdir.name}.log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    return process


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    assert start(workdir).wait(timeout=900) == 0
    return workdir


def files(folder: pathlib.Path) -> set[str] | None:
    return {path.name for path in folder.iterdir()} if folder.exists() else None


def kill_in(process: subprocess.Popen, folder: pathlib.Path, delay: float) -> bool:
    """Kills `delay` seconds after the stage's folder has changed; False where the process ended before that."""
    before, deadline = files(folder), time.monotonic() + 600
    while files(folder) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return kill_after(process, delay)


def kill_after(process: subprocess.Popen, delay: float) -> bool:
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        return True
    assert process.returncode == 0
    return False


@pytest.fixture(scope="module")
def killed(start, straight, tmp_path_factory) -> tuple[pathlib.Path, dict[str, int]]:
    """The run killed again and again in every stage, then left alone; and how often it was killed in each.

    In every stage first a fraction of a second after a checkpoint was begun, then at any moment of the process's life.
    """
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    rng, count = random.Random(0), dict.fromkeys(smallest.STAGES, 0)
    for stage in smallest.STAGES:
        folder = workdir / "checkpoints" / stage
        for _ in range(KILLS):
            if not (folder / "FINISHED").exists():
                count[stage] += kill_in(start(workdir), folder, rng.uniform(0.0, 0.4))
        if not (folder / "FINISHED").exists():
            count[stage] += kill_after(start(workdir), rng.uniform(2.0, 12.0))
    assert start(workdir).wait(timeout=900) == 0
    return workdir, count


def test_every_training_stage_was_killed(killed):
    assert all(killed[1][stage] for stage in TRAINED), killed[1]


@pytest.mark.parametrize("name", RESULTS)
def test_logs_and_parameters_are_those_of_the_run_that_nobody_killed(name, straight, killed):
    assert (straight / name).read_bytes() == (killed[0] / name).read_bytes()


def test_the_summary_is_the_same_but_for_the_clock(straight, killed):
    one, other = (json.loads((workdir / "summary.json").read_text()) for workdir in (straight, killed[0]))
    for summary in (one, other):
        del summary["time/total_s"], summary["compile/count"]
    assert one == other


def test_nothing_half_written_is_left(killed):
    left = [path for path in killed[0].rglob("*") if path.name.endswith((".tmp", "-tmp")) or path.name.startswith(".")]
    assert left == []
