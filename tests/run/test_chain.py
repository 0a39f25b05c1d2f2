"""The chain of stages on one device: what a run leaves behind, what is taken from the config, when it stops itself."""

import collections
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import smallest

from lfjax.interop import hf
from lfjax.run.checks import unread
from lfjax.run.language import gentle_rate
from lfjax.sharding import Step
from lfjax.stages import declared
from lfjax.stages.evaluate import judges_named, trained_on

pytestmark = pytest.mark.xdist_group("stages")


def rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def from_models(straight: pathlib.Path, stage: str = "pretrain") -> list[str]:
    """Overrides that start a run of later stages from another run's models."""
    models = straight / "models"
    return [f"--config.tokenizer.path={models}/tokenizer", *start(straight, stage)]


def start(straight: pathlib.Path, stage: str) -> list[str]:
    return [f"--config.{section}.init_from={straight}/models/{stage}" for section in ("sft", "reward", "ppo")]


def test_a_run_leaves_the_files_of_every_stage(straight):
    stages = smallest.STAGES
    assert {path.name for path in straight.iterdir()} == {
        "config.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "summary.json", "checkpoints", "models",
        "inputs.json", "stages.json", "report.html",
    }  # fmt: skip
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {*stages}
    for stage in stages:
        done = json.loads((straight / "checkpoints" / stage / "FINISHED").read_text())
        assert {"figures", "seconds", "programs"} <= done.keys()
    for stage in ("pretrain", "sft", "reward", "ppo"):
        files = {path.name for path in (straight / "models" / stage).iterdir()}
        tokenizer = {"tokenizer.model", "tokenizer_config.json"}
        assert files - {"generation_config.json"} == {"config.json", "model.safetensors", *tokenizer}
        assert ("generation_config.json" in files) == (stage != "reward")
    assert "<html" in (straight / "report.html").read_text()
    assert json.loads((straight / "config.json").read_text())["pretrain"]["steps"] == 10


def test_checkpoints_are_saved_when_the_config_says_and_the_last_ones_kept(straight):
    steps = {
        stage: sorted(int(path.name) for path in (straight / "checkpoints" / stage).iterdir() if path.is_dir())
        for stage in ("pretrain", "sft", "reward", "ppo")
    }
    assert steps == {"pretrain": [8, 10], "sft": [4], "reward": [8, 10], "ppo": [4, 6]}


def test_metrics_have_a_row_every_log_interval_and_nothing_that_depends_on_the_clock(straight):
    found = rows(straight)
    steps = {stage: [row["step"] for row in found if row["stage"] == stage] for stage in smallest.STAGES[1:]}
    validated = [3, 3, 5, 6, 8, 9, 10, 10]  # a row every three steps, and a validation after each quarter
    assert steps == {
        "pretrain": validated, "sft": [1, 2, 3, 3, 4, 4], "reward": validated, "ppo": [1, 2, 3, 4, 5, 6],
        "evaluate": [0],
    }  # fmt: skip
    names = {name for row in found for name in row}
    assert not [name for name in names if any(word in name for word in ("second", "time", "per_s", "wall", "mfu"))]
    assert {name.partition("/")[0] for name in names} <= {
        "stage", "step", "optim", "pretrain", "sft", "reward", "ppo", "judge", "diversity",
    }  # fmt: skip
    timed = rows(straight, "timing.jsonl")
    assert [row["step"] for row in timed if row["stage"] == "pretrain"] == [3, 6, 9, 10]
    assert all(row["seconds"] > 0 and row["tokens_per_s"] > 0 for row in timed)


def test_samples_hold_what_people_read_in_the_report(straight):
    found = rows(straight, "samples.jsonl")
    assert collections.Counter((row["stage"], row["step"]) for row in found) == {
        ("ppo", 3): 8, ("ppo", 6): 8, ("evaluate", 0): 12,
    }  # fmt: skip
    assert all({"prompt", "response", "score", "logprob", "kl"} <= row.keys() for row in found)
    written = [row["score"] for row in found if row["stage"] == "ppo" and row["step"] == 6]
    row = next(row for row in rows(straight) if row["stage"] == "ppo" and row["step"] == 6)
    assert np.mean(written) == pytest.approx(row["ppo/raw_score"], rel=1e-4)  # the batch is shown whole
    sides = {side: [row["prompt"] for row in found if row.get("set") == side] for side in ("before", "after")}
    assert len(sides["before"]) == 4 and sides["before"] == sides["after"]


