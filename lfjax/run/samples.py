"""`lfjax sample --prompts`: responses of a model to a file of prompts, as records that are ready to be rated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lfjax.config import InputError
from lfjax.data.examples import prompt_tokens
from lfjax.interop.hf import Loaded
from lfjax.records import Record
from lfjax.sampling.text import sample_rows
from lfjax.terminal import note


def sample_records(
    loaded: Loaded,
    records: Sequence[Record],
    *,
    n: int,
    source: str,
    batch_size: int,
    max_new_tokens: int | None,
    **options: Any,
) -> list[Record]:
    """Each record with `n` responses of the model's in place of its own, and no feedback.

    Chat messages are written by the tokenizer's template. The responses, the record's `source` and its `sampling` say
    which model wrote, and how; id and further fields stay. Records whose prompt leaves no room in the model's context
    are left out, with a note.

    Args:
      source: what the model is called.
      max_new_tokens: None is 64, or half of the context where that is less.
      batch_size, options: as of `sample_rows`.
    Raises:
      InputError: as `sample_rows`, or a template refuses a prompt, or none is short enough.
    """
    context = loaded.model.config.context
    options["max_new_tokens"] = max_new_tokens = max_new_tokens or min(64, context // 2)
    asked = [(record, prompt_tokens(record, loaded.tokenizer)) for record in records]
    fit = [(record, tokens) for record, tokens in asked if len(tokens) + max_new_tokens <= context]
    if len(fit) < len(asked):
        first = next(record for record, tokens in asked if len(tokens) + max_new_tokens > context)
        room = f"leave no room for {max_new_tokens} more tokens in the model's context of {context}"
        what = f"{len(asked) - len(fit)} of {len(asked)} prompts, the first at {first.where}, {room}"
        if not fit:
            raise InputError(f"{what}; give shorter ones, or a smaller --max-new-tokens")
        note(f"note: {what} and are left out")
    texts = sample_rows(loaded, [tokens for _, tokens in fit for _ in range(n)], batch_size=batch_size, **options)
    return [
        _unrated(record, texts[i * n : (i + 1) * n], source=source, settings=options)
        for i, (record, _) in enumerate(fit)
    ]


def _unrated(record: Record, texts: list[str], *, source: str, settings: Mapping[str, Any]) -> Record:
    fields: list[dict[str, Any]] = [{"source": source} for _ in texts]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    extra = record.extra | {"sampling": plain}
    return dataclasses.replace(
        record, responses=texts, response_fields=fields, feedback=[], source=source, time=None, extra=extra
    )
