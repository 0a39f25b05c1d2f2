"""Held-out cross-entropy of a language model."""

from __future__ import annotations

from lfjax.losses import lm
from lfjax.types import Mean, SftBatch


def evaluate_step(params, batch: SftBatch, *, model, chunk_size: int = 64):
    """Metrics of one batch, nats per counted target: `evaluate/nll`, and the predictions' `evaluate/entropy`."""
    hidden = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids, method="hidden")  # [B T D]
    stats = lm.chunked_token_stats(hidden, model.unembed(params), batch.targets, chunk_size=chunk_size)  # [B T]
    return {
        "evaluate/nll": Mean.over(-stats.logprobs, batch.loss_mask),
        "evaluate/entropy": Mean.over(stats.entropy, batch.loss_mask),
    }
