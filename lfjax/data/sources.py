"""Records from wherever a config says: the VADER sentences, a JSONL file of feedback, plain text; always split in 3."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lfjax.config import InputError
from lfjax.data import vader
from lfjax.data.duplicates import (
    HEADING_RECORDS,
    SPLITS,
    merge_rated_duplicates,
    overlap_keys,
    record_key,
)
from lfjax.data.splits import cut, equal_pairs, kinds_of
from lfjax.files import text_lines
from lfjax.records import Rating, Record, label_value, rating_labels, read_records

SOURCES = ("vader", "jsonl", "text")


@dataclasses.dataclass
class Splits:
    """Records to learn from, to tune on and to report on; `counts` says what was found, merged and left out."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    counts: dict[str, Any]

    def __getitem__(self, name: str) -> list[Record]:
        return getattr(self, name)


def load_records(data: Any) -> Splits:
    """The records that a config's `data` section names, in fixed splits.

    A record's split depends on the texts alone (see `splits.cut`): near-identical ones never straddle two splits, no
    seed and no order of the records moves one. With explicit `validation_path` and `test_path`, training records
    of a held-out one's prompt or text (see `duplicates.overlap_keys`) are left out and counted (`train_also_held_out`),
    and so are validation records of a test one's (`validation_also_test`).

    Args:
      data: attributes source ("vader" | "jsonl" | "text"), path, validation_path, test_path, validation_fraction and
        test_fraction (the VADER split is fixed, 5 % each), heading_records (see `duplicates.overlap_keys`),
        max_records (0: all; else about this many in all, every split keeping its share), seed (which ones it keeps).
    Raises:
      InputError: an unknown source, no path, a bad file, or a split that holds nothing.
    """
    if data.source not in SOURCES:
        raise InputError(f"data.source: found {data.source!r}; allowed: {' | '.join(SOURCES)}")
    if data.source == "vader":
        splits, counts = vader.load()
    else:
        splits, counts = _load_files(data)
    if data.max_records:
        there = sum(map(len, splits.values()))
        splits = _at_most(splits, data.max_records, data.seed)
        counts["beyond_max_records"] = there - sum(map(len, splits.values()))
    for name in SPLITS:
        counts[f"{name}/records"] = len(splits[name])
        if not splits[name]:
            raise InputError(_why_empty(name, splits, counts, data))
        kinds = Counter(kind for record in splits[name] for kind in kinds_of(record))
        counts |= {f"{name}/{kind.replace(' ', '_')}": count for kind, count in sorted(kinds.items())}
    return Splits(**splits, counts=counts)


def _why_empty(name: str, splits: dict[str, list[Record]], counts: dict[str, Any], data: Any) -> str:
    """What to say of a split that holds nothing."""
    left_out = {"train": "train_also_held_out", "validation": "validation_also_test"}.get(name, "")
    if counts.get(left_out):
        other = "held-out" if name == "train" else "test"
        return (
            f"config.data: the {name} split is empty: {counts[left_out]} records of {_path(data, name)} are left out"
            f" because {other} ones have the same prompt, or the same text where there is none; give others, or, where"
            " prompts are headings that records share, config.data.heading_records=2"
        )
    there = [record for split in splits.values() for record in split]
    empty = f", {counts['empty']} of them empty" if counts["empty"] else ""
    different = len({record_key(record) for record in there})
    empty += f", only {different} of them different" if 0 < different < len(there) else ""
    return (
        f"config.data: the {name} split is empty ({counts['rows']} records in all{empty}); give more records, a larger "
        f"config.data.validation_fraction and test_fraction, or config.data.validation_path and test_path"
    )


def _load_files(data: Any) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    if data.path is None:
        raise InputError(f"data.path: found nothing; data.source={data.source!r} needs the path of a file")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 <= getattr(data, name) < 0.5:
            raise InputError(f"data.{name}: found {getattr(data, name)}; allowed: 0 up to, not including, 0.5")
    read = read_records if data.source == "jsonl" else read_text
    files = {name: list(read(path)) for name, path in zip(SPLITS, _paths(data), strict=True) if path is not None}
    counts: dict[str, Any] = {"rows": sum(len(records) for records in files.values()), "empty": 0}
    counts |= {"duplicates": 0, "duplicates_max_gap": 0.0}
    for name, records in files.items():
        kept = [record for record in records if _says_something(record)]
        counts["empty"] += len(records) - len(kept)
        files[name], merged, gap = merge_rated_duplicates(kept)
        counts["duplicates"] += merged
        counts["duplicates_max_gap"] = max(counts["duplicates_max_gap"], gap)
    splits: dict[str, list[Record]] = {name: files.get(name, []) for name in SPLITS}
    shared = getattr(data, "heading_records", HEADING_RECORDS)
    if shared < 2:
        raise InputError(f"data.heading_records: found {shared}; allowed: 2 or more")
    keys = _keys({**splits, **files}, shared)
    fractions = {
        f"{name}_fraction": 0.0 if name in files else getattr(data, f"{name}_fraction")
        for name in ("validation", "test")
    }
    tested = set(keys["test"])
    splits["validation"] = [
        r for r, key in zip(splits["validation"], keys["validation"], strict=True) if key not in tested
    ]
    counts["validation_also_test"] = len(keys["validation"]) - len(splits["validation"])
    held_out = tested | set(keys["validation"])
    kept = [record for record, key in zip(files["train"], keys["train"], strict=True) if key not in held_out]
    counts["train_also_held_out"] = len(files["train"]) - len(kept)
    found = cut(kept, **fractions)
    counts |= {"split_by_response": int(found.by_response), "moved": found.moved}
    splits = {name: splits[name] if name in files and name != "train" else found.splits[name] for name in SPLITS}
    counts["equal_pairs"] = sum(equal_pairs(record) for split in splits.values() for record in split)
    return splits, counts


