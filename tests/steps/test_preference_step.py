import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import losses as reference
from tiny import close_trees

from lfjax.optim import make_optimizer
from lfjax.steps.answers import answer_logprobs
from lfjax.steps.preference import LOSSES, PER_TOKEN, REFERENCE_FREE, preference_step
from lfjax.types import PreferenceBatch

MODEL = tiny.language_model()
RECORDER = tiny.recorder()
KEY = jax.random.key(0)


@functools.cache
def compiled(**options):
    options = {"model": MODEL, "tx": RECORDER, **options}
    return jax.jit(functools.partial(preference_step, **options))


def pairs(pad: int = tiny.PAD, seed: int = 0) -> PreferenceBatch:
    """Answers of 2 to 5 tokens to prompts of 1 to 3; the last row only fills the batch."""
    rng = np.random.default_rng(seed)
    shape = (tiny.ROWS, 2, tiny.LENGTH)
    tokens = np.full((tiny.ROWS, 2, tiny.LENGTH + 1), pad, np.int32)
    loss_mask, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row in range(tiny.ROWS - 1):
        prompt = rng.integers(3, tiny.VOCAB, rng.integers(1, 4))
        for side in range(2):
            whole = [*prompt, *rng.integers(3, tiny.VOCAB, rng.integers(1, 5)), tiny.EOS]
            tokens[row, side, : len(whole)] = whole
            mask[row, side, : len(whole) - 1] = True
            loss_mask[row, side, len(prompt) - 1 : len(whole) - 1] = True
    ref = rng.normal(-12.0, 3.0, (tiny.ROWS, 2)).astype(np.float32)
    margin = rng.uniform(0.0, 2.0, tiny.ROWS).astype(np.float32)
    return PreferenceBatch(tokens, loss_mask, mask, ref, margin, np.arange(tiny.ROWS) < tiny.ROWS - 1)


@functools.cache
def log_softmax():
    return jax.jit(lambda p, t, m: jax.nn.log_softmax(MODEL.apply({"params": p}, t, attention_mask=m)))


