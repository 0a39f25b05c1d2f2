"""Losses that turn comparisons into scores: pairs, rankings and target distributions over candidates.

Scores are in nats (log-odds): sigmoid(a - b) is the probability that a is preferred to b. C candidates a record;
`where` [*B C] is True for candidates that exist, and what the others hold never matters. Ranks are ints, 0 = best, need
not be consecutive, and candidates that tie share a rank. A record in which no candidate exists has loss 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ABSENT = -1e30  # score of a candidate that does not exist: exp(ABSENT - anything sane) is exactly 0


def bradley_terry_losses(
    chosen: Float[Array, "*B"], rejected: Float[Array, "*B"], *, margin: float | Float[Array, "*B"] = 0.0
) -> Float[Array, "*B"]:
    """Negative log-likelihood of a preference, -log sigmoid(chosen - rejected - margin).

    Args:
      chosen, rejected: scores of the preferred and of the other answer.
      margin: how much better the chosen one must be, in units of score; one for all or one a pair.
    Source: Bradley and Terry 1952; margin as in Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    return jax.nn.softplus(margin - (chosen - rejected))


def pairwise_hinge_losses(
    chosen: Float[Array, "*B"], rejected: Float[Array, "*B"], *, margin: float | Float[Array, "*B"] = 1.0
) -> Float[Array, "*B"]:
    """max(0, margin - (chosen - rejected)): no more pull once the pair is `margin` apart.

    Source: Herbrich, Graepel and Obermayer 2000, "Large margin rank boundaries for ordinal regression".
    """
    return jax.nn.relu(margin - (chosen - rejected))


def listwise_hinge_losses(
    scores: Float[Array, "*B C"],
    ranks: Int[Array, "*B C"],
    *,
    margin: float = 1.0,
    where: Bool[Array, "*B C"] | None = None,
) -> Float[Array, "*B"]:
    """Mean hinge over all pairs of a record whose ranks differ; ties make no pair.

    Args:
      scores: one a candidate.
      ranks: 0 = best, ties share a rank.
      margin: the distance asked between any better and any worse candidate.
      where: candidates that exist; all by default.
    Returns:
      One loss a record: the mean (not the sum) over its pairs, so that long lists weigh no more than short ones.
    Source: Herbrich et al. 2000 on all pairs of a list; their mean as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    scores, where = _present(scores, where)
    better = (ranks[..., :, None] < ranks[..., None, :]) & where[..., :, None] & where[..., None, :]
    losses = pairwise_hinge_losses(scores[..., :, None], scores[..., None, :], margin=margin)
    pairs = jnp.sum(better, axis=(-2, -1), dtype=jnp.float32)
    return jnp.sum(jnp.where(better, losses, 0.0), axis=(-2, -1)) / jnp.maximum(pairs, 1.0)


def plackett_luce_losses(
    scores: Float[Array, "*B C"], ranks: Int[Array, "*B C"], *, where: Bool[Array, "*B C"] | None = None
) -> Float[Array, "*B"]:
    """Negative log-likelihood of a ranking drawn best first without replacement, with weights exp(score).

    sum_i [log sum_{j: rank_j >= rank_i} exp(s_j) - s_i]. With two candidates it is Bradley-Terry.

    Ties follow Breslow's approximation: each of the tied candidates competes against every candidate that is not
    ranked above it, its ties included. So a tie pulls the tied scores together (where all candidates tie, the loss is
    least at equal scores), and without ties the likelihood is exact.

    Args:
      scores: one a candidate.
      ranks: 0 = best, ties share a rank.
      where: candidates that exist; all by default.
    Returns:
      One loss a record, in nats, summed over its candidates.
    Source: Plackett 1975; Luce 1959; ties: Breslow 1974, "Covariance analysis of censored survival data".
    """
    scores, where = _present(scores, where)
    itself = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=bool), (*scores.shape, scores.shape[-1]))
    remaining = ((ranks[..., None, :] >= ranks[..., :, None]) & where[..., None, :]) | itself
    log_sums = jax.nn.logsumexp(jnp.where(remaining, scores[..., None, :], ABSENT), axis=-1)
    return jnp.sum(jnp.where(where, log_sums - scores, 0.0), axis=-1)


def softmax_feedback_losses(
    scores: Float[Array, "*B C"], target_probs: Float[Array, "*B C"], *, where: Bool[Array, "*B C"] | None = None
) -> Float[Array, "*B"]:
    """Cross-entropy from people's distribution over answers to the model's, -sum_c q_c log softmax(scores)_c.

    Args:
      scores: one a candidate.
      target_probs: q, summing to 1 over the candidates that exist (one-hot: best of C). A constant.
      where: candidates that exist; all by default.
    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 1 (one-hot); Cao et al. 2007, ListNet, for soft targets.
    """
    target_probs = jax.lax.stop_gradient(target_probs)
    scores, where = _present(scores, where)
    log_probs = jax.nn.log_softmax(jnp.where(where, scores, ABSENT), axis=-1)
    return -jnp.sum(jnp.where(where, target_probs * log_probs, 0.0), axis=-1)


def center_penalty(scores: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """(sum_c scores)^2 a record: fixes the free constant of comparison losses at scores that sum to zero.

    For a pair it is (chosen + rejected)^2. Candidates that don't exist must hold 0.
    Source: Eisenstein et al. 2023, arXiv:2312.09244, section 3.
    """
    return jnp.square(jnp.sum(scores, axis=-1))


def _present(scores, where):
    """Scores with 0 where no candidate is, and the mask."""
    if where is None:
        where = jnp.ones(scores.shape, bool)
    return jnp.where(where, scores, 0.0), where
