"""When two texts are the same for training's purposes: keys, merging, and the split that keeps them together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import unicodedata
from collections import Counter

from lfjax.records import Rating, Record

SPLITS = ("train", "validation", "test")
HEADING_RECORDS = 20  # what `data.heading_records` is where nobody says


def text_key(text: str) -> str:
    """Lower-cased letters (with their marks) and digits of any script; texts of one key are near-identical.

    A text without any, such as ":-)", is its own key. It decides splits alone: what differs in signs may differ in all.
    """
    kept = (c for c in text.lower() if c.isalnum() or unicodedata.category(c).startswith("M"))
    return "".join(kept) or text.strip()


def exact_text(text: str) -> str:
    """The text with composed characters (Unicode NFC) and line feeds for line ends."""
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n")


def spaced_text(text: str) -> str:
    """`exact_text` with one space for every run of white space, and none at the ends."""
    return " ".join(exact_text(text).split())


def record_key(record: Record) -> str:
    """The key that decides a record's split: the prompt's, or the responses' where the prompt is empty."""
    return text_key(record.prompt_text) or text_key(" ".join(record.responses))


def overlap_keys(records: list[Record], heading_records: int = HEADING_RECORDS) -> list[tuple[str, ...]]:
    """The key of each record by which files given as training, validation and test data must not overlap.

    It is the prompt, or the responses where the prompt is empty; white space may differ, nothing else. A prompt that
    `heading_records` of the records share, or all of them, is a heading ("Film review: ") and no question with several
    answers: there it is prompt and responses.
    """
    prompts = [spaced_text(record.prompt_text) for record in records]
    shared = Counter(prompts)
    headings = {prompt for prompt, count in shared.items() if count >= heading_records or len(shared) == 1} | {""}
    return [
        (prompt, *sorted(map(spaced_text, record.responses))) if prompt in headings else (prompt,)
        for prompt, record in zip(prompts, records, strict=True)
    ]


def place_of(key: str) -> float:
    """Where the key's sha256 lies in [0, 1): the same on every machine, whatever else is in the data."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2.0**64


def split_of(key: str, *, validation_fraction: float, test_fraction: float) -> str:
    """train, validation or test, by the key's place alone."""
    place = place_of(key)
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def merge_rated_duplicates(records: list[Record]) -> tuple[list[Record], int, float]:
    """Records of the same prompt and single response whose feedback is ratings on one scale become one record.

    Characters may be composed or not, line ends of either kind, and a response end in white space; letters, case,
    signs, digits and indents differ in none of them.

    The first stays, with one rating, the mean of all; its `extra["duplicates"]` counts the ones merged into it.

    Returns:
      (records in their order, how many went away, the largest difference of the ratings of one text).
    """
    groups: dict[tuple, list[Record]] = {}
    for i, record in enumerate(records):
        ratings = [entry for entry in record.feedback if isinstance(entry, Rating)]
        scales = {entry.scale for entry in ratings}
        mergeable = len(record.responses) == 1 and len(scales) == 1 and len(ratings) == len(record.feedback)
        same = (_exact_prompt(record), exact_text(record.responses[0]).rstrip(), *scales) if mergeable else (i,)
        groups.setdefault(same, []).append(record)
    spread = 0.0
    merged = []
    for group in groups.values():
        if len(group) > 1:
            ratings = [entry for record in group for entry in record.feedback if isinstance(entry, Rating)]
            values = [entry.value for entry in ratings]
            spread = max(spread, max(values) - min(values))
            mean = Rating(0, math.fsum(values) / len(values), ratings[0].scale)
            extra = group[0].extra | {"duplicates": len(group) - 1}
            merged.append(dataclasses.replace(group[0], feedback=[mean], extra=extra))
        else:
            merged.append(group[0])
    return merged, len(records) - len(merged), spread


def _exact_prompt(record: Record) -> str:
    return exact_text(record.prompt) if isinstance(record.prompt, str) else json.dumps(record.prompt, sort_keys=True)
