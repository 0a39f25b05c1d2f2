"""Reward model, value network, supervised training, optimisers and precision. Numbers are README.md's."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import setting
import tiny
from setting import CLASSIFIER, CLOSE, DROPPING, HALF, LM, PLACED, RECORDER, SCORER
from tiny import close_trees

from lfjax.config import optim_section
from lfjax.data.examples import RewardExample
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.state import RewardNorm, RewardState
from lfjax.types import ClassBatch, RewardBatch, SftBatch


# 10
def test_dropout_is_off_where_texts_are_scored_or_classified(steps):
    """A held-out accuracy with dropout in it is too low, and another each time it is measured."""
    batch = tiny.class_batch()
    texts = types.SimpleNamespace(tokens=batch.tokens[:, None], mask=batch.mask[:, None])
    examples = [types.SimpleNamespace(candidates=((1,),))] * tiny.ROWS
    batches = types.SimpleNamespace(examples=examples, evaluation=lambda: [(range(tiny.ROWS), texts)])
    params = setting.params(model=CLASSIFIER)
    dropping = tiny.classifier(dropout=0.5)
    scores = steps["scorer"](setting.one_device(), dropping, each=tiny.CLASSES)(params, batches)
    np.testing.assert_allclose(scores, jax.jit(_class_scores)(params, batch), **CLOSE)


# 10
def test_dropout_is_on_in_training_with_noise_of_each_step(steps):
    """Where the key is not passed on, a network that should drop units drops none and learns a few ratings by
    heart; where it is always the same key, half of the network is never trained.
    """
    dropping = tiny.classifier(dropout=0.5)
    text = tiny.lm_state(LM, RECORDER), tiny.sft_batch(), {"model": DROPPING.policy}
    answers = RewardState.create(setting.value_params(), RECORDER), tiny.reward_batch(), {"model": DROPPING.value}
    classes = RewardState.create(setting.params(model=CLASSIFIER), RECORDER), tiny.class_batch(), {"model": dropping}
    for name, (state, batch, options) in {"sft": text, "reward": answers, "classify": classes}.items():
        first, again, second = (
            setting.run(steps[name], state, batch, key, tx=RECORDER, **options)[0].opt_state.grads
            for key in map(jax.random.key, (0, 0, 1))
        )
        close_trees(again, first)
        largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(first))
        apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), second, first)))
        assert apart > 1e-2 * largest, f"{name}: another key drops the same units, or none"


# 11
def test_the_value_network_starts_at_zero_or_as_the_reward_model(steps):
    """A fresh random head makes advantages of noise, and the policy moves before the values have been learnt: on the
    policy's trunk it starts at 0, else as the reward model, in the units of the normalised score.
    """
    norm, settings = RewardNorm(jnp.float32(0.3), jnp.float32(1.7)), steps["shared_sections"]().model
    policy = types.SimpleNamespace(model=LM, params=setting.params(), base=None)
    kind = steps["value_network"].__globals__["LearnedReward"]
    reward = kind.__new__(kind)
    reward.config, reward.params = SCORER.config, setting.value_params()
    rows = setting.rows_of(tiny.generation())

    def values(start):
        where = {"start": start, "key": "ppo.value_init"}
        model, params = steps["value_network"](setting.one_device(), settings, policy, reward, norm, **where)
        tokens, attend = setting.whole(rows)
        apply = jax.jit(lambda p: model.apply({"params": p}, tokens, attention_mask=attend, method="values"))
        return np.asarray(apply(params))[:, tiny.PROMPT - 1 : -1, 0]

    assert not np.any(values("policy"))
    expected = (np.asarray(setting.values_of(setting.value_params(), rows)) - 0.3) / 1.7
    np.testing.assert_allclose(values("reward"), expected, **CLOSE)


# 12
def test_the_reward_head_starts_at_one_over_root_width(steps):
    """Normal with deviation 1 / sqrt(width + 1) and no bias: scores start around 0 with deviation 1 at every width."""
    width = 4096
    shape = presets.llama(vocab_size=8, width=width, layers=1, heads=2, mlp_width=2)
    found = types.SimpleNamespace(model=Transformer(shape), params={"embed": {}, "unembed": {}})
    settings = steps["shared_sections"]().model
    how = {"dropout": 0.0, "zero": steps["reward_section"]().head_init != "normal"}
    _, params = steps["reward_model"](setting.one_device(), settings, found, "reward", 1, **how)
    head = params["head"]
    assert "unembed" not in params and not np.any(head.get("bias", 0.0))
    assert head["kernel"].shape == (width, 1)
    np.testing.assert_allclose(np.std(head["kernel"]), (width + 1) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(np.mean(head["kernel"]), 0.0, atol=4 / width)


# 13
def test_reward_is_read_at_the_last_real_token(steps):
    """Position -1 of a right-padded row is padding: the reward model would score noise that batch shapes decide."""
    gen = tiny.generation()
    expected = setting.last_scores(setting.value_params(), setting.rows_of(gen))
    np.testing.assert_allclose(setting.score(steps, gen), expected, **CLOSE)
    batch = tiny.reward_batch()._replace(ranked=np.zeros((tiny.ROWS, 1), bool))
    state = tiny.reward_state(SCORER, RECORDER)
    options = {"model": SCORER, "tx": RECORDER, "regression": 1.0, "bradley_terry": 0.0}
    found, _ = setting.run(steps["reward"], state, batch, jax.random.key(0), **options)
    close_trees(found.opt_state.grads, _regression(state.params, batch), rtol=1e-4)


# 13
def test_a_class_is_read_at_the_last_real_token(steps):
    """The same of a classifier: what stands in the padding, the pad id or not, changes neither loss nor gradient."""
    batch, state = tiny.class_batch(), tiny.reward_state(CLASSIFIER, RECORDER)
    loss, grads = _class_loss(state.params, batch)
    for padding in (tiny.PAD, tiny.VOCAB - 1):
        padded = batch._replace(tokens=np.where(batch.mask, batch.tokens, padding))
        found, metrics = setting.run(steps["classify"], state, padded, jax.random.key(0), **_CLASSIFY)
        close_trees(found.opt_state.grads, grads, rtol=1e-4)
        np.testing.assert_allclose(metrics["classify/loss"].value, loss, rtol=1e-5)


_CLASSIFY = {"model": CLASSIFIER, "tx": RECORDER}


def _class_scores(params, batch: ClassBatch):
    """[B classes] at the last real token."""
    values = CLASSIFIER.apply({"params": params}, batch.tokens, attention_mask=batch.mask, method="values")
    return setting.at_places(values, batch.mask.sum(1)[:, None] - 1)[:, 0]


@jax.jit
@jax.value_and_grad
def _class_loss(params, batch: ClassBatch):
    logprobs = jax.nn.log_softmax(_class_scores(params, batch))
    picked = jnp.sum(jax.nn.one_hot(batch.labels, tiny.CLASSES) * logprobs, axis=1)
    return -jnp.sum(jnp.where(batch.counts, picked, 0.0)) / jnp.sum(batch.counts)


def _answer_scores(params, batch: RewardBatch):
    """[B] at the last real token of the only candidate."""
    mask = batch.mask[:, 0]
    values = SCORER.apply({"params": params}, batch.tokens[:, 0], attention_mask=mask, method="values")
    return setting.at_places(values[..., 0], mask.sum(1)[:, None] - 1)[:, 0]


@jax.jit
@jax.grad
def _regression(params, batch: RewardBatch):
    error = jnp.where(batch.rated[:, 0], _answer_scores(params, batch) - batch.ratings[:, 0], 0.0)
    return jnp.sum(error**2) / jnp.sum(batch.rated)


# 14
def test_the_norm_is_measured_on_the_references_samples(steps):
    """Mean and biased deviation of the raw score over as many samples as the config says, written by the frozen start
    of the policy: those of the policy in training would move the goal with it.
    """
    scores = np.random.default_rng(0).normal(3.0, 2.0, (2, tiny.ROWS)).astype(np.float32)
    batches = types.SimpleNamespace(
        batch_size=tiny.ROWS, batch_at=lambda index: tiny.prompt_batch(), indices_at=lambda index: range(tiny.ROWS)
    )
    written = []

    def rollout(params, prompts, key, index):
        written.append((params, int(index)))
        return int(index)

    policy = types.SimpleNamespace(params="the start's", rollout=rollout)
    records = list(range(tiny.ROWS))
    given = (policy, lambda index, _: scores[index], batches, records, jax.random.key(0))
    norm = steps["measure_norm"](setting.one_device(), *given, wanted=12)
    assert written == [("the start's", 0), ("the start's", 1)]
    kept = np.float64(scores.ravel()[:12])
    np.testing.assert_allclose([norm.mean, norm.std], [kept.mean(), kept.std()], rtol=1e-6)


# 15
def test_the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs(steps):
    """People's ratings are few and noisy: after one epoch a reward model learns them by heart. Its error says little;
    what matters is how often it orders two texts as people do, on texts it has not seen.
    """
    defaults = steps["training_section"]()
    assert defaults.epochs == 1.0 and defaults.steps == 0
    batch = tiny.reward_batch()
    state = tiny.reward_state(SCORER, RECORDER)
    _, metrics = setting.run(steps["reward"], state, batch, jax.random.key(0), **_REWARD, num_microbatches=1)
    scores = np.float64(jax.jit(_answer_scores)(state.params, batch))
    rated, ratings = batch.rated[:, 0], np.float64(batch.ratings[:, 0])
    right, pairs = 0, 0
    for i, j in np.ndindex(tiny.ROWS, tiny.ROWS):
        if rated[i] and rated[j] and ratings[i] - ratings[j] >= _REWARD["min_gap"]:
            right, pairs = right + (scores[i] > scores[j]), pairs + 1
    assert 0 < right < pairs and np.any(np.abs(np.diff(np.sort(ratings[rated]))) < _REWARD["min_gap"])
    accuracy = metrics["reward/pair_accuracy"]
    np.testing.assert_allclose([accuracy.sum, accuracy.weight], [right, pairs])
    mse = np.mean((scores - ratings)[rated] ** 2)
    np.testing.assert_allclose(metrics["reward/mse"].value, mse, rtol=1e-4)

    examples = [
        RewardExample(candidates=((1,),), ratings=(rating,), ranks=(None,), margin=0.0) for rating in (0.0, 2.0, 2.5)
    ]
    held_out = steps["pair_figures"]([np.asarray([s]) for s in (0.1, 0.5, 0.3)], examples, 1.0, "reward/")
    assert held_out["reward/pair_accuracy"] == 1.0 and held_out["reward/pairs"] == 2


_REWARD = {
    "model": SCORER,
    "tx": RECORDER,
    "regression": 1.0,
    "bradley_terry": 1.0,
    "across_records": True,
    "min_gap": 1.0,
}


# 33
def test_what_people_prefer_scores_higher(steps):
    """With two arguments swapped, or ranks read upside down, every figure looks healthy and the model learns what
    people like least. A small step down each loss's gradient widens the margin of better over worse answers, both where
    ratings say which is better and where ranks do.
    """
    for said in ("ratings", "ranks"):
        batch = _compared(said)
        widens = jax.jit(jax.grad(_mean_margin))(setting.value_params(), *_better(batch, said), batch)
        losses = ("bradley_terry", "hinge")
        losses += ("listwise_hinge", "plackett_luce", "softmax") if said == "ranks" else ()
        for loss in losses:
            grads = _reward_gradient(steps, batch, **{loss: 1.0})
            gain = -sum(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.vdot(a, b)), grads, widens)))
            assert gain > 0, f"{loss} by {said} pulls worse answers up"


# 33
def test_a_margin_asks_for_a_wider_gap(steps):
    """The stated margin is what the better answer has to lead by: with the other sign, the clearest preferences pull
    least.
    """
    for said in ("ratings", "ranks"):
        batch = _compared(said)
        better, worse = _better(batch, said)
        gap = (batch.ratings[better] - batch.ratings[worse]) if said == "ratings" else batch.margin[better[0]]
        expected = _margin_gradient(setting.value_params(), better, worse, _MARGIN * gap, batch)
        close_trees(_reward_gradient(steps, batch, bradley_terry=1.0), expected, rtol=1e-4)


_MARGIN = 0.5  # of score, for each point of rating or of the stated margin


def _compared(said: str) -> RewardBatch:
    """Three answers a record, each with a rating or each with a rank."""
    batch, rng = tiny.reward_batch(candidates=3), np.random.default_rng(0)
    shape = batch.ratings.shape
    mask = np.arange(tiny.LENGTH) < rng.integers(2, tiny.LENGTH + 1, (*shape, 1))
    ranks = rng.permuted(np.broadcast_to(np.int32([0, 1, 2]), shape), axis=1)
    ratings = rng.permuted(np.broadcast_to(np.float32([-2.0, 0.0, 2.5]), shape), axis=1)
    by_rank, by_rating = (np.full(shape, said == name) for name in ("ranks", "ratings"))
    return batch._replace(mask=mask, ranks=ranks, ratings=ratings, ranked=by_rank, rated=by_rating)


def _better(batch: RewardBatch, said: str):
    """Of every pair within a record: where the better answer is, and the worse."""
    worth = batch.ratings if said == "ratings" else -batch.ranks
    pairs = [(b, i, j) for b, i, j in np.ndindex(tiny.ROWS, 3, 3) if worth[b, i] > worth[b, j]]
    b, i, j = np.asarray(pairs).T
    return (b, i), (b, j)


def _leads(params, better, worse, batch: RewardBatch):
    """[pairs]: the better answer's score less the worse one's, each at its last real token."""
    tokens, mask = (x.reshape(-1, tiny.LENGTH) for x in (batch.tokens, batch.mask))
    values = SCORER.apply({"params": params}, tokens, attention_mask=mask, method="values")
    scores = setting.at_places(values[..., 0], mask.sum(1)[:, None] - 1).reshape(batch.ratings.shape)
    return scores[better] - scores[worse]


def _mean_margin(params, better, worse, batch: RewardBatch):
    return jnp.mean(_leads(params, better, worse, batch))


@jax.jit
@jax.grad
def _margin_gradient(params, better, worse, margin, batch: RewardBatch):
    return -jnp.mean(jax.nn.log_sigmoid(_leads(params, better, worse, batch) - margin))


def _reward_gradient(steps, batch: RewardBatch, **weights):
    """Of the loss with these weights alone, over the pairs within records."""
    options = {"regression": 0.0, "bradley_terry": 0.0, "across_records": False, "margin_scale": _MARGIN} | weights
    state = RewardState.create(setting.value_params(), RECORDER)
    state, _ = setting.run(steps["reward"], state, batch, jax.random.key(0), model=SCORER, tx=RECORDER, **options)
    return state.opt_state.grads


# 23
def test_sft_loss_is_the_mean_over_all_counted_tokens(steps):
    """The same failure in supervised training: gradients were off by 0.5 to 4 times in other libraries.
    Tokens that are read and not counted, a prompt's, teach nothing.
    """
    batch, state = tiny.sft_batch(), tiny.lm_state(LM, RECORDER)
    batch = batch._replace(loss_mask=batch.loss_mask & (np.arange(tiny.LENGTH) > 0))
    assert batch.loss_mask[0::2].sum() != batch.loss_mask[1::2].sum()
    loss, grads = _cross_entropy(state.params, batch)
    for pieces in (2, 1):
        options = {"model": LM, "tx": RECORDER, "num_microbatches": pieces}
        found, metrics = setting.run(steps["sft"], state, batch, jax.random.key(0), **options)
        close_trees(found.opt_state.grads, grads, rtol=1e-4)
        np.testing.assert_allclose(metrics["sft/loss"].value, loss, rtol=1e-5)


def _mean_cross_entropy(model, params, batch: SftBatch):
    """Of one document a row."""
    logits = model.apply({"params": params}, batch.inputs, attention_mask=batch.segment_ids > 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(batch.loss_mask, picked, 0.0)) / jnp.sum(batch.loss_mask)


_cross_entropy, _placed_cross_entropy = (
    jax.jit(jax.value_and_grad(functools.partial(_mean_cross_entropy, model))) for model in (LM, PLACED.policy)
)


# 23
def test_class_loss_and_accuracy_are_means_over_the_rows_that_count(steps):
    """Rows that only fill the last batch of an epoch have no class: counted, they pull towards one that nobody gave."""
    batch, state = tiny.class_batch(), tiny.reward_state(CLASSIFIER, RECORDER)
    assert batch.counts[0::2].sum() != batch.counts[1::2].sum()
    loss, grads = _class_loss(state.params, batch)
    guesses = np.argmax(jax.jit(_class_scores)(state.params, batch), axis=1)
    right = np.sum((guesses == batch.labels)[batch.counts])
    for pieces in (2, 1):
        options = _CLASSIFY | {"num_microbatches": pieces}
        found, metrics = setting.run(steps["classify"], state, batch, jax.random.key(0), **options)
        close_trees(found.opt_state.grads, grads, rtol=1e-4)
        np.testing.assert_allclose(metrics["classify/loss"].value, loss, rtol=1e-5)
        accuracy = metrics["classify/accuracy"]
        np.testing.assert_allclose([accuracy.sum, accuracy.weight], [right, batch.counts.sum()])


# 23
def test_held_out_loss_is_the_mean_over_all_counted_tokens(steps):
    """A perplexity with padding in it falls as batches get longer, and with dropout in it is another each time."""
    batch = tiny.sft_batch()
    loss, _ = _cross_entropy(setting.params(), batch)
    metrics = setting.run(steps["evaluate"], setting.params(), batch, model=setting.DROPPING.policy)
    np.testing.assert_allclose(metrics["evaluate/nll"].value, loss, rtol=1e-5)
    assert metrics["evaluate/nll"].weight == batch.loss_mask.sum()


# 34
def test_packed_documents_do_not_see_each_other(steps):
    """Rows are filled with several documents: attention that crosses their borders, and positions that run on over
    them, make each depend on what happened to stand before it, which it never does where the model writes. Packed, they
    have the loss and gradient of rows of their own.
    """
    packed, apart = _packed(), _apart()
    params = setting.params(model=PLACED.policy)
    loss, grads = _placed_cross_entropy(params, apart)
    state = tiny.lm_state(PLACED.policy, RECORDER)
    found, metrics = setting.run(steps["sft"], state, packed, jax.random.key(0), model=PLACED.policy, tx=RECORDER)
    close_trees(found.opt_state.grads, grads, rtol=1e-4)
    np.testing.assert_allclose(metrics["sft/loss"].value, loss, rtol=1e-5)
    held_out = setting.run(steps["evaluate"], params, packed, model=PLACED.policy)
    np.testing.assert_allclose(held_out["evaluate/nll"].value, loss, rtol=1e-5)


_FIRST = 3 + np.arange(tiny.ROWS) % (tiny.LENGTH - 4)  # tokens of each row's first document; the second fills the row


def _packed() -> SftBatch:
    """Two documents a row, of which no token predicts the next one's first."""
    places, first = np.arange(tiny.LENGTH)[None], _FIRST[:, None]
    tokens = np.random.default_rng(0).integers(3, tiny.VOCAB, (tiny.ROWS, tiny.LENGTH + 1)).astype(np.int32)
    return SftBatch(tokens=tokens, loss_mask=places != first - 1, segment_ids=np.int32(1 + (places >= first)))


