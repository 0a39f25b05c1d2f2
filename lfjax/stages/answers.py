"""What stages share that learn from given answers against a reference: its log-probabilities, kept or asked anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lfjax.config import Config
from lfjax.data.duplicates import SPLITS
from lfjax.run.answers import AnswerScorer, kept
from lfjax.run.parts import compute_settings
from lfjax.run.run import Run


def scorer(run: Run, stage: str, config, adapters, buckets) -> AnswerScorer:
    """Sums of answers under a model of this form, in batches of a stage's size."""
    section = run.config[stage]
    model = run.devices.network(compute_settings(run.config.model, config, dropout=0.0))
    return AnswerScorer(
        run.devices,
        model,
        adapters=adapters,
        buckets=buckets,
        batch_size=2 * section.batch_size,
        chunk_size=section.step.get("chunk_size", 64),
        pad_id=run.tokenizer.pad_id,
        leave=functools.partial(run.leave_if_asked, stage),
    )


def references(run: Run, stage: str, start, sets: Mapping[str, Any]) -> Callable | None:
    """Gives the splits what the reference says of their answers.

    Args:
      start: the loaded model that the stage starts from, which is the reference where the section names none.
      sets: split -> batches, with `answers` and `ref`.
    Returns:
      None; or what says it of the rows of a training batch, where `keep_reference` is off: the model stays in memory.
    """
    section = run.config[stage]
    name = section.reference
    loaded = run.load_model(f"{stage}.reference", name, language=True) if name else start
    score = scorer(run, stage, loaded.model.config, None, sets["train"].buckets)
    for split in SPLITS if section.keep_reference else SPLITS[1:]:
        answers = sets[split].answers
        path = run.workdir / "references" / stage / f"{split}.npy"
        sets[split].ref = kept(path, len(answers), functools.partial(score, loaded.params, None, answers))
    return None if section.keep_reference else functools.partial(score.of_rows, loaded.params, None)


def sources(config: Config, stage: str) -> dict[str, str]:
    """The start, and the reference where one is named."""
    found = {f"{stage}.init_from": config[stage].init_from}
    return found | ({f"{stage}.reference": config[stage].reference} if config[stage].reference else {})


def reads_only(config: Config, stage: str) -> tuple[str, ...]:
    """The reference, where one is named, is not trained."""
    return (f"{stage}.reference",) if config[stage].reference else ()