def test_the_summary_has_the_figures_of_every_stage(straight):
    summary = json.loads((straight / "summary.json").read_text())
    wanted = """pretrain/perplexity pretrain/unigram_perplexity pretrain/bits_per_byte sft/perplexity
        reward/pair_accuracy reward/pair_accuracy_lexicon reward/pair_accuracy_ridge ppo/score_before ppo/score_after
        ppo/kl ppo/length_before ppo/length_after ppo/eos_share_before ppo/eos_share_after judge/positive_before
        judge/positive_after judge/positive_human time/total_s compile/count tokenizer/vocab_size data/rows"""
    assert {*wanted.split()} <= summary.keys()
    assert all(not isinstance(value, dict) for value in summary.values())
    assert summary["pretrain/perplexity"] == pytest.approx(math.exp(summary["pretrain/validation_loss"]))
    assert summary["sft/perplexity_before"] > summary["sft/perplexity"]
    assert summary["tokenizer/vocab_size"] == 310 and summary["data/rows"] == 120
    done = [json.loads((straight / "checkpoints" / stage / "FINISHED").read_text()) for stage in smallest.STAGES]
    assert summary["time/total_s"] == pytest.approx(sum(each["seconds"] for each in done))


def test_held_out_figures_have_their_number_and_interval_in_the_summary_and_there_alone(straight):
    summary = json.loads((straight / "summary.json").read_text())
    for name in ("pretrain/perplexity", "pretrain/bits_per_byte", "sft/validation_loss", "sft/perplexity_change",
                 "reward/pair_accuracy", "reward/validation_mse", "reward/pair_accuracy_over_ridge"):  # fmt: skip
        assert summary[f"{name}_low"] < summary[name] < summary[f"{name}_high"] and summary[f"{name}_n"] > 1, name
    held_out = json.loads((straight / "config.json").read_text())["data"]["validation_fraction"] * 120
    assert summary["pretrain/perplexity_n"] == summary["data/validation/records"] == pytest.approx(held_out, rel=0.5)
    assert not [name for row in rows(straight) for name in row if name.endswith(("_n", "_low", "_high"))]


def test_every_stage_learns_from_the_one_before(straight):
    """The parameters move from stage to stage, and PPO starts from what sft made of the pretrained model."""
    weights = {
        stage: safetensors.numpy.load_file(straight / "models" / stage / "model.safetensors")
        for stage in ("pretrain", "sft", "ppo")
    }
    name = "model.layers.0.mlp.up_proj.weight"
    for earlier, later in (("pretrain", "sft"), ("sft", "ppo")):
        assert 0 < np.abs(weights[earlier][name] - weights[later][name]).max() < 0.05
    losses = [row["pretrain/loss"] for row in rows(straight) if "pretrain/loss" in row]
    assert losses == sorted(losses, reverse=True)


def test_the_same_command_again_does_nothing_and_changes_no_file(straight, train):
    before, programs = contents(straight), Step.compiled.total()
    assert train(straight) == 0
    assert contents(straight) == before and Step.compiled.total() == programs


def test_the_best_validation_says_which_figures_are_the_models(straight):
    """reward.keep_best, by a figure that is better the higher."""
    summary = json.loads((straight / "summary.json").read_text())
    name = "reward/validation_pair_accuracy"
    found = {row["step"]: row[name] for row in rows(straight) if name in row}
    best = max(found, key=lambda step: (found[step], -step))
    assert len(found) == 4 and (summary["reward/best_step"], summary[name]) == (best, found[best])


