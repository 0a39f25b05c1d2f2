"""A method is known where it is declared, and nowhere else."""

import ast
import pathlib
import re

import pytest
from test_layers import imported

import lfjax
from lfjax import stages
from lfjax.config import base_config, load, validate

ROOT = pathlib.Path(lfjax.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("stages", "configs"))
NAMES = tuple(stage.name for stage in stages.TABLE)
# Words that are also names of stages: where, and what else they mean there.
OTHER_SENSES = {
    "tokenizer": {  # the shared section of the config, what a stage may make, files of others
        "config.py", "interop/hf.py", "report/findings.py", "run/checks.py", "run/directory.py", "run/run.py",
        "run/stage.py", "run/starts.py", "tokenizers/files.py", "tokenizers/sentencepiece.py",
    },
    "evaluate": {"report/html.py", "run/language.py", "run/training.py"},  # a part of a stage's time; a step
    "preference": {"feedback/conversion.py", "feedback/table.py", "feedback/trl.py", "records.py"},  # feedback
    "reward": {"run/values.py"},  # a value network that starts as the reward model
}  # fmt: skip


def strings(tree: ast.AST):
    """The string constants that are no docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def config_reads(tree: ast.AST):
    """The x of every `config.x` and `something.config.x`, also where a text says it."""
    for text in strings(tree):
        yield from re.findall(r"\bconfig\.(\w+)", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if of == "config":
                yield node.attr


def stages_in(path: pathlib.Path) -> set[str]:
    """The stages that a file knows by name."""
    tree = ast.parse(path.read_text())
    metrics = path.relative_to(ROOT).parts[0] == "steps"
    said = [text for text in strings(tree) if not (metrics and "/" in text)]
    named = {name for name in NAMES for text in said if text == name or text.startswith((f"{name}.", f"{name}/"))}
    files = {
        name
        for name in NAMES
        for module in imported(ast.walk(tree))
        if f"{module}.".startswith(f"lfjax.stages.{name}.")
    }
    return named | files | {name for name in config_reads(tree) if name in NAMES}


def test_no_file_but_its_own_knows_a_stage():
    """Outside stages/ and configs/ no text is a stage's name or begins with it, and no section of one is read."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for name in stages_in(path):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert found == OTHER_SENSES


@pytest.mark.parametrize(
    "line, name",
    [
        ('x = "ppo"', "ppo"), ('x = f"{a}" + "sft.step"', "sft"), ('y["reward/loss"]', "reward"),
        ("x = run.config.classify.seq_len", "classify"), ("config.pretrain", "pretrain"),
        ('f"set config.sft.{x}"', "sft"), ("from lfjax.stages import ppo", "ppo"), ("import lfjax.stages.sft", "sft"),
    ],
)  # fmt: skip
def test_the_rule_bites(line, name, monkeypatch, tmp_path):
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    (tmp_path / "x.py").write_text(f'"""ppo"""\n{line}\n')
    assert stages_in(tmp_path / "x.py") == {name}


def test_every_section_of_a_stage_says_what_its_steps_are_given():
    """The keywords of a step's section are the step's own, and those that the stage gives it are not in it."""
    config = base_config()
    for stage in stages.TABLE:
        for name, step in stage.steps.items():
            assert config.steps[name] == step.path
            if step.section:
                section, _, part = step.section.partition(".")
                assert section in NAMES and not set(config[section][part]) & {*step.given}


def test_without_a_stage_in_the_table_everything_else_works(monkeypatch):
    """A method is one line there."""
    left = tuple(stage for stage in stages.TABLE if stage.name != "classify")
    monkeypatch.setattr(stages, "TABLE", left)
    config = base_config()
    assert "classify" not in config and "classify" not in config.steps
    for path in (ROOT.parent / "configs").glob("*.py"):
        validate(load(path, ["--config.data.path=x"] * (load(path).data.source != "vader")), stages.declared())


@pytest.mark.parametrize(
    "chain, stage, start",
    [
        (("tokenizer", "pretrain", "sft", "reward", "ppo", "classify"), "classify", "ppo"),
        (("tokenizer", "pretrain", "sft", "reward", "ppo"), "ppo", "sft"),
        (("tokenizer", "pretrain", "reward", "ppo"), "reward", "pretrain"),
        (("tokenizer", "pretrain", "ppo", "sft"), "sft", "ppo"),
        (("tokenizer", "sft"), "sft", "pretrain"),  # which model.init_from stands for
    ],
)
def test_a_stage_starts_from_the_last_language_model_before_it(chain, stage, start):
    config, declared = base_config(), stages.declared()
    config.stages = chain
    assert declared[stage].start(config, declared) == (f"{stage}.init_from", start)
    config[stage].init_from = "a/folder"
    assert declared[stage].start(config, declared)[1] == "a/folder"


def test_files_of_stages_and_of_what_they_share_stay_short():
    for folder, most in (("run", 350), ("stages", 350)):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= most, path
    for path in [path for folder in ("run", "stages", "steps") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno + 1 <= 60, f"{path.name}: {node.name}"
