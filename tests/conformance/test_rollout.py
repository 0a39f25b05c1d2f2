"""Where prompts stand, where responses end, and what noise samples them. Numbers are README.md's."""

import jax
import jax.numpy as jnp
import numpy as np
import setting
import tiny
from reference import ppo as reference
from setting import CLOSE, EOS, LM, PLACED, STOPS

from lfjax import config as configs
from lfjax import stages


# 1
def test_prompts_are_left_padded_and_positions_count_real_tokens(steps):
    """Left padding puts every response into the same columns; positions that count it shift each prompt by its own
    padding, into places the model never saw in training. Padded ids may be anything, also no token at all.
    """
    gen = tiny.generation()
    junk = np.where(gen.prompt_mask, gen.prompts, tiny.VOCAB + 7).astype(np.int32)
    gen = gen._replace(prompts=junk)
    prompts = tiny.prompt_batch()._replace(tokens=junk)
    assert not gen.prompt_mask.all() and np.all(gen.prompt_mask[:, -1])

    rollout = setting.experience(steps, gen, models=PLACED)
    for name, found, seed in (("old", rollout.old_logprobs, 0), ("reference", rollout.ref_logprobs, 3)):
        expected = _without_padding(seed, gen)
        np.testing.assert_allclose(found[gen.mask], expected[gen.mask], **CLOSE, err_msg=name)
    values = _values_without_padding(setting.value_params(PLACED.value), setting.rows_of(gen))
    np.testing.assert_allclose(rollout.values[gen.mask], np.asarray(values)[gen.mask], **CLOSE)

    out = setting.sample(steps, prompts=prompts, models=PLACED)
    np.testing.assert_array_equal(out.prompt_mask, prompts.mask)
    np.testing.assert_allclose(out.logprobs[out.mask], _without_padding(0, out)[out.mask], **CLOSE)

    last = _last_score_without_padding(setting.value_params(PLACED.value), setting.rows_of(gen))
    np.testing.assert_allclose(setting.score(steps, gen, models=PLACED), last, **CLOSE)

    saved = setting.saved_rollout()._replace(prompts=junk, old_logprobs=np.float32(_without_padding(0, gen)))
    found, _ = setting.update(steps, saved, models=PLACED)
    weights = jnp.float32(np.where(gen.mask, -saved.advantages / gen.mask.sum(), 0.0))
    expected = _pull_without_padding(setting.params(0, PLACED.policy), setting.rows_of(gen), weights)
    tiny.close_trees(found, expected, rtol=1e-4)


def _logits_without_padding(params, rows):
    tokens, mask, positions, places = setting.left_aligned(rows)
    logits = PLACED.policy.apply({"params": params}, tokens, attention_mask=mask, positions=positions)
    return setting.at_places(logits, places)


_compiled_logits = jax.jit(_logits_without_padding)


@jax.jit
def _values_without_padding(params, rows):
    tokens, mask, positions, places = setting.left_aligned(rows)
    values = PLACED.value.apply({"params": params}, tokens, attention_mask=mask, positions=positions, method="values")
    return setting.at_places(values, places)[..., 0]


@jax.jit
def _last_score_without_padding(params, rows):
    tokens, mask, positions, _ = setting.left_aligned(rows)
    values = PLACED.value.apply({"params": params}, tokens, attention_mask=mask, positions=positions, method="values")
    return setting.at_places(values, mask.sum(1)[:, None] - 1)[:, 0, 0]


@jax.jit
def _pull_without_padding(params, rows, weights):
    def total(params):
        logprobs = jax.nn.log_softmax(_logits_without_padding(params, rows) / setting.TEMPERATURE)
        return jnp.sum(weights * jnp.take_along_axis(logprobs, rows[2][..., None], axis=-1)[..., 0])

    return jax.grad(total)(params)


def _without_padding(seed, gen) -> np.ndarray:
    logits = _compiled_logits(setting.params(seed, PLACED.policy), setting.rows_of(gen))
    found = reference.log_softmax(logits, setting.TEMPERATURE)
    return np.take_along_axis(found, np.asarray(gen.tokens)[..., None], axis=-1)[..., 0]


# 2
def test_eos_counts_even_where_it_is_the_pad_id(steps):
    """Many tokenizers have no pad and use EOS: the mask has to come from the first EOS's position."""
    out = setting.sample(steps, eos_ids=STOPS, pad_id=5)
    assert np.isin(out.tokens, STOPS).any()
    np.testing.assert_array_equal(out.mask.sum(1), _lengths(out))
    np.testing.assert_array_equal(out.tokens[~out.mask], 5)


def _lengths(out) -> np.ndarray:
    """[B]: tokens up to and including the first stop token, by the tokens alone."""
    ends = np.isin(out.tokens, STOPS)
    return np.where(ends.any(1), ends.argmax(1), out.tokens.shape[1] - 1) + 1


# 3
def test_tokens_after_the_first_eos_count_nowhere(steps):
    """Shapes are static, so something stands there; whatever it is, EOS included, no mask, probability, reward or rule
    may see it.
    """
    out = setting.sample(steps, eos_ids=STOPS, pad_id=5)
    before = np.arange(tiny.RESPONSE)[None] < _lengths(out)[:, None]
    assert out.tokens.shape == out.mask.shape == out.logprobs.shape == (tiny.ROWS, tiny.RESPONSE)
    np.testing.assert_array_equal(out.mask, before)
    assert np.all(out.logprobs[before] < 0) and not np.any(out.logprobs[~before])
    gen = tiny.generation()
    assert np.any(~gen.mask[tiny.ended(gen)])
    unended = gen._replace(tokens=np.where(gen.tokens == EOS, 3, gen.tokens))  # then no EOS counts
    plain = setting.experience(steps, unended)
    for junk in (EOS, tiny.VOCAB - 1):
        changed = unended._replace(tokens=np.where(gen.mask, unended.tokens, junk).astype(np.int32))
        other = setting.experience(steps, changed)
        for name in ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "scores", "ended"):
            np.testing.assert_array_equal(getattr(other, name), getattr(plain, name), err_msg=name)


