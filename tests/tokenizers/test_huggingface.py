import json

import pytest
import vocabularies as files
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.tokenizers import response_text, sentencepiece, stop_ids

HARD = [
    "def f(x):\n\treturn  [x]\n\n",
    "  leading and trailing   ",
    "Ärger, мир, 你好, שלום, 🙂",
    "<|endoftext|></s><|im_end|>",
    "a\r\nb\x00c",
    "",
    " ",
]
OWN = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tokenizers.load(files.write(tmp_path_factory.mktemp("bytes")))


@pytest.mark.parametrize("text", HARD)
def test_byte_level_vocabularies_lose_no_character_and_see_no_markup_in_text(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not set(ids) & set(byte_level.specials.values())


def test_markup_becomes_its_token_where_it_is_meant(byte_level):
    end = byte_level.specials["<|im_end|>"]
    assert byte_level.encode_markup("cat<|im_end|>") == [*byte_level.encode("cat"), end]
    assert byte_level.decode([*byte_level.encode("cat"), end]) == "cat"


def test_a_sequence_begins_as_the_files_say(tmp_path):
    plain = tokenizers.load(files.write(tmp_path / "plain"))
    assert plain.encode_prompt("the") == plain.encode("the")
    assert plain.encode_prompt("") == [plain.eos_id] == [plain.bos_id]
    begins = tokenizers.load(files.write(tmp_path / "bos", files.byte_level(begin="<|endoftext|>")))
    assert begins.encode_prompt("the") == [begins.specials["<|endoftext|>"], *begins.encode("the")]
    assert begins.bos_id == begins.specials["<|endoftext|>"] != begins.eos_id
    told = tokenizers.load(files.write(tmp_path / "told", bos_token="<|endoftext|>", add_bos_token=True))
    assert told.encode_prompt("") == [told.specials["<|endoftext|>"]]


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_keep_the_flags_that_the_files_give_them(tmp_path, listed):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "word": 2}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split(" ", "isolated")
    added = [
        AddedToken("<TOOL>", lstrip=True, normalized=False),
        AddedToken("<call>", normalized=True),
        AddedToken("word", single_word=True),
        AddedToken("<|user|>", rstrip=True, special=True, normalized=False),
        AddedToken("</s>", rstrip=True, special=True, normalized=False),
    ]
    made.add_tokens(added)
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    entries = {made.token_to_id(token.content): {flag: getattr(token, flag) for flag in flags} for token in added}
    settings = {"added_tokens_decoder": {str(place): entry for place, entry in entries.items()}} if listed else {}
    tokenizer = tokenizers.load(files.write(tmp_path, made, eos_token="</s>", **settings))

    def pieces(text):  # as transformers 5.23 cuts these
        return tokenizer.pieces(tokenizer.encode_markup(text))

    assert pieces("a <TOOL>a") == ["a", "<TOOL>", "a"]
    assert pieces("<tool>") == ["[UNK]"]
    assert pieces("<CALL>a") == ["<call>", "a"]
    assert pieces("word<call>worda") == ["word", "<call>", "[UNK]"]
    assert pieces("<|user|>\n a</s> a") == ["<|user|>", "a", "</s>", "a"]
    assert set(tokenizer.specials) == {"<|user|>", "</s>"}


def test_a_cut_or_a_padding_written_in_the_file_is_not_applied(tmp_path):
    made = files.byte_level()
    made.enable_truncation(2)
    made.enable_padding(length=50)
    tokenizer = tokenizers.load(files.write(tmp_path, made))
    assert tokenizer.decode(tokenizer.encode(HARD[0])) == HARD[0]


@pytest.mark.parametrize("given", [{}, {"pad_token": "<|im_end|>"}, {"pad_token": {"content": "<|im_end|>"}}])
def test_a_missing_pad_token_is_an_id_that_no_text_makes_and_never_eos(tmp_path, given):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = tokenizers.load(files.write(tmp_path, **given))
    assert tokenizer.pad_id not in tokenizer.eos_ids == (2, 0)
    assert tokenizer.pieces([tokenizer.pad_id]) == ["ÿ"]  # the byte 0xff
    assert tokenizer.vocab_size == 290  # no row is added to a model