def _apart() -> SftBatch:
    """The same documents, one a row, from the first column on."""
    rows = [document for row, at in zip(_packed().tokens, _FIRST, strict=True) for document in np.split(row, [at])]
    lengths = np.asarray([[len(row)] for row in rows])
    tokens = np.stack([np.pad(row, (0, tiny.LENGTH + 1 - len(row))) for row in rows])
    real = np.arange(tiny.LENGTH)[None] < lengths - 1
    return SftBatch(tokens=tokens, loss_mask=real, segment_ids=np.int32(real))


# 27
def test_adam_has_the_epsilon_of_ppo(steps):
    """1e-5, outside the root and after bias correction: with 1e-8 parameters whose gradient is almost 0 take full steps
    from the first update on.
    """
    config = steps["shared_sections"]()
    config.ppo = steps["ppo_section"]()
    for name in ("optim", "value_optim"):
        assert optim_section(config, "ppo", name)["eps"] == 1e-5
    tx = steps["make_optimizer"](0.1, name="adamw", b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.0, clip_norm=0.0)
    gradients = np.random.default_rng(0).normal(0, 1e-5, (4, 6))
    params = {"w": jnp.zeros(6)}
    state, p, m, v = tx.init(params), np.zeros(6), np.zeros(6), np.zeros(6)
    for count, gradient in enumerate(gradients, 1):
        updates, state = tx.update({"w": jnp.float32(gradient)}, state, params, step=count - 1)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        p -= 0.1 * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.95**count)) + 1e-5)
        np.testing.assert_allclose(params["w"], p, rtol=1e-4, atol=1e-6)


