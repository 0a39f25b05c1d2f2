"""A run that crashes, or is asked to stop, in every stage ends as the undisturbed run does, bit for bit."""

import json
import os
import pathlib
import shutil
import signal

import pytest

from lfjax.run import data, heads, training, writing

pytestmark = pytest.mark.xdist_group("stages")
TRAINED = ("pretrain", "sft", "reward", "ppo")
RESULTS = ("metrics.jsonl", "samples.jsonl", *(f"models/{stage}/model.safetensors" for stage in TRAINED))


class Crash(Exception):
    """Raised in the middle of a stage."""


@pytest.fixture(scope="module")
def disturb():
    """disturb({(stage, step): what}) calls `what` once, when that step is about to be taken (steps count from 0)."""
    plan: dict = {}

    def train(run, stage, state, step, **options):
        def disturbed(state, index):
            plan.pop((stage, index), lambda: None)()
            return step(state, index)

        return undisturbed(run, stage, state, disturbed, **options)

    undisturbed = training.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", train)
        yield plan


def crash():
    raise Crash


@pytest.fixture(scope="module")
def crashed(tmp_path_factory, train, disturb) -> pathlib.Path:
    """The run crashed in each stage between two checkpoints, and inside a log interval, and was started again."""
    workdir = tmp_path_factory.mktemp("runs") / "crashed"
    disturb.update({("pretrain", 2): crash, ("pretrain", 7): crash, ("reward", 7): crash, ("ppo", 5): crash})
    while disturb:
        before = len(disturb)
        with pytest.raises(Crash):
            train(workdir)
        assert len(disturb) == before - 1
    assert train(workdir) == 0
    return workdir


STOPS = {
    ("pretrain", 4): signal.SIGTERM,
    ("sft", 1): signal.SIGINT,
    ("reward", 6): signal.SIGTERM,
    ("ppo", 2): signal.SIGTERM,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, train, disturb) -> tuple[pathlib.Path, list, list]:
    """The run was asked to stop in each stage; with what it had saved by then and said."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    seen = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for (stage, step), number in STOPS.items():
        disturb[stage, step] = lambda number=number: os.kill(os.getpid(), number)
        code = train(workdir)
        saved = {int(path.name) for path in (workdir / "checkpoints" / stage).iterdir()}
        seen.append((stage, step, code, saved))
    assert train(workdir) == 0
    return workdir, seen, handlers


def same(a: pathlib.Path, b: pathlib.Path, name: str) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("stage", TRAINED)
def test_after_crashes_the_parameters_are_those_of_the_straight_run(stage, straight, crashed):
    assert same(straight, crashed, f"models/{stage}/model.safetensors")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_after_crashes_the_logs_are_those_of_the_straight_run(name, straight, crashed):
    assert same(straight, crashed, name)


def test_after_crashes_the_summary_differs_in_nothing_but_the_clock(straight, crashed):
    one, other = (json.loads((workdir / "summary.json").read_text()) for workdir in (straight, crashed))
    for clock in ("time/total_s", "time/goodput"):
        assert one.pop(clock) != other.pop(clock)
    assert one == other


def test_a_stop_saves_at_that_step_and_exits_with_130(stopped):
    for stage, step, code, saved in stopped[1]:
        assert code == 130, stage
        assert step + 1 in saved, f"{stage}: stopped in step {step + 1}, saved {saved}"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", *(f"models/{s}/model.safetensors" for s in TRAINED)]
)
def test_after_stops_everything_is_as_in_the_straight_run(name, straight, stopped):
    assert same(straight, stopped[0], name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_before_the_first_stage_exits_with_130_and_leaves_nothing(number, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_records", lambda _: os.kill(os.getpid(), number))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        assert train(tmp_path / "w") == 130
        assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        for n in (signal.SIGINT, signal.SIGHUP):
            signal.signal(n, handlers[n])
    assert not (tmp_path / "w").exists()
    assert capsys.readouterr().err == "interrupted; the same command goes on from what is saved\n"


def test_signal_handlers_are_given_back(stopped):
    *_, handlers = stopped
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def check_summaries(straight, workdir):
    """All figures are equal, but for those of the clock."""
    one, other = (json.loads((w / "summary.json").read_text()) for w in (straight, workdir))
    for clock in ("time/total_s", "time/goodput"):
        assert one.pop(clock) != other.pop(clock)
    assert one == other


def test_a_kill_between_the_last_checkpoint_and_the_result_loses_nothing(straight, train, tmp_path):
    """PPO's last checkpoint is saved; its result, what says that it is done, and the evaluation are not there yet."""
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    shutil.rmtree(workdir / "models" / "ppo")
    shutil.rmtree(workdir / "checkpoints" / "evaluate")
    (workdir / "checkpoints" / "ppo" / "FINISHED").unlink()
    (workdir / "summary.json").unlink()
    assert train(workdir) == 0
    assert all(same(straight, workdir, name) for name in RESULTS)
    check_summaries(straight, workdir)


def asks_to_stop(at: int, seen: list, function):
    """The function, which notes every call in `seen` and sends SIGTERM in the call of this number."""

    def asking(*arguments, **options):
        seen.append(len(seen))
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return asking


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stop_in_the_evaluation_ends_it_within_a_batch(batch, straight, train, tmp_path, monkeypatch, capsys):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    (workdir / "checkpoints" / "evaluate" / "FINISHED").unlink()
    seen: list = []  # of the 4 batches, 2 a model
    with monkeypatch.context() as patch:
        patch.setattr(writing.Policy, "rollout", asks_to_stop(batch, seen, writing.Policy.rollout))
        assert train(workdir) == 130
    assert len(seen) == batch
    assert (
        "stage evaluate stopped in its evaluation, which will be made again; start the same" in capsys.readouterr().err
    )
    assert not (workdir / "checkpoints" / "evaluate" / "FINISHED").exists()
    assert train(workdir) == 0
    assert all(same(straight, workdir, name) for name in RESULTS)
    check_summaries(straight, workdir)


def test_a_stop_in_a_reward_models_last_evaluation_ends_it_within_a_batch(straight, train, tmp_path, monkeypatch):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    (workdir / "checkpoints" / "reward" / "FINISHED").unlink()
    for stage in ("ppo", "evaluate"):
        shutil.rmtree(workdir / "checkpoints" / stage)
    seen: list = []
    with monkeypatch.context() as patch:
        patch.setattr(heads, "global_batch", asks_to_stop(2, seen, heads.global_batch))
        assert train(workdir) == 130
    assert len(seen) == 2
    assert train(workdir) == 0
    assert all(same(straight, workdir, name) for name in RESULTS)


def test_a_torn_last_line_is_dropped(straight, train, tmp_path):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    for name in ("metrics.jsonl", "samples.jsonl", "timing.jsonl"):
        with (workdir / name).open("a") as file:
            file.write('{"stage": "evaluate", "st')
    (workdir / "checkpoints" / "evaluate" / "FINISHED").unlink()
    assert train(workdir) == 0
    assert same(straight, workdir, "metrics.jsonl") and same(straight, workdir, "samples.jsonl")
