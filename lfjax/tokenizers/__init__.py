"""Text to token ids and back: one interface for every tokenizer."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from lfjax.config import InputError
from lfjax.files import inside
from lfjax.tokenizers import chat, huggingface, sentencepiece
from lfjax.tokenizers.files import (
    BPE,
    KINDS,
    NAMES,
    SETTINGS,
    TEMPLATES,
    content_of,
    pad_token,
    present,
    with_keys,
    write,
)

__all__ = [
    "NAMES",
    "TEMPLATES",
    "Tokenizer",
    "add_keys",
    "find",
    "least_rows",
    "load",
    "name_pad",
    "response_text",
    "stop_ids",
]


class Tokenizer(Protocol):
    """What data, sampling and rewards need of a tokenizer.

    `pad_id` differs from `eos_id`, so that a mask never has to guess which EOS is real.
    """

    @property
    def vocab_size(self) -> int:
        """How many ids there are, specials included."""
        ...

    @property
    def bos_id(self) -> int:
        """Starts a sequence; EOS where the vocabulary has no BOS."""
        ...

    @property
    def eos_id(self) -> int:
        """Ends every complete response."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """`eos_id`, then what else ends a response (generation_config.json)."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows; masked everywhere."""
        ...

    @property
    def unk_id(self) -> int:
        """What no other piece spells; `pad_id` where every text can be spelt."""
        ...

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens, as markup spells them."""
        ...

    @property
    def names(self) -> dict[str, str]:
        """What a chat template knows of it: {"bos_token": its text, ...}, without those that it has not."""
        ...

    @property
    def template(self) -> tuple[str, str] | None:
        """The chat template (`lfjax.tokenizers.chat`), and where it is from; None where there is none."""
        ...

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of the text alone: no BOS, no EOS. Markup such as "</s>" stays plain text.

        No space is put before it, but where it is the `first` of a sequence and the vocabulary does so.
        """
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids that begin a sequence: BOS, where the model's sequences begin so, and the text as `first`; at least one.

        An empty text is `bos_id` alone.
        """
        ...

    def encode_markup(self, text: str, *, first: bool = False) -> list[int]:
        """As `encode`, but a special token in the text becomes its id: for what a chat template has written."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens give none.

        The space that `encode(first=True)` puts is taken off where the ids begin with BOS.
        """
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files from which the tokenizer is loaded again, as they were read.

        Of a SentencePiece model tokenizer_config.json gets what the model file alone says.
        """
        ...


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder, or of a file: SentencePiece, tokenizer.json, GPT-2's BPE files or WordPiece.

    Of several kinds in a folder the first of tokenizer.json, tokenizer.model, vocab.json with merges.txt, encoder.json
    with vocab.bpe, vocab.txt is read.

    Raises:
      InputError: nothing there, or a damaged file; names it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = find(path)
        if found is None:
            raise InputError(f"{path}: no such file in it: {', '.join(KINDS)}; give a folder with a tokenizer")
        return found
    if not path.is_file():
        raise InputError(
            f"{path}: no such file or folder; give a folder with a tokenizer, or one of {', '.join(KINDS)}"
        )
    for pair in BPE:
        if path.name in pair:
            return huggingface.load_bpe(*(path if name == path.name else inside(path.parent, name) for name in pair))
    readers = {".json": huggingface.load, ".txt": huggingface.load_wordpiece}
    return readers.get(path.suffix, sentencepiece.load)(path)


def find(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """As `load`, of a folder; None where it holds no tokenizer."""
    folder = pathlib.Path(folder)
    for kind in KINDS:
        if present(folder / kind):
            return load(folder / kind)
    return None


def least_rows(tokenizer: Tokenizer) -> int:
    """Rows that a model needs for what the tokenizer writes: `vocab_size`, without the pad id where it is the last.

    A pad token that was added to a vocabulary has no row in the model. It only fills rows, and is masked: models take
    their last row for an id beyond it, losses their last column.
    """
    spare = tokenizer.pad_id == tokenizer.vocab_size - 1 and tokenizer.pad_id != tokenizer.bos_id
    return tokenizer.vocab_size - spare


def name_pad(folder: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """Makes the files that the tokenizer has saved in a folder name `pad_id` as the pad token, where they do not.

    The ids that end a text are never padding to lfjax: of a vocabulary whose files name none, or EOS, others would
    not know which id the model's config.json means.
    """
    folder, (piece,) = pathlib.Path(folder), tokenizer.pieces([tokenizer.pad_id])
    if piece and tokenizer.names.get("pad_token") == piece:
        return
    pieces = set(tokenizer.pieces(range(tokenizer.vocab_size)))
    add_keys(folder, {"pad_token": pad_token(piece, pieces)})


def add_keys(folder: str | os.PathLike[str], keys: dict[str, Any]) -> None:
    """Makes tokenizer_config.json of a folder hold these keys (see `files.with_keys`)."""
    folder = pathlib.Path(folder)
    files = {name: content_of(folder / name) for name in SETTINGS[:2] if present(folder / name)}
    write(folder, with_keys(files, keys))


def stop_ids(tokenizer: Tokenizer, texts: Sequence[str], key: str) -> tuple[int, ...]:
    """What ends a response of the tokenizer, EOS first, and the ids of `texts`, each of which must be one token.

    Raises:
      InputError: a text is none or several tokens; names `key`, where it came from.
    """
    ids = [*tokenizer.eos_ids, chat.end_id(tokenizer)]
    for text in texts:
        found = tokenizer.encode(text)
        if len(found) != 1:
            raise InputError(f"{key}: {text!r} is {len(found)} tokens of this vocabulary; name a text of one token")
        ids += found
    return tuple(dict.fromkeys(ids))


def response_text(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> str:
    """decode(prompt + response) minus decode(prompt): what the response adds, in its context.

    A prompt that ends inside a character of several bytes decodes to a replacement mark; the finished character then
    belongs to the response.
    """
    before = tokenizer.decode(prompt).rstrip("\ufffd")
    return tokenizer.decode([*prompt, *response])[len(before) :]
