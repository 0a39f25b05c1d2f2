"""A tokenizer whose padding token is new: the model has no row for it, and needs none."""

import json

import jax
import numpy as np
import pytest
import smallest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from lfjax import cli, tokenizers
from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models import presets
from lfjax.models.transformer import Transformer

pytestmark = pytest.mark.xdist_group("stages")
WORDS = sorted({word for row in smallest.records() for word in row["responses"][0].split()})
ROWS = len(WORDS) + 1  # with what ends a text


@pytest.fixture(params=["none named", "one added"])
def folder(request, tmp_path):
    """A language model of so many rows as its tokenizer has words; all are in use."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "</s>"])}, unk_token=WORDS[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    made.save(str(tmp_path / "words" / "tokenizer.json"))
    settings = {"eos_token": "</s>"} | ({"pad_token": "[PAD]"} if request.param == "one added" else {})
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = language_model(ROWS)
    hf.save(tmp_path / "model", hf.loaded_from(model, tiny.init(model), tokenizers.load(tmp_path / "words")))
    return tmp_path / "model"


def language_model(rows):
    return Transformer(presets.llama(vocab_size=rows, width=16, layers=1, heads=2, mlp_width=32, context=64))


def test_a_model_without_a_row_for_it_is_loaded_tuned_exported_and_loaded_again(folder, train, tmp_path):
    options = ("--config.stages=sft", f"--config.tokenizer.path={folder}", f"--config.sft.init_from={folder}")
    assert train(tmp_path / "w", *options) == 0
    assert cli.main(["export", str(tmp_path / "w"), str(tmp_path / "out")]) == 0
    before, after = hf.load(folder), hf.load(tmp_path / "out")
    for loaded in (before, after):
        assert loaded.tokenizer.pad_id == ROWS == loaded.model.config.vocab_size
        assert loaded.params["embed"]["tokens"].shape == (ROWS, 16)
        assert loaded.config["pad_token_id"] is None  # transformers would refuse one beyond the rows
    assert "pad_token_id" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before.params, after.params)
    assert all(0.0 < x < 1.0 for x in jax.tree.leaves(moved))


def test_it_is_masked_like_any_other(folder):
    loaded = hf.load(folder)
    ids = np.asarray([loaded.tokenizer.encode("the film was happy")], np.int32)
    apply = jax.jit(lambda *given: loaded.model.apply({"params": loaded.params}, *given))
    padded = np.pad(ids, ((0, 0), (2, 3)), constant_values=loaded.tokenizer.pad_id)
    mask = np.pad(np.ones_like(ids, bool), ((0, 0), (2, 3)))
    np.testing.assert_allclose(apply(padded, mask)[mask], apply(ids)[0], rtol=1e-5, atol=1e-5)


def test_a_row_missing_for_anything_else_is_refused(folder):
    tokenizer = hf.load(folder).tokenizer
    with pytest.raises(InputError, match=f"found {ROWS + 1} pieces; the model's vocab_size is {ROWS - 1}"):
        hf.loaded_from(language_model(ROWS - 1), {}, tokenizer)
