"""Rows of data sets for TRL -> records; JSON lines, a JSON array or Parquet.

Source: TRL's page "Dataset formats and types": language modeling, prompt-only, prompt-completion, preference (also with
the prompt inside `chosen` and `rejected`) and unpaired preference, each as plain text or as chat messages.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfjax import files
from lfjax.config import InputError
from lfjax.records import json_lines

FIELDS = ("prompt", "completion", "label", "chosen", "rejected", "messages", "text")
MOST_MESSAGES = 1000  # each answer's record holds all before it
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system", "function": "tool"}


class LeftOut(Exception):
    """A row that is whole, but no record can be made of it; the message is the reason."""


def trl(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of one row; `messages` give one for each answer in them, with all that stands before it as prompt.

    `label` (true is good) becomes a label, `chosen` and `rejected` a preference, a completion or an answer without them
    a response to learn, a prompt alone a prompt. What else the row holds is kept.

    Raises:
      LeftOut: no record can be made of it.
    """
    kept = {name: files.plain(value) for name, value in row.items() if name not in FIELDS and value is not None}
    if "chosen" in row and "rejected" in row:
        prompt, answers = _pair(row.get("prompt"), row["chosen"], row["rejected"])
        preference = {"kind": "preference", "chosen": 0, "rejected": 1}
        yield {**kept, "prompt": prompt, "responses": answers, "feedback": [preference]}
    elif row.get("completion") is not None:
        prompt, answer = _answer(_begin(row.get("prompt")), row["completion"])
        label = row.get("label")
        entries = [] if label is None else [{"kind": "label", "response": 0, "value": _label(label)}]
        yield {**kept, "prompt": prompt, "responses": [answer], "feedback": entries}
    elif row.get("messages") is not None:
        yield from _turns(_messages(row["messages"]), kept)
    elif row.get("text"):
        yield {**kept, "prompt": "", "responses": [_text(row["text"])], "feedback": []}
    elif row.get("prompt"):
        yield {**kept, "prompt": _begin(row["prompt"])}
    else:
        raise LeftOut(f"none of {', '.join(FIELDS)} in it")


def _turns(messages: list[dict[str, Any]], kept: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if len(messages) > MOST_MESSAGES:
        raise LeftOut(f"more than {MOST_MESSAGES} messages")
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    if not places:
        raise LeftOut("no answer in its messages")
    for number, place in enumerate(places):
        name = {"id": f"{kept['id']}-{number}"} if len(places) > 1 and "id" in kept else {}
        prompt = messages[:place] or ""
        yield {**kept, **name, "prompt": prompt, "responses": [messages[place]["content"]], "feedback": []}


def _pair(prompt: Any, chosen: Any, rejected: Any) -> tuple[str | list, list[str]]:
    """(prompt, the two answers)."""
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start, answers = _common(chosen, rejected)
    else:
        begun = _begin("" if prompt is None else prompt)
        (start, first), (other, second) = _answer(begun, chosen), _answer(begun, rejected)
        if start != other:
            raise LeftOut("the two conversations differ before their last message")
        answers = [first, second]
    if answers[0] == answers[1]:
        raise LeftOut("the two answers are the same")
    if not all(answer.strip() for answer in answers):
        raise LeftOut("an answer is empty")
    return start, answers


def _common(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """(what both begin with up to a whole word, the rests): the prompt that two texts hold, as TRL takes it out."""
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, (chosen, rejected)))
    )
    end = max((found.end() for found in re.finditer(r"\s+", chosen[:end])), default=0)
    end -= chosen[:end].endswith(" ")  # a space belongs to the word behind it
    return chosen[:end], [chosen[end:], rejected[end:]]


def _answer(prompt: str | list, completion: Any) -> tuple[str | list, str]:
    """(the prompt with all messages of the completion but the last, the last one's text)."""
    if isinstance(completion, str):
        return prompt, _text(completion)
    messages = [*(prompt if isinstance(prompt, list) else []), *_messages(completion)]
    if not messages or messages[-1]["role"] != "assistant":
        raise LeftOut("the last message is no answer of the assistant's")
    if isinstance(prompt, str) and prompt:
        raise LeftOut("a prompt in plain text with a completion in messages")
    return messages[:-1] or "", messages[-1]["content"]


def _begin(prompt: Any) -> str | list:
    return "" if prompt is None else _text(prompt) if isinstance(prompt, str) else _messages(prompt) or ""


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise LeftOut("neither a text nor a list of messages")
    found = []
    for message in value:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise LeftOut("a message without a role")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, as of models that see
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
        if not isinstance(content, str):
            raise LeftOut("a message that holds something else than text (an image, a call of a tool)")
        found.append({"role": ROLES.get(role, role), "content": _text(content)})
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise LeftOut("a text that is none")
    return value


def _label(value: Any) -> bool:
    if value not in (0, 1):
        raise LeftOut("a label that is neither true nor false")
    return bool(value)


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of a file of JSON lines, a JSON array or Parquet. Raises InputError."""
    start = b""
    if path.is_file():
        with files.open_regular(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"PAR1"):
        yield from _parquet(path)
    elif re.match(rb"\[\s*[{\]]", start):
        array = files.read_json(path, list, fix="give JSON lines, which may be longer, a JSON array or Parquet")
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(array, 1))
    else:
        yield from json_lines(path)


ROWS = 16  # of Parquet, read at a time: one may be large


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path}: Parquet, which pyarrow reads; pip install pyarrow, or write the rows as JSON lines")
    import pyarrow
    import pyarrow.parquet

    number = unpacked = 0
    most = max(2 * files.MOST_BYTES, files.MOST_RATIO * path.stat().st_size)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS):
            unpacked += batch.nbytes
            if unpacked > most:
                raise InputError(f"{path}: Parquet that unpacks to more than {files.MOST_RATIO} times its size")
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged Parquet: {' '.join(str(error).split())[:200]}; restore the file") from None
