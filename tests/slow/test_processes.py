"""The whole chain on other devices and processes, stopped, and gone on with on others again: benchmarks/meshes.py."""

import os
import pathlib
import shutil
import signal
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import kills
import meshes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> kills.Runs:
    return kills.Runs(tmp_path_factory.mktemp("meshes"), *meshes.OVERRIDES)


@pytest.fixture(scope="module")
def straight(runs) -> dict[str, pathlib.Path]:
    for name, leg in meshes.STRAIGHT.items():
        meshes.travel(runs, name, (leg,))
    return {name: runs.folder / name for name in meshes.STRAIGHT}


@pytest.fixture(scope="module")
def stopped(runs, straight) -> dict[str, list[dict]]:
    return {name: meshes.travel(runs, name, legs) for name, legs in meshes.STOPPED.items()}


@pytest.mark.parametrize("name", list(meshes.STRAIGHT)[1:])
def test_other_devices_and_processes_give_one_devices_losses(straight, name):
    found = meshes.difference(straight["1 device"], straight[name])
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("name", list(meshes.STOPPED))
def test_so_do_runs_that_go_on_with_others(runs, straight, stopped, name):
    found = meshes.difference(straight["1 device"], runs.folder / name)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("name", list(meshes.STOPPED))
def test_a_stop_of_one_process_makes_all_save_the_same_step_and_end_with_130(stopped, name):
    assert len(stopped[name]) == len(meshes.STOPPED[name]) - 1
    for stop in stopped[name]:
        leg = stop["leg"]
        assert stop["code"] == 130, stop["text"][-2000:]
        assert "local_cluster" not in stop["text"]  # every process ended with 130
        assert len(stop["places"]) == leg.processes and len(set(stop["places"])) == 1, stop
        stage, step = stop["places"][0]
        assert stage == leg.stage
        assert step in stop["saved"]


@pytest.mark.parametrize(
    "name, like", [("8, then 4, then 1", "8 devices, data 8"), ("2 of 2, three times", "2 processes of 2 devices")]
)
def test_where_devices_and_processes_are_the_same_so_is_every_bit(runs, straight, stopped, name, like):
    if name == "2 of 2, three times":
        assert meshes.same(straight[like], runs.folder / name)
    count = stopped[name][0]["rows"]  # up to the first stop
    one, other = (meshes.rows(workdir)[:count] for workdir in (straight[like], runs.folder / name))
    assert count > 4 and one == other


def test_a_stop_of_one_process_in_the_evaluation_ends_both_and_nothing_is_lost(runs, straight):
    leg, workdir = meshes.STRAIGHT["2 processes of 2 devices"], runs.folder / "evaluated again"
    shutil.copytree(straight["2 processes of 2 devices"], workdir)
    (workdir / "checkpoints" / "evaluate" / "FINISHED").unlink()
    command, environment = meshes.launcher(leg)
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
    before, process = log.stat().st_ino, runs.start(workdir.name, command, **environment)
    while log.stat().st_ino == before:  # the stage begins by cutting it
        assert process.poll() is None and time.monotonic() < deadline, runs.said(workdir.name)
        time.sleep(0.002)
    os.kill(meshes.members(process, leg)[1], signal.SIGTERM)
    assert process.wait(timeout=300) == 130
    assert runs.said(workdir.name).count("stage evaluate stopped in its evaluation") == 2
    runs.finish(workdir.name, command, **environment)
    assert kills.differing(straight["2 processes of 2 devices"], workdir) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_of_a_killed_process_the_launcher_says_so_and_the_other_is_gone_within_a_minute(runs, straight, victim):
    name = f"killed {victim}"
    leg = meshes.STRAIGHT["2 processes of 2 devices"]
    command, environment = meshes.launcher(leg)
    process = runs.start(name, command, **environment)
    meshes.wait_for(process, runs.folder / name / "checkpoints" / "sft")
    pids = meshes.members(process, leg)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(timeout=120) == 128 + signal.SIGKILL
    assert time.monotonic() - killed < 60
    assert f"local_cluster: process {victim} was killed by SIGKILL; ending the others\n" in runs.said(name)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
