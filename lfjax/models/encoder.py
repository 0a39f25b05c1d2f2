"""BERT and RoBERTa: an encoder that reads a whole text at once, and heads that say a score or class of it.

Notation: B batch, T positions, V vocabulary (Vp padded), D width, F mlp width, N heads, H head dim, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lfjax.config import InputError
from lfjax.models import attention, blocks, heads
from lfjax.models.network import Network, NetworkConfig, gathered
from lfjax.models.transformer import CHOICES, default_positions, run_layers


@dataclasses.dataclass(frozen=True)
class EncoderConfig(NetworkConfig):
    """The form of an encoder: learned positions, LayerNorm after each branch, biases everywhere.

    Raises:
      InputError: a field holds what it may not, or two fields do not fit together.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int = 0  # 0: 4 * width
    position_rows: int = 512  # rows of the position table
    first_position: int = 0  # row of the first token (RoBERTa: 2)
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    num_labels: int = 0  # 0: the trunk alone, which gives no logits
    pooler: bool = True  # a head reads tanh(dense(first token)), one score a text; False: every token
    dropout: float = 0.0  # on embeddings and on both residual branches; in steps of 1/256
    dtype: str = "float32"  # of activations and matmuls; parameters, norms, softmax and scores are float32
    remat: str = "none"  # as TransformerConfig
    unroll: int = 0
    vocab_multiple: int = 1
    init_std: float = 0.02

    def __post_init__(self):
        if self.mlp_width == 0:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        for name in ("activation", "dtype", "remat"):
            if getattr(self, name) not in CHOICES[name]:
                raise InputError(f"model.{name}: found {getattr(self, name)!r}; allowed: {', '.join(CHOICES[name])}")
        self.check_sizes("vocab_size", "width", "layers", "heads", "mlp_width", "token_types", "context")
        if self.width % self.heads:
            raise InputError(f"model.heads: found {self.heads}; it must divide model.width = {self.width}")
        if self.first_position < 0:
            raise InputError(f"model.first_position: found {self.first_position}; it must be at least 0")

    def parameters(self) -> dict:
        """`parameter_table` of this form."""
        return parameter_table(self)

    def build(self, **attributes) -> Encoder:
        """The model of this form."""
        return Encoder(self, **attributes)

    @property
    def context(self) -> int:
        """Most tokens of one text."""
        return self.position_rows - self.first_position

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """No layer has a window."""
        return (False,) * self.layers


def parameter_table(config: EncoderConfig) -> dict:
    """Every parameter as {group: {name: (shape, init)}}, `init` a normal's standard deviation, or "zeros" or "ones"."""
    c, D, L, F, std = config, config.width, config.layers, config.mlp_width, config.init_std
    N, H = c.heads, c.width // c.heads
    norm = {"scale": ((D,), "ones"), "bias": ((D,), "zeros")}
    layer_norm = {name: ((L, D), init) for name, (_, init) in norm.items()}
    attend = {name: ((L, D, N, H), std) for name in "qkv"} | {"o": ((L, N, H, D), std)}
    attend |= {f"{name}_bias": ((L, N, H), "zeros") for name in "qkv"} | {"o_bias": ((L, D), "zeros")}
    mlp = {"up": ((L, D, F), std), "down": ((L, F, D), std)}
    mlp |= {"up_bias": ((L, F), "zeros"), "down_bias": ((L, D), "zeros")}
    tables = {"tokens": c.padded_vocab, "positions": c.position_rows, "token_types": c.token_types}
    table = {"embed": {name: ((rows, D), std) for name, rows in tables.items()}, "norm": norm}
    table["layers"] = {"attention": attend, "norm1": layer_norm, "mlp": mlp, "norm2": layer_norm}
    if c.pooler:
        table["pooler"] = {"kernel": ((D, D), std), "bias": ((D,), "zeros")}
    if c.num_labels:
        table["head"] = {
            "kernel": ((D, c.num_labels), (D + 1) ** -0.5),
            "bias": ((c.num_labels,), "zeros"),
        }
    return table


