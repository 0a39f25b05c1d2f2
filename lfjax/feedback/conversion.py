"""Feedback as others have it -> records. One function a format, from a row to a record's JSON object."""

from __future__ import annotations

import collections
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lfjax.config import InputError
from lfjax.feedback import table, trl
from lfjax.feedback.trl import LeftOut
from lfjax.files import Faults
from lfjax.records import Record, json_lines, parse_record

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(row: dict[str, str]) -> dict[str, Any]:
    """Anthropic's helpful and harmless pairs: `chosen` and `rejected`, dialogues with "\\\n\\\nHuman:" and so on.

    Both begin with the same turns, the prompt, and end in two answers, a preference. Chat templates ask for speakers
    that take turns: two turns running of one speaker in the prompt become one, with a blank line between.
    Source: Bai et al. 2022, arXiv:2204.05862.
    """
    chosen, rejected = (_dialogue(row[name]) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut("the two dialogues differ before their last turn")
    answers = [turns[-1]["content"] for turns in (chosen, rejected)]
    if any(turns[-1]["role"] != "assistant" for turns in (chosen, rejected)) or not all(answers):
        raise LeftOut("a dialogue does not end in an answer")
    if answers[0] == answers[1]:
        raise LeftOut("the two answers are the same")
    prompt = _in_turns(chosen[:-1])
    if prompt[0]["role"] != "user" or prompt[-1]["role"] != "user":
        raise LeftOut("the prompt does not begin and end with the human")
    preference = {"kind": "preference", "chosen": 0, "rejected": 1}
    return {"prompt": prompt, "responses": answers, "feedback": [preference]}


def _dialogue(text: str) -> list[dict[str, str]]:
    start, *parts = _TURN.split(text)
    if start.strip() or len(parts) < 4:
        raise LeftOut("not a dialogue of a human and an assistant")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in pairs]


def _in_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with what a speaker says in several running as one."""
    turns = itertools.groupby(messages, key=lambda message: message["role"])
    said = ((role, filter(None, (message["content"] for message in turn))) for role, turn in turns)
    return [{"role": role, "content": "\n\n".join(contents)} for role, contents in said]


def gsm8k(row: dict[str, str]) -> dict[str, Any]:
    """Grade-school maths, `question` and worked `answer` ("#### N" at its end): a prompt and a response to learn.

    Source: Cobbe et al. 2021, arXiv:2110.14168.
    """
    if not row["question"].strip() or not row["answer"].strip():
        raise LeftOut("no question or no answer")
    return {"prompt": row["question"] + "\n", "responses": [row["answer"]], "feedback": []}


def ilf(row: dict[str, str]) -> dict[str, Any]:
    """Programs that fail, a person's words on what is wrong, and the person's own correction: a critique and an edit.

    `prompt` is the program's beginning. The responses are what follows it in the whole programs, as the row's own
    `completion` leaves out what was put before the prompt.
    Source: Chen et al. 2023, arXiv:2303.16749.
    """
    prompt, *programs = (
        row[name].replace("\r\n", "\n")
        for name in ("prompt", "original_model_completion", "unedited_annotator_completion")
    )
    if not all(program.startswith(prompt) for program in programs):
        raise LeftOut("a program does not begin with the prompt")
    written, edited = (program.removeprefix(prompt) for program in programs)
    if not written.strip() or not edited.strip():
        raise LeftOut("nothing follows the prompt")
    critique = {"kind": "critique", "response": 0, "text": row["Feedback"]}
    edit = {"kind": "edit", "response": 0, "text": edited}
    return {"prompt": prompt, "responses": [written], "feedback": [critique, edit]}


# Format -> (function, the fields that a row has to have, each a text).
FORMATS: dict[str, tuple[Callable[[dict], dict[str, Any]], tuple[str, ...]]] = {
    "hh": (hh, ("chosen", "rejected")),
    "gsm8k": (gsm8k, ("question", "answer")),
    "ilf": (ilf, ("prompt", "original_model_completion", "unedited_annotator_completion", "Feedback")),
}


TRL, CSV = "trl", "csv"
KNOWN = (*FORMATS, TRL, CSV)


def convert(
    path: str | os.PathLike[str],
    name: str,
    left_out: collections.Counter[str],
    *,
    max_chars: int = 0,
    columns: Sequence[str] = (),
) -> Iterator[Record]:
    """Streams the records of a file in the format `name`; `left_out` counts, by reason, rows that give none.

    An id that another row has too is kept as `row_id`.

    Args:
      max_chars: records whose prompt and longest response have more characters together are left out; 0: none.
      columns: of CSV, what holds what (see `table.columns_of`).

    Raises:
      InputError: no such format, or as `json_lines`, or a field is missing or no text; names file, line and field.
    """
    if name not in KNOWN:
        raise InputError(f"format {name!r}: not known; allowed: {', '.join(KNOWN)}")
    if columns and name != CSV:
        raise InputError(f"--map: is for csv; rows of {name} have names of their own")
    faults, seen, empty = Faults(path), set[Any](), True
    for where, made in _made(Path(path), name, left_out, faults, table.columns_of(columns)):
        try:
            record = parse_record(_provenance({**made, "source": made.get("source", name)}, seen), where)
        except InputError as error:
            faults.add(error)
            continue
        if max_chars and len(record.prompt_text) + max(map(len, record.responses), default=0) > max_chars:
            left_out[f"more than {max_chars} characters"] += 1
            continue
        empty = False
        if not faults:
            yield record
    faults.show()
    if empty:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise InputError(f"{path}: no record can be made of it ({reasons}); give another file, or a larger --max-chars")


def _made(
    path: Path, name: str, left_out: collections.Counter[str], faults: Faults, columns: table.Columns
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where the row stands, record's JSON object) of all that can be made."""
    rows = trl.rows(path) if name == TRL else table.rows(path, columns, faults) if name == CSV else json_lines(path)
    for where, row in rows:
        try:
            if name == CSV:
                found = [table.record(row, columns, where)]
            elif name == TRL:
                found = list(trl.trl(_object(row, where, trl.FIELDS)))
            else:
                function, fields = FORMATS[name]
                found = [function(_texts(row, where, name, fields))]
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except InputError as error:
            faults.add(error)
        else:
            yield from ((where, made) for made in found)


def _object(row: Any, where: str, fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}; allowed: a JSON object with {', '.join(fields)}")
    return row


def _texts(row: Any, where: str, name: str, fields: Sequence[str]) -> dict[str, Any]:
    """The row, which has to have a text in each of these fields."""
    for field in fields:
        if not isinstance(_object(row, where, fields).get(field), str):
            found = type(row[field]).__name__ if field in row else "nothing"
            raise InputError(f"{where}: field {field!r}: found {found}; the format {name!r} has a text there")
    return row


def _provenance(made: dict[str, Any], seen: set[Any]) -> dict[str, Any]:
    """The record with fields of the names that records have in the form that they have there, others under `row_`."""
    allowed = {"id": (str, int, float), "source": (str,), "license": (str,), "time": (str, int, float)}
    for field, kinds in allowed.items():
        if field in made and (type(made[field]) not in kinds or (field == "id" and made[field] in seen)):
            made[f"row_{field}"] = made.pop(field)
    seen.add(made.get("id"))
    return made
