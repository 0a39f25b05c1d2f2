import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import losses as reference
from tiny import close_trees

from lfjax.optim import make_optimizer
from lfjax.rewards import baselines
from lfjax.state import RewardState
from lfjax.steps.ppo_score import ppo_score
from lfjax.steps.reward import model_params, reward_pairs, reward_step, reward_terms
from lfjax.types import RewardBatch

MODEL = tiny.scorer()
RECORDER = tiny.recorder()
KEY = jax.random.key(0)
WEIGHTS = {
    "regression": 0.5,
    "every_token": 0.6,
    "bradley_terry": 1.0,
    "hinge": 0.7,
    "listwise_hinge": 0.3,
    "plackett_luce": 0.2,
    "softmax": 0.4,
    "centering": 0.1,
}


@functools.cache
def compiled(**options):
    options = {"model": MODEL, "tx": RECORDER, **options}
    return jax.jit(functools.partial(reward_step, **options))


@functools.cache
def values_at():
    return jax.jit(lambda p, t, m: MODEL.apply({"params": p}, t, attention_mask=m, method="values")[..., 0])


def values_of(params, batch: RewardBatch) -> np.ndarray:
    """[B C T] float64: the head on every position."""
    flat = (x.reshape(-1, tiny.LENGTH) for x in (batch.tokens, batch.mask))
    return np.asarray(values_at()(params, *flat), np.float64).reshape(batch.tokens.shape)


def last_of(values, mask):
    """[B C]: the value at each answer's last real token, 0 where there is no answer."""
    return np.asarray(
        [[v[m][-1] if m.any() else 0.0 for v, m in zip(*row, strict=True)] for row in zip(values, mask, strict=True)]
    )


def pairs_by_loop(batch: RewardBatch, *, across_records, min_gap, margin_scale):
    """{(better answer, worse answer): margin}, answers as (record, candidate)."""
    rows, candidates = batch.ratings.shape
    answers = [(b, c) for b in range(rows) for c in range(candidates)]
    pairs = {}
    for i in answers:
        for j in answers:
            same = i[0] == j[0]
            if same and batch.ranked[i] and batch.ranked[j]:
                if batch.ranks[i] < batch.ranks[j]:
                    pairs[i, j] = margin_scale * float(batch.margin[i[0]])
            elif batch.rated[i] and batch.rated[j] and (same or across_records):
                gap = float(batch.ratings[i]) - float(batch.ratings[j])
                if gap > 0 and gap >= min_gap:
                    pairs[i, j] = margin_scale * gap
    return pairs


def loss_by_loop(values, batch: RewardBatch, weights, **rules):
    """(loss, pair accuracy, mean squared error) in float64."""
    scores = last_of(values, batch.mask)
    pairs = pairs_by_loop(batch, **rules)
    gaps = [(scores[i] - scores[j], margin) for (i, j), margin in pairs.items()]
    errors = [(scores[i] - float(batch.ratings[i])) ** 2 for i in zip(*np.nonzero(batch.rated), strict=True)]
    everywhere = [
        (value - float(batch.ratings[i])) ** 2
        for i in zip(*np.nonzero(batch.rated), strict=True)
        for value in values[i][batch.mask[i]]
    ]
    lists = {"listwise_hinge": [], "plackett_luce": [], "softmax": []}
    for b in range(len(scores)):
        here = batch.ranked[b]
        if here.sum() >= 2:
            s, r = scores[b][here], batch.ranks[b][here]
            lists["listwise_hinge"].append(reference.listwise_hinge(s, r, 1.0))
            lists["plackett_luce"].append(reference.plackett_luce(s, r))
            best = (r == 0) / max((r == 0).sum(), 1)
            lists["softmax"].append(-sum(best * np.log(reference.softmax(s))))
    real = batch.mask.any(-1)
    terms = {
        "regression": errors,
        "every_token": everywhere,
        "bradley_terry": [reference.bradley_terry(gap, 0.0, margin) for gap, margin in gaps],
        "hinge": [max(0.0, 1.0 + margin - gap) for gap, margin in gaps],
        "centering": [scores[b][real[b]].sum() ** 2 for b in range(len(scores)) if real[b].any()],
        **lists,
    }
    mean = lambda xs: float(np.mean(xs)) if len(xs) else 0.0  # noqa: E731
    loss = sum(weights[name] * mean(terms[name]) for name in weights)
    return loss, mean([gap > 0 for gap, _ in gaps]), mean(errors)


