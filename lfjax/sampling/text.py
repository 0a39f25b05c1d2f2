"""Text in, text out: one call from prompts to continuations."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lfjax.config import InputError
from lfjax.sampling.generate import generate
from lfjax.tokenizers import response_text, stop_ids

PROMPT_BUCKET = 16  # prompts are padded to a multiple of it, so that few lengths are compiled


def sample_texts(
    loaded,
    prompts: list[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """One continuation a prompt, with a model as `lfjax.interop.hf.load` gives it.

    Args:
      loaded: model, params and tokenizer.
      prompts: texts; "" starts from BOS alone.
      max_new_tokens: None is 64, or what the model's context leaves room for.
      temperature, top_k, top_p: as in `generate`.
      stop: texts of one token each that end a continuation, besides EOS.
    Raises:
      InputError: a stop text is not one token, or prompt and continuation are longer than the model's context.
    """
    tokenizer = loaded.tokenizer
    rows = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    longest, context = max(map(len, rows)), loaded.model.config.context
    if longest >= context:
        raise InputError(f"prompt: {longest} tokens, BOS included; allowed: fewer than {context}, the model's context")
    width = min(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, max(longest, context - (max_new_tokens or 1)))
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, context - width))
    tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    ends = stop_ids(tokenizer, stop, "stop")
    out = jax.jit(
        lambda params, tokens, mask, key: generate(
            loaded.model,
            params,
            tokens,
            mask,
            key,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=ends,
            pad_id=tokenizer.pad_id,
        )
    )(loaded.params, tokens, mask, jax.random.key(seed))
    pairs = zip(rows, np.asarray(out.tokens), np.asarray(out.mask), strict=True)
    return [response_text(tokenizer, row, response[m].tolist()) for row, response, m in pairs]
