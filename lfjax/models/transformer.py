"""One decoder-only transformer with switches for the forms of GPT-2, GPT-NeoX, Llama, Mistral, Qwen and Gemma.

Parameters are stacked over layers; the layers run unrolled, scanned or in between, and decoding goes through them with
one cache array a layer. The functions below the module are pure: the module declares parameters and calls them.

Notation: B batch, T positions, S cache slots, V vocabulary (Vp padded), D width, F mlp width, N heads, K kv heads,
H head dim, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lfjax.config import InputError
from lfjax.models import attention, blocks
from lfjax.models.network import Network, NetworkConfig, gathered, head_parameters

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
CHOICES = {
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_plus_one"),
    "activation": tuple(blocks.ACTIVATIONS),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", *REMAT_POLICIES),
}
ROPE_SCALINGS = {"linear": 2, "llama3": 5}  # how many entries `rope_scaling` has


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """The switches of a decoder. `lfjax.models.presets` has the usual combinations.

    Raises:
      InputError: a field holds what it may not, or two fields do not fit together.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    mlp_width: int = 0  # 0: 4 * width
    context: int = 1024  # most positions of one document
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # see `attention.rope_frequencies`
    rope_share: float = 1.0  # leading share of each head that is rotated
    window: int = 0  # so many keys a query sees, its own included; 0: all before it
    windowed: tuple[bool, ...] = ()  # which layers have the window; (): all
    window_theta: float = 0.0  # rope_theta of those layers, unscaled; 0: rotated as the others
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    qk_norm: bool = False  # also of every head's queries and keys, before they are rotated
    post_norm: bool = False  # also of what attention and mlp give, before it is added
    parallel: bool = False  # attention and mlp read the same residual stream
    activation: str = "gelu_tanh"
    gated: bool = False
    attention_bias: bool = True
    output_bias: bool = True  # with attention_bias: the output projection has one as well
    mlp_bias: bool = True
    query_scalar: float = 0.0  # scores are divided by its root; 0: head_dim
    attention_softcap: float = 0.0  # scores become cap * tanh(scores / cap); 0: they stay
    logit_softcap: float = 0.0  # the same of logits
    scale_embedding: bool = False  # token embeddings times the root of width
    tied: bool = True
    num_labels: int = 0  # 0: a language model; otherwise scores in place of logits
    head_bias: bool = False
    dropout: float = 0.0  # on embeddings and on both residual branches; in steps of 1/256
    dtype: str = "float32"  # of activations and matmuls; parameters, norms, softmax and logits are float32
    remat: str = "none"  # "full": recompute each layer; "dots": keep matmuls with weights
    unroll: int = 0  # 0: all layers in line; n: a scan over layers, n of them in line
    vocab_multiple: int = 1  # rows of the embedding are padded to a multiple of it
    init_std: float = 0.02

    def __post_init__(self):
        derived = {"kv_heads": self.heads, "head_dim": self.width // max(self.heads, 1), "mlp_width": 4 * self.width}
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"model.{name}: found {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        self.check_sizes("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "context")
        if self.heads % self.kv_heads:
            raise InputError(f"model.kv_heads: found {self.kv_heads}; it must divide model.heads = {self.heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"model.head_dim: found {self.head_dim}; rotary positions need an even number")
        if not 0.0 < self.rope_share <= 1.0 or (self.position == "rope" and int(self.head_dim * self.rope_share) < 1):
            raise InputError(f"model.rope_share: found {self.rope_share}; it must be in (0, 1] and rotate something")
        scaling = self.rope_scaling
        if scaling and len(scaling) != ROPE_SCALINGS.get(scaling[0]):
            raise InputError(f"model.rope_scaling: found {scaling}; 'linear' takes one number, 'llama3' four")
        if self.windowed and (len(self.windowed) != self.layers or (any(self.windowed) and self.window < 1)):
            raise InputError(
                f"model.windowed: found {self.windowed}, window {self.window}; give true or false for each of"
                f" {self.layers} layers, and a window of at least 1 where one is true"
            )

    def parameters(self) -> dict:
        """`parameter_table` of this form."""
        return parameter_table(self)

    def build(self, **attributes) -> Transformer:
        """The model of this form."""
        return Transformer(self, **attributes)

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it has the window."""
        return self.windowed or (self.window > 0,) * self.layers


class Cache(NamedTuple):
    """Keys and values of the positions seen so far. All rows write to the same slot, so prompts are left-padded."""

    keys: tuple[Array, ...]  # one [B K S H] a layer
    values: tuple[Array, ...]  # one [B K S H] a layer
    mask: Array  # [B S] bool: slots that hold a token
    positions: Array  # [B] int32: position of the row's next token
    slot: Array  # [] int32: where the next token goes


def parameter_table(config: TransformerConfig) -> dict:
    """Every parameter as {group: {name: (shape, init)}}, `init` a normal's standard deviation, or "zeros" or "ones"."""
    c, D, L, std = config, config.width, (config.layers,), config.init_std
    residual_std = std / (2 * c.layers) ** 0.5  # GPT-2: the sum of 2 L branches keeps its scale
    N, K, H, F = c.heads, c.kv_heads, c.head_dim, c.mlp_width
    unit = "zeros" if c.norm == "rmsnorm_plus_one" else "ones"
    norm = {"scale": ((D,), unit)} | ({"bias": ((D,), "zeros")} if c.norm == "layernorm" else {})
    layer_norm = {name: ((*L, *shape), init) for name, (shape, init) in norm.items()}
    attend = {"q": ((*L, D, N, H), std), "k": ((*L, D, K, H), std), "v": ((*L, D, K, H), std)}
    attend["o"] = ((*L, N, H, D), residual_std)
    mlp = {"up": ((*L, D, F), std), "down": ((*L, F, D), residual_std)} | (
        {"gate": ((*L, D, F), std)} if c.gated else {}
    )
    if c.attention_bias:
        shapes = {"q": (N, H), "k": (K, H), "v": (K, H)} | ({"o": (D,)} if c.output_bias else {})
        attend |= {f"{name}_bias": ((*L, *shape), "zeros") for name, shape in shapes.items()}
    if c.qk_norm:
        attend |= {f"{name}_norm": {part: ((*L, H), init) for part, (_, init) in norm.items()} for name in "qk"}
    if c.mlp_bias:
        mlp |= {f"{name}_bias": ((*L, D if name == "down" else F), "zeros") for name in tuple(mlp)}
    embed = {"tokens": ((c.padded_vocab, D), std)}
    if c.position == "learned":
        embed["positions"] = ((c.context, D), std)
    table = {"embed": embed, "final_norm": norm}
    table["layers"] = {"norm1": layer_norm, "attention": attend, "norm2": layer_norm, "mlp": mlp}
    if c.post_norm:
        table["layers"] |= {"post_norm1": layer_norm, "post_norm2": layer_norm}
    return table | head_parameters(c)


class Transformer(Network):
    """A causal language model, or with `num_labels` > 0 a model of scores (reward, value, class) on the same trunk.

    `model.apply({"params": params}, tokens, ...)`; dropout acts iff `rngs={"dropout": key}` is passed. Inputs of all
    methods: tokens [B T] (any ids where padded), attention_mask [B T] True on real tokens (any padding side), positions
    [B T] (None: counted over real tokens, from 0 in each segment), segment_ids [B T] (0 padding, else one number a
    document; tokens see their own document alone).

    Attributes:
      config: the switches.
      attend: `f(q, k, v, *, key_mask, segment_ids, window, softcap) -> [B N T H]`, causal, for full forward passes.
      constrain: `f(x, name) -> x`, where a sharding can be put: names "residual" [B T D], "heads" [B N T H],
        "mlp" [B T F], "logits" [B T Vp], a sampler's "next_logits" and then "rows" [B Vp]; and the paths of
        the tables ("embed/tokens", "embed/positions", "unembed/kernel") as they are used.
    """

    config: TransformerConfig
    attend: Callable = attention.attend

    def setup(self):
        """As `Network.setup`, with the low-rank changes of the layers' matrices where there are (lfjax.models.lora)."""
        super().setup()
        if self.has_variable("adapted", "layers"):
            self._layers = self.get_variable("adapted", "layers")

    @nn.nowrap
    def init_cache(self, batch: int, cache_size: int) -> Cache:
        """An empty cache for `batch` rows of `cache_size` tokens."""
        c = self.config
        empty = jnp.zeros((batch, c.kv_heads, cache_size, c.head_dim), c.dtype)
        mask = jnp.zeros((batch, cache_size), bool)
        return Cache((empty,) * c.layers, (empty,) * c.layers, mask, jnp.zeros(batch, jnp.int32), jnp.int32(0))

    @nn.nowrap
    def decoder(self, params) -> Decoder:
        """Token-by-token use of `params`, split to layers once; a plain method: `model.decoder(params)`."""
        layers = split_layers(params["layers"], self.config.layers)
        return Decoder(self, {**gathered(params, self.constrain), "layers": layers})

    @nn.nowrap
    def _finish(self, x: Array) -> Array:
        c = self.config
        return blocks.normalise(x, self._final_norm, c.norm, c.norm_eps).astype(c.dtype)

    @nn.nowrap
    def _trunk(self, tokens, attention_mask, positions, segment_ids, token_type_ids) -> Array:
        """Residual stream after the last layer, [B T D]."""
        c = self.config
        key_mask = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None and segment_ids is None and c.position == "learned" and tokens.shape[1] > c.context:
            raise InputError(f"model.context: found {c.context}; the input has {tokens.shape[1]} positions")
        if positions is None:
            positions = default_positions(tokens.shape[1], key_mask, segment_ids)
        x = embed(c, gathered(self._params(), self.constrain)["embed"], tokens, positions, token_type_ids)
        rng = self.make_rng("dropout") if c.dropout > 0.0 and self.has_rng("dropout") else None
        keys = None if rng is None else jax.random.split(rng, 2 * c.layers + 1)
        x = self.constrain(blocks.dropout(x, None if keys is None else keys[-1], c.dropout), "residual")
        ropes = rope_tables(c, positions)

        def layer(x, params, layer_keys, windowed):
            limits = attention_limits(c, windowed)

            def mix(q, k, v):
                return self.attend(q, k, v, key_mask=key_mask, segment_ids=segment_ids, **limits)

            return block(c, params, x, mix, rope_of(ropes, windowed), self.constrain, layer_keys)

        layer_keys = None if keys is None else keys[:-1].reshape(c.layers, 2, *keys.shape[1:])
        return run_layers(c, layer, x, self._layers, layer_keys)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A transformer's parameters made ready for decoding: `params` with its layers as a tuple of per-layer arrays."""

    model: Transformer
    params: dict

    def prefill(self, tokens: Array, attention_mask: Array, cache_size: int) -> tuple[Array, Cache]:
        """Runs left-padded prompts [B P] with mask [B P]; returns hidden [B P D] and a cache of `cache_size` slots."""
        c = self.model.config
        mask = attention_mask.astype(bool)
        positions = default_positions(tokens.shape[1], mask, None)
        x = embed(c, self.params["embed"], tokens, positions)
        ropes = rope_tables(c, positions)
        room = ((0, 0), (0, 0), (0, cache_size - tokens.shape[1]), (0, 0))
        caches = []
        for layer, windowed in zip(self.params["layers"], c.window_layers, strict=True):

            def mix(q, k, v, windowed=windowed):
                caches.append((jnp.pad(k, room), jnp.pad(v, room)))
                return self.model.attend(q, k, v, key_mask=mask, segment_ids=None, **attention_limits(c, windowed))

            x = block(c, layer, x, mix, rope_of(ropes, windowed), self.model.constrain)
        keys, values = zip(*caches, strict=True)
        slots = jnp.pad(mask, ((0, 0), (0, cache_size - tokens.shape[1])))
        count = jnp.sum(mask, axis=1, dtype=jnp.int32)
        return self._finish(x), Cache(keys, values, slots, count, jnp.int32(tokens.shape[1]))

    def decode(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Runs one token a row, tokens [B 1], against the cache; returns hidden [B 1 D] and the longer cache."""
        c = self.model.config
        positions = cache.positions[:, None]
        x = embed(c, self.params["embed"], tokens, positions)
        ropes = rope_tables(c, positions)
        mask = jax.lax.dynamic_update_slice(cache.mask, jnp.ones((tokens.shape[0], 1), bool), (0, cache.slot))
        near = mask & (jnp.arange(mask.shape[1]) > cache.slot - c.window)[None] if c.window else mask
        caches = []
        for index, (layer, windowed) in enumerate(zip(self.params["layers"], c.window_layers, strict=True)):

            def mix(q, k, v, index=index, seen=near if windowed else mask):
                keys = jax.lax.dynamic_update_slice(cache.keys[index], k, (0, 0, cache.slot, 0))
                values = jax.lax.dynamic_update_slice(cache.values[index], v, (0, 0, cache.slot, 0))
                caches.append((keys, values))
                return attention.attend_cached(q, keys, values, seen, c.attention_softcap)

            x = block(c, layer, x, mix, rope_of(ropes, windowed), self.model.constrain)
        keys, values = zip(*caches, strict=True)
        return self._finish(x), Cache(keys, values, mask, cache.positions + 1, cache.slot + 1)

    def logits(self, hidden: Array) -> Array:
        """hidden [... D] -> logits [... V] float32."""
        return self.model.logits(self.params, hidden, "next_logits", "rows")

    def _finish(self, x: Array) -> Array:
        c = self.model.config
        return blocks.normalise(x, self.params["final_norm"], c.norm, c.norm_eps).astype(c.dtype)


def default_positions(length: int, mask: Array | None, segment_ids: Array | None) -> Array:
    """Positions counted over real tokens, from 0 in each run of equal segment ids: [B T] int32, or [1 T] without masks.

    With left or right padding alone this is max(cumsum(mask) - 1, 0).
    """
    if segment_ids is None:
        if mask is None:
            return jnp.arange(length, dtype=jnp.int32)[None]
        return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    real = segment_ids != 0 if mask is None else mask & (segment_ids != 0)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.maximum(count - jax.lax.cummax(jnp.where(starts, count - real, 0), axis=1) - 1, 0)


def embed(config: TransformerConfig, params: dict, tokens: Array, positions: Array, token_type_ids=None) -> Array:
    """Token (+ learned position, + token type through the token table, as GPT-2) embeddings: [B T D], compute dtype."""
    x = jnp.take(params["tokens"], tokens, axis=0, mode="clip")
    if config.scale_embedding:  # the factor is rounded to the compute dtype, as Gemma was trained
        x = x.astype(config.dtype) * jnp.asarray(config.width**0.5, config.dtype)
    if token_type_ids is not None:
        x = x + jnp.take(params["tokens"], token_type_ids, axis=0, mode="clip")
    if config.position == "learned":
        x = x + jnp.take(params["positions"], positions, axis=0, mode="clip")
    return x.astype(config.dtype)


def rope_tables(config: TransformerConfig, positions: Array) -> tuple:
    """Rotary tables of `positions` [B T] in layers without and with a window; twice None for learned positions."""
    c = config
    if c.position != "rope":
        return None, None
    slow = attention.rope_frequencies(c.head_dim, c.rope_theta, share=c.rope_share, scaling=c.rope_scaling)
    tables = attention.rope_tables(positions, slow)
    if not c.window_theta or not c.window:
        return tables, tables
    fast = attention.rope_frequencies(c.head_dim, c.window_theta, share=c.rope_share)
    return tables, attention.rope_tables(positions, fast)


def rope_of(ropes: tuple, windowed: bool | Array):
    """The tables of one layer; `windowed` is an array under a scan over layers of both kinds."""
    if isinstance(windowed, bool):
        return ropes[windowed]
    if ropes[0] is ropes[1]:
        return ropes[0]
    return jax.tree.map(lambda full, near: jnp.where(windowed, near, full), *ropes)


def attention_limits(config: TransformerConfig, windowed: bool | Array) -> dict:
    """`window` and `softcap` of one layer's `attend`; `windowed` as in `rope_of`."""
    if isinstance(windowed, bool):
        window = config.window if windowed else None
    else:
        window = jnp.where(windowed, config.window, jnp.iinfo(jnp.int32).max)
    return {"window": window, "softcap": config.attention_softcap}


def block(config: TransformerConfig, params: dict, x: Array, mix: Callable, rope, constrain, keys=None) -> Array:
    """One pre-norm layer, x + attention(norm1 x) then x + mlp(norm2 x): [B T D] -> [B T D].

    Args:
      params: one layer's arrays. mix: (q, k, v) [B N|K T H] -> [B N T H], attention of any kind, cached or not.
      rope: tables from `rope_of` or None. keys: two dropout keys or None.
    """
    c, weights = config, params["attention"]

    def norm(x, params):
        return blocks.normalise(x, params, c.norm, c.norm_eps).astype(x.dtype)

    def add(x, branch, index):
        branch = norm(branch, params[f"post_norm{index + 1}"]) if c.post_norm else branch
        return constrain(x + blocks.dropout(branch, None if keys is None else keys[index], c.dropout), "residual")

    normed = norm(x, params["norm1"])
    q, k, v = (
        constrain(blocks.project_heads(normed, weights[name], weights.get(f"{name}_bias")), "heads") for name in "qkv"
    )
    if c.qk_norm:
        q, k = norm(q, weights["q_norm"]), norm(k, weights["k_norm"])
    if rope is not None:
        q, k = attention.rotate(q, rope), attention.rotate(k, rope)
    if c.query_scalar:  # attention divides by the root of head_dim
        q = blocks.scale(q, (c.head_dim / c.query_scalar) ** 0.5)
    mixed = blocks.merge_heads(constrain(mix(q, k, v), "heads"), weights["o"], weights.get("o_bias"))
    attended = add(x, mixed, 0)
    normed = norm(x if c.parallel else attended, params["norm2"])
    return add(attended, blocks.feed_forward(normed, params["mlp"], c.activation, constrain), 1)


def run_layers(config: Any, layer: Callable, x: Array, stacked: dict, keys: Array | None) -> Array:
    """Applies `layer(x, params, keys, windowed)` for all stacked layers, in line or scanned, rematerialised or not.

    `windowed` is a bool, but for a scan over layers of both kinds: there it is an array.
    """
    c = config

    def step(windowed: bool | None) -> Callable:
        bound = layer if windowed is None else lambda x, params, keys, _: layer(x, params, keys, windowed)
        if c.remat == "none":
            return bound
        return jax.checkpoint(bound, policy=REMAT_POLICIES[c.remat], prevent_cse=c.unroll == 0)

    windowed = c.window_layers
    if c.unroll == 0:
        for index, params in enumerate(split_layers(stacked, c.layers)):
            x = step(windowed[index])(x, params, None if keys is None else keys[index], None)
        return x
    mixed = len(set(windowed)) > 1
    body, flags = step(None if mixed else windowed[0]), jnp.array(windowed) if mixed else None
    x, _ = jax.lax.scan(lambda x, xs: (body(x, *xs), None), x, (stacked, keys, flags), unroll=min(c.unroll, c.layers))
    return x


def split_layers(stacked: dict, layers: int) -> tuple[dict, ...]:
    """Arrays [L ...] -> one tree a layer. Its gradient is one concatenation, where indexing would add up L arrays."""
    leaves, structure = jax.tree.flatten(stacked)
    pieces = [[jnp.squeeze(piece, 0) for piece in jax.lax.split(leaf, (1,) * layers)] for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*pieces, strict=True))
