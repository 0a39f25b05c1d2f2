import json
import os
import subprocess
import sys
import threading

import pytest
import sentencepiece as sentencepiece_library
import vocabularies as files

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.data import examples
from lfjax.records import Record
from lfjax.tokenizers import panics, sentencepiece, trial


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("LFJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_HELD", set())


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A SentencePiece model."""
    folder = tmp_path_factory.mktemp("learnt")
    sentencepiece.train(files.TEXTS * 9, folder, vocab_size=290)
    return (folder / "tokenizer.model").read_bytes()


def split(pattern: str) -> dict:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def times(each: str, levels: int, others=()) -> dict:
    one = {"type": "Replace", "pattern": {"String": each[0]}, "content": each}
    rest = [{"type": "Replace", "pattern": {"String": f"{i}"}, "content": "b"} for i in others]
    return {"normalizer": {"type": "Sequence", "normalizers": [one] * levels + rest}}


def replace(pattern: str, content: str) -> dict:
    return {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}}


def decodes(pattern: dict, content: str) -> dict:
    spelt = {"type": "Replace", "pattern": pattern, "content": content}
    return {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, spelt]}}


HOSTILE = {
    "crash": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////AAAAAAAA"}}, "ends its process"),
    "regex": (split("(a+)+$"), "fails: Onig: Regex search error: retry-limit-in-match over"),
    "growth": (times("Z" * 100, 5), r"its normalizer makes a text 1000000000 times as long"),
    "growth by a regex": (replace("(?=Z)|Q?Y", "Z" * 90), r"201 characters \('Z.*\.\.\.\) become \d+"),
    "a regex of another letter": (split(r"(Z+)+$"), "retry-limit-in-match over"),
    "a regex of a script": (split(r"(\p{Runic}+)+$"), "over"),
    "a regex of small letters of a script": (split(r"^([\p{Deseret}&&\p{Ll}]+)+$"), "over"),
    "a regex of a category": (split(r"(\p{Co}+)+$"), "over"),
    "a letter by its code": (split(r"(\x5a+)+$"), "retry-limit-in-match over"),
    "growth of what is decoded": (decodes({"String": "k"}, "k" * 120), r"its decoder makes a text 120 times as long"),
    "a decoder's regex": (decodes({"Regex": "(k+k+)+y"}, ""), "fails: .*retry-limit"),
    "many rules": (times("ab", 1, range(6000)), "its rules name 6003 texts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_vocabulary_that_breaks_or_burdens_its_library_is_one_line(tmp_path, name):
    part, found = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(files.byte_level().to_str()) | part))
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{found}") as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_id_far_beyond_the_number_of_tokens_is_refused(tmp_path):
    spec = json.loads(files.byte_level().to_str())
    spec["model"]["vocab"]["zz"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(InputError, match=r"tokenizer\.json: found the id 2147483648 among 29\d tokens"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("ids, found", [([2**31], r"the ids \[2147483648\]"), ([1] * 17, "17 tokens")])
def test_what_begins_a_sequence_is_a_few_ids_of_the_vocabulary(tmp_path, ids, found):
    special = {"id": "<|im_end|>", "ids": ids, "tokens": ["<|im_end|>"] * len(ids)}
    single = [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<|im_end|>": special}}
    spec = json.loads(files.byte_level().to_str()) | {"post_processor": template}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(InputError, match=rf"tokenizer\.json: 'post_processor': it begins a sequence with {found}"):
        tokenizers.load(tmp_path)


def added(tokens) -> dict:
    return {"added_tokens_decoder": {str(400 + i): {"content": token} for i, token in enumerate(tokens)}}


SETTINGS = {
    "many added tokens": (added(f"<{i}>" for i in range(100_001)), r"added tokens: found 10000\d of \d+ characters"),
    "long added tokens": (added("z" * 450 + str(i) for i in range(9000)), r"added tokens: found 900\d of 40\d+ char"),
    "a token without end": (added(["z" * 501]), "found one of 501 characters, at most 500"),
    "a special token without end": ({"additional_special_tokens": ["z" * 501]}, "found one of 501 characters"),
    "a far id": ({"added_tokens_decoder": {"999999999": {"content": "<x>"}}}, "the id 999999999"),
    "a template of no name": ({"chat_template": [{"name": [1], "template": "x"}]}, None),
    "a template of no text": ({"chat_template": [{"name": "default", "template": [1]}]}, "'chat_template': found list"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_what_settings_add_is_bounded_before_it_is_added(tmp_path, learnt, kind, name):
    settings, found = SETTINGS[name]
    folder = files.write(tmp_path, **settings)
    if kind == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        (folder / kind).write_bytes(learnt)
    if found is None:
        assert tokenizers.load(folder).template is None
        return
    with pytest.raises(InputError, match=found) as error:
        tokenizers.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_many_added_tokens_of_every_length_are_read_at_once(tmp_path):
    tokens = ["z" * (2 + i % 400) + f"<{i}>" for i in range(9000)]
    held = len(json.loads(files.byte_level().to_str())["model"]["vocab"])
    decoder = {str(held + i): {"content": token} for i, token in enumerate(tokens)}
    tokenizer = tokenizers.load(files.write(tmp_path, added_tokens_decoder=decoder))
    assert tokenizer.encode(f"a{tokens[77]}{tokens[8999]}")[1:] == [held + 77, held + 8999]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_file_larger_than_any_published_one_is_not_read(tmp_path, name):
    folder = files.write(tmp_path / "a") if name != "tokenizer.model" else tmp_path
    with open(folder / name, "wb") as file:
        file.truncate(200 << 20)  # a hole: it takes no room
    with pytest.raises(InputError, match=rf"{name}: larger than 128 MB"):
        tokenizers.load(folder)


def test_what_held_is_tried_once_and_what_was_learnt_here_not_at_all(tmp_path, monkeypatch):
    asked = []
    ask = trial._CHILD.ask
    monkeypatch.setattr(trial._CHILD, "ask", lambda *args, **options: asked.append(args) or ask(*args, **options))
    folder = files.write(tmp_path / "a")
    tokenizers.load(folder)
    count = len(asked)
    assert count
    monkeypatch.setattr(trial, "_HELD", set())  # as in another process
    tokenizers.load(folder)
    assert len(asked) == count
    sentencepiece.train(["the cat sat on the mat"] * 9, tmp_path / "b", vocab_size=270)
    tokenizers.load(tmp_path / "b")
    assert len(asked) == count
    monkeypatch.setattr(trial, "_HELD", set())
    tokenizers.load(tmp_path / "b")
    assert len(asked) == count + 1


def test_a_text_that_a_vocabulary_fails_on_is_named_with_its_record(tmp_path):
    spec = json.loads(files.byte_level().to_str()) | split(r"(?<=q@)(a+)+$")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = tokenizers.load(tmp_path)
    record = Record("say ", ["q@" + "a" * 60 + "!"], [], where="f.jsonl:3")
    with pytest.raises(InputError, match=r"f\.jsonl:3: field 'responses': .*cannot encode 'q@aaaa"):
        examples.sft_documents([record], tokenizer)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "a table of its own"])
def test_a_model_may_lengthen_a_character_as_unicode_does_and_not_by_far_more(tmp_path, rule):
    (tmp_path / "rules.tsv").write_text(f"5A\t{' '.join(['59'] * 300)}\n")
    own = {"normalization_rule_tsv": str(tmp_path / "rules.tsv")}
    sentencepiece_library.SentencePieceTrainer.Train(
        sentence_iterator=iter(files.TEXTS * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=35,
        minloglevel=2,
        **({"normalization_rule_name": rule} if rule == "nmt_nfkc" else own),
    )
    if rule == "nmt_nfkc":
        assert tokenizers.load(tmp_path).decode(tokenizers.load(tmp_path).encode("the cat")) == "the cat"
        return
    with pytest.raises(InputError, match=r"tokenizer\.model: .* it makes a character 300 characters, at most 100"):
        tokenizers.load(tmp_path)


def test_what_a_vocabulary_panics_on_when_it_decodes_or_spells_is_one_line(tmp_path, capfd):
    spec = json.loads(files.byte_level().to_str()) | decodes({"Regex": r"(?<=q@)(a+)+$"}, "")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": None}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = tokenizers.load(tmp_path)
    ids = tokenizer.encode("q@" + "a" * 60 + "!")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"json: this vocabulary cannot decode \[{ids[0]}, .*retry-limit"):
            tokenizer.decode(ids)
    with pytest.raises(InputError, match=r"tokenizer\.json: this vocabulary cannot spell an id"):
        tokenizer.pieces([2**40])
    os.write(2, b"as before\n")
    assert capfd.readouterr().err == "as before\n"


class PanicException(BaseException):
    """As the library's own is called."""


def panic(message: str, note: str = ""):
    with panics.silenced():
        os.write(2, f"\nthread '<unnamed>' (7) panicked at src/a.rs:1:2:\n{message}\n{note}".encode())
        raise PanicException(message)


def test_what_is_written_to_stderr_beside_a_panic_is_passed_on(capfd):
    with pytest.raises(PanicException), panics.silenced():
        os.write(2, b"one\n")
        with pytest.raises(PanicException):
            panic("a\n[b]", "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n")
        writer = threading.Thread(target=os.write, args=(2, b"two\n"))
        writer.start()
        writer.join()
        panic("c")
    with pytest.raises(KeyError), panics.silenced():
        os.write(2, b"three\n")
        raise KeyError
    os.write(2, b"four\n")
    assert capfd.readouterr().err == "one\ntwo\nthree\nfour\n"


def test_a_closed_stderr_stays_closed():
    program = "import os; os.close(2)\nfrom lfjax.tokenizers import panics\nwith panics.silenced(): print(1)\n"
    done = subprocess.run([sys.executable, "-c", program + "os.fstat(2)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "1\n")  # the last line finds no descriptor
