import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from reference import ppo as reference
from tiny import EOS, PROMPT, close_trees

from lfjax.optim import make_optimizer
from lfjax.state import RewardNorm
from lfjax.steps.ppo_experience import ppo_experience
from lfjax.steps.ppo_forward import PPOModels
from lfjax.steps.ppo_rollout import ppo_rollout
from lfjax.steps.ppo_update import ppo_update, rollout_metrics
from lfjax.types import Rollout

POLICY, VALUE = tiny.language_model(), tiny.scorer()
MODELS = PPOModels(POLICY, VALUE)
RECORDER = tiny.recorder()
KEY = jax.random.key(0)
SCORES = np.asarray([0.7, 1.9, -0.4, 0.25, -1.6, 0.5, 2.3, -0.9], np.float32)
KL_COEF, NORM = 0.2, {"mean": 0.3, "std": 1.7}


@functools.cache
def experience_step(**options):
    def call(policy, value, ref, gen, scores, kl_coef, norm):
        fixed = {"models": MODELS, "eos_ids": (EOS,), "kl_coef": kl_coef, "reward_norm": norm}
        return ppo_experience(policy, value, ref, gen, scores, **fixed, **options)

    return jax.jit(call)


def experience(gen=None, *, scores=SCORES, kl_coef=KL_COEF, norm=NORM, ref_seed=3, **options) -> Rollout:
    norm = RewardNorm(**{name: jnp.float32(x) for name, x in norm.items()})
    args = (tiny.init(POLICY), tiny.init(VALUE, 1), tiny.init(POLICY, ref_seed), gen or tiny.generation(), scores)
    return jax.tree.map(np.asarray, experience_step(**options)(*args, jnp.float32(kl_coef), norm))


@functools.cache
def update_step(**options):
    options = {"models": MODELS, "txs": (RECORDER, RECORDER), "epochs": 1, **options}
    return jax.jit(functools.partial(ppo_update, **options))


def update(rollout, *, state=None, key=KEY, **options):
    txs = options.get("txs", (RECORDER, RECORDER))
    state = tiny.ppo_state(POLICY, VALUE, txs) if state is None else state
    return update_step(**options)(state, rollout, key)


@functools.cache
def full_forward():
    """(logits [B R V], values [B R]) of the responses by whole, unchunked passes."""

    def call(policy, value, gen):
        tokens = jnp.concatenate([gen.prompts, gen.tokens], axis=1)
        attend = jnp.concatenate([gen.prompt_mask, gen.mask], axis=1)
        logits = POLICY.apply({"params": policy}, tokens, attention_mask=attend)
        values = VALUE.apply({"params": value}, tokens, attention_mask=attend, method="values")
        return logits[:, PROMPT - 1 : -1], values[:, PROMPT - 1 : -1, 0]

    return jax.jit(call)


def picked_logprobs(gen, seed, temperature):
    logits, values = full_forward()(tiny.init(POLICY, seed), tiny.init(VALUE, 1), gen)
    found = reference.log_softmax(logits, temperature)
    return np.take_along_axis(found, gen.tokens[..., None], axis=-1)[..., 0], np.float64(values)


CASES = [
    {},
    {"whiten_advantages": False, "whiten_rewards": True, "kl_kind": "k3", "gamma": 0.9, "lam": 0.8, "temperature": 0.7},
    {"min_length": 3, "require_eos": False, "penalty": 0.5, "kl_kind": "abs", "minibatches": 4},
    {"whiten_rewards": True, "kl_kind": "k2", "lam": 1.0, "minibatches": 2, "require_eos": True, "penalty": 2.0},
]


