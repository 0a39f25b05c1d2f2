"""Text in, text out: one call from prompts to continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lfjax.config import InputError
from lfjax.sampling.generate import generate
from lfjax.tokenizers import response_text, stop_ids

PROMPT_BUCKET = 16  # prompts are padded to a multiple of it, so that few lengths are compiled


def sample_texts(loaded, prompts: Sequence[str], **options: Any) -> list[str]:
    """One continuation a prompt, all in one batch; "" starts from BOS alone. Arguments as of `sample_rows`."""
    return sample_rows(loaded, [loaded.tokenizer.encode_prompt(prompt) for prompt in prompts], **options)


def sample_rows(
    loaded,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """One continuation of each row of tokens, with a model as `lfjax.interop.hf.load` gives it.

    A row's randomness is its own, by its place, so that the batches that rows are in change no sample but by rounding.

    Args:
      loaded: model, params and tokenizer.
      rows: what begins each sequence, at least a token.
      batch_size: rows at a time, the longest first; None: all.
      max_new_tokens: None is 64, or what the model's context leaves room for.
      temperature, top_k, top_p: as in `generate`.
      stop: texts of one token each that end a continuation, besides EOS.
    Raises:
      InputError: a stop text is not one token, or prompt and continuation are longer than the model's context.
    """
    tokenizer = loaded.tokenizer
    longest, context = max(map(len, rows)), loaded.model.config.context
    if longest >= context:
        raise InputError(f"prompt: {longest} tokens, BOS included; allowed: fewer than {context}, the model's context")
    room = context - (max_new_tokens or 1)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, context - _width(longest, room)))
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options |= {"eos_ids": stop_ids(tokenizer, stop, "stop"), "pad_id": tokenizer.pad_id}
    write = jax.jit(
        lambda params, tokens, mask, key, row_ids: generate(
            loaded.model, params, tokens, mask, key, row_ids=row_ids, **options
        )
    )
    size, found = batch_size or len(rows), [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i])) if batch_size else [*range(len(rows))]
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        width = _width(max(len(rows[i]) for i in batch), room)
        tokens = np.full((size, width), tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        row_ids = np.asarray([*batch, *batch[:1] * (size - len(batch))], np.int32)  # the first one fills the batch
        for place, i in enumerate(row_ids):
            tokens[place, width - len(rows[i]) :], mask[place, width - len(rows[i]) :] = rows[i], True
        out = write(loaded.params, tokens, mask, jax.random.key(seed), row_ids)
        responses = zip(batch, np.asarray(out.tokens), np.asarray(out.mask), strict=False)
        for i, response, kept in responses:
            found[i] = response_text(tokenizer, rows[i], response[kept].tolist())
    return found


def _width(longest: int, room: int) -> int:
    """Tokens of a batch's prompts: a multiple of PROMPT_BUCKET, where the context leaves room for it."""
    return min(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, max(longest, room))
