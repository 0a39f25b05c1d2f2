"""Every program is compiled once, before the loop needs it, and counted."""

import collections
import json

import jax
import pytest
import smallest

from lfjax.run import training

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture(scope="module")
def watched(tmp_path_factory, train):
    """(run directory, text of every compiled Step program, (stage, step) -> backend compilations before that step)."""
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    programs: list[str] = []
    compiled = [0]
    seen: dict = collections.OrderedDict()
    lowered_compile = jax.stages.Lowered.compile

    def compile_and_note(self, *args, **options):
        programs.append(self.as_text())
        return lowered_compile(self, *args, **options)

    def note(event: str, _seconds: float, **_):
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    def train_and_note(run, stage, state, step, **options):
        def counted(state, index):
            seen[stage, index] = compiled[0]
            return step(state, index)

        return plain(run, stage, state, counted, **options)

    plain = training.train
    jax.monitoring.register_event_duration_secs_listener(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_and_note)
        patch.setattr(training, "train", train_and_note)
        assert train(workdir) == 0
    jax.monitoring.unregister_event_duration_listener(note)
    return workdir, programs, seen


def test_the_count_is_that_of_the_programs(watched):
    workdir, programs, _ = watched
    assert json.loads((workdir / "summary.json").read_text())["compile/count"] == len(programs)


def test_no_program_is_compiled_twice(watched):
    """Also across stages: the evaluation samples and scores with PPO's programs."""
    workdir, programs, _ = watched
    place = 0
    for stage in smallest.STAGES:
        counts = json.loads((workdir / "checkpoints" / stage / "FINISHED").read_text())["programs"]
        assert set(counts.values()) <= {1}, stage
        texts = programs[place : place + len(counts)]
        assert len(set(texts)) == len(texts), stage
        place += len(counts)
    assert place == len(programs)
    assert [name.split("/")[0] for name in counts] == ["evaluate logprobs"]  # of the last stage


def test_another_rate_schedule_clipping_or_length_is_the_same_program(watched, train, tmp_path):
    """They are arguments: a run with other ones compiles nothing that is not in the cache."""
    _, programs, _ = watched
    found: list[str] = []
    lowered_compile = jax.stages.Lowered.compile

    def compile_and_note(self, *args, **options):
        found.append(self.as_text())
        return lowered_compile(self, *args, **options)

    given = ["--config.stages=tokenizer,pretrain,reward,ppo", "--config.pretrain.steps=3", "--config.reward.steps=2"]
    given += ["--config.ppo.steps=2", "--config.reward.init_from=pretrain", "--config.ppo.init_from=pretrain"]
    for optim in ("pretrain.optim", "reward.optim", "ppo.optim", "ppo.value_optim"):
        numbers = {"learning_rate": 3e-3, "warmup_steps": 1, "end_factor": 0.3, "clip_norm": 0.5}
        given += [f"--config.{optim}.{name}={value}" for name, value in numbers.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_and_note)
        assert train(tmp_path / "w", *given) == 0
    assert len(found) > 8 and set(found) <= set(programs)
    rows = map(json.loads, (tmp_path / "w" / "metrics.jsonl").read_text().splitlines())
    assert max(row.get("optim/learning_rate", 0.0) for row in rows) == pytest.approx(3e-3)  # the numbers did arrive


@pytest.mark.parametrize("stage, warm", [("pretrain", 4), ("sft", 3), ("reward", 4), ("ppo", 4)])
def test_nothing_compiles_inside_the_loop_once_every_part_of_it_has_run(stage, warm, watched):
    """From the first step after the first log row, sample and checkpoint to the last."""
    _, _, seen = watched
    counts = [count for (name, _), count in seen.items() if name == stage]
    assert len(counts) > warm and counts[warm:] == [counts[warm]] * len(counts[warm:])


def test_reward_buckets_are_compiled_before_the_first_step(watched):
    """Both lengths' programs, and only these, whatever the order in which they are needed."""
    _, _, seen = watched
    counts = [seen["reward", index] for index in range(3)]
    assert counts[0] == counts[1] == counts[2]
