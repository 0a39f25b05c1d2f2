"""One PPO update: ratios, clips, denominators, shuffling, what is logged. Numbers are README.md's."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import setting
import tiny
from reference import ppo as reference
from setting import CLOSE, DROPPING, experience, full_update, saved_rollout, update
from tiny import close_trees


# 9
def test_old_logprobs_are_the_updates_own(steps):
    """The sampler's cached decoding is another computation than the update's forward pass; their difference grows with
    training until ratios mean nothing. Recomputed by the update's own function, the ratio starts at 1 within 1e-6.
    """
    rollout = experience(steps, minibatches=1)
    assert np.all(rollout.old_logprobs <= 0), "junk of the sampler has become the old log-probabilities"
    rollout = rollout._replace(advantages=saved_rollout().advantages)
    tight, _ = update(steps, rollout, clip_low=1e-6, clip_high=1e-6)
    loose, _ = update(steps, rollout)
    close_trees(tight, loose, rtol=1e-6)
    close_trees(loose, setting.policy_gradient(rollout, np.float64(rollout.old_logprobs)), rtol=1e-4)


# 10
def test_dropout_is_off_in_every_part_of_ppo(steps):
    """With it the ratio is noise before the policy has moved, the KL of an untouched policy is not 0, and one text gets
    a different score each time.
    """
    assert setting.loop_policy(steps, DROPPING.policy).model.config.dropout == 0.0
    gen, saved = tiny.generation(), saved_rollout()
    rollout = experience(steps, models=DROPPING)
    for found, seed in ((rollout.old_logprobs, 0), (rollout.ref_logprobs, 3)):
        np.testing.assert_allclose(found[gen.mask], setting.logprobs(setting.params(seed), gen)[gen.mask], **CLOSE)
    values = np.asarray(setting.values_of(setting.value_params(), setting.rows_of(gen)))
    np.testing.assert_allclose(rollout.values[gen.mask], values[gen.mask], **CLOSE)

    out = setting.sample(steps, models=DROPPING)
    np.testing.assert_allclose(out.logprobs[out.mask], setting.logprobs(setting.params(), out)[out.mask], **CLOSE)
    expected = setting.last_scores(setting.value_params(), setting.rows_of(gen))
    np.testing.assert_allclose(setting.score(steps, gen, models=DROPPING), expected, **CLOSE)

    policy, value = update(steps, saved, models=DROPPING)
    close_trees(policy, setting.policy_gradient(saved, setting.logprobs(setting.params(), saved)), rtol=1e-4)
    close_trees(value, setting.value_gradient(saved), rtol=1e-4)


# 18
def test_the_kl_coefficient_adapts_to_the_kl_of_a_sequence(steps):
    """coef x (1 + clip(kl / target - 1, +-0.2) n / horizon), n episodes, KL summed over a response: a mean over tokens
    lets the policy go ten times as far, and without the clip one strange batch decides. Each row is one episode, in
    however many minibatches and epochs it is used.
    """
    plain = saved_rollout()
    per_sequence = plain.mask.sum() / tiny.ROWS
    for kl in (50.0, 2.2, 1.9, 0.0):
        old = np.where(plain.mask, plain.old_logprobs, 1e9).astype(np.float32)
        moved = plain._replace(old_logprobs=old, ref_logprobs=old - np.float32(kl / per_sequence))
        state, metrics = full_update(steps, moved, **_ADAPTIVE)
        error = np.clip(kl / 2.0 - 1.0, -0.2, 0.2)
        np.testing.assert_allclose(state.kl_coef, 0.1 * (1 + error * tiny.ROWS / 50.0), rtol=1e-5)
        np.testing.assert_allclose(metrics["ppo/kl_coef"], 0.1, rtol=1e-6, err_msg="the one in use is logged")


_ADAPTIVE = {"epochs": 2, "minibatches": 4, "kl_target": 2.0, "kl_horizon": 50.0}


# 22
def test_one_mask_for_policy_and_value(steps):
    """A value mask one token longer trains the value of a state that no action is taken in; and values at padding are
    arbitrary, so they must not reach exp, a square or a mean: inf * 0 is NaN.
    """
    plain = saved_rollout()
    logp = setting.logprobs(setting.params(), plain)
    expected = setting.policy_gradient(plain, logp), setting.value_gradient(plain)
    for junk in (0.0, 1e9, -1e9):
        fields = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "sampled_logprobs")
        changed = {name: np.where(plain.mask, getattr(plain, name), np.float32(junk)) for name in fields}
        found = update(steps, plain._replace(**changed))
        for got, want in zip(found, expected, strict=True):
            close_trees(got, want, rtol=1e-4)


# 23
def test_losses_are_means_over_all_counted_tokens(steps):
    """Averaging the means of microbatches weighs the tokens of short answers more: another loss for each device count
    and accumulation setting.
    """
    rollout = saved_rollout()
    lengths = rollout.mask.sum(1)
    assert lengths[0::2].sum() != lengths[1::2].sum()
    logp = setting.logprobs(setting.params(), rollout)
    expected = setting.policy_gradient(rollout, logp), setting.value_gradient(rollout)
    for pieces in (2, 1):
        for got, want in zip(update(steps, rollout, num_microbatches=pieces), expected, strict=True):
            close_trees(got, want, rtol=1e-4)


# 24
def test_ratios_and_values_are_clipped(steps):
    """The pessimistic bound: a min or max the wrong way round clips what should move and moves what should stop."""
    rollout = setting.far_rollout()
    policy, value = update(steps, rollout)
    close_trees(policy, setting.policy_gradient(rollout, setting.logprobs(setting.params(), rollout)), rtol=1e-4)
    close_trees(value, setting.value_gradient(rollout), rtol=1e-4)


# 24
def test_a_log_ratio_of_a_thousand_stays_finite(steps):
    """One token whose probability collapsed must not end a run in NaN: exp of the log-ratio is bounded."""
    for sign in (1.0, -1.0):
        for leaf in jax.tree.leaves(update(steps, saved_rollout(log_ratio=sign * 1000.0))):
            assert np.all(np.isfinite(leaf))


# 35
def test_the_entropy_bonus_keeps_the_policy_open(steps):
    """The bonus is subtracted from the loss, so that a step raises the entropy: with the other sign it closes the
    policy down on one answer, the faster the larger it is set. It counts the response tokens alone.
    """
    rollout = saved_rollout()
    rollout = rollout._replace(advantages=np.zeros_like(rollout.advantages))
    policy, _ = update(steps, rollout, entropy_coef=0.1)
    close_trees(policy, jax.tree.map(lambda g: -0.1 * g, setting.entropy_gradient(rollout)), rtol=1e-4)


# 25
def test_every_step_moves_the_weights_that_the_last_one_left(steps):
    """Gradients of later epochs that are taken at the weights from before the update are the first epoch's again,
    without any clip; and each network moves by its own optimiser, with a learning rate of its own.
    """
    rollout, rates = saved_rollout(), _RATES
    policy, value = setting.params(), setting.value_params()
    for _ in range(2):
        grads = (
            setting.policy_gradient(rollout, setting.logprobs(policy, rollout), at=policy),
            setting.value_gradient(rollout, at=value),
        )
        policy, value = (
            jax.tree.map(lambda p, g, rate=rate: p - rate * g, *pair)
            for pair, rate in zip(((policy, grads[0]), (value, grads[1])), rates, strict=True)
        )
    state, _ = full_update(steps, rollout, txs=_DESCENTS, epochs=2)
    for start, end, expected in (
        (setting.params(), state.policy.params, policy),
        (setting.value_params(), state.value.params, value),
    ):
        moved, should = (jax.tree.map(lambda a, b: a - b, to, start) for to in (end, expected))
        close_trees(moved, should, rtol=1e-4)


_RATES = (1 / 64, 1 / 512)  # so small that no probability reaches a clip, of whatever kind
_DESCENTS = tuple(optax.with_extra_args_support(optax.sgd(rate)) for rate in _RATES)


class Diary(NamedTuple):
    """State of `diary`: of every call, the gradient's norm and the step it saw."""

    norms: jax.Array  # [CALLS] float32
    steps: jax.Array  # [CALLS] int32
    calls: jax.Array  # [] int32


