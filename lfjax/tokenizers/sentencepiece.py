"""SentencePiece vocabularies (unigram, BPE) that keep every character: trained, saved, loaded."""

from __future__ import annotations

import functools
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from lfjax.config import InputError
from lfjax.tokenizers import trial
from lfjax.tokenizers.files import MODEL as MODEL_FILE
from lfjax.tokenizers.files import Settings, check_numbering, content_of, read_settings, special_ids

UNK, BOS, EOS, PAD = 0, 1, 2, 3
_CLASS = "PreTrainedTokenizerFast"  # transformers' own reading of a model file, whatever model it stands beside
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # protobuf: normalizer_spec { add_dummy_prefix: false }, merged into the model's


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` interface.

    decode(encode(x)) == x for models made by `train`, but for U+2581, SentencePiece's own mark for a space.
    """

    def __init__(self, model: bytes, settings: Settings | None = None, where: str = MODEL_FILE):
        self.settings = settings or Settings({MODEL_FILE: model})
        self._first, self._inner = _processor(model), _processor(model + _NO_DUMMY_PREFIX)
        own, options = self._first, self.settings.options
        pieces = {own.IdToPiece(i): i for i in range(own.vocab_size())}
        added = {token: new.id for token, new in self.settings.added.items() if new.id >= len(pieces)}
        special = {token: new.id for token, new in self.settings.added.items() if new.special}
        special |= {token: i for token in self.settings.special if (i := pieces.get(token)) is not None}
        self.specials = {piece: i for piece, i in pieces.items() if own.IsControl(i)} | special
        ids = {"bos": own.bos_id(), "eos": own.eos_id(), "pad": own.pad_id()}
        found = special_ids(self.settings, pieces | added, ids, where)
        self.bos_id, self.eos_id, self.eos_ids, self.pad_id = found
        self.unk_id: int = own.unk_id()
        self.names = {f"{role}_token": own.IdToPiece(i) for role, i in ids.items() if i >= 0} | self.settings.names
        self.vocab_size: int = max(len(pieces) - 1, *added.values(), self.pad_id) + 1
        check_numbering(self.vocab_size, len(pieces) + len(added), where)
        self._starts = own.bos_id() >= 0 and bool(options.get("add_bos_token", True))
        self._segments_first = bool(options.get("legacy", options.get("tokenizer_class", _CLASS) == _CLASS))
        self._silent = {self.bos_id, self.pad_id, *self.eos_ids, *special.values()}
        self._added = {i: token for token, i in added.items()}
        flags = self.settings.flags | {token: new.flags for token, new in self.settings.added.items() if new.flags}
        self._plain = _splitter(added.keys() - special.keys(), flags)
        self._flags = flags
        self._after_spaces = {token for token, said in flags.items() if said.get("lstrip")}
        self._ids = self.specials | added
        # what a match is of that took the space behind it
        self._bare = {token.strip(): token for token in self._ids} | {token: token for token in self._ids}

    @functools.cached_property
    def _marked(self) -> re.Pattern[str] | None:
        return _splitter(self._ids, self._flags)

    @property
    def template(self) -> tuple[str, str] | None:
        """The chat template and where it is from."""
        return self.settings.template

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of the text alone; see `Tokenizer.encode`."""
        return self._split(text, self._plain, first)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence; see `Tokenizer.encode_prompt`."""
        return ([self.bos_id] if self._starts else []) + self.encode(text, first=True) or [self.bos_id]

    def encode_markup(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a text whose special tokens are meant; see `Tokenizer.encode_markup`."""
        return self._split(text, self._marked, first, self._segments_first)

    def _split(self, text: str, marks: re.Pattern[str] | None, first: bool, every: bool = False) -> list[int]:
        """Ids of the stretches between `marks`, and of these; a stretch is a first word at the text's start, or all."""
        ids: list[int] = []
        parts = marks.split(text) if marks else [text]
        parts[1::2] = [part if part in self._ids else self._bare[part.strip()] for part in parts[1::2]]
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._ids[part])
                continue
            if self._after_spaces.intersection(parts[index + 1 : index + 2]):
                part = part.rstrip()
            if part:
                ids += (self._first if (first and index == 0) or every else self._inner).Encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        processor = self._first if len(ids) and ids[0] == self.bos_id else self._inner
        texts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i in self._added and i not in self._silent:
                texts += [processor.Decode(run), self._added[i]]
                run, processor = [], self._inner
            elif i not in self._silent and i < self._first.vocab_size():
                run.append(i)
        return "".join([*texts, processor.Decode(run)])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, to show."""
        size = self._first.vocab_size()
        return [self._first.IdToPiece(i) if i < size else self._added.get(i, "") for i in map(int, ids)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes FOLDER/tokenizer.model and what stood beside it, each in place of an older one when it is whole.

        Readers that do not go by the model file find its special tokens, and whether BOS begins a sequence, in
        tokenizer_config.json.
        """
        said = self.settings.options | {f"{role}_token": token for role, token in self.settings.tokens.items()}
        self.settings.save(folder, {key: value for key, value in self._described.items() if key not in said})

    @property
    def _described(self) -> dict[str, Any]:
        """What tokenizer_config.json says of the model file."""
        own = self._first
        ids = {"bos": own.bos_id(), "eos": own.eos_id(), "unk": own.unk_id(), "pad": own.pad_id()}
        tokens = {f"{role}_token": own.IdToPiece(i) for role, i in ids.items() if i >= 0}
        return {"tokenizer_class": _CLASS, "add_bos_token": self._starts, **tokens}


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _splitter(tokens: Iterable[str], flags: dict[str, dict[str, bool]]) -> re.Pattern[str] | None:
    """Splits a text at the tokens, the longest first, and keeps them; None where there are none.

    A token takes the space behind it, or is a word of its own, where its flags say so. That before it is taken off by
    who calls: here a run of spaces would be gone over from each of them.
    """

    def found(token: str) -> str:
        said = flags.get(token, {})
        alone = (r"(?<!\w)", r"(?!\w)") if said.get("single_word") else ("", "")
        return alone[0] + re.escape(token) + alone[1] + (r"\s*" if said.get("rstrip") else "")

    longest = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(found, longest))})") if longest else None


def train(
    texts: Iterable[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    num_threads: int = 1,
) -> SentencePieceTokenizer:
    """Learns a vocabulary from texts; the same texts and arguments give the same file, byte for byte.

    Nothing is normalised away: case, spaces, tabs and newlines stay, bytes stand in for rare characters.

    Args:
      texts: the training texts, each a document; empty ones do not count.
      folder: where tokenizer.model is saved; None saves nothing.
      vocab_size: pieces, with the 4 specials (unk 0, bos 1, eos 2, pad 3) and the 256 bytes.
      model_type: "unigram" or "bpe".
      num_threads: part of the result (sums over threads are rounded), so it is fixed and not the machine's count.
    Raises:
      InputError: an unknown model_type, no text, or a vocab_size that these texts cannot fill or that is too small.
    """
    if model_type not in ("unigram", "bpe"):
        raise InputError(f"tokenizer.model_type: found {model_type!r}; allowed: unigram | bpe")
    sentences = [text for text in texts if text]
    if not sentences:
        raise InputError("config.data.path: no text to learn a vocabulary from; the training split is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            num_threads=num_threads,
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(_vocabulary_error(str(error), vocab_size)) from None
    trial.made_here("sentencepiece", model.getvalue())
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _vocabulary_error(message: str, vocab_size: int) -> str:
    at_most = re.search(r"<= (\d+)", message)
    if at_most:
        return f"config.tokenizer.vocab_size: found {vocab_size}; these texts fill at most {at_most[1]}"
    at_least = re.search(r"smaller than required_chars\.?\D*\d+ vs (\d+)", message)
    if at_least:
        return f"config.tokenizer.vocab_size: found {vocab_size}; these texts need at least {at_least[1]} pieces"
    return f"tokenizer: sentencepiece could not learn {vocab_size} pieces: {' '.join(message.split())}"


def load(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """The tokenizer of a folder that holds tokenizer.model, with the settings beside it, or of a model file.

    Raises:
      InputError: nothing there, or not a SentencePiece model.
    """
    path = pathlib.Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; the tokenizer stage writes it, or give a SentencePiece model")
    model = content_of(file)
    trial.check("sentencepiece", model, str(file))
    settings = read_settings(file.parent, {MODEL_FILE: model}) if file.name == MODEL_FILE else None
    return SentencePieceTokenizer(model, settings, str(file))
