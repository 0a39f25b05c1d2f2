import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.shapes import call_checked

from lfjax.rl.kl import adaptive_kl, kl_estimates

RNG = np.random.default_rng(0)
LOGPROBS, REF = (jnp.asarray(RNG.normal(size=(3, 5)) - 3, jnp.float32) for _ in range(2))
FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "abs": np.abs,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_estimates_equal_their_formulas_in_float64(kind):
    estimates = call_checked(kl_estimates, LOGPROBS, REF, kind=kind)
    np.testing.assert_allclose(estimates, FORMULAS[kind](np.float64(LOGPROBS) - np.float64(REF)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expected_estimate_is_the_exact_divergence(kind):
    p, q = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=9), jnp.float32)) for _ in range(2))
    exact = jnp.sum(jnp.exp(p) * (p - q))
    np.testing.assert_allclose(jnp.sum(jnp.exp(p) * kl_estimates(p, q, kind=kind)), exact, rtol=1e-5)


@pytest.mark.parametrize("kind", ["k2", "k3", "abs"])
def test_estimate_is_never_negative_and_zero_at_the_reference(kind):
    assert (np.asarray(kl_estimates(LOGPROBS, REF, kind=kind)) >= 0).all()
    np.testing.assert_array_equal(kl_estimates(REF, REF, kind=kind), 0.0)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("large", [1e9, -1e9])
def test_padding_stays_finite_in_value_and_gradient(kind, large):
    mask = jnp.arange(5)[None, :] < jnp.array([[2], [5], [0]])
    ref = jnp.where(mask, REF, -large)

    def loss(logprobs):
        return jnp.sum(jnp.where(mask, kl_estimates(logprobs, ref, kind=kind), 0.0))

    grad = jax.grad(loss)(jnp.where(mask, LOGPROBS, large))
    clean = jax.grad(lambda x: jnp.sum(jnp.where(mask, kl_estimates(x, REF, kind=kind), 0.0)))(LOGPROBS)
    np.testing.assert_array_equal(grad, clean)
    assert np.isfinite(kl_estimates(jnp.where(mask, LOGPROBS, large), ref, kind=kind)).all()


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="'k1', 'k2', 'k3' or 'abs'"):
        kl_estimates(LOGPROBS, REF, kind="k4")


@pytest.mark.parametrize(
    "kl, factor", [(6.0, 1.0), (6.6, 1.0 + 0.1 * 64 / 1e4), (60.0, 1.0 + 0.2 * 64 / 1e4), (0.0, 1.0 - 0.2 * 64 / 1e4)]
)
def test_coefficient_moves_with_the_clipped_relative_error(kl, factor):
    coef = call_checked(adaptive_kl, jnp.float32(0.15), jnp.float32(kl), 64, target=6.0, horizon=1e4)
    np.testing.assert_allclose(coef, 0.15 * factor, rtol=1e-6)
