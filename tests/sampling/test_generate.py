import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lfjax.config import InputError
from lfjax.losses import lm
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.sampling.generate import generate, inverse_cdf, row_uniforms, sample_tokens

SIZE = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "context": 64, "init_std": 0.3}
FORMS = {
    "gpt2": presets.gpt2(**SIZE),
    "llama": presets.llama(**SIZE, kv_heads=2, mlp_width=48, vocab_multiple=8),
}
P, R = 6, 10


@functools.cache
def build(config):
    model = Transformer(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, P), jnp.int32))["params"]


@pytest.fixture(params=FORMS)
def form(request):
    return build(FORMS[request.param])


def prompts_of(rows, seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (rows, P), 0, SIZE["vocab_size"])
    return tokens, jnp.arange(P)[None] >= (jnp.arange(rows) % 4)[:, None]


def run(model, params, tokens, mask, *, seed=3, **options):
    row_ids = options.pop("row_ids", None)
    options = {"max_new_tokens": R, **options}
    return jax.jit(lambda p, t, m, k, r: generate(model, p, t, m, k, row_ids=r, **options))(
        params, tokens, mask, jax.random.key(seed), row_ids
    )


def full_logits(model, params, out):
    """The response's logits [B R V] by one full forward pass."""
    tokens = jnp.concatenate([out.prompts, out.tokens], axis=1)
    mask = jnp.concatenate([out.prompt_mask, out.mask], axis=1)
    return jax.jit(lambda p: model.apply({"params": p}, tokens, mask))(params)[:, P - 1 : -1]


@pytest.mark.parametrize("name, temperature", [("gpt2", 1.0), ("llama", 0.7)])
def test_logprobs_are_the_full_forwards_at_the_sampling_temperature(name, temperature):
    model, params = build(FORMS[name])
    out = run(model, params, *prompts_of(8), temperature=temperature, eos_ids=(5, 9))
    logits = full_logits(model, params, out)
    expected = jnp.where(out.mask, lm.token_logprobs(logits / temperature, out.tokens), 0.0)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-5 * max(1.0, float(jnp.abs(logits).max())))


def test_logprobs_are_those_before_the_filters():
    model, params = build(FORMS["llama"])
    out = run(model, params, *prompts_of(4), top_k=3, top_p=0.8)
    expected = lm.token_logprobs(full_logits(model, params, out), out.tokens)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)


def test_greedy_takes_the_most_probable_token_of_the_full_forward(form):
    model, params = form
    out = run(model, params, *prompts_of(4), temperature=0)
    logits = full_logits(model, params, out)
    np.testing.assert_array_equal(out.tokens, jnp.argmax(logits, -1))
    np.testing.assert_allclose(out.logprobs, lm.token_logprobs(logits, out.tokens), atol=1e-4)


def test_top_k_1_is_greedy():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(4)
    greedy = run(model, params, tokens, mask, temperature=0)
    np.testing.assert_array_equal(run(model, params, tokens, mask, top_k=1).tokens, greedy.tokens)


def test_a_rows_sample_depends_on_its_id_alone_not_on_the_batch():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(8)
    ids = jnp.arange(100, 108)
    whole = run(model, params, tokens, mask, row_ids=ids)
    order = jnp.array([5, 0, 7, 2, 1, 6, 3, 4])
    shuffled = run(model, params, tokens[order], mask[order], row_ids=ids[order])
    np.testing.assert_array_equal(shuffled.tokens, whole.tokens[order])
    some = run(model, params, tokens[2:5], mask[2:5], row_ids=ids[2:5])
    np.testing.assert_array_equal(some.tokens, whole.tokens[2:5])
    more_padding = run(model, params, jnp.pad(tokens, ((0, 0), (3, 0))), jnp.pad(mask, ((0, 0), (3, 0))), row_ids=ids)
    np.testing.assert_array_equal(more_padding.tokens, whole.tokens)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_samples_are_the_same_on_a_mesh():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    placed = run(model, jax.device_put(params, jax.NamedSharding(mesh, jax.P())), *jax.device_put((tokens, mask), rows))
    np.testing.assert_array_equal(placed.tokens, run(model, params, tokens, mask).tokens)