def sums(params, batch: PreferenceBatch):
    """(of the answers, of the whole rows), each [B 2] float64, one row after the other without padding."""
    out = np.zeros((2, *batch.counts.shape, 2))
    for row, side in np.ndindex(*batch.counts.shape, 2):
        length = int(batch.mask[row, side].sum()) + 1
        tokens = np.zeros(tiny.LENGTH, np.int32)
        tokens[: length - 1] = batch.tokens[row, side, : length - 1]
        logp = np.float64(log_softmax()(params, tokens[None], np.arange(tiny.LENGTH)[None] < length - 1)[0])
        for place in range(length - 1):
            value = logp[place, batch.tokens[row, side, place + 1]]
            out[1, row, side] += value
            out[0, row, side] += value * batch.loss_mask[row, side, place]
    return out


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_mean_over_pairs_of_float64(loss):
    batch, state = pairs(), tiny.lm_state(MODEL, RECORDER)
    smoothing = 0.1 if loss in ("sigmoid", "robust") else 0.0
    options = {"loss": loss, "beta": 0.3, "label_smoothing": smoothing, "gamma": 0.4, "sft_weight": 0.7}
    _, metrics = compiled(**options)(state, batch, KEY)
    answers, rows = sums(state.params, batch)
    expected, rewards = [], []
    for row in range(tiny.ROWS - 1):
        lengths = batch.loss_mask[row].sum(axis=-1)
        scale = 1.0 / lengths if loss in PER_TOKEN else np.ones(2)
        policy, ref = answers[row] * scale, np.float64(batch.ref_logprobs[row]) * scale
        value = reference.preference(loss, *policy, *ref, 0.3, smoothing, 0.4)
        value -= 0.7 * answers[row, 0] / lengths[0]
        value -= rows[row, 0] / batch.mask[row, 0].sum() if loss == "orpo" else 0.0  # of the whole row, prompt and all
        expected.append(value)
        rewards.append(0.3 * (policy - (0.0 if loss in REFERENCE_FREE else ref)))
    chosen, rejected = np.transpose(rewards)
    np.testing.assert_allclose(metrics["preference/loss"].value, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(metrics["preference/margin"].value, np.mean(chosen - rejected), rtol=1e-4)
    np.testing.assert_allclose(metrics["preference/accuracy"].value, np.mean(chosen > rejected), rtol=1e-6)
    np.testing.assert_allclose(metrics["preference/chosen_logprob"].value, answers[:-1, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["preference/length"].value, batch.loss_mask[:-1].sum(-1).mean(), rtol=1e-6)


def test_the_reference_says_of_an_answer_what_the_step_does():
    """At its own reference every ratio is 1: the loss is log 2, whatever the pairs."""
    batch, state = pairs(), tiny.lm_state(MODEL, RECORDER)
    ref = jax.jit(functools.partial(answer_logprobs, MODEL, chunk_size=64))
    found = ref(state.params, batch.tokens, batch.loss_mask, batch.mask)
    np.testing.assert_allclose(found, sums(state.params, batch)[0], rtol=1e-5, atol=1e-5)
    _, metrics = compiled()(state, batch._replace(ref_logprobs=np.asarray(found)), KEY)
    np.testing.assert_allclose(metrics["preference/loss"].value, np.log(2.0), rtol=1e-6)
    assert metrics["preference/margin"].value == 0.0


def test_length_normalisation_goes_from_the_sum_to_the_mean():
    batch, state = pairs(), tiny.lm_state(MODEL, RECORDER)
    found = [compiled(length_normalisation=p)(state, batch, KEY)[1]["preference/margin"].value for p in (0.0, 1.0)]
    ratios = sums(state.params, batch)[0] - np.float64(batch.ref_logprobs)
    for value, power in zip(found, (0.0, 1.0), strict=True):
        scaled = (ratios / np.maximum(batch.loss_mask.sum(-1), 1) ** power)[:-1]
        np.testing.assert_allclose(value, 0.1 * np.mean(scaled[:, 0] - scaled[:, 1]), rtol=1e-4)


def test_a_margin_asks_for_so_much_more_reward():
    batch, state = pairs(), tiny.lm_state(MODEL, RECORDER)
    _, metrics = compiled(margin_scale=0.5)(state, batch, KEY)
    ratios = (sums(state.params, batch)[0] - np.float64(batch.ref_logprobs))[:-1]
    asked = 0.1 * (ratios[:, 0] - ratios[:, 1]) - 0.5 * np.float64(batch.margin[:-1])
    np.testing.assert_allclose(metrics["preference/loss"].value, np.mean(np.logaddexp(0.0, -asked)), rtol=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_padding_and_rows_that_fill_change_nothing(loss):
    state = tiny.lm_state(MODEL, RECORDER)
    before, other = pairs(), pairs(pad=17)
    other.ref_logprobs[-1], other.margin[-1] = 1e9, -1e9
    step = compiled(loss=loss)
    (a, said), (b, again) = step(state, before, KEY), step(state, other, KEY)
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-6)
    assert said["preference/loss"] == again["preference/loss"]
    nothing, metrics = step(state, before._replace(counts=np.zeros(tiny.ROWS, bool)), KEY)
    assert metrics["preference/loss"].value == 0.0 and not any(
        np.any(g) for g in jax.tree.leaves(nothing.opt_state.grads)
    )


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_microbatches_equal_one_batch(loss):
    batch, state = pairs(), tiny.lm_state(MODEL, RECORDER)
    (a, said), (b, again) = (compiled(loss=loss, num_microbatches=n)(state, batch, KEY) for n in (1, 4))
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-5)
    np.testing.assert_allclose(said["preference/loss"].value, again["preference/loss"].value, rtol=1e-6)


def test_learns_by_heart_what_was_preferred():
    tx = make_optimizer(3e-2)
    state, batch = tiny.lm_state(MODEL, tx), pairs()
    ref = answer_logprobs(MODEL, state.params, *map(jnp.asarray, batch[:3]), chunk_size=64)
    batch = batch._replace(ref_logprobs=np.asarray(ref))
    step = compiled(tx=tx, beta=0.5)
    for _ in range(30):
        state, metrics = step(state, batch, KEY)
    assert metrics["preference/accuracy"].value == 1.0 and metrics["preference/loss"].value < 0.05
