"""Advantages: how much better than expected an action or a whole response was. No gradient is meant to flow here."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STD_FLOOR = 1e-4  # added to the standard deviation of a group, so that equal scores give advantage 0


def gae(
    rewards: Float[Array, "*B T"], values: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, gamma: float, lam: float
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
    """Generalised advantage estimation along the last axis, over the positions that `mask` counts.

    A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t, where "next" is the next position that counts:
    holes in the mask (another speaker's turn) are stepped over. After the last one the episode is over: V_next = 0.

    Args:
      rewards: per position, after the KL term, the score included.
      values: predictions at the same positions, not whitened.
      mask: positions that count. The others may hold any value.
      gamma, lam: discount and trace decay, in [0, 1].
    Returns:
      (advantages, returns = advantages + values), both 0 where the mask is False.
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    rewards, values = (jnp.where(mask, x, 0.0).astype(jnp.float32) for x in (rewards, values))

    def backward(carry, step):
        next_advantage, next_value = carry
        reward, value, counts = step
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(counts, advantage, next_advantage), jnp.where(counts, value, next_value)
        return carry, jnp.where(counts, advantage, 0.0)

    by_time = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask)]
    end = jnp.zeros(rewards.shape[:-1], jnp.float32)
    _, advantages = jax.lax.scan(backward, (end, end), by_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + values


def discounted_returns(
    rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, gamma: float
) -> Float[Array, "*B T"]:
    """Discounted sum of the rewards from each position on, G_t = r_t + gamma G_next; holes and padding as in `gae`."""
    return gae(rewards, jnp.zeros(rewards.shape, jnp.float32), mask, gamma=gamma, lam=1.0)[0]


def rloo(scores: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Each score minus the mean score of the *other* responses to the same prompt.

    Args:
      scores: one a response; the responses to one prompt are neighbours.
      group_size: responses a prompt, at least 2.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; arXiv:2402.14740, section 3.2.
    """
    groups = _groups(scores, group_size)
    others = (jnp.sum(groups, axis=-1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(scores.shape)


def grpo(
    scores: Float[Array, " B"], group_size: int, *, scale: Literal["group", "batch", "none"] = "group"
) -> Float[Array, " B"]:
    """Each score minus its group's mean, over a standard deviation (ddof 1, plus 1e-4).

    Args:
      scores: one a response; the responses to one prompt are neighbours.
      group_size: responses a prompt, at least 2.
      scale: "group" divides by the group's own deviation, "batch" by that of all scores, "none" by nothing.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; "none": arXiv:2503.20783; "batch": arXiv:2508.08221.
    """
    groups = _groups(scores, group_size)
    centred = groups - jnp.mean(groups, axis=-1, keepdims=True)
    if scale == "group":
        centred = centred / (jnp.std(groups, axis=-1, ddof=1, keepdims=True) + STD_FLOOR)
    elif scale == "batch":
        centred = centred / (jnp.std(scores, ddof=1) + STD_FLOOR)
    elif scale != "none":
        raise ValueError(f"scale is {scale!r}; it must be 'group', 'batch' or 'none'")
    return centred.reshape(scores.shape)


def _groups(scores, group_size):
    if group_size < 2 or scores.shape[0] % group_size:
        raise ValueError(f"group_size is {group_size}; it must be at least 2 and divide the {scores.shape[0]} scores")
    return scores.reshape(-1, group_size)