BACKWARDS = """
import jax
from lfjax.steps.sft import sft_step

def step(state, batch, rng, **options):
    new, metrics = sft_step(state, batch, rng, **options)
    sign = jax.numpy.where(state.step < 1, 1.0, -1.0)
    return new.replace(params=jax.tree.map(lambda a, b: a + sign * (b - a), state.params, new.params)), metrics
"""


def test_with_keep_best_the_model_of_the_best_validation_goes_out_else_a_note_says_that_it_was_better(
    straight, train, tmp_path, capfd, monkeypatch
):
    """Every step but the first goes uphill: the best model is that of a run of one step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backwards.py").write_text(BACKWARDS)
    options = ["--config.stages=pretrain", *from_models(straight), "--config.pretrain.optim.schedule=constant"]
    options += ["--config.pretrain.optim.warmup_steps=0", "--config.steps.sft=backwards:step"]
    outcomes = {}
    for name, further in {
        "one": ["--config.pretrain.steps=1"],
        "best": ["--config.pretrain.steps=4", "--config.pretrain.keep_best=loss"],
        "last": ["--config.pretrain.steps=4"],
    }.items():
        assert train(tmp_path / name, *options, *further) == 0
        losses = [row["pretrain/validation_loss"] for row in rows(tmp_path / name) if "pretrain/validation_loss" in row]
        model = (tmp_path / name / "models" / "pretrain" / "model.safetensors").read_bytes()
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        outcomes[name] = losses, model, summary, capfd.readouterr().err
    losses, model, summary, _ = outcomes["best"]
    assert min(losses) == losses[0] < losses[-1]
    assert model == outcomes["one"][1] != outcomes["last"][1]
    assert (summary["pretrain/best_step"], summary["pretrain/validation_loss"]) == (1, losses[0])
    assert "note: stage pretrain: held-out loss" in outcomes["last"][3] and "keep_best=loss" in outcomes["last"][3]
    assert "pretrain/best_step" not in outcomes["last"][2] and "note: " not in outcomes["one"][3]


def test_the_last_stage_is_made_longer_on_its_directory_and_the_evaluation_made_again(straight, train, tmp_path, capfd):
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    for other in ("--config.ppo.steps=5", "--config.reward.steps=20", "--config.ppo.batch_size=16"):
        assert train(workdir, other) == 2
    assert contents(workdir) == contents(straight)
    capfd.readouterr()
    assert train(workdir, "--config.ppo.steps=8") == 0
    assert "note: stage ppo is made longer" in capfd.readouterr().err
    kept, now = (json.loads((workdir / name).read_text()) for name in ("config-1.json", "config.json"))
    assert (kept["ppo"].pop("steps"), now["ppo"].pop("steps")) == (6, 8) and kept == now
    before, after = ([row for row in rows(w) if row["stage"] == "ppo"] for w in (straight, workdir))
    assert after[:6] == before and [row["step"] for row in after[6:]] == [7, 8]
    rates = [row["optim/learning_rate"] for row in after[5:]]  # the sixth is of six steps, the others are of eight
    cosine = [0.5e-3 * (1 + math.cos(math.pi * share)) for share in (5 / 6, 6 / 8, 7 / 8)]
    assert rates == pytest.approx(cosine, rel=1e-5)
    assert len([row for row in rows(workdir) if row["stage"] == "evaluate"]) == 1
    model = "models/ppo/model.safetensors"
    assert (workdir / model).read_bytes() != (straight / model).read_bytes()
    assert len({json.loads((w / "summary.json").read_text())["ppo/kl"] for w in (straight, workdir)}) == 2
    whole = contents(workdir)
    assert train(workdir, "--config.ppo.steps=8") == 0
    assert contents(workdir) == whole


CALLS: list[tuple] = []


def vowels(prompts, responses, records):
    """A reward: how many vowels a response has."""
    CALLS.append((prompts, responses, records))
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in responses]


def test_the_reward_may_be_a_python_function_of_texts_and_records(straight, train, tmp_path):
    CALLS.clear()
    given = ["--config.stages=ppo", "--config.ppo.value_init=policy", "--config.ppo.norm_samples=0"]
    given += ["--config.ppo.reward=test_chain:vowels", "--config.ppo.steps=3", *from_models(straight)]
    assert train(tmp_path / "w", *given) == 0
    assert len(CALLS) == 3
    scores = [row["ppo/raw_score"] for row in rows(tmp_path / "w")]
    for score, (prompts, responses, found) in zip(scores, CALLS, strict=True):
        assert len(prompts) == len(responses) == len(found) == 8
        assert all(record.responses[0].startswith(prompt) for prompt, record in zip(prompts, found, strict=True))
        assert score == pytest.approx(np.mean([sum(text.count(v) for v in "aeiou") for text in responses]))


FORK = """
import jax.numpy as jnp
from lfjax.steps.sft import sft_step

