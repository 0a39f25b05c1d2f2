"""What lfjax writes of a tokenizer, as transformers' AutoTokenizer reads it: the same ids, the same text."""

import json
import shutil

import pytest
import vocabularies as files
from tokenizers import Tokenizer, models, pre_tokenizers

from lfjax import tokenizers
from lfjax.tokenizers import chat, sentencepiece

transformers = pytest.importorskip("transformers", reason="transformers is absent: tokenizers were not compared")
END = "<|endoftext|>"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMED}
TEXTS = ["the cat sat.", "a b\n\tc ", "the L'Haÿ and a ÿ", "日本 🙂", "<ENTITY> of</s> <ENTITY>", "a <word>s <word>"]


def written(folder, tokenizer, model_type, *, pad=False):
    """The files that the tokenizer saves beside a model's config.json: as lfjax and as transformers read them."""
    tokenizer.save(folder)
    if pad:
        tokenizers.name_pad(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tokenizers.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_markup(text, first=True) == ids, text
        begun = [ours.bos_id, *ids]  # takes the space off again that the first word got
        assert ours.decode(begun) == theirs.decode(begun, skip_special_tokens=True), text


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_learnt_here_begins_pads_and_cuts_texts_alike(tmp_path, kind, model_type):
    learnt = sentencepiece.train([text + str(i) for i, text in enumerate(files.TEXTS)], vocab_size=300, model_type=kind)
    ours, theirs = written(tmp_path, learnt, model_type)
    for text in ["", " a", " a  b   ", *TEXTS[:4], *files.TEXTS]:
        assert theirs(text).input_ids == learnt.encode_prompt(text) == ours.encode_prompt(text)
    assert_same(ours, theirs)
    ids = (learnt.bos_id, learnt.eos_id, learnt.pad_id, learnt.unk_id)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert theirs(["the cat", "the"], padding=True).input_ids[1][-1] == learnt.pad_id


@pytest.mark.parametrize("begins", [None, True, False])
def test_a_sentencepiece_model_of_others_begins_a_text_as_its_files_say(shared, tmp_path, begins):
    settings = LLAMA if begins is None else {**LLAMA, "add_bos_token": begins}
    shutil.copy(shared / "data" / "sp_models" / "mistral_v1.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = tokenizers.load(tmp_path)
    ours, theirs = written(tmp_path, loaded, "llama")
    assert theirs("the cat").input_ids == loaded.encode_prompt("the cat") == ours.encode_prompt("the cat")
    assert (loaded.encode_prompt("the")[0] == 1) == (begins is not False)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        **settings,
        "add_bos_token": begins is not False,
    }


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("end", ["' ' + eos_token", "'\\n' + eos_token", "'<|end|>' + eos_token"])
def test_what_a_template_puts_behind_an_answer_is_cut_as_one_text_with_it(shared, tmp_path, end, file):
    said = "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + " + end
    template = "{{ bos_token }}{% for m in messages %}" + said + " }}{% endif %}{% endfor %}"
    shutil.copy(shared / "data" / "sp_models" / "mistral_v1.model", tmp_path / "tokenizer.model")
    settings = {**LLAMA, "legacy": True, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, folder = transformers.AutoTokenizer.from_pretrained(tmp_path), tmp_path
    if file == "tokenizer.json":  # as transformers writes it: a normalizer of its own puts the first space
        theirs.save_pretrained(folder := tmp_path / "json")
    ours, talk = tokenizers.load(folder), [{"role": "user", "content": "who sat?"}]
    ids = chat.prompt_ids(ours, talk) + chat.response_ids(ours, talk, "the cat sat.")
    whole = [*talk, {"role": "assistant", "content": "the cat sat."}]
    assert ids == theirs.apply_chat_template(whole, return_dict=False)


@pytest.mark.parametrize("begin", ["", END])
@pytest.mark.parametrize("says", [True, False])
def test_a_tokenizer_json_says_itself_what_begins_a_text(tmp_path, begin, says):
    folder = files.write(tmp_path / "from", files.byte_level(begin=begin), bos_token=END, add_bos_token=says)
    ours, theirs = written(tmp_path / "to", tokenizers.load(folder), "gpt2")
    assert theirs("the cat").input_ids == ours.encode_prompt("the cat")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json", "nowhere"])
@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "json"])
def test_an_added_token_is_special_where_it_is_named_so_alone(shared, tmp_path, kind, where):
    folder, named = tmp_path / "from", {} if kind != "sentencepiece" else NAMED
    if kind == "sentencepiece":
        folder.mkdir()
        shutil.copy(shared / "data" / "sp_models" / "mistral_v1.model", folder / "tokenizer.model")
    elif kind == "bpe":
        files.write_bpe(folder)
    else:
        files.write(folder, files.byte_level(special=[END]))
    settings = LLAMA if kind == "sentencepiece" else {"eos_token": END}
    role = {"cls_token": "<ENTITY>"}
    place = 32000 if kind == "sentencepiece" else 290
    (folder / "added_tokens.json").write_text(json.dumps({"<ENTITY>": place, "<word>": place + 1}))
    for name, held in (("tokenizer_config.json", settings), ("special_tokens_map.json", named)):
        (folder / name).write_text(json.dumps(held | (role if where == name else {})))
    ours, theirs = written(tmp_path / "to", tokenizers.load(folder), "llama" if kind == "sentencepiece" else "gpt2")
    assert_same(ours, theirs)
    assert ("<ENTITY>" in ours.specials) == (where != "nowhere") and "<word>" not in ours.specials
    assert (place in ours.encode("a <ENTITY>")) == (where == "nowhere")


