"""Run configs: every leaf can be overridden, what is wrong is said with the right key, the resolved config is plain."""

import ast
import json
import pathlib

import pytest
from ml_collections import ConfigDict

import lfjax
from lfjax import cli, stages
from lfjax import config as configs
from lfjax.config import InputError, apply_override, base_config, difference, flatten, load, to_plain, validate

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def leaves(config: ConfigDict, prefix: str = ""):
    """("section.key", the leaf's type, its value) of every leaf."""
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from leaves(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config.get_type(key), config[key]


def value_at(config, dotted: str):
    for part in dotted.split("."):
        config = config[part]
    return config


LEAVES = list(leaves(base_config()))
# Of each type a text to write on the command line, and the value that it means.
EXAMPLES = {int: ("37", 37), float: ("0.125", 0.125), str: ("a text", "a text"), tuple: ("('a', 3)", ("a", 3))}


@pytest.mark.parametrize("dotted, kind, value", LEAVES, ids=[dotted for dotted, *_ in LEAVES])
def test_every_leaf_can_be_overridden_with_a_value_of_its_own_type(dotted, kind, value):
    text, expected = (str(not value), not value) if kind is bool else EXAMPLES[kind]
    config = base_config()
    apply_override(config, f"--config.{dotted}={text}")
    found = value_at(config, dotted)
    assert type(found) is kind and found == expected
    changed = [line.partition(":")[0] for line in difference(to_plain(base_config()), to_plain(config))]
    assert changed == [f"config.{dotted}"]


def test_every_kind_of_leaf_is_among_those_overridden():
    assert {kind for _, kind, _ in LEAVES} == {int, float, str, bool, tuple}
    assert sum(value is None for *_, value in LEAVES) > 20  # optional ones


@pytest.mark.parametrize("dotted", [dotted for dotted, _, value in LEAVES if value is None])
def test_an_optional_leaf_can_be_emptied_again(dotted):
    config = base_config()
    kind = dict((name, kind) for name, kind, _ in LEAVES)[dotted]
    apply_override(config, f"--config.{dotted}={EXAMPLES[kind][0]}")
    apply_override(config, f"--config.{dotted}=none")
    assert to_plain(config) == to_plain(base_config())


def test_none_is_a_text_like_any_other_where_a_leaf_is_not_optional():
    config = base_config()
    apply_override(config, "--config.model.remat=none")
    assert config.model.remat == "none"
    with pytest.raises(InputError, match=r"config\.seed: 'none' is not int"):
        apply_override(config, "--config.seed=none")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(32, 64)", (32, 64)),
        ("[32, 64]", (32, 64)),
        ("32,64", (32, 64)),
        ("32", (32,)),
        ("(32,)", (32,)),
        ("()", ()),
        ("tokenizer,pretrain", ("tokenizer", "pretrain")),
        ("('tokenizer','pretrain')", ("tokenizer", "pretrain")),
        ("tokenizer", ("tokenizer",)),
    ],
)
def test_a_tuple_is_written_in_python_or_with_commas(text, expected):
    config = base_config()
    dotted = "stages" if "tokenizer" in text else "reward.buckets"
    apply_override(config, f"--config.{dotted}={text}")
    assert value_at(config, dotted) == expected


def test_a_whole_number_will_do_for_a_float_and_keeps_its_type():
    config = base_config()
    apply_override(config, "--config.ppo.kl_coef=1")
    assert type(config.ppo.kl_coef) is float and config.ppo.kl_coef == 1.0


def test_an_equals_sign_belongs_to_the_value():
    config = base_config()
    apply_override(config, "--config.data.path=a=b.jsonl")
    assert config.data.path == "a=b.jsonl"