def step(state, batch, rng, *, model, tx, num_microbatches, chunk_size, z_loss):
    state, metrics = sft_step(state, batch, rng, model=model, tx=tx, chunk_size=chunk_size, z_loss=SPOILED)
    return state, metrics | {"sft/forked": metrics["sft/loss"]}
"""


def fork(folder: pathlib.Path, name: str, spoiled: str = "z_loss") -> str:
    (folder / f"{name}.py").write_text(FORK.replace("SPOILED", spoiled))
    return f"--config.steps.sft={name}:step"


def test_a_fork_named_in_the_config_is_used_and_its_source_kept(straight, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (fork(tmp_path, "fork_in_the_current_folder"), "--config.stages=pretrain", *from_models(straight))
    assert train(tmp_path / "w", *given) == 0
    assert (tmp_path / "w" / "steps" / "sft.py").read_text() == FORK.replace("SPOILED", "z_loss")
    found = [row for row in rows(tmp_path / "w") if "pretrain/loss" in row]
    assert [row["pretrain/forked"] for row in found] == [row["pretrain/loss"] for row in found]
    # it is the same step, from the same start
    assert [row["pretrain/loss"] for row in found] == [
        row["pretrain/loss"] for row in rows(straight) if "pretrain/loss" in row
    ]


def test_a_fork_beside_the_config_file_is_found_too(straight, train, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    config = pathlib.Path(shutil.copy(smallest.PATH, tmp_path / "elsewhere" / "run.py"))
    named = fork(tmp_path / "elsewhere", "fork_beside_the_config")
    assert train(tmp_path / "w", named, "--config.stages=pretrain", *from_models(straight), config=config) == 0
    assert (tmp_path / "w" / "steps" / "sft.py").exists()


def test_updates_that_are_not_finite_stop_the_run_after_so_many_in_a_row(straight, train, tmp_path, monkeypatch, capfd):
    """From the third step on every loss is NaN: the run may skip three, and is looked at after every step."""
    monkeypatch.chdir(tmp_path)
    spoiled = fork(tmp_path, "fork_of_nan", "jnp.where(state.step >= 2, jnp.nan, 0.0)")
    given = (spoiled, "--config.stages=pretrain", "--config.run.max_skipped=3", "--config.pretrain.log_every=1")
    assert train(tmp_path / "w", *given, *from_models(straight)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: stage pretrain, step 5: loss or gradient was not finite 3 times in a row")
    assert "config.pretrain.optim.learning_rate" in last
    assert not (tmp_path / "w" / "models" / "pretrain").exists()
    assert not (tmp_path / "w" / "checkpoints" / "pretrain" / "FINISHED").exists()


def test_a_few_updates_that_are_not_finite_are_skipped_and_the_run_goes_on(straight, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoiled = fork(tmp_path, "fork_of_two_nan", "jnp.where((state.step // 2) == 1, jnp.nan, 0.0)")
    given = (spoiled, "--config.stages=pretrain", "--config.run.max_skipped=3", "--config.pretrain.log_every=1")
    assert train(tmp_path / "w", *given, *from_models(straight)) == 0
    losses = [row["pretrain/loss"] for row in rows(tmp_path / "w") if "pretrain/loss" in row]
    assert [number for number, loss in enumerate(losses, 1) if loss is None] == [3, 4]
    weights = safetensors.numpy.load_file(tmp_path / "w" / "models" / "pretrain" / "model.safetensors")
    assert all(np.isfinite(weight).all() for weight in weights.values())


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_losses_of_one(straight, train, tmp_path):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert train(tmp_path / "w", *mesh, devices=8) == 0
    for stage, name in (("pretrain", "pretrain/loss"), ("sft", "sft/loss"), ("reward", "reward/loss")):
        one, eight = ([row[name] for row in rows(w) if name in row] for w in (straight, tmp_path / "w"))
        np.testing.assert_allclose(eight, one, rtol=1e-4, err_msg=stage)
    one, eight = (
        [row["ppo/policy_loss"] for row in rows(w) if "ppo/policy_loss" in row] for w in (straight, tmp_path / "w")
    )
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-3, atol=1e-5)
    ends = {w: json.loads((w / "summary.json").read_text())["pretrain/perplexity"] for w in (straight, tmp_path / "w")}
    assert ends[tmp_path / "w"] == pytest.approx(ends[straight], rel=1e-4)


def test_a_model_that_is_started_from_brings_its_context(straight, train, tmp_path, capsys):
    folder = straight / "models" / "pretrain"
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    options = [f"--config.model.init_from={folder}", "--config.stages=tokenizer,sft", "--config.model.context=2"]
    assert train(tmp_path / "long", *options, f"--config.sft.seq_len={context + 1}") == 2
    assert f"config.sft.seq_len: {context + 1} tokens; allowed: at most the context of" in capsys.readouterr().err
    whole = [*options, f"--config.sft.seq_len={context}", "--config.sft.steps=1"]
    assert train(tmp_path / "whole", *whole, "--config.optim.learning_rate=0.1") == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "pretrained" in line]
    assert "config.optim.learning_rate = 0.1" in said and "config.model.init_from" in said
    assert train(tmp_path / "gentle", *whole, "--config.sft.optim.learning_rate=1e-4") == 0
    assert "pretrained" not in capsys.readouterr().err


def test_the_rate_that_a_pretrained_model_bears_follows_from_the_size_of_its_weights(shared):
    """A story teller learns answers at 2e-3 (configs/gsm8k_sft.py) and writes nonsense at 4e-3."""
    params = hf.load(shared / "data" / "stories260K_hf").params
    rate = gentle_rate(params, 64)
    assert 2e-3 < rate < 4e-3
    halved = {"layers": jax.tree.map(lambda x: x / 2, params["layers"])}
    assert gentle_rate(halved, 64) == pytest.approx(rate / 2)
    assert gentle_rate({"embed": params["embed"]}, 64) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_recurrent_model_goes_through_every_stage(train, tmp_path, devices):
    options = ["--config.model.form=lstm", "--config.mesh.fsdp=2"] if devices > 1 else ["--config.model.form=lstm"]
    assert train(tmp_path / "w", *options, devices=devices) == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["pretrain/perplexity"] < 300 and summary["compile/count"] > 0
    assert json.loads((tmp_path / "w" / "models" / "ppo" / "config.json").read_text())["model_type"] == "lfjax_lstm"


def test_an_evaluation_compares_every_language_model_of_the_chain(straight):
    """Before is the run's start, after its last model; KL is from the start, and from what a stage itself had."""
    summary = json.loads((straight / "summary.json").read_text())
    for name in ("ppo/length", "judge/positive", "diversity/unique"):
        assert {f"{name}_{which}" for which in ("before", "sft", "after")} <= summary.keys()
    assert summary["ppo/kl"] != summary["ppo/kl_own"] and summary["ppo/kl_sft"]  # means of so few samples have any sign
    assert not {"ppo/kl_before", "ppo/kl_after", "ppo/kl_own_sft"} & summary.keys()


