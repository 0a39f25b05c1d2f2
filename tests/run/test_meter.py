"""What a stage has cost, over processes; a trace of its steps."""

import contextlib
import json
import time
import types

import jax
import jax.numpy as jnp
import smallest

from lfjax.metrics import Window
from lfjax.run.devices import Devices
from lfjax.run.meter import Meter
from lfjax.run.training import Pace, Trace
from lfjax.sharding import Step, jit_step, make_mesh


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


def test_speed_counts_the_tokens_of_the_steps_that_were_timed(monkeypatch):
    """Steps of 10 and of 40 tokens a row: rates are of what was done in the interval, not of an average step.

    The CPU is busy when its rate is first measured: steps that are faster have it measured again.
    """
    rates = iter([1000.0, 3000.0])
    monkeypatch.setattr("lfjax.run.devices.peak_flops", lambda device: next(rates))
    rows, clock = [], {"train": 5.0}
    meter = types.SimpleNamespace(seconds=clock.get, part=lambda name: contextlib.nullcontext())
    timing = lambda stage, step, **figures: rows.append(figures)  # noqa: E731
    log = types.SimpleNamespace(metrics=lambda *row: None, timing=timing)
    devices, shown = Devices(make_mesh(devices=jax.devices()[:1])), types.SimpleNamespace(update=lambda *_, **__: None)
    run = types.SimpleNamespace(meter=meter, log=log, devices=devices, config=smallest.get_config())
    work = lambda index: (10.0, 100.0) if index < 3 else (40.0, 1600.0)  # noqa: E731
    pace = Pace(run, "reward", work, None, shown, "loss")
    for index in range(5):
        pace.took(index)
        if index in (1, 4):
            clock["train"] += 2.0
            pace.log(Window(), {}, index + 1)
    assert [row["tokens_per_s"] for row in rows] == [20.0 / 2, 90.0 / 2]
    assert [row["mfu"] for row in rows] == [200.0 / 2 / 1000, 3300.0 / 2 / 3000]
