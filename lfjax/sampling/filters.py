"""Which tokens may be sampled: temperature, top-k and top-p on logits [B V]. Removed tokens get -inf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def scale_temperature(logits: Array, temperature: float | Array) -> Array:
    """logits / temperature in float32; temperature must be positive (greedy decoding is not a scaling)."""
    return logits.astype(jnp.float32) / temperature


def top_k(logits: Array, k: int) -> Array:
    """Keeps the k largest logits of each row [B V], and every tie of the k-th; k = 0 or k >= V keeps all.

    Source: Fan et al. 2018, arXiv:1805.04833.
    """
    if k < 0:
        raise ValueError(f"top_k is {k}; it must be 0 (off) or positive")
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def top_p(logits: Array, p: float) -> Array:
    """Keeps the smallest set of most probable tokens whose probability is at least p, and every tie of its last one.

    A token stays iff the tokens strictly more probable than it hold less than p; the most probable always stays.
    p = 1 keeps all. Logits [B V], -inf allowed (removed by an earlier filter).
    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p is {p}; it must be in (0, 1], 1 being off")
    if p == 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # held by the tokens ahead in this order
    smallest = jnp.min(jnp.where((before < p) & (probabilities > 0), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
