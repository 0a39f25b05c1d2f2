"""What the models here have in common: parameters from a table, logits or scores from hidden states.

Notation: B batch, T positions, V vocabulary (Vp padded), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lfjax.config import InputError
from lfjax.losses.lm import Unembed
from lfjax.masking import last_true_index
from lfjax.models import heads


def initialise(key: Array, group: dict) -> dict:
    """Draws one group of a model's parameters, float32."""
    is_entry = lambda x: isinstance(x, tuple)  # noqa: E731
    entries, structure = jax.tree.flatten(group, is_leaf=is_entry)
    draws = []
    for index, (shape, init) in enumerate(entries):
        if isinstance(init, str):
            draws.append(jnp.full(shape, 1.0 if init == "ones" else 0.0, jnp.float32))
        else:
            draws.append(init * jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))
    return jax.tree.unflatten(structure, draws)


def head_parameters(config) -> dict:
    """The table's groups of what hidden states become: "head" of scores, "unembed" where untied, or none."""
    if config.num_labels > 0:
        bias = {"bias": ((config.num_labels,), "zeros")} if config.head_bias else {}
        return {"head": {"kernel": ((config.width, config.num_labels), (config.width + 1) ** -0.5)} | bias}
    if config.tied:
        return {}
    return {"unembed": {"kernel": ((config.width, config.padded_vocab), config.init_std)}}


def _unconstrained(x: Array, name: str) -> Array:
    return x


class NetworkConfig:
    """What the forms, frozen dataclasses with these fields among theirs, have in common."""

    vocab_size: int
    vocab_multiple: int
    dropout: float

    def check_sizes(self, *names: str) -> None:
        """Raises InputError where a field of these names is below 1, or the dropout outside [0, 1)."""
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: found {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout: found {self.dropout}; it must be in [0, 1)")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Network(nn.Module):
    """A language model, or with `num_labels` > 0 a model of scores (reward, value, class), whatever its trunk.

    A subclass has `_trunk(tokens, attention_mask, positions, segment_ids, token_type_ids) -> [B T D]` and
    `_finish([... D]) -> [... D]`, and to sample from `decoder(params)` and `init_cache(batch, cache_size)`.

    Attributes:
      config: the form. `parameters()` gives {group: {name: (shape, init)}}, `build(...)` the model; `vocab_size`,
        `padded_vocab`, `width`, `context`, `tied`, `num_labels`, `dropout` and `logit_softcap` are read here and by
        the loops.
      constrain: `f(x, name) -> x`, where a sharding can be put.
    """

    config: Any
    constrain: Callable = _unconstrained

    def setup(self):
        """Declares the parameters, one group of `config.parameters()` at a time."""
        for group, entries in self.config.parameters().items():
            setattr(self, f"_{group}", self.param(group, initialise, entries))

    def __call__(self, tokens, attention_mask=None, positions=None, segment_ids=None, token_type_ids=None) -> Array:
        """Logits [B T V] float32, or with num_labels > 0 scores [B num_labels] at each row's last real token."""
        hidden = self._trunk(tokens, attention_mask, positions, segment_ids, token_type_ids)
        if self.config.num_labels == 0:
            return self.logits(self._params(), self._finish(hidden), "logits")
        if attention_mask is None and segment_ids is not None:
            attention_mask = segment_ids != 0
        if attention_mask is None:
            pooled = hidden[:, -1]
        else:
            last = last_true_index(attention_mask.astype(bool))
            pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return heads.scores(self._finish(pooled), self._head)

    def hidden(self, tokens, attention_mask=None, positions=None, segment_ids=None, token_type_ids=None) -> Array:
        """Final hidden states after the last norm: [B T D] in the compute dtype."""
        return self._finish(self._trunk(tokens, attention_mask, positions, segment_ids, token_type_ids))

    def values(self, tokens, attention_mask=None, positions=None, segment_ids=None, token_type_ids=None) -> Array:
        """Scores of every position: [B T num_labels] float32."""
        hidden = self.hidden(tokens, attention_mask, positions, segment_ids, token_type_ids)
        return heads.scores(hidden, self._head)

    def prefill(self, tokens, attention_mask, cache_size: int) -> tuple[Array, Any]:
        """`hidden` of left-padded prompts [B P], and a cache of `cache_size` slots holding them."""
        return self.decoder(self._params()).prefill(tokens, attention_mask, cache_size)

    def decode(self, tokens, cache) -> tuple[Array, Any]:
        """`hidden` [B 1 D] of one more token a row, tokens [B 1], and the cache with it."""
        return self.decoder(self._params()).decode(tokens, cache)

    @nn.nowrap
    def unembed(self, params) -> Unembed:
        """The map from `hidden` to logits, for chunked losses; a plain method: `model.unembed(params)`."""
        c = self.config
        params = gathered(params, self.constrain)
        weight = params["embed"]["tokens"].T if c.tied else params["unembed"]["kernel"]
        vocab_size = c.vocab_size if c.padded_vocab != c.vocab_size else None
        return Unembed(weight, softcap=c.logit_softcap or None, vocab_size=vocab_size)

    @nn.nowrap
    def logits(self, params, hidden: Array, *names: str) -> Array:
        """hidden [... D] -> logits [... V] float32, constrained under `names` while their padding is still there."""
        logits = heads.vocabulary_logits(hidden, self.unembed(params)._replace(vocab_size=None))
        for name in names:
            logits = self.constrain(logits, name)
        return logits[..., : self.config.vocab_size]

    @nn.nowrap
    def _params(self) -> dict:
        return {group: getattr(self, f"_{group}") for group in self.config.parameters()}


def gathered(params: dict, constrain: Callable) -> dict:
    """`params` with the tables of "embed" and "unembed" constrained under their paths: once, before what reads them."""
    groups = {group: params[group] for group in ("embed", "unembed") if group in params}
    tables = {group: {n: constrain(x, f"{group}/{n}") for n, x in of.items()} for group, of in groups.items()}
    return {**params, **tables}
