import json
import os
import pathlib
import time

import pytest

from lfjax.config import InputError
from lfjax.tokenizers import response_text, sentencepiece

WORDS = """quick slow old young merry tired fox dog cat wolf badger otter jumps over runs from looks at sleeps beside
moon river farmer garden gate mountain village winter summer morning evening quietly loudly without within beneath"""
TEXTS = [" ".join(WORDS.split()[i : i + 7 : step]) + ".\n" for i in range(25) for step in (1, 2, 3)]
HARD = [
    "def f(x):\n\treturn  [x]\n\n",
    "  leading and trailing   ",
    "Ärger, мир, 你好, שלום, 🙂",
    "</s><s><pad><unk>",
    "a\r\nb\x00c",
    "",
    " ",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return sentencepiece.train(TEXTS, vocab_size=320, model_type=request.param)


@pytest.mark.parametrize("text", HARD)
def test_no_character_is_lost(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_four_different_ones_and_text_never_makes_them(tokenizer):
    specials = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert specials == {0, 1, 2, 3}
    assert not specials & {token for text in HARD + TEXTS for token in tokenizer.encode(text)}
    assert all(0 <= token < tokenizer.vocab_size == 320 for token in tokenizer.encode(HARD[2]))


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("old fox")
    assert tokenizer.decode([1, *ids, 2, 3, 3]) == "old fox"


def test_the_same_texts_give_the_same_file(tmp_path):
    for model_type in ("unigram", "bpe"):
        for folder in ("a", "b"):
            sentencepiece.train(TEXTS, tmp_path / folder, vocab_size=320, model_type=model_type)
        first, second = ((tmp_path / folder / sentencepiece.MODEL_FILE).read_bytes() for folder in ("a", "b"))
        assert first == second


def test_a_saved_tokenizer_loads_from_its_folder_and_from_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / sentencepiece.MODEL_FILE):
        loaded = sentencepiece.load(path)
        assert loaded.encode(TEXTS[0] + HARD[2]) == tokenizer.encode(TEXTS[0] + HARD[2])
        assert (loaded.vocab_size, loaded.pad_id) == (320, 3)


def test_prompt_and_response_encoded_apart_decode_as_one_text(tokenizer):
    text = "quick old fox runs from 你好."
    for cut in range(len(text)):
        prompt, response = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
        assert response_text(tokenizer, [1, *prompt], [*response, 2]) == text[cut:]


def test_a_character_cut_between_its_bytes_goes_to_the_response(tokenizer):
    ids = tokenizer.encode("fox 你")
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + response_text(tokenizer, ids[:cut], ids[cut:]) == "fox 你"


@pytest.mark.parametrize(
    "texts, options, message",
    [
        (TEXTS, {"vocab_size": 5000}, r"vocab_size: found 5000; these texts fill at most \d+"),
        (TEXTS, {"vocab_size": 100}, r"vocab_size: found 100; these texts need at least \d+ pieces"),
        (TEXTS, {"vocab_size": 320, "model_type": "word"}, r"found 'word'; allowed: unigram \| bpe"),
        ([], {"vocab_size": 320}, "no text"),
        (["", ""], {"vocab_size": 320}, "no text"),
    ],
)
def test_what_cannot_be_learned_is_one_clear_line(texts, options, message):
    with pytest.raises(InputError, match=message) as error:
        sentencepiece.train(texts, **options)
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        sentencepiece.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        sentencepiece.load(tmp_path)


def test_other_peoples_models_load(shared: pathlib.Path):
    models = sorted((shared / "data" / "sp_models").rglob("*.model"))
    assert models
    for path in models:
        tokenizer = sentencepiece.load(path)
        assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"
        assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_a_failed_write_leaves_the_old_vocabulary_and_nothing_else(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"tokenizer\.model: cannot write: No space left"):
        tokenizer.save(tmp_path)
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_tokens_that_take_the_spaces_at_their_sides_cost_no_more_than_a_texts_length(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    size = tokenizer.vocab_size
    tokens = {size: {"content": " x ", "lstrip": True}, size + 1: {"content": "<y>", "lstrip": True, "rstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    loaded = sentencepiece.load(tmp_path)
    assert loaded.encode("a   x   <y>  <y>b") == [*loaded.encode("a"), size, size + 1, size + 1, *loaded.encode("b")]
    began = time.process_time()
    loaded.encode("a" + " " * 100_000 + "b")
    assert time.process_time() - began < 5  # minutes, where each space begins a run anew


def test_what_stands_beside_a_vocabulary_is_bounded_together(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in "ab":
        with (tmp_path / "additional_chat_templates" / f"{name}.jinja").open("wb") as file:
            file.truncate(70 << 20)
    with pytest.raises(InputError, match=r"b\.jinja: with it more than 128 MB stand beside"):
        sentencepiece.load(tmp_path)
