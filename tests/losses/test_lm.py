import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.shapes import call_checked

from lfjax.losses import lm

B, T, D, V = 2, 7, 5, 11
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
WEIGHT = RNG.normal(size=(D, V)).astype(np.float32)
BIAS = jnp.asarray(RNG.normal(size=V), jnp.float32)
TARGETS = RNG.integers(0, 8, size=(B, T)).astype(np.int32)
MASK = np.arange(T)[None, :] < np.array([[4], [7]])
FORMS = {
    "plain": {},
    "bias": {"bias": BIAS},
    "softcap": {"bias": BIAS, "softcap": 2.0},
    "padded_vocabulary": {"bias": BIAS, "vocab_size": 8},
    "everything": {"bias": BIAS, "softcap": 3.0, "vocab_size": 9},
}


def whole_stats(hidden, unembed, targets, temperature):
    """The same by plain autodiff on whole logits."""
    logits = hidden @ unembed.weight
    logits = logits if unembed.bias is None else logits + unembed.bias[None, None]
    logits = logits if unembed.softcap is None else unembed.softcap * jnp.tanh(logits / unembed.softcap)
    logits = logits[..., : unembed.vocab_size] / temperature
    return lm.TokenStats(
        lm.token_logprobs(logits, targets), lm.entropy(logits), jax.scipy.special.logsumexp(logits, axis=-1)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_equal_float64(form, temperature):
    stats = call_checked(
        lm.chunked_token_stats,
        jnp.asarray(HIDDEN),
        lm.Unembed(jnp.asarray(WEIGHT), **FORMS[form]),
        jnp.asarray(TARGETS),
        chunk_size=3,
        temperature=temperature,
    )
    expected = reference.token_stats(HIDDEN, WEIGHT, TARGETS, temperature=temperature, **FORMS[form])
    np.testing.assert_allclose(np.stack(stats), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_gradients_of_all_three_equal_autodiff_on_whole_logits(form, chunk_size):
    parts = np.random.default_rng(1).normal(size=(3, B, T)).astype(np.float32)
    options = {k: v for k, v in FORMS[form].items() if k != "bias"}

    def loss(function, arrays):
        hidden, weight, bias = arrays
        stats = function(hidden, lm.Unembed(weight, bias, **options), TARGETS)
        return jnp.sum(parts * jnp.stack(stats))

    arrays = (HIDDEN, WEIGHT, FORMS[form].get("bias"))
    in_chunks = functools.partial(lm.chunked_token_stats, chunk_size=chunk_size, temperature=0.7)
    at_once = functools.partial(whole_stats, temperature=0.7)
    chunked, whole = (jax.jit(jax.grad(functools.partial(loss, f)))(arrays) for f in (in_chunks, at_once))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), chunked, whole)


@pytest.mark.parametrize("large", [1e9, -1e9])
def test_padding_changes_nothing_and_gradients_stay_finite(large):
    hidden = np.where(MASK[..., None], HIDDEN, np.float32(large))
    targets = np.where(MASK, TARGETS, np.int32(large))

    def loss(arrays, targets):
        hidden, weight, bias = arrays
        unembed = lm.Unembed(weight, 100 * bias, vocab_size=8)
        stats = lm.chunked_token_stats(hidden, unembed, targets, chunk_size=3)
        return sum(jnp.sum(jnp.where(MASK, x, 0.0)) for x in stats)

    run = jax.jit(jax.value_and_grad(loss))
    dirty = run((hidden, WEIGHT, BIAS), targets)
    clean = run((np.where(MASK[..., None], HIDDEN, np.float32(0)), WEIGHT, BIAS), TARGETS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), dirty, clean)


def test_large_biases_give_finite_gradients_where_the_last_chunk_is_padded():
    def loss(bias):
        unembed = lm.Unembed(jnp.asarray(WEIGHT), bias)
        return lm.chunked_token_stats(HIDDEN, unembed, TARGETS, chunk_size=4).logprobs.sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(BIAS + 500.0)).all()


def test_nothing_kept_gives_zero_gradients():
    def loss(hidden, weight):
        stats = lm.chunked_token_stats(hidden, lm.Unembed(weight), TARGETS, chunk_size=3)
        return sum(jnp.sum(jnp.where(jnp.zeros_like(MASK), x, 0.0)) for x in stats)

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(HIDDEN, WEIGHT)
    assert value == 0 and all((np.asarray(g) == 0).all() for g in grads)


