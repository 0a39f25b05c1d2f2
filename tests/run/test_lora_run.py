"""A run with LoRA through every stage: what is trained, kept, checkpointed and written."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from lfjax.run import training
from lfjax.run.directory import model_files
from lfjax.sharding import Step

pytestmark = pytest.mark.xdist_group("stages")
TRAINED = ("sft", "reward", "ppo")
RANK = 2


class Crash(Exception):
    """Raised in the middle of a stage."""


@pytest.fixture(scope="module")
def command(straight, train):
    """command(workdir, *overrides) -> exit code: sft, reward and PPO with LoRA on the undisturbed run's pretraining."""
    options = {
        "stages": TRAINED,
        "model.init_from": straight / "models" / "pretrain",
        "model.lora.rank": RANK,
        "model.lora.dropout": 0.1,
        "sft.save_every": 2,
        "reward.steps": 5,
        "reward.save_every": 2,
        "ppo.steps": 3,
        "ppo.save_every": 2,
    }
    given = [f"--config.{key}={value}" for key, value in options.items()]
    return lambda workdir, *overrides: train(workdir, *given, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command):
    """(run directory, arguments of every PPO experience, parameters of every score)."""
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    seen = {"ppo_experience": [], "ppo_score": []}
    call = Step.__call__

    def noted(self, *args):
        if self.name in seen:
            seen[self.name].append(args)
        return call(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", noted)
        assert command(workdir) == 0
    return workdir, seen


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_only_the_layers_matrices_and_the_head_change(finished, straight):
    workdir, _ = finished
    before = tensors(straight / "models" / "pretrain")
    for stage in TRAINED:
        if stage == "ppo":
            before = tensors(workdir / "models" / "sft")
        after = tensors(workdir / "models" / stage)
        differ = {name for name in after if name not in before or np.any(before[name] != after[name])}
        matrices = {name for name in after if name.endswith("_proj.weight")}
        assert differ == matrices | ({"score.weight"} if stage == "reward" else set()), stage


def test_a_checkpoint_holds_adapters_and_heads_alone(finished):
    workdir, _ = finished
    for stage in TRAINED:
        (newest, *_) = sorted((workdir / "checkpoints" / stage).glob("[0-9]*"), key=lambda p: -int(p.name))
        tree = json.loads((newest / "state" / "_METADATA").read_text())["tree_metadata"]
        names = ["/".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree.values()]
        of_the_model = [name for name in names if re.search("layers|embed|final_norm", name)]
        assert of_the_model and all(re.search("/lora/layers/.*/[ab]$", name) for name in of_the_model), stage
        assert any(name.endswith("head/kernel") for name in names) == (stage != "sft")


def test_the_reference_and_the_value_networks_base_are_no_second_copies(finished):
    """The value network stands on the reward model, the reference is the policy's base: the same arrays."""
    _, seen = finished
    (_, _, reference, *_, (policy, value)), (scored, *_) = seen["ppo_experience"][0], seen["ppo_score"][0]
    for one, other in zip(jax.tree.leaves(policy), jax.tree.leaves(reference), strict=True):
        assert one is other
    trunk = {group: tree for group, tree in scored.items() if group != "head"}
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(trunk), strict=True):
        assert one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


def test_the_policy_starts_at_its_reference(finished):
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kl = [row["ppo/kl"] for row in rows if row["stage"] == "ppo" and "ppo/kl" in row]
    assert kl[0] == 0.0 and kl[-1] != 0.0
    assert all(row["ppo/first_ratio_error"] <= 1e-6 for row in rows if "ppo/first_ratio_error" in row)


def test_every_stage_leaves_its_adapter_beside_the_merged_model(finished, straight):
    workdir, _ = finished
    starts = {"sft": straight / "models" / "pretrain", "reward": workdir / "models" / "sft"}
    for stage in TRAINED:
        said = json.loads((workdir / "models" / stage / "adapter" / "adapter_config.json").read_text())
        assert said["r"] == RANK and said["base_model_name_or_path"] == str(starts.get(stage, starts["reward"]))
        low = safetensors.numpy.load_file(workdir / "models" / stage / "adapter" / "adapter_model.safetensors")
        assert len(low) == 2 * 7 + (stage == "reward")


def test_a_run_starts_from_an_adapter_as_from_the_model_it_makes(finished, straight, train, tmp_path):
    sft = finished[0] / "models" / "sft"
    options = ("sft.steps=1", "sft.init_from=pretrain", "optim.learning_rate=1e-9", f"model.init_from={sft}/adapter")
    assert train(tmp_path / "adapter", "--config.stages=sft", *(f"--config.{option}" for option in options)) == 0
    found, merged = (tensors(folder) for folder in (tmp_path / "adapter" / "models" / "sft", sft))
    for name, x in merged.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6, err_msg=name)
    inputs = json.loads((tmp_path / "adapter" / "inputs.json").read_text())
    base = model_files(straight / "models" / "pretrain")
    assert set(base) < set(model_files(sft / "adapter")) and "config.model.init_from" in inputs


@pytest.mark.slow
def test_a_run_that_crashed_ends_as_the_undisturbed_one(finished, command, tmp_path):
    workdir, _ = finished
    plan = {("reward", 3), ("ppo", 2)}

    def disturbed(run, stage, state, step, **parts):
        def one(state, index):
            if (stage, index) in plan:
                plan.remove((stage, index))
                raise Crash
            return step(state, index)

        return undisturbed(run, stage, state, one, **parts)

    undisturbed = training.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", disturbed)
        while plan:
            with pytest.raises(Crash):
                command(tmp_path / "run")
        assert command(tmp_path / "run") == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (workdir / name).read_text()
    for stage in TRAINED:
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            path = pathlib.Path("models", stage, name)
            assert (tmp_path / "run" / path).read_bytes() == (workdir / path).read_bytes(), path


def test_a_target_that_no_model_has_is_refused_before_anything_is_written(command, tmp_path, capfd):
    assert command(tmp_path / "run", "--config.model.lora.targets=('q_proj',)") == 2
    assert "config.model.lora.targets: 'q_proj'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
