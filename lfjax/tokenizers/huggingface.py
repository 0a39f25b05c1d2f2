"""Vocabularies of the `tokenizers` library: tokenizer.json, GPT-2's BPE files and WordPiece's vocab.txt."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lfjax.config import InputError
from lfjax.files import decoded
from lfjax.tokenizers import panics, trial
from lfjax.tokenizers.files import (
    BPE,
    LIBRARY,
    WORDPIECE,
    Settings,
    check_added,
    check_numbering,
    content_of,
    json_object,
    read_settings,
    special_ids,
)

# Which words a byte-level BPE never merges across, by tokenizer_class; GPT-2's is the library's own default.
_GPT2 = ("", "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")
MOST_BEGIN = 16  # tokens that begin every sequence
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library behind the `Tokenizer` interface.

    decode(encode(x)) == x where the vocabulary keeps every character: byte-level ones do, WordPiece does not.
    """

    def __init__(self, spec: dict[str, Any], settings: Settings, where: str, *, begin: tuple[str, ...] | None = None):
        """
        Args:
          spec: what a tokenizer.json holds.
          begin: the roles of the tokens that begin every sequence; None takes them from the spec's post-processor.
        Raises:
          InputError: the library refuses the spec, or nothing says what ends a text.
        """
        self.settings, self._where = settings, where
        self._first = self._make(spec)  # first: what follows trusts the types that the library has read
        _check_sections(spec, where)
        self._spec, inner = spec, without_first_space(spec)
        self._inner = self._first if inner == spec else self._make(inner)
        vocabulary = self._first.get_vocab(with_added_tokens=True)
        before = self._before() if begin is None else [vocabulary[settings.tokens[role] or ""] for role in begin]
        _check_begin(before, vocabulary, where)
        own = {"bos": before[0]} if before else {}
        found = special_ids(settings, vocabulary, own, where)
        self.bos_id, self.eos_id, self.eos_ids, self.pad_id = found
        unknown = settings.tokens.get("unk") or spec.get("model", {}).get("unk_token")
        self.unk_id: int = vocabulary.get(unknown, self.pad_id) if isinstance(unknown, str) else self.pad_id
        self.vocab_size: int = max(*vocabulary.values(), self.pad_id) + 1
        check_numbering(self.vocab_size, len(vocabulary), where)
        if begin is not None and settings.options.get("add_bos_token"):  # a tokenizer.json says itself what begins
            before = [self.bos_id]
        self._begin = before
        self.names = settings.names
        added = self._first.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self._silent = {self.bos_id, self.pad_id, *self.eos_ids, *self.specials.values()}

    @property
    def template(self) -> tuple[str, str] | None:
        """The chat template and where it is from."""
        return self.settings.template

    def _make(self, spec: dict[str, Any], *, markup: bool = False):
        """The library's object, with every named token in it; in plain text special ones are not looked for."""
        os.environ["RUST_BACKTRACE"] = "0"  # of the library's panics, which are told in one line
        text = json.dumps(spec)
        trial.check("tokenizers", text.encode(), self._where)
        with self._naming("take its added tokens"):
            return self._read(text, markup)

    def _read(self, text: str, markup: bool):
        import tokenizers

        made = tokenizers.Tokenizer.from_str(text)
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = not markup
        held = {token.content: token for token in made.get_added_tokens_decoder().values()}
        new = {
            token: tokenizers.AddedToken(token, special=special, **({"normalized": not special} | (flags or {})))
            for token, (_, special, flags) in self.settings.added.items()
            if token not in held or flags is not None
        }
        made.add_tokens(list(new.values()))  # each call goes over all that there are
        held |= new
        for token, (place, _, _) in self.settings.added.items():
            if made.token_to_id(token) != place:
                found = f"{token!r} has the id {place}; in the vocabulary it is {made.token_to_id(token)}"
                raise InputError(f"{self._where}: added token {found}; restore the files of one model")
        further, named = set(self.settings.further), []
        for token in self.settings.special:
            if token in further and made.token_to_id(token) is None:
                continue  # a token that the model has no row for
            flags = {"normalized": False} | self.settings.flags.get(token, {})
            one = held.get(token) or tokenizers.AddedToken(token, **flags)
            if not one.special:
                one.special = True
                named.append(one)
        made.add_special_tokens(named)
        return made

    def _before(self) -> list[int]:
        """What the post-processor puts before a text."""
        with self._naming("begin a sequence"):
            bare, whole = (self._first.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []

    @functools.cached_property
    def _marked(self) -> tuple[Any, Any]:
        """The inner and the first tokenizer that know special tokens in a text."""
        return self._make(without_first_space(self._spec), markup=True), self._make(self._spec, markup=True)

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of the text alone; see `Tokenizer.encode`."""
        return self._ids(self._first if first else self._inner, text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence; see `Tokenizer.encode_prompt`."""
        return self._begin + self.encode(text, first=True) or [self.bos_id]

    def encode_markup(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a text whose special tokens are meant; see `Tokenizer.encode_markup`."""
        return self._ids(self._marked[first], text)

    def _ids(self, made, text: str) -> list[int]:
        with self._naming(f"encode {text[:40]!r}"):
            return made.encode(text, add_special_tokens=False).ids

    @contextlib.contextmanager
    def _naming(self, what: str):
        try:
            with panics.silenced():
                yield
        except (KeyboardInterrupt, SystemExit, InputError):
            raise
        except BaseException as error:  # the library raises no class of its own, and its panics are no Exception
            found = " ".join(str(error).split())
            raise InputError(f"{self._where}: this vocabulary cannot {what}: {found}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        own = self._first if len(ids) and ids[0] == self.bos_id else self._inner
        shown = [i for i in map(int, ids) if i not in self._silent and i < self.vocab_size]
        with self._naming(f"decode {str(shown[:8])[:-1]}..."):
            return own.decode(shown, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, to show."""
        with self._naming("spell an id"):
            return [self._first.id_to_token(int(i)) or "" for i in ids]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that it was read from, each in place of an older one when it is whole."""
        self.settings.save(folder)


def without_first_space(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a text inside a sequence: no space is put before it, and none is taken off again."""
    spec = {key: value if key == "model" else copy.deepcopy(value) for key, value in spec.items()}
    spec["normalizer"] = _without_prepend(spec.get("normalizer"))
    for part in _parts(spec.get("pre_tokenizer"), _STEPS["pre_tokenizer"]) + _parts(
        spec.get("decoder"), _STEPS["decoder"]
    ):
        kind = part.get("type")
        if kind == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
        elif kind == "ByteLevel":
            part["add_prefix_space"] = False
        elif kind == "Strip" and part.get("content") == " ":
            part["start"] = 0
    return spec


_STEPS = {  # the sections that are read here, and what a Sequence of them is called
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}


def _check_sections(spec: dict[str, Any], where: str) -> None:
    """The library reads lists in place of objects, which nothing writes."""
    for name, steps in _STEPS.items():
        node = spec.get(name)
        inner = node.get(steps, []) if isinstance(node, dict) else []
        if not (node is None or isinstance(node, dict)) or not all(isinstance(step, dict) for step in inner):
            raise InputError(f"{where}: {name!r}: it has to hold objects with a 'type'; restore the model's own file")


def _check_begin(ids: list[int], vocabulary: dict[str, int], where: str) -> None:
    """A post-processor names ids itself, which no vocabulary need hold."""
    most = max(vocabulary.values())
    if len(ids) > MOST_BEGIN or not all(0 <= i <= most for i in ids):
        found = f"{len(ids)} tokens" if len(ids) > MOST_BEGIN else f"the ids {ids}"
        raise InputError(
            f"{where}: 'post_processor': it begins a sequence with {found}; allowed: at most {MOST_BEGIN}, with ids"
            f" from 0 to {most}; restore the model's own file"
        )


def _parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return node[key] if node.get("type") == "Sequence" else [node]


def _without_prepend(node: dict[str, Any] | None) -> dict[str, Any] | None:
    if node is None or _prepends(node):
        return None
    if node.get("type") != "Sequence":
        return node
    return {**node, "normalizers": [part for part in node["normalizers"] if not _prepends(part)]}


def _prepends(node: dict[str, Any]) -> bool:
    """Whether a normalizer puts something before a text: also before one that begins with a space already."""
    if node.get("type") != "Replace":
        return node.get("type") == "Prepend"
    regex, new = node["pattern"].get("Regex", ""), node["content"]
    return regex.startswith(("^", "\\A")) and new.startswith(("\u2581", " "))


def load(file: pathlib.Path) -> LibraryTokenizer:
    """The tokenizer of a tokenizer.json, with the settings beside it.

    Raises:
      InputError: not JSON, or not what the library reads.
    """
    content = content_of(file)
    settings = read_settings(file.parent, {LIBRARY: content})
    spec = json_object(file, content)
    if not isinstance(spec.get("model"), dict):
        raise InputError(f"{file}: no 'model' in it; give a tokenizer.json as the `tokenizers` library writes it")
    added = spec.get("added_tokens")
    tokens = [entry.get("content") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    check_added([token for token in tokens if isinstance(token, str)], str(file))
    return LibraryTokenizer(spec, settings, str(file))


def load_bpe(vocabulary: pathlib.Path, merges: pathlib.Path) -> LibraryTokenizer:
    """GPT-2's byte-level BPE from its two files, under either pair of names; also Qwen2's, by its tokenizer_class.

    Raises:
      InputError: a file is missing or damaged, or the class splits words by other rules.
    """
    for file, other in ((vocabulary, merges), (merges, vocabulary)):
        if not file.is_file():
            raise InputError(f"{file}: no such file; {other.name} is of no use without it: put it beside")
    ids = json_object(vocabulary, content_of(vocabulary))
    if not all(type(i) is int for i in ids.values()):
        raise InputError(f"{vocabulary}: it has to hold a JSON object from tokens to ids")
    settings = read_settings(vocabulary.parent, {file.name: content_of(file) for file in (vocabulary, merges)})
    for name, file in zip(BPE[0], (vocabulary, merges), strict=True):
        settings.files.setdefault(name, settings.files[file.name])  # the names that other readers look for
    kind = settings.options.get("tokenizer_class") or ""
    if kind not in _GPT2 + _QWEN2:
        raise InputError(f"{vocabulary}: the words of a {kind} are not known here; put the model's {LIBRARY} beside it")
    end = "<|endoftext|>"
    named = {"bos": end, "eos": end, "unk": end} if kind in _GPT2 and end in ids else {"eos": end}
    settings.tokens.update(named | settings.tokens)
    byte_level = {"add_prefix_space": bool(settings.options.get("add_prefix_space")), "trim_offsets": True}
    words: dict[str, Any] = {"type": "ByteLevel", **byte_level, "use_regex": True}
    if kind in _QWEN2:
        split = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [split, {**words, "use_regex": False}]}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if kind in _QWEN2 else None,
        "pre_tokenizer": words,
        "decoder": {"type": "ByteLevel", **byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": ids, "merges": _merges(merges)},
    }
    return LibraryTokenizer(spec, settings, str(vocabulary), begin=())


def _merges(file: pathlib.Path) -> list[list[str]]:
    found = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise InputError(f"{file}:{number}: found {line[:40]!r}; a merge is two tokens with a space between")
        found.append(pair)
    return found


def load_wordpiece(file: pathlib.Path) -> LibraryTokenizer:
    """BERT's WordPiece from vocab.txt, one token a line.

    Raises:
      InputError: one of its special tokens is not in the file.
    """
    lines = _text(file).removesuffix("\n").split("\n")
    ids = {line: i for i, line in enumerate(lines)}
    settings = read_settings(file.parent, {WORDPIECE: content_of(file)})
    standard = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    settings.tokens.update(standard | settings.tokens)
    for role in ("unk", "cls", "sep", "pad"):
        if settings.tokens[role] not in ids:
            raise InputError(
                f"{file}: no line {settings.tokens[role]!r}; add it, or name the {role}_token in tokenizer_config.json"
            )
    options = settings.options
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": options.get("tokenize_chinese_chars", True),
            "strip_accents": options.get("strip_accents"),
            "lowercase": options.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": settings.tokens["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    return LibraryTokenizer(spec, settings, str(file), begin=("cls",))


def _text(file: pathlib.Path) -> str:
    return decoded(content_of(file), file).replace("\r\n", "\n")
