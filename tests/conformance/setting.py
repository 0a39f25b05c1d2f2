"""What the conformance tests share: one set of models and shapes, steps compiled once, and gradients by another way.

Steps are seen from outside: arrays in, arrays out, and gradients through an optimiser that only records them. What is
expected comes from the model's logits and a float64 loop.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from reference import ppo as reference
from tiny import EOS, PROMPT

from lfjax import sharding
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.run.devices import Devices
from lfjax.state import RewardNorm
from lfjax.steps.ppo_forward import PPOModels
from lfjax.types import Generation, Rollout

TEMPERATURE = 0.7
KL_COEF = 0.3
MODELS = PPOModels(policy=tiny.language_model(), value=tiny.scorer())
LM, SCORER = MODELS.policy, MODELS.value
CLASSIFIER = tiny.classifier()
DROPPING = PPOModels(policy=tiny.language_model(dropout=0.5), value=tiny.scorer(dropout=0.5))  # same parameters
HALF = PPOModels(policy=tiny.language_model(dtype="float16"), value=tiny.scorer(dtype="float16"))  # same parameters
_COUNTED = {"vocab_size": tiny.VOCAB, "width": 16, "layers": 1, "heads": 4, "context": 32, "init_std": 0.25}
PLACED = PPOModels(  # learned positions: where a token stands changes what comes out
    policy=Transformer(presets.gpt2(**_COUNTED, mlp_width=32)),
    value=Transformer(presets.gpt2(**_COUNTED, mlp_width=32, num_labels=1, head_bias=True)),
)
RECORDER = tiny.recorder()
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
STOPS = tuple(range(0, tiny.VOCAB, 5))  # many stop tokens, for short responses
SCORES = np.asarray([0.7, 1.9, -0.4, 0.25, -1.6, 0.5, 2.3, -0.9], np.float32)
EXPERIENCE = {
    "models": MODELS,
    "eos_ids": (1, EOS),  # several may end a text; here it is always the second
    "temperature": TEMPERATURE,
    "minibatches": 2,
    "gamma": 0.97,
    "lam": 0.95,
    "kl_kind": "k1",
    "whiten_rewards": False,
    "whiten_advantages": False,
    "min_length": 0,
    "require_eos": False,
    "penalty": 0.75,
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

_compiled: dict = {}


def run(step, *args, **options):
    """step(*args, **options), compiled once for each step and options."""
    key = (step, *options.items())
    if key not in _compiled:
        _compiled[key] = jax.jit(functools.partial(step, **options))
    return jax.tree.map(np.asarray, _compiled[key](*args))


def forget(step):
    """Frees the step's programs: a process may have 65,530 memory maps on Linux, and one program takes several."""
    for key in [key for key in _compiled if key[0] in (step, _with_numbers(step))]:
        del _compiled[key]


def params(seed: int = 0, model=LM):
    """Of the policy; seed 3 is another network, used as reference."""
    return tiny.init(model, seed)


def value_params(model=SCORER):
    return tiny.init(model, 1)


# The same by another way: whole logits, values at every position, float64 where it is summed


def rows_of(x: Generation | Rollout):
    """(prompts, prompt mask, responses, mask)."""
    return (x.prompts, x.prompt_mask, x.responses if isinstance(x, Rollout) else x.tokens, x.mask)


def whole(rows):
    """Tokens and mask [B P+R] of prompt and response."""
    prompts, prompt_mask, responses, mask = rows
    return jnp.concatenate([prompts, responses], axis=1), jnp.concatenate([prompt_mask, mask], axis=1)


def left_aligned(rows):
    """(tokens, mask, positions, places): rows without padding before the prompt, whose first token is at position 0.

    places [B R]: the column that predicts each response token.
    """
    tokens, attend = whole(rows)
    order = jnp.argsort(~attend, axis=1, stable=True)
    tokens, mask = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, attend))
    places = jnp.sum(rows[1], axis=1, keepdims=True) - 1 + jnp.arange(rows[2].shape[1])[None]
    return tokens, mask, jnp.arange(tokens.shape[1])[None], places


def _logits(params, rows):
    """[B R V]: those that predict the responses."""
    tokens, attend = whole(rows)
    return LM.apply({"params": params}, tokens, attention_mask=attend)[:, PROMPT - 1 : -1]


