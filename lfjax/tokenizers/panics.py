"""Panics of a library in Rust are told once, by the exception: what it prints of them itself is kept from stderr."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()
_INSIDE: set[object] = set()  # calls under way: the first catches file descriptor 2, the last gives it back
_caught: int | None = None  # an anonymous file, kept for the next time
_stderr = -1  # what descriptor 2 was
_said: list[str] = []  # the messages of panics since the first call


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what a panic prints from stderr; what else is written there meanwhile, by any thread, is passed on."""
    call, message = object(), None
    try:
        _enter(call)
        yield
    except BaseException as error:
        message = str(error) if type(error).__name__ == "PanicException" else None
        raise
    finally:
        _leave(call, message)


def _enter(call: object) -> None:
    global _caught, _stderr
    with _LOCK:
        _INSIDE.add(call)
        if len(_INSIDE) > 1:
            return
        with contextlib.suppress(OSError):  # there is no stderr, or no room for a file
            _stderr = os.dup(2)
            if _caught is None:
                _caught = _anonymous()
            os.dup2(_caught, 2)


def _leave(call: object, message: str | None) -> None:
    global _caught, _stderr
    with _LOCK:
        _INSIDE.discard(call)
        if message is not None:
            _said.append(message)
        if _INSIDE or _stderr < 0:
            return
        os.dup2(_stderr, 2)
        os.close(_stderr)
        _stderr = -1
        if _caught is not None and (size := os.lseek(_caught, 0, os.SEEK_END)):
            rest = without_panics(os.pread(_caught, size, 0), _said)
            os.close(_caught)
            _caught = None
            with contextlib.suppress(OSError):
                os.write(2, rest)
        _said.clear()


def without_panics(text: bytes, messages: list[str]) -> bytes:
    """What was written, less what Rust prints of panics with these messages."""
    for message in messages:
        said = re.escape(message.encode("utf-8", "surrogatepass"))
        head = rb"\n?thread '[^\n]*' (?:\(\d+\) )?panicked at [^\n]*\n"
        note = rb"\n(?:note: [^\n]*RUST_BACKTRACE[^\n]*\n)?"  # once in a process
        text = re.sub(head + said + note, b"", text, count=1)
    return text


def _anonymous() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