def _says_something(record: Record) -> bool:
    """Whether a response of the record holds more than white space; of one that is only a prompt, the prompt."""
    return any(text.strip() for text in record.responses or [record.prompt_text])


def _keys(splits: dict[str, list[Record]], heading_records: int) -> dict[str, list[tuple[str, ...]]]:
    """`overlap_keys` of the records of all the files together, a list for each."""
    keys = iter(overlap_keys([record for name in SPLITS for record in splits[name]], heading_records))
    return {name: list(itertools.islice(keys, len(splits[name]))) for name in SPLITS}


def _path(data: Any, name: str) -> str:
    """The config key and value of the file that a split is taken from."""
    key = "path" if name == "train" else f"{name}_path"
    return f"data.{key}={getattr(data, key)}"


def _paths(data: Any) -> tuple[str | None, str | None, str | None]:
    return data.path, data.validation_path, data.test_path


def _at_most(splits: dict[str, list[Record]], most: int, seed: int) -> dict[str, list[Record]]:
    total = sum(len(records) for records in splits.values())
    if most < 0:
        raise InputError(f"data.max_records: found {most}; allowed: 0 (all) or more")
    kept = {}
    for name, records in splits.items():
        count = min(len(records), max(1, round(most * len(records) / total)))
        order = sorted(
            range(len(records)), key=lambda i: hashlib.sha256(f"{seed}:{record_key(records[i])}".encode()).digest()
        )
        kept[name] = [records[i] for i in sorted(order[:count])]
    return kept


def read_text(path: str) -> Iterator[Record]:
    """Plain UTF-8 text as records without feedback: one a paragraph (paragraphs are parted by blank lines).

    Raises:
      InputError: no such file, a folder, not UTF-8, or nothing but white space.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "not a regular file" if file.exists() else "no such file"
        raise InputError(f"{file}: {found}; give a plain text file")
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{file}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    if not text.strip():
        raise InputError(f"{file}: is empty; it must hold at least one paragraph")
    line = 1
    for part in re.split(r"(\n(?:[ \t]*\n)+)", text):
        if part.strip():
            yield Record("", [part.strip("\n")], where=f"{file}:{line}")
        line += part.count("\n")


def records_or_lines(path: str, *, prompts: bool) -> Iterator[Record]:
    """The records of a JSONL file; else each line of a text as one, as a prompt alone or as a response without.

    Args:
      prompts: what is read is prompts; else responses, and a record has some.
    Raises:
      InputError: as `read_records`, or not UTF-8, or nothing in it.
    """
    file = pathlib.Path(path)
    if file.name.removesuffix(".gz").endswith((".jsonl", ".json", ".csv", ".tsv")):
        yield from read_records(file, feedback=False, responses=not prompts)
        return
    number = 0
    for number, line in text_lines(file, fix="give records, or texts in UTF-8, one a line"):
        text = line.rstrip("\r\n")
        yield Record(text, [], where=f"{file}:{number}") if prompts else Record("", [text], where=f"{file}:{number}")
    if not number:
        raise InputError(f"{file}: is empty; it must hold a record or a text, one a line")


def rating_scale(records: list[Record]) -> tuple[float, float] | None:
    """The one scale of all the ratings; None where there are no ratings.

    Raises:
      InputError: two scales, whose raw values would not compare, or a number outside of the scale as a label of a
        response that has no rating, where it would count as one.
    """
    first: tuple[tuple[float, float], str] | None = None
    for record in records:
        for entry in record.feedback:
            if isinstance(entry, Rating):
                first = first or (entry.scale, record.where)
                if entry.scale != first[0]:
                    found = f"found {list(entry.scale)}, but {first[1]} has {list(first[0])}"
                    raise InputError(f"{record.where}: field 'scale': {found}; allowed: one scale for all of a run")
    if first is None:
        return None
    (low, high), where = first
    for record in records:
        for i, label in rating_labels(record).items():
            if not low <= label_value(label, (low, high)) <= high:
                raise InputError(
                    f"{record.where}: field 'feedback[{i}].value': found {label.value:g}; allowed: true, false, a word"
                    f" or a number in [{low:g}, {high:g}], the scale of the ratings ({where}): it counts as one"
                )
    return low, high


def label_scale(records: list[Record]) -> tuple[float, float]:
    """The lowest and the highest label that counts as a rating, true as 1, false as 0; (0, 1) where there is none."""
    values = [label_value(entry, (0.0, 1.0)) for record in records for entry in rating_labels(record).values()]
    return (min(values), max(values)) if values else (0.0, 1.0)