class Encoder(Network):
    """Scores of whole texts, or with `pooler` False of their tokens. Inputs as `Transformer`'s, whatever the padding.

    Every token sees all tokens of its text. With a pooler the text's one score is read at its first real token, and
    `values` gives it at every position: it is "the score at the last token" too, and a reward step's every_token loss
    is its regression loss, weighted by length. Without, `model.apply` reads the last real token, as a decoder's.
    Positions count real tokens from 0, as everywhere here; RoBERTa's rows begin at `first_position`.

    Attributes:
      config: the form.
      attend: `f(q, k, v, *, key_mask, segment_ids, causal) -> [B N T H]`.
    Source: Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.
    """

    config: EncoderConfig
    attend: Callable = attention.attend

    def __call__(self, tokens, attention_mask=None, positions=None, segment_ids=None, token_type_ids=None) -> Array:
        """Scores [B num_labels] float32 of whole texts.

        Raises:
          InputError: the trunk has no head.
        """
        c = self.config
        if c.num_labels == 0:
            self._no_language_model()
        if not c.pooler:
            return super().__call__(tokens, attention_mask, positions, segment_ids, token_type_ids)
        x = self._trunk(tokens, attention_mask, positions, segment_ids, token_type_ids)
        if attention_mask is None and segment_ids is not None:
            attention_mask = segment_ids != 0
        if attention_mask is None:
            first = x[:, :1]
        else:
            index = jnp.argmax(attention_mask.astype(bool), axis=1)
            first = jnp.take_along_axis(x, index[:, None, None], axis=1)
        pooled = blocks.matmul(first, self._pooler["kernel"]) + self._pooler["bias"].astype(x.dtype)[None, None]
        return heads.scores(jnp.tanh(pooled[:, 0]), self._head)

    def values(self, tokens, attention_mask=None, positions=None, segment_ids=None, token_type_ids=None) -> Array:
        """Scores [B T num_labels] float32 of every position; with a pooler all of a row are the text's."""
        inputs = (tokens, attention_mask, positions, segment_ids, token_type_ids)
        if not self.config.pooler:
            return super().values(*inputs)
        scores = self(*inputs)[:, None]
        return jnp.broadcast_to(scores, (scores.shape[0], tokens.shape[1], scores.shape[2]))

    @nn.nowrap
    def unembed(self, params) -> NoReturn:
        """Raises InputError: there is no map to logits."""
        self._no_language_model()

    @nn.nowrap
    def _no_language_model(self) -> NoReturn:
        raise InputError("an encoder without a head gives no logits: it is no language model; give it labels to score")

    @nn.nowrap
    def _finish(self, x: Array) -> Array:
        return x

    @nn.nowrap
    def _trunk(self, tokens, attention_mask, positions, segment_ids, token_type_ids) -> Array:
        """Hidden states after the last layer, [B T D]."""
        c, tables = self.config, gathered(self._params(), self.constrain)["embed"]
        key_mask = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None and segment_ids is None and tokens.shape[1] > c.context:
            raise InputError(f"model.context: found {c.context}; the input has {tokens.shape[1]} positions")
        if positions is None:
            positions = default_positions(tokens.shape[1], key_mask, segment_ids)
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        rows = {"tokens": tokens, "positions": positions + c.first_position, "token_types": types}
        words, places, kinds = (jnp.take(tables[n], index, axis=0, mode="clip") for n, index in rows.items())
        x = blocks.normalise(words + places + kinds, self._norm, "layernorm", c.norm_eps).astype(c.dtype)
        rng = self.make_rng("dropout") if c.dropout > 0.0 and self.has_rng("dropout") else None
        keys = None if rng is None else jax.random.split(rng, 2 * c.layers + 1)
        x = self.constrain(blocks.dropout(x, None if keys is None else keys[-1], c.dropout), "residual")

        def layer(x, params, layer_keys, _):
            def mix(q, k, v):
                return self.attend(q, k, v, key_mask=key_mask, segment_ids=segment_ids, causal=False)

            return block(c, params, x, mix, self.constrain, layer_keys)

        layer_keys = None if keys is None else keys[:-1].reshape(c.layers, 2, *keys.shape[1:])
        return run_layers(c, layer, x, self._layers, layer_keys)


def block(config: EncoderConfig, params: dict, x: Array, mix: Callable, constrain, keys=None) -> Array:
    """One post-norm layer, x = norm1(x + attention(x)) then norm2(x + mlp(x)): [B T D] -> [B T D]."""
    c, weights = config, params["attention"]

    def add(x, branch, index):
        branch = blocks.dropout(branch, None if keys is None else keys[index], c.dropout)
        total = blocks.normalise(x + branch, params[f"norm{index + 1}"], "layernorm", c.norm_eps)
        return constrain(total.astype(x.dtype), "residual")

    q, k, v = (constrain(blocks.project_heads(x, weights[name], weights[f"{name}_bias"]), "heads") for name in "qkv")
    x = add(x, blocks.merge_heads(constrain(mix(q, k, v), "heads"), weights["o"], weights["o_bias"]), 0)
    return add(x, blocks.feed_forward(x, params["mlp"], c.activation, constrain), 1)
