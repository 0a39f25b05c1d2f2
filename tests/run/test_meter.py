"""What a stage has cost, over processes; a trace of its steps."""

import json
import time

import jax.numpy as jnp

from lfjax.run.meter import Meter
from lfjax.run.training import Trace
from lfjax.sharding import Step, jit_step


def slow_compile(name: str, shape: int):
    step = jit_step(lambda x: jnp.sin(x) + x, name=name)
    step.compile(jnp.zeros(shape))
    return step


def test_compiling_inside_a_part_is_not_the_parts_time(monkeypatch):
    meter = Meter()
    began = time.perf_counter()
    with meter.part("train"):
        slow_compile("meter", 3)
        monkeypatch.setattr(Step, "seconds", Step.seconds + 1000.0)  # as if that had taken so long
    elapsed = time.perf_counter() - began
    reading = meter.read()
    assert reading["parts"]["compile"] > 1000.0
    assert reading["parts"]["train"] + reading["parts"]["compile"] <= elapsed < reading["parts"]["compile"]
    assert [name.split("/")[0] for name in reading["programs"]] == ["meter"]


def test_a_later_process_adds_its_time_and_counts_no_program_twice():
    first = Meter()
    with first.part("save"):
        slow_compile("meter a", 4)
        time.sleep(0.02)
    saved = json.loads(json.dumps(first.read()))
    second = Meter()
    second.restore(saved)
    slow_compile("meter a", 4)  # again, after a crash
    slow_compile("meter b", 4)
    with second.part("save"):
        time.sleep(0.02)
    reading = second.read()
    assert reading["parts"]["save"] >= 0.04 and reading["seconds"] >= saved["seconds"] + 0.02
    assert reading["parts"]["compile"] > saved["parts"]["compile"]
    assert sorted(name.split("/")[0] for name in reading["programs"]) == ["meter a", "meter b"]
    assert set(reading["programs"].values()) == {1}


def test_a_program_compiled_twice_in_one_process_shows():
    meter = Meter()
    slow_compile("meter c", 5)
    slow_compile("meter c", 5)
    assert list(meter.read()["programs"].values()) == [2]


class Traced:
    """What `Trace` reads of a run."""

    def __init__(self, workdir, profile):
        self.workdir, self.profile = workdir, profile


def trace(tmp_path, profile: int, steps: int) -> list[str]:
    traced, seen = Trace(Traced(tmp_path, profile), "ppo"), []
    for index in range(steps):
        traced.before(index)
        x = jnp.sin(jnp.ones(index + 2))
        traced.after(index, x)
    traced.close()
    seen += [path.name for path in (tmp_path / "profile").rglob("*") if path.is_file()] if profile else []
    return seen


def test_a_profile_is_a_trace_for_perfetto_and_xprof(tmp_path):
    names = trace(tmp_path, profile=2, steps=8)
    assert "perfetto_trace.json.gz" in names and any(name.endswith(".xplane.pb") for name in names)


def test_without_a_profile_or_with_too_few_steps_nothing_is_written(tmp_path):
    assert trace(tmp_path, profile=0, steps=8) == [] and not (tmp_path / "profile").exists()
    assert trace(tmp_path, profile=2, steps=3) == []
