"""What stands beside a vocabulary: which tokens begin, end and pad a sequence, added tokens, the chat template."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Collection, Container
from typing import Any, NamedTuple

from lfjax.config import InputError
from lfjax.files import decoded, inside, parse_json, read_bytes, write_bytes

MODEL, LIBRARY = "tokenizer.model", "tokenizer.json"
BPE = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the second pair is GPT-2's as published
WORDPIECE = "vocab.txt"
MOST_BYTES = 128 * 2**20  # of a vocabulary's file, and of all that stands beside it
MOST_ADDED, MOST_ADDED_CHARACTERS = 100_000, 4_000_000  # beyond the vocabulary file; models of speech have 70,000
MOST_TOKEN = 500  # characters of one of them
MOST_ENDS = 1000  # ids that end a response
MOST_HOLES = 100_000  # ids without a token, beside as many as there are tokens
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder: further chat templates by name
KINDS = (LIBRARY, MODEL, *BPE[0], *BPE[1], WORDPIECE)  # the first of them that a folder holds is read
VOCABULARIES = (*KINDS, "tekken.json")
# Every file that stands for a tokenizer, and is written again as it was.
NAMES = (*VOCABULARIES, *SETTINGS)

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # new ones get ids in this order, as in transformers
_FURTHER = ("additional_special_tokens", "extra_special_tokens")  # before transformers 5, and since
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|fim_pad|>")
_UNUSED = re.compile(r"[<\[]\|?(?:.*reserved.*|unused_?\d+|extra_id_\d+|.*dummy.*)\|?[>\]]", re.IGNORECASE)
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_NEVER_UTF8 = (
    ("<0xFF>", "<0xFE>"),
    ("ÿ", "þ"),
)  # bytes that no UTF-8 text holds: as fallback pieces, as GPT-2 spells them


class Added(NamedTuple):
    """A token beyond the vocabulary file: its id, and its flags as tokenizers.AddedToken takes them."""

    id: int
    special: bool
    flags: dict[str, bool] | None = None  # None: the file says nothing but the id


@dataclasses.dataclass(frozen=True)
class Settings:
    """The files of one tokenizer and what they say.

    Attributes:
      files: name -> bytes, as read; `save` writes them again.
      tokens: role ("bos", "eos", ...) -> token; None where a file says that there is none.
      further: what else is named as special (`additional_special_tokens`), in order.
      flags: of named tokens, as tokenizers.AddedToken takes them, where a file gives them.
      added: tokens beyond the vocabulary file, in the order of ids.
      ids: role -> id by config.json, for roles that no token is named for.
      ends: ids that end a response by generation_config.json or config.json.
      template: the chat template and the file it is from; None where there is none.
      options: tokenizer_config.json.
    """

    files: dict[str, bytes]
    tokens: dict[str, str | None] = dataclasses.field(default_factory=dict)
    further: tuple[str, ...] = ()
    flags: dict[str, dict[str, bool]] = dataclasses.field(default_factory=dict)
    added: dict[str, Added] = dataclasses.field(default_factory=dict)
    ids: dict[str, int] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()
    template: tuple[str, str] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """The named tokens as chat templates call them: {"bos_token": ...}."""
        return {f"{role}_token": token for role, token in self.tokens.items() if token}

    @property
    def special(self) -> tuple[str, ...]:
        """Every token that is named as special."""
        return tuple(dict.fromkeys([*filter(None, self.tokens.values()), *self.further]))

    def save(self, folder: str | os.PathLike[str], missing: dict[str, Any] | None = None) -> None:
        """Writes the files; `missing` are keys that tokenizer_config.json has to hold as well."""
        write(pathlib.Path(folder), self.files | with_keys(self.files, missing or {}))


def with_keys(files: dict[str, bytes], keys: dict[str, Any]) -> dict[str, bytes]:
    """The settings files that have to say something else for tokenizer_config.json to hold `keys`; {} where it does.

    special_tokens_map.json is among them where it names one of the tokens: some readers go by it.
    """
    changed: dict[str, bytes] = {}
    for name in SETTINGS[:2]:
        held = json_object(pathlib.Path(name), files.get(name))
        new = keys if name == SETTINGS[0] else {key: _untyped(value) for key, value in keys.items() if key in held}
        if held | new != held:
            changed[name] = (json.dumps(held | new, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _untyped(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "__type"} if isinstance(value, dict) else value


def write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    """Writes the files, each in place of an older one only when it is whole; a failure leaves nothing."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)


def pad_token(token: str, vocabulary: Container[str]) -> Any:
    """How tokenizer_config.json names the pad token: by its text, a new text where it has none ("").

    A byte that GPT-2 spells as a letter is said to be a word of its own: readers look for special tokens in the text
    itself, where the letter may stand.
    """
    if token in _NEVER_UTF8[1]:
        flags = {flag: flag == "single_word" for flag in _FLAGS}
        return {"__type": "AddedToken", "content": token, **flags, "special": True}
    return token or next(new for new in _PADS if new not in vocabulary)