RULES = [
    {"across_records": True, "min_gap": 1.0, "margin_scale": 0.0},
    {"across_records": False, "min_gap": 0.5, "margin_scale": 0.3},
    {"across_records": True, "min_gap": 0.0, "margin_scale": 1.0},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_pairs_are_those_of_a_loop_over_all_answers(candidates, rules):
    batch = tiny.reward_batch(candidates=candidates)
    scores = np.random.default_rng(0).normal(size=(tiny.ROWS, candidates)).astype(np.float32)
    chosen, rejected, margin, counts = (np.asarray(x) for x in reward_pairs(scores, batch, **rules))
    expected = pairs_by_loop(batch, **rules)
    flat = lambda answer: answer[0] * candidates + answer[1]  # noqa: E731
    assert {(flat(i), flat(j)) for i, j in expected} == set(zip(*np.nonzero(counts), strict=True))
    for (i, j), wanted in expected.items():
        place = flat(i), flat(j)
        np.testing.assert_allclose(
            [chosen[place], rejected[place], margin[place]], [scores[i], scores[j], wanted], rtol=1e-6
        )


def test_equal_ratings_make_no_pair_whatever_the_gap():
    batch = tiny.reward_batch()
    batch = batch._replace(ratings=np.ones_like(batch.ratings), rated=np.ones_like(batch.rated))
    for min_gap in (0.0, 1.0):
        options = {"across_records": True, "min_gap": min_gap, "margin_scale": 0.0}
        assert not np.any(reward_pairs(np.zeros(batch.ratings.shape), batch, **options)[3])


@pytest.mark.parametrize("scale", [1, 5, 50])
def test_training_and_figures_take_the_pairs_that_exact_arithmetic_takes(scale):
    """Means of twenty raters, centred and rounded to float32: a gap of exactly `min_gap` counts, one step less not."""
    twentieths = np.random.default_rng(1).integers(0, 20 * scale, 64)
    centred = twentieths / 20 - np.mean(twentieths / 20)
    batch = tiny.reward_batch(rows=64)
    batch = batch._replace(ratings=centred[:, None].astype(np.float32), rated=np.ones((64, 1), bool))
    for least in (1, 5, 7, 20):
        wanted = twentieths[:, None] - twentieths[None, :] >= least
        rules = {"across_records": True, "min_gap": least / 20, "margin_scale": 0.0}
        found = reward_pairs(np.zeros((64, 1), np.float32), batch, **rules)[3]
        np.testing.assert_array_equal(found, wanted)
        assert baselines.pair_accuracy(np.zeros(64), centred, least / 20)[1] == wanted.sum()


def test_pairs_with_equal_scores_are_half_right():
    batch = tiny.reward_batch(candidates=2)
    values = jnp.zeros(batch.tokens.shape)
    _, metrics = reward_terms(values, batch, across_records=True, min_gap=1.0, margin_scale=0.0)
    assert metrics["reward/pair_accuracy"].value == 0.5 and metrics["reward/pair_accuracy"].weight > 0


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_the_loss_is_a_float64_loops(candidates):
    batch, state = tiny.reward_batch(candidates=candidates), tiny.reward_state(MODEL, RECORDER)
    rules = {"across_records": True, "min_gap": 1.0, "margin_scale": 0.3}
    after, metrics = compiled(**WEIGHTS, **rules)(state, batch, KEY)
    loss, accuracy, mse = loss_by_loop(values_of(state.params, batch), batch, WEIGHTS, **rules)
    np.testing.assert_allclose(metrics["reward/loss"].value, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/pair_accuracy"].value, accuracy, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/mse"].value, mse, rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(after.opt_state.grads))


