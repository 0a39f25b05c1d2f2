"""Sampling from a language model: one prefill, then one cached decoding step a token, until every row has stopped."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lfjax.config import InputError
from lfjax.sampling import filters
from lfjax.types import Generation


def generate(
    model,
    params,
    prompts: Array,
    prompt_mask: Array,
    rng: Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_new_tokens: int = 0,
    eos_ids: tuple[int, ...] = (),
    row_ids: Array | None = None,
    pad_id: int = 0,
) -> Generation:
    """Samples up to `max_new_tokens` after each prompt. Pure; compile it with everything but arrays static.

    A token's randomness is fold_in(fold_in(rng, row id), token index), so a row's sample depends neither on the other
    rows nor on its place in the batch.

    Args:
      model: has `decoder(params)` with `prefill`, `decode` and `logits`, as `lfjax.models.transformer.Transformer`.
      prompts, prompt_mask: [B P], left-padded; padding may hold any id.
      rng: key of the whole call; temperature 0 does not use it.
      max_new_tokens: R, at least 1.
      temperature, top_k, top_p, min_p: see `sample_tokens`.
      min_new_tokens: what `eos_ids` names is not sampled before so many tokens; log-probabilities stay as they are.
      eos_ids: tokens that end a row; each is kept as the row's last token.
      row_ids: [B] int32 global row ids; None: 0..B-1.
      pad_id: what stands after a row's end.
    Returns:
      Generation: tokens, mask and logprobs [B R]; after a row's end pad_id, False and 0.
    Raises:
      InputError: prompt and response exceed the model's context.
    """
    batch, length = prompts.shape
    _check_room(length, max_new_tokens, model.config.context)
    row_ids = jnp.arange(batch, dtype=jnp.int32) if row_ids is None else row_ids
    uniforms = row_uniforms(rng, row_ids, max_new_tokens)
    decoder = model.decoder(params)

    def extend(state: _State, hidden: Array, cache) -> _State:
        filtering = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        if min_new_tokens and eos_ids:
            filtering |= {"banned": eos_ids, "where": state.index < min_new_tokens}
        tokens, logprobs = sample_tokens(decoder.logits(hidden), uniforms[state.index], **filtering)
        return _append(state, tokens, logprobs, cache, eos_ids, pad_id)

    def step(state: _State) -> _State:
        hidden, cache = decoder.decode(state.last[:, None], state.cache)
        return extend(state, hidden[:, 0], cache)

    hidden, cache = decoder.prefill(prompts, prompt_mask, length + max_new_tokens - 1)  # the last token is not cached
    state = extend(_empty_state(batch, max_new_tokens, pad_id), hidden[:, -1], cache)
    state = jax.lax.while_loop(lambda s: (s.index < max_new_tokens) & jnp.any(s.alive), step, state)
    return Generation(state.tokens, state.mask, state.logprobs, prompts, prompt_mask.astype(bool))


def sample_tokens(
    logits: Array,
    uniforms: Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: tuple[int, ...] = (),
    where: Array | bool = True,
) -> tuple[Array, Array]:
    """Draws one token a row: logits [B V] -> tokens [B] int32, logprobs [B] float32.

    Args:
      uniforms: [B 2] in [0, 1); not used at temperature 0.
      temperature: divides the logits; 0 takes the most probable token (the lowest id of a tie).
      top_k, top_p, min_p: 0, 1.0 and 0.0 are off; see `filters`. Applied after temperature, in this order.
      banned: tokens that are not drawn `where` ([] bool).
    Returns:
      tokens, and their log_softmax(logits / temperature) before filters; at temperature 0, log_softmax(logits).
    """
    greedy = isinstance(temperature, (int, float)) and temperature == 0
    scaled = logits if greedy else filters.scale_temperature(logits, temperature)
    top = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    allowed = scaled
    if banned:
        allowed = jnp.where(where, scaled.at[:, jnp.asarray(banned)].set(-jnp.inf), scaled)
    if greedy:
        tokens = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    else:
        kept = filters.min_p(filters.top_p(filters.top_k(allowed, top_k), top_p), min_p)
        tokens = inverse_cdf(weights if kept is scaled else jnp.where(kept > -jnp.inf, weights, 0.0), uniforms)
    picked = jnp.take_along_axis(scaled, tokens[:, None], axis=-1) - top
    return tokens, picked[:, 0] - jnp.log(jnp.sum(weights, axis=-1))


def row_uniforms(rng: Array, row_ids: Array, count: int) -> Array:
    """Two uniforms in [0, 1) for each token of each row, [count B 2], from fold_in(fold_in(rng, row), token) alone."""

    def draw(token, row):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(rng, row), token), (2,))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(jnp.arange(count), row_ids)


def inverse_cdf(weights: Array, uniforms: Array) -> Array:
    """Samples in proportion to weights [B V] >= 0 by two uniforms a row [B 2]: one picks a block, one a token in it.

    Costs one pass over V and no noise a token, where `jax.random.categorical` draws V Gumbels. A weight of 0 is never
    picked. Returns [B] int32.
    """
    batch, vocab = weights.shape
    size = max(1, round(vocab**0.5))
    count = -(-vocab // size)
    blocks = jnp.pad(weights, ((0, 0), (0, count * size - vocab))).reshape(batch, count, size)
    block = _pick(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = _pick(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return (block * size + inside).astype(jnp.int32)


class _State(NamedTuple):
    """What the loop carries."""

    index: Array  # [] int32: tokens written
    last: Array  # [B] int32
    alive: Array  # [B] bool: rows without an EOS yet
    tokens: Array  # [B R] int32
    mask: Array  # [B R] bool
    logprobs: Array  # [B R] float32
    cache: object


def _empty_state(batch: int, count: int, pad_id: int) -> _State:
    return _State(
        index=jnp.int32(0),
        last=jnp.zeros(batch, jnp.int32),
        alive=jnp.ones(batch, bool),
        tokens=jnp.full((batch, count), pad_id, jnp.int32),
        mask=jnp.zeros((batch, count), bool),
        logprobs=jnp.zeros((batch, count), jnp.float32),
        cache=None,
    )


def _append(state: _State, tokens: Array, logprobs: Array, cache, eos_ids: tuple[int, ...], pad_id: int) -> _State:
    """Stores one sampled token of every row that goes on."""
    tokens = jnp.where(state.alive, tokens, pad_id)
    ended = jnp.zeros_like(state.alive)
    for eos in eos_ids:
        ended = ended | (tokens == eos)

    def write(buffer, column):
        return jax.lax.dynamic_update_slice(buffer, column[:, None], (0, state.index))

    return _State(
        index=state.index + 1,
        last=tokens,
        alive=state.alive & ~ended,
        tokens=write(state.tokens, tokens),
        mask=write(state.mask, state.alive),
        logprobs=write(state.logprobs, jnp.where(state.alive, logprobs, 0.0)),
        cache=cache,
    )


def _pick(weights: Array, uniform: Array) -> Array:
    """First index whose cumulative weight exceeds uniform * total; never one of weight 0, whatever the rounding."""
    cumulative = jnp.cumsum(weights, axis=-1)
    beyond = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))


def _check_room(prompt: int, new: int, context: int) -> None:
    if new < 1:
        raise InputError(f"max_new_tokens: found {new}; it must be at least 1")
    if prompt + new > context:
        raise InputError(
            f"max_new_tokens: found {new} after prompts of {prompt} tokens; together at most model.context = {context}"
        )
