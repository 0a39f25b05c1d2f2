"""`lfjax methods`: what every stage is, and its keys with their comments."""

import pathlib

import pytest

from lfjax import cli, methods, stages
from lfjax.config import base_config, flatten, to_plain

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_is_what_the_command_prints(capsys):
    assert cli.main(["methods", "--markdown"]) == 0
    assert (ROOT / "docs" / "methods.md").read_text() == capsys.readouterr().out


def test_every_stage_says_what_it_is(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    for stage in stages.TABLE:
        assert f"{stage.name}: {stage.summary}\n" in out and stage.source in out
        for step in stage.steps.values():
            assert step.path.partition(":")[0].replace(".", "/") + ".py" in out
    assert "learns from  `label` feedback\n" in out
    assert "losses       policy_gradient.clipped_policy_losses, policy_gradient.clipped_value_losses\n" in out


@pytest.mark.parametrize("stage", stages.TABLE, ids=[stage.name for stage in stages.TABLE])
def test_every_key_of_a_stage_is_listed_with_its_default(stage):
    listed = dict(line.partition("  #")[0].split(" = ") for line in methods.keys(stage))
    own = flatten(to_plain(base_config()[stage.name]), f"config.{stage.name}")
    left_out = own.keys() - listed.keys()
    assert not listed.keys() - own.keys()
    assert all(own[key] is None and ("optim." in key or ".sampling." in key) for key in left_out)
    assert all(value == repr(own[key]) for key, value in listed.items())


@pytest.mark.parametrize(
    "stage, line",
    [
        ("ppo", "config.ppo.steps = 40  # updates"),
        ("ppo", "config.ppo.keep = 2  # checkpoints kept"),
        ("reward", "config.reward.step.margin_scale = 0.0  # margin = this x rating gap"),
        ("tokenizer", "config.tokenizer.model_type = 'unigram'  # or \"bpe\""),
        ("evaluate", "config.evaluate.samples = 24  # rows of samples.jsonl a model"),
    ],
)
def test_a_key_stands_with_the_comment_of_its_default(stage, line, capsys):
    assert cli.main(["methods", stage]) == 0
    assert f"\n{line}\n" in capsys.readouterr().out


def test_a_misspelt_stage_is_one_line_with_the_nearest(capsys):
    assert cli.main(["methods", "clasify"]) == 2
    assert capsys.readouterr().err == "error: lfjax methods: no stage 'clasify'; did you mean classify?\n"
