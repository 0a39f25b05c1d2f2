import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

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
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(np.asarray(x) + 0.1 * rng.standard_normal(x.shape)), params)


@functools.cache
def build(config, **fields):
    model = Transformer(config, **fields)
    return model, randomised(tiny.init(Transformer(config)))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def compiled(model, params, args, kwargs, method):
    return model.apply({"params": params}, *args, **kwargs, method=method)


def apply(model, params, *args, method=None, **kwargs):
    return np.asarray(compiled(model, params, args, kwargs, method))


def tokens_of(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, SIZE["vocab_size"], shape).astype(np.int32)


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
    params = tiny.init(Transformer(config))
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
    changed = np.where(np.arange(LENGTH) < 7, tokens, (tokens + 1) % SIZE["vocab_size"])
    a, b = (apply(model, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max() > 1e-2


def test_padding_on_either_side_changes_nothing_whatever_it_holds(form):
    model, params = form
    tokens = tokens_of(1, 7)
    alone = apply(model, params, tokens)
    for before, after, filler in [(5, 0, 0), (5, 0, 60), (0, 5, 17), (2, 3, -1), (5, 0, 2**31 - 1)]:
        padded = np.pad(tokens, ((0, 0), (before, after)), constant_values=filler)
        mask = np.pad(np.ones((1, 7), bool), ((0, 0), (before, after)))
        close(apply(model, params, padded, mask)[:, before : before + 7], alone)
        close(apply(model, params, padded, mask.astype(np.int32))[:, before : before + 7], alone)


def test_padding_gets_no_gradient_and_a_row_of_padding_stays_finite(form):
    model, params = form
    tokens = np.stack([tokens_of(LENGTH) % 60, np.full(LENGTH, 60, np.int32)])
    tokens[0, :4] = 60
    mask = (np.arange(LENGTH)[None] >= 4) & np.array([[True], [False]])

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
    packed = np.concatenate([first, second, np.full((1, 3), 9, np.int32)], axis=1)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3])
    out = apply(model, params, packed, segment_ids=segments)
    close(out[:, :5], apply(model, params, first))
    close(out[:, 5:9], apply(model, params, second))


def test_default_positions_count_real_tokens_and_restart_in_each_segment():
    positions_of = jax.jit(default_positions, static_argnums=0)
    mask = np.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(
        positions_of(6, mask, None), [[0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]]
    )
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 5, 5, 3, 3, 3]])
    np.testing.assert_array_equal(positions_of(6, None, segments)[:, :5], [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(positions_of(4, None, None), [[0, 1, 2, 3]])
    both = positions_of(6, np.array([[0, 1, 1, 0, 1, 0]], bool), segments[:1])
    np.testing.assert_array_equal(both[:, [1, 2, 4]], [[0, 1, 0]])


def test_given_positions_are_used(form):
    model, params = form
    tokens = tokens_of(1, 6)
    default = apply(model, params, tokens)
    close(apply(model, params, tokens, positions=np.arange(6)[None]), default)
    assert np.abs(apply(model, params, tokens, positions=np.arange(6)[None] * 3) - default).max() > 1e-3


def test_cached_decoding_equals_the_full_forward_pass(form):
    model, params = form
    tokens = tokens_of(3, LENGTH)
    mask = np.arange(LENGTH)[None] >= np.array([0, 2, 4])[:, None]
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
    close(np.where(mask[..., None], logits, 0), np.where(mask[..., None], full, 0))
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
    fresh = jax.eval_shape(half.init, jax.random.key(0), tokens_of(1, 4))["params"]
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
    found = jax.jit(lambda p, h: lm.chunked_token_stats(h, model.unembed(p), tokens, chunk_size=5).logprobs)
    close(found(params, hidden), jax.jit(lm.token_logprobs)(apply(model, params, tokens), tokens))


def test_dropout_acts_only_with_a_dropout_key(form):
    model, params = form
    noisy = Transformer(dataclasses.replace(model.config, dropout=0.5))
    tokens = tokens_of(2, LENGTH)
    np.testing.assert_array_equal(apply(noisy, params, tokens), apply(model, params, tokens))
    a, b, c = (apply(noisy, params, tokens, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-2 and np.abs(a - apply(model, params, tokens)).max() > 1e-2


drop = jax.jit(lambda x, rate: blocks.dropout(x, jax.random.key(0), rate), static_argnums=1)


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    x = np.ones((64, 50, 33), np.float32)
    out = np.asarray(drop(x, 0.1))
    dropped = round(0.1 * 256) / 256
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - dropped))}
    share, n = (out == 0).mean(), out.size
    assert abs(share - dropped) < 4 * (dropped * (1 - dropped) / n) ** 0.5
    neighbours = (out[..., 1:] == 0) & (out[..., :-1] == 0)
    assert abs(neighbours.mean() - dropped**2) < 5 * (dropped**2 / n) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dropout_keeps_the_mean_in_every_dtype(dtype):
    """Of what is kept, to the mean rounding of as many values, and of all, within the sampling error of who is."""
    x = np.random.default_rng(1).uniform(1.0, 2.0, (256, 1024)).astype(jnp.dtype(dtype))
    out, x = (np.asarray(a, np.float64) for a in (drop(x, 0.1), x))
    kept, p = out != 0, round(0.1 * 256) / 256
    largest = x.max() / (1 - p)
    rounding = largest * (float(jnp.finfo(dtype).eps) / len(np.unique(x)) ** 0.5 + float(jnp.finfo(jnp.float32).eps))
    assert abs((out[kept] - x[kept] / (1 - p)).mean()) < rounding
    assert abs((out - x).mean()) < 4 * (np.square(x).mean() * p / (1 - p) / x.size) ** 0.5


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_dropout_noise_is_the_same_on_any_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.random.default_rng(1).standard_normal((8, 4, 16), np.float32)
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
    np.testing.assert_array_equal(drop(x, 0.3), drop(placed, 0.3))


def test_scores_are_pooled_at_the_last_real_token_whatever_the_padding_side():
    model, params = build(dataclasses.replace(FORMS["llama"], num_labels=2, head_bias=True))
    tokens = tokens_of(1, 7)
    tokens[0, 3] = 2  # an EOS-like id inside a dialogue is not its end
    alone = apply(model, params, tokens)
    assert alone.shape == (1, 2) and alone.dtype == jnp.float32
    for before, after in [(5, 0), (0, 5), (2, 3)]:
        padded = np.pad(tokens, ((0, 0), (before, after)), constant_values=2)
        mask = np.pad(np.ones((1, 7), bool), ((0, 0), (before, after)))
        close(apply(model, params, padded, mask), alone)
    values = apply(model, params, tokens, method="values")
    assert values.shape == (1, 7, 2)
    close(values[:, -1], alone)
    packed = apply(model, params, np.pad(tokens, ((0, 0), (0, 5))), segment_ids=np.array([[1] * 7 + [0] * 5]))
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
    out = apply(model, params, tokens_of(1, 5))
    assert seen.count("attend") == 2 and {"residual", "heads", "mlp", "logits"} <= set(seen)
    close(out, apply(Transformer(FORMS["gpt2"]), params, tokens_of(1, 5)))


def test_token_types_are_embedded_through_the_token_table():
    model, params = build(FORMS["gpt2"])
    tokens, types = tokens_of(1, 5), tokens_of(1, 5, seed=9)
    embed = jax.tree.map(np.copy, params["embed"])
    embed["positions"][:5] += embed["tokens"][types[0]]
    shifted = params | {"embed": embed}
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
