"""`lfjax score`: what a reward model, a classifier or an encoder with a head says of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lfjax import files
from lfjax.config import InputError
from lfjax.data.examples import complete
from lfjax.interop.hf import Loaded
from lfjax.records import Record

SHORTEST = 32  # rows are padded to a power of two of at least so many tokens, so that few widths are compiled
SUMMARY = "summary.json"
MOST_RATING = 1e30  # as records may hold


@dataclasses.dataclass(frozen=True)
class Said:
    """How scores are told.

    Attributes:
      labels: of classes, in the order of the scores; () for one score.
      several: classes do not exclude each other.
      mean: what a score of 0 means in rating points; None: nobody says.
    """

    labels: tuple[str, ...] = ()
    several: bool = False
    mean: float | None = None


def told(loaded: Loaded, folder: Path) -> Said:
    """How the scores of a model are told; of one in a run directory, with the mean rating that its summary gives.

    Raises:
      InputError: it gives no scores.
    """
    count = loaded.model.config.num_labels
    if count == 0:
        raise InputError(
            f"{folder} gives no scores: a language model, or an encoder without a head; name a reward model"
        )
    names = loaded.config.get("id2label")
    names = names if isinstance(names, Mapping) else {}
    labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count)) if count > 1 else ()
    several = loaded.config.get("problem_type") == "multi_label_classification"
    return Said(labels, several, None if labels else _rating_mean(folder))


def _rating_mean(folder: Path) -> float | None:
    """<stage>/rating_mean of the run whose models/<stage>/ the folder is."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != "models" or not (run / SUMMARY).exists():
        return None
    found = files.read_json(files.inside(run, SUMMARY), dict).get(f"{folder.name}/rating_mean")
    return float(found) if isinstance(found, (int, float)) and abs(found) < MOST_RATING else None


def score_records(
    loaded: Loaded, records: Sequence[Record], said: Said, *, batch_size: int
) -> Iterator[dict[str, Any]]:
    """A row for each response, in the records' order: prompt, response and score; id where the record has one.

    Of one score `score` is the model's own; beside it `rating`, on the ratings' scale, where `said` has their mean. Of
    classes there are `label`, the most probable one, its probability as `score`, and `probabilities`. `cut` is true of
    what was longer than the model's context: the prompt's start goes first, then the response's end.
    """
    most, tokenizer = loaded.model.config.context, loaded.tokenizer
    texts = [(record, text) for record in records for text in record.responses]
    rows = [complete(record, text, tokenizer, most) for record, text in texts]
    scores = row_scores(loaded, [row.tokens for row in rows], batch_size=batch_size)
    for (record, text), row, values in zip(texts, rows, scores, strict=True):
        name = {} if record.id is None else {"id": record.id}
        yield {
            **name,
            "prompt": record.prompt,
            "response": text,
            **row_of(values, said),
            **({"cut": True} if row.cut else {}),
        }


def row_of(values: np.ndarray, said: Said) -> dict[str, Any]:
    """The fields of a text's scores [num_labels]."""
    if not said.labels:
        score = float(values[0])
        return {"score": score} | ({} if said.mean is None else {"rating": score + said.mean})
    values = values.astype(np.float64)
    if said.several:
        chances = 1.0 / (1.0 + np.exp(-np.clip(values, -700.0, 700.0)))
    else:
        chances = np.exp(values - values.max())
        chances /= chances.sum()
    best = int(np.argmax(chances))
    shares = dict(zip(said.labels, map(float, chances), strict=True))
    return {"score": float(chances[best]), "label": said.labels[best], "probabilities": shares}


def row_scores(loaded: Loaded, rows: Sequence[Sequence[int]], *, batch_size: int) -> np.ndarray:
    """Scores [len(rows) num_labels] float32 of complete sequences, each of at most context tokens.

    Args:
      batch_size: rows computed at a time, the longest first.
    """
    model: Any = loaded.model
    score = jax.jit(lambda params, tokens, mask: model.apply({"params": params}, tokens, attention_mask=mask))
    found = np.zeros((len(rows), model.config.num_labels), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        longest = len(rows[batch[0]])
        width = min(max(SHORTEST, 1 << (longest - 1).bit_length()), max(model.config.context, longest))
        tokens = np.full((batch_size, width), loaded.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, 0] = True  # a row that only fills the batch has a token too
        for place, index in enumerate(batch):
            tokens[place, : len(rows[index])], mask[place, : len(rows[index])] = rows[index], True
        found[batch] = np.asarray(score(loaded.params, tokens, mask))[: len(batch)]
    return found