EPOCHS, CALLS = 4, 4 * tiny.ROWS


@functools.cache
def diary() -> optax.GradientTransformationExtraArgs:
    """An optimiser that changes nothing: with one row a minibatch, a gradient's norm tells which row it was."""

    def create(params):
        return Diary(jnp.zeros(CALLS), jnp.full(CALLS, -1, jnp.int32), jnp.int32(0))

    def note(grads, state, params=None, *, step, **_):
        norms = state.norms.at[state.calls].set(optax.tree.norm(grads))
        entry = Diary(norms, state.steps.at[state.calls].set(step), state.calls + 1)
        return jax.tree.map(jnp.zeros_like, grads), entry

    return optax.GradientTransformationExtraArgs(create, note)


def _row_by_row(steps, **options):
    """The final state of an update with one row a minibatch."""
    options = {"txs": (diary(), diary()), "epochs": EPOCHS, "minibatches": tiny.ROWS, **options}
    return full_update(steps, saved_rollout(), **options)[0]


# 25
def test_every_epoch_takes_every_row_in_an_order_of_its_own(steps):
    """Rows drawn with replacement leave some out; an order that is repeated in each epoch, or in each update because
    the key that makes it is not the one passed in, is the same few minibatches again and again.
    """
    defaults = steps["ppo_section"]().update_step
    assert (defaults.epochs, defaults.minibatches) == (4, 1)

    def orders(key):
        state = _row_by_row(steps, key=key)
        found = []
        for trained in (state.policy, state.value):
            assert trained.opt_state.calls == CALLS
            norms = trained.opt_state.norms.reshape(EPOCHS, tiny.ROWS)
            ranked = np.sort(norms, axis=1)
            assert np.all(np.diff(ranked[0]) > 1e-4 * ranked[0, -1]), "two rows look alike: change the rollout"
            np.testing.assert_allclose(ranked, ranked[:1].repeat(EPOCHS, 0), rtol=1e-4, err_msg="not each row once")
            found.append(np.argsort(np.argsort(norms, axis=1), axis=1))
        return found

    (policy, value), (again, _), (other, _) = orders(0), orders(0), orders(1)
    assert len(np.unique(policy, axis=0)) == EPOCHS, "epochs share an order"
    np.testing.assert_array_equal(again, policy)
    assert not np.array_equal(other, policy), "the key decides nothing"
    rows = {name: np.argsort(order[0]) for name, order in (("policy", policy), ("value", value))}
    first = {name: rows[name][0] for name in rows}  # place of each network's row of smallest gradient
    for epoch in range(1, EPOCHS):  # policy and value see the same rows together
        places = {name: np.argsort(order[epoch]) for name, order in (("policy", policy), ("value", value))}
        same = rows["policy"].tolist().index(first["value"])
        assert places["policy"].tolist().index(places["value"][0]) == same, "policy and value see different rows"


