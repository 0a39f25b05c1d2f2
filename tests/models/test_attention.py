import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import decoder

from lfjax.models import attention

B, N, T, H = 2, 4, 13, 6


def reference(q, k, v, allowed, softcap=None):
    """Float64 loops: softmax over the allowed keys, query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        kv = n // (q.shape[1] // k.shape[1])
        seen = np.flatnonzero(allowed[b, t])
        if len(seen) == 0:
            continue
        scores = np.array([q[b, n, t] @ k[b, kv, s] / np.sqrt(q.shape[-1]) for s in seen])
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, n, t] = sum(w * v[b, kv, s] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def inputs(kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((B, n, T, H), np.float32) for n in (N, kv_heads, kv_heads))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", ["none", "left", "right", "packed"])
def test_equals_float64_loops_for_every_mask_grouping_and_block(kv_heads, block, causal, masks):
    q, k, v = inputs(kv_heads)
    column = np.arange(T)
    key_mask = {"left": column >= np.array([[0], [5]]), "right": column < np.array([[T], [7]])}.get(masks)
    segments = np.array([[1] * 5 + [2] * 8, [1] * 2 + [2] * 3 + [3] * 4 + [0] * 4]) if masks == "packed" else None
    allowed = np.ones((B, T, T), bool)
    if causal:
        allowed &= column[:, None] >= column
    if key_mask is not None:
        allowed &= key_mask[:, None]
    if segments is not None:
        allowed &= (segments[:, :, None] == segments[:, None]) & (segments[:, None] != 0)
    run = jax.jit(functools.partial(attention.attend_blocked, causal=causal, block=block))
    out = np.asarray(run(q, k, v, key_mask=key_mask, segment_ids=segments))
    sees_something = allowed.any(-1)[:, None, :, None]
    np.testing.assert_allclose(out * sees_something, reference(q, k, v, allowed), rtol=1e-5, atol=1e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("traced", [False, True])
def test_a_window_and_a_cap_equal_float64_loops(traced):
    """Known at compile time the window also bounds the keys of a block of queries; traced it is a mask alone."""
    q, k, v = inputs(2)
    column = np.arange(T)
    distance = column[:, None] - column
    key_mask = column >= np.array([[0], [5]])
    allowed = (distance >= 0) & (distance < 3) & key_mask[:, None]
    run = functools.partial(attention.attend_blocked, block=4, softcap=0.5)
    if traced:
        out = jax.jit(lambda q, k, v, window: run(q, k, v, key_mask=key_mask, window=window))(q, k, v, 3)
    else:
        out = jax.jit(lambda q, k, v: run(q, k, v, key_mask=key_mask, window=3))(q, k, v)
    sees_something = allowed.any(-1)[:, None, :, None]
    np.testing.assert_allclose(out * sees_something, reference(q, k, v, allowed, 0.5), rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_alone_has_finite_values_and_gradients():
    q, k, v = inputs(2)
    mask = np.zeros((B, T), bool)

    def total(q, k, v):
        return jnp.sum(jnp.square(attention.attend_blocked(q, k, v, key_mask=mask)))

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_huge_scores_stay_finite():
    q, k, v = inputs(4)
    assert np.isfinite(jax.jit(attention.attend_blocked)(q * 1e4, k * 1e4, v)).all()


def test_one_query_against_a_cache_equals_the_last_query_of_the_whole():
    q, k, v = inputs(2)
    mask = np.arange(T)[None] >= np.array([[0], [5]])
    whole = np.asarray(jax.jit(attention.attend_blocked)(q, k, v, key_mask=mask))
    room = ((0, 0), (0, 0), (0, 3), (0, 0))
    attend = jax.jit(attention.attend_cached)
    last = attend(q[:, :, -1:], np.pad(k, room), np.pad(v, room), np.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(last, whole[:, :, -1:], rtol=1e-5, atol=1e-6)


def test_half_precision_inputs_give_half_precision_outputs_near_float32():
    q, k, v = inputs(2)
    attend = jax.jit(attention.attend_blocked)
    half = np.asarray(attend(*(x.astype(jnp.bfloat16) for x in (q, k, v))))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), attend(q, k, v), atol=0.05)


def test_scores_in_half_precision_are_not_biased_by_the_root_of_the_head_dim():
    """48 ** -0.5 is 0.14 % off in bfloat16; weights of one key beside another of zeros, mean over 4096 queries."""
    q = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.4, (1, 1, 4096, 48)), jnp.bfloat16)
    k = jnp.asarray(np.stack([np.zeros(48), np.ones(48)])[None, None], jnp.bfloat16)
    out = attention.attend_blocked(q, k, k, causal=False, block=4096)[..., 0]
    exact = 1 / (1 + np.exp(-np.asarray(q, np.float64).sum(-1) / 48**0.5))
    assert abs((np.asarray(out, np.float64) - exact).mean()) < 1e-4


def rotated_by_complex_numbers(x, positions, theta):
    """RoPE as multiplication by exp(i position frequency), with element i and i + H/2 as one complex number."""
    half = x.shape[-1] // 2
    pairs = np.asarray(x[..., :half], np.float64) + 1j * np.asarray(x[..., half:], np.float64)
    angles = positions[:, None, :, None] * theta ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def test_rotation_is_complex_multiplication_of_half_split_pairs():
    q, _, _ = inputs(4)
    positions = np.array([np.arange(T), np.arange(T) + 40])
    tables = attention.rope_tables(jnp.asarray(positions), attention.rope_frequencies(H, 10000.0))
    np.testing.assert_allclose(
        attention.rotate(q, tables), rotated_by_complex_numbers(q, positions, 1e4), rtol=1e-4, atol=1e-5
    )


def test_scaled_frequencies_are_those_of_llama_3_1_and_of_linear_interpolation():
    plain = decoder.frequencies(128, 5e5)
    scaled = attention.rope_frequencies(128, 5e5, scaling=("llama3", 8.0, 1.0, 4.0, 8192.0))
    np.testing.assert_allclose(scaled, decoder.llama3_frequencies(plain, 8.0, 1.0, 4.0, 8192), rtol=2e-6)
    assert scaled[0] == 1.0 and scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-6)  # both ends are reached
    np.testing.assert_allclose(attention.rope_frequencies(128, 5e5, scaling=("linear", 4.0)), plain / 4, rtol=2e-6)
    share = attention.rope_frequencies(128, 1e4, share=0.25)
    np.testing.assert_allclose(share, decoder.frequencies(32, 1e4), rtol=2e-6)


def test_elements_beyond_the_rotated_share_stay():
    q, _, _ = inputs(4)
    tables = attention.rope_tables(
        jnp.arange(T)[None], attention.rope_frequencies(H, 1e4, share=0.5)
    )  # 3 of 6: 2 pairs
    np.testing.assert_array_equal(attention.rotate(q, tables)[..., 4:], q[..., 4:])


SQUARE = ((2, 8, 256, 64), (2, 4, 256, 64))
ODD = ((2, 8, 255, 64), (2, 4, 255, 64))


@pytest.mark.parametrize(
    "backend, dtype, shapes, masked, expected",
    [
        ("cpu", "float32", SQUARE, False, "xla"),
        ("cpu", "bfloat16", SQUARE, False, "xla"),
        ("gpu", "bfloat16", SQUARE, False, "cudnn"),
        ("cuda", "float16", SQUARE, False, "cudnn"),
        ("gpu", "float32", SQUARE, False, "xla"),
        ("gpu", "bfloat16", SQUARE, True, "cudnn"),
        ("gpu", "bfloat16", ODD, True, "xla"),
        ("gpu", "bfloat16", ODD, False, "cudnn"),
        ("gpu", "bfloat16", ((2, 8, 256, 60), (2, 4, 256, 60)), False, "xla"),
        ("gpu", "bfloat16", ((2, 8, 256, 256), (2, 4, 256, 256)), False, "xla"),
        ("gpu", "bfloat16", ((2, 8, 1, 64), (2, 4, 256, 64)), False, "xla"),
        ("rocm", "bfloat16", SQUARE, False, "xla"),
        ("tpu", "bfloat16", SQUARE, False, "xla"),
    ],
)
def test_the_choice_of_implementation_is_a_function_of_its_arguments(backend, dtype, shapes, masked, expected):
    assert attention.choose_implementation(backend, jnp.dtype(dtype), *shapes, masked=masked) == expected


def test_caps_are_left_to_xla():
    assert attention.choose_implementation("gpu", jnp.bfloat16, *SQUARE, capped=True) == "xla"


COLUMN = np.arange(16)
HIDDEN = {
    "nothing": {},
    "padding": {"key_mask": np.array([[0], [5]]) <= COLUMN},
    "packed": {"segment_ids": np.array([[1] * 5 + [2] * 11, [1] * 6 + [2] * 6 + [0] * 4])},
    "window": {"window": 3},
    "window and padding": {"window": 3, "key_mask": np.array([[16], [9]]) > COLUMN},
    "traced window": {"window": jnp.int32(3)},
}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("causal", [True, False])
def test_what_cudnn_is_given_hides_the_same_keys(monkeypatch, hidden, causal):
    """On a GPU with cuDNN's kernel itself; elsewhere XLA's form of the same function computes it."""
    on_gpu = jax.default_backend() in ("gpu", "cuda")
    plain = jax.nn.dot_product_attention
    if not on_gpu:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    rng = np.random.default_rng(0)
    half = [rng.standard_normal((2, n, 16, 8), np.float32).astype(jnp.bfloat16) for n in (4, 2, 2)]
    masks = [HIDDEN[hidden].get(name) for name in ("key_mask", "segment_ids")]
    allowed = attention._allowed(slice(0, 16), slice(0, 16), *masks, causal, HIDDEN[hidden].get("window"))
    sees = True if allowed is None else jnp.any(allowed, -1)[:, 0, ..., None]  # the rest is finite, and no more

    def run(attend):
        def total(*x):
            out = attend(*x, causal=causal, **HIDDEN[hidden]).astype(jnp.float32) * sees
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))

    fused = run(attention.attend)(*half)
    exact = run(attention.attend_blocked)(*(x.astype(np.float32) for x in half))
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.05)


def test_keys_beyond_a_block_of_queries_are_never_computed():
    def dot_flops(length, block):
        x = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
        lowered = jax.jit(lambda q, k, v: attention.attend_blocked(q, k, v, block=block)).lower(x, x, x)
        return (lowered.cost_analysis() or {}).get("flops")

    if dot_flops(512, 512) is None:
        pytest.skip("this backend says nothing of FLOPs before it compiles")
    assert dot_flops(512, 128) < 0.7 * dot_flops(512, 512)
