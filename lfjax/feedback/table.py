"""Tables of feedback, CSV and its like -> records: one a row, by a map from what a record holds to columns."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lfjax import files
from lfjax.config import InputError
from lfjax.feedback.trl import LeftOut
from lfjax.files import Faults

FIELDS = ("prompt", "response", "rating", "label", "edit", "critique", "chosen", "rejected")
PROVENANCE = ("id", "source", "license", "time")
DELIMITERS = ",;\t|"
MOST_ROW = 1 << 24  # characters
MOST_HEADER, MOST_COLUMNS = 100_000, 1000  # characters of the line that names the columns
MOST_BLANK = 1000  # blank lines running that a cell keeps
EXAMPLE = "--map prompt=question,response=answer,rating=score:1..5"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column holds what; `scale` is that of the ratings."""

    named: dict[str, str]
    scale: tuple[float, float] | None = None


def columns_of(texts: Sequence[str]) -> Columns:
    """What --map says: FIELD=COLUMN, with commas between; a rating's scale follows its column, as in score:1..5.

    Raises:
      InputError: another form, an unknown field, one twice, or a rating without a scale.
    """
    named: dict[str, str] = {}
    scale = None
    for part in (part for text in texts for part in text.split(",") if part):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if field not in FIELDS + PROVENANCE or not equals or not column:
            raise InputError(f"--map: {part!r}; write FIELD=COLUMN, FIELD one of {', '.join(FIELDS + PROVENANCE)}")
        if field in named:
            raise InputError(f"--map: {field} comes twice; give it one column")
        if field == "rating":
            found = re.fullmatch(r"(.+):(-?[\d.]+)\.\.(-?[\d.]+)", column)
            try:
                scale = (float(found[2]), float(found[3])) if found else None
            except ValueError:
                scale = None
            if found is None or scale is None or scale[0] >= scale[1]:
                raise InputError(f"--map: {part!r}; a rating has a scale, lowest to highest: rating=COLUMN:1..5")
            column = found[1]
        named[field] = column
    return Columns(named, scale)


