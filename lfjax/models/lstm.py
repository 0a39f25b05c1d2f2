"""A recurrent language model with the transformer's interface: layers of long short-term memory.

Parameters are stacked over layers. A row's memory passes padding untouched on any side, and starts anew where a
document does, so that packed rows are separate texts, as for attention.

Notation: B batch, T positions, V vocabulary (Vp padded), D width of embeddings, memories and outputs, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lfjax.models import blocks
from lfjax.models.network import Network, NetworkConfig, gathered, head_parameters

UNBOUNDED = 2**31 - 1  # positions: a memory has no end


@dataclasses.dataclass(frozen=True)
class LSTMConfig(NetworkConfig):
    """The sizes of an LSTM language model; the other fields are as in `TransformerConfig`.

    Raises:
      InputError: a size below 1, or a dropout outside [0, 1).
    """

    vocab_size: int
    width: int
    layers: int
    tied: bool = True
    num_labels: int = 0
    head_bias: bool = False
    dropout: float = 0.0  # on embeddings and between layers, not on the memory (Zaremba et al. 2014, arXiv:1409.2329)
    dtype: str = "float32"  # of the matmuls; memories are float32
    vocab_multiple: int = 1
    context: int = UNBOUNDED
    logit_softcap: float = 0.0

    def __post_init__(self):
        self.check_sizes("vocab_size", "width", "layers")

    @property
    def init_std(self) -> float:
        """Standard deviation of fresh matrices."""
        return self.width**-0.5

    def parameters(self) -> dict:
        """Every parameter as {group: {name: (shape, init)}}; the gates are in the order input, forget, cell, output."""
        D, L, std = self.width, self.layers, self.init_std
        layers = {"input": ((L, D, 4 * D), std), "recurrent": ((L, D, 4 * D), std), "bias": ((L, 4 * D), "zeros")}
        table = {"embed": {"tokens": ((self.padded_vocab, D), std)}, "layers": {"lstm": layers}}
        return table | head_parameters(self)

    def build(self, **attributes) -> LSTM:
        """The model of these sizes."""
        return LSTM(self, **attributes)


class Memory(NamedTuple):
    """What an LSTM remembers of a row: its cache."""

    hidden: Array  # [L B D] float32: each layer's last output
    cell: Array  # [L B D] float32


class LSTM(Network):
    """Embeddings, LSTM layers, and logits or scores; positions and token types say nothing to it.

    Source: Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000, started open by a constant 1 in the gate.
    """

    config: LSTMConfig

    def init_cache(self, batch: int, cache_size: int) -> Memory:
        """An empty memory for `batch` rows; it has one size, whatever `cache_size`."""
        empty = jnp.zeros((self.config.layers, batch, self.config.width), jnp.float32)
        return Memory(empty, empty)

    def decoder(self, params) -> LSTMDecoder:
        """Token-by-token use of `params`."""
        return LSTMDecoder(self, {**params, **gathered(params, self.constrain)})

    def _finish(self, x: Array) -> Array:
        return x.astype(self.config.dtype)

    def _trunk(self, tokens, attention_mask, positions, segment_ids, token_type_ids) -> Array:
        c = self.config
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        starts = None
        if segment_ids is not None:
            real &= segment_ids != 0
            starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        rng = self.make_rng("dropout") if c.dropout > 0.0 and self.has_rng("dropout") else None
        keys = [None] * (c.layers + 1) if rng is None else list(jax.random.split(rng, c.layers + 1))
        params = gathered(self._params(), self.constrain)
        empty = self.init_cache(tokens.shape[0], 0)
        return run(c, params, tokens, empty, real, starts=starts, keys=keys, constrain=self.constrain)[0]


@dataclasses.dataclass(frozen=True)
class LSTMDecoder:
    """An LSTM's parameters for decoding, as `transformer.Decoder`."""

    model: LSTM
    params: dict

    def prefill(self, tokens: Array, attention_mask: Array, cache_size: int) -> tuple[Array, Memory]:
        """Runs prompts [B P] with mask [B P], padded on any side; returns hidden [B P D] and the memory after them."""
        empty = self.model.init_cache(tokens.shape[0], cache_size)
        return self._run(tokens, empty, attention_mask.astype(bool))

    def decode(self, tokens: Array, cache: Memory) -> tuple[Array, Memory]:
        """Runs one token a row, tokens [B 1]; returns hidden [B 1 D] and the memory after it."""
        return self._run(tokens, cache, jnp.ones(tokens.shape, bool))

    def logits(self, hidden: Array) -> Array:
        """hidden [... D] -> logits [... V] float32."""
        return self.model.logits(self.params, hidden, "next_logits", "rows")

    def _run(self, tokens, memory, real) -> tuple[Array, Memory]:
        x, memory = run(self.model.config, self.params, tokens, memory, real, constrain=self.model.constrain)
        return x.astype(self.model.config.dtype), memory


def run(
    config: LSTMConfig,
    params: dict,
    tokens: Array,
    memory: Memory,
    real: Array,
    *,
    starts: Array | None = None,
    keys: list | None = None,
    constrain: Callable,
) -> tuple[Array, Memory]:
    """Tokens [B T] through all layers: outputs [B T D] in the compute dtype, and the memory after the last position.

    Args:
      memory: before the first position. real: [B T] bool; where False the memory stays (the output is the old one's).
      starts: [B T] bool, where a document starts: the memory is emptied before. keys: of dropout, layers + 1, or None.
    """
    c = config
    keys = keys or [None] * (c.layers + 1)
    x = jnp.take(params["embed"]["tokens"], tokens, axis=0, mode="clip").astype(c.dtype)
    x = constrain(blocks.dropout(x, keys[-1], c.dropout), "residual")
    hidden, cell = [], []
    stacks = {name: constrain(leaf, f"layers/lstm/{name}") for name, leaf in params["layers"]["lstm"].items()}
    for index in range(c.layers):
        weights = {name: leaf[index] for name, leaf in stacks.items()}
        before = (memory.hidden[index], memory.cell[index])
        x, (h, s) = layer(weights, blocks.dropout(x, keys[index] if index else None, c.dropout), before, real, starts)
        x = constrain(x, "residual")
        hidden.append(h)
        cell.append(s)
    return x, Memory(jnp.stack(hidden), jnp.stack(cell))


def layer(weights: dict, x: Array, before: tuple[Array, Array], real: Array, starts: Array | None):
    """One layer: x [B T D], (output, cell) before, each [B D] float32 -> outputs [B T D] in x's dtype, and both after.

    The products with the inputs are one matmul for all positions; only the recurrent one is inside the scan.
    """
    inputs = blocks.matmul(x, weights["input"]) + weights["bias"].astype(x.dtype)[None, None, :]
    recurrent = weights["recurrent"].astype(x.dtype)
    keep = jnp.ones_like(real) if starts is None else ~starts

    def step(state, at):
        pre, counts, kept = at  # [B 4D], [B], [B]
        h, s = (jnp.where(kept[:, None], part, 0.0) for part in state)
        gates = pre.astype(jnp.float32) + jnp.matmul(h.astype(x.dtype), recurrent).astype(jnp.float32)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        new_s = jax.nn.sigmoid(f + 1.0) * s + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_h = jax.nn.sigmoid(o) * jnp.tanh(new_s)
        state = tuple(jnp.where(counts[:, None], new, old) for new, old in ((new_h, h), (new_s, s)))
        return state, state[0].astype(x.dtype)

    state, outputs = jax.lax.scan(step, before, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (inputs, real, keep)))
    return jnp.moveaxis(outputs, 0, 1), state
