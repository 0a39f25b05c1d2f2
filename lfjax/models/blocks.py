"""The parts of a decoder layer as pure functions of arrays: norms, projections, feed-forward, dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


def normalise(x: Array, params: dict, kind: str, eps: float) -> Array:
    """LayerNorm ("layernorm": scale and bias) or RMSNorm over the last axis, computed in float32.

    "rmsnorm" multiplies by scale, "rmsnorm_plus_one" by 1 + scale (Gemma's form: what is stored lies around 0).

    Args:
      x: [... D], any float dtype. params: {"scale": [D]} and {"bias": [D]} for layernorm.
    Returns:
      [... D] float32.
    Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x = x.astype(jnp.float32)
    spread = (1,) * (x.ndim - 1) + (-1,)
    if kind == "layernorm":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    scale = params["scale"].reshape(spread)
    x = x * (1.0 + scale if kind == "rmsnorm_plus_one" else scale)
    return x + params["bias"].reshape(spread) if kind == "layernorm" else x


class LowRank(struct.PyTreeNode):
    """A kernel with a low-rank change beside it, for `matmul`: x kernel + dropout(x) a b."""

    kernel: Array  # [... D F], D and F each one axis or several
    a: Array  # [... D r], flat
    b: Array  # [... r F], flat, its scale included
    key: Array | None = None  # data of the dropout's key; None: no dropout
    rate: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.kernel.shape

    def reshape(self, *shape: int) -> LowRank:
        """With another shape of the kernel."""
        return self.replace(kernel=self.kernel.reshape(*shape))


def matmul(x: Array, kernel: Array | LowRank) -> Array:
    """x [B T D] times kernel [D F], in x's dtype: [B T F].

    On CPU B and T become one dimension first: with two dimensions to sum over, XLA's CPU backend transposes all
    activations in the backward pass (8 % of a training step). Elsewhere they stay apart, so that both can be sharded.
    """
    if isinstance(kernel, LowRank):
        key = None if kernel.key is None else jax.random.wrap_key_data(kernel.key)
        change = matmul(matmul(dropout(x, key, kernel.rate), kernel.a), kernel.b)
        return matmul(x, kernel.kernel) + change
    kernel = kernel.astype(x.dtype)
    if jax.default_backend() != "cpu":
        return jnp.einsum("btd,df->btf", x, kernel)
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def project_heads(x: Array, kernel: Array | LowRank, bias: Array | None) -> Array:
    """x [B T D], kernel [D N H], bias [N H] -> [B N T H] in x's dtype.

    A matmul and then a transposition: given the four-index einsum, XLA transposes the kernel instead, at every call.
    """
    width, heads, head_dim = kernel.shape
    out = matmul(x, kernel.reshape(width, heads * head_dim))
    out = jnp.swapaxes(out.reshape(*x.shape[:2], heads, head_dim), 1, 2)
    return out if bias is None else out + bias.astype(x.dtype)[None, :, None, :]


def merge_heads(x: Array, kernel: Array | LowRank, bias: Array | None) -> Array:
    """x [B N T H], kernel [N H D], bias [D] -> [B T D] in x's dtype."""
    batch, heads, length, head_dim = x.shape
    flat = jnp.swapaxes(x, 1, 2).reshape(batch, length, heads * head_dim)
    out = matmul(flat, kernel.reshape(heads * head_dim, -1))
    return out if bias is None else out + bias.astype(x.dtype)[None, None, :]


def feed_forward(x: Array, params: dict, activation: str, constrain) -> Array:
    """act(x up) down, or (act(x gate) * (x up)) down where `params` has a gate. x [B T D] -> [B T D]."""
    act = ACTIVATIONS[activation]
    up = _linear(x, params, "up")
    inner = act(_linear(x, params, "gate")) * up if "gate" in params else act(up)
    return _linear(constrain(inner, "mlp"), params, "down")


def dropout(x: Array, key: Array | None, rate: float) -> Array:
    """Zeroes elements of x with probability k/256, k = round(256 rate) >= 1, and scales the rest to keep the mean.

    One byte of noise decides one element, so noise costs a quarter of `jax.random.bernoulli`'s. `key` None: no change.
    The noise depends on the key and x's global shape alone, not on how x is laid out over devices.
    """
    if key is None or rate == 0.0:
        return x
    dropped = min(max(round(rate * 256), 1), 255)
    width = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], -(-width // 4)), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., :width]
    return jnp.where(noise >= dropped, scale(x, 256 / (256 - dropped)), jnp.zeros((), x.dtype))


def scale(x: Array, factor: float) -> Array:
    """x times a number, in x's dtype: the product is rounded to it, the number is not."""
    return (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)


def _linear(x: Array, params: dict, name: str) -> Array:
    out = matmul(x, params[name])
    bias = params.get(f"{name}_bias")
    return out if bias is None else out + bias.astype(x.dtype)[None, None, :]