# 29
def test_accumulation_is_the_big_batch(steps):
    """The same gradient in any number of microbatches, also where the loss couples rows: pairs of answers that lie in
    different microbatches count.
    """
    key, batch = jax.random.key(0), tiny.reward_batch()
    state = tiny.reward_state(SCORER, RECORDER)
    whole, parts = (
        setting.run(steps["reward"], state, batch, key, **_REWARD, num_microbatches=n)[0].opt_state.grads
        for n in (1, 4)
    )
    close_trees(parts, whole)
    state, batch = tiny.lm_state(LM, RECORDER), tiny.sft_batch()
    whole, parts = (
        setting.run(steps["sft"], state, batch, key, model=LM, tx=RECORDER, num_microbatches=n)[0].opt_state.grads
        for n in (1, 2)
    )
    close_trees(parts, whole)
    rollout = setting.saved_rollout()
    for one, two in zip(*(setting.update(steps, rollout, num_microbatches=n) for n in (1, 2)), strict=True):
        close_trees(two, one)


# 29
def test_steps_averaged_by_multisteps_are_the_big_batch_only_at_equal_weights(steps):
    """`optax.MultiSteps` averages the means of its calls: right where each counts as many tokens, wrong otherwise,
    which is why no loop uses it.
    """
    for equal in (True, False):
        batch = tiny.sft_batch()
        if equal:
            batch = batch._replace(loss_mask=batch.loss_mask & (np.arange(tiny.LENGTH) < 2)[None])
        halves = [jax.tree.map(lambda x, at=at: x[at::2], batch) for at in (0, 1)]
        weights = [half.loss_mask.sum() for half in halves]
        assert (weights[0] == weights[1]) == equal
        _, whole = _cross_entropy(setting.params(), batch)
        state = tiny.lm_state(LM, _EVERY_SECOND)
        for half in halves:
            state, _ = setting.run(steps["sft"], state, half, jax.random.key(0), model=LM, tx=_EVERY_SECOND)
        moved = jax.tree.map(lambda old, new: old - new, setting.params(), state.params)
        scale = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(whole))
        off = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), moved, whole))) / scale
        assert off < 1e-5 if equal else off > 1e-2


