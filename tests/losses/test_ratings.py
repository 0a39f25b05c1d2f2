import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.shapes import call_checked

from lfjax.losses.ratings import ordinal_losses, regression_losses

CUTPOINTS = jnp.array([-1.5, 0.0, 0.5, 2.0])  # five classes
SCORES = jnp.array([-4.0, -0.3, 0.0, 1.7, 9.0])


@pytest.mark.parametrize("rating", range(5))
def test_ordinal_equals_float64_in_every_class(rating):
    ratings = jnp.full(SCORES.shape, rating, jnp.int32)
    losses = call_checked(ordinal_losses, SCORES, CUTPOINTS, ratings)
    expected = [-np.log(reference.ordinal_probs(s, np.float64(CUTPOINTS))[rating]) for s in np.float64(SCORES)]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_probabilities_of_all_ratings_sum_to_one():
    total = sum(jnp.exp(-ordinal_losses(SCORES, CUTPOINTS, jnp.full(SCORES.shape, k))) for k in range(5))
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_two_classes_are_a_logistic_regression():
    cut = jnp.array([0.4])
    np.testing.assert_allclose(
        ordinal_losses(SCORES, cut, jnp.ones(5, jnp.int32)), -jax.nn.log_sigmoid(SCORES - 0.4), rtol=1e-5
    )


@pytest.mark.parametrize("rating, sign", [(0, 1.0), (4, -1.0)])
def test_extreme_ratings_pull_scores_outwards(rating, sign):
    ratings = jnp.full(SCORES.shape, rating)
    grad = jax.grad(lambda s: ordinal_losses(s, CUTPOINTS, ratings).sum())(SCORES)
    assert (np.asarray(grad) * sign > 0).all()


@pytest.mark.parametrize("score", [1e9, -1e9, 200.0])
@pytest.mark.parametrize("rating", [-1_000_000_000, 0, 2, 4, 1_000_000_000])
def test_far_scores_and_wild_ratings_stay_finite(score, rating):
    def loss(score, cutpoints):
        return ordinal_losses(score, cutpoints, jnp.array([rating])).sum()

    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.array([score]), CUTPOINTS)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_crossed_cutpoints_give_a_large_finite_loss():
    value, grad = jax.value_and_grad(lambda c: ordinal_losses(jnp.zeros(1), c, jnp.array([1])).sum())(
        jnp.array([1.0, -1.0])
    )
    assert 10 < value < 1e3 and np.isfinite(grad).all()


def test_regression_is_the_squared_error_and_moves_the_score_only():
    losses = call_checked(regression_losses, SCORES, SCORES - 3.0)
    np.testing.assert_allclose(losses, 9.0, rtol=1e-5)
    d_score, d_rating = jax.grad(lambda s, r: regression_losses(s, r).sum(), (0, 1))(SCORES, SCORES - 3.0)
    np.testing.assert_allclose(d_score, 6.0, rtol=1e-5)
    np.testing.assert_array_equal(d_rating, 0.0)


def test_regression_is_finite_on_wild_padding():
    mask = jnp.array([True, False, True, False, False])
    ratings = jnp.where(mask, 1.0, 1e9)
    grad = jax.grad(lambda s: jnp.sum(jnp.where(mask, regression_losses(s, ratings), 0.0)))(
        jnp.where(mask, SCORES, -1e9)
    )
    np.testing.assert_allclose(grad, jnp.where(mask, 2 * (SCORES - 1.0), 0.0))
