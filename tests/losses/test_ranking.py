import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.shapes import call_checked

from lfjax.losses import ranking

RNG = np.random.default_rng(0)
SCORES = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
RANKS = jnp.array([[0, 1, 2], [2, 0, 0], [0, 0, 0], [5, 9, 1]], jnp.int32)  # strict, a tie, all tied, with gaps
WHERE = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
PROBS = jax.nn.softmax(jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32))
LISTWISE = {
    "hinge": lambda scores, where: ranking.listwise_hinge_losses(scores, RANKS, where=where),
    "plackett_luce": lambda scores, where: ranking.plackett_luce_losses(scores, RANKS, where=where),
    "softmax": lambda scores, where: ranking.softmax_feedback_losses(scores, PROBS, where=where),
}


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_pair_losses_equal_float64(margin):
    chosen, rejected = SCORES[:, 0], SCORES[:, 1]
    logistic = call_checked(ranking.bradley_terry_losses, chosen, rejected, margin=margin)
    hinge = call_checked(ranking.pairwise_hinge_losses, chosen, rejected, margin=margin)
    pairs = list(zip(np.float64(chosen), np.float64(rejected), strict=True))
    np.testing.assert_allclose(logistic, [reference.bradley_terry(a, b, margin) for a, b in pairs], rtol=1e-5)
    np.testing.assert_allclose(hinge, [max(0.0, margin - (a - b)) for a, b in pairs], rtol=1e-5)


@pytest.mark.parametrize("case", ["plain", "margin", "center0.01", "margin_center0.1"])
def test_bradley_terry_with_margin_and_centring_equals_trl(shared, case):
    """TRL's RewardTrainer.compute_loss on the same scores: the first half chosen, the second rejected."""
    expected = json.loads((shared / "reference" / "reward" / "losses.json").read_text())[case]
    margins = jnp.asarray(np.load(shared / "reference" / "reward" / "batch.npz")["margin"])
    chosen, rejected = jnp.asarray(expected["rewards"], jnp.float32).reshape(2, -1)
    losses = ranking.bradley_terry_losses(chosen, rejected, margin=margins if "margin" in case else 0.0)
    centring = expected["args"].get("center_rewards_coefficient", 0.0)
    losses = losses + centring * ranking.center_penalty(jnp.stack([chosen, rejected], axis=-1))
    np.testing.assert_allclose(losses.mean(), expected["loss"], rtol=1e-4)


def test_either_answer_wins_with_probability_one():
    a, b = SCORES[:, 0], SCORES[:, 1]
    both = jnp.exp(-ranking.bradley_terry_losses(a, b)) + jnp.exp(-ranking.bradley_terry_losses(b, a))
    np.testing.assert_allclose(both, 1.0, rtol=1e-6)


