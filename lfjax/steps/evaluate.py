"""Held-out cross-entropy of a language model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lfjax.losses import lm
from lfjax.types import Mean, SftBatch


def evaluate_step(params, batch: SftBatch, *, model, chunk_size: int = 64):
    """Metrics of one batch, nats per counted target: `evaluate/nll`, and the predictions' `evaluate/entropy`.

    `evaluate/document_nll` is the first of every document by itself, as a Mean of [B T+1]: by row and segment id.
    """
    hidden = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids, method="hidden")  # [B T D]
    stats = lm.chunked_token_stats(hidden, model.unembed(params), batch.targets, chunk_size=chunk_size)  # [B T]
    counted = jnp.where(batch.loss_mask, jnp.stack([-stats.logprobs, jnp.ones_like(stats.logprobs)]), 0.0)
    by_document = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=batch.segment_ids.shape[1] + 1))
    return {
        "evaluate/nll": Mean.over(-stats.logprobs, batch.loss_mask),
        "evaluate/entropy": Mean.over(stats.entropy, batch.loss_mask),
        "evaluate/document_nll": Mean(*(by_document(values, batch.segment_ids) for values in counted)),
    }
