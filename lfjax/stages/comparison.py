"""What the evaluation says of the answers of several models to the same prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lfjax.records import Record
from lfjax.rewards import diversity, lexicon
from lfjax.rewards.intervals import SHARE, Bootstrap, Resampled, prompt_keys
from lfjax.rewards.judges import judged_text

LEXICON = "lexicon"  # the judge that calls texts positive
DISTANCES = {"ppo/kl", "ppo/kl_own"}  # from a model: of the first there is none, and the last has no "_after"
SHARES = {"judge/positive", "judge/positive_response", "ppo/eos_share", "diversity/unique", "diversity/distinct2"}
ANY = (-math.inf, math.inf)


def figures_of(
    rows: Mapping[str, list[dict[str, Any]]], records: Sequence[Record], judges: Sequence[str]
) -> dict[str, float]:
    """The figures of every model's rows with their intervals, and of after less before; prompts are the clusters.

    Args:
      rows: model -> a row for each of `records`.
    """
    keys, figures = prompt_keys(records), {}
    draws = Bootstrap(keys)
    found = {which: estimates(rows[which], keys, draws, judges) for which in rows}
    for which, named in found.items():
        for name, value in named.items():
            bare = name in DISTANCES and which == "after"
            if name not in DISTANCES or which != "before":
                figures |= value.figures(name if bare else f"{name}_{which}", SHARE if name in SHARES else ANY)
    for name in found["before"].keys() - DISTANCES:
        figures |= (found["after"][name] - found["before"][name]).figures(f"{name}_change")
    scored = {"score": "ppo/score"} if rows["before"][0]["score"] is not None else {}
    for column, name in {**scored, **{judge: f"judge/{judge}" for judge in judges}}.items():
        before, after = (np.array([row[column] for row in rows[which]]) for which in ("before", "after"))
        figures |= draws.mean(keys, np.heaviside(after - before, 0.5)).figures(f"{name}_won", SHARE)
    return figures | {f"ppo/score_error_{which}": error for which, error in score_errors(rows).items()}


def estimates(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], draws: Bootstrap, judges: Sequence[str]
) -> dict[str, Resampled]:
    """Figure -> its mean over a model's rows; or what can only be said of all of them together."""
    responses = [row["response"] for row in rows]
    found = {"diversity/distinct2": draws.distinct2(keys, responses)}
    copies = Counter(plain := [diversity.plain(text) for text in responses])
    found["diversity/unique"] = draws.mean(keys, [1.0 / copies[text] for text in plain])
    if LEXICON in judges:
        found["judge/positive"] = draws.mean(keys, [row[LEXICON] > lexicon.POSITIVE for row in rows])
        found["judge/positive_response"] = draws.mean(keys, lexicon.compound_scores(responses) > lexicon.POSITIVE)
    columns = {"ppo/length": "length", "ppo/eos_share": "ended", "ppo/kl": "kl", "ppo/kl_own": "kl_own"}
    columns |= {"ppo/score": "score"} | {f"judge/{name}": name for name in judges if name != LEXICON}
    for name, column in columns.items():
        if rows[0].get(column) is not None:
            found[name] = draws.mean(keys, [row[column] for row in rows])
    return found


def score_errors(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Model -> the standard error of its mean score, of answers taken as independent."""
    scores = {which: [row["score"] for row in found] for which, found in rows.items()}
    known = {which: s for which, s in scores.items() if len(s) > 1 and s[0] is not None}
    return {which: float(np.std(s, ddof=1) / len(s) ** 0.5) for which, s in known.items()}


def judged(row: dict[str, Any], record: Record, judges: Sequence[str]) -> dict[str, Any]:
    """The row with the lexicon's compound score, where it judges, and with that of the first judge as `judge`."""
    if LEXICON in judges:
        row = {**row, LEXICON: float(lexicon.compound_scores([judged_text(record, row["prompt"], row["response"])])[0])}
    return {**row, "judge": row[judges[0]]} if judges else row


def people_positive(records: Sequence[Record]) -> dict[str, float]:
    """judge/positive_human: the share of people's own texts that the lexicon calls positive."""
    pairs = [(record, text) for record in records for text in record.responses if text]
    keys = prompt_keys([record for record, _ in pairs])
    texts = [judged_text(record, record.prompt_text, text) for record, text in pairs]
    human = Bootstrap(keys).mean(keys, lexicon.compound_scores(texts) > lexicon.POSITIVE)
    return human.figures("judge/positive_human", SHARE)
