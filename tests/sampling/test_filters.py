import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfjax.sampling import filters

LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, 40))


def kept(filtered):
    return np.isfinite(np.asarray(filtered))


def smallest_set(probabilities, p):
    """Float64 loop: most probable first until the set holds p."""
    keep, total = np.zeros(len(probabilities), bool), 0.0
    for index in np.argsort(-probabilities, kind="stable"):
        if total >= p:
            break
        keep[index], total = True, total + probabilities[index]
    return keep


@pytest.mark.parametrize("k", [1, 3, 39])
def test_top_k_keeps_the_k_largest_and_changes_no_kept_logit(k):
    out = filters.top_k(LOGITS, k)
    for row, logits in zip(kept(out), np.asarray(LOGITS), strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-logits)[:k])
    np.testing.assert_array_equal(jnp.where(kept(out), out, LOGITS), LOGITS)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_p(p):
    out = filters.top_p(LOGITS, p)
    probabilities = np.asarray(jax.nn.softmax(LOGITS.astype(jnp.float32)), np.float64)
    for row, probs in zip(kept(out), probabilities, strict=True):
        np.testing.assert_array_equal(row, smallest_set(probs, p))
    np.testing.assert_array_equal(jnp.where(kept(out), out, LOGITS), LOGITS)


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(kept(filters.top_k(logits, 2)), [[True, True, True, True, False]])
    np.testing.assert_array_equal(kept(filters.top_p(logits, 0.6)), [[True, True, True, True, False]])


def test_off_values_change_nothing():
    for out in (
        filters.top_k(LOGITS, 0),
        filters.top_k(LOGITS, 40),
        filters.top_k(LOGITS, 99),
        filters.top_p(LOGITS, 1.0),
    ):
        np.testing.assert_array_equal(out, LOGITS)


def test_top_p_after_top_k_counts_only_what_top_k_left():
    both = kept(filters.top_p(filters.top_k(LOGITS, 5), 0.99))
    for row, logits in zip(both, np.asarray(LOGITS, np.float64), strict=True):
        left = np.where(logits >= np.sort(logits)[-5], np.exp(logits), 0.0)
        np.testing.assert_array_equal(row, smallest_set(left / left.sum(), 0.99))


def test_the_most_probable_token_always_stays():
    certain = jnp.array([[50.0, 0.0, 0.0]])
    for out in (filters.top_k(certain, 1), filters.top_p(certain, 1e-9), filters.top_p(certain, 0.999)):
        np.testing.assert_array_equal(kept(out), [[True, False, False]])


def test_temperature_divides():
    np.testing.assert_allclose(filters.scale_temperature(LOGITS, 0.5), 2 * LOGITS, rtol=1e-6)
    assert filters.scale_temperature(LOGITS.astype(jnp.bfloat16), 0.5).dtype == jnp.float32


@pytest.mark.parametrize(
    "call", [lambda: filters.top_k(LOGITS, -1), lambda: filters.top_p(LOGITS, 0.0), lambda: filters.top_p(LOGITS, 1.5)]
)
def test_a_value_out_of_range_is_refused(call):
    with pytest.raises(ValueError, match="it must be"):
        call()


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_at_least_that_share_of_the_most_probable(p):
    out = filters.min_p(LOGITS, p)
    probabilities = np.asarray(jax.nn.softmax(LOGITS.astype(jnp.float32)), np.float64)
    np.testing.assert_array_equal(kept(out), probabilities >= p * probabilities.max(1, keepdims=True) * (1 - 1e-6))
    np.testing.assert_array_equal(jnp.where(kept(out), out, LOGITS), LOGITS)


def test_min_p_is_off_at_zero_and_refused_beyond_one():
    assert filters.min_p(LOGITS, 0.0) is LOGITS
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="min_p"):
            filters.min_p(LOGITS, p)