class Table:
    """A reward model that is a table of values: steps see nothing of a model but `apply` and `config`."""

    config = tiny.CONFIG

    def apply(self, variables, tokens, attention_mask=None, rngs=None, method=None):
        assert method == "values"
        return variables["params"][..., None]


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_switches_its_own_term(name):
    batch = tiny.reward_batch(candidates=3)
    weights = {other: 0.0 for other in WEIGHTS} | {name: 2.0}
    rules = {"across_records": False, "min_gap": 1.0, "margin_scale": 0.0}
    values = np.random.default_rng(2).normal(size=batch.tokens.shape).astype(np.float32)
    state = RewardState.create(jnp.asarray(values.reshape(-1, tiny.LENGTH)), RECORDER)
    _, metrics = reward_step(state, batch, KEY, model=Table(), tx=RECORDER, **weights, **rules)
    expected, *_ = loss_by_loop(values, batch, weights, **rules)
    assert expected > 0
    np.testing.assert_allclose(metrics["reward/loss"].value, expected, rtol=1e-5)


BOUNDS = (-1.0, 0.25, 1.5)  # four classes; ratings lie on the first and the last of them too


def with_cutpoints(state: RewardState, tx, cutpoints=BOUNDS) -> RewardState:
    params = {**state.params, "head": {**state.params["head"], "cutpoints": jnp.asarray(cutpoints, jnp.float32)}}
    return RewardState.create(params, tx)


def ordinal_by_loop(scores, batch: RewardBatch, cutpoints, bounds=BOUNDS) -> float:
    losses = []
    for i in zip(*np.nonzero(batch.rated), strict=True):
        rank = sum(bound < float(batch.ratings[i]) for bound in bounds)
        losses.append(-math.log(reference.ordinal_probs(scores[i], sorted(np.float64(cutpoints)))[rank]))
    return float(np.mean(losses))


ORDINAL = {name: 0.0 for name in WEIGHTS} | {"ordinal": 0.5, "ordinal_bounds": BOUNDS}


@pytest.mark.parametrize("cutpoints", [BOUNDS, (2.0, -3.0, 0.5)])
def test_the_ordinal_loss_and_its_gradient_by_the_cutpoints_are_a_float64_loops(cutpoints):
    """Also where the cutpoints have crossed: they count in order."""
    batch = tiny.reward_batch(candidates=2)
    state = with_cutpoints(tiny.reward_state(MODEL, RECORDER), RECORDER, cutpoints)
    after, metrics = compiled(**ORDINAL)(state, batch, KEY)
    scores = last_of(values_of(tiny.init(MODEL), batch), batch.mask)
    np.testing.assert_allclose(metrics["reward/loss"].value, 0.5 * ordinal_by_loop(scores, batch, cutpoints), rtol=1e-5)
    step = 1e-5
    slopes = [
        0.5 * (ordinal_by_loop(scores, batch, up) - ordinal_by_loop(scores, batch, down)) / (2 * step)
        for up, down in ((np.float64(cutpoints) + sign * step * np.eye(3)[k] for sign in (1, -1)) for k in range(3))
    ]
    np.testing.assert_allclose(after.opt_state.grads["head"]["cutpoints"], slopes, rtol=1e-3, atol=1e-5)


