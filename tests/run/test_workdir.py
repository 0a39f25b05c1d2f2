"""What a run remembers of its inputs."""

import pathlib

import pytest
import smallest

from lfjax import stages
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
