"""Losses that turn ratings into scores. Unreduced; padding may hold any finite value, the caller's mask drops it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GAP_SLACK = 1e-4  # of a least gap: ratings are means of raters, centred, in float32
MIN_GAP = 1e-6  # cutpoints nearer than this count as this far apart, so that a crossing gives a large finite loss


def least_gap(min_gap: float) -> float:
    """The difference from which on two ratings count as `min_gap` apart: just below it, whatever rounding took away.

    The one rule of training pairs and of figures; ratings that are equal are never apart, also at a `min_gap` of 0.
    """
    return min_gap * (1.0 - GAP_SLACK)


def regression_losses(scores: Float[Array, "*B"], ratings: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Squared error (score - rating)^2, in squared units of the rating. Ratings are constants."""
    return jnp.square(scores - jax.lax.stop_gradient(ratings))


def ordinal_losses(
    scores: Float[Array, "*B"], cutpoints: Float[Array, " bounds"], ratings: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Negative log-likelihood of a rating among K ordered classes, with P(rating <= k) = sigmoid(cutpoint_k - score).

    Computed as -log[sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper))], exact far out in both tails.

    Args:
      scores: a higher score makes higher ratings likelier.
      cutpoints: the K - 1 bounds between classes, increasing (for instance a first value plus a cumsum of softplus).
      ratings: classes 0..K-1; values outside are clipped.
    Source: McCullagh 1980, "Regression models for ordinal data", the proportional-odds model.
    """
    last = cutpoints.shape[0]  # = K - 1, the highest class
    ratings = jnp.clip(ratings, 0, last)
    upper = cutpoints[jnp.minimum(ratings, last - 1)]
    lower = cutpoints[jnp.maximum(ratings - 1, 0)]
    inside = (ratings > 0) & (ratings < last)
    gap = jnp.where(inside, jnp.maximum(upper - lower, MIN_GAP), 1.0)
    return (
        jnp.where(ratings < last, jax.nn.softplus(scores - upper), 0.0)
        + jnp.where(ratings > 0, jax.nn.softplus(lower - scores), 0.0)
        - jnp.where(inside, jnp.log(-jnp.expm1(-gap)), 0.0)
    )
