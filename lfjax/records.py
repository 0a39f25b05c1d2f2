"""The feedback record, one JSON object a line: schema, validation, streaming.

A record is a prompt (a string or chat messages), one or more responses, and what people said of them. Every kind
of feedback shares this schema and all kinds may be mixed in one file:

  rating      response, value, scale [lo, hi], optional rater        a number on a scale
  ranking     order: best to worst, ties as nested lists             an order of some or all responses
  preference  chosen, rejected, optional margin                      one response above another
  edit        response, text                                         a better text in the response's place
  critique    response, text                                         words about a response
  label       response, value                                        a class: true/false, a number or a word
  implicit    response, signal, value                                what a person did with a response

`response`, `chosen`, `rejected` and the items of `order` are indices into `responses`. Fields that the schema does
not know are kept in `extra` and written back. A record that is only a prompt needs neither `responses` nor `feedback`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gzip
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from lfjax import files
from lfjax.config import InputError

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass
class Rating:
    """A number that a person (or the mean of several) gave to a response on `scale` = (lo, hi), lo the worst."""

    kind: ClassVar[str] = "rating"
    response: int
    value: float
    scale: tuple[float, float]
    rater: str | float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Ranking:
    """Groups of tied responses, best first. Responses that are not named were not judged."""

    kind: ClassVar[str] = "ranking"
    order: list[list[int]]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Preference:
    """`chosen` is better than `rejected`; `margin` >= 0 says by how much, where a person said so."""

    kind: ClassVar[str] = "preference"
    chosen: int
    rejected: int
    margin: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Edit:
    """What a person would have written in place of a response."""

    kind: ClassVar[str] = "edit"
    response: int
    text: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Critique:
    """A person's words about a response."""

    kind: ClassVar[str] = "critique"
    response: int
    text: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Label:
    """The class of a response: true or false (good or bad), a number, or a word."""

    kind: ClassVar[str] = "label"
    response: int
    value: bool | float | str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Implicit:
    """What a person did with a response: accepted, copied, regenerated, abandoned, dwell_s, ..."""

    kind: ClassVar[str] = "implicit"
    response: int
    signal: str
    value: bool | float | str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


Feedback = Rating | Ranking | Preference | Edit | Critique | Label | Implicit


