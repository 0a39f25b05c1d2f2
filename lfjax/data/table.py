"""What a run's data are, as a table to read: found, merged, left out and why, by split and kind of feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfjax.data.duplicates import SPLITS

# Why records are left out, by the name of the count that says how many.
LEFT_OUT = {
    "empty": "without text",
    "train_also_held_out": "of training that are held out as well",
    "validation_also_test": "of validation that are in the test file as well",
    "beyond_max_records": "beyond config.data.max_records",
}


def table(counts: Mapping[str, Any]) -> list[str]:
    """The lines, of `Splits.counts`."""
    kinds = [name.partition("/") for name in counts if name.partition("/")[0] in SPLITS]
    columns = list(dict.fromkeys(["records", *sorted(kind for _, _, kind in kinds)]))
    heads = [column.replace("_", " ") for column in columns]
    widths = [max(len(head), 7) for head in heads]
    rows = [["data", heads], *([name, [f"{counts.get(f'{name}/{c}', 0):,}" for c in columns]] for name in SPLITS)]
    lines = [
        f"{name:10s}  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    return [*lines, _found(counts), *told(counts)]


def _found(counts: Mapping[str, Any]) -> str:
    parts = [f"read {counts['rows']:,}"]
    if counts.get("duplicates"):
        parts.append(f"merged {counts['duplicates']:,} (the same prompt and response: their mean rating counts)")
    reasons = [f"{counts[name]:,} {why}" for name, why in LEFT_OUT.items() if counts.get(name)]
    parts.append(f"left out {', '.join(reasons)}" if reasons else "left out none")
    return "; ".join(parts)


def told(counts: Mapping[str, Any]) -> list[str]:
    """What a user has to know of how the records were split, and of what was left out, a line each."""
    lines = []
    for name, other in (("train_also_held_out", "training"), ("validation_also_test", "validation")):
        if counts.get(name):
            lines.append(
                f"{counts[name]} {other} records are left out: held-out ones have the same prompt (where there is none,"
                " or config.data.heading_records share it, the same text)"
            )
    if counts.get("equal_pairs"):
        lines.append(f"{counts['equal_pairs']} pairs of answers are equal and in no training and no figure")
    if counts.get("split_by_response"):
        lines.append("split by response: there are fewer prompts than splits, so that each split has answers to them")
    if counts.get("moved"):
        lines.append(
            f"{counts['moved']} of the records may move to another split when others are added: they are where they are"
            " for the split's size or its kinds of feedback"
        )
    return lines
