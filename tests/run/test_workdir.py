"""What a run remembers of its inputs."""

import pathlib

import pytest
import smallest

from lfjax import stages
from lfjax.config import apply_override
from lfjax.run import directory, run

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A model's files, as far as names go."""
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    return tmp_path


KEYS = ("model.init_from", "tokenizer.path", "sft.init_from", "reward.init_from", "ppo.reward", "ppo.value_init")


def found(folder) -> dict[str, str]:
    config = smallest.get_config()
    for key in KEYS:
        section, name = key.split(".")
        config[section][name] = str(folder)
    return directory.digests(config, stages.declared(), {})


def test_every_folder_that_a_config_names_is_remembered(folder):
    assert set(found(folder)) == {f"config.{key}" for key in KEYS}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_byte_size_or_name_is_another_model(folder, name):
    before, content = found(folder), (folder / name).read_bytes()
    for changed in (content[:50] + b"x" + content[51:], content + b"x", content[:-1]):
        (folder / name).write_bytes(changed)
        assert found(folder)["config.sft.init_from"] != before["config.sft.init_from"]
    (folder / name).write_bytes(content)
    (folder / "README.md").write_text("no part of the model")
    assert found(folder) == before
    (folder / name).rename(folder / "merges.txt")
    assert found(folder)["config.sft.init_from"] != before["config.sft.init_from"]


def test_a_tokenizer_is_no_other_for_other_weights(folder):
    before = found(folder)
    (folder / "model.safetensors").write_bytes(b"others")
    assert found(folder)["config.tokenizer.path"] == before["config.tokenizer.path"]


def test_a_tokenizer_that_is_named_by_its_file_is_remembered_with_what_stands_beside_it(folder):
    config = smallest.get_config()
    config.tokenizer.path = str(folder / "tokenizer.json")
    before = directory.digests(config, stages.declared(), {})
    (folder / "tokenizer_config.json").write_text("{}")
    assert directory.digests(config, stages.declared(), {}) != before


def test_of_a_large_file_size_begin_and_end_count(folder, monkeypatch):
    monkeypatch.setattr(directory, "WHOLE_BYTES", 3 * 2**20)
    file = folder / "model.safetensors"
    content = bytearray(4 * 2**20)
    seen = set()
    for place in (None, 0, 2**20 - 1, 3 * 2**20, 4 * 2**20 - 1):
        changed = content.copy()
        if place is not None:
            changed[place] = 1
        file.write_bytes(changed)
        seen.add(found(folder)["config.sft.init_from"])
    assert len(seen) == 5
    content[2 * 2**20] = 1  # in the middle, which is not read
    file.write_bytes(content)
    assert found(folder)["config.sft.init_from"] in seen


def test_forks_are_looked_for_once_on_a_resume(straight, train, monkeypatch):
    calls = []
    whole = run.forks_of
    monkeypatch.setattr(run, "forks_of", lambda *given: calls.append(1) or whole(*given))
    assert train(straight) == 0
    assert len(calls) == 1


def changed(before, *overrides: str, drop: tuple[str, ...] = ()) -> list[str]:
    """What differs from the smallest config, without the leaves `drop`, once it is overridden."""
    config = smallest.get_config()
    now = directory.covered(config, stages.declared())
    for key in drop:
        section, _, leaf = key.partition(".")
        del now[section][leaf]
    for override in overrides:
        apply_override(config, f"--config.{override}")
    return directory.changes(before or now, directory.covered(config, stages.declared()), config, stages.declared())


def test_a_run_is_its_shared_sections_and_those_of_its_stages():
    assert changed(None, "ppo.kl_coef=0.5", "seed=1") == ["config.ppo.kl_coef: 0.1 -> 0.5", "config.seed: 0 -> 1"]
    assert changed(None, "classify.steps=7", "steps.classify=a:b") == []  # not in this run
    assert changed(None, "steps.sft=a:b") == ['config.steps.sft: "lfjax.steps.sft:sft_step" -> "a:b"']


def test_how_a_run_is_computed_and_watched_may_change():
    assert changed(None, "run.max_skipped=3", "run.matmul_precision=default", "run.breakdown_every=0") == []


def test_a_key_that_was_not_there_is_no_difference_where_it_has_its_default():
    assert changed(None, drop=("sampling.min_p", "ppo.kl_coef")) == []
    assert changed(None, "ppo.kl_coef=0.5", drop=("ppo.kl_coef",)) == ['config.ppo.kl_coef: "(absent)" -> 0.5']


def test_a_key_that_has_moved_is_compared_under_its_new_name():
    config = smallest.get_config()
    before = directory.covered(config, stages.declared())
    before["ppo"] |= {"stop": [], "prompt_min": before["sampling"]["prompt_min"]}
    before["ppo"]["rollout_step"] = {"max_new_tokens": 8, "temperature": 1.0}
    del before["sampling"], before["outside"]
    assert changed(before) == []
    assert changed(before, "sampling.max_new_tokens=9") == ["config.sampling.max_new_tokens: 8 -> 9"]


def test_the_keywords_of_a_step_of_another_stage_count_where_the_run_takes_the_step():
    config = smallest.get_config().unlock()
    config.stages = ("tokenizer", "pretrain", "sft", "evaluate")
    config.ppo.rollout_step.greedy = False  # of a fork
    before = directory.covered(config, stages.declared())
    assert before["ppo"] == {"rollout_step": {"greedy": False}}
    config.ppo.rollout_step.greedy, config.ppo.kl_coef = True, 0.5
    now = directory.covered(config, stages.declared())
    assert directory.changes(before, now, config, stages.declared()) == [
        "config.ppo.rollout_step.greedy: false -> true"
    ]
    whole = {**before, "ppo": {**before["ppo"], "kl_coef": 0.1}}  # an older directory holds every section
    assert len(directory.changes(whole, now, config, stages.declared())) == 1