def _values(params, rows):
    tokens, attend = whole(rows)
    return SCORER.apply({"params": params}, tokens, attention_mask=attend, method="values")[:, PROMPT - 1 : -1, 0]


logits_of, values_of = jax.jit(_logits), jax.jit(_values)


def logprobs(params, x, temperature=TEMPERATURE) -> np.ndarray:
    """[B R] float64: of the response tokens, by whole logits."""
    rows = rows_of(x)
    all_tokens = reference.log_softmax(logits_of(params, rows), temperature)
    return np.take_along_axis(all_tokens, np.asarray(rows[2])[..., None], axis=-1)[..., 0]


def at_places(values, places):
    """values [B T ...] at columns places [B R]."""
    return jnp.stack([values[row][places[row]] for row in range(values.shape[0])])


@jax.jit
def last_scores(params, rows):
    """[B]: scores read row by row at the last real position of prompt + response."""
    tokens, attend = whole(rows)
    values = SCORER.apply({"params": params}, tokens, attention_mask=attend, method="values")
    return at_places(values[..., 0], (PROMPT + rows[3].sum(1) - 1)[:, None])[:, 0]


@jax.jit
def _pull_policy(params, rows, weights):
    def total(params):
        picked = jnp.take_along_axis(jax.nn.log_softmax(_logits(params, rows) / TEMPERATURE), rows[2][..., None], -1)
        return jnp.sum(weights * picked[..., 0])

    return jax.grad(total)(params)


@jax.jit
@jax.grad
def _pull_entropy(params, rows):
    logp = jax.nn.log_softmax(_logits(params, rows) / TEMPERATURE)
    return jnp.sum(jnp.where(rows[3], -jnp.sum(jnp.exp(logp) * logp, axis=-1), 0.0)) / jnp.sum(rows[3])


@jax.jit
def _pull_value(params, rows, weights):
    return jax.grad(lambda p: jnp.sum(weights * _values(p, rows)))(params)