def test_rows_with_the_same_prompt_and_other_ids_or_keys_differ():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(1)
    tokens, mask = jnp.repeat(tokens, 4, 0), jnp.repeat(mask, 4, 0)
    out = run(model, params, tokens, mask).tokens
    assert len(np.unique(out, axis=0)) == 4
    same = run(model, params, tokens, mask, row_ids=jnp.full(4, 7)).tokens
    assert len(np.unique(same, axis=0)) == 1
    assert not np.array_equal(run(model, params, tokens, mask, seed=4).tokens, out)


def test_padding_of_prompts_may_hold_any_id():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(4)
    other = jnp.where(mask, tokens, -7)
    np.testing.assert_array_equal(run(model, params, other, mask).tokens, run(model, params, tokens, mask).tokens)


def test_a_row_ends_at_its_first_stop_token_and_the_others_go_on():
    model, params = build(FORMS["llama"])
    tokens, mask = prompts_of(8)
    free = run(model, params, tokens, mask)
    stops = tuple(int(t) for t in np.unique(np.asarray(free.tokens)[:, 3:5])[:3])
    out = run(model, params, tokens, mask, eos_ids=stops, pad_id=60)
    for row in range(8):
        hits = np.flatnonzero(np.isin(free.tokens[row], stops))
        length = hits[0] + 1 if len(hits) else R
        np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(out.mask[row], np.arange(R) < length)
        assert np.all(out.tokens[row, length:] == 60) and not np.any(out.logprobs[row, length:])
    assert out.mask.sum(1).min() < R, "no row met a stop token: the test shows nothing"


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A model and its own decoder: row r says `script[r]` in turn; every decoding step is reported to `calls`."""

    script: tuple[tuple[int, ...], ...]
    calls: list = dataclasses.field(default_factory=list, hash=False)
    config: object = FORMS["gpt2"]

    def decoder(self, params):
        return self

    def prefill(self, tokens, mask, cache_size):
        return jnp.zeros((*tokens.shape, 1)), jnp.int32(0)

    def decode(self, tokens, cache):
        jax.debug.callback(lambda: self.calls.append(1))
        return jnp.full((*tokens.shape, 1), cache + 1), cache + 1

    def logits(self, hidden):
        says = jnp.asarray(self.script)[jnp.arange(len(self.script)), hidden[:, 0].astype(jnp.int32)]
        return 9.0 * jax.nn.one_hot(says, 10)


@pytest.mark.parametrize(
    "eos_ids, lengths, steps", [((), (5, 5), 4), ((7,), (2, 3), 2), ((3, 7), (1, 3), 2), ((1, 3), (1, 1), 0)]
)
def test_decoding_ends_when_every_row_has_stopped(eos_ids, lengths, steps):
    model = Scripted(((3, 7, 4, 4, 4), (1, 2, 7, 7, 4)))
    tokens, mask = prompts_of(2)
    out = run(model, {}, tokens, mask, max_new_tokens=5, temperature=0, eos_ids=eos_ids)
    jax.effects_barrier()
    assert len(model.calls) == steps
    np.testing.assert_array_equal(out.mask.sum(1), lengths)


def test_padded_vocabulary_rows_are_never_sampled():
    model, params = build(FORMS["llama"])
    kernel = params["unembed"]["kernel"].at[:, SIZE["vocab_size"] :].set(1e3)
    params = params | {"unembed": {"kernel": kernel * jnp.sign(kernel[:, :1])}}
    for options in ({}, {"temperature": 0}, {"temperature": 5.0}):
        assert run(model, params, *prompts_of(8), **options).tokens.max() < SIZE["vocab_size"]


def test_one_token_and_no_stop_token():
    model, params = build(FORMS["llama"])
    out = run(model, params, *prompts_of(2), max_new_tokens=1)
    assert out.tokens.shape == (2, 1) and out.mask.all()


def test_bfloat16_model_samples_with_float32_logprobs():
    model, params = build(dataclasses.replace(FORMS["llama"], dtype="bfloat16"))
    out = run(model, params, *prompts_of(2))
    assert out.logprobs.dtype == jnp.float32 and np.isfinite(out.logprobs).all()


def test_more_tokens_than_the_context_holds_are_refused():
    model, params = build(FORMS["gpt2"])
    tokens, mask = prompts_of(1)
    with pytest.raises(InputError, match=r"found 59 after prompts of 6 tokens; together at most model\.context = 64"):
        generate(model, params, tokens, mask, jax.random.key(0), max_new_tokens=59)
    with pytest.raises(InputError, match="at least 1"):
        generate(model, params, tokens, mask, jax.random.key(0), max_new_tokens=0)


@pytest.mark.parametrize("vocab", [61, 64, 7, 1000])
def test_frequencies_of_samples_fit_the_softmax(vocab):
    logits = 2 * jax.random.normal(jax.random.key(vocab), (1, vocab)).at[0, 0].set(-jnp.inf)
    n = 200_000
    uniforms = jax.random.uniform(jax.random.key(1), (n, 2))
    draws = jax.jit(lambda u: inverse_cdf(jnp.broadcast_to(jnp.exp(logits), (n, vocab)), u))(uniforms)
    counts = np.bincount(draws, minlength=vocab)
    expected = n * np.asarray(jax.nn.softmax(logits[0]), np.float64)
    assert counts[0] == 0
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep] * n / expected[keep].sum()).pvalue > 1e-3


def test_frequencies_of_generated_tokens_fit_the_models_probabilities():
    model, params = build(FORMS["gpt2"])
    rows = 8192
    tokens = jnp.broadcast_to(prompts_of(1)[0], (rows, P))
    out = run(model, params, tokens, jnp.ones((rows, P), bool), max_new_tokens=1)
    probabilities = jax.nn.softmax(model.apply({"params": params}, tokens[:1])[0, -1])
    expected = rows * np.asarray(probabilities, np.float64)
    counts = np.bincount(out.tokens[:, 0], minlength=SIZE["vocab_size"])
    often = expected >= 5
    observed, expected = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    assert stats.chisquare(observed, expected * rows / expected.sum()).pvalue > 1e-3


def test_extreme_uniforms_never_pick_a_removed_token():
    weights = jnp.zeros((4, 30)).at[:, jnp.array([3, 17])].set(jnp.array([1.0, 1e-30]))
    edge = 1 - 2.0**-24
    uniforms = jnp.array([[0.0, 0.0], [edge, edge], [0.0, edge], [edge, 0.0]], jnp.float32)
    assert set(np.asarray(inverse_cdf(weights, uniforms)).tolist()) <= {3, 17}


def test_uniforms_are_those_of_the_documented_fold_in():
    rng = jax.random.key(11)
    got = row_uniforms(rng, jnp.array([4, 900]), 3)
    for token, (row, row_id) in itertools.product(range(3), enumerate((4, 900))):
        key = jax.random.fold_in(jax.random.fold_in(rng, row_id), token)
        np.testing.assert_array_equal(got[token, row], jax.random.uniform(key, (2,)))


def test_filters_bound_what_is_sampled():
    logits = jax.random.normal(jax.random.key(2), (1, 50))
    uniforms = jax.random.uniform(jax.random.key(3), (5000, 2))
    many = jnp.broadcast_to(logits, (5000, 50))
    best = set(np.argsort(-np.asarray(logits[0]))[:4].tolist())
    assert set(np.asarray(sample_tokens(many, uniforms, temperature=1.0, top_k=4)[0]).tolist()) == best
    order = np.argsort(-np.asarray(logits[0]))
    mass = np.cumsum(np.asarray(jax.nn.softmax(logits[0]))[order])
    nucleus = set(order[: int(np.searchsorted(mass, 0.5)) + 1].tolist())
    assert set(np.asarray(sample_tokens(many, uniforms, temperature=1.0, top_p=0.5)[0]).tolist()) == nucleus


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_a_response_before_the_least_number_of_tokens(temperature):
    """What is drawn instead has the log-probability that the model gives it."""
    model, params = build(FORMS["llama"])
    stops = tuple(range(0, SIZE["vocab_size"], 2))
    out = run(model, params, *prompts_of(8), temperature=temperature, eos_ids=stops, min_new_tokens=3)
    assert 4 <= np.min(out.mask.sum(1)) < R
    assert not np.isin(out.tokens[:, :3], stops).any()
    logprobs = jax.nn.log_softmax(full_logits(model, params, out)[:, 0])
    picked = jnp.take_along_axis(logprobs, out.tokens[:, :1], axis=1)[:, 0]
    np.testing.assert_allclose(out.logprobs[:, 0], picked, rtol=1e-4, atol=1e-5)