@pytest.mark.parametrize("difference, moves", [(0.5, True), (1.5, False), (-3.0, True)])
def test_hinge_lets_go_beyond_the_margin(difference, moves):
    grad = jax.grad(lambda x: ranking.pairwise_hinge_losses(x, jnp.float32(0.0), margin=1.0))(jnp.float32(difference))
    assert bool(grad != 0) == moves


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_listwise_hinge_equals_a_loop_over_pairs(margin):
    losses = call_checked(ranking.listwise_hinge_losses, SCORES, RANKS, margin=margin)
    expected = [reference.listwise_hinge(s, r, margin) for s, r in zip(np.float64(SCORES), RANKS, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_plackett_luce_equals_a_loop_over_draws():
    losses = call_checked(ranking.plackett_luce_losses, SCORES, RANKS)
    expected = [reference.plackett_luce(s, r) for s, r in zip(np.float64(SCORES), RANKS, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("candidates", [2, 3, 4])
def test_probabilities_of_all_orders_sum_to_one(candidates):
    orders = jnp.array(list(itertools.permutations(range(candidates))), jnp.int32)
    scores = jnp.asarray(RNG.normal(size=candidates), jnp.float32)
    losses = ranking.plackett_luce_losses(jnp.broadcast_to(scores, orders.shape), orders)
    np.testing.assert_allclose(jnp.exp(-losses).sum(), 1.0, rtol=1e-5)


def test_plackett_luce_of_two_is_bradley_terry():
    two = SCORES[:, :2]
    ranks = jnp.broadcast_to(jnp.array([[0, 1]]), two.shape)
    expected = ranking.bradley_terry_losses(two[:, 0], two[:, 1])
    np.testing.assert_allclose(ranking.plackett_luce_losses(two, ranks), expected, rtol=1e-5)


def test_a_full_tie_pulls_scores_together_and_rests_at_equal_scores():
    tied = jnp.zeros(3, jnp.int32)
    grad = jax.grad(lambda s: ranking.plackett_luce_losses(s, tied))
    np.testing.assert_allclose(grad(jnp.zeros(3)), 0.0, atol=1e-6)
    apart = grad(jnp.array([1.0, 0.0, -1.0]))
    assert apart[0] > 0 > apart[2]


def test_softmax_feedback_equals_the_cross_entropy_and_is_least_at_its_target():
    losses = call_checked(ranking.softmax_feedback_losses, SCORES, PROBS)
    expected = [
        -(q * np.log(reference.softmax(s))).sum() for s, q in zip(np.float64(SCORES), np.float64(PROBS), strict=True)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    at_target = jax.grad(lambda s: ranking.softmax_feedback_losses(s, PROBS).sum())(jnp.log(PROBS))
    np.testing.assert_allclose(at_target, 0.0, atol=1e-6)


@pytest.mark.parametrize("name", LISTWISE)
def test_absent_candidates_are_as_if_never_listed(name):
    losses = LISTWISE[name](SCORES, WHERE)
    scores, ranks, probs = np.float64(SCORES[1])[[0, 2]], np.array(RANKS[1])[[0, 2]], np.float64(PROBS[1])[[0, 2]]
    expected = {
        "hinge": lambda: reference.listwise_hinge(scores, ranks, 1.0),
        "plackett_luce": lambda: reference.plackett_luce(scores, ranks),
        "softmax": lambda: -(probs * np.log(reference.softmax(scores))).sum(),
    }[name]()
    np.testing.assert_allclose(losses[1], expected, rtol=1e-5)
    np.testing.assert_array_equal(losses[3], 0.0)


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("padding", [1e9, -1e9])
def test_what_absent_candidates_hold_changes_nothing(name, padding):
    def run(fill):
        scores = jnp.where(WHERE, SCORES, fill)
        return jax.value_and_grad(lambda s: LISTWISE[name](s, WHERE).sum())(scores)

    (value, grad), (clean, clean_grad) = run(padding), run(0.0)
    assert value == clean and np.isfinite(grad).all()
    np.testing.assert_array_equal(grad, clean_grad)
    np.testing.assert_array_equal(np.asarray(grad)[~np.asarray(WHERE)], 0.0)


@pytest.mark.parametrize("name", LISTWISE)
def test_no_candidates_at_all_give_zero_and_zero_gradients(name):
    value, grad = jax.value_and_grad(lambda s: LISTWISE[name](s, jnp.zeros_like(WHERE)).sum())(SCORES)
    assert value == 0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("name", ["hinge", "plackett_luce"])
def test_only_differences_of_scores_count(name):
    np.testing.assert_allclose(LISTWISE[name](SCORES + 3.0, None), LISTWISE[name](SCORES, None), rtol=1e-5, atol=1e-6)


def test_wildly_different_scores_stay_finite():
    big = jnp.array([1e9, -1e9], jnp.float32)
    for function in (ranking.bradley_terry_losses, ranking.pairwise_hinge_losses):
        value, grads = jax.value_and_grad(lambda a, b, f=function: f(a, b).sum(), (0, 1))(big, -big)
        assert np.isfinite(value) and np.isfinite(grads).all()


def test_center_penalty_is_least_where_scores_sum_to_zero():
    scores = jnp.array([[1.0, -1.0, 0.0], [1.0, 1.0, 2.0]])
    np.testing.assert_allclose(call_checked(ranking.center_penalty, scores), [0.0, 16.0])
