import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.shapes import call_checked

from lfjax.losses.policy_gradient import clipped_policy_losses, clipped_value_losses, reinforce_losses

RNG = np.random.default_rng(0)
LOGPROBS, OLD, ADVANTAGES = (jnp.asarray(RNG.normal(size=(3, 8)) * s, jnp.float32) for s in (0.4, 0.4, 2.0))
MASK = jnp.arange(8)[None, :] < jnp.array([[3], [8], [0]])
LOSSES = {
    "reinforce": lambda x, old, a: reinforce_losses(x, a),
    "policy": lambda x, old, a: clipped_policy_losses(x, old, a, clip_low=0.2, clip_high=0.3),
    "value": lambda x, old, a: clipped_value_losses(x, old, a, clip=0.2),
}


def loop(function, *arrays):
    return np.vectorize(function)(*(np.float64(x) for x in arrays))


def test_policy_losses_equal_float64():
    losses = call_checked(clipped_policy_losses, LOGPROBS, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    expected = loop(lambda x, o, a: reference.clipped_policy(x, o, a, 0.2, 0.3), LOGPROBS, OLD, ADVANTAGES)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_value_losses_equal_float64():
    losses = call_checked(clipped_value_losses, LOGPROBS, OLD, ADVANTAGES, clip=0.2)
    expected = loop(lambda v, o, r: reference.clipped_value(v, o, r, 0.2), LOGPROBS, OLD, ADVANTAGES)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "advantage, log_ratio, moves", [(1.0, 1.0, False), (1.0, -1.0, True), (-1.0, -1.0, False), (-1.0, 1.0, True)]
)
def test_clips_only_when_already_too_far_in_its_own_direction(advantage, log_ratio, moves):
    zero = jnp.zeros((1, 1))
    grad = jax.grad(lambda x: clipped_policy_losses(x, zero, zero + advantage, clip_low=0.2, clip_high=0.2).sum())(
        zero + log_ratio
    )
    assert bool(grad[0, 0] != 0) == moves


@pytest.mark.parametrize(
    "value, target, moves",
    [(1.0, 2.0, False), (1.0, -2.0, True), (-1.0, -2.0, False), (-1.0, 2.0, True), (0.1, 2.0, True)],
)
def test_value_stops_only_when_it_has_moved_enough_towards_its_target(value, target, moves):
    zero = jnp.zeros((1, 1))
    grad = jax.grad(lambda x: clipped_value_losses(x, zero, zero + target, clip=0.2).sum())(zero + value)
    assert bool(grad[0, 0] != 0) == moves


def test_at_the_old_policy_the_clipped_gradient_is_the_policy_gradient():
    clipped = jax.grad(lambda x: LOSSES["policy"](x, LOGPROBS, ADVANTAGES).sum())(LOGPROBS)
    plain = jax.grad(lambda x: call_checked(reinforce_losses, x, ADVANTAGES).sum())(LOGPROBS)
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)
    np.testing.assert_allclose(plain, -ADVANTAGES, rtol=1e-6)


def test_at_the_old_value_the_gradient_is_the_error():
    grad = jax.grad(lambda x: LOSSES["value"](x, LOGPROBS, ADVANTAGES).sum())(LOGPROBS)
    np.testing.assert_allclose(grad, LOGPROBS - ADVANTAGES, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_old_predictions_and_advantages_are_constants(name):
    grads = jax.grad(lambda old, a: LOSSES[name](LOGPROBS, old, a).sum(), (0, 1))(OLD, ADVANTAGES)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("large", [(1e9, -1e9, 1e9), (-1e9, 1e9, 1e9), (1e9, 1e9, -1e9), (0.0, -1e9, -1e9)])
def test_padding_changes_neither_loss_nor_gradient(name, large):
    def run(fills):
        inputs = [jnp.where(MASK, x, fill) for x, fill in zip((LOGPROBS, OLD, ADVANTAGES), fills, strict=True)]
        return jax.value_and_grad(lambda x: jnp.sum(jnp.where(MASK, LOSSES[name](x, *inputs[1:]), 0.0)))(inputs[0])

    (value, grad), (clean, clean_grad) = run(large), run((0.0, 0.0, 0.0))
    assert value == clean
    np.testing.assert_array_equal(grad, clean_grad)
