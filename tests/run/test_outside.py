"""A method that is not lfjax's own, written as the README's page says: the page's files, in a folder of their own."""

import json
import os
import pathlib
import re
import signal

import pytest
import smallest

from lfjax import cli, config, stages
from lfjax.config import InputError
from lfjax.run import training

pytestmark = pytest.mark.xdist_group("stages")
ROOT = pathlib.Path(__file__).parents[2]


def page() -> dict[str, str]:
    """File name -> text, as the page's `cat > FILE <<'...'` blocks write them."""
    section = re.search(
        r"^## A method of your own$(.*?)(?:^## |\Z)", (ROOT / "docs" / "forking.md").read_text(), re.S | re.M
    )
    assert section
    return dict(re.findall(r"^cat > (\S+) <<'\w+'\n(.*?)^\w+$", section.group(1), re.S | re.M))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The page's files, and records with preferences."""
    place = tmp_path_factory.mktemp("mine")
    for name, text in page().items():
        (place / name).write_text(text)
    rows = smallest.records()
    for number, row in enumerate(rows):
        row["responses"].append(f"nothing at all on day {number}")
        row["feedback"].append({"kind": "preference", "chosen": 0, "rejected": 1})
    smallest.write_records(place / "rated.jsonl", rows)
    return place


@pytest.fixture(scope="module")
def arguments(folder, straight):
    """The command on a workdir, in the smallest sizes."""
    config = smallest.get_config()
    sizes = [f"--config.model.{k}={config.model[k]}" for k in ("width", "layers", "heads", "kv_heads", "mlp_width")]
    given = {
        "data.path": folder / "rated.jsonl", "data.validation_fraction": 0.2, "data.test_fraction": 0.2,
        "tokenizer.path": straight / "models" / "tokenizer", "stages": "pretrain,unlikelihood",
        "pretrain.steps": 4, "pretrain.batch_size": 8, "unlikelihood.steps": 6, "unlikelihood.batch_size": 8,
        "unlikelihood.log_every": 2, "unlikelihood.save_every": 2, "run.compile_cache": False,
    }  # fmt: skip
    overrides = [*sizes, *(f"--config.{key}={value}" for key, value in given.items())]
    return lambda workdir, *more: ["train", f"--config={folder / 'mine.py'}", f"--workdir={workdir}", *overrides, *more]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    assert cli.main(arguments(workdir, "--config.mesh.data=8")) == 0
    return workdir


def test_it_learns_and_stands_wherever_a_stage_of_ours_does(trained, folder):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["unlikelihood/perplexity"] > summary["unlikelihood/perplexity_before"]  # of rejected answers
    assert (trained / "models" / "unlikelihood" / "model.safetensors").is_file()
    assert any((trained / "tensorboard" / "unlikelihood").iterdir())
    assert json.loads((trained / "config.json").read_text())["outside"] == ["unlikelihood:UNLIKELIHOOD"]
    assert (trained / "steps" / "unlikelihood.py").read_text() == (folder / "unlikelihood.py").read_text()
    text = (trained / "report.html").read_text()
    assert "Curves: unlikelihood" in text and "nats a rejected token" in text
    assert "unlikelihood training on rejected answers" in text


def test_its_keys_are_listed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["methods", "unlikelihood:UNLIKELIHOOD"]) == 0
    out = capsys.readouterr().out
    assert "learns from  preference\n" in out and "config.unlikelihood.step.weight = 1.0\n" in out
    assert "config.unlikelihood.init_from = 'auto'  # stage or model folder\n" in out
    assert cli.main(["methods", "unlikelihood:UNLIKELYHOOD"]) == 2
    assert "lfjax methods: " in capsys.readouterr().err


def test_what_it_made_is_the_runs_last_language_model(trained, capsys):
    assert cli.main(["sample", str(trained), "--max-new-tokens=2"]) == 0
    assert cli._model_folder(trained).name == "unlikelihood"