@dataclasses.dataclass
class Record:
    """One prompt, its responses and the feedback on them.

    Attributes:
      prompt: text, or chat messages {"role", "content"}; "" where the responses stand alone.
      responses: 1..N texts; none where the record is only a prompt. Other fields of a response
        given as an object are in `response_fields`, one dict each.
      feedback: any number of judgements of any kind.
      where: "FILE:LINE" for error messages; not part of the record's value.
    """

    prompt: str | list[dict[str, Any]]
    responses: list[str]
    feedback: list[Feedback] = dataclasses.field(default_factory=list)
    id: str | float | None = None
    source: str | None = None
    license: str | None = None
    time: str | float | None = None
    response_fields: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="record", compare=False, repr=False)

    @property
    def prompt_text(self) -> str:
        """The prompt as plain text; chat messages as `role: content` lines that end where the assistant starts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "".join(f"{message['role']}: {message['content']}\n" for message in self.prompt) + "assistant: "


class _Wrong(Exception):
    """A field does not hold what it may: (field, found, allowed)."""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(field, _show(value), "a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _Wrong(field, "half of a surrogate pair (\\ud800-\\udfff)", "valid Unicode text") from None
    return value


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Wrong(field, _show(value), "a number")
    if not abs(value) <= 1e30:  # also false for NaN
        raise _Wrong(field, _show(value), "a finite number, at most 1e30 in size")
    return float(value)


def _text_or_number(field: str, value: Any) -> str | float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Wrong(field, _show(value), "a string or a number")
    return _text(field, value) if isinstance(value, str) else value


def _index(field: str, value: Any, count: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Wrong(field, _show(value), "an index into responses (a whole number, from 0)")
    if not 0 <= value < count:
        raise _Wrong(field, str(value), f"0 to {count - 1}: the record has {count} response{'s' * (count > 1)}")
    return value


def _class(field: str, value: Any) -> bool | float | str:
    if isinstance(value, (bool, str)):
        return _text(field, value) if isinstance(value, str) else value
    if isinstance(value, (int, float)):
        return _number(field, value)
    raise _Wrong(field, _show(value), "true, false, a number or a string")


def _take(data: dict[str, Any], name: str, prefix: str = "") -> Any:
    """Removes a required field from `data`; what stays there in the end is unknown and kept."""
    if name in data:
        return data.pop(name)
    close = difflib.get_close_matches(name, data, n=1, cutoff=0.7)
    raise _Wrong(prefix + name, f"nothing, but {close[0]!r}" if close else "nothing", "it is required")


def _rating(data: dict[str, Any], at: str, count: int) -> Rating:
    response = _index(at + "response", _take(data, "response", at), count)
    value = _number(at + "value", _take(data, "value", at))
    scale = _take(data, "scale", at)
    if not isinstance(scale, list) or len(scale) != 2:
        raise _Wrong(at + "scale", _show(scale), "[lo, hi]: two numbers")
    low, high = (_number(at + "scale", end) for end in scale)
    if low >= high:
        raise _Wrong(at + "scale", _show(scale), "[lo, hi] with lo < hi")
    if not low <= value <= high:
        raise _Wrong(at + "value", f"{value:g}", f"a number in its scale [{low:g}, {high:g}]")
    rater = data.pop("rater", None)
    return Rating(response, value, (low, high), None if rater is None else _text_or_number(at + "rater", rater), data)


def _ranking(data: dict[str, Any], at: str, count: int) -> Ranking:
    order = _take(data, "order", at)
    if not isinstance(order, list):
        raise _Wrong(at + "order", _show(order), "a list of indices into responses, best first, ties as nested lists")
    groups = [item if isinstance(item, list) else [item] for item in order]
    if any(not group for group in groups):
        raise _Wrong(at + "order", _show(order), "ties as lists that are not empty")
    groups = [[_index(at + "order", index, count) for index in group] for group in groups]
    named = [index for group in groups for index in group]
    if len(set(named)) < len(named):
        raise _Wrong(at + "order", _show(order), "each response at most once")
    if len(named) < 2:
        raise _Wrong(at + "order", _show(order), "at least two responses")
    return Ranking(groups, data)


def _preference(data: dict[str, Any], at: str, count: int) -> Preference:
    chosen = _index(at + "chosen", _take(data, "chosen", at), count)
    rejected = _index(at + "rejected", _take(data, "rejected", at), count)
    if chosen == rejected:
        raise _Wrong(at + "rejected", str(rejected), "another response than `chosen`")
    margin = data.pop("margin", None)
    if margin is not None:
        margin = _number(at + "margin", margin)
        if margin < 0:
            raise _Wrong(at + "margin", f"{margin:g}", "0 or more: how much better `chosen` is")
    return Preference(chosen, rejected, margin, data)


def _edit(data: dict[str, Any], at: str, count: int) -> Edit:
    response = _index(at + "response", _take(data, "response", at), count)
    return Edit(response, _text(at + "text", _take(data, "text", at)), data)


def _critique(data: dict[str, Any], at: str, count: int) -> Critique:
    response = _index(at + "response", _take(data, "response", at), count)
    return Critique(response, _text(at + "text", _take(data, "text", at)), data)


def _label(data: dict[str, Any], at: str, count: int) -> Label:
    response = _index(at + "response", _take(data, "response", at), count)
    return Label(response, _class(at + "value", _take(data, "value", at)), data)


def _implicit(data: dict[str, Any], at: str, count: int) -> Implicit:
    response = _index(at + "response", _take(data, "response", at), count)
    signal = _text(at + "signal", _take(data, "signal", at))
    return Implicit(response, signal, _class(at + "value", _take(data, "value", at)), data)


_KINDS: dict[str, Callable[[dict[str, Any], str, int], Feedback]] = {
    "rating": _rating,
    "ranking": _ranking,
    "preference": _preference,
    "edit": _edit,
    "critique": _critique,
    "label": _label,
    "implicit": _implicit,
}


def _feedback(value: Any, count: int) -> list[Feedback]:
    if not isinstance(value, list):
        raise _Wrong("feedback", _show(value), "a list of objects, each with a `kind`")
    entries = []
    for i, entry in enumerate(value):
        at = f"feedback[{i}]."
        if not isinstance(entry, dict):
            raise _Wrong(at[:-1], _show(entry), "an object with a `kind`")
        data = dict(entry)
        kind = _take(data, "kind", at)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise _Wrong(at + "kind", _show(kind), " | ".join(_KINDS))
        entries.append(_KINDS[kind](data, at, count))
    return entries


def _prompt(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return _text("prompt", value)
    if not isinstance(value, list) or not value:
        raise _Wrong("prompt", _show(value), "a string or a list of chat messages")
    for i, message in enumerate(value):
        at = f"prompt[{i}]"
        if not isinstance(message, dict):
            raise _Wrong(at, _show(message), "an object with `role` and `content`")
        for name in ("role", "content"):
            _text(f"{at}.{name}", _take(dict(message), name, at + "."))
        if message["role"] not in ROLES:
            raise _Wrong(f"{at}.role", _show(message["role"]), " | ".join(ROLES))
    return value


def _responses(value: Any, *, needed: bool) -> tuple[list[str], list[dict[str, Any]]]:
    if not isinstance(value, list) or (needed and not value):
        raise _Wrong("responses", _show(value), "a list of one or more strings, or objects with `text`")
    texts, fields = [], []
    for i, response in enumerate(value):
        if isinstance(response, dict):
            data = dict(response)
            texts.append(_text(f"responses[{i}].text", _take(data, "text", f"responses[{i}].")))
            if "source" in data:
                _text(f"responses[{i}].source", data["source"])
            fields.append(data)
        else:
            texts.append(_text(f"responses[{i}]", response))
            fields.append({})
    return texts, fields if any(fields) else []


def _is_prompt(data: dict[str, Any]) -> bool:
    """Whether a record with these further fields is only a prompt; a name that is nearly another is misspelt."""
    if any(data.get(name) for name in ("responses", "feedback")) or _is_row(data):
        return False
    return not any(difflib.get_close_matches(name, data.keys() - {name}, 1, 0.7) for name in ("responses", "feedback"))


def _is_row(data: dict[str, Any]) -> bool:
    """Whether it looks like a row of a data set for TRL."""
    pair, other = {"chosen", "rejected"}, ("completion", "messages")
    return not data.keys() & {"responses", "feedback"} and (data.keys() >= pair or any(name in data for name in other))


CONVERT_ROWS = "make records of such rows: lfjax feedback convert trl FILE records.jsonl"
CONVERT_TABLE = (
    "make records of it: lfjax feedback convert csv FILE records.jsonl --map prompt=COLUMN,response=COLUMN,"
    "rating=COLUMN:1..5"
)
_PROVENANCE = {"id": _text_or_number, "source": _text, "license": _text, "time": _text_or_number}


def parse_record(value: Any, where: str = "record", *, feedback: bool = True, responses: bool = False) -> Record:
    """A decoded JSON object as a validated `Record`.

    Args:
      value: what `json.loads` gave; it is not changed.
      where: "FILE:LINE", the start of the error message.
      feedback: whether the field has to be there; without it there is none. Of what is only a prompt it never has.
      responses: whether that field has to be there even so.
    Raises:
      InputError: `WHERE: field 'x': what was found; what is allowed`.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {_show(value)}; a record is a JSON object with prompt, responses, feedback")
    if _is_row(value):
        raise InputError(f"{where}: field 'responses': found {', '.join(sorted(value))[:60]}; {CONVERT_ROWS}")
    data = dict(value)
    try:
        prompt = _prompt(_take(data, "prompt"))
        only_prompt = not responses and bool(prompt) and _is_prompt(data)
        if only_prompt:
            data = {"responses": [], **data}
        texts, response_fields = _responses(_take(data, "responses"), needed=not only_prompt)
        if not feedback or only_prompt:
            data.setdefault("feedback", [])
        judgements = _feedback(_take(data, "feedback"), len(texts))
        provenance: dict[str, Any] = {}
        for name, check in _PROVENANCE.items():
            field = data.pop(name, None)
            provenance[name] = None if field is None else check(name, field)
    except _Wrong as wrong:
        field, found, allowed = wrong.args
        raise InputError(f"{where}: field {field!r}: found {found}; allowed: {allowed}") from None
    return Record(prompt, texts, judgements, **provenance, response_fields=response_fields, extra=data, where=where)


