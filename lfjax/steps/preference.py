"""Preference learning without a reward model: DPO and its relatives, on pairs of answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lfjax.losses import preference
from lfjax.optim import Optimizer, weighted_grads
from lfjax.state import LMState
from lfjax.steps.answers import token_logprobs
from lfjax.types import Mean, PreferenceBatch

REFERENCE_FREE = ("cpo", "simpo", "orpo")
PER_TOKEN = ("ipo", "simpo", "orpo")  # of means over an answer's tokens


def preference_step(
    state: LMState,
    batch: PreferenceBatch,
    rng: jax.Array,
    *,
    model,
    tx: Optimizer,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    length_normalisation: float = 0.0,
    margin_scale: float = 0.0,
    sft_weight: float = 0.0,
    num_microbatches: int = 1,
    chunk_size: int = 64,
):
    """One optimiser step on the mean loss of the pairs that `batch.counts`; both answers in one forward pass.

    Args:
      loss: one of `LOSSES`; those of `REFERENCE_FREE` do not read `batch.ref_logprobs`.
      beta: inverse temperature of the implicit reward beta log(policy / reference).
      label_smoothing: of sigmoid and robust. gamma: target margin, of simpo.
      length_normalisation: an answer's log-probabilities are summed and divided by its tokens to this power: 0 the sum,
        1 the mean. ipo, simpo and orpo always take the mean.
      margin_scale: the chosen answer's reward has to lie this times `batch.margin` above (arXiv:2402.10571).
      sft_weight: of the chosen answer's mean negative log-likelihood, in nats a token. orpo has that of the whole row,
        prompt included, with weight 1 besides.
    Returns:
      (state, metrics): preference/loss; accuracy, the share of pairs that the implicit rewards put in people's order;
      margin, of the rewards; chosen_logprob and rejected_logprob, sums in nats; length of the answers, tokens.
    Source: Rafailov et al. 2023, arXiv:2305.18290; the others at their losses.
    """
    losses = LOSSES[loss]
    options = {"beta": beta} | ({"gamma": gamma} if loss == "simpo" else {})
    options |= {"label_smoothing": label_smoothing} if loss in ("sigmoid", "robust") else {}
    power = 1.0 if loss in PER_TOKEN else length_normalisation

    def loss_fn(params, micro: PreferenceBatch, key):
        logprobs = token_logprobs(model, params, micro.tokens, micro.mask, chunk_size=chunk_size, key=key)  # [B 2 T]
        sums = jnp.sum(jnp.where(micro.loss_mask, logprobs, 0.0), axis=-1)  # [B 2]
        lengths = jnp.sum(micro.loss_mask, axis=-1, dtype=jnp.float32)
        scale = 1.0 / jnp.maximum(lengths, 1.0) ** power
        chosen, rejected = (sums * scale).T
        reference = () if loss in REFERENCE_FREE else (micro.ref_logprobs * scale).T
        found = losses(chosen - margin_scale * micro.margin / beta, rejected, *reference, **options)
        found = found + likelihood(logprobs[:, 0], micro.loss_mask[:, 0], sft_weight)
        found = found + likelihood(logprobs[:, 0], micro.mask[:, 0], float(loss == "orpo"))
        rewards = beta * (sums * scale - (0.0 if loss in REFERENCE_FREE else micro.ref_logprobs * scale))
        return Mean.over(found, micro.counts), preference_metrics(rewards, sums, lengths, micro.counts)

    (mean, metrics), grads = weighted_grads(loss_fn, state.params, batch, num_microbatches, rng=rng, has_aux=True)
    metrics = {"preference/loss": mean, "optim/grad_norm": Mean.of(optax.tree.norm(grads)), **metrics}
    return state.apply_gradients(grads, tx, loss=mean.value, weight=mean.weight), metrics


LOSSES = {
    "sigmoid": preference.dpo_losses,
    "robust": preference.robust_dpo_losses,
    "hinge": preference.hinge_losses,
    "ipo": preference.ipo_losses,
    "apo_zero": preference.apo_zero_losses,
    "apo_down": preference.apo_down_losses,
    "cpo": preference.cpo_losses,
    "simpo": preference.simpo_losses,
    "orpo": preference.orpo_losses,
}


def likelihood(logprobs, mask, weight: float):
    """weight times a row's mean negative log-likelihood [B] where `mask`; 0 for weight 0."""
    if not weight:
        return 0.0
    total = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=-1)
    return -weight * total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def preference_metrics(rewards, sums, lengths, counts) -> dict[str, Mean]:
    """What is said of pairs: rewards, sums and lengths [B 2] of chosen and rejected."""
    chosen, rejected = rewards.T
    return {
        "preference/accuracy": Mean.over(0.5 * (chosen > rejected) + 0.5 * (chosen >= rejected), counts),
        "preference/margin": Mean.over(chosen - rejected, counts),
        "preference/chosen_logprob": Mean.over(sums[:, 0], counts),
        "preference/rejected_logprob": Mean.over(sums[:, 1], counts),
        "preference/length": Mean.over(lengths, counts[:, None]),
    }
