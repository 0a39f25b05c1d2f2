"""How far a policy is from its reference: estimates per token from samples, and the controller of the penalty."""

import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_LOG_RATIO = 20.0  # inside exp only; keeps padding finite


def kl_estimates(
    logprobs: Float[Array, "*B T"], ref_logprobs: Float[Array, "*B T"], *, kind: str
) -> Float[Array, "*B T"]:
    """Estimates of KL(policy || reference) from tokens the policy sampled, in nats per token.

    With k1 = logp - ref_logp: "k1" itself (unbiased, can be negative), "k2" = k1^2 / 2, "k3" = exp(-k1) - 1 + k1
    (unbiased, never negative), "abs" = |k1|. At padding: any finite value.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    if kind == "k3":
        return jnp.expm1(jnp.clip(-log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio
    if kind == "abs":
        return jnp.abs(log_ratio)
    raise ValueError(f"kind is {kind!r}; it must be 'k1', 'k2', 'k3' or 'abs'")


def adaptive_kl(
    coef: Float[Array, ""], kl: Float[Array, ""], n: int, *, target: float, horizon: float
) -> Float[Array, ""]:
    """The next penalty coefficient: coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Args:
      coef: the coefficient this batch was penalised with.
      kl: mean KL a sequence, in nats.
      n: episodes in this batch.
      target: KL a sequence to steer for, in nats.
      horizon: episodes over which the coefficient adapts.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * n / horizon)