def read_settings(folder: pathlib.Path, vocabulary: dict[str, bytes]) -> Settings:
    """The settings in a folder, for the vocabulary files already read from it (name -> bytes).

    Files of later kinds are the same vocabulary for other readers, and are kept; an earlier one would be read instead.

    Raises:
      InputError: a file is not JSON, or a key does not hold what it may; names both.
    """
    files, room = dict(vocabulary), MOST_BYTES
    later = VOCABULARIES[max(map(VOCABULARIES.index, vocabulary)) + 1 :]
    beside = [name for name in (*later, *SETTINGS) if present(folder / name)]
    for name in (*beside, *(f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja")))):
        files[name] = content_of(inside(folder, name))
        room -= len(files[name])
        if room < 0:
            raise InputError(f"{folder / name}: with it more than 128 MB stand beside the vocabulary; take some out")
    own, named, added, generation = (
        json_object(folder / name, files.get(name)) for name in (*SETTINGS[:3], SETTINGS[4])
    )
    config = folder / "config.json"
    model = json_object(config, content_of(config) if present(config) else None)
    tokens: dict[str, str | None] = {}
    further: list[str] = []
    flags: dict[str, dict[str, bool]] = {}
    sources = [(named, folder / SETTINGS[1]), (own, folder / SETTINGS[0])]  # the second wins
    for data, file in sources if "added_tokens_decoder" in own else reversed(sources):  # as in transformers
        for role in ROLES:
            if f"{role}_token" in data:
                tokens[role] = _token(data[f"{role}_token"], file, f"{role}_token", flags)
        for key in _FURTHER:
            further += _tokens(data.get(key), file, key, flags)
    tokens = {role: tokens[role] for role in ROLES if role in tokens}
    ids = {role: _ids(model, f"{role}_token_id", config)[:1] for role in ("bos", "eos", "pad")}
    ends = _ids(generation, "eos_token_id", folder / SETTINGS[4]) or _ids(model, "eos_token_id", config)
    check_added(added, str(folder / SETTINGS[2]))
    more = _added(own, added, folder, {*tokens.values(), *further})
    every = {*filter(None, tokens.values()), *further, *more}
    check_added(every, f"{folder}: its settings ({SETTINGS[0]} and others)")
    return Settings(
        files,
        tokens,
        tuple(dict.fromkeys(further)),
        flags,
        more,
        {role: found[0] for role, found in ids.items() if found},
        ends,
        _template(folder, files, own),
        own,
    )


def present(file: pathlib.Path) -> bool:
    """Whether a file that may be left out is there; raises InputError where something else has its name.

    So it does where it is a link that leads out of its folder.
    """
    inside(file.parent, file.name)
    if not file.is_file() and os.path.lexists(file):
        raise InputError(f"{file}: a folder, or a link that leads to no file; remove it or put the file there")
    return file.is_file()


def content_of(file: pathlib.Path) -> bytes:
    """A file of a tokenizer's; the largest published ones have half of what is allowed."""
    return read_bytes(file, most=MOST_BYTES)


def json_object(file: pathlib.Path, content: bytes | None) -> dict[str, Any]:
    """What a JSON file holds; {} where there is none (None)."""
    return {} if content is None else parse_json(content, file, dict)


def _token(value: Any, file: pathlib.Path, key: str, flags: dict[str, dict[str, bool]]) -> str | None:
    """The token's text; where the file says more of it, that goes into `flags`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise InputError(f"{file}: {key!r}: found {json.dumps(value)[:60]}; allowed: a token's text, or null")
    if text and isinstance(value, dict):
        flags[text] = _flags_of(value, f"{file}: {key!r}")
    return text or None


def _tokens(value: Any, file: pathlib.Path, key: str, flags: dict[str, dict[str, bool]]) -> list[str]:
    """The tokens of a list, or of an object that gives each a name."""
    given = list(value.values()) if isinstance(value, dict) else [] if value is None else value
    if not isinstance(given, list):
        raise InputError(f"{file}: {key!r}: found {json.dumps(value)[:60]}; allowed: a list of tokens, or null")
    return [token for entry in given if (token := _token(entry, file, key, flags))]


def _flags_of(entry: dict[str, Any], where: str) -> dict[str, bool]:
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{where}: {flag!r}: found {json.dumps(value)[:60]}; allowed: true, false")
    return flags


def _ids(data: dict[str, Any], key: str, file: pathlib.Path) -> tuple[int, ...]:
    """One id, several, or none."""
    value = data.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i < 2**31 for i in found):
        raise InputError(
            f"{file}: {key!r}: found {json.dumps(value)[:60]}; allowed: an id below 2^31, a list of ids, or null"
        )
    if len(found) > MOST_ENDS:
        raise InputError(f"{file}: {key!r}: found {len(found)} ids; allowed: at most {MOST_ENDS}; take some out")
    return tuple(i for i in found if i >= 0)


def _added(
    own: dict[str, Any], older: dict[str, Any], folder: pathlib.Path, named: set[str | None]
) -> dict[str, Added]:
    found: dict[str, Added] = {}
    for token, place in older.items():
        if type(place) is not int:
            raise InputError(f"{folder / SETTINGS[2]}: {token!r}: found {json.dumps(place)[:60]}; allowed: an id")
        found[token] = Added(place, token in named)
    where, entries = f"{folder / SETTINGS[0]}: 'added_tokens_decoder'", own.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise InputError(f"{where}: found {json.dumps(entries)[:60]}; allowed: an object from ids to tokens")
    for place, entry in entries.items():
        token = entry.get("content") if isinstance(entry, dict) else None
        if not place.isdecimal() or len(place) > 9 or not isinstance(token, str):
            raise InputError(f"{where}: {place!r}: not an id with a token")
        flags = _flags_of(entry, f"{where}: {place!r}")
        found[token] = Added(int(place), bool(entry.get("special")) or token in named, flags)
    return dict(sorted(found.items(), key=lambda item: item[1].id))


def check_added(added: Collection[str], where: str) -> None:
    """What is looked for in every text is bounded: InputError names what is beyond."""
    length, total = max(map(len, added), default=0), sum(map(len, added))
    where = f"{where}: added tokens"
    if length > MOST_TOKEN:
        raise InputError(f"{where}: found one of {length} characters, at most {MOST_TOKEN} are allowed; take it out")
    if len(added) > MOST_ADDED or total > MOST_ADDED_CHARACTERS:
        found = f"{len(added)} of {total} characters"
        allowed = f"at most {MOST_ADDED} of {MOST_ADDED_CHARACTERS} are allowed"
        raise InputError(f"{where}: found {found}, {allowed}; put them into the vocabulary itself")


def check_numbering(size: int, count: int, where: str) -> None:
    """Raises InputError where the ids of `count` tokens go up to `size` - 1, far beyond: models have a row for each."""
    if size > 2 * count + MOST_HOLES:
        raise InputError(f"{where}: found the id {size - 1} among {count} tokens; number them")


def _template(folder: pathlib.Path, files: dict[str, bytes], own: dict[str, Any]) -> tuple[str, str] | None:
    """The chat template: a file of its own, else a key; where several are named, the default one."""
    if SETTINGS[3] in files:
        return decoded(files[SETTINGS[3]], folder / SETTINGS[3]), str(folder / SETTINGS[3])
    where, template = f"{folder / SETTINGS[0]}: 'chat_template'", own.get("chat_template")
    if isinstance(template, list):
        named = [
            entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = named[-1] if named else None
    if template is not None and not isinstance(template, str):
        raise InputError(f"{where}: found {type(template).__name__}; allowed: a Jinja template, or several with names")
    return (template, where) if template else None


class Special(NamedTuple):
    """The ids that begin, end and pad sequences."""

    bos_id: int
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int


def special_ids(settings: Settings, vocabulary: dict[str, int], own: dict[str, int], where: str) -> Special:
    """Who says what: the named tokens first, then the vocabulary itself (`own`: role -> id), then config.json.

    Without BOS, EOS stands in for it. A missing pad token, or one that is EOS, gets an id that no text makes, or a new
    one after the last.

    Raises:
      InputError: nothing says what ends a text.
    """

    def find(*roles: str) -> int | None:
        for role in roles:
            for found in (vocabulary.get(settings.tokens.get(role) or ""), own.get(role, -1), settings.ids.get(role)):
                if found is not None and found >= 0:
                    return found
        return None

    eos = find("eos", "sep")
    if eos is None:
        eos = next((vocabulary[token] for token in _ENDS if token in vocabulary), None)
    if eos is None:
        raise InputError(
            f"{where}: no token that ends a text; name one: 'eos_token' in tokenizer_config.json beside it"
        )
    ends = tuple(dict.fromkeys((eos, *settings.ends)))
    bos, pad = find("bos", "cls"), find("pad")
    if max(eos, -1 if bos is None else bos) > (most := max(vocabulary.values())):
        found = f"{bos} and {eos}, which begin and end a text, are not ids of this vocabulary, 0 to {most}"
        raise InputError(f"{where}: {found}; mend bos_token_id and eos_token_id in config.json beside it")
    if pad is None or pad == eos:
        pad = unused_id(vocabulary, set(ends))
    return Special(eos if bos is None else bos, eos, ends, max(vocabulary.values()) + 1 if pad is None else pad)


def unused_id(vocabulary: dict[str, int], ends: set[int]) -> int | None:
    """An id to pad with that no text makes: a token made for it, a reserved one, or a byte that no UTF-8 text has.

    Never one of `ends`: who takes EOS for padding, as other tools do, learns from no real one. None: all are in use.
    """
    reserved = sorted((i, token) for token, i in vocabulary.items() if _UNUSED.fullmatch(token))
    candidates = [*_PADS, *(token for _, token in reserved), *_NEVER_UTF8[0]]
    if {"Ā", "Ċ", "Ġ", "ÿ"} <= vocabulary.keys():  # bytes 0, 10, 32 and 255, spelt as GPT-2 does
        candidates += _NEVER_UTF8[1]
    return next(
        (vocabulary[token] for token in candidates if token in vocabulary and vocabulary[token] not in ends), None
    )
