"""PPO, part 4: K epochs of M minibatches on one rollout, as one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lfjax.losses.policy_gradient import clipped_policy_losses, clipped_value_losses
from lfjax.masking import masked_mean
from lfjax.optim import Optimizer, weighted_grads
from lfjax.rl.kl import adaptive_kl
from lfjax.state import PPOState
from lfjax.steps.ppo_forward import PPOModels, response_stats, response_values
from lfjax.types import Mean, Rollout


def ppo_update(
    state: PPOState,
    rollout: Rollout,
    rng: jax.Array,
    *,
    models: PPOModels,
    txs: tuple[Optimizer, Optimizer],
    temperature: float = 1.0,
    epochs: int = 4,
    minibatches: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 1.0,
    entropy_coef: float = 0.0,
    kl_target: float = 0.0,
    kl_horizon: float = 10000.0,
    num_microbatches: int = 1,
    chunk_size: int = 64,
):
    """Clipped policy and value updates over freshly shuffled minibatches of the rollout.

    Losses are means over the response tokens of a whole minibatch, also across microbatches and devices.

    Args:
      txs: optimisers of policy and value; their schedules see `state.step`, which counts updates, not minibatches.
      value_coef: multiplies the value loss. entropy_coef: entropy bonus, nats.
      kl_target: nats a sequence; above 0 the KL coefficient adapts to it, over `kl_horizon` episodes.
    Source: Schulman et al. 2017, arXiv:1707.06347; adaptive KL: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    size, clip = rollout.mask.shape[0], {"clip_low": clip_low, "clip_high": clip_high}

    def policy_loss(params, micro: Rollout):
        rows = (micro.prompts, micro.prompt_mask, micro.responses, micro.mask)
        stats = response_stats(models.policy, params, *rows, temperature=temperature, chunk_size=chunk_size)
        losses = clipped_policy_losses(stats.logprobs, micro.old_logprobs, micro.advantages, **clip)
        metrics = {"ppo/entropy": Mean.over(stats.entropy, micro.mask), **ratio_metrics(stats.logprobs, micro, **clip)}
        return Mean.over(losses - entropy_coef * stats.entropy, micro.mask), metrics

    def value_loss(params, micro: Rollout):
        return clipped_value_loss(models.value, params, micro, value_clip, value_coef)

    def minibatch_step(carry, rows):
        policy, value = carry
        batch = jax.tree.map(lambda x: x[rows], rollout)
        (loss, aux), grads = weighted_grads(policy_loss, policy.params, batch, num_microbatches, has_aux=True)
        (v_loss, v_aux), v_grads = weighted_grads(value_loss, value.params, batch, num_microbatches, has_aux=True)
        policy = policy.apply_gradients(grads, txs[0], loss=loss.value, step=state.step)
        value = value.apply_gradients(v_grads, txs[1], loss=v_loss.value, step=state.step)
        metrics = {"ppo/policy_loss": loss, "ppo/value_loss": v_loss, **aux, **v_aux, **norms(grads, v_grads)}
        return (policy, value), metrics

    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(rng, epochs))  # [epochs B]
    order = orders.reshape(epochs * minibatches, -1)
    (policy, value), metrics = jax.lax.scan(minibatch_step, (state.policy, state.value), order)
    metrics = over_minibatches(metrics) | rollout_metrics(rollout) | {"ppo/kl_coef": Mean.of(state.kl_coef)}
    kl_coef = state.kl_coef
    if kl_target > 0.0:
        kl_coef = adaptive_kl(kl_coef, metrics["ppo/kl"].value, size, target=kl_target, horizon=kl_horizon)
    return state.replace(policy=policy, value=value, kl_coef=kl_coef, step=state.step + 1), metrics


def clipped_value_loss(model, params, micro: Rollout, value_clip: float, value_coef: float):
    """(the loss, metrics) of the values of one minibatch."""
    values = response_values(model, params, micro.prompts, micro.prompt_mask, micro.responses, micro.mask)
    losses = clipped_value_losses(values, micro.values, micro.returns, clip=value_clip)
    clipped = (jnp.abs(values - micro.values) > value_clip) * 1.0
    metrics = {"ppo/value_clip_fraction": Mean.over(clipped, micro.mask)}
    return Mean.over(value_coef * losses, micro.mask), metrics


def norms(grads, value_grads) -> dict[str, Mean]:
    """Gradient norms before clipping."""
    return {
        "optim/grad_norm": Mean.of(optax.tree.norm(grads)),
        "optim/value_grad_norm": Mean.of(optax.tree.norm(value_grads)),
    }


def over_minibatches(metrics: dict[str, Mean]) -> dict[str, Mean]:
    """Metrics of all minibatches [epochs * minibatches] added up; of the ratio's error the first, where it is 1."""
    first_error = Mean(*(x[0] for x in metrics.pop("ppo/ratio_error")))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics) | {"ppo/first_ratio_error": first_error}


def ratio_metrics(logprobs, micro: Rollout, *, clip_low: float, clip_high: float) -> dict[str, Mean]:
    """How far the policy has moved from the one that sampled: over the response tokens, KL in nats a token."""
    change = jnp.where(micro.mask, logprobs - micro.old_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(change, -20.0, 20.0))
    of_tokens = {
        "ppo/approx_kl": 0.5 * change**2,
        "ppo/clip_fraction": ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)) * 1.0,
        "ppo/ratio": ratio,
        "ppo/ratio_variance": (ratio - 1.0) ** 2,  # its mean is 1 in expectation
        "ppo/ratio_error": jnp.abs(ratio - 1.0),
    }
    return {name: Mean.over(value, micro.mask) for name, value in of_tokens.items()}


def rollout_metrics(rollout: Rollout) -> dict[str, Mean]:
    """What is worth watching of the samples themselves. KL is in nats a sequence, length in tokens."""
    mask = rollout.mask
    change = jnp.where(mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0)
    errors = jnp.where(mask, rollout.returns - rollout.values, 0.0)
    centred = jnp.where(mask, rollout.returns - masked_mean(rollout.returns, mask), 0.0)
    unexplained = jnp.sum(errors**2) / jnp.maximum(jnp.sum(centred**2), 1e-8)
    return {
        "ppo/score": Mean.of(rollout.scores),
        "ppo/raw_score": Mean.of(rollout.raw_scores),
        "ppo/return": Mean.of(jnp.sum(jnp.where(mask, rollout.rewards, 0.0), axis=1)),
        "ppo/kl": Mean.of(jnp.sum(change, axis=1)),
        "ppo/length": Mean.of(jnp.sum(mask, axis=1)),
        "ppo/eos_share": Mean.of(rollout.ended),
        "ppo/value": Mean.over(rollout.values, mask),
        "ppo/explained_variance": Mean.of(1.0 - unexplained),
        "ppo/rollout_train_gap": Mean.of(
            jnp.max(jnp.where(mask, jnp.abs(rollout.sampled_logprobs - rollout.old_logprobs), 0.0))
        ),
    }
