import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfjax.optim import make_optimizer, schedule
from lfjax.state import LMState

PARAMS = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[0.5]])}
GOOD = {"a": jnp.asarray([0.1, -0.2]), "b": jnp.asarray([[0.3]])}
TX = make_optimizer(schedule("linear", learning_rate=0.1, total_steps=10), weight_decay=0.1, clip_norm=1.0)
BAD = {
    "loss nan": (GOOD, jnp.nan),
    "loss inf": (GOOD, jnp.inf),
    "gradient nan": (GOOD | {"b": jnp.full((1, 1), jnp.nan)}, 1.0),
    "gradient -inf": (GOOD | {"a": jnp.asarray([0.0, -jnp.inf])}, 1.0),
    "gradient whose norm overflows": (GOOD | {"a": jnp.asarray([1e30, 0.0])}, 1.0),
}

apply = jax.jit(lambda state, grads, loss: state.apply_gradients(grads, TX, loss=loss))
bad_update = pytest.mark.parametrize("grads, loss", BAD.values(), ids=BAD)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def after_two_good_updates():
    state = LMState.create(PARAMS, TX)
    for _ in range(2):
        state = apply(state, GOOD, 1.0)
    return state


def test_a_fresh_state_is_at_step_0_and_has_skipped_nothing():
    state = LMState.create(PARAMS, TX)
    assert (state.step, state.skipped, state.step.dtype) == (0, 0, jnp.int32)
    equal(state.params, PARAMS)
    equal(state.opt_state, TX.init(PARAMS))


def test_a_good_update_is_the_optimisers():
    state = after_two_good_updates()
    params, opt_state = PARAMS, TX.init(PARAMS)
    for step in range(2):
        updates, opt_state = TX.update(GOOD, opt_state, params, step=jnp.int32(step))
        params = optax.apply_updates(params, updates)
    for x, y in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((params, opt_state)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert (state.step, state.skipped) == (2, 0)


@bad_update
def test_what_is_not_finite_reaches_neither_parameters_nor_moments(grads, loss):
    before = after_two_good_updates()
    after = apply(before, grads, loss)
    equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert (after.step, after.skipped) == (3, 1)


@bad_update
def test_training_goes_on_as_if_a_bad_update_had_not_been(grads, loss):
    """Only the schedule, a function of the step, has moved on."""
    before = after_two_good_updates()
    recovered = apply(apply(before, grads, loss), GOOD, 1.0)
    straight = apply(before.replace(step=jnp.int32(3)), GOOD, 1.0)
    equal(recovered, straight)
    assert recovered.skipped == 0 and np.any(recovered.params["a"] != before.params["a"])


def test_skipped_counts_bad_updates_in_a_row():
    state, counts = LMState.create(PARAMS, TX), []
    for loss in (jnp.nan, jnp.inf, jnp.nan, 1.0, jnp.nan):
        state = apply(state, GOOD, loss)
        counts.append(int(state.skipped))
    assert counts == [1, 2, 3, 0, 1]


def test_without_a_loss_the_gradient_alone_decides():
    state = LMState.create(PARAMS, TX)
    grads, _ = BAD["gradient nan"]
    assert state.apply_gradients(GOOD, TX).skipped == 0
    bad = state.apply_gradients(grads, TX)
    assert bad.skipped == 1
    equal(bad.params, PARAMS)


def test_a_given_step_is_what_the_schedule_sees_and_the_state_follows():
    state = LMState.create(PARAMS, TX)
    at_8 = state.apply_gradients(GOOD, TX, step=jnp.int32(8))
    np.testing.assert_allclose(at_8.params["b"], state.replace(step=jnp.int32(8)).apply_gradients(GOOD, TX).params["b"])
    assert at_8.step == 9
    assert np.any(at_8.params["b"] != state.apply_gradients(GOOD, TX).params["b"])


def test_a_plain_optax_optimiser_works_too():
    tx = optax.sgd(0.5)
    state = LMState.create(PARAMS, tx).apply_gradients(GOOD, tx)
    np.testing.assert_allclose(state.params["a"], PARAMS["a"] - 0.5 * GOOD["a"])