def test_a_named_pad_token_is_kept_a_reserved_one_taken_and_else_a_new_one_made(tmp_path):
    named = tokenizers.load(files.write(tmp_path / "a", pad_token="<|endoftext|>"))
    assert named.pad_id == named.specials["<|endoftext|>"]
    added = tokenizers.load(files.write(tmp_path / "b", pad_token="[PAD]"))
    assert (added.pad_id, added.vocab_size) == (290, 291)
    special = [*files.SPECIAL, "<|reserved_special_token_7|>"]
    reserved = tokenizers.load(files.write(tmp_path / "c", files.byte_level(special=special)))
    assert reserved.pieces([reserved.pad_id]) == ["<|reserved_special_token_7|>"]
    words = Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="a"))
    new = tokenizers.load(files.write(tmp_path / "d", words))
    assert (new.pad_id, new.vocab_size) == (2, 3)


def test_every_eos_of_the_generation_config_ends_a_response(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = tokenizers.load(files.write(tmp_path))
    assert tokenizer.eos_id == 2
    assert stop_ids(tokenizer, ["."], "stop") == (2, 0, *tokenizer.encode("."))


def test_gpt2_files_are_the_same_tokenizer_under_both_pairs_of_names(tmp_path):
    own = json.loads(files.byte_level(special=files.SPECIAL[:1]).to_str())
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "json" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    reference = tokenizers.load(tmp_path / "json")
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = files.write_bpe(tmp_path / names[0], names)
        for path in (folder, folder / names[0], folder / names[1]):
            found = tokenizers.load(path)
            assert [found.encode(text) for text in HARD] == [reference.encode(text) for text in HARD]
            assert found.bos_id == found.eos_id == 0 != found.pad_id


def test_wordpiece_takes_the_longest_piece_and_the_settings_beside_it(tmp_path):
    lower = tokenizers.load(files.write_wordpiece(tmp_path / "lower"))
    assert lower.encode("The cats sat.") == [5, 6, 7, 8, 9]
    assert lower.encode("dogs é") == [1, 11]
    assert lower.encode_prompt("the") == [2, 5]
    assert (lower.bos_id, lower.eos_id, lower.pad_id, lower.unk_id) == (2, 3, 0, 1)
    assert lower.decode([2, 5, 6, 7, 3, 0]) == "the cats"
    cased = tokenizers.load(files.write_wordpiece(tmp_path / "cased", do_lower_case=False))
    assert cased.encode("The é") == [12, 10]


@pytest.fixture(scope="module", params=["metaspace", "prepend"])
def spaced(request, tmp_path_factory):
    """A vocabulary that puts a space before a text's first word, as Llama's tokenizer.json, new and old."""
    letters = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"])}
    letters |= {f"<0x{byte:02X}>": len(letters) + byte for byte in range(256)}
    made = Tokenizer(models.BPE(letters, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    if request.param == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(strip)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    settings = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return tokenizers.load(files.write(tmp_path_factory.mktemp("spaced"), made, **settings))


def test_a_response_gets_no_space_of_its_own_but_the_first_word_of_a_sequence_does(spaced):
    assert spaced.pieces(spaced.encode_prompt("ab")) == ["<s>", "▁a", "b"]
    assert spaced.pieces(spaced.encode("ab a")) == ["a", "b", "▁a"]
    assert spaced.pieces([spaced.pad_id]) == ["<0xFF>"]


def test_prompt_and_response_encoded_apart_decode_as_one_text(spaced, byte_level):
    text = "a b ab 你 a"
    for tokenizer in (spaced, byte_level):
        for cut in range(len(text) + 1):
            prompt, response = tokenizer.encode_prompt(text[:cut]), tokenizer.encode(text[cut:], first=cut == 0)
            assert response_text(tokenizer, prompt, [*response, tokenizer.eos_id]) == text[cut:]


def test_a_sentencepiece_model_puts_its_space_before_the_first_word_alone(shared):
    tokenizer = tokenizers.load(shared / "data" / "sp_models" / "mistral_v1.model")
    assert tokenizer.pieces(tokenizer.encode_prompt("Hello world")) == ["<s>", "▁Hello", "▁world"]
    assert tokenizer.pieces(tokenizer.encode("Hello world")) == ["Hello", "▁world"]
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for cut in range(len(HARD[2])):
        prompt, response = tokenizer.encode_prompt(HARD[2][:cut]), tokenizer.encode(HARD[2][cut:], first=cut == 0)
        assert response_text(tokenizer, prompt, response) == HARD[2][cut:]
    assert tokenizer.pieces([tokenizer.pad_id]) == ["<0xFF>"]


def test_ids_of_gpt2s_own_files_are_those_of_transformers(shared):
    """The ids are transformers 5.23's."""
    tokenizer = tokenizers.load(shared / "data" / "gpt2_bpe")
    for text, ids in TRANSFORMERS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (50256, 50256, 50257)
    assert tokenizer.pad_id == 187


def test_real_text_and_code_come_back_whole(shared):
    data = shared / "data"
    texts = [(data / "text" / "tinyshakespeare.txt").read_text()[:20000]]
    for line in (data / "ilf_code_surge" / "surge_annotations.first150.jsonl").read_text().splitlines()[:30]:
        texts += [value for value in json.loads(line).values() if isinstance(value, str)]
    for path in ("gpt2_bpe", "sp_models/mistral_v1.model"):
        tokenizer = tokenizers.load(data / path)
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


@pytest.mark.parametrize("kind", ["json", "bpe", "wordpiece", "sentencepiece"])
def test_saved_files_are_those_that_were_read_and_load_again(tmp_path, kind):
    folder = tmp_path / "from"
    if kind == "sentencepiece":
        sentencepiece.train([text + str(i) for i, text in enumerate(files.TEXTS)], folder, vocab_size=300)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": files.CHATML}))
    else:
        {"json": files.write, "bpe": files.write_bpe, "wordpiece": files.write_wordpiece}[kind](folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "config.json").write_text("{}")
    tokenizer = tokenizers.load(folder)
    tokenizer.save(tmp_path / "to")
    written = {entry.name: entry.read_bytes() for entry in (tmp_path / "to").iterdir()}
    if kind == "sentencepiece":  # whose own specials the file beside it has to name: the rest of it stays
        merged = json.loads(written.pop("tokenizer_config.json"))
        assert merged.pop("chat_template") == files.CHATML
        assert merged == {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **OWN}
        (folder / "tokenizer_config.json").unlink()
    assert written == {e.name: e.read_bytes() for e in folder.iterdir() if e.name != "config.json"}
    assert set(written) <= set(tokenizers.NAMES)
    again = tokenizers.load(tmp_path / "to")
    assert again.encode(HARD[0]) == tokenizer.encode(HARD[0])
    assert (
        (again.template or ("",))[0]
        == (tokenizer.template or ("",))[0]
        == (files.CHATML if kind == "sentencepiece" else "")
    )


def test_every_vocabulary_file_of_the_folder_is_written_again(tmp_path):
    folder = files.write_wordpiece(files.write_bpe(files.write(tmp_path / "from")))
    for name in ("tokenizer.model", "encoder.json", "vocab.bpe", "tekken.json"):
        (folder / name).write_bytes(name.encode())
    tokenizers.load(folder).save(tmp_path / "to")
    assert {e.name: e.read_bytes() for e in (tmp_path / "to").iterdir()} == {
        e.name: e.read_bytes() for e in folder.iterdir()
    }
    tokenizers.load(folder / "vocab.json").save(tmp_path / "chosen")  # what would be read in its place stays behind
    assert {e.name for e in (tmp_path / "chosen").iterdir()} == {
        "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt", "tekken.json", "tokenizer_config.json"
    }  # fmt: skip


def test_the_pad_token_is_named_in_every_file_that_names_another_and_nothing_else_changes(tmp_path):
    settings = {"pad_token": "<|im_end|>", "model_max_length": 7, "chat_template": "é"}
    folder = files.write(tmp_path / "from", **settings)
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|im_end|>"}, "sep_token": "a"}')
    tokenizer = tokenizers.load(folder)
    tokenizer.save(tmp_path / "to")
    tokenizers.name_pad(tmp_path / "to", tokenizer)
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, tmp_path / "to"))
    pad = after.pop("pad_token")
    assert (pad["content"], pad["single_word"], pad["special"]) == ("ÿ", True, True)
    assert after == {key: value for key, value in before.items() if key != "pad_token"}
    named = json.loads((tmp_path / "to" / "special_tokens_map.json").read_text())
    assert named == {"sep_token": "a", "pad_token": {key: value for key, value in pad.items() if key != "__type"}}
    again = tokenizers.load(tmp_path / "to")
    assert again.pad_id == tokenizer.pad_id
    written = {entry.name: entry.read_bytes() for entry in (tmp_path / "to").iterdir()}
    again.save(tmp_path / "to")
    tokenizers.name_pad(tmp_path / "to", again)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "to").iterdir()} == written


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizers.find(tmp_path) is None
    with pytest.raises(InputError, match="no such file in it"):
        tokenizers.load(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        tokenizers.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{", r"tokenizer.json:1: not JSON"),
        ("tokenizer.json", "[]", r"tokenizer.json: found a JSON list, not an object"),
        ("tokenizer.json", "{}", r"tokenizer.json: no 'model'"),
        ("tokenizer.json", '{"model": {"type": "Magic"}}', r"tokenizer.json: not what `tokenizers` reads"),
        ("tokenizer_config.json", '{"eos_token": 3}', r"tokenizer_config.json: 'eos_token': found 3"),
        ("tokenizer_config.json", '{"chat_template": 3}', r"'chat_template': found int"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', r"generation_config.json: 'eos_token_id'"),
        ("generation_config.json", '{"eos_token_id": [2, 2147483648]}', r"'eos_token_id': found \[2, 2147483648\]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', r"config.json: 'added_tokens_decoder': found \[1\]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', r"config.json: 'added_tokens_decoder': '1'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {"content": "x", "lstrip": 0}}}',
            r"config.json: 'added_tokens_decoder': '1': 'lstrip': found 0",
        ),
        ("added_tokens.json", '{"<|new|>": 700}', r"tokenizer.json: added token '<\|new\|>' has the id 700"),
        ("merges.txt", "a b c\n", r"merges.txt:1: found 'a b c'"),
        ("vocab.json", "3", r"vocab.json: found a JSON int, not an object"),
        ("vocab.txt", "a\nb\n", r"vocab.txt: no line '\[UNK\]'"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, message):
    write = {"merges.txt": files.write_bpe, "vocab.json": files.write_bpe, "vocab.txt": files.write_wordpiece}
    folder = write.get(name, files.write)(tmp_path / "f")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        tokenizers.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("other", ["loop", "folder"])
def test_a_loop_of_links_or_a_folder_in_place_of_a_file_is_not_taken_as_absent(tmp_path, name, other):
    folder = files.write(tmp_path / "f")
    (folder / name).unlink(missing_ok=True)
    if other == "loop":
        (folder / name).symlink_to(name)
    else:
        (folder / name).mkdir()
    with pytest.raises(InputError, match=f"/{name}: a folder, or a link that leads to no file; remove it") as error:
        tokenizers.find(folder)
    assert "\n" not in str(error.value)


def test_what_is_missing_beside_a_file_or_not_known_is_said(tmp_path):
    folder = files.write_bpe(tmp_path / "half")
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges.txt: no such file"):
        tokenizers.load(folder)
    with pytest.raises(InputError, match=r"words of a MagicTokenizer are not known"):
        tokenizers.load(files.write_bpe(tmp_path / "magic", tokenizer_class="MagicTokenizer"))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match=r"no token that ends a text"):
        tokenizers.load(files.write(tmp_path / "endless", words, eos_token=None))


TRANSFORMERS = {
    "Hello world\n  x": [15496, 995, 198, 220, 2124],
    "  lead": [220, 1085],
    "def f(x):\n\treturn  [x]\n\n": [4299, 277, 7, 87, 2599, 198, 197, 7783, 220, 685, 87, 60, 628],
    "Ärger, мир, 你好, שלום, 🙂": [
        127,
        226,
        81,
        1362,
        11,
        12466,
        120,
        18849,
        21169,
        11,
        220,
        19526,
        254,
        25001,
        121,
        11,
        14360,
        102,
        40010,
        27072,
        147,
        251,
        11,
        32485,
    ],
    " ": [220],
    "a\r\nb\x00c": [64, 201, 198, 65, 188, 66],
    "don't  they'll\n\n\nend  ": [9099, 470, 220, 484, 1183, 628, 198, 437, 220, 220],
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx 12345 ...": [
        24223,
        24223,
        24223,
        24223,
        24223,
        24223,
        5324,
        17031,
        2231,
        2644,
    ],
    "é café ﬁ": [68, 136, 223, 40304, 27332, 105, 223],
    "<think>hm</think> ok": [27, 14925, 29, 23940, 3556, 14925, 29, 12876],
    "\n\nabc": [198, 198, 39305],
    "日本語テキスト العربية हिन्दी": [
        33768,
        98,
        17312,
        105,
        45739,
        252,
        24336,
        25084,
        43302,
        28981,
        44690,
        26897,
        39848,
        22654,
        45632,
        28225,
        117,
        11976,
        123,
        11976,
        101,
        24231,
        235,
        11976,
        99,
        24231,
        222,
    ],
}


def test_a_vocabulary_that_makes_the_library_panic_is_one_line(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": ["a b"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(InputError, match=r"tokenizer\.json: not what `tokenizers` reads: .*restore") as caught:
        tokenizers.load(tmp_path)
    assert "\n" not in str(caught.value)
