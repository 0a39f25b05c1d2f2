"""Tiny tokenizers in the files that models come with."""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["the cat sat on the mat.\n", "def f(x):\n\treturn  [x]\n\n", "a quick brown fox", "user assistant system"] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, begin: str = "", special=SPECIAL) -> Tokenizer:
    """A byte-level BPE of a few merges; `begin` is put before every sequence."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    return made


def write(folder: pathlib.Path, tokenizer: Tokenizer | None = None, **settings) -> pathlib.Path:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **settings}))
    return folder


def write_bpe(folder: pathlib.Path, names=("vocab.json", "merges.txt"), **settings) -> pathlib.Path:
    """The same vocabulary in GPT-2's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(byte_level(special=SPECIAL[:1]).to_str())["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{pair[0]} {pair[1]}\n" for pair in model["merges"])
    (folder / names[1]).write_text("#version: 0.2\n" + merges)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_wordpiece(folder: pathlib.Path, **settings) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", ".", "é", "e", "The"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