# 28
def test_learning_rates_count_updates_and_end_at_zero(steps):
    """A schedule that is stepped by each minibatch is over after 1 / (epochs x minibatches) of the run."""
    state = _row_by_row(steps, at=5)
    for trained in (state.policy, state.value):
        assert set(trained.opt_state.steps.tolist()) == {5}, "minibatches of one update see several steps"
        assert trained.step == 6
    assert state.step == 6
    rate = steps["schedule"]("linear", learning_rate=0.5, total_steps=10)
    np.testing.assert_allclose([rate(step) for step in range(11)], 0.5 * (1 - np.arange(11) / 10), atol=1e-7)
    defaults = steps["shared_sections"]().optim
    ends = steps["schedule"](defaults.schedule, learning_rate=0.5, total_steps=10, end_factor=defaults.end_factor)
    assert defaults.schedule in ("linear", "cosine") and abs(float(ends(10))) < 1e-7


# 30
LOGGED = {
    "ppo/kl": "objective/kl",
    "ppo/score": "scores",
    "ppo/raw_score": "scores, before normalisation and rules",
    "ppo/return": "score_total",
    "ppo/kl_coef": "kl_coef",
    "ppo/entropy": "entropy",
    "ppo/approx_kl": "approxkl",
    "ppo/clip_fraction": "clipfrac",
    "ppo/policy_loss": "policy loss",
    "ppo/value_loss": "value loss",
    "ppo/value_clip_fraction": "vf clipfrac",
    "ppo/explained_variance": "explained variance",
    "ppo/ratio": "ratio mean",
    "ppo/ratio_variance": "ratio variance",
    "ppo/eos_share": "EOS fraction",
    "ppo/length": "response length",
}