def test_microbatches_change_no_gradient_of_the_ordinal_loss():
    batch, state = tiny.reward_batch(candidates=3), with_cutpoints(tiny.reward_state(MODEL, RECORDER), RECORDER)
    options = {**WEIGHTS, "ordinal": 0.5, "ordinal_bounds": BOUNDS}
    (whole, a), (parts, b) = (compiled(**options, num_microbatches=n)(state, batch, KEY) for n in (1, 4))
    close_trees(parts.opt_state.grads, whole.opt_state.grads)
    assert np.abs(whole.opt_state.grads["head"]["cutpoints"]).min() > 1e-4
    np.testing.assert_allclose(a["reward/loss"].value, b["reward/loss"].value, rtol=1e-5)


def test_the_ordinal_loss_alone_finds_the_order_and_the_cutpoints_move_with_it():
    batch, tx = tiny.reward_batch(), make_optimizer(0.02)
    batch = batch._replace(ratings=np.linspace(-3, 3, tiny.ROWS, dtype=np.float32)[:, None], rated=batch.mask.any(-1))
    bounds = (-1.5, 0.0, 1.5)
    step = compiled(tx=tx, **ORDINAL | {"ordinal_bounds": bounds, "min_gap": 3.0})
    state = first = with_cutpoints(tiny.reward_state(MODEL, tx), tx, bounds)
    losses = []
    for _ in range(80):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["reward/loss"].value))
    assert losses[-1] < 0.3 * losses[0] and metrics["reward/pair_accuracy"].value == 1.0
    moved = np.asarray(state.params["head"]["cutpoints"])
    assert np.abs(moved - first.params["head"]["cutpoints"]).min() > 0.01 and np.all(np.diff(moved) > 0)


def test_the_model_is_applied_without_the_cutpoints():
    """Adding the leaf changes nothing of what the other losses see."""
    batch, plain = tiny.reward_batch(candidates=3), tiny.reward_state(MODEL, RECORDER)
    _, a = compiled(**WEIGHTS)(plain, batch, KEY)
    _, b = compiled(**WEIGHTS, ordinal=1e-30, ordinal_bounds=BOUNDS)(with_cutpoints(plain, RECORDER), batch, KEY)
    for name in a.keys() - {"optim/grad_norm"}:
        np.testing.assert_allclose(a[name].value, b[name].value, rtol=1e-6)
    assert model_params(with_cutpoints(plain, RECORDER).params).keys() == plain.params.keys()
    jax.tree.map(np.testing.assert_array_equal, model_params(with_cutpoints(plain, RECORDER).params), plain.params)


def test_what_is_not_rated_ranked_or_real_may_hold_anything():
    batch, state = tiny.reward_batch(candidates=3), tiny.reward_state(MODEL, RECORDER)
    junk = batch._replace(
        tokens=np.where(batch.mask, batch.tokens, 17),
        ratings=np.where(batch.rated, batch.ratings, -1e9).astype(np.float32),
        ranks=np.where(batch.ranked, batch.ranks, -5).astype(np.int32),
    )
    step = compiled(**WEIGHTS, across_records=True, min_gap=1.0, margin_scale=0.3)
    (a, _), (b, _) = (step(state, x, KEY) for x in (batch, junk))
    close_trees(b.opt_state.grads, a.opt_state.grads, rtol=1e-6)


@pytest.mark.parametrize("candidates", [1, 3])
def test_microbatches_are_one_big_batch_though_pairs_cross_them(candidates):
    batch, state = tiny.reward_batch(candidates=candidates), tiny.reward_state(MODEL, RECORDER)
    options = {**WEIGHTS, "across_records": True, "min_gap": 1.0, "margin_scale": 0.3}
    (whole, a), (parts, b) = (compiled(**options, num_microbatches=n)(state, batch, KEY) for n in (1, 4))
    close_trees(parts.opt_state.grads, whole.opt_state.grads)
    for name in a:
        np.testing.assert_allclose(a[name].value, b[name].value, rtol=1e-5)


