"""What a user can get wrong: each gives one line that names the place and the fix, exit code 2, and no half-made files.

Everything goes through `lfjax.cli.main`, as the command does. LFJAX_SHOW_ERRORS=1 prints every such line.
"""

import dataclasses
import fcntl
import io
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import smallest
import tiny

from lfjax import cli, stages
from lfjax.interop import hf
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.run.data import Data
from lfjax.tokenizers import sentencepiece

pytestmark = pytest.mark.xdist_group("stages")
FOLDER = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pathlib.Path:
    return smallest.write_records(tmp_path_factory.mktemp("data") / "rated.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, records) -> pathlib.Path:
    """A finished run of the stages tokenizer and pretrain, not to be changed."""
    workdir = tmp_path_factory.mktemp("run") / "trained"
    assert train(workdir, records, PRETRAINING) == 0
    return workdir


@pytest.fixture
def command(capfd, request, tmp_path, monkeypatch):
    """Runs a command that has to be refused; gives its one line without "error: "."""
    monkeypatch.setattr(Data, "tell", lambda self: None)  # the table of the data, once a run begins

    def refused(*argv: object, progress: bool = False) -> str:
        capfd.readouterr()
        code = cli.main([str(part) for part in argv])
        out, err = capfd.readouterr()
        told = tuple(f"{stage.name}{end}" for stage in stages.TABLE for end in (": ", " ("))  # what a stage does
        lines = [line for line in err.splitlines() if not line.startswith(told)]
        assert code == 2, err
        assert lines[-1].startswith("error: ") and out == ""
        assert progress or len(lines) == 1, err
        if os.environ.get("LFJAX_SHOW_ERRORS"):
            with capfd.disabled():
                print(f"\n{request.node.name}\n  {lines[-1].replace(str(tmp_path), '...')}")
        return lines[-1].removeprefix("error: ")

    return refused


PRETRAINING = "--config.stages=tokenizer,pretrain"


def arguments(workdir, records, *overrides: str, config: pathlib.Path = smallest.PATH) -> list[str]:
    given = () if records is None else (f"--config.data.path={records}",)
    return ["train", f"--config={config}", f"--workdir={workdir}", *given, *overrides]


def train(workdir, records, *overrides: str) -> int:
    return cli.main(arguments(workdir, records, *overrides))


def with_run(name: str, run) -> tuple:
    """The table of stages, in which one runs this function."""
    return tuple(dataclasses.replace(s, run=run) if s.name == name else s for s in stages.TABLE)


def same_model(a: pathlib.Path, b: pathlib.Path) -> bool:
    name = "models/pretrain/model.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes()


def untouched(workdir: pathlib.Path) -> bool:
    """Whether a run that could not start has left no more than its config and what it would have read."""
    return not workdir.exists() or {entry.name for entry in workdir.iterdir()} <= {
        "config.json",
        "inputs.json",
        "stages.json",
        "steps",
    }


OVERRIDES = {
    "a misspelt key": ("--config.ppo.kl_coeff=1", "config.ppo.kl_coeff", "did you mean config.ppo.kl_coef?"),
    "a wrong type": ("--config.ppo.steps=few", "config.ppo.steps", "give a value such as 16"),
    "a section set to a value": ("--config.ppo.update_step=3", "config.ppo.update_step", "set one of its keys: "),
    "bytes for a pattern": ("--config.model.lora.targets=(b'layers/',)", "config.model.lora.targets", "give regexes"),
    "a z-loss below 0": ("--config.pretrain.step.z_loss=-1.0", "config.pretrain.step.z_loss", "at least 0"),
    "a value of any length": (f"--config.seed={'9' * 5000}", "config.seed", "9 ... 9"),
    "no override": ("--config.seed", "--config.seed", "write --config.seed=VALUE"),
    "another argument": ("--steps=3", "--steps=3", "overrides are --config.section.key=value"),
    "an unknown stage": ("--config.stages=tokenizer,pretrian", "config.stages", "mean 'pretrain'? allowed: tokenizer,"),
    "a stage twice": ("--config.stages=tokenizer,tokenizer", "config.stages", "each once"),
    "no stage": ("--config.stages=()", "config.stages", "one or more stages"),
    "no tokenizer": ("--config.stages=pretrain,reward", "config.stages", 'put "tokenizer" before it'),
    "reward without its start": ("--config.stages=tokenizer,reward", "config.reward.init_from", "put it there"),
    "ppo without reward": ("--config.stages=tokenizer,pretrain,sft,ppo", "config.ppo.reward", "put it there"),
    "stages in the wrong order": ("--config.stages=tokenizer,sft,pretrain", "config.sft.init_from", "put it there"),
    "evaluate without a result": ("--config.stages=tokenizer,pretrain,evaluate", "config.stages", "before it"),
    "an unknown source": ("--config.data.source=json", "config.data.source", "did you mean 'jsonl'?"),
    "a source that reads no file": ("--config.data.source=vader", "config.data.path", "set data.source to jsonl or"),
    "a source without a path": ("--config.data.path=none", "config.data.path", "needs the file's path"),
    "a fraction of 2": ("--config.data.test_fraction=2.0", "config.data.test_fraction", "between 0 and 0.5"),
    "a mesh that does not multiply": ("--config.mesh.data=3", "config.mesh", "set one to -1"),
    "a mesh axis of 0": ("--config.mesh.tensor=0", "config.mesh.tensor", "a positive size, or -1"),
    "two axes of -1": ("--config.mesh.fsdp=-1", "config.mesh", "only one axis"),
    "rules for no parameter": (
        "--config.mesh.rules=(('decoder/block',('fsdp',)),('x$',()))",
        "config.mesh.rules: ('decoder/block', ('fsdp',))", "found in the path of no parameter; a path is such as ",
    ),
    "a rule of too many axes": (
        "--config.mesh.rules=(('mlp',('','','','tensor')),)", "config.mesh.rules: ('mlp', ('', '', '', 'tensor'))",
        "matches layers/mlp/down, whose shape is [1, 32, 16]",
    ),
    "a rank beyond a matrix": (
        "--config.model.lora.rank=9", "config.model.lora.rank: 9", "layers/attention/k is 16 x 8: allowed: at most 8",
    ),
    "a judge that gives no score": ("--config.evaluate.judges=sft", "config.evaluate.judges[0]", "is for a scorer"),
    "a judge that is no text": ("--config.evaluate.judges=3", "config.evaluate.judges: (3,)", "give names"),
    "a reward that gives no score": ("--config.ppo.reward=sft", "config.ppo.reward", "makes a language model"),
    "a start that gives scores": ("--config.ppo.init_from=reward", "ppo.init_from", "is for a language model"),
    "a start of a stage that makes none": ("--config.sft.init_from=tokenizer", "sft.init_from", "makes no model"),
    "rules that are none": ("--config.mesh.rules=(('embed','model'),)", "config.mesh.rules", "a row is (regex"),
    "an axis twice": ("--config.mesh.rules=(('.*',('data','data')),)", "config.mesh.rules", "each axis once"),
    "a rule of bytes": ("--config.mesh.rules=((b'.*',('data',)),)", "config.mesh.rules", "a row is (regex"),
    "a group of bytes": ("--config.optim.groups=((b'.*',1.0,0.0),)", "config.optim.groups", "a row is (regex"),
    "microbatches": ("--config.pretrain.step.num_microbatches=3", "config.pretrain.batch_size", "do not divide"),
    "minibatches": ("--config.ppo.update_step.minibatches=0", "config.ppo.batch_size", "do not divide"),
    "a batch over devices": ("--config.reward.batch_size=12", "config.reward.batch_size", "a multiple of 8"),
    "an evaluation batch": ("--config.evaluate.batch_size=9", "config.evaluate.batch_size", "a multiple of 8"),
    "heads": ("--config.model.heads=3", "config.model.heads", "does not divide model.width 16"),
    "kv_heads": ("--config.model.kv_heads=4", "config.model.kv_heads", "does not divide model.heads 2"),
    "a width of 0": ("--config.model.width=0", "config.model.width", "at least 1"),
    "a context shorter than the rows": ("--config.model.context=24", "config.pretrain.seq_len", "model.context = 24"),
    "buckets beyond the context": ("--config.reward.buckets=48,96", "config.reward.buckets", "model.context = 64"),
    "no bucket": ("--config.reward.buckets=()", "config.reward.buckets", "such as (32, 64)"),
    "buckets below the rows": ("--config.reward.buckets=24,32", "config.reward.seq_len", "at most the largest"),
    "top_p in PPO": ("--config.sampling.top_p=0.9", "config.sampling.top_p: 0.9", "top_p=1.0"),
    "min_p of PPO alone": ("--config.ppo.sampling.min_p=0.1", "config.ppo.sampling.min_p: 0.1", "min_p=0.0"),
    "a shared key that has moved": ("--config.run.tensorboard=False", "tensorboard", "is called config.run.trackers"),
    "a tracker that there is not": ("--config.run.trackers=tensorbord", "config.run.trackers", "allowed: tensorboard"),
    "what is no tracker": ("--config.run.trackers=pathlib:Path", "config.run.trackers", "no lfjax.trackers.Tracker"),
    "a tracker's class": ("--config.run.trackers=pathlib:Pth", "config.run.trackers", "no Class 'Pth'; did you mean"),
    "a key that has moved": ("--config.ppo.stop=('.',)", "config.ppo.stop", "is called config.sampling.stop now"),
    "a step's that has moved": ("--config.ppo.rollout_step.top_p=0.9", "rollout_step.top_p", "sampling.top_p now"),
    "temperature 0 in PPO": ("--config.sampling.temperature=0", "config.sampling.temperature", "at least"),
    "a clip of 1": ("--config.ppo.update_step.clip_low=1.0", "config.ppo.update_step.clip_low", "between 0 and 1"),
    "a lambda of 2": ("--config.ppo.experience_step.lam=2.0", "config.ppo.experience_step.lam", "0 to 1"),
    "a KL kind": ("--config.ppo.experience_step.kl_kind=k9", "experience_step.kl_kind", "allowed: k1, k2, k3, abs"),
    "prompt and response": ("--config.sampling.max_new_tokens=60", "sampling.prompt_buckets", "at most model.context"),
    "prompts longer than their room": ("--config.sampling.prompt_max=8", "sampling.prompt_max", "from prompt_min"),
    "a negative learning rate": ("--config.sft.optim.learning_rate=-1", "config.sft.optim.learning_rate", "above 0"),
    "an infinite learning rate": ("--config.optim.learning_rate=1e999", "config.optim.learning_rate", "finite"),
    "an unknown optimiser": ("--config.ppo.value_optim.name=sgd", "config.ppo.value_optim.name", "adamw, adafactor"),
    "an unknown schedule": ("--config.optim.schedule=step", "schedule", "constant, linear, cosine"),
    "a momentum of 1": ("--config.optim.b1=1.0", "optim.b1", "0 up to, not including, 1"),
    "groups that are none": ("--config.optim.groups=(('(',1.0,0.0),)", "config.optim.groups", "a row is (regex"),
    "a dropout of 1": ("--config.reward.dropout=1.0", "config.reward.dropout", "not including, 1"),
    "a negative momentum of all stages": ("--config.optim.b2=-1", "config.optim.b2: -1.0", "not including, 1"),
    "a momentum of one stage": ("--config.reward.optim.b2=-1", "config.reward.optim.b2: -1.0", "not including, 1"),
    "a decay multiplier below 0": ("--config.optim.groups=(('a',1.0,-1.0),)", "config.optim.groups", "a row is (regex"),
    "an infinite multiplier": ("--config.optim.groups=(('a',1e999,0.0),)", "config.optim.groups", "finite numbers"),
    "a width beyond 32 bits": ("--config.model.width=1000000000000", "config.model.width", "below 2^31"),
    "layers beyond 32 bits": ("--config.model.layers=1000000000000", "config.model.layers", "below 2^31"),
    "a vocabulary beyond 32 bits": ("--config.tokenizer.vocab_size=9999999999", "tokenizer.vocab_size", "below 2^31"),
    "a multiple beyond 32 bits": ("--config.model.vocab_multiple=9999999999", "model.vocab_multiple", "below 2^31"),
    "steps beyond 32 bits": ("--config.sft.steps=9999999999", "config.sft.steps", "below 2^31"),
    "a bucket beyond 32 bits": ("--config.reward.buckets=24,9999999999", "config.reward.buckets", "below 2^31"),
    "a start of no name": ("--config.ppo.init_from=", "config.ppo.init_from: ''", "give a value such as 'auto'"),
    "a file of no name": ("--config.data.test_path=", "config.data.test_path: ''", "give a value, or none"),
    "a negative length": ("--config.ppo.experience_step.min_length=-1", "experience_step.min_length", "at least 0"),
    "a loss of negative weight": ("--config.reward.step.hinge=-1", "config.reward.step.hinge: -1.0", "at least 0"),
    "a negative gap": ("--config.reward.min_gap=-1", "config.reward.min_gap: -1.0", "at least 0"),
    "not module:function": ("--config.steps.sft=my_step", "config.steps.sft", 'write "module:function"'),
    "an unknown step module": ("--config.steps.sft=no_such_module:f", "config.steps.sft", "tried "),
    "an unknown step function": ("--config.steps.sft=lfjax.steps.sft:sft_stp", "config.steps.sft", "mean 'sft_step'?"),
    "a step of another stage": ("--config.steps.sft=lfjax.steps.reward:reward_step", "chunk_size", "takes no keyword"),
    "a reward module that is not there": ("--config.ppo.reward=no_such_module:f", "config.ppo.value_init", "policy"),
    "a model folder that is not there": ("--config.model.init_from=nowhere", "config.model.init_from", "nowhere"),
    "a reward folder that is not there": ("--config.ppo.reward=rewrad", "config.ppo.reward", "did you mean 'reward'?"),
    "a tokenizer that is not there": ("--config.tokenizer.path=nowhere", "config.tokenizer.path", "correct the path"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERRIDES)
def test_a_wrong_override_is_refused_before_anything_is_written(kind, command, tmp_path, records):
    override, key, fix = OVERRIDES[kind]
    line = command(*arguments(tmp_path / "w", records, override))
    assert key in line and fix in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("key, value", [("validation_fraction", 0.2), ("test_fraction", 0.1), ("test_path", "a.jsonl")])
def test_what_the_fixed_splits_would_ignore_is_refused(key, value, command, tmp_path):
    given = ("--config.data.source=vader", "--config.data.validation_fraction=0.05", "--config.data.test_fraction=0.05")
    line = command(*arguments(tmp_path / "w", None, *given, f"--config.data.{key}={value}"))
    assert f'config.data.{key}: {value}; data.source="vader" has fixed splits' in line and "leave it at" in line
    assert not (tmp_path / "w").exists()


def test_a_reward_model_without_a_loss_is_refused(command, tmp_path, records):
    """Also one that is only centred: nothing tells it what is better."""
    given = ("--config.reward.step.regression=0", "--config.reward.step.bradley_terry=0")
    line = command(*arguments(tmp_path / "w", records, *given, "--config.reward.step.centering=1"))
    assert "config.reward.step: every loss has weight 0; set one of regression" in line
    assert not (tmp_path / "w").exists()


CONFIGS = {
    "a syntax error": ("def get_config(:\n", "SyntaxError", "line 1"),
    "no get_config": ("config = 3\n", "no get_config()", "defines one that returns a ConfigDict"),
    "get_config raises": ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError", "line 2"),
    "get_config gives a dict": ("def get_config():\n    return {}\n", "returned dict", "has to return a ConfigDict"),
    "the file exits": ("raise SystemExit(3)\n", "it ends the program (exit 3)", "mend the config file"),
    "get_config exits": ("def get_config():\n    exit()\n", "it ends the program", "mend the config file"),
    "the file raises": ("import no_such_module\n", "no_such_module", "line 1"),
    "not text": ("\0\1\2", "mend the config file", "null bytes"),
    "a misspelt key": (
        "from smallest import *\nold = get_config\n"
        "def get_config():\n    config = old()\n    config.ppo.kl_coeff = 1.0\n    return config\n",
        "config.ppo.kl_coeff",
        "did you mean config.ppo.kl_coef?",
    ),
    "a misspelt keyword of a step": (
        "from smallest import *\nold = get_config\n"
        "def get_config():\n    config = old()\n    config.sft.step.chunk_sise = 8\n    return config\n",
        "config.sft.step.chunk_sise",
        "did you mean config.sft.step.chunk_size?",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_config_file_is_refused(kind, command, tmp_path, records):
    text, found, fix = CONFIGS[kind]
    file = tmp_path / "broken.py"
    file.write_text(text)
    line = command(*arguments(tmp_path / "w", records, config=file))
    assert found in line and fix in line
    assert str(file) in line or "config.sft" in line
    assert not (tmp_path / "w").exists()


def test_a_cache_that_cannot_be_used_is_one_note_and_the_run_goes_on(tmp_path, records):
    """In a process of its own: jax keeps its cache's folder."""
    given = ("--config.stages=tokenizer", "--config.run.compile_cache=True")
    command = [sys.executable, "-m", "lfjax.cli", *arguments(tmp_path / "w", records, *given)]
    environment = os.environ | {"LFJAX_CACHE": "/dev/null", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "cache" in line.lower() or "kept" in line]
    fix = "set LFJAX_CACHE to another folder"
    assert notes == [f"note: compiled programs are not kept: /dev/null/xla: Not a directory; {fix}"]


def test_a_config_that_is_missing_or_a_folder_is_refused(command, tmp_path, records):
    assert f"{tmp_path}/no.py: no such file" in command(*arguments(tmp_path / "w", records, config=tmp_path / "no.py"))
    assert f"{tmp_path}: a folder; give a Python file" in command(*arguments(tmp_path / "w", records, config=tmp_path))
    assert "--workdir" in command("train", f"--config={smallest.PATH}")
    assert not (tmp_path / "w").exists()


FORKS = {
    "fails when imported": ("1 / 0\n", "sft_step", "importing 'a_fork' fails: ZeroDivisionError", "mend that file"),
    "ends the program when imported": ("raise SystemExit(0)\n", "sft_step", "fails: SystemExit: 0", "mend that file"),
    "imports what is missing": ("import no_such_package\n", "sft_step", "no_such_package", "not installed"),
    "lacks the function": ("def other(): ...\n", "sft_step", "has no function 'sft_step'", "correct the name"),
    "misses a keyword that the config has": (
        "def sft_step(state, batch, rng, *, model, tx, num_microbatches=1, chunk_sise=64, z_loss=0.0): ...\n",
        "sft_step", "config.pretrain.step.chunk_size", "did you mean config.pretrain.step.chunk_sise?",
    ),
    "needs a keyword that the config misses": (
        "def sft_step(state, batch, rng, *, model, tx, num_microbatches, chunk_size, z_loss, alpha): ...\n",
        "sft_step", "config.pretrain.step.alpha", "needs this keyword",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORKS)
def test_a_fork_that_does_not_fit_is_refused(kind, command, tmp_path, records, monkeypatch):
    text, name, found, fix = FORKS[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "a_fork", raising=False)
    (tmp_path / "a_fork.py").write_text(text)
    line = command(*arguments(tmp_path / "w", records, f"--config.steps.sft=a_fork:{name}"))
    assert "a_fork" in line and found in line and fix in line
    assert not (tmp_path / "w").exists()


def broken(**changes) -> list[dict]:
    """Good records, of which the seventh is changed: a field set, or left out where the value is None."""
    rows = smallest.records()
    rows[6] = {key: value for key, value in {**rows[6], **changes}.items() if value is not None}
    return rows


def rating(**changes) -> list[dict]:
    return [{"kind": "rating", "response": 0, "value": 1, "scale": [-4, 4], **changes}]


DATA = {
    "no prompt": (broken(prompt=None), ":7: field 'prompt': found nothing", "required"),
    "a prompt that is a number": (broken(prompt=3), ":7: field 'prompt': found 3", "a string or a list"),
    "responses that are text": (broken(responses="text"), ":7: field 'responses'", "a list of one or more"),
    "a rating off its scale": (broken(feedback=rating(value=9)), ":7: field 'feedback[0].value': found 9", "[-4, 4]"),
    "a rating that is text": (broken(feedback=rating(value="good")), ":7: field 'feedback[0].value'", "a number"),
    "an index too large": (broken(feedback=rating(response=1)), ":7: field 'feedback[0].response': found 1", "0 to 0"),
    "an unknown kind": (broken(feedback=[{"kind": "star"}]), ":7: field 'feedback[0].kind'", "rating | ranking"),
    "an id twice": (broken(id=5), ":7: field 'id': found 5, as on line 6", "each id once"),
    "another scale": (broken(feedback=rating(scale=[1, 5])), "field 'scale'", "one scale"),
    "a label off the ratings' scale": (
        broken(feedback=[{"kind": "label", "response": 0, "value": v} for v in (True, 77)]),
        ":7: field 'feedback[1].value': found 77", "a number in [-4, 4]",
    ),
    "labels without classes": (
        [row | {"feedback": [{"kind": "label", "response": 0, "value": 0.2 + row["id"] / 1000}]}
         for row in smallest.records()],
        "config.reward.step.ordinal_bounds: (); the rating scale [0.20", "give the bounds",
    ),
    "not JSON": (b"\n{]\n", ":2: not JSON", "one JSON object a line"),
    "a field twice": (
        b'{"prompt": "", "prompt": "a", "responses": ["b"], "feedback": []}\n', ":1: not JSON", '"prompt" stands twice',
    ),
    "a scale without classes": (
        [row | {"feedback": rating(value=0.5, scale=[0.2, 0.9])} for row in smallest.records()],
        "config.reward.step.ordinal_bounds: (); the rating scale [0.2, 0.9] has 0 whole points", "give the bounds",
    ),
    "not an object": (b"[1, 2]\n", ":1: found [1, 2]", "a record is a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}\n', ":1: not UTF-8", "save the file as UTF-8"),
    "empty": (b"", ": is empty", "at least one record"),
    "one text only": (
        [row | {"responses": ["the same"], "feedback": [{"kind": "critique", "response": 0, "text": "no"}]}
         for row in smallest.records()],
        "split is empty (120 records in all, only 1 of them different)", "give more records",
    ),
    "no text": ([row | {"responses": [" "]} for row in smallest.records()], "120 of them empty", "give more records"),
    "too few": (smallest.records(1), "split is empty (1 records in all)", "give more records"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_broken_data_is_named_by_file_line_and_field_before_a_run_directory_is_made(kind, command, tmp_path):
    content, found, fix = DATA[kind]
    file = tmp_path / "data.jsonl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        smallest.write_records(file, content)
    ordinal = ("--config.stages=tokenizer,pretrain,reward", "--config.reward.init_from=pretrain")
    ordinal += ("--config.reward.step.ordinal=1",)
    line = command(*arguments(tmp_path / "w", file, *(ordinal if "classes" in kind else ())))
    assert found in line and fix in line
    assert str(file) in line or "config." in line or "data.validation_path" in line
    assert not (tmp_path / "w").exists()


def test_data_that_is_missing_or_a_folder_is_refused(command, tmp_path):
    for path, found in ((tmp_path / "no.jsonl", "no such file"), (tmp_path, "is a folder")):
        for source in ("jsonl", "text"):
            line = command(*arguments(tmp_path / "w", path, f"--config.data.source={source}"))
            assert f"{path}: {found}" in line and "give a" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("size, bound", [("5000", "at most"), ("20", "at least")])
def test_a_vocabulary_that_the_texts_cannot_fill_names_the_bound(size, bound, command, tmp_path, records):
    line = command(*arguments(tmp_path / "w", records, f"--config.tokenizer.vocab_size={size}"))
    assert f"tokenizer.vocab_size: found {size}" in line and bound in line
    assert untouched(tmp_path / "w")


def test_a_run_that_stopped_before_it_began_takes_the_mended_config(command, tmp_path, records, trained):
    line = command(*arguments(tmp_path / "w", records, PRETRAINING, "--config.tokenizer.vocab_size=5000"))
    assert "tokenizer.vocab_size" in line
    assert train(tmp_path / "w", records, PRETRAINING) == 0
    assert same_model(tmp_path / "w", trained)


@pytest.mark.parametrize("stage, what", [("reward", "rating, ranking, preference"), ("sft", "edit")])
def test_a_stage_without_its_feedback_names_the_file_and_the_ways_out(stage, what, command, tmp_path, trained):
    rows = [row | {"feedback": [{"kind": "critique", "response": 0, "text": "no"}]} for row in smallest.records()]
    file = smallest.write_records(tmp_path / "unrated.jsonl", rows)
    given = (
        f"--config.{stage}.init_from={trained}/models/pretrain",
        f"--config.tokenizer.path={trained}/models/tokenizer",
    )
    line = command(*arguments(tmp_path / "w", file, f"--config.stages={stage}", *given))
    assert str(file) in line and what in line and f'leave "{stage}" out of config.stages' in line
    assert untouched(tmp_path / "w")


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_a_text_longer_than_its_room_is_named_by_its_line_where_that_is_an_error(command, tmp_path, trained, stage):
    rows = [row | {"prompt": "one two three " * 9} if row["id"] == 30 else row for row in smallest.records()]
    file = smallest.write_records(tmp_path / "long.jsonl", rows)
    start = ("--config.ppo.value_init=policy", f"--config.ppo.init_from={trained}/models/pretrain")
    given = (f"--config.tokenizer.path={trained}/models/tokenizer", "--config.ppo.reward=smallest:records", *start)
    options = (
        f"--config.stages={stage}",
        f"--config.sft.init_from={trained}/models/pretrain",
        "--config.sft.seq_len=60",
    )
    line = command(*arguments(tmp_path / "w", file, *options, *given, "--config.data.too_long=error"))
    found = {"ppo": ("field 'prompt': found", "at most 8"), "sft": ("prompt and response have", "config.sft.seq_len")}
    assert f"{file}:31: " in line and all(text in line for text in found[stage])
    assert untouched(tmp_path / "w")


def folder_of(trained: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(trained / "models" / "pretrain", into / "model"))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_names_that_are_not_utf8_are_names_too(tmp_path, records, capfd):
    """On a second start too: config.json gives the names back."""
    file = shutil.copy(records, tmp_path / "caf\udce9.jsonl")
    for _ in range(2):
        assert cli.main(arguments(tmp_path / "w\udce9", file, "--config.stages=tokenizer")) == 0
    assert "caf\\udce9.jsonl" in (tmp_path / "w\udce9" / "config.json").read_text(encoding="utf-8")


def test_a_pipe_is_no_data_file(command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("jsonl", "text"):
        line = command(*arguments(tmp_path / "w", tmp_path / "pipe", f"--config.data.source={source}"))
        assert f"{tmp_path}/pipe: not a regular file" in line and "give a" in line


@pytest.mark.parametrize(
    "error, found",
    [
        (MemoryError("Unable to allocate 7 TiB for an array"), "Unable to allocate 7 TiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes.\nstack"),
            "64 bytes. stack",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 7 bytes."), "7 bytes"),
    ],
)
def test_too_little_memory_is_one_line(error, found, command, tmp_path, records, monkeypatch):
    def stage(run):
        raise error

    monkeypatch.setattr(stages, "TABLE", with_run("tokenizer", stage))
    line = command(*arguments(tmp_path / "w", records))
    assert "lfjax train: out of memory: " in line and found in line and "a smaller batch_size" in line


@pytest.mark.parametrize("text, found", [("[1]", "found a JSON list"), ("{", ":1: not JSON"), ("\xff", "not UTF-8")])
def test_a_broken_summary_is_named(text, found, command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    (workdir / "summary.json").write_bytes(text.encode("latin-1"))
    line = command(*arguments(workdir, records, PRETRAINING))
    assert f"{workdir}/summary.json:" in line and found in line and "restore or delete the file" in line


def test_a_damaged_model_is_named(command, tmp_path, records, trained):
    model = folder_of(trained, tmp_path)
    file = model / "model.safetensors"
    given = ("--config.stages=sft", f"--config.tokenizer.path={trained}/models/tokenizer")
    file.write_bytes(file.read_bytes()[:-100])
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.sft.init_from={model}"))
    assert str(file) in line and "fetch or export it again" in line
    file.write_bytes(b"")
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.sft.init_from={model}"))
    assert str(file) in line
    file.unlink()
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.sft.init_from={model}"))
    assert "model.safetensors" in line
    assert untouched(tmp_path / "w")


def cut(folder: pathlib.Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def pickled(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_tensors(change):
    """A damage: the file's tensors after `change(tensors)`."""

    def damage(folder: pathlib.Path) -> None:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return damage


def with_key(**changes):
    """A damage: config.json with other values."""

    def damage(folder: pathlib.Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "truncated": (cut, "/model.safetensors: not a whole safetensors file"),
    "wrong shape": (
        with_tensors(lambda t: t.update({UP: t[UP][:-1]})),
        f"/model.safetensors: tensor '{UP}': found shape [31, 16]",
    ),
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), f"/model.safetensors: tensor '{UP}' is missing"),
    "extra tensor": (
        with_tensors(lambda t: t.update(more=t[UP].copy())),
        "/model.safetensors: tensor 'more' has no place",
    ),
    "NaN": (with_tensors(lambda t: t[UP].fill(np.nan)), f"/model.safetensors: tensor '{UP}': holds NaN"),
    "wrong vocabulary": (with_key(vocab_size=309), "309"),
    "unknown model_type": (with_key(model_type="mamba"), "/config.json: field 'model_type': found 'mamba'"),
    "pickle": (pickled, ": no model.safetensors and no model.safetensors.index.json (a pickled pytorch_model.bin is"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_of_a_model_is_one_line_of_import_and_of_a_run(kind, command, tmp_path, records, trained):
    damage, found = DAMAGES[kind]
    model = folder_of(trained, tmp_path)
    damage(model)
    line = command("import", model, tmp_path / "new")
    assert str(model) in line and found in line
    assert not (tmp_path / "new").exists()
    given = ("--config.stages=sft", f"--config.tokenizer.path={trained}/models/tokenizer")
    line = f"config.model.init_from: {line}"
    assert command(*arguments(tmp_path / "w", records, *given, f"--config.model.init_from={model}")) == line
    assert untouched(tmp_path / "w")


@pytest.mark.parametrize("stages", ["pretrain", "sft", "tokenizer,pretrain,sft"])
def test_what_is_no_model_and_no_tokenizer_is_named_before_a_run_directory_is_made(
    stages, command, tmp_path, records, trained
):
    given = [f"--config.stages={stages}"]
    if "tokenizer" in stages or stages == "pretrain":
        line = command(*arguments(tmp_path / "w", records, *given, f"--config.tokenizer.path={records}"))
        assert line.startswith(f"config.tokenizer.path: {records}: not a SentencePiece model")
        line = command(*arguments(tmp_path / "w", records, *given, f"--config.tokenizer.path={tmp_path}"))
        assert line.startswith(f"config.tokenizer.path: {tmp_path}: no such file in it: tokenizer.json, ")
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.model.init_from={tmp_path}"))
    assert line.startswith(f"config.model.init_from: {tmp_path}: no such file in it: tokenizer.json, ")
    given.append(f"--config.tokenizer.path={trained}/models/tokenizer")
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.model.init_from={tmp_path}"))
    assert line.startswith(f"config.model.init_from: {tmp_path}/config.json: not found; a model folder holds ")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("key", ["sft.init_from", "reward.init_from", "ppo.init_from", "ppo.reward", "ppo.value_init"])
def test_every_key_of_a_model_is_named_before_a_run_directory_is_made(key, command, tmp_path, records):
    line = command(*arguments(tmp_path / "w", records, f"--config.{key}={tmp_path}"))
    assert line.startswith(f"config.{key}: {tmp_path}/config.json: not found; a model folder holds ")
    assert not (tmp_path / "w").exists()


def test_a_rank_beyond_a_matrix_of_a_given_model_is_refused(command, tmp_path, records, trained):
    model = trained / "models" / "pretrain"
    given = ("--config.stages=sft", f"--config.model.init_from={model}", "--config.model.width=1024")
    line = command(*arguments(tmp_path / "w", records, *given, "--config.model.lora.rank=100000"))
    assert line.startswith("config.model.lora.rank: 100000; layers/attention/k is 16 x 8: allowed: at most 8")
    assert not (tmp_path / "w").exists()


def test_other_rules_of_a_run_that_goes_on_are_checked_too(command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    line = command(*arguments(workdir, records, PRETRAINING, "--config.mesh.rules=(('x$',()),)"), progress=True)
    assert line.startswith("config.mesh.rules: ('x$', ()): found in the path of no parameter")
    assert train(workdir, records, PRETRAINING, "--config.mesh.rules=(('x$',()),('',()))") == 0


@pytest.mark.parametrize("size", [300, 310])
def test_a_model_of_another_vocabulary_is_refused(size, command, tmp_path, records, trained):
    """Also one of the same size: its ids mean other pieces."""
    rows = smallest.records(200, seed=1)
    sentencepiece.train([row["responses"][0][::-1] for row in rows], tmp_path / "other", vocab_size=size)
    given = (f"--config.tokenizer.path={tmp_path}/other", f"--config.sft.init_from={trained}/models/pretrain")
    line = command(*arguments(tmp_path / "w", records, "--config.stages=sft", *given))
    assert "config.sft.init_from" in line and "vocabulary" in line and "config.tokenizer.path" in line
    assert untouched(tmp_path / "w")


def test_a_scorer_of_another_vocabulary_is_refused_before_anything_is_trained(command, tmp_path, records, trained):
    """The vocabulary is learnt first; then every folder that a later stage reads is compared with it."""
    model = trained / "models" / "pretrain"
    options = ("--config.stages=tokenizer,pretrain,reward", "--config.tokenizer.vocab_size=300")
    line = command(*arguments(tmp_path / "w", records, *options, f"--config.reward.init_from={model}"))
    assert line.startswith(f"config.reward.init_from: {model} has another vocabulary than the run's")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_a_start_without_a_vocabulary_is_named_by_its_key(command, tmp_path, records, trained):
    model = folder_of(trained, tmp_path)
    (model / "tokenizer.model").unlink()
    line = command(*arguments(tmp_path / "w", records, "--config.stages=reward", f"--config.reward.init_from={model}"))
    assert line.startswith(f"config.reward.init_from: {model}: no such file in it: tokenizer.json")
    assert not (tmp_path / "w").exists()


def test_words_as_labels_are_for_the_stage_that_learns_from_them(command, tmp_path):
    words = [{"kind": "label", "response": 0, "value": "good"}]
    file = smallest.write_records(tmp_path / "words.jsonl", [row | {"feedback": words} for row in smallest.records()])
    options = ("--config.stages=tokenizer,pretrain,reward", "--config.reward.init_from=pretrain")
    line = command(*arguments(tmp_path / "w", file, *options))
    assert line.startswith("stage reward: ") and "`label` feedback, for the stage classify" in line
    assert not (tmp_path / "w").exists()


def test_another_config_names_the_model_that_a_new_run_may_start_from(command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    stages = "--config.stages=tokenizer,pretrain,sft"
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"stages": stages.partition("=")[2].split(",")}))
    line = command(*arguments(workdir, records, stages, "--config.sft.steps=7"))
    assert "config.sft.steps: " in line and f"--config.sft.init_from={workdir}/models/pretrain" in line
    line = command(*arguments(workdir, records, PRETRAINING, "--config.pretrain.steps=7"))
    assert "config.pretrain.steps: 10 -> 7" in line and "init_from" not in line


def test_a_language_model_is_no_reward_and_no_value_network(command, tmp_path, records, trained):
    model = trained / "models" / "pretrain"
    given = ("--config.stages=ppo", f"--config.ppo.init_from={model}", f"--config.tokenizer.path={model}")
    line = command(*arguments(tmp_path / "w", records, *given, f"--config.ppo.reward={model}"))
    assert "config.ppo.reward" in line and "no head with one score" in line and not (tmp_path / "w").exists()
    given += (
        f"--config.ppo.value_init={model}",
        "--config.ppo.reward=test_bad_input:length",
        "--config.ppo.norm_samples=0",
    )
    line = command(*arguments(tmp_path / "w", records, *given))
    assert "config.ppo.value_init" in line and 'use "reward" or "policy"' in line
    assert untouched(tmp_path / "w")


def length(prompts, responses, records):
    return [len(response) for response in responses]


def fails(prompts, responses, records):
    return {}["a key"]


def ends(prompts, responses, records):
    raise SystemExit(0)


def too_few(prompts, responses, records):
    return [1.0]


def not_a_number(prompts, responses, records):
    return [0.0] * (len(responses) - 1) + [float("nan")]


def texts(prompts, responses, records):
    return ["good"] * len(responses)


REWARDS = {
    "fails": ("fails: KeyError: a key (line ", "mend it"),
    "ends": ("fails: SystemExit: 0", "mend it"),
    "too_few": ("gave scores of shape [1] for 8 responses", "return one number a response"),
    "not_a_number": ("gave nan for the response", "return finite numbers"),
    "texts": ("could not convert string to float", "mend it"),
    "absent": ("has no function 'absent'", "correct the name"),
}


@pytest.mark.parametrize("function", REWARDS)
def test_a_reward_function_that_does_not_do_is_named(function, command, tmp_path, records, trained):
    found, fix = REWARDS[function]
    model = trained / "models" / "pretrain"
    given = ("--config.stages=ppo", f"--config.ppo.init_from={model}", f"--config.tokenizer.path={model}")
    given += ("--config.ppo.value_init=policy", f"--config.ppo.reward=test_bad_input:{function}")
    line = command(*arguments(tmp_path / "w", records, *given))
    assert "config.ppo.reward" in line and "test_bad_input" in line and found in line and fix in line
    assert untouched(tmp_path / "w")


def test_a_workdir_that_is_a_file_or_below_one_is_refused(command, tmp_path, records):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "a file, not a folder; choose another --workdir" in command(*arguments(file, records))
    assert f"--workdir={file}/w: Not a directory; choose" in command(*arguments(file / "w", records))
    assert file.read_text() == "mine"


def test_an_empty_workdir_is_refused(command, tmp_path, records, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--workdir=: empty; name the folder of the run" in command(*arguments("", records))
    assert not any(tmp_path.iterdir())


def test_an_override_without_a_value_is_named(command, tmp_path, records):
    line = command(*arguments(tmp_path / "w", records, "--config.ppo.steps", "20"))
    assert line == "--config.ppo.steps: no value; write --config.ppo.steps=VALUE"


def test_a_run_does_not_go_on_with_other_data(command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    data = pathlib.Path(shutil.copy(records, tmp_path / "rated.jsonl"))
    (workdir / "config.json").write_text((workdir / "config.json").read_text().replace(str(records), str(data)))
    assert train(workdir, data, PRETRAINING) == 0
    data.write_text(data.read_text() + data.read_text().splitlines()[0].replace('"id": 0', '"id": 999') + "\n")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    line = command(*arguments(workdir, data, PRETRAINING))
    assert f"{workdir}/inputs.json: config.data.path is not what the run was started with; put that back" in line
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "file, key",
    [
        ("model/model.safetensors", "config.sft.init_from"),
        ("model/config.json", "config.sft.init_from"),
        ("vocabulary/tokenizer.model", "config.tokenizer.path"),
    ],
)
def test_a_run_does_not_go_on_with_another_model_or_tokenizer(file, key, command, tmp_path, records, trained):
    folder_of(trained, tmp_path)
    shutil.copytree(trained / "models" / "tokenizer", tmp_path / "vocabulary")
    given = ("--config.stages=sft", "--config.sft.steps=1", f"--config.sft.init_from={tmp_path}/model")
    given += (f"--config.tokenizer.path={tmp_path}/vocabulary",)
    assert train(tmp_path / "w", records, *given) == 0
    (tmp_path / "w" / "checkpoints" / "sft" / "FINISHED").unlink()
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content + b"\n" if "json" in file else content[:-1] + bytes([content[-1] ^ 1]))
    line = command(*arguments(tmp_path / "w", records, *given))
    assert line.startswith(f"{tmp_path}/w/inputs.json: {key} is not what the run was started with; put that back, or")
    (tmp_path / file).write_bytes(content)
    assert train(tmp_path / "w", records, *given) == 0


def test_an_edited_fork_is_kept_beside_the_first(tmp_path, records, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    fork = tmp_path / "fork_to_be_changed.py"
    fork.write_text("def reward(prompts, responses, records):\n    return [0.0 for _ in responses]\n")
    options = ["--config.stages=tokenizer,pretrain,ppo", "--config.ppo.reward=fork_to_be_changed:reward"]
    options += ["--config.ppo.value_init=policy", "--config.ppo.init_from=pretrain", "--config.ppo.steps=1"]
    assert train(tmp_path / "w", records, *options) == 0
    assert (tmp_path / "w" / "steps" / "reward_function.py").read_text() == fork.read_text()
    fork.write_text(fork.read_text().replace("0.0", "1.0"))
    capfd.readouterr()
    assert train(tmp_path / "w", records, *options) == 0
    kept = tmp_path / "w" / "steps" / "reward_function.2.py"
    assert f"note: {fork} has changed since the run was started; kept as {kept}" in capfd.readouterr().err
    assert kept.read_text() == fork.read_text()
    assert train(tmp_path / "w", records, *options) == 0 and "note:" not in capfd.readouterr().err


def test_a_run_that_has_not_begun_takes_mended_data(command, tmp_path, records):
    data = pathlib.Path(shutil.copy(records, tmp_path / "rated.jsonl"))
    size = "--config.tokenizer.vocab_size=340"
    assert "these texts fill at most" in command(*arguments(tmp_path / "w", data, PRETRAINING, size), progress=True)
    more = [{**row, "id": f"more {row['id']}"} for row in smallest.records(40, seed=7)]
    for row in more:
        row["responses"] = [f"{row['responses'][0]} and quite unlike anything said before, {row['id']}"]
    smallest.write_records(data, [*smallest.records(), *more])
    assert train(tmp_path / "w", data, PRETRAINING, size) == 0


def test_a_directory_belongs_to_one_run_at_a_time(command, tmp_path, records, trained):
    workdir = shutil.copytree(trained, tmp_path / "w")
    holder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        line = command(*arguments(workdir, records, PRETRAINING))
        assert f"--workdir={workdir}: another lfjax train works there; wait for its end" in line
    finally:
        os.close(holder)
    assert train(workdir, records, PRETRAINING) == 0
    assert train(workdir, records, PRETRAINING) == 0  # which has left it to the next


@pytest.mark.parametrize("stage, what", [("sft", "no `edit` feedback"), ("reward", "no rating, ranking")])
def test_a_stage_that_has_nothing_to_learn_from_is_named_before_any_other_runs(stage, what, command, tmp_path):
    rows = [{**row, "feedback": [{"kind": "critique", "response": 0, "text": "so"}]} for row in smallest.records()]
    records = smallest.write_records(tmp_path / "critiques.jsonl", rows)
    options = [f"--config.stages=tokenizer,pretrain,{stage}", "--config.reward.init_from=pretrain"]
    line = command(*arguments(tmp_path / "w", records, *options))
    assert line.startswith(f"stage {stage}: config.data.path {records}: the train split holds {what}")
    assert not (tmp_path / "w").exists()


def test_prompts_that_an_evaluation_cannot_use_are_named_before_training(command, tmp_path, trained):
    """With a tokenizer that is there, before anything is written."""
    rows = [{**row, "prompt": f"{row['id']} " * 30} for row in smallest.records()]
    records = smallest.write_records(tmp_path / "long.jsonl", rows)
    for name, given in (("a", ()), ("b", (f"--config.tokenizer.path={trained}/models/tokenizer",))):
        stages = f"--config.stages={'' if given else 'tokenizer,'}pretrain,sft,evaluate"
        options = (stages, "--config.sampling.prompt_buckets=(16,)", *given)
        line = command(*arguments(tmp_path / name, records, *options), progress=not given)
        assert "field 'prompt'" in line and "raise config.sampling.prompt_buckets" in line
        assert not (tmp_path / name / "checkpoints").exists()
    assert not (tmp_path / "b").exists()


def test_answers_that_a_reward_model_could_not_tell_apart_are_named_before_training(command, tmp_path):
    rows = [{**row, "responses": [f"{row['id']} {'so ' * 60}{end}" for end in "ab"]} for row in smallest.records()]
    for row in rows:
        row["feedback"] = [{"kind": "preference", "chosen": 0, "rejected": 1}]
    records = smallest.write_records(tmp_path / "long.jsonl", rows)
    options = ["--config.stages=tokenizer,pretrain,reward", "--config.reward.init_from=pretrain"]
    options += ["--config.tokenizer.vocab_size=276"]
    line = command(*arguments(tmp_path / "w", records, *options), progress=True)
    assert line.startswith("config.reward.seq_len: 48; cut to so many tokens the answers of every pair of the train ")
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.parametrize(
    "off, on, found",
    [
        (("bradley_terry",), (), "learns from orders of answers, "),  # the regression has nothing to learn
        (("bradley_terry", "regression"), ("plackett_luce",), "learns from ratings, "),
    ],
)
def test_reward_losses_that_learn_nothing_from_the_feedback_are_refused(off, on, found, command, tmp_path):
    rows = [
        {**row, "responses": [f"a {row['id']}", "b"], "feedback": row["feedback"][:1]} for row in smallest.records()
    ]
    if "orders" in found:
        rows = [{**row, "feedback": [{"kind": "preference", "chosen": 1, "rejected": 0}]} for row in rows]
    records = smallest.write_records(tmp_path / "data.jsonl", rows)
    options = ["--config.stages=tokenizer,pretrain,reward", "--config.reward.init_from=pretrain"]
    options += [f"--config.reward.step.{name}={float(name in on)}" for name in (*off, *on)]
    line = command(*arguments(tmp_path / "w", records, *options))
    assert line.startswith("config.reward.step: no loss of weight above 0 ") and found in line
    assert "set one of bradley_terry, " in line
    assert not (tmp_path / "w").exists()


CLASS_FILES = {
    "one class": (("a", "a", "a"), "stage classify: ", "give records of a second class"),
    "a class of the test file alone": (("ab", "ab", "bc"), "test.jsonl:2: ", "found the label 'c', which no training"),
    "a class of the validation file": (("ab", "bd", "ab"), "validation.jsonl:2: ", "found the label 'd', which no"),
}


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_classes_that_cannot_be_learnt_are_named_before_any_other_stage_runs(kind, command, tmp_path):
    splits, place, found = CLASS_FILES[kind]
    names = ("train", "validation", "test")
    for name, classes in zip(names, splits, strict=True):
        rows = [{"prompt": "", "responses": [f"{name} {i}"], "feedback": []} for i in range(12)]
        for i, row in enumerate(rows):
            row["feedback"] = [{"kind": "label", "response": 0, "value": classes[i % len(classes)]}]
        smallest.write_records(tmp_path / f"{name}.jsonl", rows)
    files = [f"--config.data.{name}_path={tmp_path}/{name}.jsonl" for name in names[1:]]
    options = ["--config.stages=tokenizer,pretrain,classify", "--config.classify.seq_len=24"]
    options += ["--config.classify.buckets=(24,)", "--config.classify.batch_size=8", *files]
    line = command(*arguments(tmp_path / "w", tmp_path / "train.jsonl", *options))
    assert place in line and found in line
    assert not (tmp_path / "w").exists()


def test_a_run_that_has_only_its_vocabulary_takes_the_mended_config(command, tmp_path, records):
    options = ["--config.stages=tokenizer,pretrain,sft,reward,ppo", "--config.pretrain.steps=1"]
    line = command(
        *arguments(tmp_path / "w", records, *options, "--config.sampling.stop=('two words',)"), progress=True
    )
    assert "config.sampling.stop" in line and (tmp_path / "w" / "models" / "tokenizer").is_dir()
    assert train(tmp_path / "w", records, PRETRAINING) == 0


def test_a_workdir_that_is_an_address_is_refused(command, tmp_path, records, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--workdir=gs://bucket/run: an address; name a folder" in command(*arguments("gs://bucket/run", records))
    assert not any(tmp_path.iterdir())


def test_a_file_where_a_model_goes_is_refused_before_the_stage(command, tmp_path, records):
    (tmp_path / "w" / "models").mkdir(parents=True)
    (tmp_path / "w" / "models" / "pretrain").write_text("mine")
    line = command(*arguments(tmp_path / "w", records))
    assert f"{tmp_path}/w/models/pretrain: a file where a folder of the run goes; move it away" in line


@pytest.mark.parametrize("name", ["checkpoints", "models", "steps", "checkpoints/pretrain", "models/tokenizer"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_where_a_folder_of_the_run_goes_is_named(name, link, command, tmp_path, records):
    """Or a link to nothing."""
    place = tmp_path / "w" / name
    place.parent.mkdir(parents=True)
    place.symlink_to("nowhere") if link else place.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    line = command(*arguments(tmp_path / "w", records))
    assert line == f"{place}: a file where a folder of the run goes; move it away"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_workdir_whose_name_is_no_utf8_is_refused(command, tmp_path, records):
    line = command(*arguments(f"{tmp_path}/\udcff", records))
    assert line == f"--workdir='{tmp_path}/\\udcff': no UTF-8 name; name another folder" and not os.listdir(tmp_path)


def test_a_workdir_that_is_a_link_to_nothing_or_below_one_is_refused(command, tmp_path, records):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for workdir in (tmp_path / "link", tmp_path / "link" / "w"):
        line = command(*arguments(workdir, records))
        assert f"--workdir={workdir}: {tmp_path}/link is a link to {tmp_path}/gone, which is not there; make" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


NUL = {
    "the workdir": ("--workdir=a\0b", "--workdir=a\\x00b"),
    "the config": ("--config=a\0b", "--config=a\\x00b"),
    "the data": ("--config.data.path=a\0b", "--config.data.path=a\\x00b"),
}


@pytest.mark.parametrize("kind", NUL)
def test_a_nul_character_in_an_argument_is_named(kind, command, tmp_path, records):
    given, shown = NUL[kind]
    line = command(*arguments(tmp_path / "w", records), given)
    assert f"argument '{shown}' holds a NUL character" in line and "take it out" in line
    assert not (tmp_path / "w").exists()


def test_what_a_chat_template_refuses_is_said_before_a_run_directory_is_made(command, tmp_path, trained):
    folder, rows = tmp_path / "vocabulary", []
    shutil.copytree(trained / "models" / "tokenizer", folder)
    for i in range(40):
        prompt = [{"role": "user", "content": f"{i}: how was the film?"}]
        rows.append({"prompt": prompt, "responses": ["<think>so</think> lovely"], "feedback": []})
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--config.stages=tokenizer,pretrain,sft", f"--config.tokenizer.path={folder}")
    turn = "{{ m.role + ': ' + (%s) + eos_token }}"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    line = command(*arguments(tmp_path / "w", data, *given))
    assert line.startswith(f"{data}:") and "field 'prompt': " in line and "no system role" in line
    shown = turn % "m.content.split('</think>')[-1]"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + shown + "{% endfor %}")
    line = command(*arguments(tmp_path / "w", data, *given))
    assert line.startswith(f"{data}:") and "field 'responses': " in line and "leaves out a part of the answer" in line
    assert untouched(tmp_path / "w")


@pytest.mark.parametrize("key", ["data.path", "data.test_path", "tokenizer.path", "model.init_from", "sft.init_from"])
def test_a_nul_character_in_a_path_of_the_config_is_named(key, command, tmp_path, records):
    file = tmp_path / "nul.py"
    change = f"def get_config():\n    config = old()\n    config.{key} = 'a\\0b'\n    return config\n"
    file.write_text(f"from smallest import *\nold = get_config\n{change}")
    given = () if key == "data.path" else (f"--config.data.path={records}",)
    line = command("train", f"--config={file}", f"--workdir={tmp_path}/w", *given)
    assert line == f"config.{key}: 'a\\x00b'; holds a NUL character, which no path or name can; take it out"
    assert not (tmp_path / "w").exists()


def test_a_finished_stage_whose_model_is_gone_says_how_to_make_it_again(command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    shutil.rmtree(workdir / "models" / "pretrain")
    for name in ("config.json", "metrics.jsonl"):
        (workdir / name).unlink()  # the chain grows by a stage: another config
    (workdir / "models").rename(workdir / "kept")
    given = ("--config.stages=tokenizer,pretrain,sft", f"--config.tokenizer.path={workdir}/kept/tokenizer")
    line = command(*arguments(workdir, records, *given))
    assert f"delete {workdir}/checkpoints/pretrain/FINISHED, and it is made again" in line
    (workdir / "checkpoints" / "pretrain" / "FINISHED").unlink()
    assert train(workdir, records, *given) == 0
    assert same_model(workdir, trained)


def test_a_model_of_scores_is_no_language_model(command, tmp_path, records, trained, scorer):
    given = (f"--config.tokenizer.path={trained}/models/tokenizer", f"--config.sft.init_from={scorer}")
    line = command(*arguments(tmp_path / "w", records, "--config.stages=sft", *given))
    assert f"config.sft.init_from: {scorer} is a model of scores, not a language model" in line
    assert untouched(tmp_path / "w")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere: no folder is closed to it")
def test_a_workdir_that_may_not_be_written_is_refused(command, tmp_path, records):
    tmp_path.chmod(0o500)
    assert f"--workdir={tmp_path}/w: Permission denied; choose" in command(*arguments(tmp_path / "w", records))
    tmp_path.chmod(0o700)


def test_the_workdir_of_another_config_is_refused_with_the_difference(command, tmp_path, records, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    line = command(*arguments(trained, records, PRETRAINING, "--config.pretrain.steps=9"))
    assert f"{trained}/config.json" in line and "config.pretrain.steps: 10 -> 9" in line and "another --workdir" in line
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_another_mesh_and_says_so(tmp_path, records, trained, capfd):
    shutil.copytree(trained, tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "pretrain" / "FINISHED").unlink()
    assert train(tmp_path / "w", records, PRETRAINING, "--config.mesh.fsdp=2") == 0
    assert "note: going on with another mesh (config.mesh.fsdp: 1 -> 2)" in capfd.readouterr().err


CLOSED = "import os, sys; os.close({}); os.execv(sys.executable, [sys.executable, '-m', 'lfjax.cli', *sys.argv[1:]])"


@pytest.mark.parametrize("lost", ["nobody reads stderr", "a full disk for stderr", "closed stderr", "closed stdout"])
def test_training_needs_nobody_to_read_what_it_prints(lost, tmp_path, records):
    """The programs of the first are those of the others."""
    short = ("--config.pretrain.steps=2", "--config.pretrain.log_every=1")
    argv = arguments(tmp_path / "w", records, PRETRAINING, *short)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = ["-m", "lfjax.cli"] if "closed" not in lost else ["-c", CLOSED.format(2 if "stderr" in lost else 1)]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        stderr = {"nobody reads stderr": writer, "a full disk for stderr": full}.get(lost, subprocess.DEVNULL)
        to = {"stdout": subprocess.DEVNULL, "stderr": stderr, "env": environment}
        done = subprocess.run([sys.executable, *program, *argv], timeout=300, **to)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "w" / "models" / "pretrain").is_dir()


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_named(platforms, tmp_path, records):
    argv = [sys.executable, "-m", "lfjax.cli", *arguments(tmp_path / "w", records, PRETRAINING)]
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: JAX_PLATFORMS={platforms}: no device: ")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("text, found", [("{", ":1: not JSON"), ("[]", "found a JSON list, not an object")])
def test_a_broken_config_in_the_workdir_is_refused(text, found, command, tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    (workdir / "config.json").write_text(text)
    line = command(*arguments(workdir, records, PRETRAINING))
    assert f"{workdir}/config.json" in line and found in line
    assert (workdir / "config.json").read_text() == text


FINISHED = {
    "not UTF-8": (b'{"figures": "\xff"}', ":1: not UTF-8 (byte 0xff)"),
    "not JSON": (b"{", ":1: not JSON"),
    "empty": (b"", ":1: not JSON"),
    "no object": (b"[]", "found a JSON list, not an object"),
    "no figures": (b'{"seconds": 1.0, "parts": {}, "programs": {}}', "no figures in it"),
    "no seconds": (b'{"figures": {}, "parts": {}, "programs": {}}', "no seconds in it"),
    "seconds that are none": (b'{"figures": {}, "seconds": NaN, "parts": {}, "programs": {}}', "NaN is not JSON"),
    "negative seconds": (b'{"figures": {}, "seconds": -1, "parts": {}, "programs": {}}', "no seconds in it"),
    "seconds of 400 digits": (
        b'{"figures": {}, "seconds": 1' + b"0" * 400 + b', "parts": {}}',
        "no seconds and no pro",
    ),
    "other parts": (
        b'{"figures": {"a": [1]}, "seconds": 1, "parts": {"train": "x"}, "programs": {"a": "b"}}',
        "no figures and no parts and no programs in it",
    ),
    "seconds of another kind": (b'{"figures": {}, "seconds": "1", "parts": {}}', "no seconds and no programs"),
}


@pytest.mark.parametrize("kind", FINISHED)
def test_a_finished_file_that_is_none_is_named_and_the_fix_works(kind, command, tmp_path, records, trained):
    data, found = FINISHED[kind]
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    file = workdir / "checkpoints" / "pretrain" / "FINISHED"
    file.write_bytes(data)
    line = command(*arguments(workdir, records, PRETRAINING))
    assert f"{file}:" in line and found in line
    assert 'delete it: stage "pretrain" goes on from its last checkpoint' in line and "restore" not in line
    assert file.read_bytes() == data
    if kind == "no figures":
        file.unlink()
        assert train(workdir, records, PRETRAINING) == 0
        assert same_model(workdir, trained)


def test_stages_that_took_no_time_have_no_goodput(tmp_path, records, trained):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    for file in workdir.glob("checkpoints/*/FINISHED"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 0}))
    assert train(workdir, records, PRETRAINING) == 0
    assert json.loads((workdir / "summary.json").read_text())["time/goodput"] == 0.0


def test_a_broken_log_in_the_workdir_is_refused_by_line(command, tmp_path, records, trained):
    workdir = unfinished(trained, tmp_path)
    (workdir / "metrics.jsonl").write_text("{}\n" + (workdir / "metrics.jsonl").read_text())
    line = command(*arguments(workdir, records, PRETRAINING))
    assert f"{workdir}/metrics.jsonl:1: not a row of this log" in line and "mend or delete that line" in line


def unfinished(trained: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
    """A copy of the run, killed between pretraining's last checkpoint and its result."""
    workdir = pathlib.Path(shutil.copytree(trained, into / "w"))
    (workdir / "checkpoints" / "pretrain" / "FINISHED").unlink()
    shutil.rmtree(workdir / "models" / "pretrain")
    return workdir


def damage(checkpoint: pathlib.Path) -> None:
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_corrupt_newest_checkpoint_costs_a_line_and_the_steps_since_the_one_before(tmp_path, records, trained, capfd):
    workdir = unfinished(trained, tmp_path)
    damage(workdir / "checkpoints" / "pretrain" / "10")
    assert train(workdir, records, PRETRAINING) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(told) == 1 and f"{workdir}/checkpoints/pretrain/10" in told[0] and "going on from step 8" in told[0]
    assert same_model(workdir, trained)
    assert (workdir / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_corrupt_checkpoints_throughout_are_an_error(command, tmp_path, records, trained):
    workdir = unfinished(trained, tmp_path)
    for step in ("8", "10"):
        damage(workdir / "checkpoints" / "pretrain" / step)
    line = command(*arguments(workdir, records, PRETRAINING))
    assert f"{workdir}/checkpoints/pretrain: no checkpoint can be read" in line and "delete this folder" in line


SPOILT = {
    "nested": (lambda file: file.write_text("[" * 10**6), "beside/metadata: not JSON (nested deeper than 100)"),
    "other pairs": (lambda file: put(file, "pending", [1]), "not what training leaves: no pending in it"),
    "texts": (
        lambda file: put(file, None, "x"), "not what training leaves: no step and no figures and no row and no pending",
    ),
    "another step": (lambda file: put(file, "step", 3), "not what training leaves: no step in it"),
}  # fmt: skip


def put(file: pathlib.Path, key: str | None, value) -> None:
    beside = json.loads(file.read_text())
    changed = [key] if key else list(beside["extra"])
    file.write_text(json.dumps({**beside, "extra": {**beside["extra"], **dict.fromkeys(changed, value)}}))


@pytest.mark.parametrize("kind", SPOILT)
def test_what_lies_beside_a_checkpoint_is_checked(kind, command, tmp_path, records, trained):
    spoil, found = SPOILT[kind]
    workdir = unfinished(trained, tmp_path)
    for step in ("8", "10"):
        spoil(workdir / "checkpoints" / "pretrain" / step / "beside" / "metadata")
    line = command(*arguments(workdir, records, PRETRAINING))
    assert line.startswith(f"{workdir}/checkpoints/pretrain: no checkpoint can be read: ") and found in line


@pytest.mark.parametrize("name", ["beside/metadata", "_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_what_is_no_file_among_checkpoints_is_never_waited_for(name, command, tmp_path, records, trained):
    workdir = unfinished(trained, tmp_path)
    path = workdir / "checkpoints" / "pretrain" / "10" / name
    path.unlink()
    os.mkfifo(path)
    for given in ((), ("--follow-links",)):
        line = command(*arguments(workdir, records, PRETRAINING, *given))
        assert line == f"{path}: not a regular file; remove it"


@pytest.fixture
def small_disk():
    """Sets the largest size of a file, beyond which writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the writes that were under way
@pytest.mark.parametrize("size, file", [(1000, "config.json"), (4000, ""), (25_000, "checkpoints/pretrain")])
def test_a_full_disk_ends_a_run_in_one_line_and_the_same_command_goes_on(
    size, file, command, tmp_path, records, trained, small_disk
):
    workdir = tmp_path / "w"
    given = [PRETRAINING]
    if file == "":  # the tokenizer is the next to be written
        workdir.mkdir()
        shutil.copy(trained / "config.json", workdir)
    if "checkpoints" in file:
        given.append(f"--config.tokenizer.path={trained}/models/tokenizer")
    small_disk(size)
    line = command(*arguments(workdir, records, *given), progress=True)
    small_disk()
    assert f"{workdir}/{file}".removesuffix("/") in line and "free some space" in line
    assert not list(workdir.glob("*.tmp")) and not (workdir / "models" / "pretrain").exists()
    assert train(workdir, records, *given) == 0
    assert same_model(workdir, trained)


LINKED = ("checkpoints", "models/pretrain", "tensorboard", "wandb", "steps", "profile", "steps/a.py")
READ = ("config.json", "inputs.json", "summary.json", "samples.jsonl", "checkpoints/pretrain/FINISHED")


@pytest.mark.parametrize("place", [*LINKED, *READ])
def test_a_link_out_of_the_workdir_is_refused_where_it_is_not_asked_for(place, command, tmp_path, records):
    workdir, outside = tmp_path / "w", tmp_path / "outside"
    outside.mkdir()
    (workdir / place).parent.mkdir(parents=True)
    (workdir / place).symlink_to(outside)
    line = command(*arguments(workdir, records, PRETRAINING))
    assert line.startswith(f"{workdir}/{place}: a link to {outside}, outside of the run directory") and not list(
        outside.iterdir()
    )
    assert "--follow-links" in line and os.listdir(workdir) == [place.split("/")[0]]


def test_a_link_out_of_the_workdir_is_found_behind_one_that_stays_in_it(command, tmp_path, records):
    workdir, outside = tmp_path / "w", tmp_path / "outside"
    (workdir / "here" / "pretrain").mkdir(parents=True)
    outside.write_text("{}")
    (workdir / "checkpoints").symlink_to("here")
    (workdir / "here" / "again").symlink_to("../checkpoints")
    (workdir / "here" / "itself").symlink_to("itself")
    (workdir / "here" / "pretrain" / "FINISHED").symlink_to(outside)
    line = command(*arguments(workdir, records, PRETRAINING))
    assert line.startswith(f"{workdir}/checkpoints/pretrain/FINISHED: a link to {outside}, outside of the run")


def test_links_are_followed_where_they_lead_into_the_workdir_or_are_asked_for(tmp_path, records, trained):
    workdir, outside = tmp_path / "w", tmp_path / "outside"
    workdir.mkdir()
    outside.mkdir()
    (workdir / "checkpoints").symlink_to(outside)
    (workdir / "here").mkdir()
    (workdir / "models").symlink_to("here")
    assert train(workdir, records, PRETRAINING, "--follow-links") == 0
    assert (outside / "pretrain" / "FINISHED").is_file() and same_model(workdir, trained)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_link_in_place_of_a_log_is_refused(name, command, tmp_path, records):
    workdir, victim = tmp_path / "w", tmp_path / "precious"
    workdir.mkdir()
    victim.write_text("precious")
    (workdir / name).symlink_to(victim)
    line = command(*arguments(workdir, records, PRETRAINING), progress=True)
    assert line.startswith(f"{workdir}/{name}: ") and victim.read_text() == "precious"


def test_a_tensorboard_folder_that_cannot_be_written_ends_a_run_in_one_line(command, tmp_path, records, trained):
    """The folder is a file: the one way to close it that also holds for root."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "tensorboard").write_text("mine")
    tensorboard = "--config.run.trackers=tensorboard"
    line = command(*arguments(workdir, records, PRETRAINING, tensorboard), progress=True)
    assert f"{workdir}/tensorboard/pretrain: cannot write: " in line and "free some space" in line
    (workdir / "tensorboard").unlink()
    assert train(workdir, records, PRETRAINING, tensorboard) == 0
    assert same_model(workdir, trained)


def test_a_full_disk_at_the_last_moment_leaves_no_half_written_model(command, tmp_path, records, trained, small_disk):
    workdir = unfinished(trained, tmp_path)
    small_disk(10_000)
    line = command(*arguments(workdir, records, PRETRAINING), progress=True)
    small_disk()
    assert f"{workdir}/models/pretrain" in line and "free some space" in line
    assert [entry.name for entry in (workdir / "models").iterdir()] == ["tokenizer"]
    assert train(workdir, records, PRETRAINING) == 0
    assert same_model(workdir, trained)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, trained) -> pathlib.Path:
    """A reward model's folder."""
    config = presets.llama(
        vocab_size=310, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, context=64, num_labels=1
    )
    model = Transformer(config)
    params = tiny.init(model)
    folder = tmp_path_factory.mktemp("models") / "scorer"
    hf.save(
        folder,
        hf.loaded_from(model, jax.tree.map(np.asarray, params), sentencepiece.load(trained / "models/tokenizer")),
    )
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


COMMANDS = {
    "no command": ((), "COMMAND"),
    "an unknown command": (("trian",), "trian"),
    "sample without a model": (("sample",), "model"),
    "sample of nothing": (("sample", "nowhere"), "nowhere: no such folder"),
    "sample of a run without a model": (("sample", "{empty}"), "finish the stage that makes one first"),
    "sample of a folder that is no model": (("sample", "{tmp}"), "config.json: not found"),
    "sample of a reward model": (("sample", "{scorer}"), "not a language model; name another"),
    "sample of a stage that is not there": (("sample", "{trained}", "--stage=ppo"), "no model of 'ppo'; its models"),
    "sample of a model's stage": (("sample", "{model}", "--stage=ppo"), "it is no run directory with models"),
    "sample 0 times": (("sample", "{trained}", "--n=0"), "--n: 0; allowed: at least 1"),
    "a number that is none": (("sample", "{trained}", "--n=many"), "--n"),
    "a negative temperature": (("sample", "{trained}", "--temperature=-1"), "--temperature: -1.0; allowed: at least 0"),
    "a temperature of nan": (("sample", "{trained}", "--temperature=nan"), "--temperature: nan"),
    "a top_p of 2": (("sample", "{trained}", "--top-p=2"), "--top-p: 2.0; allowed: above 0, at most 1"),
    "more tokens than the context": (("sample", "{trained}", "--max-new-tokens=99"), "64"),
    "a prompt beyond the context": (("sample", "{trained}", f"--prompt={'no ' * 99}"), "fewer than 64, the model's"),
    "a prompt that is no text": (("sample", "{trained}", "--prompt=caf\udce9"), "--prompt: 'caf\\udce9' is not UTF-8"),
    "an unknown flag": (("sample", "{trained}", "--nn=3"), "unknown argument --nn=3"),
    "eval of nothing asked": (("eval", "{trained}"), "one of the arguments --text --completions is required"),
    "eval of two things": (("eval", "{trained}", "--text=a", "--completions=b"), "not allowed with argument --text"),
    "eval of nothing": (("eval", "nowhere", "--text={text}"), "nowhere: no such folder"),
    "eval of a stage that is not there": (("eval", "{trained}", "--text=x", "--stage=ppo"), "models are of pretrain"),
    "eval of a reward model": (("eval", "{scorer}", "--text={text}"), "not a language model; name another"),
    "eval of no text": (("eval", "{trained}", "--text={tmp}/no.txt"), "no.txt: no such file; give a text file"),
    "eval of an empty text": (("eval", "{trained}", "--text={tmp}/none.txt"), "none.txt: is empty"),
    "eval of a text that is none": (("eval", "{trained}", "--text={tmp}/latin.txt"), "latin.txt:2: not UTF-8 (byte 0x"),
    "eval of an unread n-gram": (("eval", "{trained}", "--completions=x", "--train-text=y"), "--train-text: is for"),
    "eval in windows beyond the context": (("eval", "{trained}", "--text={text}", "--context=65"), "2 to 64"),
    "eval in steps beyond a window": (("eval", "{trained}", "--text={text}", "--stride=65"), "--stride: 65; allowed"),
    "eval by an n-gram of 0": (("eval", "{trained}", "--text={text}", "--order=0"), "--order: 0; allowed: at least 1"),
    "eval into no folder": (("eval", "{trained}", "--text={text}", "--output={tmp}/a/b"), "--output: "),
    "eval of a broken completion": (
        ("eval", "{trained}", "--completions={tmp}/broken.jsonl"), "broken.jsonl:2: field 'responses'",
    ),
    "eval of a completion beyond the context": (
        ("eval", "{trained}", "--completions={tmp}/long.jsonl"), "long.jsonl:1: field 'responses[0]': prompt and",
    ),
    "scores by a language model": (("score", "{model}", "{text}"), "gives no scores"),
    "scores by a run without a reward": (("score", "{trained}", "{text}"), "no scorer or classifier in it yet"),
    "scores of no text": (("score", "{scorer}", "{tmp}/none.txt"), "none.txt: is empty"),
    "scores of a prompt alone": (("score", "{scorer}", "{tmp}/broken.jsonl"), "broken.jsonl:2: field 'responses'"),
    "scores over what they are of": (("score", "{scorer}", "{text}", "--output={text}"), "is a file to read as well"),
    "answers to prompts into nothing": (("sample", "{trained}", "--prompts={text}"), "--prompts: needs --output"),
    "answers to no prompts": (
        ("sample", "{trained}", "--prompts={tmp}/latin.txt", "--output={new}"), "latin.txt:2: not UTF-8",
    ),
    "import of nothing": (("import", "nowhere", "{new}"), "nowhere: no such folder"),
    "import of one folder alone": (("import", "{model}"), "target"),
    "import of a pickle": (("import", "{tmp}/pickle", "{new}"), "a pickled pytorch_model.bin is never read"),
    "import of half a file": (("import", "{tmp}/half", "{new}"), "half/model.safetensors: not a whole safetensors"),
    "import of another head": (("import", "{model}", "{new}", "--task=sequence"), "tensor 'score.weight' is missing"),
    "import of an unknown head": (("import", "{model}", "{new}", "--task=chat"), "invalid choice: 'chat'"),
    "import into other files": (("import", "{model}", "{tmp}"), "holds other files"),
    "import into a file": (("import", "{model}", "{text}"), "text.txt: is a file; give the folder"),
    "import into its source": (("import", "{model}", "{model}/"), "is the folder to read as well; name another"),
    "export of a stage that is not there": (("export", "{trained}", "{new}", "--stage=sft"), "no model of 'sft'; its"),
    "export of a model's stage": (("export", "{model}", "{new}", "--stage=sft"), "it is no run directory with models"),
    "export below a file": (("export", "{trained}", "{text}/new"), "txt is a file, in which no folder can be made"),
    "export far below a file": (("export", "{trained}", "{text}/a/new"), "text.txt/a/new: {text} is a file, in which"),
    "import below a file": (("import", "{model}", "{text}/new"), "text.txt/new: {text} is a file, in which no folder"),
    "export into an unknown type": (("export", "{model}", "{new}", "--dtype=int8"), "invalid choice: 'int8'"),
    "export in files of no size": (
        ("export", "{model}", "{new}", "--max-shard-size=5XB"), "--max-shard-size: '5XB'; write a size such as 5GB",
    ),
    "report on nothing": (("report", "nowhere"), "nowhere: no such run directory"),
    "report on an empty folder": (("report", "{tmp}"), "not a run directory"),
    "report on a model": (("report", "{model}"), "not a run directory"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_that_cannot_be_done_is_refused(kind, command, tmp_path, trained, scorer):
    argv, found = COMMANDS[kind]
    (tmp_path / "empty" / "models").mkdir(parents=True)
    before = contents(trained / "models" / "pretrain")
    files = {
        "text.txt": b"the film was warm",
        "none.txt": b"",
        "latin.txt": b"caf\n\xe9",
        "broken.jsonl": b'{"prompt": "a", "responses": ["b"]}\n{"prompt": "a"}\n',
        "long.jsonl": b'{"prompt": "' + b"no " * 99 + b'", "responses": ["b"]}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = {"tmp": tmp_path, "trained": trained, "scorer": scorer, "empty": tmp_path / "empty"}
    places |= {"text": tmp_path / "text.txt", "new": tmp_path / "new", "model": trained / "models" / "pretrain"}
    for name in ("pickle", "half"):
        shutil.copytree(places["model"], tmp_path / name)
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    os.truncate(tmp_path / "half" / "model.safetensors", 5000)
    assert found.format(**places) in command(*(part.format(**places) for part in argv))
    assert not (tmp_path / "new").exists() and contents(places["model"]) == before


JOINING = {
    "only the address": ({"LFJAX_COORDINATOR": "127.0.0.1:1"}, "LFJAX_NUM_PROCESSES: not set"),
    "no id": ({"LFJAX_COORDINATOR": "127.0.0.1:1", "LFJAX_NUM_PROCESSES": "2"}, "LFJAX_PROCESS_ID: not set"),
    "no address": ({"LFJAX_NUM_PROCESSES": "2"}, "LFJAX_NUM_PROCESSES: set, but not LFJAX_COORDINATOR=HOST:PORT"),
    "an id alone": ({"LFJAX_PROCESS_ID": "1"}, "LFJAX_PROCESS_ID: set, but not LFJAX_COORDINATOR"),
    "no port": ({"LFJAX_COORDINATOR": "127.0.0.1"}, "LFJAX_COORDINATOR: '127.0.0.1'; write HOST:PORT"),
    "a port that is none": ({"LFJAX_COORDINATOR": "a:99999"}, "LFJAX_COORDINATOR: 'a:99999'; write HOST:PORT"),
    "a number that is none": ({"LFJAX_COORDINATOR": "a:1", "LFJAX_NUM_PROCESSES": "two"}, "LFJAX_NUM_PROCESSES: 'two'"),
    "no process": ({"LFJAX_COORDINATOR": "a:1", "LFJAX_NUM_PROCESSES": "0"}, "LFJAX_NUM_PROCESSES: '0'"),
    "an id too large": (
        {"LFJAX_COORDINATOR": "a:1", "LFJAX_NUM_PROCESSES": "2", "LFJAX_PROCESS_ID": "2"},
        "LFJAX_PROCESS_ID: '2'; give a whole number from 0 to 1",
    ),
    "a time-out that is none": (
        {"LFJAX_COORDINATOR": "a:1", "LFJAX_NUM_PROCESSES": "2", "LFJAX_PROCESS_ID": "1",
         "LFJAX_COORDINATOR_TIMEOUT": "1m"},
        "LFJAX_COORDINATOR_TIMEOUT: '1m'; give a whole number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", JOINING)
def test_what_tells_processes_of_each_other_is_checked(kind, command, tmp_path, records, monkeypatch):
    variables, found = JOINING[kind]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert found in command(*arguments(tmp_path / "w", records))
    assert not (tmp_path / "w").exists()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def joins(tmp_path, records, port: int, process: int, seconds: int = 2) -> list[str]:
    """The lines of a process, one of two, that nobody joins; it has to end by itself in time, with code 2."""
    given = {"COORDINATOR": f"127.0.0.1:{port}", "NUM_PROCESSES": 2, "PROCESS_ID": process}
    given = {f"LFJAX_{k}": str(v) for k, v in {**given, "COORDINATOR_TIMEOUT": seconds}.items()}
    done = subprocess.run(
        [sys.executable, "-m", "lfjax.cli", *arguments(tmp_path / "w", records)],
        env=os.environ | given, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "w").exists(), done.stderr
    return done.stderr.splitlines()


def test_a_process_that_finds_no_other_ends_in_one_line(tmp_path, records):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    (line,) = joins(tmp_path, records, free, 1)
    assert f"LFJAX_COORDINATOR=127.0.0.1:{free}: after 2 s process 1 has found no process 0 there" in line
    assert "Connection refused" in line and "LFJAX_COORDINATOR_TIMEOUT" in line
    (line,) = joins(tmp_path, records, free, 0)
    assert "after 2 s not all of LFJAX_NUM_PROCESSES=2 processes have come" in line


def test_a_port_that_another_program_has_is_named(tmp_path, records, port):
    (line,) = joins(tmp_path, records, port, 0)
    assert f"process 0 cannot listen on port {port}: Address already in use; choose another" in line


def test_the_run_directory_stands_for_its_last_model(trained, capfd):
    assert cli.main(["sample", str(trained), "--prompt=the film", "--n=2", "--max-new-tokens=3", "--seed=1"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) >= 2 and lines[0].startswith("the film")


def test_a_stage_names_the_model_of_a_run_that_writes(trained, tmp_path, capfd):
    """The last model is of another stage, and no model at all: --stage decides which is read."""
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    (workdir / "models" / "ppo").mkdir()
    for name, add in (
        ("config.json", lambda config: {"stages": [*config["stages"], "ppo"]}),
        ("stages.json", lambda known: {"ppo": known["pretrain"]}),
    ):
        found = json.loads((workdir / name).read_text())
        (workdir / name).write_text(json.dumps(found | add(found)))
    given = ["sample", str(workdir), "--max-new-tokens=3"]
    assert cli.main(given) == 2
    assert "models/ppo/config.json: not found" in capfd.readouterr().err
    assert cli.main([*given, "--stage=pretrain"]) == 0


@pytest.mark.parametrize("place", ["models", "models/pretrain"])
def test_a_runs_model_is_no_link_out_of_it_and_a_model_that_is_named_may_be_one(
    place, command, tmp_path, trained, capfd
):
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "w"))
    (workdir / place).rename(tmp_path / "outside")
    (workdir / place).symlink_to(tmp_path / "outside")
    for asked in (("sample",), ("eval", "--text=x"), ("export", tmp_path / "new")):
        for stage in ((), ("--stage=pretrain",)):
            line = command(asked[0], workdir, *asked[1:], *stage)
            assert line.startswith(f"{workdir}/models") and "a link that leads out of its folder, to " in line
    assert not (tmp_path / "new").exists()
    if place == "models/pretrain":
        assert cli.main(["sample", str(workdir / place), "--max-new-tokens=1"]) == 0


def test_records_on_stdout_have_nothing_among_them_and_may_be_too_many(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "1+1?", "answer": "2 #### 2"}\n' * 5000)
    program = [sys.executable, "-m", "lfjax.cli", "feedback", "convert", "gsm8k", str(source), "/dev/stdout"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("/dev/stdout: 5000 records\n")
    assert all(json.loads(line)["prompt"] for line in done.stdout.splitlines())
    with open(tmp_path / "out", "wb") as out:
        subprocess.run(program, stdout=out, stderr=subprocess.PIPE, check=True)
    assert (tmp_path / "out").read_text() == done.stdout
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_the_encoding_of_the_output_lacks_is_escaped(trained, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["sample", str(trained), "--prompt=caf\u00e9", "--max-new-tokens=1"]) == 0
    assert out.buffer.getvalue().startswith(rb"caf\xe9")


def test_a_reader_that_has_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "lfjax.cli", "doctor"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("a bug"), ValueError("a bug"), OSError("a bug"), KeyError("a bug"), RuntimeError("a bug")],
)
def test_a_bug_of_our_own_is_not_dressed_up_as_bad_input(error, tmp_path, records, monkeypatch):
    def stage(run):
        raise error

    monkeypatch.setattr(stages, "TABLE", with_run("tokenizer", stage))
    with pytest.raises(type(error), match="a bug"):
        train(tmp_path / "w", records)