@pytest.mark.parametrize("options", CASES)
def test_experience_is_a_float64_loops(options):
    gen = tiny.generation()
    rollout = experience(**options)
    rules = {name: options[name] for name in ("min_length", "require_eos", "penalty") if name in options}
    temperature = options.get("temperature", 1.0)
    (old, values), (ref, _) = (picked_logprobs(gen, seed, temperature) for seed in (0, 3))
    scores, ended = reference.final_scores(SCORES, gen.tokens, gen.mask, eos_ids=(EOS,), **NORM, **rules)
    kind = options.get("kl_kind", "k1")
    rewards = reference.rewards(old, ref, scores, gen.mask, kl_coef=KL_COEF, kl_kind=kind)
    advantages, returns = reference.advantages(
        rewards,
        values,
        gen.mask,
        gamma=options.get("gamma", 1.0),
        lam=options.get("lam", 0.95),
        whiten_rewards=options.get("whiten_rewards", False),
        whiten_advantages=options.get("whiten_advantages", True),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5)
    close(rollout.old_logprobs, np.where(gen.mask, old, 0.0))
    close(rollout.ref_logprobs, np.where(gen.mask, ref, 0.0))
    close(rollout.values, np.where(gen.mask, values, 0.0))
    close(rollout.scores, scores)
    close(rollout.rewards, rewards)
    close(rollout.advantages, advantages)
    close(rollout.returns, returns)
    np.testing.assert_array_equal(rollout.ended, ended)
    np.testing.assert_array_equal(rollout.raw_scores, SCORES)
    for field, given in (("responses", gen.tokens), ("mask", gen.mask), ("prompts", gen.prompts)):
        np.testing.assert_array_equal(getattr(rollout, field), given)
    assert ended.any() and not ended.all()


def test_every_float_of_a_rollout_is_float32():
    rollout = experience(scores=np.asarray([1, 2, 3, 4, 5, 6, 7, 8], np.int32))
    floats = [x for x in rollout if not np.issubdtype(x.dtype, np.integer) and x.dtype != bool]
    assert len(floats) == 9 and all(x.dtype == np.float32 for x in floats)


@pytest.mark.parametrize("junk", [0, 31, 2])
def test_what_the_padding_holds_changes_nothing(junk):
    gen = tiny.generation()
    changed = gen._replace(
        tokens=np.where(gen.mask, gen.tokens, junk).astype(np.int32),
        prompts=np.where(gen.prompt_mask, gen.prompts, junk).astype(np.int32),
        logprobs=np.where(gen.mask, gen.logprobs, np.float32(-1e9)),
    )
    plain, other = experience(), experience(changed)
    for field in ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "scores", "ended"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(other, field), err_msg=field)


def test_scores_are_penalised_below_zero_where_the_rules_are_broken():
    """min(score, 0) - penalty: a rambling answer never profits from its score."""
    gen = tiny.generation()
    rollout = experience(norm={"mean": 0.0, "std": 1.0})
    ended = tiny.ended(gen)
    np.testing.assert_allclose(rollout.scores, np.where(ended, SCORES, np.minimum(SCORES, 0.0) - 1.0), atol=1e-6)


def test_an_empty_response_gives_zeros_and_no_nan():
    gen = tiny.generation()
    gen = gen._replace(mask=np.where(np.arange(tiny.ROWS)[:, None] == 2, False, gen.mask))
    rollout = experience(gen)
    assert not rollout.ended[2]
    for field in rollout:
        assert np.all(np.isfinite(field))
    assert not np.any(rollout.rewards[2]) and not np.any(rollout.advantages[2])
    nothing = experience(gen._replace(mask=np.zeros_like(gen.mask)))
    assert not np.any(nothing.advantages) and not np.any(nothing.returns)
    state, metrics = update(Rollout(*nothing))
    assert all(np.all(g == 0) for g in jax.tree.leaves(state.policy.opt_state.grads))
    assert all(np.isfinite(m.value) for m in metrics.values())


def test_several_eos_ids_all_end_a_response():
    gen = tiny.generation()
    last = gen.tokens[np.arange(tiny.ROWS), gen.mask.sum(1) - 1]
    stops = tuple(sorted({EOS, int(last[0]), int(last[3])}))
    fixed = {"models": MODELS, "eos_ids": stops, "kl_coef": 0.1}
    step = jax.jit(functools.partial(ppo_experience, **fixed))
    rollout = step(tiny.init(POLICY), tiny.init(VALUE, 1), tiny.init(POLICY), gen, SCORES)
    np.testing.assert_array_equal(rollout.ended, np.isin(last, stops))