def test_further_special_tokens_are_special_under_both_of_their_names(tmp_path):
    for key, value in (("additional_special_tokens", ["the"]), ("extra_special_tokens", {"article": "the"})):
        folder = files.write(tmp_path / key, files.byte_level(special=[END]), eos_token=END, **{key: value})
        ours, theirs = written(tmp_path / f"{key}.to", tokenizers.load(folder), "gpt2")
        assert_same(ours, theirs)
        assert "the" in ours.specials


def test_tokens_added_to_a_sentencepiece_model_keep_their_flags(shared, tmp_path):
    shutil.copy(shared / "data" / "sp_models" / "mistral_v1.model", tmp_path / "tokenizer.model")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    added = [{"content": "<ENTITY>", **flags, "lstrip": True}, {"content": "<word>", **flags, "single_word": True}]
    added += [{"content": "<|user|>", **flags, "rstrip": True, "special": True}]
    listed = {str(32000 + i): entry for i, entry in enumerate(added)}
    settings = {**LLAMA, "add_bos_token": True, "added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = written(tmp_path, tokenizers.load(tmp_path), "llama")
    assert_same(ours, theirs, ["a  <ENTITY> b", "a <word> <word>s", "<|user|>\n hi<|user|> you"])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == settings


def no_spare():
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.mark.parametrize("given", [{}, {"pad_token": END}])
@pytest.mark.parametrize("kind", ["json", "bpe", "encoder", "new", "sentencepiece"])
def test_the_pad_token_that_is_named_has_the_id_that_lfjax_pads_with(shared, tmp_path, kind, given):
    folder, given = tmp_path / "from", dict.fromkeys(given, "</s>" if kind in ("new", "sentencepiece") else END)
    if kind == "json":
        files.write(folder, eos_token=END, **given)
    elif kind == "new":
        files.write(folder, no_spare(), eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast", **given)
    elif kind == "sentencepiece":
        folder.mkdir()
        shutil.copy(shared / "data" / "sp_models" / "mistral_v1.model", folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps({**LLAMA, **given}))
    else:
        files.write_bpe(folder, {"bpe": ("vocab.json", "merges.txt"), "encoder": ("encoder.json", "vocab.bpe")}[kind])
        (folder / "tokenizer_config.json").write_text(json.dumps(given))
    loaded = tokenizers.load(folder)
    ours, theirs = written(tmp_path / "to", loaded, "llama" if kind == "sentencepiece" else "gpt2", pad=True)
    assert theirs.pad_token_id == ours.pad_id == loaded.pad_id != theirs.eos_token_id == loaded.eos_id
    assert_same(ours, theirs)
    assert len(theirs) == ours.vocab_size == loaded.vocab_size
