"""The LSTM is its equations, token by token or all at once, whatever the padding; and it samples and learns."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from scipy import special

from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models.flops import forward_flops
from lfjax.models.lstm import LSTMConfig
from lfjax.optim import make_optimizer
from lfjax.sampling.generate import generate
from lfjax.state import LMState
from lfjax.steps.sft import sft_step
from lfjax.types import SftBatch

CONFIG = LSTMConfig(vocab_size=13, width=8, layers=2, tied=False)
MODEL = CONFIG.build()


@functools.cache
def params(config=CONFIG):
    drawn, noise = tiny.init(config.build()), np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + noise.normal(0, 0.1, x.shape).astype(np.float32), drawn)


def tokens_of(rows, length, seed=2):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def compiled(model, params, tokens, options, method):
    return model.apply({"params": params}, tokens, **options, method=method)


def logits(tokens, model=MODEL, method=None, **options):
    return np.asarray(compiled(model, params(model.config), tokens, options, method))


def reference(tokens):
    """Logits of one row, float64, a token at a time, from the equations of Gers et al. 2000."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params())
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    state, outputs = [(np.zeros(8), np.zeros(8)) for _ in range(CONFIG.layers)], []
    for token in tokens:
        x = p["embed"]["tokens"][token]
        for index, (h, s) in enumerate(state):
            w = {name: leaf[index] for name, leaf in p["layers"]["lstm"].items()}
            i, f, g, o = np.split(x @ w["input"] + h @ w["recurrent"] + w["bias"], 4)
            s = sigmoid(f + 1) * s + sigmoid(i) * np.tanh(g)
            x = sigmoid(o) * np.tanh(s)
            state[index] = (x, s)
        outputs.append(x @ p["unembed"]["kernel"])
    return np.stack(outputs)


def test_logits_are_the_equations():
    tokens = tokens_of(2, 7)
    for row, found in zip(tokens, logits(tokens), strict=True):
        np.testing.assert_allclose(found, reference(row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_changes_nothing(left):
    tokens = tokens_of(2, 5)
    pad = np.full((2, 3), 7, np.int32)
    parts = (pad, tokens) if left else (tokens, pad)
    mask = np.concatenate([np.full_like(part, part is tokens, bool) for part in parts], axis=1)
    padded = logits(np.concatenate(parts, axis=1), attention_mask=mask)
    np.testing.assert_allclose(padded[mask].reshape(2, 5, -1), logits(tokens), rtol=1e-6, atol=1e-6)


def test_packed_documents_do_not_see_each_other():
    first, second = tokens_of(1, 4), tokens_of(1, 3, seed=5)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    packed = logits(np.concatenate([first, second, [[0]]], axis=1), segment_ids=segments)
    np.testing.assert_allclose(packed[:, :4], logits(first), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(packed[:, 4:7], logits(second), rtol=1e-6, atol=1e-6)


def test_decoding_with_the_memory_is_the_full_forward_pass():
    prompts, mask = tokens_of(3, 4), np.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    run = jax.jit(functools.partial(generate, MODEL, max_new_tokens=6, eos_ids=(3,)))
    made = run(params(), prompts, mask, jax.random.key(4))
    whole = np.concatenate([prompts, made.tokens], axis=1)
    full = logits(whole, attention_mask=np.concatenate([mask, made.mask], axis=1))[:, 3:-1]
    expected = np.take_along_axis(special.log_softmax(full, axis=-1), np.asarray(made.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.where(made.mask, made.logprobs, 0), np.where(made.mask, expected, 0), atol=1e-5)
    assert made.mask.any()


def test_scores_are_those_of_the_last_real_token():
    config = dataclasses.replace(CONFIG, num_labels=1, tied=True)
    model, tokens = config.build(), tokens_of(2, 5)
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    at_each = logits(tokens, model, attention_mask=mask, method="values")
    np.testing.assert_allclose(logits(tokens, model, attention_mask=mask), at_each[[0, 1], [2, 4]], rtol=1e-6)


def test_a_padded_vocabulary_is_cut_off_and_dropout_acts_on_request_alone():
    padded = dataclasses.replace(CONFIG, vocab_multiple=8)
    assert params(padded)["embed"]["tokens"].shape == (16, 8)
    assert logits(tokens_of(1, 3), padded.build()).shape == (1, 3, 13)
    noisy = dataclasses.replace(CONFIG, dropout=0.5).build()
    tokens = tokens_of(2, 5)
    still = np.asarray(compiled(noisy, params(), tokens, {}, None))
    np.testing.assert_array_equal(still, logits(tokens))
    moved = np.asarray(compiled(noisy, params(), tokens, {"rngs": {"dropout": jax.random.key(0)}}, None))
    assert not np.allclose(still, moved)


def test_it_learns_a_batch_by_heart():
    tokens = tokens_of(4, 9)
    batch = SftBatch(tokens, np.ones((4, 8), bool), np.ones((4, 8), np.int32))
    tx = make_optimizer(3e-2)
    step = jax.jit(functools.partial(sft_step, model=MODEL, tx=tx, chunk_size=8))
    state, losses = LMState.create(params(), tx), []
    for _ in range(120):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["sft/loss"].value))
    assert losses[0] > 2.0 and losses[-1] < 0.05


@pytest.mark.parametrize(
    "change, name", [({"width": 0}, "width"), ({"layers": 0}, "layers"), ({"dropout": 1.0}, "drop")]
)
def test_a_size_that_cannot_be_is_named(change, name):
    with pytest.raises(InputError, match=f"model.{name}"):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("change", [{}, {"tied": True}, {"num_labels": 2}, {"num_labels": 1, "head_bias": True}])
def test_it_is_written_and_read_again(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    hf.save(tmp_path / "model", hf.loaded_from(config.build(), params(config)))
    back = hf.load(tmp_path / "model")
    assert dataclasses.replace(back.model.config, tied=True) == dataclasses.replace(config, tied=True)
    jax.tree.map(np.testing.assert_array_equal, back.params, params(config))
    hf.save(tmp_path / "again", back)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1]


def test_it_counts_its_own_flops():
    """Two gate products a layer, [D] by [D 4D], and the head."""
    assert forward_flops(CONFIG, 5) == 2 * (2 * 2 * 8 * 32 + 8 * 13)
