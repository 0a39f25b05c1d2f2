import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfjax.config import InputError
from lfjax.losses import lm
from lfjax.models import blocks, presets
from lfjax.models.transformer import Transformer, TransformerConfig, default_positions, parameter_table

SIZE = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "context": 64, "init_std": 0.2}
FORMS = {
    "gpt2": presets.gpt2(**SIZE),
    "llama": presets.llama(**SIZE, kv_heads=2, mlp_width=48, vocab_multiple=8),
}
LENGTH = 12


def randomised(params, seed=7):
    """Every array random, biases and scales too, so that a forgotten one shows."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def build(config, **fields):
    model = Transformer(config, **fields)
    init = jax.jit(lambda: randomised(model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]))
    return model, init()


def apply(model, params, *args, **kwargs):
    static = {k: kwargs.pop(k) for k in ("method",) if k in kwargs}
    return jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k, **static))(params, args, kwargs)


def tokens_of(*shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, SIZE["vocab_size"])


@pytest.fixture(params=FORMS)
def form(request):
    return build(FORMS[request.param])


def close(a, b, scale=1e-5):
    np.testing.assert_allclose(a, b, atol=scale * max(1.0, float(np.max(np.abs(b)))), rtol=0)


def test_parameter_tree_is_the_documented_one():
    c = FORMS["llama"]
    shapes = jax.tree.map(jnp.shape, build(c)[1])
    D, L = c.width, c.layers
    assert shapes == {
        "embed": {"tokens": (64, D)},
        "layers": {
            "norm1": {"scale": (L, D)},
            "attention": {"q": (L, D, 4, 8), "k": (L, D, 2, 8), "v": (L, D, 2, 8), "o": (L, 4, 8, D)},
            "norm2": {"scale": (L, D)},
            "mlp": {"up": (L, D, 48), "gate": (L, D, 48), "down": (L, 48, D)},
        },
        "final_norm": {"scale": (D,)},
        "unembed": {"kernel": (D, 64)},
    }
    shapes = jax.tree.map(jnp.shape, build(dataclasses.replace(FORMS["gpt2"], num_labels=3, head_bias=True))[1])
    assert shapes["embed"] == {"tokens": (61, D), "positions": (64, D)}
    assert shapes["head"] == {"kernel": (D, 3), "bias": (3,)} and "unembed" not in shapes
    assert shapes["layers"]["attention"]["q_bias"] == (L, 4, 8)
    assert shapes["layers"]["attention"]["o_bias"] == (L, D)
    assert shapes["layers"]["mlp"]["up_bias"] == (L, 4 * D) and shapes["layers"]["mlp"]["down_bias"] == (L, D)


def test_initial_scales_are_those_of_the_table():
    config = presets.gpt2(vocab_size=500, width=64, layers=8, heads=4, num_labels=200, head_bias=True)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    std = lambda x: float(np.std(x))  # noqa: E731
    assert std(params["embed"]["tokens"]) == pytest.approx(0.02, rel=0.05)
    assert std(params["layers"]["mlp"]["up"]) == pytest.approx(0.02, rel=0.05)
    assert std(params["layers"]["mlp"]["down"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert std(params["layers"]["attention"]["o"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert std(params["head"]["kernel"]) == pytest.approx(65**-0.5, rel=0.05)
    assert not np.any(params["head"]["bias"]) and np.all(params["final_norm"]["scale"] == 1)
    assert not np.array_equal(params["layers"]["mlp"]["up"][0], params["layers"]["mlp"]["up"][1])


def test_number_of_parameters_of_the_presets():
    def count(config):
        is_entry = lambda x: isinstance(x, tuple)  # noqa: E731
        return sum(int(np.prod(shape)) for shape, _ in jax.tree.leaves(parameter_table(config), is_leaf=is_entry))

    assert count(presets.gpt2_124m()) == 124_439_808  # GPT-2 small as published
    assert 12e6 < count(presets.gpt2_12m()) < 13e6
    assert 0.6e6 < count(presets.llama_tiny()) < 0.7e6


def test_logits_at_a_position_depend_on_no_later_token(form):
    model, params = form
    tokens = tokens_of(2, LENGTH)
    changed = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % SIZE["vocab_size"])
    a, b = (apply(model, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max() > 1e-2


def test_padding_on_either_side_changes_nothing_whatever_it_holds(form):
    model, params = form
    tokens = tokens_of(1, 7)
    alone = apply(model, params, tokens)
    for before, after, filler in [(5, 0, 0), (5, 0, 60), (0, 5, 17), (2, 3, -1), (5, 0, 2**31 - 1)]:
        padded = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=filler)
        mask = jnp.pad(jnp.ones((1, 7), bool), ((0, 0), (before, after)))
        close(apply(model, params, padded, mask)[:, before : before + 7], alone)
        close(apply(model, params, padded, mask.astype(jnp.int32))[:, before : before + 7], alone)


def test_padding_gets_no_gradient_and_a_row_of_padding_stays_finite(form):
    model, params = form
    tokens = jnp.stack([tokens_of(LENGTH), jnp.full(LENGTH, 60)]).at[0, :4].set(60)
    mask = (jnp.arange(LENGTH)[None] >= 4) & jnp.array([[True], [False]])

    def loss(params):
        logits = model.apply({"params": params}, tokens, mask)
        logprobs = lm.token_logprobs(logits[:, :-1], tokens[:, 1:])
        return -jnp.sum(jnp.where(mask[:, :-1], logprobs, 0.0)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(logits).all() and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if not model.config.tied:
        assert 60 not in tokens[0, 4:] and not np.any(grads["embed"]["tokens"][60])


def test_packed_documents_equal_each_alone(form):
    model, params = form
    first, second = tokens_of(1, 5, seed=3), tokens_of(1, 4, seed=4)
    packed = jnp.concatenate([first, second, jnp.full((1, 3), 9)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    out = apply(model, params, packed, segment_ids=segments)
    close(out[:, :5], apply(model, params, first))
    close(out[:, 5:9], apply(model, params, second))


def test_default_positions_count_real_tokens_and_restart_in_each_segment():
    mask = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(
        default_positions(6, mask, None), [[0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]]
    )
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [0, 5, 5, 3, 3, 3]])
    np.testing.assert_array_equal(default_positions(6, None, segments)[:, :5], [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(default_positions(4, None, None), [[0, 1, 2, 3]])
    both = default_positions(6, jnp.array([[0, 1, 1, 0, 1, 0]], bool), segments[:1])
    np.testing.assert_array_equal(both[:, [1, 2, 4]], [[0, 1, 0]])


def test_given_positions_are_used(form):
    model, params = form
    tokens = tokens_of(1, 6)
    default = apply(model, params, tokens)
    close(apply(model, params, tokens, positions=jnp.arange(6)[None]), default)
    assert np.abs(apply(model, params, tokens, positions=jnp.arange(6)[None] * 3) - default).max() > 1e-3


def test_cached_decoding_equals_the_full_forward_pass(form):
    model, params = form
    tokens = tokens_of(3, LENGTH)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([0, 2, 4])[:, None]
    full = apply(model, params, tokens, mask)

    @jax.jit
    def stepwise(params):
        hidden, cache = model.apply({"params": params}, tokens[:, :6], mask[:, :6], LENGTH, method="prefill")
        rows = [hidden]
        for t in range(6, LENGTH):
            hidden, cache = model.apply({"params": params}, tokens[:, t : t + 1], cache, method="decode")
            rows.append(hidden)
        return model.decoder(params).logits(jnp.concatenate(rows, axis=1)), cache

    logits, cache = stepwise(params)
    close(jnp.where(mask[..., None], logits, 0), jnp.where(mask[..., None], full, 0))
    np.testing.assert_array_equal(cache.mask, mask)
    np.testing.assert_array_equal(cache.positions, mask.sum(1))


def test_decoding_from_an_empty_cache_equals_the_full_forward_pass(form):
    model, params = form
    tokens = tokens_of(2, 4)

    @jax.jit
    def stepwise(params):
        decoder, cache, rows = model.decoder(params), model.init_cache(2, 4), []
        for t in range(4):
            hidden, cache = decoder.decode(tokens[:, t : t + 1], cache)
            rows.append(decoder.logits(hidden))
        return jnp.concatenate(rows, axis=1)

    close(stepwise(params), apply(model, params, tokens))


def gradients(config, params, **fields):
    model, tokens = Transformer(config, **fields), tokens_of(2, LENGTH)

    def loss(params):
        logits = model.apply({"params": params}, tokens, rngs={"dropout": jax.random.key(5)})
        return -jnp.mean(lm.token_logprobs(logits[:, :-1], tokens[:, 1:]))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 1}, {"unroll": 1, "remat": "full"}]
)
def test_rematerialised_and_scanned_layers_give_the_same_loss_and_gradients(form, change):
    model, params = form
    config = dataclasses.replace(model.config, dropout=0.1)
    loss, grads = gradients(config, params)
    other_loss, other_grads = gradients(dataclasses.replace(config, **change), params)
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: close(a, b, 2e-6), other_grads, grads)


def test_remat_keeps_fewer_bytes_for_the_backward_pass():
    def saved(remat):
        config = dataclasses.replace(FORMS["llama"], remat=remat, layers=4)
        model = Transformer(config)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
        _, pull = jax.eval_shape(
            lambda p: jax.vjp(lambda p: model.apply({"params": p}, tokens_of(4, 64)).sum(), p), params
        )
        return sum(x.size for x in jax.tree.leaves(pull))

    assert saved("full") < saved("dots") < saved("none")


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients(form):
    model, params = form
    half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
    fresh = half.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    tokens = tokens_of(2, LENGTH)
    logits = apply(half, params, tokens)
    assert logits.dtype == jnp.float32
    assert apply(half, params, tokens, method="hidden").dtype == jnp.bfloat16
    close(logits, apply(model, params, tokens), 0.1)
    grads = jax.jit(jax.grad(lambda p: half.apply({"params": p}, tokens).mean()))(params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_a_padded_vocabulary_changes_neither_logits_nor_their_number():
    config = FORMS["llama"]
    model, params = build(config)
    narrow = Transformer(dataclasses.replace(config, vocab_multiple=1))
    cut = params | {
        "embed": {"tokens": params["embed"]["tokens"][:61]},
        "unembed": {"kernel": params["unembed"]["kernel"][:, :61]},
    }
    tokens = tokens_of(2, 5)
    wide = apply(model, params, tokens)
    assert wide.shape == (2, 5, 61)
    close(wide, apply(narrow, cut, tokens))
    assert model.unembed(params).vocab_size == 61 and narrow.unembed(cut).vocab_size is None


def test_hidden_and_unembed_give_the_losses_of_the_logits(form):
    model, params = form
    tokens = tokens_of(2, LENGTH)
    hidden = apply(model, params, tokens, method="hidden")
    stats = lm.chunked_token_stats(hidden, model.unembed(params), tokens, chunk_size=5)
    close(stats.logprobs, lm.token_logprobs(apply(model, params, tokens), tokens))


def test_dropout_acts_only_with_a_dropout_key(form):
    model, params = form
    noisy = Transformer(dataclasses.replace(model.config, dropout=0.5))
    tokens = tokens_of(2, LENGTH)
    np.testing.assert_array_equal(apply(noisy, params, tokens), apply(model, params, tokens))
    a, b, c = (
        jax.jit(lambda p, k: noisy.apply({"params": p}, tokens, rngs={"dropout": k}))(params, jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-2 and np.abs(a - apply(model, params, tokens)).max() > 1e-2


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    x = jnp.ones((64, 50, 33))
    out = np.asarray(blocks.dropout(x, jax.random.key(0), 0.1))
    dropped = round(0.1 * 256) / 256
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - dropped))}
    share, n = (out == 0).mean(), out.size
    assert abs(share - dropped) < 4 * (dropped * (1 - dropped) / n) ** 0.5
    neighbours = (out[..., 1:] == 0) & (out[..., :-1] == 0)
    assert abs(neighbours.mean() - dropped**2) < 5 * (dropped**2 / n) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dropout_keeps_the_mean_in_every_dtype(dtype):
    """Of what is kept, to the mean rounding of as many values, and of all, within the sampling error of who is."""
    x = jax.random.uniform(jax.random.key(1), (256, 1024), jnp.float32, 1.0, 2.0).astype(dtype)
    out, x = (np.asarray(a, np.float64) for a in (jax.jit(lambda x: blocks.dropout(x, jax.random.key(0), 0.1))(x), x))
    kept, p = out != 0, round(0.1 * 256) / 256
    largest = x.max() / (1 - p)
    rounding = largest * (float(jnp.finfo(dtype).eps) / len(np.unique(x)) ** 0.5 + float(jnp.finfo(jnp.float32).eps))
    assert abs((out[kept] - x[kept] / (1 - p)).mean()) < rounding
    assert abs((out - x).mean()) < 4 * (np.square(x).mean() * p / (1 - p) / x.size) ** 0.5


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_dropout_noise_is_the_same_on_any_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(1), (8, 4, 16))
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
    drop = jax.jit(lambda x: blocks.dropout(x, jax.random.key(0), 0.3))
    np.testing.assert_array_equal(drop(x), drop(placed))


def test_scores_are_pooled_at_the_last_real_token_whatever_the_padding_side():
    model, params = build(dataclasses.replace(FORMS["llama"], num_labels=2, head_bias=True))
    tokens = tokens_of(1, 7).at[0, 3].set(2)  # an EOS-like id inside a dialogue is not its end
    alone = apply(model, params, tokens)
    assert alone.shape == (1, 2) and alone.dtype == jnp.float32
    for before, after in [(5, 0), (0, 5), (2, 3)]:
        padded = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=2)
        mask = jnp.pad(jnp.ones((1, 7), bool), ((0, 0), (before, after)))
        close(apply(model, params, padded, mask), alone)
    values = apply(model, params, tokens, method="values")
    assert values.shape == (1, 7, 2)
    close(values[:, -1], alone)
    packed = apply(model, params, jnp.pad(tokens, ((0, 0), (0, 5))), segment_ids=jnp.array([[1] * 7 + [0] * 5]))
    close(packed, alone)


def test_attend_and_constrain_are_injected():
    from lfjax.models import attention

    seen = []

    def attend(q, k, v, **masks):
        seen.append("attend")
        return attention.attend_blocked(q, k, v, **masks)

    def constrain(x, name):
        seen.append(name)
        return x

    model, params = build(FORMS["gpt2"], attend=attend, constrain=constrain)
    seen.clear()
    out = model.apply({"params": params}, tokens_of(1, 5))
    assert seen.count("attend") == 2 and {"residual", "heads", "mlp", "logits"} <= set(seen)
    close(out, Transformer(FORMS["gpt2"]).apply({"params": params}, tokens_of(1, 5)))


def test_token_types_are_embedded_through_the_token_table():
    model, params = build(FORMS["gpt2"])
    tokens, types = tokens_of(1, 5), tokens_of(1, 5, seed=9)
    shifted = params | {
        "embed": params["embed"]
        | {"positions": params["embed"]["positions"].at[:5].add(params["embed"]["tokens"][types[0]])}
    }
    close(apply(model, params, tokens, token_type_ids=types), apply(model, shifted, tokens))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"norm": "batchnorm"}, "layernorm, rmsnorm"),
        ({"position": "rope", "head_dim": 7}, "head_dim"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"position": "rope", "rope_share": 1.5}, "rope_share: found 1.5"),
        ({"rope_scaling": ("linear",)}, "'linear' takes one number"),
        ({"window": 4, "windowed": (True,)}, "windowed"),
        ({"windowed": (True, False)}, "a window of at least 1"),
        ({"remat": "some"}, "none, full, dots"),
        ({"dtype": "int8"}, "float32"),
    ],
)
def test_a_wrong_switch_is_named_with_what_is_allowed(change, word):
    with pytest.raises(InputError, match=word):
        TransformerConfig(**{**SIZE, **change})


def test_more_positions_than_learned_ones_are_refused():
    model, params = build(FORMS["gpt2"])
    with pytest.raises(InputError, match=r"model\.context: found 64; the input has 65"):
        model.apply({"params": params}, jnp.zeros((1, 65), jnp.int32))
