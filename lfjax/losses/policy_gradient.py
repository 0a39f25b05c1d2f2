"""Policy-gradient losses per token. Unreduced; at padding every input may hold any finite value."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_LOG_RATIO = 20.0  # exp stays finite on padding; a policy never gets this far in one update


def reinforce_losses(logprobs: Float[Array, "*B T"], advantages: Float[Array, "*B T"]) -> Float[Array, "*B T"]:
    """-A log p: its gradient is the policy gradient of the sampled tokens. Advantages are constants.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    return -jax.lax.stop_gradient(advantages) * logprobs


def clipped_policy_losses(
    logprobs: Float[Array, "*B T"],
    old_logprobs: Float[Array, "*B T"],
    advantages: Float[Array, "*B T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Array, "*B T"]:
    """Negative clipped surrogate, -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logp - old_logp).

    Args:
      logprobs: log-probabilities of the sampled tokens under the policy being trained, in nats.
      old_logprobs, advantages: constants; no gradient flows into them. Padding: any finite value.
      clip_low, clip_high: the ratio's free room below and above 1; low in (0, 1), high above 0.
    Returns:
      Loss per token, unreduced.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds as in arXiv:2503.14476.
    """
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_losses(
    values: Float[Array, "*B T"], old_values: Float[Array, "*B T"], returns: Float[Array, "*B T"], *, clip: float
) -> Float[Array, "*B T"]:
    """0.5 max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2): no reward for moving further than `clip`.

    Args:
      values: predictions of the value model being trained.
      old_values, returns: constants, as they were when the rollout was made.
      clip: in units of value, at least 0.
    Source: Dhariwal et al. 2017, OpenAI Baselines ppo2; used in Ziegler et al. 2019, arXiv:1909.08593.
    """
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
