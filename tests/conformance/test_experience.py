"""From samples and scores to advantages: temperature, KL, the score's place, rules, whitening. Numbers: README.md."""

import numpy as np
import setting
import tiny
from reference import ppo as reference
from setting import CLOSE, KL_COEF, SCORES, experience
from tiny import close_trees

PENALTY = setting.EXPERIENCE["penalty"]


# 2
def test_masks_never_come_from_the_pad_id(steps):
    """`ids != pad` drops the EOS wherever pad and EOS share an id, and any real token that has the pad's id: the reward
    lands one token early and the policy never learns to stop.
    """
    gen = tiny.generation()
    assert np.any(gen.tokens[gen.mask] == tiny.PAD) and np.any(gen.tokens[~gen.mask] != tiny.PAD)
    rollout = experience(steps)
    np.testing.assert_array_equal(rollout.mask, gen.mask)
    np.testing.assert_allclose(
        rollout.old_logprobs[gen.mask], setting.logprobs(setting.params(), gen)[gen.mask], **CLOSE
    )
    assert not np.any(rollout.rewards[~gen.mask])
    saved = setting.saved_rollout()
    policy, value = setting.update(steps, saved)
    close_trees(policy, setting.policy_gradient(saved, setting.logprobs(setting.params(), saved)), rtol=1e-4)
    close_trees(value, setting.value_gradient(saved), rtol=1e-4)


# 5
def test_a_response_without_eos_is_punished(steps):
    """A response that the length limit cut off scores min(score, 0) - penalty: without the rule the policy rambles on,
    and with a plain subtraction a good enough ramble still pays. Any of several stop tokens ends a text.
    """
    gen = tiny.generation()
    ended, long = tiny.ended(gen), gen.mask.sum(1) >= 3
    assert np.any(SCORES[~ended] > PENALTY) and np.any(ended & long)
    rollout = experience(steps, kl_coef=0.0, min_length=3, require_eos=True)
    np.testing.assert_array_equal(rollout.ended, ended)
    expected = np.where(ended, SCORES, np.minimum(SCORES, 0.0) - PENALTY)
    np.testing.assert_allclose(rollout.scores[long], expected[long], atol=1e-6)
    np.testing.assert_allclose(rollout.rewards.sum(1)[long], expected[long], atol=1e-6)
    np.testing.assert_array_equal(rollout.raw_scores, SCORES)


# 6
def test_one_temperature_divides_logits_everywhere(steps):
    """A temperature that is forgotten in one of the four places makes ratios that are not 1 at the start (exactly 2 was
    seen at temperature 0.6), or a KL that is not one.
    """
    out = setting.sample(steps)
    np.testing.assert_allclose(out.logprobs[out.mask], setting.logprobs(setting.params(), out)[out.mask], **CLOSE)
    gen, rollout = tiny.generation(), experience(steps)
    for name, found, seed in (("old", rollout.old_logprobs, 0), ("reference", rollout.ref_logprobs, 3)):
        expected = setting.logprobs(setting.params(seed), gen)
        np.testing.assert_allclose(found[gen.mask], expected[gen.mask], **CLOSE, err_msg=name)
    saved = setting.saved_rollout(log_ratio=0.1)
    expected = setting.policy_gradient(saved, setting.logprobs(setting.params(), saved))
    close_trees(setting.update(steps, saved)[0], expected, rtol=1e-4)


# 7
def test_a_policy_equal_to_its_reference_has_no_kl(steps):
    """With reference and old log-probabilities at different temperatures, an untouched policy is punished for a
    distance it does not have (or rewarded: negative KL).
    """
    rollout = experience(steps, ref_seed=0)
    np.testing.assert_allclose(rollout.ref_logprobs, rollout.old_logprobs, atol=1e-6)
    assert np.count_nonzero(np.abs(rollout.rewards) > 1e-5) == len(SCORES), "only the score is left as reward"


