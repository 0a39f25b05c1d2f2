"""The checks behind the conformance tests: each takes a table of steps and fails with an AssertionError.

They look at steps from outside: arrays in, arrays out, and gradients through an optimiser that only records them. What
is expected comes from the model's logits and a float64 loop.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from reference import ppo as reference
from tiny import EOS, PROMPT, close_trees

from lfjax.steps.ppo_forward import PPOModels
from lfjax.types import Generation, RewardBatch, Rollout, SftBatch

TEMPERATURE = 0.7
KL_COEF = 0.3
MODELS = PPOModels(policy=tiny.language_model(), value=tiny.scorer())
RECORDER = tiny.recorder()
LM, SCORER = MODELS.policy, MODELS.value
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
EXPERIENCE = {
    "models": MODELS,
    "eos_ids": (EOS,),
    "temperature": TEMPERATURE,
    "minibatches": 2,
    "gamma": 1.0,
    "lam": 0.95,
    "kl_kind": "k1",
    "whiten_rewards": False,
    "whiten_advantages": False,
    "min_length": 0,
    "require_eos": False,
    "penalty": 1.0,
}
UPDATE = {
    "models": MODELS,
    "txs": (RECORDER, RECORDER),
    "temperature": TEMPERATURE,
    "epochs": 1,
    "minibatches": 1,
    "clip_low": 0.2,
    "clip_high": 0.3,
    "value_clip": 0.2,
    "value_coef": 0.5,
    "entropy_coef": 0.0,
}


def run(step, *args, **options):
    """step(*args, **options), compiled once for each step and options."""
    key = (step, *options.items())
    if key not in _compiled:
        _compiled[key] = tiny.jit(functools.partial(step, **options))
    return _compiled[key](*args)


_compiled: dict = {}


@functools.cache
def params(seed: int = 0):
    """Of the policy; seed 3 is another network, used as reference."""
    return tiny.init(LM, seed)


def value_params():
    return tiny.init(SCORER, 1)


def _logits(params, rows):
    prompts, prompt_mask, responses, mask = rows
    tokens = jnp.concatenate([prompts, responses], axis=1)
    attend = jnp.concatenate([prompt_mask, mask], axis=1)
    return LM.apply({"params": params}, tokens, attention_mask=attend)[:, PROMPT - 1 : -1]  # predict the responses


def _values(params, rows):
    prompts, prompt_mask, responses, mask = rows
    tokens = jnp.concatenate([prompts, responses], axis=1)
    attend = jnp.concatenate([prompt_mask, mask], axis=1)
    return SCORER.apply({"params": params}, tokens, attention_mask=attend, method="values")[:, PROMPT - 1 : -1, 0]


_logits_of, _values_of = tiny.jit(_logits), tiny.jit(_values)


def rows_of(x: Generation | Rollout):
    return (x.prompts, x.prompt_mask, x.responses if isinstance(x, Rollout) else x.tokens, x.mask)


def logprobs(params, x, temperature=TEMPERATURE) -> np.ndarray:
    """[B R] float64: of the response tokens, by whole logits."""
    rows = rows_of(x)
    all_tokens = reference.log_softmax(_logits_of(params, rows), temperature)
    return np.take_along_axis(all_tokens, np.asarray(rows[2])[..., None], axis=-1)[..., 0]


@tiny.jit
def _pull_policy(params, rows, weights):
    def total(params):
        picked = jnp.take_along_axis(jax.nn.log_softmax(_logits(params, rows) / TEMPERATURE), rows[2][..., None], -1)
        return jnp.sum(weights * picked[..., 0])

    return jax.grad(total)(params)


@tiny.jit
def _pull_value(params, rows, weights):
    return jax.grad(lambda p: jnp.sum(weights * _values(p, rows)))(params)


def policy_gradient(rollout: Rollout, logp, *, low=0.2, high=0.3):
    """Gradient of the clipped loss: each token's own slope in float64, then through the network."""
    mask, slopes = np.asarray(rollout.mask), np.zeros(rollout.mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio, advantage = np.exp(logp[b, t] - float(rollout.old_logprobs[b, t])), float(rollout.advantages[b, t])
        clipped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        slopes[b, t] = 0.0 if clipped else -advantage * ratio
    return _pull_policy(params(), rows_of(rollout), jnp.float32(slopes / mask.sum()))


def value_gradient(rollout: Rollout, *, clip=0.2, coef=0.5):
    """Gradient of coef * 0.5 * max((v - R)^2, (clipped v - R)^2), averaged over the response tokens."""
    mask, slopes = np.asarray(rollout.mask), np.zeros(rollout.mask.shape)
    now = np.asarray(_values_of(value_params(), rows_of(rollout)), np.float64)
    for b, t in zip(*np.nonzero(mask), strict=True):
        v, old, target = now[b, t], float(rollout.values[b, t]), float(rollout.returns[b, t])
        clipped = min(max(v, old - clip), old + clip)
        slopes[b, t] = coef * (v - target) if (v - target) ** 2 >= (clipped - target) ** 2 else 0.0
    return _pull_value(value_params(), rows_of(rollout), jnp.float32(slopes / mask.sum()))


SCORES = np.asarray([0.7, 1.9, -0.4, 0.25, -1.6, 0.5, 2.3, -0.9], np.float32)


def experience(steps, *, ref_seed=3, kl_coef=KL_COEF, **options) -> Rollout:
    """What the step makes of `tiny.generation()` and SCORES."""
    args = (params(), value_params(), params(ref_seed), tiny.generation(), SCORES, jnp.float32(kl_coef))
    return jax.tree.map(np.asarray, run(_with_coefficient(steps["ppo_experience"]), *args, **(EXPERIENCE | options)))


@functools.cache
def _with_coefficient(step):
    """The step with its KL coefficient as an argument, so that no other value compiles it again."""

    def call(policy, value, ref, gen, scores, kl_coef, **options):
        return step(policy, value, ref, gen, scores, kl_coef=kl_coef, **options)

    return call


def saved_rollout(*, log_ratio=None, seed=0) -> Rollout:
    """A rollout made by hand: the policy's own log-probabilities as old ones, moved by `log_ratio`."""
    gen, rng = tiny.generation(), np.random.default_rng(seed)
    mask = gen.mask
    old = logprobs(params(), gen) - (0.0 if log_ratio is None else log_ratio)
    values = np.asarray(_values_of(value_params(), rows_of(gen)), np.float64)
    arrays = {
        "old_logprobs": old,
        "ref_logprobs": old + 0.1,
        "values": values + rng.uniform(-0.5, 0.5, mask.shape),
        "rewards": rng.normal(size=mask.shape),
        "advantages": rng.normal(size=mask.shape),
        "returns": values + rng.normal(size=mask.shape),
        "sampled_logprobs": old,
    }
    return Rollout(
        prompts=gen.prompts, prompt_mask=gen.prompt_mask, responses=gen.tokens, mask=mask, ended=tiny.ended(gen),
        scores=SCORES, raw_scores=SCORES,
        **{name: np.where(mask, x, 0.0).astype(np.float32) for name, x in arrays.items()},
    )  # fmt: skip


def update(steps, rollout: Rollout, **options):
    """(policy gradient, value gradient) of the step's first minibatch: the whole rollout."""
    state = tiny.ppo_state(LM, SCORER, (RECORDER, RECORDER))
    state, _ = run(steps["ppo_update"], state, rollout, jax.random.key(0), **(UPDATE | options))
    assert state.policy.skipped == 0 and state.value.skipped == 0, "a loss or gradient was not finite"
    return state.policy.opt_state.grads, state.value.opt_state.grads


# PEERS 2
def masks_never_come_from_the_pad_id(steps):
    """Real tokens that have the pad's id count, and padding that has another id does not, in every part of PPO."""
    gen = tiny.generation()
    assert np.any(gen.tokens[gen.mask] == tiny.PAD) and np.any(gen.tokens[~gen.mask] != tiny.PAD)
    rollout = experience(steps)
    np.testing.assert_array_equal(rollout.mask, gen.mask)
    np.testing.assert_allclose(rollout.old_logprobs[gen.mask], logprobs(params(), gen)[gen.mask], **CLOSE)
    assert not np.any(rollout.rewards[~gen.mask])
    saved = saved_rollout()
    policy, value = update(steps, saved)
    close_trees(policy, policy_gradient(saved, logprobs(params(), saved)), rtol=1e-4)
    close_trees(value, value_gradient(saved), rtol=1e-4)


def eos_counts_even_where_it_is_the_pad_id(steps):
    """A sampler that pads with EOS still counts the first one: it is where the reward goes."""
    out = sample(steps, eos_ids=tuple(range(0, tiny.VOCAB, 5)), pad_id=5)
    ends = np.isin(out.tokens, np.arange(0, tiny.VOCAB, 5))
    first = np.where(ends.any(1), ends.argmax(1), out.tokens.shape[1] - 1)
    assert ends.any()
    np.testing.assert_array_equal(out.mask.sum(1), first + 1)
    np.testing.assert_array_equal(out.tokens[~out.mask], 5)


def sample(steps, **options) -> Generation:
    options = {"eos_ids": (EOS,), "pad_id": tiny.PAD, **options}
    fixed = {"model": LM, "max_new_tokens": tiny.RESPONSE, "temperature": TEMPERATURE}
    out = run(steps["ppo_rollout"], params(), tiny.prompt_batch(), jax.random.key(7), **fixed, **options)
    return jax.tree.map(np.asarray, out)


# PEERS 6
def one_temperature_divides_logits_everywhere(steps):
    """Rollout, old, reference and new log-probabilities all are log softmax(logits / temperature)."""
    out = sample(steps)
    np.testing.assert_allclose(out.logprobs[out.mask], logprobs(params(), out)[out.mask], **CLOSE)
    gen, rollout = tiny.generation(), experience(steps)
    for name, found, seed in (("old", rollout.old_logprobs, 0), ("reference", rollout.ref_logprobs, 3)):
        expected = logprobs(params(seed), gen)
        np.testing.assert_allclose(found[gen.mask], expected[gen.mask], **CLOSE, err_msg=name)
    saved = saved_rollout(log_ratio=0.1)
    close_trees(update(steps, saved)[0], policy_gradient(saved, logprobs(params(), saved)), rtol=1e-4)


# PEERS 7
def a_policy_equal_to_its_reference_has_no_kl(steps):
    """With the same parameters on both sides the per-token KL is exactly zero, at any temperature."""
    rollout = experience(steps, ref_seed=0)
    np.testing.assert_allclose(rollout.ref_logprobs, rollout.old_logprobs, atol=1e-6)
    assert np.count_nonzero(np.abs(rollout.rewards) > 1e-5) == len(SCORES), "only the score is left as reward"


# PEERS 9
def old_logprobs_are_the_updates_own(steps):
    """Nothing is clipped at the first minibatch, not even at 1 +- 1e-6; the sampler's play no part."""
    rollout = experience(steps, minibatches=1)
    assert np.all(rollout.old_logprobs <= 0), "junk of the sampler has become the old log-probabilities"
    rollout = Rollout(*rollout)._replace(advantages=saved_rollout().advantages)
    tight, _ = update(steps, rollout, clip_low=1e-6, clip_high=1e-6)
    loose, _ = update(steps, rollout)
    close_trees(tight, loose, rtol=1e-6)
    close_trees(loose, policy_gradient(rollout, np.float64(rollout.old_logprobs)), rtol=1e-4)


# PEERS 13
def reward_is_read_at_the_last_real_token(steps):
    """Longer padding on the right changes neither the score nor the gradient of the reward model."""
    gen = tiny.generation()
    scores = run(steps["ppo_score"], value_params(), gen, model=SCORER)
    rows = rows_of(gen)
    after = np.asarray(_last_scores(value_params(), rows))
    np.testing.assert_allclose(scores, after, **CLOSE)

    batch = tiny.reward_batch()._replace(ranked=np.zeros((tiny.ROWS, 1), bool))
    state = tiny.reward_state(SCORER, RECORDER)
    options = {"model": SCORER, "tx": RECORDER, "regression": 1.0, "bradley_terry": 0.0}
    found, _ = run(steps["reward"], state, batch, jax.random.key(0), **options)
    expected = tiny.jit(jax.grad(_regression))(state.params, batch)
    close_trees(found.opt_state.grads, expected, rtol=1e-4)


@tiny.jit
def _last_scores(params, rows):
    """Scores read row by row at the last real position of prompt + response."""
    prompts, prompt_mask, responses, mask = rows
    tokens = jnp.concatenate([prompts, responses], axis=1)
    attend = jnp.concatenate([prompt_mask, mask], axis=1)
    return _at(
        SCORER.apply({"params": params}, tokens, attention_mask=attend, method="values"), PROMPT + mask.sum(1) - 1
    )


def _regression(params, batch: RewardBatch):
    mask = batch.mask[:, 0]
    values = SCORER.apply({"params": params}, batch.tokens[:, 0], attention_mask=mask, method="values")
    error = jnp.where(batch.rated[:, 0], _at(values, mask.sum(1) - 1) - batch.ratings[:, 0], 0.0)
    return jnp.sum(error**2) / jnp.sum(batch.rated)


def _at(values, places):
    """values [B T 1] at one position a row."""
    return jnp.stack([values[row, places[row], 0] for row in range(values.shape[0])])


# PEERS 16
def kl_is_a_penalty_on_every_token(steps):
    """rewards = -kl_coef (log pi - log pi_ref) on every token but the last, and twice the coefficient is twice it."""
    gen = tiny.generation()
    rollout = experience(steps)
    gap = logprobs(params(), gen) - logprobs(params(3), gen)
    inner = gen.mask & (np.arange(tiny.RESPONSE)[None] < (gen.mask.sum(1) - 1)[:, None])
    np.testing.assert_allclose(rollout.rewards[inner], -KL_COEF * gap[inner], **CLOSE)
    doubled = experience(steps, kl_coef=2 * KL_COEF)
    np.testing.assert_allclose(doubled.rewards[inner], 2 * rollout.rewards[inner], **CLOSE)


# PEERS 17
def score_sits_at_the_last_response_token(steps):
    """At EOS where there is one, at the last token where the length limit stopped it, whole and in float."""
    gen = tiny.generation()
    rollout = experience(steps, kl_coef=0.0)
    expected = np.zeros(gen.mask.shape)
    expected[np.arange(tiny.ROWS), gen.mask.sum(1) - 1] = SCORES
    np.testing.assert_allclose(rollout.rewards, expected, atol=1e-6)
    assert rollout.rewards.dtype == np.float32


# PEERS 20
def advantages_are_whitened_over_the_batchs_response_tokens(steps):
    """Mean 0 and biased variance 1 over the response tokens of the whole batch, 0 on the padding."""
    gen = tiny.generation()
    plain, white = experience(steps), experience(steps, whiten_advantages=True)
    kept = np.float64(white.advantages[gen.mask])
    np.testing.assert_allclose([kept.mean(), kept.var()], [0.0, 1.0], atol=1e-5)
    assert not np.any(white.advantages[~gen.mask])
    expected = reference.whiten(np.float64(plain.advantages), gen.mask, shift_mean=True)
    np.testing.assert_allclose(white.advantages, expected, **CLOSE)
    np.testing.assert_allclose(white.returns, plain.returns, atol=1e-6)


# PEERS 21
def gae_ends_at_the_last_response_token(steps):
    """gamma 1, lambda 0.95; nothing follows the last token, with EOS or without; returns use unwhitened values."""
    gen = tiny.generation()
    assert np.any(gen.mask[:, -1]) and np.any(~gen.mask[:, -1])
    rollout = experience(steps)
    values = np.asarray(_values_of(value_params(), rows_of(gen)), np.float64)
    gap = logprobs(params(), gen), logprobs(params(3), gen)
    rewards = reference.rewards(*gap, SCORES, gen.mask, kl_coef=KL_COEF)
    expected = reference.advantages(
        rewards, values, gen.mask, gamma=1.0, lam=0.95, whiten_rewards=False, whiten_advantages=False
    )
    np.testing.assert_allclose(rollout.values[gen.mask], values[gen.mask], **CLOSE)
    np.testing.assert_allclose(rollout.advantages, expected[0], **CLOSE)
    np.testing.assert_allclose(rollout.returns, expected[1], **CLOSE)


# PEERS 22
def one_mask_for_policy_and_value(steps):
    """Both losses count the response's tokens up to the EOS and no other, whatever finite values the padding holds."""
    plain = saved_rollout()
    mask = plain.mask
    expected = policy_gradient(plain, logprobs(params(), plain)), value_gradient(plain)
    for junk in (0.0, 1e9, -1e9):
        fields = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "sampled_logprobs")
        changed = {name: np.where(mask, getattr(plain, name), np.float32(junk)) for name in fields}
        found = update(steps, plain._replace(**changed))
        for got, want in zip(found, expected, strict=True):
            close_trees(got, want, rtol=1e-4)


