"""A vocabulary is tried in a bounded child before this process loads it: the libraries that read them can be made to
panic, to crash, or to take memory and time without end.

Each is tried once: what held is kept, by its sha256, in the cache folder.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
from typing import Literal

from lfjax import cache, files
from lfjax.bounded import PROGRAM, Breach, Child
from lfjax.config import InputError

SECONDS_A_CHARACTER = 1e-3  # of a text
SECONDS, SECONDS_A_MEGABYTE = 4.0, 0.5  # of a vocabulary, to load and try it
_KEPT = "vocabularies"  # in the cache folder
_CHILD = Child(memory=2 << 30)
_HELD: set[str] = set()  # sha256 of what held, or was made here


def check(library: Literal["tokenizers", "sentencepiece"], vocabulary: bytes, where: str) -> None:
    """Tries a vocabulary, unless it has held before.

    Args:
      vocabulary: a tokenizer.json or a SentencePiece model.
      where: the name of its file, for the error.
    Raises:
      InputError: the library refuses it, ends its process, takes more time or memory than the largest published ones
        need (4 s and half a second a megabyte; 2 GB), a text takes more than 1 ms a character, or becomes more than 20
        times as long.
    """
    digest = _digest(library, vocabulary)
    if digest in _HELD:
        return
    kept = cache.location() / _KEPT / digest
    trusted = not cache.exposure(cache.location(), _KEPT)
    if trusted and kept.exists():
        _HELD.add(digest)
        return
    content = vocabulary.decode() if library == "tokenizers" else base64.b64encode(vocabulary).decode()
    try:
        seconds = round(SECONDS + SECONDS_A_MEGABYTE * len(vocabulary) / 1e6, 1)
        found = _CHILD.ask({"library": library, "vocabulary": content}, seconds=seconds)
    except Breach as breach:
        kind = {"tokenizers": "what `tokenizers` reads", "sentencepiece": "a SentencePiece model"}[library]
        raise InputError(f"{where}: not {kind}: on trial it {breach}; restore the model's own file") from None
    if found["seconds"] > SECONDS_A_CHARACTER:
        slow = f"{found['seconds'] * 1e3:.1f} ms a character of {found['text']!r}"
        raise InputError(f"{where}: encoding takes {slow}..., at most 1 is allowed; restore the model's own file")
    _HELD.add(digest)
    if trusted:
        with contextlib.suppress(OSError, InputError):
            cache.make(kept.parent)
            files.write_bytes(kept, b"")


def made_here(library: str, vocabulary: bytes) -> None:
    """Says that this process made the vocabulary itself: it is not tried."""
    _HELD.add(_digest(library, vocabulary))


def _digest(library: str, vocabulary: bytes) -> str:
    version = importlib.metadata.version(library)
    return hashlib.sha256(f"{library} {version} {_trial()}\n".encode() + vocabulary).hexdigest()


@functools.cache
def _trial() -> str:
    """What the trial is: what held in another one is tried again."""
    return hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
