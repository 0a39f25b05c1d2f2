"""Kahneman-Tversky optimisation: answers that people called good or bad, without pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lfjax.losses.preference import kto_losses
from lfjax.optim import Optimizer, weighted_grads
from lfjax.state import LMState
from lfjax.steps.answers import answer_logprobs, token_logprobs
from lfjax.types import KtoBatch, Mean, split_rows


def kto_step(
    state: LMState,
    batch: KtoBatch,
    rng: jax.Array,
    *,
    model,
    tx: Optimizer,
    beta: float = 0.1,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
    num_microbatches: int = 1,
    chunk_size: int = 64,
):
    """One optimiser step on the mean loss of the answers that `batch.counts`.

    The baseline is the mean of log(policy / reference) over the batch's mismatched answers, never below 0; no gradient
    flows through it, and microbatches share it.

    Args:
      beta: inverse temperature of the implicit reward beta log(policy / reference).
      weight_desirable, weight_undesirable: of the two classes; where one has n times as many answers, the other's
        weight times n makes up for it.
    Returns:
      (state, metrics): kto/loss; baseline, nats; accuracy, the share of answers whose reward lies on the right side of
      the baseline; reward_desirable and reward_undesirable; length of the answers, tokens.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    baseline = kl_baseline(model, state.params, batch, num_microbatches, chunk_size)

    def loss_fn(params, micro: KtoBatch, key):
        own = micro.answers
        logprobs = token_logprobs(model, params, own.tokens, own.mask, chunk_size=chunk_size, key=key)  # [B T]
        sums = jnp.sum(jnp.where(own.loss_mask, logprobs, 0.0), axis=-1)  # [B]
        weights = {"weight_desirable": weight_desirable, "weight_undesirable": weight_undesirable}
        losses = kto_losses(sums, own.ref_logprobs, micro.desirable, baseline, beta=beta, **weights)
        rewards, length = beta * (sums - own.ref_logprobs), jnp.sum(own.loss_mask, axis=-1, dtype=jnp.float32)
        right = (rewards > beta * baseline) == micro.desirable
        return Mean.over(losses, micro.counts), {
            "kto/accuracy": Mean.over(1.0 * right, micro.counts),
            "kto/reward_desirable": Mean.over(rewards, micro.counts & micro.desirable),
            "kto/reward_undesirable": Mean.over(rewards, micro.counts & ~micro.desirable),
            "kto/length": Mean.over(length, micro.counts),
        }

    (loss, metrics), grads = weighted_grads(loss_fn, state.params, batch, num_microbatches, rng=rng, has_aux=True)
    metrics |= {"kto/loss": loss, "kto/baseline": Mean.of(baseline), "optim/grad_norm": Mean.of(optax.tree.norm(grads))}
    return state.apply_gradients(grads, tx, loss=loss.value, weight=loss.weight), metrics


def kl_baseline(model, params, batch: KtoBatch, num_microbatches: int, chunk_size: int) -> jax.Array:
    """max(0, mean of log(policy / reference) over the batch's mismatched answers), a constant, in nats."""

    def ratios(micro: KtoBatch):
        other = micro.mismatched
        logprobs = answer_logprobs(model, params, other.tokens, other.loss_mask, other.mask, chunk_size=chunk_size)
        return Mean.over(logprobs - other.ref_logprobs, micro.counts)

    means = jax.lax.map(ratios, split_rows(batch, num_microbatches))
    return jax.lax.stop_gradient(jnp.maximum(Mean(*map(jnp.sum, means)).value, 0.0))
