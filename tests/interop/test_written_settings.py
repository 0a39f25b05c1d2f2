"""The tokenizer's files and generation_config.json beside a model: it stops and scores elsewhere alike."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lfjax import cli, tokenizers
from lfjax.config import InputError
from lfjax.interop import hf, peft
from lfjax.models import lora, presets
from lfjax.models.lora import LoRA
from lfjax.models.transformer import Transformer
from lfjax.tokenizers import sentencepiece

END, TURN = "<|endoftext|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORMS = {"gpt2": presets.gpt2, "llama": presets.llama}
SIZES = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 24, "context": 48}
WORDS = ["the", "cat", "sat", "on", "a", "mat", END]


def folder_of(path: pathlib.Path, kind: str, **settings) -> pathlib.Path:
    """A folder with a tokenizer that names no pad token: byte-level, learnt here, or of words that are all in use."""
    path.mkdir()
    if kind == "learnt":
        texts = [f"the cat sat on {i} mats, {i * i} rats and {i**3} hats" for i in range(40)]
        sentencepiece.train(texts, path, vocab_size=290)
        return path
    if kind == "words":
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([END, "<|im_start|>", TURN] if kind == "bytes" else [END])
    made.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def made_here(tokenizer, form="llama", **sizes) -> hf.Loaded:
    """A random model of as many rows as the tokenizer needs, as a stage saves it."""
    config = FORMS[form](**{"vocab_size": tokenizers.least_rows(tokenizer)} | SIZES | sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x[0]).astype(np.float32), config.parameters(), is_leaf=is_entry)
    return hf.loaded_from(Transformer(config), params, tokenizer)


def is_entry(x) -> bool:
    return isinstance(x, tuple)


def read(file: pathlib.Path) -> dict:
    return json.loads(file.read_text())


def test_what_is_made_of_a_chat_model_stops_where_lfjax_does_and_keeps_the_other_keys(tmp_path):
    source = folder_of(tmp_path / "source", "bytes", chat_template=CHATML)
    kept = {"do_sample": True, "temperature": 0.7, "bos_token_id": 256, "pad_token_id": 256}
    for name, found in (("one", 256), ("several", [257, 256]), ("twice", [256, 256]), ("none", None)):
        (source / "generation_config.json").write_text(json.dumps({**kept, "eos_token_id": found}))
        made = made_here(tokenizers.load(source))
        hf.save(tmp_path / name, made)
        ends = [*dict.fromkeys(found if isinstance(found, list) else [256]), 258]
        assert read(tmp_path / name / "generation_config.json") == {**kept, "eos_token_id": ends}
        again = hf.load(tmp_path / name).tokenizer
        assert set(tokenizers.stop_ids(again, (), "")) == set(tokenizers.stop_ids(made.tokenizer, (), "")) == set(ends)
        hf.save(tmp_path / "next", made._replace(tokenizer=again))
        files = [tmp_path / folder / "generation_config.json" for folder in (name, "next")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert cli.main(["export", str(tmp_path / name), str(tmp_path / "out")]) == 0
        assert read(tmp_path / "out" / "generation_config.json") == read(files[0])


def test_a_model_of_others_keeps_its_files(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    folder_of(source, "bytes", chat_template=CHATML, pad_token=END)
    generation = {"eos_token_id": 256, "_from_model_config": True}
    made = made_here(tokenizers.load(source))
    made = made._replace(config=made.config | {"pad_token_id": 256})
    hf.save(tmp_path / "model", made)
    for file in (*source.iterdir(),):
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    assert cli.main(["import", str(tmp_path / "model"), str(target)]) == 0
    assert read(target / "generation_config.json") == generation
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_an_adapter_has_the_tokenizer_and_the_ends_of_the_model_beside_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is absent: not read by it")
    source = folder_of(tmp_path / "source", "bytes", chat_template=CHATML)
    made, how = made_here(tokenizers.load(source)), LoRA(2, 2.0)
    hf.save(tmp_path / "base", made._replace(config=made.config | {"pad_token_id": None}))
    shutil.copytree(source, tmp_path / "base", dirs_exist_ok=True)  # as published: no pad token, one end
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 256}')
    adapters = jax.tree.map(np.asarray, lora.init(jax.random.key(0), made.model.config, how))
    adapter = peft.export(made.model.config, made.config, {"lora": adapters}, how, str(tmp_path / "base"))
    hf.save(tmp_path / "model", made, adapter=adapter)
    for folder in (tmp_path / "model", tmp_path / "model" / "adapter"):
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        assert (peer.pad_token_id, peer.eos_token_id) == (made.tokenizer.pad_id, 256)
        assert peer("a cat").input_ids == made.tokenizer.encode_prompt("a cat")
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [256, 258]
    assert cli.main(["import", str(tmp_path / "model" / "adapter"), str(tmp_path / "merged")]) == 0
    assert read(tmp_path / "merged" / "generation_config.json")["eos_token_id"] == [256, 258]
    assert read(tmp_path / "merged" / "config.json")["pad_token_id"] == made.tokenizer.pad_id


@pytest.mark.parametrize("form, side", [("gpt2", "right"), ("llama", "left")])
def test_scores_by_learned_positions_are_padded_on_the_right(tmp_path, form, side):
    source = folder_of(tmp_path / "source", "bytes", padding_side="left")
    hf.save(tmp_path / "model", made_here(tokenizers.load(source), form, num_labels=1))
    assert read(tmp_path / "model" / "tokenizer_config.json")["padding_side"] == side


def test_further_chat_templates_are_kept_and_none_from_elsewhere_is(tmp_path):
    source = folder_of(tmp_path / "source", "bytes")
    (source / "chat_template.jinja").write_text(CHATML)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    hf.save(tmp_path / "model", made_here(tokenizers.load(source)))
    hf.save(tmp_path / "model", hf.load(tmp_path / "model"))  # in its place
    assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    (source / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"tool_use\.jinja: a link that leads out of its folder"):
        tokenizers.load(source)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bytes", "learnt", "words"])
def test_scores_of_a_batch_that_transformers_pads_are_those_of_each_text(tmp_path, kind, form):
    absent = "torch and transformers are not both here: scores were not compared"
    torch, transformers = (pytest.importorskip(name, reason=absent) for name in ("torch", "transformers"))
    tokenizer = tokenizers.load(folder_of(tmp_path / "source", kind))
    made = made_here(tokenizer, form, num_labels=1, vocab_size=296)  # of the words, one is new: it pads
    hf.save(tmp_path / "model", made)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    texts = ["the cat sat", "a mat", "the cat sat on a mat and on a mat"]
    ids = [[*tokenizer.encode_prompt(text), tokenizer.eos_id] for text in texts]
    ours = [float(made.model.apply({"params": made.params}, np.asarray([row], np.int32))[0, 0]) for row in ids]
    batch = theirs([text + theirs.eos_token for text in texts], padding=True, return_tensors="pt")
    assert batch.input_ids[1].tolist() == ids[1] + [made.config["pad_token_id"]] * (len(ids[2]) - len(ids[1]))
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(scores, ours, atol=2e-4, rtol=0)


def test_without_a_row_to_pad_with_transformers_refuses_a_batch_and_scores_each_text(tmp_path):
    absent = "torch and transformers are not both here: scores were not compared"
    torch, transformers = (pytest.importorskip(name, reason=absent) for name in ("torch", "transformers"))
    tokenizer = tokenizers.load(folder_of(tmp_path / "source", "words"))
    made = made_here(tokenizer, num_labels=1)
    hf.save(tmp_path / "model", made)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert (theirs.pad_token, model.config.pad_token_id, tokenizer.pad_id) == (None, None, len(WORDS))
    with pytest.raises(ValueError, match="padding token"):
        theirs(["the cat", "a"], padding=True)
    ids = [[0, 1, 6], [4, 6, 6]]  # as those pad who take EOS for it
    with pytest.raises(ValueError, match="padding token"):
        model(torch.tensor(ids))
    with torch.no_grad():
        score = model(torch.tensor(ids[:1])).logits[0, 0]
    ours = made.model.apply({"params": made.params}, np.asarray(ids[:1], np.int32))[0, 0]
    np.testing.assert_allclose(score, ours, atol=2e-4, rtol=0)
