import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.shapes import call_checked

from lfjax.losses import preference

RNG = np.random.default_rng(0)
SUMS = [
    jnp.asarray(-RNG.uniform(2.0, 30.0, size=6), jnp.float32) for _ in range(4)
]  # chosen, rejected, their reference
MEANS = [jnp.asarray(-RNG.uniform(0.05, 3.0, size=6), jnp.float32) for _ in range(4)]
WITH_REFERENCE = {
    "sigmoid": (functools.partial(preference.dpo_losses, label_smoothing=0.1), SUMS),
    "robust": (functools.partial(preference.robust_dpo_losses, label_smoothing=0.1), SUMS),
    "hinge": (preference.hinge_losses, SUMS),
    "ipo": (preference.ipo_losses, MEANS),
    "apo_zero": (preference.apo_zero_losses, SUMS),
    "apo_down": (preference.apo_down_losses, SUMS),
}
WITHOUT = {
    "cpo": (preference.cpo_losses, SUMS),
    "simpo": (functools.partial(preference.simpo_losses, gamma=0.4), MEANS),
    "orpo": (preference.orpo_losses, MEANS),
}


@pytest.mark.parametrize("kind", [*WITH_REFERENCE, *WITHOUT])
def test_a_pairs_loss_equals_float64(kind):
    function, arrays = (WITH_REFERENCE | WITHOUT)[kind]
    given = arrays if kind in WITH_REFERENCE else arrays[:2]
    found = call_checked(function, *given, beta=0.3)
    rows = zip(*(np.float64(x) for x in arrays), strict=True)
    expected = [reference.preference(kind, *row, 0.3, 0.1, 0.4) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_no_gradient_flows_into_the_reference(kind):
    function, arrays = WITH_REFERENCE[kind]
    grads = jax.grad(lambda *x: jnp.sum(function(*x, beta=0.3)), argnums=(0, 1, 2, 3))(*arrays)
    assert np.any(np.asarray(grads[0])) and not np.any(np.asarray(grads[2:]))


def test_at_the_reference_dpo_moves_both_answers_by_half_of_beta():
    """h = 0: the loss is log 2, and its slope sigmoid(0) beta."""
    same = (SUMS[0], SUMS[1], SUMS[0], SUMS[1])
    np.testing.assert_allclose(preference.dpo_losses(*same, beta=0.3), np.log(2.0), rtol=1e-6)
    grads = jax.grad(lambda c, r: jnp.sum(preference.dpo_losses(c, r, *same[2:], beta=0.3)), argnums=(0, 1))(*same[:2])
    np.testing.assert_allclose(grads[0], -0.15, rtol=1e-6)
    np.testing.assert_allclose(grads[1], 0.15, rtol=1e-6)


def test_robust_dpo_of_flipped_labels_is_on_average_dpo_of_the_true_ones():
    flip = 0.2
    right = preference.robust_dpo_losses(*SUMS, beta=0.1, label_smoothing=flip)
    wrong = preference.robust_dpo_losses(SUMS[1], SUMS[0], SUMS[3], SUMS[2], beta=0.1, label_smoothing=flip)
    np.testing.assert_allclose((1 - flip) * right + flip * wrong, preference.dpo_losses(*SUMS, beta=0.1), rtol=1e-4)


def test_ipo_is_least_where_the_margin_is_half_of_one_over_beta():
    zero = jnp.zeros(())
    slope = jax.grad(lambda chosen: preference.ipo_losses(chosen, zero, zero, zero, beta=0.25))
    assert slope(jnp.float32(2.0)) == 0.0 and slope(jnp.float32(1.9)) < 0.0 < slope(jnp.float32(2.1))


def test_hinge_lets_go_once_the_rewards_are_one_apart():
    zero = jnp.zeros(())
    slope = jax.grad(lambda chosen: preference.hinge_losses(chosen, zero, zero, zero, beta=0.5))
    assert slope(jnp.float32(2.1)) == 0.0 and slope(jnp.float32(1.9)) == -0.5


def test_at_the_reference_apo_zero_raises_the_chosen_answer_and_apo_down_leaves_it():
    same = (SUMS[0], SUMS[1], SUMS[0], SUMS[1])
    for losses, slope in ((preference.apo_zero_losses, -0.075), (preference.apo_down_losses, 0.0)):
        grads = jax.grad(lambda c, r: jnp.sum(losses(c, r, *same[2:], beta=0.3)), argnums=(0, 1))(*same[:2])  # noqa: B023
        np.testing.assert_allclose(grads[0], slope, atol=1e-7)  # a sigmoid's slope at 0 is a quarter
        np.testing.assert_allclose(grads[1], 0.075, rtol=1e-6)


def test_odds_of_one_half_are_even_and_of_one_are_finite():
    np.testing.assert_allclose(preference.log_odds(jnp.log(jnp.float32(0.5))), 0.0, atol=1e-6)
    value, slope = jax.value_and_grad(preference.log_odds)(jnp.float32(0.0))
    assert np.isfinite(value) and np.isfinite(slope) and value > 10.0


@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_kto_equals_float64_and_pulls_answers_apart(kl):
    desirable = jnp.array([1, 0, 1, 0, 0, 1], bool)
    options = {"beta": 0.2, "weight_desirable": 1.3, "weight_undesirable": 0.7}
    found = call_checked(preference.kto_losses, SUMS[0], SUMS[2], desirable, jnp.float32(kl), **options)
    rows = zip(np.float64(SUMS[0]), np.float64(SUMS[2]), np.asarray(desirable), strict=True)
    np.testing.assert_allclose(found, [reference.kto(*row, kl, 0.2, 1.3, 0.7) for row in rows], rtol=2e-5)

    def total(policy, ref, kl):
        return jnp.sum(preference.kto_losses(policy, ref, desirable, kl, **options))

    by_policy, by_ref, by_kl = jax.grad(total, argnums=(0, 1, 2))(SUMS[0], SUMS[2], jnp.float32(kl))
    assert np.array_equal(np.asarray(by_policy) < 0, desirable) and not np.any(by_ref) and by_kl == 0.0


@pytest.mark.parametrize("kind", [*WITH_REFERENCE, *WITHOUT])
@pytest.mark.parametrize("padding", [0.0, 1e9, -1e9])
def test_rows_that_do_not_count_stay_finite(kind, padding):
    """A padded row holds any finite value; what is masked afterwards may not be NaN, nor its gradient."""
    function, arrays = (WITH_REFERENCE | WITHOUT)[kind]
    given = [x.at[0].set(padding) for x in (arrays if kind in WITH_REFERENCE else arrays[:2])]
    grads = jax.grad(lambda *x: jnp.sum(jnp.where(jnp.arange(6) > 0, function(*x, beta=0.3), 0.0)))(*given)
    assert np.all(np.isfinite(grads)) and grads[0] == 0.0