# 14
def test_scores_are_normalised_before_the_rules(steps):
    """Rewards of mean 0 and deviation 1 on the reference's samples make one KL coefficient and one penalty fit every
    reward model. The raw score is kept beside.
    """
    gen = tiny.generation()
    mean, std = 0.3, 1.7
    rollout = experience(steps, kl_coef=0.0, norm=(mean, std))
    np.testing.assert_allclose(rollout.scores, (SCORES - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(rollout.rewards.sum(1), (SCORES - mean) / std, rtol=1e-5)
    np.testing.assert_array_equal(rollout.raw_scores, SCORES)
    punished = experience(steps, kl_coef=0.0, norm=(mean, std), min_length=3, require_eos=True)
    expected, _ = reference.final_scores(
        SCORES, gen.tokens, gen.mask, eos_ids=(setting.EOS,), mean=mean, std=std, min_length=3, penalty=PENALTY
    )
    broken = punished.scores != rollout.scores
    assert np.any(broken)
    np.testing.assert_allclose(punished.scores[broken], expected[broken], rtol=1e-5)


# 16
def test_kl_is_a_penalty_on_every_token(steps):
    """-beta (log pi - log pi_ref) with this sign: the other one pays the policy for leaving its reference. Where
    another estimate is asked for, it is that one: k3 is never negative.
    """
    gen = tiny.generation()
    rollout = experience(steps)
    gap = setting.logprobs(setting.params(), gen) - setting.logprobs(setting.params(3), gen)
    inner = gen.mask & (np.arange(tiny.RESPONSE)[None] < (gen.mask.sum(1) - 1)[:, None])
    np.testing.assert_allclose(rollout.rewards[inner], -KL_COEF * gap[inner], **CLOSE)
    doubled = experience(steps, kl_coef=2 * KL_COEF)
    np.testing.assert_allclose(doubled.rewards[inner], 2 * rollout.rewards[inner], **CLOSE)
    other = experience(steps, kl_kind="k3")
    np.testing.assert_allclose(other.rewards[inner], -KL_COEF * (np.exp(-gap) - 1 + gap)[inner], **CLOSE)


# 17
def test_score_sits_at_the_last_response_token(steps):
    """The action that ended the episode earned the score. One token later it lies outside the policy's mask and reaches
    the policy only through the value function; in an integer buffer 0.7 becomes 0 and 1.9 becomes 1.
    """
    gen = tiny.generation()
    rollout = experience(steps, kl_coef=0.0)
    expected = np.zeros(gen.mask.shape)
    expected[np.arange(tiny.ROWS), gen.mask.sum(1) - 1] = SCORES
    np.testing.assert_allclose(rollout.rewards, expected, atol=1e-6)
    assert rollout.rewards.dtype == np.float32


def _float64(gen, **whitening):
    """(advantages, returns) of the shared rollout by a loop."""
    values = np.asarray(setting.values_of(setting.value_params(), setting.rows_of(gen)), np.float64)
    gap = (setting.logprobs(setting.params(seed), gen) for seed in (0, 3))
    rewards = reference.rewards(*gap, SCORES, gen.mask, kl_coef=KL_COEF)
    discounts = {name: setting.EXPERIENCE[name] for name in ("gamma", "lam")}
    return reference.advantages(rewards, values, gen.mask, **discounts, **whitening)


# 19
def test_reward_whitening_keeps_the_mean(steps):
    """Subtracting the mean would make every batch half bad, whatever it holds: rewards are only divided by their
    deviation (biased, over the response tokens of the whole batch).
    """
    expected = _float64(tiny.generation(), whiten_rewards=True, whiten_advantages=False)
    rollout = experience(steps, whiten_rewards=True)
    np.testing.assert_allclose(rollout.advantages, expected[0], **CLOSE)
    np.testing.assert_allclose(rollout.returns, expected[1], **CLOSE)


# 20
def test_advantages_are_whitened_over_the_batchs_response_tokens(steps):
    """Padding in the mean and variance makes the size of the step depend on how long the longest answer is; a mean of
    part of the batch depends on which rows happened to be together.
    """
    gen = tiny.generation()
    plain, white = experience(steps), experience(steps, whiten_advantages=True)
    kept = np.float64(white.advantages[gen.mask])
    np.testing.assert_allclose([kept.mean(), kept.var()], [0.0, 1.0], atol=1e-5)
    assert not np.any(white.advantages[~gen.mask])
    expected = reference.whiten(np.float64(plain.advantages), gen.mask, shift_mean=True)
    np.testing.assert_allclose(white.advantages, expected, **CLOSE)
    np.testing.assert_allclose(white.returns, plain.returns, atol=1e-6)


# 21
def test_gae_ends_at_the_last_response_token(steps):
    """The episode is over there, also where the length limit stopped it: no value is bootstrapped from padding. Values
    are trained to the returns of the unwhitened values; whitened ones would chase their own scale.
    """
    gen = tiny.generation()
    assert np.any(gen.mask[:, -1]) and np.any(~gen.mask[:, -1])
    rollout = experience(steps)
    values = np.asarray(setting.values_of(setting.value_params(), setting.rows_of(gen)))
    expected = _float64(gen, whiten_rewards=False, whiten_advantages=False)
    np.testing.assert_allclose(rollout.values[gen.mask], values[gen.mask], **CLOSE)
    np.testing.assert_allclose(rollout.advantages, expected[0], **CLOSE)
    np.testing.assert_allclose(rollout.returns, expected[1], **CLOSE)


# 31
def test_length_is_limited_and_stands_beside_the_score(steps):
    """Length is what a reward model is hacked by first: responses end at the cap, too short ones are punished as cut
    ones are, and no log shows a score without the length, in real tokens.
    """
    out = setting.sample(steps)
    assert out.mask.sum(1).max() <= tiny.RESPONSE == out.tokens.shape[1]
    gen = tiny.generation()
    length, ended = gen.mask.sum(1), tiny.ended(gen)
    assert np.any(ended & (length < 3) & (SCORES > 1.0))
    rollout = experience(steps, kl_coef=0.0, min_length=3, require_eos=True)
    expected = np.where(length < 3, np.minimum(SCORES, 0.0) - PENALTY, SCORES)
    np.testing.assert_allclose(rollout.scores[ended], expected[ended], atol=1e-6)
    _, metrics = setting.full_update(steps, setting.saved_rollout())
    assert {"ppo/score", "ppo/length"} <= metrics.keys()
    np.testing.assert_allclose(metrics["ppo/length"], length.mean(), rtol=1e-6)
