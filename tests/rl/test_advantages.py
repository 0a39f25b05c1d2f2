import jax.numpy as jnp
import numpy as np
import pytest
from reference import rl as reference
from reference.shapes import call_checked

from lfjax.masking import masked_whiten
from lfjax.rl.advantages import discounted_returns, gae, grpo, rloo

RNG = np.random.default_rng(0)
REWARDS, VALUES = (RNG.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
SCORES = jnp.asarray(RNG.normal(size=12), jnp.float32)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_the_sum_of_discounted_errors_in_float64(gamma, lam):
    result = call_checked(gae, jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK), gamma=gamma, lam=lam)
    np.testing.assert_allclose(result, reference.gae(REWARDS, VALUES, MASK, gamma, lam), rtol=1e-5, atol=1e-6)


def test_gae_steps_over_holes_as_if_they_were_not_there():
    places = np.flatnonzero(MASK[2])
    whole, _ = gae(REWARDS[2], VALUES[2], MASK[2], gamma=0.9, lam=0.8)
    alone, _ = gae(REWARDS[2, places], VALUES[2, places], np.ones(len(places), bool), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(whole[places], alone, rtol=1e-6)


def test_next_value_is_zero_after_the_last_token_also_at_the_length_limit():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    for row, last in ((0, 5), (1, 2), (2, 5)):
        np.testing.assert_allclose(advantages[row, last], REWARDS[row, last] - VALUES[row, last], rtol=1e-5)
        np.testing.assert_allclose(returns[row, last], REWARDS[row, last], rtol=1e-4)


def test_with_lambda_one_returns_are_the_discounted_sums_of_rewards():
    _, returns = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=1.0)
    sums = call_checked(discounted_returns, jnp.asarray(REWARDS), jnp.asarray(MASK), gamma=0.9)
    np.testing.assert_allclose(returns, sums, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums[1, 0], REWARDS[1, :3] @ [1, 0.9, 0.81], rtol=1e-5)


@pytest.mark.parametrize("padding", [1e9, -1e9, np.nan])
def test_what_padding_and_holes_hold_changes_nothing(padding):
    clean = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    dirty = gae(np.where(MASK, REWARDS, padding), np.where(MASK, VALUES, padding), MASK, gamma=1.0, lam=0.95)
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(np.stack(clean)[:, ~MASK], 0.0)


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_given_trls_rewards_and_mask_gae_gives_its_advantages(lam):
    """TRL puts the score one token after the last and keeps the value mask one token longer."""
    lengths = np.array([3, 6, 5, 1])
    rewards, value_mask = reference.trl_rewards_and_masks(REWARDS, np.arange(1.0, 5.0), lengths, kl_coef=0.1)
    ours = gae(rewards.astype(np.float32), VALUES, value_mask, gamma=1.0, lam=lam)
    expected = reference.trl_gae(rewards, VALUES, value_mask, 1.0, lam)
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine)[value_mask], theirs[value_mask], rtol=1e-5, atol=1e-6)
    response = np.arange(6)[None, :] < lengths[:, None]
    np.testing.assert_allclose(
        masked_whiten(ours[0], response, ddof=1),
        reference.trl_masked_whiten(expected[0], response),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [2, 3, 6])
def test_rloo_baseline_is_the_mean_of_the_others(size):
    advantages = call_checked(rloo, SCORES, size)
    np.testing.assert_allclose(advantages, reference.rloo(np.float64(SCORES), size), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_equals_float64(scale):
    advantages = call_checked(grpo, SCORES, 4, scale=scale)
    np.testing.assert_allclose(advantages, reference.grpo(np.float64(SCORES), 4, scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantages", [rloo, grpo])
def test_group_advantages_sum_to_zero_and_ignore_a_shift_of_the_group(advantages):
    shifted = SCORES + jnp.repeat(jnp.array([5.0, -2.0, 0.0]), 4)
    np.testing.assert_allclose(advantages(SCORES, 4).reshape(3, 4).sum(axis=1), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages(shifted, 4), advantages(SCORES, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_scores_give_no_advantage(scale):
    np.testing.assert_array_equal(grpo(jnp.full(8, 3.0), 4, scale=scale), 0.0)


@pytest.mark.parametrize("size", [1, 5, 0])
def test_groups_must_fit(size):
    for advantages in (rloo, grpo):
        with pytest.raises(ValueError, match="group_size"):
            advantages(SCORES, size)


def test_grpo_names_the_scales_it_knows():
    with pytest.raises(ValueError, match="'group', 'batch' or 'none'"):
        grpo(SCORES, 4, scale="rows")
