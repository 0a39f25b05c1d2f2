"""Batches, rollouts and weighted means: the arrays that flow between data, steps and loops.

Axes: B batch, C candidates, T target positions, P prompt positions, R response positions.
Masks are bool and True means "counts". Log-probabilities are in nats, float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Mean(NamedTuple):
    """A mean kept as its sum and its weight, so that means over shards, microbatches and steps add up exactly."""

    sum: Array
    weight: Array

    @classmethod
    def over(cls, values: Array, mask: Array) -> Mean:
        """The mean of `values` where `mask`; masked-out values never enter, whatever they hold (NaN included)."""
        mask = jnp.broadcast_to(mask, values.shape)
        return cls(
            jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32),
            jnp.sum(mask, dtype=jnp.float32),
        )

    @classmethod
    def of(cls, value: Array | float) -> Mean:
        """All of `value`'s elements with weight 1 each."""
        value = jnp.asarray(value, jnp.float32)
        return cls(jnp.sum(value), jnp.float32(value.size))

    @property
    def value(self) -> Array:
        """sum / weight, 0 where nothing counts."""
        return jnp.where(self.weight > 0, self.sum / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


def add_means(a: Mean, b: Mean) -> Mean:
    """The mean over both."""
    return Mean(a.sum + b.sum, a.weight + b.weight)


class SftBatch(NamedTuple):
    """Token rows for next-token prediction, padded or packed."""

    tokens: Array  # [B T+1] int32
    loss_mask: Array  # [B T] bool: True where the *target* counts
    segment_ids: Array  # [B T] int32 of the inputs: 0 padding, 1.. one number a document

    @property
    def inputs(self) -> Array:
        """[B T]: all but the last token."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Array:
        """[B T]: all but the first token."""
        return self.tokens[:, 1:]


class RewardBatch(NamedTuple):
    """Complete sequences (prompt + response + EOS) with what people said of them, C candidates a record."""

    tokens: Array  # [B C T] int32
    mask: Array  # [B C T] bool: real tokens
    ratings: Array  # [B C] float32, any finite value where `rated` is False
    rated: Array  # [B C] bool
    ranks: Array  # [B C] int32: 0 = best, ties share a rank
    ranked: Array  # [B C] bool
    margin: Array  # [B] float32: how much better a preference's chosen answer is (0 when not said)


class PreferenceBatch(NamedTuple):
    """Pairs of complete sequences: [:, 0] the answer that people prefer, [:, 1] the other one."""

    tokens: Array  # [B 2 T+1] int32, right-padded
    loss_mask: Array  # [B 2 T] bool: the *target* is one of the answer's tokens, EOS included
    mask: Array  # [B 2 T] bool: the target is real, of the prompt or of the answer
    ref_logprobs: Array  # [B 2] float32: sums over the answer under the reference, in nats; 0 where none is used
    margin: Array  # [B] float32: how much better the chosen answer is (0 when not said)
    counts: Array  # [B] bool: False for rows that only fill a batch


class Answers(NamedTuple):
    """Complete sequences of which the answer counts."""

    tokens: Array  # [B T+1] int32, right-padded
    loss_mask: Array  # [B T] bool: the *target* is one of the answer's tokens, EOS included
    mask: Array  # [B T] bool: the target is real, of the prompt or of the answer
    ref_logprobs: Array  # [B] float32: sums over the answer under the reference, in nats


class KtoBatch(NamedTuple):
    """Answers that people called good or bad, and to each prompt an answer of another one."""

    answers: Answers
    mismatched: Answers  # the same prompts with answers to others: what the KL baseline is measured on
    desirable: Array  # [B] bool
    counts: Array  # [B] bool: False for rows that only fill a batch


class ClassBatch(NamedTuple):
    """Complete sequences (prompt + response + EOS) and the class that people gave each."""

    tokens: Array  # [B T] int32
    mask: Array  # [B T] bool: real tokens
    labels: Array  # [B] int32: the class, any integer where `counts` is False
    counts: Array  # [B] bool: False for rows that only fill a batch


class PromptBatch(NamedTuple):
    """Left-padded prompts. `row_ids` are global: a sample's noise depends on them, never on the batch's layout."""

    tokens: Array  # [B P] int32
    mask: Array  # [B P] bool
    row_ids: Array  # [B] int32


class Generation(NamedTuple):
    """What a sampler wrote. `logprobs` are those of the untruncated distribution at the sampling temperature."""

    tokens: Array  # [B R] int32
    mask: Array  # [B R] bool: up to and including the first EOS
    logprobs: Array  # [B R] float32
    prompts: Array  # [B P] int32
    prompt_mask: Array  # [B P] bool


class Rollout(NamedTuple):
    """Everything a PPO update needs, fixed before its first optimiser step."""

    prompts: Array  # [B P] int32, left-padded
    prompt_mask: Array  # [B P] bool
    responses: Array  # [B R] int32
    mask: Array  # [B R] bool: response tokens up to and including the first EOS
    sampled_logprobs: Array  # [B R] float32: as the sampler computed them
    old_logprobs: Array  # [B R] float32: recomputed by the update's own forward pass
    ref_logprobs: Array  # [B R] float32
    values: Array  # [B R] float32
    rewards: Array  # [B R] float32: after the KL term
    advantages: Array  # [B R] float32: whitened when configured
    returns: Array  # [B R] float32
    scores: Array  # [B] float32: what the reward said, normalised and after the rules on length and EOS
    raw_scores: Array  # [B] float32: what the reward said
    ended: Array  # [B] bool: the response holds an EOS


def split_rows(tree, parts: int):
    """Splits every leaf [B ...] into [parts, B/parts, ...]; part i holds rows i, i+parts, ...

    The strided order keeps the rows of one device on that device when B is sharded in contiguous blocks.
    """

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def leaf_name(path) -> str:
    """A tree path as "layers/attention/q": what the regex tables of sharding and optimisers match on."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(fn, tree, *rest):
    """`jax.tree.map` whose function also gets each leaf's name: fn(name, leaf, *others)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(leaf_name(path), *leaves), tree, *rest)
