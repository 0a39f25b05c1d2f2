"""Files in folders of other people: what a link may lead to."""

import json
import os
import shutil

import pytest

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.files import inside
from lfjax.interop import hf
from lfjax.interop.tensors import TensorFolder


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    """A model folder with a tokenizer and every file that may stand beside it."""
    folder = tmp_path_factory.mktemp("models") / "m"
    shutil.copytree(shared / "data" / "stories260K_hf", folder, copy_function=shutil.copyfile)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def test_a_link_out_of_a_model_folder_is_refused_whatever_file_it_is(model, tmp_path):
    whole = hf.load(model)
    assert whole.tokenizer is not None
    for name in sorted(os.listdir(model)):
        folder = shutil.copytree(model, tmp_path / name / "m")
        (folder / name).rename(tmp_path / name / "secret")
        (folder / name).symlink_to("../secret")
        if name == "LICENSE":  # nobody reads it
            hf.load(folder)
            continue
        with pytest.raises(InputError, match=f"m/{name}: a link that leads out of its folder, to .*/{name}/secret;"):
            hf.load(folder)


def test_the_second_file_of_a_pair_and_what_an_index_names_are_no_links_out(tmp_path):
    (tmp_path / "secret").write_text("#version: 0.2\nx y\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    (tmp_path / "m" / "merges.txt").symlink_to(tmp_path / "secret")
    for named in (tmp_path / "m", tmp_path / "m" / "vocab.json"):
        with pytest.raises(InputError, match=r"merges\.txt: a link that leads out of its folder"):
            tokenizers.load(named)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    (tmp_path / "m" / "a.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"a\.safetensors: a link that leads out of its folder"):
        TensorFolder(tmp_path / "m")


def test_the_cache_of_hugging_face_and_links_that_the_user_names_are_read(model, tmp_path):
    blobs, snapshot = tmp_path / "models--o--m" / "blobs", tmp_path / "models--o--m" / "snapshots" / "r"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    hf.load(snapshot)
    (tmp_path / "named").symlink_to(snapshot)
    hf.load(tmp_path / "named")
    (tmp_path / "own.model").symlink_to(model / "tokenizer.model")
    tokenizers.load(tmp_path / "own.model")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "x").symlink_to(blobs / "config.json")
    assert inside(snapshot / "sub", "x").is_file()
    (blobs / "deep").mkdir()
    for name, target in (("deep", blobs / "deep" / "x"), ("beside", tmp_path / "models--o--m" / "refs")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(InputError, match=f"r/{name}: a link that leads out of its folder, to {target};"):
            inside(snapshot, name)
    (blobs / "out").symlink_to(tmp_path / "elsewhere")
    (snapshot / "out").symlink_to("../../blobs/out")
    with pytest.raises(InputError, match="elsewhere"):
        inside(snapshot, "out")
