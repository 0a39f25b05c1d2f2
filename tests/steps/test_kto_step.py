import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import losses as reference
from test_preference_step import pairs, sums
from tiny import close_trees

from lfjax.optim import make_optimizer
from lfjax.steps.kto import kto_step
from lfjax.types import Answers, KtoBatch

MODEL = tiny.language_model()
RECORDER = tiny.recorder()
KEY = jax.random.key(0)
DESIRABLE = np.arange(tiny.ROWS) % 3 > 0


@functools.cache
def compiled(**options):
    options = {"model": MODEL, "tx": RECORDER, **options}
    return jax.jit(functools.partial(kto_step, **options))


def answers(shift: float = 0.0, **given) -> tuple[KtoBatch, np.ndarray, np.ndarray]:
    """(batch, log-probabilities [B] of the answers, of the mismatched ones); `shift` is taken from the reference's."""
    made = pairs(**given)
    found = sums(tiny.init(MODEL), made)[0]
    ref = np.float32(found + np.random.default_rng(1).normal(0.0, 2.0, found.shape) - shift)
    sides = [Answers(*(x[:, side] for x in (*made[:3], ref))) for side in range(2)]
    return KtoBatch(*sides, DESIRABLE, made.counts), found[:, 0], found[:, 1]


@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_loss_is_the_mean_of_float64_over_a_baseline_that_is_never_below_zero(shift):
    batch, own, other = answers(shift)
    options = {"beta": 0.2, "weight_desirable": 1.5, "weight_undesirable": 0.5}
    _, metrics = compiled(**options)(tiny.lm_state(MODEL, RECORDER), batch, KEY)
    real = batch.counts
    kl = max(0.0, float(np.mean((other - batch.mismatched.ref_logprobs)[real])))
    assert (kl > 0) == (shift > 0)
    rows = zip(own[real], np.float64(batch.answers.ref_logprobs[real]), DESIRABLE[real], strict=True)
    expected = np.mean([reference.kto(*row, kl, 0.2, 1.5, 0.5) for row in rows])
    np.testing.assert_allclose(metrics["kto/baseline"].value, kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["kto/loss"].value, expected, rtol=1e-5)
    rewards = 0.2 * (own - batch.answers.ref_logprobs)
    np.testing.assert_allclose(metrics["kto/reward_desirable"].value, rewards[real & DESIRABLE].mean(), rtol=1e-3)


def test_no_gradient_flows_through_the_baseline():
    """Far answers of others in place of near ones move the loss, and change a row's slope only through the baseline."""
    batch, own, other = answers(3.0)
    kl = float(np.mean((other - batch.mismatched.ref_logprobs)[batch.counts]))
    fixed = batch._replace(mismatched=batch.answers._replace(ref_logprobs=np.float32(own - kl)))  # the same baseline
    state = tiny.lm_state(MODEL, RECORDER)
    (a, said), (b, again) = (compiled()(state, given, KEY) for given in (batch, fixed))
    np.testing.assert_allclose(said["kto/baseline"].value, again["kto/baseline"].value, rtol=1e-4)
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-4)


def test_padding_and_rows_that_fill_change_nothing():
    batch, *_ = answers(3.0)
    other, *_ = answers(3.0, pad=17)
    other.answers.ref_logprobs[-1], other.mismatched.ref_logprobs[-1] = 1e9, -1e9
    state = tiny.lm_state(MODEL, RECORDER)
    (a, said), (b, again) = (compiled()(state, given, KEY) for given in (batch, other))
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-6)
    assert said["kto/loss"] == again["kto/loss"]
    nothing, metrics = compiled()(state, batch._replace(counts=np.zeros(tiny.ROWS, bool)), KEY)
    assert metrics["kto/loss"].value == 0.0
    assert not any(np.any(g) for g in jax.tree.leaves(nothing.opt_state.grads))


def test_microbatches_share_the_batchs_baseline():
    batch, *_ = answers(3.0)
    state = tiny.lm_state(MODEL, RECORDER)
    (a, said), (b, again) = (compiled(num_microbatches=n)(state, batch, KEY) for n in (1, 4))
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-5)
    np.testing.assert_allclose(said["kto/baseline"].value, again["kto/baseline"].value, rtol=1e-5)


def test_learns_by_heart_what_was_called_good_and_bad():
    tx = make_optimizer(3e-2)
    state, (batch, own, other) = tiny.lm_state(MODEL, tx), answers()
    batch = batch._replace(
        answers=batch.answers._replace(ref_logprobs=jnp.float32(own)),
        mismatched=batch.mismatched._replace(ref_logprobs=jnp.float32(other)),
    )
    step = compiled(tx=tx, beta=0.5)
    for _ in range(30):
        state, metrics = step(state, batch, KEY)
    assert metrics["kto/accuracy"].value == 1.0 and metrics["kto/loss"].value < 0.1