# PEERS 23
def losses_are_means_over_all_counted_tokens(steps):
    """One division by the token count of the whole minibatch: microbatches of unequal length are one big batch."""
    rollout = saved_rollout()
    lengths = rollout.mask.sum(1)
    assert lengths[0::2].sum() != lengths[1::2].sum()
    expected = policy_gradient(rollout, logprobs(params(), rollout)), value_gradient(rollout)
    for pieces in (2, 1):
        for got, want in zip(update(steps, rollout, num_microbatches=pieces), expected, strict=True):
            close_trees(got, want, rtol=1e-4)


def sft_loss_is_the_mean_over_all_counted_tokens(steps):
    """The same of supervised training."""
    batch, state = tiny.sft_batch(), tiny.lm_state(LM, RECORDER)
    assert batch.loss_mask[0::2].sum() != batch.loss_mask[1::2].sum()
    expected = tiny.jit(jax.grad(_cross_entropy))(state.params, batch)
    for pieces in (2, 1):
        options = {"model": LM, "tx": RECORDER, "num_microbatches": pieces}
        found, _ = run(steps["sft"], state, batch, jax.random.key(0), **options)
        close_trees(found.opt_state.grads, expected, rtol=1e-4)


def _cross_entropy(params, batch: SftBatch):
    logits = LM.apply({"params": params}, batch.inputs, attention_mask=batch.segment_ids > 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(batch.loss_mask, picked, 0.0)) / np.sum(batch.loss_mask)


# PEERS 24
def ratios_and_values_are_clipped(steps):
    """max of clipped and unclipped loss: tokens that have gone too far in their own direction pull no more."""
    mask = tiny.generation().mask
    log_ratio = np.where(np.arange(mask.size).reshape(mask.shape) % 3 == 0, 0.1, 1.0)
    log_ratio = np.where(np.arange(mask.size).reshape(mask.shape) % 2 == 0, log_ratio, -log_ratio)
    rollout = saved_rollout(log_ratio=log_ratio)
    policy, value = update(steps, rollout)
    close_trees(policy, policy_gradient(rollout, logprobs(params(), rollout)), rtol=1e-4)
    close_trees(value, value_gradient(rollout), rtol=1e-4)


def a_log_ratio_of_a_thousand_stays_finite(steps):
    """exp of the log-ratio is bounded: a token that the old policy thought impossible gives no infinity."""
    for sign in (1.0, -1.0):
        rollout = saved_rollout(log_ratio=sign * 1000.0)
        for leaf in jax.tree.leaves(update(steps, rollout)):
            assert np.all(np.isfinite(leaf))