_EVERY_SECOND = optax.with_extra_args_support(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())


# 32
def test_half_precision_ends_at_the_hidden_states(steps):
    """Activations are short; log-softmax, losses, whitening, Adam's moments and the weights it moves are float32: a
    log-probability of 8 bits is off by 0.4 %, and ratios and KL would be made of rounding. (Tested with float16, which
    runs on every backend.)
    """
    gen = tiny.generation()
    out = setting.sample(steps, models=HALF)
    _has_float32_bits(sampled=out.logprobs[out.mask])
    rollout = setting.experience(steps, models=HALF, whiten_advantages=True)
    names = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    _has_float32_bits(**{name: getattr(rollout, name)[gen.mask] for name in names})
    _has_float32_bits(scores=setting.score(steps, gen, models=HALF))

    state, metrics = setting.full_update(steps, setting.saved_rollout(), models=HALF, txs=(_ADAM, _ADAM))
    _has_float32_bits(losses=np.float32([metrics["ppo/policy_loss"], metrics["ppo/value_loss"]]))
    lm = tiny.lm_state(LM, _ADAM)
    trained, metrics = setting.run(steps["sft"], lm, tiny.sft_batch(), jax.random.key(0), model=HALF.policy, tx=_ADAM)
    _has_float32_bits(loss=metrics["sft/loss"].value)
    held_out = setting.run(steps["evaluate"], setting.params(), tiny.sft_batch(), model=HALF.policy)
    _has_float32_bits(held_out=held_out["evaluate/nll"].value)
    for name, kept in (("policy", state.policy), ("value", state.value), ("sft", trained)):
        for path, leaf in jax.tree_util.tree_leaves_with_path((kept.params, kept.opt_state)):
            where = f"{name}{jax.tree_util.keystr(path)}"
            assert leaf.dtype in (np.float32, np.int32), f"{where} is {leaf.dtype}"
            if leaf.dtype == np.float32 and np.any(leaf):
                _has_float32_bits(**{where: leaf[leaf != 0]})


_ADAM = make_optimizer(1e-3, clip_norm=0.0)


def _has_float32_bits(**arrays):
    """Float32, and not the numbers of a shorter type in a float32 array."""
    for name, array in arrays.items():
        array = np.asarray(array)
        assert array.dtype == np.float32, f"{name} is {array.dtype}"
        moved = array[(array != 0) & (array != 1)]  # norms start at 1
        for short in (jnp.bfloat16, jnp.float16):
            kept = np.asarray(jnp.asarray(moved).astype(short).astype(jnp.float32)) == moved
            assert not len(kept) or np.mean(kept) < 0.5, f"{name} holds numbers of {jnp.dtype(short).name}"