# 30
def test_what_shows_a_run_going_wrong_is_logged(steps):
    """Each of these has told someone of a bug that the reward curve hid. Samples are kept as well: numbers do not show
    that every response has become the same.
    """
    _, metrics = full_update(steps, setting.far_rollout())
    assert not LOGGED.keys() - metrics.keys(), "not logged: " + ", ".join(LOGGED.keys() - metrics.keys())
    assert all(np.isfinite(value) for value in metrics.values())
    assert steps["ppo_section"]().samples_every > 0


# 30
def test_logged_figures_are_their_formulas(steps):
    """Over the response tokens alone, of all epochs and minibatches, KL a sequence; some of the ratios are clipped."""
    rollout = setting.far_rollout()
    _, metrics = full_update(steps, rollout, **_ADAPTIVE)
    mask = rollout.mask
    change = (setting.logprobs(setting.params(), rollout) - rollout.old_logprobs)[mask]
    ratio, advantages = np.exp(change), np.float64(rollout.advantages[mask])
    clipped = np.clip(ratio, 1 - setting.UPDATE["clip_low"], 1 + setting.UPDATE["clip_high"])
    logp = reference.log_softmax(setting.logits_of(setting.params(), setting.rows_of(rollout)), setting.TEMPERATURE)
    returns, values = (np.float64(x[mask]) for x in (rollout.returns, rollout.values))
    expected = {
        "ppo/kl": (rollout.old_logprobs - rollout.ref_logprobs)[mask].sum() / tiny.ROWS,
        "ppo/score": setting.SCORES.mean(),
        "ppo/raw_score": setting.SCORES.mean(),
        "ppo/return": rollout.rewards.sum() / tiny.ROWS,
        "ppo/kl_coef": 0.1,
        "ppo/entropy": -(np.exp(logp) * logp).sum(-1)[mask].mean(),
        "ppo/approx_kl": 0.5 * (change**2).mean(),
        "ppo/clip_fraction": (clipped != ratio).mean(),
        "ppo/policy_loss": -np.minimum(ratio * advantages, clipped * advantages).mean(),
        "ppo/ratio": ratio.mean(),
        "ppo/explained_variance": 1 - ((returns - values) ** 2).mean() / returns.var(),
        "ppo/eos_share": tiny.ended(tiny.generation()).mean(),
        "ppo/length": mask.sum() / tiny.ROWS,
    }
    assert 0.2 < expected["ppo/clip_fraction"] < 0.8
    for name, value in expected.items():
        np.testing.assert_allclose(metrics.get(name, np.nan), value, rtol=1e-4, atol=1e-6, err_msg=name)