@pytest.mark.parametrize(
    "item, message",
    [
        ("--config.sede=1", "config.sede: no such key; did you mean config.seed?"),
        ("--config.ppo.kl_coeff=1", "config.ppo.kl_coeff: no such key; did you mean config.ppo.kl_coef?"),
        ("--config.optin.b1=0.5", "config.optin: no such key; did you mean config.optim?"),
        ("--config.ppo.update_step.clip=1", "config.ppo.update_step.clip: no such key; did you mean"),
        ("--config.seed.x=1", "config.seed.x: no such key"),
        ("--config.mesh.zzzzz=1", "config.mesh.zzzzz: no such key; known keys: data, fsdp, rules, tensor"),
        ("--config.ppo=1", "config.ppo: a section; set one of its keys: batch_size, "),
        ("--config.seed", "--config.seed: not an override; write --config.section.key=value"),
        ("--config.seed=1.5", "config.seed: '1.5' is not int; give a value such as 16"),
        ("--config.seed=True", "config.seed: 'True' is not int"),
        ("--config.ppo.kl_coef=high", "config.ppo.kl_coef: 'high' is not float; give a value such as 1e-4"),
        ("--config.ppo.kl_coef=nan", "config.ppo.kl_coef: 'nan' is not float"),
        ("--config.run.compile_cache=1", "config.run.compile_cache: '1' is not bool; give a value such as True"),
        ("--config.reward.buckets={1: 2}", "config.reward.buckets: '{1: 2}' is not tuple; give a value such as (1, 2)"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_right(item, message):
    config = base_config()
    with pytest.raises(InputError) as caught:
        apply_override(config, item)
    assert message in str(caught.value)
    assert to_plain(config) == to_plain(base_config())


def test_a_loaded_config_is_locked(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from lfjax.config import base_config as get_config\n")
    with pytest.raises(AttributeError, match="locked"):
        load(file).ppo.kl_coeff = 1.0


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.ppo.kl_coeff = 0.2", "config.ppo.kl_coeff: no such key; did you mean config.ppo.kl_coef?"),
        ("config.pretrain.update(step=3)", "get_config() fails"),
        ("config.steps.sfft = 'a:b'", "config.steps.sfft: no such key; did you mean config.steps.sft?"),
        ("config.ppo.steps = 'many'", "(line 4)"),
        ("print(config.ppo.kl_coeff)", 'Did you mean "kl_coef"'),
        ("del config.ppo.kl_coef", "config.ppo.kl_coef: missing; start from lfjax.config.base_config()"),
        ("config.seed = undefined", "NameError: name 'undefined' is not defined (line 4)"),
        ("raise OSError('two\\nlines')", "OSError: two lines (line 4)"),
    ],
)
def test_a_config_file_that_sets_what_does_not_exist_is_refused(tmp_path, line, message):
    file = tmp_path / "c.py"
    file.write_text(
        f"from lfjax.config import base_config\ndef get_config():\n    config = base_config()\n    {line}\n"
    )
    file.write_text(file.read_text() + "    return config\n")
    with pytest.raises(InputError) as caught:
        load(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_may_add_and_delete_the_keywords_of_its_own_step(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from lfjax.config import base_config\ndef get_config():\n    config = base_config()\n"
        "    config.ppo.update_step.dual_clip = 3.0\n    del config.ppo.update_step.value_clip\n    return config\n"
    )
    config = load(file, ["--config.ppo.update_step.dual_clip=2.5"])
    validate(config, stages.declared())
    assert config.ppo.update_step.dual_clip == 2.5 and "value_clip" not in config.ppo.update_step


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_every_config_of_the_project_loads_is_valid_and_says_what_it_is(file):
    docstring = file.read_text().split('"""')[1]
    command = next(line.split() for line in docstring.splitlines() if line.strip().startswith("lfjax train"))
    assert command[2] == f"--config=configs/{file.name}" and command[3].startswith("--workdir=runs/")
    validate(load(file, command[4:]), stages.declared())


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_a_config_that_comes_with_lfjax_is_found_by_its_name_and_needs_nothing_else(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file.stem).mkdir()  # as a run directory of that name
    assert configs.find(file.stem).samefile(file)
    assert to_plain(load(file.stem)) == to_plain(load(file))
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules <= {"lfjax.config", "pathlib"} and not any(isinstance(node, ast.Import) for node in nodes)


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("from lfjax.config import base_config as get_config\n")
    assert to_plain(load("tiny")) == to_plain(base_config()) != to_plain(load("quickstart"))


@pytest.mark.parametrize(
    "given, hint",
    [
        ("quikstart", "did you mean quickstart?"),
        ("hh_pp", "did you mean hh_ppo"),
        ("configs/tiny.py", "did you mean tiny?"),
        ("zzzz", "lfjax configs lists the names"),
    ],
)
def test_what_is_neither_a_file_nor_a_name_is_one_line_with_the_nearest_names(given, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load(given)
    message = str(caught.value)
    assert message.startswith(f"--config={given}: no such file; give a Python file with a get_config() function")
    assert hint in message and "\n" not in message


def test_the_command_lists_each_config_with_what_it_is_and_runs_none(capsys, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise SystemExit")
    (tmp_path / "said.py").write_text('"""What it is.\n\nMore."""\nraise SystemExit\n')
    (tmp_path / "wrong.py").write_text("def (")
    monkeypatch.setattr(configs, "shipped", lambda: {path.stem: path for path in sorted(tmp_path.glob("*.py"))})
    assert cli.main(["configs"]) == 0
    broken, said, wrong, folder = capsys.readouterr().out.splitlines()
    assert (broken.split(), said) == (["broken"], "said    What it is.")
    assert wrong.startswith("wrong   cannot be read: invalid syntax") and folder.endswith(str(tmp_path))
    monkeypatch.undo()
    assert all(configs.summary(file).endswith(".") for file in CONFIGS)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"lfjax {lfjax.__version__}\n"


def test_the_resolved_config_survives_json_and_nothing_in_it_is_hidden():
    config = base_config()
    apply_override(config, "--config.data.path=a.jsonl")
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain
    assert {f"config.{dotted}" for dotted, *_ in LEAVES} == flatten(plain).keys()
    assert plain["data"]["path"] == "a.jsonl" and plain["stages"] == list(base_config().stages)


def test_the_difference_names_each_leaf_that_changed_or_is_absent():
    old, new = to_plain(base_config()), to_plain(base_config())
    new["seed"], new["ppo"]["kl_coef"] = 3, 0.5
    del new["run"]["compile_cache"]
    assert difference(old, new) == [
        "config.ppo.kl_coef: 0.1 -> 0.5",
        'config.run.compile_cache: true -> "(absent)"',
        "config.seed: 0 -> 3",
    ]
    assert difference(old, old) == []


def test_a_stage_takes_from_the_common_optimiser_what_it_does_not_set():
    config = base_config()
    config.optim.update(learning_rate=3.0, b1=0.5)
    config.ppo.optim.b1 = 0.0  # a value, though false
    found = configs.optim_section(config, "ppo")
    assert (found["learning_rate"], found["b1"]) == (3.0, 0.0)
    assert configs.optim_section(config, "ppo", "value_optim")["b1"] == 0.5
