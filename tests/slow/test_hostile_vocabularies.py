"""Vocabularies that break or burden the libraries that read them: each is one line, or holds, within seconds."""

import collections
import copy
import json
import pathlib
import random
import sys
import time

import pytest

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.tokenizers import sentencepiece, trial

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tokenizers"))
import vocabularies as files

pytestmark = pytest.mark.slow
SPEC = json.loads(files.byte_level().to_str())
SECTIONS = (
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "padding",
    "truncation",
    "added_tokens",
    "model",
)
ODD = (None, 7, -1, 2**31, 2**63, 1e300, True, "x", "", [], {}, [[]], {"type": "Magic"}, "a\ud800", "\x1b[31m")


def regex(pattern: str) -> list[dict]:
    held = {"pattern": {"Regex": pattern}}
    return [
        {"pre_tokenizer": {"type": "Split", **held, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", **held, "content": ""}},
    ]


def replaces(each: int, levels: int, letter: str = "a") -> dict:
    one = {"type": "Replace", "pattern": {"String": letter}, "content": letter * each}
    return {"normalizer": {"type": "Sequence", "normalizers": [one] * levels}}


def decodes(pattern: dict, content: str) -> dict:
    one = {"type": "Replace", "pattern": pattern, "content": content}
    return {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, one]}}


def model(kind: str, **fields) -> dict:
    return {"model": {"type": kind, **fields}}


PARTS = {
    "sections of wrong types": [{name: value} for name in SECTIONS for value in ODD],
    "fields of wrong types": [
        {"model": SPEC["model"] | {name: value}} for name in SPEC["model"] if name != "type" for value in ODD
    ],
    "memory": [
        replaces(each, levels, letter) for letter in "aZ߷" for each, levels in ((100, 8), (1000, 4), (2, 40), (9, 2))
    ],
    "decoders": [decodes({"String": "k"}, "k" * count) for count in (19, 99, 10**6)]
    + [decodes({"Regex": pattern}, "k") for pattern in ("(z+z+)+y", "(?=)", "[k-m]*?", "\\x{7a}|\\u0079")],
    "regexes": [
        part for pattern in ("(a+)+$", "(.*)*x", "(a|aa)+$", "(?=(a*)*b)", "(", "\\p{Nope}") for part in regex(pattern)
    ],
    "models": [
        model("Unigram", unk_id=5, vocab=[["a", -1.0]]),
        model("Unigram", unk_id=None, vocab=[["a", -1.0]]),
        model("WordLevel", vocab={"a": 0}, unk_token="[UNK]"),
        model(
            "WordPiece", vocab={"a": 0}, unk_token="[UNK]", continuing_subword_prefix="##", max_input_chars_per_word=9
        ),
        model("BPE", vocab={"a": 0, "b": 0}, merges=["a b"]),
        model("BPE", vocab={"a": 2**31, "b": 2**32 - 1}, merges=[]),
        model("BPE", vocab={"a": 2**40}, merges=[]),
    ],
    "crashes": [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}
        for text in ("AAAA////AAAAAAAA", "////", "x")
    ],
}


def damaged(content: bytes, count: int):
    """Copies with bytes flipped, or cut short."""
    chance = random.Random(0)
    for number in range(count):
        made = bytearray(content)
        for _ in range(chance.choice((1, 4, 50))):
            made[chance.randrange(len(made) if number % 2 else min(2000, len(made)))] = chance.randrange(256)
        yield bytes(made[: chance.randrange(len(made))] if number % 7 == 0 else made)


def test_hostile_vocabularies_are_one_line_or_hold_within_seconds(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("LFJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_HELD", set())
    table: collections.Counter[tuple[str, str]] = collections.Counter()

    def try_one(kind: str, name: str, content: bytes) -> None:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        (folder / name).write_bytes(content)
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        began = time.monotonic()
        try:
            tokenizer = tokenizers.load(folder)
            tokenizer.decode(tokenizer.encode("The quick brown fox aaaaaaaa 777"))
            outcome = "read"
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error), (kind, str(error))
            outcome = "refused"
        assert time.monotonic() - began < 30, (kind, content[:200])  # of which at most 4 are its own
        table[kind, outcome] += 1

    for kind, parts in PARTS.items():
        for part in parts:
            spec = json.dumps(copy.deepcopy(SPEC) | part)
            try_one(kind, "tokenizer.json", spec.encode())
    deep = '{"type": "Sequence", "normalizers": [' * 20000 + "]}" * 20000
    try_one("depth", "tokenizer.json", ('{"normalizer": ' + deep + ', "model": {"type": "BPE"}}').encode())
    for content in damaged(json.dumps(SPEC).encode(), 150):
        try_one("bytes of tokenizer.json", "tokenizer.json", content)
    sentencepiece.train(files.TEXTS * 9, tmp_path / "own", vocab_size=290)
    for content in damaged((tmp_path / "own" / "tokenizer.model").read_bytes(), 150):
        try_one("bytes of tokenizer.model", "tokenizer.model", content)
    with capsys.disabled():
        print()
        for (kind, outcome), count in sorted(table.items()):
            print(f"vocabularies, {kind}: {count} {outcome}")