def test_a_reference_of_its_own_architecture_is_used():
    other = tiny.language_model(mlp_width=24)
    gen = tiny.generation()
    models = MODELS._replace(reference=other)
    step = jax.jit(functools.partial(ppo_experience, models=models, eos_ids=(EOS,), kl_coef=0.1))
    rollout = step(tiny.init(POLICY), tiny.init(VALUE, 1), tiny.init(other), gen, SCORES)
    tokens = np.concatenate([gen.prompts, gen.tokens], axis=1)
    attend = np.concatenate([gen.prompt_mask, gen.mask], axis=1)
    logits = jax.jit(lambda p: other.apply({"params": p}, tokens, attention_mask=attend))(tiny.init(other))
    found = reference.log_softmax(logits[:, PROMPT - 1 : -1], 1.0)
    expected = np.take_along_axis(found, gen.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.ref_logprobs[gen.mask], expected[gen.mask], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("filtering", [{"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}])
def test_rollouts_from_a_truncated_distribution_are_refused(filtering):
    with pytest.raises(ValueError, match="whole distribution"):
        ppo_rollout(tiny.init(POLICY), tiny.prompt_batch(), KEY, model=POLICY, eos_ids=(EOS,), **filtering)


@functools.cache
def rollout_step(**options):
    fixed = {"model": POLICY, "eos_ids": (EOS,), "max_new_tokens": tiny.RESPONSE, "temperature": 0.7}
    return jax.jit(functools.partial(ppo_rollout, **{**fixed, **options}))


def test_samplers_and_recomputed_logprobs_agree():
    gen = jax.tree.map(np.asarray, rollout_step()(tiny.init(POLICY), tiny.prompt_batch(), KEY))
    rollout = experience(gen, ref_seed=0, temperature=0.7, minibatches=2)
    gap = rollout_metrics(rollout)["ppo/rollout_train_gap"].value
    logits, _ = full_forward()(tiny.init(POLICY), tiny.init(VALUE, 1), gen)
    assert 0 <= gap <= 1e-5 * max(1.0, float(np.max(np.abs(logits))))
    np.testing.assert_array_equal(rollout.sampled_logprobs, gen.logprobs)


def test_samples_depend_on_the_row_and_not_on_its_place():
    prompts = tiny.prompt_batch()
    order = np.random.default_rng(0).permutation(tiny.ROWS)
    plain = rollout_step()(tiny.init(POLICY), prompts, KEY)
    moved = rollout_step()(tiny.init(POLICY), jax.tree.map(lambda x: x[order], prompts), KEY)
    np.testing.assert_array_equal(np.asarray(plain.tokens)[order], moved.tokens)
    other = rollout_step()(tiny.init(POLICY), prompts._replace(row_ids=prompts.row_ids + 100), KEY)
    assert np.any(np.asarray(other.tokens) != plain.tokens)


@pytest.mark.parametrize("minibatches, pieces", [(1, 1), (2, 2)])
def test_the_first_minibatch_has_ratio_one(minibatches, pieces):
    rollout = experience(minibatches=minibatches * pieces)
    _, metrics = update(rollout, minibatches=minibatches, num_microbatches=pieces)
    assert metrics["ppo/first_ratio_error"].value <= 1e-6
    assert metrics["ppo/ratio"].value == pytest.approx(1.0, abs=1e-6)
    assert metrics["ppo/clip_fraction"].value == 0


def test_without_advantages_and_entropy_the_policy_has_no_gradient():
    rollout = experience()
    state, _ = update(rollout._replace(advantages=np.zeros_like(rollout.advantages)))
    assert all(np.all(g == 0) for g in jax.tree.leaves(state.policy.opt_state.grads))
    assert any(np.any(g != 0) for g in jax.tree.leaves(state.value.opt_state.grads))


def test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy():
    gen, rollout = tiny.generation(), experience()

    def entropy(params):
        tokens = jnp.concatenate([gen.prompts, gen.tokens], axis=1)
        attend = jnp.concatenate([gen.prompt_mask, gen.mask], axis=1)
        logits = POLICY.apply({"params": params}, tokens, attention_mask=attend)[:, PROMPT - 1 : -1]
        p = jax.nn.softmax(logits)
        return jnp.sum(jnp.where(gen.mask, -jnp.sum(p * jnp.log(p), -1), 0.0)) / gen.mask.sum()

    state, metrics = update(rollout._replace(advantages=np.zeros_like(rollout.advantages)), entropy_coef=0.5)
    value, grads = jax.jit(jax.value_and_grad(entropy))(tiny.init(POLICY))
    close_trees(state.policy.opt_state.grads, jax.tree.map(lambda g: -0.5 * g, grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["ppo/entropy"].value, value, rtol=1e-5)


@pytest.mark.parametrize("junk", [1e9, -1e9])
def test_junk_floats_at_padding_change_no_gradient_and_no_metric(junk):
    rollout = experience()
    fields = ("sampled_logprobs", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    changed = {name: np.where(rollout.mask, getattr(rollout, name), np.float32(junk)) for name in fields}
    (a, plain), (b, other) = update(rollout), update(rollout._replace(**changed))
    for kind in ("policy", "value"):
        close_trees(getattr(b, kind).opt_state.grads, getattr(a, kind).opt_state.grads, rtol=1e-6)
    for name in plain:
        np.testing.assert_allclose(other[name].value, plain[name].value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_microbatches_are_one_whole_minibatch():
    rollout = experience()
    (whole, a), (parts, b) = (update(rollout, num_microbatches=n) for n in (1, 4))
    for kind in ("policy", "value"):
        close_trees(getattr(parts, kind).opt_state.grads, getattr(whole, kind).opt_state.grads)
    for name in ("ppo/policy_loss", "ppo/value_loss", "ppo/entropy", "ppo/approx_kl"):
        np.testing.assert_allclose(b[name].value, a[name].value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(b[name].weight, a[name].weight)


def test_every_epoch_sees_every_row_once_in_a_new_order():
    """The weights of the minibatches' means: each row once an epoch, and not the same halves in each."""

    def shuffled_halves(key):
        lengths = tiny.generation().mask.sum(1)
        _, metrics = update(rollout, key=key, epochs=2, minibatches=2)
        assert metrics["ppo/policy_loss"].weight == 2 * lengths.sum()
        return float(metrics["ppo/first_ratio_error"].weight)

    rollout = experience()
    assert len({shuffled_halves(jax.random.key(k)) for k in range(6)}) > 1


LEARNING = {
    "txs": (make_optimizer(3e-3), make_optimizer(3e-3)),
    "epochs": 4,
    "minibatches": 2,
    "value_clip": 1e9,
}


def test_raises_the_probability_of_advantaged_tokens():
    rollout = experience()
    signs = np.where(np.arange(tiny.RESPONSE)[None] % 2 == 0, 1.0, -1.0).astype(np.float32)
    rollout = rollout._replace(advantages=np.where(rollout.mask, signs, 0.0))
    state, metrics = update(rollout, **LEARNING)
    gen = tiny.generation()
    logits, _ = full_forward()(state.policy.params, tiny.init(VALUE, 1), gen)
    after = np.take_along_axis(reference.log_softmax(logits, 1.0), gen.tokens[..., None], axis=-1)[..., 0]
    change = np.where(gen.mask, after - rollout.old_logprobs, 0.0)
    up, down = change[gen.mask & (signs > 0)], change[gen.mask & (signs < 0)]
    assert up.mean() > 0.05 and down.mean() < -0.05
    assert metrics["ppo/ratio"].value != 1.0 and state.policy.skipped == 0


def test_the_value_network_learns_its_returns():
    rollout = experience()
    rollout = rollout._replace(returns=np.where(rollout.mask, 2.0, 0.0).astype(np.float32))
    state, losses = tiny.ppo_state(POLICY, VALUE, LEARNING["txs"]), []
    for index in range(20):
        state, metrics = update(rollout, state=state, key=jax.random.key(index), **LEARNING)
        losses.append(float(metrics["ppo/value_loss"].value))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("gap, grows", [(0.5, True), (0.0, False)])
def test_the_kl_coefficient_follows_the_kl_per_sequence(gap, grows):
    rollout = experience()
    rollout = rollout._replace(ref_logprobs=rollout.old_logprobs - np.float32(gap))
    per_sequence = gap * rollout.mask.sum() / tiny.ROWS
    target, horizon = 1.0, 50.0
    state, metrics = update(rollout, kl_target=target, kl_horizon=horizon)
    error = np.clip(per_sequence / target - 1.0, -0.2, 0.2)
    np.testing.assert_allclose(metrics["ppo/kl"].value, per_sequence, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["ppo/kl_coef"].value, 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.kl_coef, 0.1 * (1 + error * tiny.ROWS / horizon), rtol=1e-5)
    assert (state.kl_coef > 0.1) == grows


def test_without_a_target_the_kl_coefficient_stays():
    state, _ = update(experience())
    assert state.kl_coef == np.float32(0.1)


def test_schedules_count_updates_and_not_minibatches():
    """All epochs x minibatches of an update see the same step, and the next update sees the next."""
    state = tiny.ppo_state(POLICY, VALUE, (RECORDER, RECORDER), step=5)
    for _ in range(2):
        state, _ = update(experience(), state=state, epochs=2, minibatches=2)
    assert state.step == 7
    for trained in (state.policy, state.value):
        assert trained.opt_state.steps.tolist() == [5] * 4 + [6] * 4
        assert trained.step == 7


def test_a_nan_in_one_row_skips_its_minibatch_and_is_counted():
    rollout = experience()
    advantages = rollout.advantages.copy()
    advantages[0, 0] = np.nan
    state, _ = update(rollout._replace(advantages=advantages))
    assert state.policy.skipped == 1 and state.value.skipped == 0
    assert not np.any(state.policy.opt_state.calls) and state.value.opt_state.calls == 1
    jax.tree.map(np.testing.assert_array_equal, state.policy.params, tiny.init(POLICY))


def test_metrics_of_the_samples_are_their_formulas():
    rollout = experience()
    mask = rollout.mask
    metrics = {name: float(mean.value) for name, mean in rollout_metrics(rollout).items()}
    returns, values = (np.float64(x[mask]) for x in (rollout.returns, rollout.values))
    expected = {
        "ppo/score": rollout.scores.mean(),
        "ppo/raw_score": SCORES.mean(),
        "ppo/return": rollout.rewards.sum() / tiny.ROWS,
        "ppo/kl": (rollout.old_logprobs - rollout.ref_logprobs)[mask].sum() / tiny.ROWS,
        "ppo/length": mask.sum() / tiny.ROWS,
        "ppo/eos_share": tiny.ended(tiny.generation()).mean(),
        "ppo/value": values.mean(),
        "ppo/explained_variance": 1 - ((returns - values) ** 2).mean() / returns.var(),
        "ppo/rollout_train_gap": np.abs(rollout.sampled_logprobs - rollout.old_logprobs)[mask].max(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_an_update_is_the_composition_of_its_minibatch_steps():
    """Two epochs of two minibatches with an optimiser = the same steps taken one by one from outside."""
    rollout, key = experience(), jax.random.key(4)
    txs = (optax.with_extra_args_support(optax.sgd(0.05)),) * 2
    whole, _ = update(rollout, txs=txs, key=key, epochs=2, minibatches=2)
    order = [jax.random.permutation(k, tiny.ROWS).reshape(2, -1) for k in jax.random.split(key, 2)]
    policy, value = tiny.init(POLICY), tiny.init(VALUE, 1)
    for rows in np.concatenate(order):
        part = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], rollout)
        state = tiny.ppo_state(POLICY, VALUE, (RECORDER, RECORDER))
        state = state.replace(policy=state.policy.replace(params=policy), value=state.value.replace(params=value))
        state, _ = update(part, state=state)
        policy, value = (
            jax.tree.map(lambda p, g: p - 0.05 * g, old, new.opt_state.grads)
            for old, new in ((policy, state.policy), (value, state.value))
        )
    close_trees(whole.policy.params, policy, rtol=1e-6)
    close_trees(whole.value.params, value, rtol=1e-6)