def test_entropy_of_a_flat_distribution_is_log_of_the_true_vocabulary():
    unembed = lm.Unembed(jnp.zeros((D, V)), vocab_size=8)
    stats = lm.chunked_token_stats(HIDDEN, unembed, TARGETS, chunk_size=4)
    np.testing.assert_allclose(stats.entropy, np.log(8), rtol=1e-6)
    np.testing.assert_allclose(stats.logprobs, -np.log(8), rtol=1e-6)


def test_never_holds_the_logits_of_all_positions():
    rows, length, vocab, chunk = 4, 64, 1000, 8

    def loss(hidden, weight, targets):
        return lm.chunked_token_stats(hidden, lm.Unembed(weight), targets, chunk_size=chunk).logprobs.sum()

    arguments = (jnp.zeros((rows, length, 8)), jnp.zeros((8, vocab)), jnp.zeros((rows, length), jnp.int32))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 * 0.7


def test_rejects_a_chunk_of_nothing():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        lm.chunked_token_stats(HIDDEN, lm.Unembed(WEIGHT), TARGETS, chunk_size=0)


def test_bf16_hidden_states_give_float32_stats_and_gradients_of_their_own_dtypes():
    def loss(hidden, weight):
        stats = lm.chunked_token_stats(hidden, lm.Unembed(weight), TARGETS, chunk_size=3)
        return stats.logprobs.sum(), stats

    hidden, weight = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(WEIGHT)
    (d_hidden, d_weight), stats = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, weight)
    assert (d_hidden.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in stats)
    np.testing.assert_allclose(stats.logprobs, reference.token_stats(HIDDEN, WEIGHT, TARGETS)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_in_half_precision_are_float32s_within_its_rounding(dtype, chunk_size, tied):
    def grads(hidden, table):
        def loss(hidden, table):
            unembed = lm.Unembed(table.T if tied else table)
            return lm.chunked_token_stats(hidden, unembed, TARGETS, chunk_size=chunk_size).logprobs.sum()

        return jax.jit(jax.grad(loss, (0, 1)))(hidden, table)

    hidden, table = jnp.asarray(HIDDEN, dtype), jnp.asarray(WEIGHT.T if tied else WEIGHT).astype(dtype)
    expected = grads(hidden.astype(jnp.float32), table.astype(jnp.float32))
    for got, exact in zip(grads(hidden, table.astype(jnp.float32)), expected, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(exact, np.float64))
        assert error <= float(jnp.finfo(dtype).eps) * np.linalg.norm(exact)


@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_cross_entropy_equals_float64(label_smoothing, z_loss):
    logits = RNG.normal(size=(B, T, V)).astype(np.float32)
    losses = call_checked(
        lm.cross_entropy_losses,
        jnp.asarray(logits),
        jnp.asarray(TARGETS),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    expected = reference.cross_entropy(logits, TARGETS, label_smoothing, z_loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_plain_cross_entropy_is_minus_the_logprob_and_probabilities_sum_to_one():
    logits = jnp.asarray(RNG.normal(size=(B, T, V)), jnp.float32)
    logprobs = call_checked(lm.token_logprobs, logits, jnp.asarray(TARGETS))
    np.testing.assert_allclose(lm.cross_entropy_losses(logits, TARGETS), -logprobs, rtol=1e-5)
    logprobs_of = jax.jit(lm.token_logprobs)
    every = sum(np.exp(logprobs_of(logits, np.full((B, T), v))) for v in range(V))
    np.testing.assert_allclose(every, 1.0, rtol=1e-5)


@pytest.mark.parametrize("function", [lm.token_logprobs, lm.cross_entropy_losses])
def test_whole_losses_are_finite_on_wild_padding(function):
    logits = np.where(MASK[..., None], RNG.normal(size=(B, T, V)), 1e9).astype(np.float32)
    targets = np.where(MASK, TARGETS, -100)
    value, grad = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.where(MASK, function(x, targets), 0.0))))(logits)
    assert np.isfinite(value) and np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[~MASK], 0)


def test_logprobs_and_entropy_equal_trl(shared):
    """TRL's own values on GPT-2's own logits (trl.trainer.utils.selective_log_softmax, entropy_from_logits)."""
    io = np.load(shared / "reference" / "models" / "gpt2" / "io.npz")
    logits, targets = jnp.asarray(io["logits_nopad"][:, :-1]), jnp.asarray(io["input_ids"][:, 1:], jnp.int32)
    np.testing.assert_allclose(lm.token_logprobs(logits, targets), io["trl_token_logps_nopad"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lm.entropy(logits), io["trl_entropy_nopad"], rtol=1e-4, atol=1e-5)
