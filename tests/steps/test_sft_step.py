import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import close_trees

from lfjax.losses.lm import cross_entropy_losses
from lfjax.optim import make_optimizer
from lfjax.steps.evaluate import evaluate_step
from lfjax.steps.sft import sft_step
from lfjax.types import SftBatch

MODEL = tiny.language_model()
RECORDER = tiny.recorder()
KEY = jax.random.key(0)


@functools.cache
def compiled(**options):
    options = {"model": MODEL, "tx": RECORDER, **options}
    return jax.jit(functools.partial(sft_step, **options))


def packed_and_padded():
    """The same four documents: two a row, and one a row."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, tiny.VOCAB, n).astype(np.int32) for n in (5, 4, 3, 6)]
    length = tiny.LENGTH

    def rows(groups):
        tokens = np.zeros((len(groups), length + 1), np.int32)
        mask, segments = np.zeros((len(groups), length), bool), np.zeros((len(groups), length), np.int32)
        for row, group in enumerate(groups):
            at = 0
            for number, document in enumerate(group, 1):
                tokens[row, at : at + len(document)] = document
                inputs = slice(at, min(at + len(document), length))
                segments[row, inputs] = number
                mask[row, at : at + len(document) - 1] = True
                at += len(document)
        return SftBatch(tokens, mask, segments)

    return rows([documents[:2], documents[2:]]), rows([[d] for d in documents])


def test_loss_and_gradient_are_the_cross_entropys():
    batch, state = tiny.sft_batch(), tiny.lm_state(MODEL, RECORDER)

    def loss(params):
        logits = MODEL.apply({"params": params}, batch.inputs, attention_mask=batch.segment_ids > 0)
        losses = cross_entropy_losses(logits, batch.targets, z_loss=0.01)
        return jnp.sum(jnp.where(batch.loss_mask, losses, 0.0)) / batch.loss_mask.sum()

    expected, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    after, metrics = compiled(z_loss=0.01, chunk_size=3)(state, batch, KEY)
    np.testing.assert_allclose(metrics["sft/loss"].value, expected, rtol=1e-5)
    assert metrics["sft/loss"].weight == batch.loss_mask.sum()
    close_trees(after.opt_state.grads, grads)
    np.testing.assert_allclose(metrics["optim/grad_norm"].value, optax.tree.norm(grads), rtol=1e-5)


def test_packed_documents_are_padded_documents():
    packed, padded = packed_and_padded()
    state = tiny.lm_state(MODEL, RECORDER)
    (one, a), (two, b) = (compiled()(state, batch, KEY) for batch in (packed, padded))
    np.testing.assert_allclose(a["sft/loss"].value, b["sft/loss"].value, rtol=1e-5)
    assert a["sft/loss"].weight == b["sft/loss"].weight == 5 + 4 + 3 + 6 - 4
    close_trees(one.opt_state.grads, two.opt_state.grads)


def test_padding_and_uncounted_targets_hold_anything():
    batch, state = tiny.sft_batch(), tiny.lm_state(MODEL, RECORDER)
    real = np.pad(batch.segment_ids, ((0, 0), (0, 1))) | np.pad(batch.segment_ids, ((0, 0), (1, 0))) > 0
    junk = batch._replace(tokens=np.where(real, batch.tokens, 29))
    assert np.any(junk.tokens != batch.tokens)
    (a, _), (b, _) = (compiled()(state, x, KEY) for x in (batch, junk))
    close_trees(a.opt_state.grads, b.opt_state.grads, rtol=1e-7)


@pytest.mark.parametrize("pieces", [2, 4])
def test_microbatches_are_one_big_batch(pieces):
    batch, state = tiny.sft_batch(), tiny.lm_state(MODEL, RECORDER)
    (whole, a), (parts, b) = (f(state, batch, KEY) for f in (compiled(), compiled(num_microbatches=pieces)))
    np.testing.assert_allclose(a["sft/loss"].value, b["sft/loss"].value, rtol=1e-5)
    close_trees(parts.opt_state.grads, whole.opt_state.grads)


def test_learns_a_batch_by_heart():
    batch, tx = tiny.sft_batch(), make_optimizer(0.02)
    step, state = compiled(tx=tx), tiny.lm_state(MODEL, tx)
    losses = []
    for _ in range(80):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["sft/loss"].value))
    assert losses[0] > 0.8 * math.log(tiny.VOCAB)
    # the first target of rows that start alike cannot be known; nearly everything else can
    assert losses[-1] < 0.15 and state.step == 80 and state.skipped == 0


def test_dropout_follows_the_key_and_is_off_without_a_rate():
    batch = tiny.sft_batch()
    noisy = tiny.language_model(dropout=0.2)
    state = tiny.lm_state(MODEL, RECORDER)
    losses = [float(compiled(model=noisy)(state, batch, jax.random.key(k))[1]["sft/loss"].value) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    plain = [float(compiled()(state, batch, jax.random.key(k))[1]["sft/loss"].value) for k in (0, 1)]
    assert plain[0] == plain[1] != losses[0]


def test_a_batch_without_targets_changes_nothing_whatever_momentum_and_decay_there_are():
    batch, tx = tiny.sft_batch(), make_optimizer(0.02, weight_decay=0.1)
    step = compiled(tx=tx)
    state, _ = step(tiny.lm_state(MODEL, tx), batch, KEY)
    after, metrics = step(state, batch._replace(loss_mask=np.zeros_like(batch.loss_mask)), KEY)
    assert metrics["sft/loss"].value == 0 and metrics["sft/loss"].weight == 0
    assert (after.step, after.skipped) == (2, 0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_a_misspelt_keyword_is_named():
    with pytest.raises(TypeError, match="num_microbatchs"):
        sft_step(None, None, KEY, model=MODEL, tx=RECORDER, num_microbatchs=2)


def test_evaluation_is_the_mean_nll_over_counted_targets_and_adds_up_over_batches():
    batch, params = tiny.sft_batch(), tiny.init(MODEL)
    evaluate = jax.jit(functools.partial(evaluate_step, model=MODEL))
    whole = evaluate(params, batch)
    halves = [evaluate(params, jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(0, 4), slice(4, 8))]
    _, metrics = compiled()(tiny.lm_state(MODEL, RECORDER), batch, KEY)
    for name in ("evaluate/nll", "evaluate/entropy"):
        total = sum(h[name].sum for h in halves) / sum(h[name].weight for h in halves)
        np.testing.assert_allclose(whole[name].value, total, rtol=1e-5)
    np.testing.assert_allclose(whole["evaluate/nll"].value, metrics["sft/loss"].value, rtol=1e-5)
    assert 0 < whole["evaluate/entropy"].value < math.log(tiny.VOCAB)
    each = whole["evaluate/document_nll"]  # by row and segment
    np.testing.assert_allclose(each.sum.sum(), whole["evaluate/nll"].sum, rtol=1e-5)
    np.testing.assert_array_equal(each.weight[:, 1], batch.loss_mask.sum(1))
    np.testing.assert_allclose(each.sum[:4, 1].sum(), halves[0]["evaluate/nll"].sum, rtol=1e-5)
