"""What `lfjax train` says at its end: one sentence, and a line for each stage and for each figure before and after."""

from __future__ import annotations

import re

from lfjax.report import catalogue, checks, findings
from lfjax.report.rundir import RunDir, is_figure

MOST_LINES = 10  # the report's place and the summary's come after them
MOST_FIGURES = 4  # of a stage
PLAIN = str.maketrans({"\u2212": "-", "\u202f": ","})  # a page's minus and thousands, as a terminal has them
_SIDES = re.compile(r"_(before|after|n|low|high|error)$")


def lines(run: RunDir) -> list[str]:
    """At most MOST_LINES; all figures are in summary.json."""
    found = findings.comparisons(run)
    headline, _ = findings.verdict(run, found, 0)
    words = findings.risen_words(findings.sample_pairs(run.samples))
    warned = [check.title.lower() for check in checks.checks(run, found, words) if check.level == "alarm"]
    warning = f"; the report warns of {' and '.join(warned)}" if warned else ""
    stages = [f"{stage.name}: {', '.join(told)}" for stage in run.stages if (told := _of_stage(run, stage.name))]
    first = [key for key in (*list(found)[:2], "kl", "length") if key in found]  # the gain, and what it may have cost
    shown = [found[key] for key in dict.fromkeys((*first, *found)) if not found[key].interim]
    compared = [f"{_title(c)}: {c.said('before')} -> {c.said('after')}" for c in shown]
    told = [f"{run.name}: {headline}{warning}.", *stages, *compared][:MOST_LINES]
    return [line.translate(PLAIN) for line in told]


def _title(item: findings.Comparison) -> str:
    """Of the reward and of judges also what they are: what training was towards, and what knows little, is told so."""
    return f"{item.title} ({item.unit})" if item.key == "score" or item.key.startswith("judge/") else item.title


def _held_out(run: RunDir, key: str, variants: dict[str, str]) -> str:
    """Of a figure's variants that of the test split, else of the validation split; "" where all are training's.

    Of one name for what training and the test split have, the latter has its number of things beside it.
    """
    names = {label: name for name, label in variants.items()}
    told = (name for name in (names.get("test", key), key) if f"{name}_n" in run.summary)
    return next(told, None) or names.get("held out", "")


def _of_stage(run: RunDir, stage: str) -> list[str]:
    """Its final held-out figures of which is known what is better, in reading order; [] where it has no validation."""
    names = [name for name, value in run.summary.items() if name.startswith(f"{stage}/") and is_figure(value)]
    if not any(name.startswith(f"{stage}/validation_") for name in names):
        return []
    shown, told, seen = findings.told(run), [], set()
    for key, variants in catalogue.families(names, run.figures).items():
        entry, leaf = catalogue.entry(key, run.figures), key.rpartition("/")[2]
        name = _held_out(run, key, dict(variants))
        if name and entry.better and not _SIDES.search(leaf) and entry.title not in seen:
            seen.add(entry.title)
            told.append(f"{entry.title.lower()} {shown.get(name, run.summary[name])}")
    return told[:MOST_FIGURES]