def loud(prompts, responses, records):
    """A judge: the length of a response."""
    return [float(len(text)) for text in responses]


def judged_again(straight, train, workdir: pathlib.Path, *given: str) -> dict:
    """The summary of the run with its evaluation made again."""
    shutil.copytree(straight, workdir)
    for name in ("checkpoints/evaluate", "config.json", "inputs.json", "summary.json"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(workdir, *given) == 0
    return json.loads((workdir / "summary.json").read_text())


def test_judges_are_named_and_one_that_was_trained_on_says_so(straight, train, tmp_path):
    summary = judged_again(straight, train, tmp_path / "w", "--config.evaluate.judges=reward,test_chain:loud")
    assert summary["judge/reward_trained_on"] == 1.0 and "judge/test_chain_loud_trained_on" not in summary
    assert summary["judge/reward_after"] == pytest.approx(summary["ppo/score_after"])
    assert {f"judge/test_chain_loud_{which}" for which in ("before", "sft", "after", "won")} <= summary.keys()
    assert "training has learnt to please it" in (tmp_path / "w" / "report.html").read_text()
    assert not [name for name in summary if "positive" in name or "ridge_after" in name]


def test_the_judge_that_training_was_towards_is_known_by_its_folder(tmp_path):
    """Other runs' reward models have the same last part in their paths, and this run's own have two names."""
    config, own, other = (
        smallest.get_config(),
        tmp_path / "w" / "models" / "reward",
        tmp_path / "v" / "models" / "reward",
    )
    for folder in (own, other):
        folder.mkdir(parents=True)

    def found(reward: str, *judges: object) -> set[str]:
        config.ppo.reward, config.evaluate.judges = reward, tuple(map(str, judges))
        return trained_on(config, lambda key, name: own if name == "reward" else pathlib.Path(name))

    assert found("reward", other) == set() and found("reward", own) == found(str(other), other) == {"reward"}
    assert found("mine:short", "mine:short", own) == {"mine_short"} and found("reward", "mine:short") == set()
    config.ppo.reward, config.evaluate.judges = str(other), ()
    assert judges_named(config) == ("reward", "ridge")


def test_another_judge_is_another_config_and_a_judge_is_no_start(straight, train, capsys):
    assert train(straight, "--config.evaluate.judges=reward") == 2
    line = capsys.readouterr().err
    assert "config.evaluate.judges: " in line and "may start from" not in line


def test_where_no_judge_is_named_the_held_out_ratings_judge(straight, train, tmp_path):
    """Ridge regression on them, with its own accuracy; the sentences' scale is [-4, 4]."""
    summary = judged_again(straight, train, tmp_path / "w", "--config.evaluate.judges=()")
    judged = {name for name in summary if name.startswith("judge/") and not name.endswith(("_n", "_low", "_high"))}
    names = ("before", "sft", "after", "change", "won", "pair_accuracy", "min_gap")
    assert judged == {f"judge/ridge_{name}" for name in names} and summary["judge/ridge_min_gap"] == 1.0
    assert summary["judge/ridge_pair_accuracy_low"] > 0.6  # each word has one sign
    assert abs(summary["judge/ridge_change"] - summary["judge/ridge_after"] + summary["judge/ridge_before"]) < 1e-9
    shown = rows(tmp_path / "w", "samples.jsonl")[-1]
    assert shown["judge"] == shown["ridge"] and -4 < shown["ridge"] < 4


def test_a_reward_model_that_training_is_not_towards_judges_and_one_that_nothing_reads_is_named(tmp_path):
    config, stages = smallest.get_config(), declared()
    config.evaluate.judges = ()
    assert judges_named(config) == ("ridge",)  # training is towards the reward model
    config.ppo.update(reward="mine:short", value_init="policy")
    assert judges_named(config) == ("reward", "ridge") and unread(config, stages) == []
    config.evaluate.judges = ("lexicon",)
    ((stage, what),) = unread(config, stages)
    assert stage == "reward" and "--config.stages=tokenizer,pretrain,sft,ppo,evaluate" in what
    config.stages = ("tokenizer", "pretrain", "reward")
    assert unread(config, stages) == []
