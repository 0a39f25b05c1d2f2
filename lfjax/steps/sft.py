"""Supervised fine-tuning, and pretraining: next-token cross-entropy."""

from __future__ import annotations

import jax
import optax

from lfjax.losses import lm
from lfjax.optim import Optimizer, weighted_grads
from lfjax.state import LMState
from lfjax.types import Mean, SftBatch


def sft_step(
    state: LMState,
    batch: SftBatch,
    rng: jax.Array,
    *,
    model,
    tx: Optimizer,
    num_microbatches: int = 1,
    chunk_size: int = 64,
    z_loss: float = 0.0,
):
    """One optimiser step on the mean cross-entropy of the targets that `batch.loss_mask` counts.

    Args:
      rng: key of the dropout; unused where the model has none.
      chunk_size: positions of a row whose logits are held at a time.
      z_loss: weight of logsumexp^2, which keeps logits small (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    Returns:
      (state, metrics): loss in nats per target token, gradient norm before clipping.
    """

    def loss_fn(params, micro: SftBatch, key):
        rngs = {"dropout": key} if model.config.dropout else None
        hidden = model.apply(
            {"params": params}, micro.inputs, segment_ids=micro.segment_ids, method="hidden", rngs=rngs
        )  # [B T D]
        stats = lm.chunked_token_stats(hidden, model.unembed(params), micro.targets, chunk_size=chunk_size)  # [B T]
        return Mean.over(z_loss * stats.logsumexp**2 - stats.logprobs, micro.loss_mask)

    loss, grads = weighted_grads(loss_fn, state.params, batch, num_microbatches, rng=rng)
    metrics = {"sft/loss": loss, "optim/grad_norm": Mean.of(optax.tree.norm(grads))}
    return state.apply_gradients(grads, tx, loss=loss.value, weight=loss.weight), metrics