def read_records(path: str | os.PathLike[str], *, feedback: bool = True, responses: bool = False) -> Iterator[Record]:
    """Streams the records of a JSONL file, each validated as it is read. An `id` occurs once.

    Args:
      feedback, responses: as in `parse_record`.

    Raises:
      InputError: as `json_lines`, or a field that does not hold what it may; the message starts with FILE:LINE. Of
        several lines that are wrong the first 20 are told, and how many more there are (`BadLines`); what stands
        behind the first is not streamed.
    """
    first_line: dict[str, str] = {}
    faults = files.Faults(path)
    if remedy := _other_form(pathlib.Path(path)):
        raise InputError(f"{path}: no JSON lines; {remedy}")
    for where, row in json_lines(path, wrong=faults.add):
        try:
            record = parse_record(row, where, feedback=feedback, responses=responses)
            key = f"{type(record.id) is str} {record.id}"  # the hashes of numbers are known, those of texts are not
            if record.id is not None and first_line.setdefault(key, where) != where:
                found = f"found {_show(record.id)}, as on line {first_line[key].rpartition(':')[2]}"
                raise InputError(f"{where}: field 'id': {found}; allowed: each id once")
        except InputError as error:
            if not faults and isinstance(row, dict) and _is_row(row):
                raise  # what mends one row mends all
            faults.add(error)
        if not faults:
            yield record
    faults.show()