def policy_slopes(rollout: Rollout, logp, *, low=0.2, high=0.3) -> np.ndarray:
    """[B R]: the clipped loss's slope by each token's log-probability, in float64."""
    mask, slopes = np.asarray(rollout.mask), np.zeros(rollout.mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio, advantage = np.exp(logp[b, t] - float(rollout.old_logprobs[b, t])), float(rollout.advantages[b, t])
        clipped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        slopes[b, t] = 0.0 if clipped else -advantage * ratio
    return slopes / mask.sum()


def policy_gradient(rollout: Rollout, logp, *, at=None):
    """Gradient of the clipped loss: each token's own slope, then through the network with the parameters `at`."""
    return _pull_policy(at or params(), rows_of(rollout), jnp.float32(policy_slopes(rollout, logp)))


def entropy_gradient(rollout: Rollout):
    """Gradient of the policy's entropy, averaged over the response tokens."""
    return _pull_entropy(params(), rows_of(rollout))


def value_gradient(rollout: Rollout, *, clip=0.2, coef=0.5, at=None):
    """Gradient of coef * 0.5 * max((v - R)^2, (clipped v - R)^2), averaged over the response tokens."""
    at = at or value_params()
    mask, slopes = np.asarray(rollout.mask), np.zeros(rollout.mask.shape)
    now = np.asarray(values_of(at, rows_of(rollout)), np.float64)
    for b, t in zip(*np.nonzero(mask), strict=True):
        v, old, target = now[b, t], float(rollout.values[b, t]), float(rollout.returns[b, t])
        clipped = min(max(v, old - clip), old + clip)
        slopes[b, t] = coef * (v - target) if (v - target) ** 2 >= (clipped - target) ** 2 else 0.0
    return _pull_value(at, rows_of(rollout), jnp.float32(slopes / mask.sum()))


# The steps, on their shared inputs


def sample(steps, *, prompts=None, key=7, models=MODELS, eos_ids=(EOS,), pad_id=tiny.PAD, **options) -> Generation:
    """What the rollout writes after `tiny.prompt_batch()`."""
    fixed = {"model": models.policy, "max_new_tokens": tiny.RESPONSE, "temperature": TEMPERATURE}
    prompts = tiny.prompt_batch() if prompts is None else prompts
    args = (params(model=without_dropout(models.policy)), prompts, jax.random.key(key))
    return Generation(*run(steps["ppo_rollout"], *args, **fixed, eos_ids=eos_ids, pad_id=pad_id, **options))


def without_dropout(model):
    """The model whose parameters `tiny.init` has made already."""
    same = {DROPPING: MODELS, HALF: MODELS}
    for models, plain in same.items():
        if model in models:
            return plain[models.index(model)]
    return model


def score(steps, generation: Generation, *, models=MODELS) -> np.ndarray:
    given = value_params(without_dropout(models.value))
    return run(steps["ppo_score"], given, generation, model=models.value)


def experience(
    steps, gen=None, *, ref_seed=3, kl_coef=KL_COEF, norm=(0.0, 1.0), scores=SCORES, models=MODELS, **options
) -> Rollout:
    """What the step makes of `tiny.generation()` and SCORES."""
    policy, value = without_dropout(models.policy), without_dropout(models.value)
    args = (params(model=policy), value_params(value), params(ref_seed, policy), gen or tiny.generation(), scores)
    norm = RewardNorm(*map(jnp.float32, norm))
    options = EXPERIENCE | {"models": models} | options
    return Rollout(*run(_with_numbers(steps["ppo_experience"]), *args, jnp.float32(kl_coef), norm, **options))


@functools.cache
def _with_numbers(step):
    """The step with its KL coefficient and normalisation as arguments, so that no other value compiles it again."""

    def call(policy, value, ref, gen, scores, kl_coef, norm, **options):
        return step(policy, value, ref, gen, scores, kl_coef=kl_coef, reward_norm=norm, **options)

    return call


def saved_rollout(*, log_ratio=None, seed=0) -> Rollout:
    """A rollout made by hand: the policy's own log-probabilities as old ones, moved by `log_ratio`."""
    gen, rng = tiny.generation(), np.random.default_rng(seed)
    mask = gen.mask
    old = logprobs(params(), gen) - (0.0 if log_ratio is None else log_ratio)
    values = np.asarray(values_of(value_params(), rows_of(gen)), np.float64)
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


def far_rollout() -> Rollout:
    """Ratios of e^1 and e^-1, beyond the clips of UPDATE, and of e^0.25 and e^-0.25, within the upper alone."""
    mask = tiny.generation().mask
    numbers = np.arange(mask.size).reshape(mask.shape)
    log_ratio = np.where(numbers % 3 == 0, 0.25, 1.0) * np.where(numbers % 2 == 0, 1.0, -1.0)
    return saved_rollout(log_ratio=log_ratio)


def full_update(steps, rollout: Rollout, *, models=MODELS, key=0, at=0, **options):
    """(state, metrics name -> float) of the step."""
    options = UPDATE | {"models": models} | options
    policy, value = without_dropout(models.policy), without_dropout(models.value)
    state = tiny.ppo_state(policy, value, options["txs"], step=at)
    state, metrics = run(steps["ppo_update"], state, rollout, jax.random.key(key), **options)
    assert state.policy.skipped == 0 and state.value.skipped == 0, "a loss or gradient was not finite"
    return state, {name: float(mean.value) for name, mean in metrics.items()}


def update(steps, rollout: Rollout, **options):
    """(policy gradient, value gradient) of the step's first minibatch: the whole rollout."""
    state, _ = full_update(steps, rollout, **options)
    return state.policy.opt_state.grads, state.value.opt_state.grads


# What stages share


def one_device() -> Devices:
    """Where a stage's parts compute in these tests."""
    return Devices(sharding.make_mesh(devices=jax.devices()[:1]))


def loop_policy(steps, model):
    """What a stage makes of a loaded language model: its rollout program, and parameters."""
    loaded = types.SimpleNamespace(model=model, params=params())
    options = {"max_new_tokens": tiny.RESPONSE, "temperature": TEMPERATURE, "eos_ids": (EOS,), "pad_id": tiny.PAD}
    settings = steps["shared_sections"]().model
    return steps["policy"](
        one_device(), loaded, steps["ppo_rollout"], name="rollout", settings=settings, shapes=1, **options
    )