def test_after_a_stop_it_ends_as_if_nothing_had_been(trained, arguments, tmp_path, monkeypatch):
    whole = training.train

    def stopping(run, stage, state, step, **options):
        def one(state, index):
            if (stage, index) == ("unlikelihood", 2):
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, index)

        return whole(run, stage, state, one, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", stopping)
        assert cli.main(arguments(tmp_path / "w", "--config.mesh.data=8")) == 130
    assert cli.main(arguments(tmp_path / "w", "--config.mesh.data=8")) == 0
    for name in ("metrics.jsonl", "models/unlikelihood/model.safetensors"):
        assert (tmp_path / "w" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize(
    "override, said",
    [
        ("unlikelihood.epoch=1", "config.unlikelihood.epoch: no such key; did you mean config.unlikelihood.epochs?"),
        ("unlikelihood.step.wieght=1", "no such key; did you mean config.unlikelihood.step.weight?"),
        ("unlikelihood.step.weight=-1.0", "config.unlikelihood.step.weight: -1.0; allowed: at least 0"),
        ("stages=pretrain,unlikelyhood", "unknown stage 'unlikelyhood'; did you mean 'unlikelihood'?"),
        ("unlikelihood.batch_size=0", "config.unlikelihood.batch_size: 0; allowed: at least 1"),
        ("unlikelihood.init_from=nowhere", "config.unlikelihood.init_from: no such stage or folder"),
    ],
)
def test_what_is_wrong_is_said_as_of_ours(override, said, arguments, tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "w", f"--config.{override}")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_records_that_teach_it_nothing_are_refused(arguments, records, tmp_path, capsys):
    assert cli.main(arguments(tmp_path / "w", f"--config.data.path={records}")) == 2
    assert "the train split holds no preference to learn from" in capsys.readouterr().err


TAKEN = """
import dataclasses
from unlikelihood import UNLIKELIHOOD

SFT = dataclasses.replace(UNLIKELIHOOD, name="sft")
DATA = dataclasses.replace(UNLIKELIHOOD, name="data")
ODD = dataclasses.replace(UNLIKELIHOOD, name="a/b")
AFTER = dataclasses.replace(UNLIKELIHOOD, name="after")
UPDATE = dataclasses.replace(UNLIKELIHOOD, name="update")
PLAIN = dataclasses.replace(UNLIKELIHOOD, name="plain", section=dict)
FAILS = dataclasses.replace(UNLIKELIHOOD, name="fails", section=lambda: 1 / 0)
STEP = dataclasses.replace(UNLIKELIHOOD, name="step", steps={"mine": "mine:step"})
NONE = 3
"""


@pytest.mark.parametrize(
    "named, said",
    [
        ("others:SFT", "the name 'sft' is taken"),
        ("others:DATA", "the name 'data' is taken"),
        ("others:ODD", "the name 'a/b' is none"),
        ("others:AFTER", "the name 'after' is taken"),
        ("others:UPDATE", "the name 'update' is taken"),  # a config's own method
        ("others:PLAIN", "its section gives dict"),
        ("others:FAILS", "its section fails: ZeroDivisionError"),
        ("others:STEP", "its step 'mine' is 'mine:step'"),
        ("others:NONE", "has no Stage 'NONE'"),
        ("sys:exit", "sys has no Stage 'exit'"),
        ("unlikelihood:UNLIKELYHOOD", "did you mean 'UNLIKELIHOOD'?"),
        ("nowhere_at_all:STAGE", "no module 'nowhere_at_all'"),
        ("unlikelihood", 'write "module:Stage"'),
    ],
)
def test_a_name_that_is_taken_or_leads_nowhere_is_refused(named, said, folder):
    (folder / "others.py").write_text(TAKEN)
    with config.on_path((folder,)), pytest.raises(InputError) as caught:
        stages.declared((named,))
    assert said in str(caught.value)


PLAIN = """
from lfjax.config import base_config

def get_config():
    config = base_config()
    config.data.update(source="jsonl", path="preferences.jsonl")
    config.tokenizer.update(model_type="bpe", vocab_size=600)
"""


def loaded(folder, lines: str, *overrides: str):
    (folder / "plain.py").write_text(f"{PLAIN}{lines}    return config\n")
    return config.to_plain(config.load(folder / "plain.py", overrides))


def test_a_chain_that_names_it_makes_the_config_that_base_config_does(folder):
    named = "'tokenizer', 'pretrain', 'unlikelihood:UNLIKELIHOOD'"
    # before the chain that their section comes from
    given = ("--config.unlikelihood.epochs=10.0", "--config.unlikelihood.optim.learning_rate=1e-3")
    whole = config.to_plain(config.load(folder / "mine.py"))
    assert loaded(folder, f"    config.stages = ({named})\n", *given) == whole
    assert loaded(folder, "", *given, f"--config.stages=({named})") == whole
    both = config.load(folder / "mine.py", [f"--config.stages=({named})", "--config.unlikelihood.step.weight=2"])
    assert both.stages == ("tokenizer", "pretrain", "unlikelihood") and both.unlikelihood.step.weight == 2.0
    swapped = "    config.steps.sft = 'mine:sft'\n"
    assert loaded(folder, swapped, f"--config.stages=({named})")["steps"]["sft"] == "mine:sft"


@pytest.mark.parametrize(
    "chain, said",
    [
        ("pretrain,others:SFT", "config.stages: others:SFT: the name 'sft' is taken"),
        ("pretrain,unlikelihood:UNLIKELYHOOD", "config.stages: "),
        ("pretrain,nowhere_at_all:STAGE", "config.stages: no module 'nowhere_at_all'"),
    ],
)
def test_a_chain_that_names_what_is_none_is_refused(chain, said, folder):
    (folder / "others.py").write_text(TAKEN)
    with pytest.raises(InputError, match=re.escape(said)):
        loaded(folder, "", f"--config.stages={chain}")