def rows(path: Path, columns: Columns, faults: Faults) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE:LINE", column -> cell) of a table whose first row names its columns; the line is that where a row ends.

    Cells that a row lacks at its end are left out.

    UTF-8, gzipped or not; commas, semicolons, tabs or bars between cells, whichever the first row has most of; cells in
    quotes may hold them, and line ends.

    Args:
      faults: gets a row with more cells than there are columns.
    Raises:
      InputError: no such file, no columns, two of one name, none that the map names, or nothing says what is a text or
        a rating's scale; no UTF-8, lines that end in CR alone, quotes that do not close, too many columns, or a row
        beyond MOST_ROW.
    """
    csv.field_size_limit(MOST_ROW)
    lines = _Lines(path)
    first = next(iter(lines), "")
    if "\r" in first.rstrip("\r\n"):
        raise InputError(f"{path}:1: its lines end in CR alone; save it with the line ends of Windows or Unix")
    if len(first) > MOST_HEADER:
        raise InputError(
            f"{path}:1: the names of the columns have {len(first)} characters; at most {MOST_HEADER} are read"
        )
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    delimiter = "\t" if tabs else max(DELIMITERS, key=lambda sign: len(next(csv.reader([first], delimiter=sign))))
    reader = csv.reader(lines.again(first), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() or f"column {place}" for place, name in enumerate(next(reader, []), 1)]
        if len(header) > MOST_COLUMNS:
            raise InputError(f"{path}:1: {len(header)} columns; at most {MOST_COLUMNS} are read: take some out")
        twice = [name for name in header if header.count(name) > 1]
        if not header or twice:
            found = f"two columns are called {twice[0]!r}" if twice else "is empty"
            raise InputError(f"{path}: {found}; give a table whose first row names its columns, each once")
        _check(path, header, columns)
        for cells in reader:
            lines.row = 0
            where = f"{path}:{lines.number}"
            if len(cells) > len(header):
                found = f"{len(cells)} cells, but {len(header)} columns"
                faults.add(InputError(f"{where}: {found}; put cells that hold {delimiter!r} into quotes"))
            elif any(cells):
                cells = [cell.replace("\r\n", "\n") for cell in cells]
                yield where, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise InputError(f"{path}:{lines.number}: no CSV: {error}; mend the quotes there, or above") from None


class _Lines:
    """The lines of a file as text, blank ones too, for cells that hold them.

    `number` is the last one's; `row` counts the characters since it was set to 0, at most MOST_ROW.
    """

    def __init__(self, path: Path):
        self._path, self._lines = path, files.text_lines(path, fix="give a table, CSV in UTF-8")
        self.number = self.row = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            blank = min(number - self.number - 1, MOST_BLANK)
            self.number, self.row = number, self.row + blank + len(line)
            if self.row > MOST_ROW:
                found = f"a row of more than {MOST_ROW >> 20} million characters"
                raise InputError(f"{self._path}:{number}: {found}; close the quotes of its cells, or shorten them")
            yield from ["\n"] * blank
            yield line

    def again(self, first: str) -> Iterator[str]:
        """The lines with the first one, which has been read."""
        yield first
        yield from self


def _check(path: Path, header: list[str], columns: Columns) -> None:
    shown = ", ".join(header)[:300]
    for field, column in columns.named.items():
        if column not in header:
            raise InputError(f"--map: {field}={column}: {path} has no such column; it has {shown}")
    answers = any(column_of(field, header, columns) for field in ("response", "chosen"))
    only_prompts = "prompt" in columns.named or ("prompt" in header and {*header} <= {"prompt", *PROVENANCE})
    if not answers and not only_prompts:
        raise InputError(f"{path}: which column is which? It has {shown}; say so: {EXAMPLE}")
    if "rating" in header and not columns.scale:
        raise InputError(f"{path}: column 'rating': which scale has it? Say so: --map rating=rating:1..5")


def column_of(field: str, header: Iterable[str], columns: Columns) -> str | None:
    """The column of a field: as the map says, or the one of its own name where no field has that."""
    if field in columns.named:
        return columns.named[field]
    return field if field in header and field not in columns.named.values() else None


def record(row: dict[str, str], columns: Columns, where: str) -> dict[str, Any]:
    """The record of a row; an empty cell says nothing, columns that no field has are kept.

    Raises:
      LeftOut: no text in it, or a pair that is none.
      InputError: a rating is no number on its scale; names the line and the column.
    """
    places = {field: name for field in FIELDS + PROVENANCE if (name := column_of(field, row, columns))}
    said = {field: row[name] for field, name in places.items() if row.get(name, "").strip()}
    kept = {name: cell for name, cell in row.items() if name not in places.values() and cell}
    made: dict[str, Any] = {**kept, **{field: said[field] for field in PROVENANCE if field in said}}
    made["prompt"] = said.get("prompt", "")
    if "chosen" in said or "rejected" in said:
        if said.get("chosen", "") == said.get("rejected", ""):
            raise LeftOut("the two answers are the same")
        if "chosen" not in said or "rejected" not in said:
            raise LeftOut("one answer alone of a pair")
        preference = {"kind": "preference", "chosen": 0, "rejected": 1}
        return {**made, "responses": [said["chosen"], said["rejected"]], "feedback": [preference]}
    if "response" not in said:
        if not made["prompt"] or len(said.keys() - {"prompt", *PROVENANCE}):
            raise LeftOut("no response" if made["prompt"] else "no prompt and no response")
        return made
    feedback: list[dict[str, Any]] = []
    if "rating" in said and columns.scale:
        feedback.append(
            {"kind": "rating", **_rating(said["rating"], columns.scale, f"{where}: column {places['rating']!r}")}
        )
    if "label" in said:
        feedback.append({"kind": "label", "value": _label(said["label"])})
    feedback += [{"kind": kind, "text": said[kind]} for kind in ("edit", "critique") if kind in said]
    return {**made, "responses": [said["response"]], "feedback": [{**entry, "response": 0} for entry in feedback]}


def _rating(cell: str, scale: tuple[float, float], where: str) -> dict[str, Any]:
    value = _number(cell)
    if value is None or not scale[0] <= value <= scale[1]:
        raise InputError(
            f"{where}: found {cell[:40]!r}; allowed: a number from {scale[0]:g} to {scale[1]:g}, or nothing"
        )
    return {"value": value, "scale": list(scale)}


def _number(cell: str) -> float | None:
    """A number, also with a decimal comma."""
    if not re.fullmatch(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?", cell.strip()):
        return None
    value = float(cell.replace(",", "."))
    return value if math.isfinite(value) else None


def _label(cell: str) -> bool | float | str:
    word = cell.strip()
    number = _number(word)
    return word.lower() == "true" if word.lower() in ("true", "false") else word if number is None else number
