"""PPO, part 3: from samples and scores to advantages, fixed before the first optimiser step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lfjax.masking import last_true_index, masked_whiten
from lfjax.rl.advantages import gae
from lfjax.rl.kl import kl_estimates
from lfjax.state import RewardNorm
from lfjax.steps.ppo_forward import PPOModels, response_stats, response_values
from lfjax.types import Generation, Rollout, split_rows


def ppo_experience(
    policy_params,
    value_params,
    ref_params,
    generation: Generation,
    scores,
    *,
    models: PPOModels,
    kl_coef,
    eos_ids: tuple[int, ...],
    reward_norm: RewardNorm | None = None,
    temperature: float = 1.0,
    minibatches: int = 1,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_kind: str = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    min_length: int = 0,
    require_eos: bool = True,
    penalty: float = 1.0,
    chunk_size: int = 64,
) -> Rollout:
    """Old and reference log-probabilities, values, rewards, advantages and returns of one batch of responses.

    A token's reward is -kl_coef * kl; the score is added at the response's last token (EOS included), where the
    episode ends. Old log-probabilities and values come from the update's own forward pass on its own minibatch shape.

    Args:
      scores: [B] raw; normalised by `reward_norm`, then the rules: a response shorter than `min_length` tokens, or
        without EOS under `require_eos`, scores min(score, 0) - penalty.
      kl_coef: [] weight of the KL term in the reward.
      whiten_rewards: divide by the deviation, keep the mean. whiten_advantages: also subtract the mean. Both over
        the response tokens of the whole batch.
    Source: Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2016, arXiv:1506.02438.
    """
    mask = generation.mask
    rows = (generation.prompts, generation.prompt_mask, generation.tokens, mask)
    params = (policy_params, value_params, ref_params)
    stats = {"temperature": temperature, "chunk_size": chunk_size}
    old, ref, values = forward_passes(*params, rows, models=models, minibatches=minibatches, stats=stats)
    norm = reward_norm or RewardNorm.identity()
    ended = has_ended(generation, eos_ids)  # [B]
    short = (jnp.sum(mask, axis=1) < min_length) | (~ended & require_eos)
    normalised = (scores.astype(jnp.float32) - norm.mean) / norm.std
    final = jnp.where(short, jnp.minimum(normalised, 0.0) - penalty, normalised)  # [B]

    kl = jnp.where(mask, kl_estimates(old, ref, kind=kl_kind), 0.0)
    at_last = (jnp.arange(mask.shape[1])[None, :] == last_true_index(mask)[:, None]) & mask
    rewards = -kl_coef * kl + jnp.where(at_last, final[:, None], 0.0)  # [B R] float32
    shaped = masked_whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
    advantages, returns = gae(shaped, values, mask, gamma=gamma, lam=lam)
    advantages = masked_whiten(advantages, mask) if whiten_advantages else advantages
    advantages, returns = (jnp.where(mask, x, 0.0) for x in (advantages, returns))
    return Rollout(
        *rows, sampled_logprobs=generation.logprobs, old_logprobs=old, ref_logprobs=ref, values=values, rewards=rewards,
        advantages=advantages, returns=returns, scores=final, raw_scores=scores.astype(jnp.float32), ended=ended,
    )  # fmt: skip


def forward_passes(policy_params, value_params, ref_params, rows, *, models: PPOModels, minibatches: int, stats):
    """(old log-probabilities, the reference's, values), each [B R], in the update's minibatch shape; 0 in padding."""

    def forward(rows):
        old = response_stats(models.policy, policy_params, *rows, **stats).logprobs
        ref = response_stats(models.reference or models.policy, ref_params, *rows, **stats).logprobs
        return old, ref, response_values(models.value, value_params, *rows)

    parts = jax.lax.map(forward, split_rows(rows, minibatches))  # each [minibatches, B/minibatches, R]
    mask = rows[-1]
    return tuple(jnp.where(mask, jnp.moveaxis(x, 0, 1).reshape(mask.shape), 0.0) for x in parts)


def has_ended(generation: Generation, eos_ids: tuple[int, ...]):
    """Whether a response's last token is one that ends it, [B] bool; an empty response has not."""
    last = last_true_index(generation.mask)
    token = jnp.take_along_axis(generation.tokens, last[:, None], axis=1)[:, 0]
    return jnp.isin(token, jnp.asarray(eos_ids)) & jnp.any(generation.mask, axis=1)