def json_lines(
    path: str | os.PathLike[str], *, wrong: Callable[[InputError], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Streams ("FILE:LINE", value) for each line of a JSONL file.

    UTF-8, with or without a byte order mark, gzipped or not; LF or CRLF; blank lines are skipped.

    Args:
      wrong: as in `files.json_lines`.
    Raises:
      InputError: no such file, a folder, nothing in it, not UTF-8, not JSON; the message starts with FILE:LINE.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a JSONL file, one record a line")
    if not path.is_file():
        found = "not a regular file, and it is read more than once" if path.exists() else "no such file"
        raise InputError(f"{path}: {found}; give a JSONL file, one record a line")
    empty = True

    def note(error: InputError) -> None:
        nonlocal empty
        empty = False
        if wrong is None:
            raise error
        wrong(error)

    for where, value in files.json_lines(path, fix="one JSON object a line", once=True, wrong=note):
        empty = False
        yield where, value
    if empty:
        raise InputError(f"{path}: is empty; it must hold at least one record (a JSON object a line)")


def _other_form(path: pathlib.Path) -> str:
    """What makes records of a table, a JSON array or a Parquet file; "" where it is none."""
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return CONVERT_TABLE
    start = b""
    if path.is_file():
        with files.open_regular(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return CONVERT_ROWS if re.match(rb"PAR1|\[\s*\{", start) else ""


def _feedback_json(entry: Feedback) -> dict[str, Any]:
    fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name != "extra"}
    if isinstance(entry, Ranking):
        fields["order"] = [group[0] if len(group) == 1 else group for group in entry.order]
    kept = {name: value for name, value in fields.items() if value is not None}
    return {"kind": entry.kind, **kept, **entry.extra}


def record_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object in the schema's form; `parse_record` gives the record back."""
    responses: list[Any] = list(record.responses)
    if record.response_fields:
        pairs = zip(record.responses, record.response_fields, strict=True)
        responses = [{"text": text, **fields} if fields else text for text, fields in pairs]
    data: dict[str, Any] = {"prompt": record.prompt, "responses": responses}
    data["feedback"] = [_feedback_json(entry) for entry in record.feedback]
    data |= {name: getattr(record, name) for name in _PROVENANCE if getattr(record, name) is not None}
    return data | record.extra


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes a JSONL file, whole or not at all (see `files.writing`). Returns the count.

    What is no regular file, such as /dev/stdout, is written directly. A name that ends in .gz is written gzipped; equal
    records give equal bytes.
    """
    path, count = pathlib.Path(path), 0
    with files.writing(path, pipe=True) as plain, contextlib.ExitStack() as stack:
        gzipped = path.suffix == ".gz"
        out = stack.enter_context(gzip.GzipFile("", "wb", fileobj=plain, mtime=0)) if gzipped else plain
        for record in records:
            out.write(files.encoded(json.dumps(record_json(record), ensure_ascii=False, allow_nan=False) + "\n"))
            count += 1
    return count


def mean_ratings(record: Record) -> dict[int, float]:
    """The mean of the ratings of each rated response, by the response's index."""
    return _means((entry.response, entry.value) for entry in record.feedback if isinstance(entry, Rating))


def mean_values(record: Record, scale: tuple[float, float]) -> dict[int, float]:
    """`mean_ratings`, and the mean of the labels of each response that has labels in place of ratings.

    A label true counts as the top of `scale`, false as its bottom, a number as it is.
    """
    labels = rating_labels(record).values()
    return mean_ratings(record) | _means((entry.response, label_value(entry, scale)) for entry in labels)


def rating_labels(record: Record) -> dict[int, Label]:
    """The labels that count as ratings, by their place in `feedback`: no words, and of responses without a rating."""
    rated = mean_ratings(record)
    labels = {i: entry for i, entry in enumerate(record.feedback) if isinstance(entry, Label)}
    return {i: e for i, e in labels.items() if not isinstance(e.value, str) and e.response not in rated}


def label_value(entry: Label, scale: tuple[float, float]) -> float:
    """What a label that is no word counts as on `scale`."""
    return scale[bool(entry.value)] if isinstance(entry.value, bool) else float(entry.value)


def _means(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for response, value in pairs:
        values.setdefault(response, []).append(value)
    return {response: math.fsum(given) / len(given) for response, given in values.items()}