# 4
def test_a_stop_token_ends_the_text_that_is_scored(steps):
    """The reward reads prompt and response up to the first of several stop tokens, and nothing after it: otherwise it
    rates text that the policy is not paid for.
    """
    out = setting.sample(steps, eos_ids=STOPS, pad_id=5)
    before = np.arange(tiny.RESPONSE)[None] < _lengths(out)[:, None]
    assert np.any(~before)
    cut = (out.prompts, out.prompt_mask, np.where(before, out.tokens, tiny.PAD), before)
    expected = setting.last_scores(setting.value_params(), cut)
    np.testing.assert_allclose(setting.score(steps, out), expected, **CLOSE)


# 8
def test_rollouts_come_from_the_whole_distribution(steps):
    """Under top-k or top-p the sampler draws from another distribution than the one whose ratio is taken; ratios then
    lack the mass that was cut away. Switched off by default, and refused.
    """
    defaults = steps["shared_sections"]().sampling
    assert (defaults.top_k, defaults.top_p) == (0, 1.0)
    for cut in ({"top_k": 5}, {"top_p": 0.9}):
        asked = configs.base_config()
        asked.sampling.update(cut)
        assert _refused(lambda asked=asked: configs.validate(asked, stages.declared())), f"the config takes {cut}"
        assert _refused(lambda cut=cut: setting.sample(steps, **cut)), f"the rollout takes {cut}"


def _refused(call) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


# 8
def test_every_token_is_sampled_at_its_rate(steps):
    """Refusing top-k and top-p is no use where the sampler cuts of its own: what it draws, over a thousand tokens,
    falls among the k most likely, and into any share of the mass, as often as the policy's whole distribution says.
    """
    places, before, drawn, probabilities = [], [], [], []
    for key in range(32):
        out = setting.sample(steps, key=key)
        rows = setting.logits_of(setting.params(), setting.rows_of(out))
        p = np.exp(reference.log_softmax(rows, setting.TEMPERATURE))[out.mask]
        order = np.argsort(-p, axis=1)
        p = np.take_along_axis(p, order, axis=1)
        places.append(np.broadcast_to(np.arange(tiny.VOCAB), p.shape))
        before.append(np.cumsum(p, axis=1) - p)
        drawn.append(order == out.tokens[out.mask][:, None])
        probabilities.append(p)
    places, before, drawn, p = map(np.concatenate, (places, before, drawn, probabilities))
    assert len(p) > 1000
    cuts = {f"top-k {k}": places >= k for k in range(1, tiny.VOCAB)}
    cuts |= {f"top-p {mass}": before >= mass for mass in (0.5, 0.8, 0.9, 0.95, 0.99)}
    for name, beyond in cuts.items():
        rates = np.sum(p * beyond, axis=1)
        found, expected, deviation = np.sum(drawn & beyond), rates.sum(), np.sqrt(np.sum(rates * (1 - rates)))
        assert abs(found - expected) < 3.5 * deviation, f"beyond {name}: {found} tokens, {expected:.0f} expected"


# 26
def test_noise_belongs_to_the_key_and_the_row(steps):
    """A key that is not passed on gives every update the same noise; noise drawn for the batch as a whole, or by place
    or device, makes samples depend on the layout, so that no run can be repeated on other hardware.
    """
    prompts = tiny.prompt_batch()
    plain = setting.sample(steps)
    np.testing.assert_array_equal(setting.sample(steps).tokens, plain.tokens)
    assert np.any(setting.sample(steps, key=8).tokens != plain.tokens), "another key gave the same samples"

    order = np.random.default_rng(0).permutation(tiny.ROWS)
    moved = setting.sample(steps, prompts=jax.tree.map(lambda x: x[order], prompts))
    np.testing.assert_array_equal(moved.tokens, plain.tokens[order], err_msg="rows depend on their place")

    others = tiny.prompt_batch(seed=1)
    upper = np.arange(tiny.ROWS) < tiny.ROWS // 2
    mixed = prompts._replace(tokens=np.where(upper[:, None], prompts.tokens, others.tokens))
    np.testing.assert_array_equal(
        setting.sample(steps, prompts=mixed).tokens[upper], plain.tokens[upper], err_msg="rows depend on each other"
    )

    renamed = setting.sample(steps, prompts=prompts._replace(row_ids=prompts.row_ids + 100))
    assert np.any(renamed.tokens != plain.tokens), "the row's id plays no part"
    same = prompts._replace(
        tokens=np.repeat(prompts.tokens[:1], tiny.ROWS, 0), mask=np.repeat(prompts.mask[:1], tiny.ROWS, 0)
    )
    rows = setting.sample(steps, prompts=same).tokens
    assert len(np.unique(rows, axis=0)) > 1, "rows of one prompt share their noise"


# 26
def test_every_update_has_noise_of_its_own(steps):
    """A sampler that is called without a new key draws the same noise in every update: the loop folds in the step."""
    policy = setting.loop_policy(steps, LM)
    prompts, key = tiny.prompt_batch(), jax.random.key(7)
    first, again, second = (policy.rollout(policy.params, prompts, key, np.int32(step)) for step in (0, 0, 1))
    np.testing.assert_array_equal(again.tokens, first.tokens)
    assert np.any(np.asarray(second.tokens) != first.tokens)