def test_a_batch_in_which_nobody_said_anything_changes_nothing_and_has_no_loss():
    batch, tx = tiny.reward_batch(candidates=2), make_optimizer(0.1, weight_decay=0.1)
    silent = batch._replace(rated=np.zeros_like(batch.rated), ranked=np.zeros_like(batch.ranked))
    step = compiled(tx=tx)
    state, _ = step(tiny.reward_state(MODEL, tx), batch, KEY)
    after, metrics = step(state, silent, KEY)
    assert metrics["reward/loss"].weight == 0 and (after.step, after.skipped) == (2, 0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_learns_ratings_by_heart():
    batch, tx = tiny.reward_batch(), make_optimizer(0.02)
    step, state = compiled(tx=tx, bradley_terry=0.0), tiny.reward_state(MODEL, tx)
    for _ in range(80):
        state, metrics = step(state, batch, KEY)
    assert metrics["reward/mse"].value < 0.05 and metrics["reward/pair_accuracy"].value == 1.0


def test_learns_preferences_by_heart():
    batch = tiny.reward_batch(candidates=2)
    batch = batch._replace(
        ranked=batch.mask.any(-1), ranks=np.tile(np.int32([0, 1]), (tiny.ROWS, 1)), rated=np.zeros_like(batch.rated)
    )
    tx = make_optimizer(0.02)
    step, state = compiled(tx=tx), tiny.reward_state(MODEL, tx)
    for _ in range(40):
        state, metrics = step(state, batch, KEY)
    pairs = (batch.ranked.sum(1) == 2).sum()
    assert metrics["reward/pair_accuracy"].value == 1.0 and metrics["reward/pair_accuracy"].weight == pairs
    assert metrics["reward/loss"].value < 0.1 * math.log(2)


def test_an_eos_inside_a_dialogue_is_not_its_end():
    """The score is read at the last real token, wherever EOS ids stand, and padding on the left moves nothing."""
    batch, params = tiny.reward_batch(), tiny.init(MODEL)
    tokens, mask = batch.tokens[:, 0].copy(), batch.mask[:, 0]
    tokens[:, 1] = tiny.EOS
    expected = np.asarray(values_at()(params, tokens, mask))[np.arange(tiny.ROWS), mask.sum(1) - 1]
    score = jax.jit(lambda p, t, m: MODEL.apply({"params": p}, t, attention_mask=m)[:, 0])
    turned = [np.stack([np.roll(row, -m.sum()) for row, m in zip(x, mask, strict=True)]) for x in (tokens, mask)]
    for rows in ((tokens, mask), turned):
        np.testing.assert_allclose(score(params, *rows), expected, atol=1e-5)
    only_rating = {"regression": 1.0, "bradley_terry": 0.0}
    moved = batch._replace(tokens=tokens[:, None]), batch._replace(tokens=turned[0][:, None], mask=turned[1][:, None])
    for rows in moved:
        _, metrics = compiled(**only_rating)(tiny.reward_state(MODEL, RECORDER), rows, KEY)
        errors = np.square(expected - batch.ratings[:, 0])[batch.rated[:, 0]]
        np.testing.assert_allclose(metrics["reward/loss"].value, errors.mean(), rtol=1e-5)


def test_ppo_scores_read_prompt_and_response_as_training_does():
    """A generation's score is that of the same text as one right-padded training row."""
    gen, params = tiny.generation(), tiny.init(MODEL)
    scores = jax.jit(functools.partial(ppo_score, model=MODEL))(params, gen)
    length = tiny.PROMPT + tiny.RESPONSE
    tokens, mask = np.zeros((tiny.ROWS, length), np.int32), np.zeros((tiny.ROWS, length), bool)
    for b in range(tiny.ROWS):
        ids = [*gen.prompts[b][gen.prompt_mask[b]], *gen.tokens[b][gen.mask[b]]]
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
    expected = jax.jit(lambda p, t, m: MODEL.apply({"params": p}, t, attention_mask=m)[:, 0])(params, tokens, mask)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
