"""Text to token ids and back: one interface for every tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from lfjax.config import InputError


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
        """Starts every sequence."""
        ...

    @property
    def eos_id(self) -> int:
        """Ends every complete response."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows; masked everywhere."""
        ...

    @property
    def unk_id(self) -> int:
        """What no other piece spells."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, no space put before it. Markup such as "</s>" stays plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens give none."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files from which the tokenizer is loaded again."""
        ...


def stop_ids(tokenizer: Tokenizer, texts: Sequence[str], key: str) -> tuple[int, ...]:
    """EOS and the ids of `texts`, each of which must be one token.

    Raises:
      InputError: a text is none or several tokens; names `key`, where it came from.
    """
    ids = [tokenizer.eos_id]
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
