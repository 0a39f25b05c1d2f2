import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfjax.masking import last_true_index, masked_mean, masked_whiten

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5)).astype(np.float32)
MASK = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
FUNCTIONS = (masked_mean, masked_whiten, lambda x, m: masked_whiten(x, m, shift_mean=False))


def test_mean_is_that_of_the_kept_elements():
    np.testing.assert_allclose(masked_mean(X, MASK), X[MASK].mean(), rtol=1e-6)
    rows = [X[i, MASK[i]].mean() for i in range(3)]
    np.testing.assert_allclose(masked_mean(X, MASK, axis=1), rows, rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_gives_mean_zero_and_variance_one(ddof):
    kept = np.asarray(masked_whiten(5 * X + 3, MASK, ddof=ddof))[MASK]
    np.testing.assert_allclose([kept.mean(), kept.var(ddof=ddof)], [0, 1], atol=1e-5)


def test_whitening_without_shift_keeps_the_mean():
    np.testing.assert_allclose(
        np.asarray(masked_whiten(5 * X + 3, MASK, shift_mean=False))[MASK].mean(), (5 * X + 3)[MASK].mean(), rtol=1e-5
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("padding", [1e9, -1e9, np.nan])
def test_what_padding_holds_changes_nothing(function, padding):
    clean = function(jnp.where(MASK, X, 0.0), MASK)
    dirty = function(jnp.where(MASK, X, padding), MASK)
    np.testing.assert_array_equal(dirty, clean)
    grad = jax.grad(lambda x: jnp.sum(function(x, MASK) ** 3))(jnp.where(MASK, X, padding))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[~MASK], 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_kept_gives_zero_and_finite_gradients(function):
    value, grad = jax.value_and_grad(lambda x: jnp.sum(function(x, jnp.zeros_like(MASK))))(jnp.asarray(X))
    assert value == 0 and np.isfinite(grad).all()


def test_whitened_padding_is_zero():
    np.testing.assert_array_equal(np.asarray(masked_whiten(X, MASK, shift_mean=False))[~MASK], 0)


def test_last_true_index_on_either_padding_side_with_holes_and_nothing():
    mask = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(last_true_index(mask), [1, 3, 2, 0, 0])
