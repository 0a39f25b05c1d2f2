"""Losses that teach a language model from preferences alone: DPO and its relatives. Arrays in, unreduced arrays out.

`policy_*` and `ref_*` are log-probabilities of whole answers in nats, under the model that is trained and under the
frozen reference: sums over the answer's tokens, or where a name ends in `_mean`, and in `ipo_losses`, means per token.
The reference is a constant; no gradient flows into it. log(policy / ref) times beta is the implicit reward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def log_ratio_margins(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """log(policy / ref) of the chosen answer less that of the rejected one; beta times it is the reward's margin."""
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def dpo_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*B"]:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h the margin of log-ratios and e the smoothing.

    Args:
      beta: how strongly the reference holds; above 0.
      label_smoothing: e, the chance that a preference is the wrong way round, in [0, 0.5); above 0 conservative DPO.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO", eq. 3.
    """
    h = beta * log_ratio_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (1.0 - label_smoothing) * jax.nn.softplus(-h) + label_smoothing * jax.nn.softplus(h)


def robust_dpo_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*B"]:
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e): DPO's loss, unbiased under flipped labels.

    With every label flipped with probability e its expectation is `dpo_losses` of the true labels.

    Args: as of `dpo_losses`.
    Source: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12.
    """
    h = beta * log_ratio_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    kept, flipped = jax.nn.softplus(-h), jax.nn.softplus(h)
    return ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def hinge_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
) -> Float[Array, "*B"]:
    """max(0, 1 - beta h), h the margin of log-ratios: no more pull once the implicit rewards are 1 apart.

    Source: Liu et al. 2024, RSO, arXiv:2309.06657, eq. 10; Zhao et al. 2023, SLiC-HF, arXiv:2305.10425.
    """
    return jax.nn.relu(1.0 - beta * log_ratio_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


def ipo_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
) -> Float[Array, "*B"]:
    """(h - 1 / (2 beta))^2, h the margin of log-ratios per token: least at h = 1 / (2 beta), not at infinity.

    Args:
      policy_chosen .. ref_rejected: means over the answers' tokens.
      beta: the paper's tau.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    margin = log_ratio_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return jnp.square(margin - 1.0 / (2.0 * beta))


def apo_zero_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
) -> Float[Array, "*B"]:
    """1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected), r = log(policy / ref): chosen goes up, rejected down.

    For chosen answers that are better than what the model writes.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 5.
    """
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    return jax.nn.sigmoid(-beta * (policy_chosen - ref_chosen)) + jax.nn.sigmoid(
        beta * (policy_rejected - ref_rejected)
    )


def apo_down_losses(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: float,
) -> Float[Array, "*B"]:
    """sigmoid(beta r_chosen) + 1 - sigmoid(beta (r_chosen - r_rejected)): both go down, the rejected one further.

    For chosen answers that are worse than what the model writes.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 6.
    """
    margin = log_ratio_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    own = policy_chosen - jax.lax.stop_gradient(ref_chosen)
    return jax.nn.sigmoid(beta * own) + jax.nn.sigmoid(-beta * margin)


def cpo_losses(
    policy_chosen: Float[Array, "*B"], policy_rejected: Float[Array, "*B"], *, beta: float
) -> Float[Array, "*B"]:
    """-log sigmoid(beta (policy_chosen - policy_rejected)): DPO with a uniform reference.

    Source: Xu et al. 2024, arXiv:2401.08417, eq. 4; its likelihood term is the step's `sft_weight`.
    """
    return jax.nn.softplus(-beta * (policy_chosen - policy_rejected))


def simpo_losses(
    chosen_mean: Float[Array, "*B"], rejected_mean: Float[Array, "*B"], *, beta: float, gamma: float
) -> Float[Array, "*B"]:
    """-log sigmoid(beta (chosen_mean - rejected_mean) - gamma).

    Args:
      gamma: the reward's target margin, in units of beta times nats a token.
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return jax.nn.softplus(gamma - beta * (chosen_mean - rejected_mean))


def orpo_losses(
    chosen_mean: Float[Array, "*B"], rejected_mean: Float[Array, "*B"], *, beta: float
) -> Float[Array, "*B"]:
    """-beta log sigmoid(log of the odds ratio), odds = p / (1 - p) with p = exp(mean log-probability).

    Args:
      beta: the paper's lambda; the likelihood of the chosen row, to which this is added, is the step's `sft_weight`.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 7.
    """
    odds = log_odds(chosen_mean) - log_odds(rejected_mean)
    return beta * jax.nn.softplus(-odds)


def log_odds(log_prob: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log(p / (1 - p)) of p = exp(log_prob); finite up to p = 1."""
    below = jnp.minimum(log_prob, -1e-6)
    return log_prob - jnp.log(-jnp.expm1(below))


def kto_losses(
    policy: Float[Array, "*B"],
    ref: Float[Array, "*B"],
    desirable: Bool[Array, "*B"],
    kl: Float[Array, "*B"] | Float[Array, ""],
    *,
    beta: float,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
) -> Float[Array, "*B"]:
    """w (1 - sigmoid(beta (r - kl))) of a desirable answer, w (1 - sigmoid(beta (kl - r))) of another.

    r is log(policy / ref), and w the weight of the answer's class.

    Args:
      policy, ref: sums over one answer a row; nothing is paired.
      kl: the baseline, an estimate of KL(policy || ref) in nats, at least 0; a constant.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    ref, kl = jax.lax.stop_gradient((ref, kl))
    distance = beta * (policy - ref - kl)
    up = weight_desirable * jax.nn.sigmoid(-distance)
    return jnp.where(desirable, up, weight_undesirable * jax.nn.sigmoid(distance))
