"""The smallest models and batches: one set of shapes for all tests of steps, so that compilations are shared."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.state import LMState, PPOState, RewardNorm, RewardState, ValueState
from lfjax.types import ClassBatch, Generation, PromptBatch, RewardBatch, SftBatch

VOCAB, ROWS, PROMPT, RESPONSE, LENGTH, CLASSES = 32, 8, 4, 6, 8, 3
EOS, PAD = 2, 0
CONFIG = presets.llama(
    vocab_size=VOCAB, width=16, layers=1, heads=4, kv_heads=2, mlp_width=32, context=32, tied=True, init_std=0.25
)


def language_model(**changes) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, **changes))


def scorer(**changes) -> Transformer:
    return language_model(num_labels=1, head_bias=True, **changes)


def classifier(**changes) -> Transformer:
    return language_model(num_labels=CLASSES, **changes)


@functools.cache
def init(model: Transformer, seed: int = 0):
    return jax.jit(lambda: model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"])()


class Recorded(NamedTuple):
    """State of `recorder`: the last gradient it was given, and the steps it saw."""

    grads: object
    steps: jax.Array  # [CALLS] int32, -1 where not called yet
    calls: jax.Array  # [] int32


CALLS = 8


def recorder() -> optax.GradientTransformationExtraArgs:
    """An optimiser that changes nothing and keeps what it is given: a step under it shows its gradient."""

    def create(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Recorded(zeros, jnp.full(CALLS, -1, jnp.int32), jnp.int32(0))

    def update(grads, state, params=None, *, step, **_):
        steps = state.steps.at[state.calls % CALLS].set(step)
        return jax.tree.map(jnp.zeros_like, grads), Recorded(grads, steps, state.calls + 1)

    return optax.GradientTransformationExtraArgs(create, update)


def lm_state(model, tx, seed: int = 0) -> LMState:
    return LMState.create(init(model, seed), tx)


def reward_state(model, tx, seed: int = 0) -> RewardState:
    return RewardState.create(init(model, seed), tx)


def ppo_state(policy, value, txs, *, kl_coef: float = 0.1, step: int = 0) -> PPOState:
    return PPOState(
        policy=LMState.create(init(policy), txs[0]),
        value=ValueState.create(init(value, 1), txs[1]),
        kl_coef=jnp.float32(kl_coef),
        reward_norm=RewardNorm.identity(),
        step=jnp.int32(step),
    )


def sft_batch(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> SftBatch:
    """One right-padded document a row, of 2 .. length targets: rows of very different weight."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (rows, length + 1)).astype(np.int32)
    real = np.arange(length)[None] < (2 + np.arange(rows) % (length - 1))[:, None]
    tokens[:, 1:] = np.where(real, tokens[:, 1:], PAD)
    return SftBatch(tokens=tokens, loss_mask=real, segment_ids=real.astype(np.int32))


def reward_batch(rows: int = ROWS, candidates: int = 1, length: int = LENGTH, seed: int = 0) -> RewardBatch:
    """Right-padded answers with half-point ratings; some not rated, the last candidate sometimes absent."""
    rng = np.random.default_rng(seed)
    shape = (rows, candidates)
    tokens = rng.integers(3, VOCAB, (*shape, length)).astype(np.int32)
    mask = np.arange(length)[None, None] < rng.integers(2, length + 1, shape)[..., None]
    if candidates > 1:
        mask[::3, -1] = False
    real = mask.any(-1)
    ranked = real & (np.arange(rows)[:, None] % 2 == 0) & (candidates > 1)
    ratings = np.round(rng.uniform(-3, 3, shape) * 2).astype(np.float32) / 2
    rated = real & (rng.random(shape) < 0.7)
    return RewardBatch(
        tokens=np.where(mask, tokens, PAD),
        mask=mask,
        ratings=np.where(rated, ratings, 1e9).astype(np.float32),
        rated=rated,
        ranks=np.where(ranked, rng.integers(0, candidates, shape), 77).astype(np.int32),
        ranked=ranked,
        margin=rng.uniform(0, 2, rows).astype(np.float32),
    )


def class_batch(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> ClassBatch:
    """Right-padded texts with their classes; the last rows only fill the batch, and the pad id is a real token too."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (rows, length)).astype(np.int32)
    tokens[:, 1] = PAD
    mask = np.arange(length)[None] < (2 + np.arange(rows) % (length - 2))[:, None]
    counts = np.arange(rows) < rows - 3
    labels = np.where(counts, rng.integers(0, CLASSES, rows), 99).astype(np.int32)
    return ClassBatch(np.where(mask, tokens, PAD), mask, labels, counts)


def prompt_batch(rows: int = ROWS, seed: int = 0) -> PromptBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (rows, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT)[None] >= (np.arange(rows) % PROMPT)[:, None]
    return PromptBatch(np.where(mask, tokens, PAD), mask, np.arange(rows, dtype=np.int32))


def generation(rows: int = ROWS, response: int = RESPONSE, seed: int = 0) -> Generation:
    """Responses of 1 .. `response` tokens; two of three end in EOS, the others were cut by the length limit.

    The pad id is also a real token inside the first rows, and the padding holds ids that are not the pad id.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (rows, response)).astype(np.int32)
    lengths = np.where(np.arange(rows) % 3 == 0, response, 1 + np.arange(rows) % response)
    mask = np.arange(response)[None] < lengths[:, None]
    tokens[: rows // 2, 0] = PAD
    for row in range(rows):
        if row % 3:
            tokens[row, lengths[row] - 1] = EOS
    prompts = prompt_batch(rows, seed)
    junk = np.where(mask, -1.0, 1e9).astype(np.float32)
    return Generation(tokens, mask, junk, prompts.tokens, prompts.mask)


def ended(gen: Generation) -> np.ndarray:
    """Whether a response's last counted token is EOS, [B] bool."""
    lengths = np.asarray(gen.mask).sum(1)
    return np.asarray(gen.tokens)[np.arange(len(lengths)), np.maximum(lengths - 1, 0)] == EOS


def close_trees(got, expected, rtol: float = 1e-5):
    """Every leaf agrees within `rtol` times the largest element of the whole expected tree."""
    scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))
