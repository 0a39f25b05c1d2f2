"""Attention over [B N T H] arrays: one choice of implementation, a blocked causal form, and one query against a cache.

Notation: B batch, N query heads, K key/value heads (N = K * G), T query positions, S key positions, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite: a row that may see nothing gets a uniform softmax instead of NaN
QUERY_BLOCK = {"cpu": 128}  # queries handled at once; larger elsewhere, where every block is a launch
OTHER_QUERY_BLOCK = 512


def choose_implementation(backend: str, dtype, q_shape: tuple, k_shape: tuple, *, segmented: bool) -> str:
    """Names the attention implementation for one call: "cudnn" or "xla".

    Args:
      backend: "cpu", "gpu" (or "cuda", "rocm") or "tpu".
      dtype: of queries, keys and values.
      q_shape, k_shape: [B N T H] and [B K S H].
      segmented: whether segment ids separate packed documents (cuDNN has none).
    Returns:
      "cudnn" on NVIDIA GPUs for bfloat16/float16, head dim a multiple of 8 up to 128, no segment ids and as many
      queries as keys; "xla" otherwise. TPUs use "xla" too: there is no splash kernel here yet.
    """
    if backend not in ("gpu", "cuda") or segmented:
        return "xla"
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    head_dim = q_shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 128 and q_shape[2] == k_shape[2]
    return "cudnn" if half and fits else "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal: bool = True,
) -> Array:
    """Softmax attention, softmax(q k' / sqrt(H)) v, by the implementation that fits the backend.

    Args:
      q: [B N T H]. k, v: [B K T H], K divides N; keys are not repeated for grouped queries.
      key_mask: [B T] bool, False = no query sees this key.
      segment_ids: [B T] int; a query sees keys of its own segment alone, and never those of segment 0.
      causal: query t sees keys 0..t alone.
    Returns:
      [B N T H] in q's dtype; softmax in float32. Queries that see no key get finite, meaningless values.
    """
    backend = jax.default_backend()
    if choose_implementation(backend, q.dtype, q.shape, k.shape, segmented=segment_ids is not None) == "cudnn":
        return _attend_cudnn(q, k, v, key_mask, causal)
    block = QUERY_BLOCK.get(backend, OTHER_QUERY_BLOCK)
    return attend_blocked(q, k, v, key_mask=key_mask, segment_ids=segment_ids, causal=causal, block=block)


def attend_blocked(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal: bool = True,
    block: int = 128,
) -> Array:
    """`attend` in plain XLA, `block` queries at a time; causal keys beyond a block's last query are never computed."""
    length = q.shape[2]
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = stop if causal else length
        allowed = _allowed(start, stop, seen, key_mask, segment_ids, causal)
        outputs.append(_softmax_attention(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], allowed))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def attend_cached(q: Array, k: Array, v: Array, key_mask: Array) -> Array:
    """One new query a row against its cache: q [B N 1 H], k and v [B K S H], key_mask [B S] -> [B N 1 H]."""
    return _softmax_attention(q, k, v, key_mask[:, None, None, None, :])


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary angles: positions [B T] -> two float32 [B 1 T H/2].

    Source: Su et al. 2021, arXiv:2104.09864, with Hugging Face's order (first half paired with second half).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates [B N T H] by `rope_tables`, element i with element i + H/2, in float32; returns x's dtype."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _allowed(start, stop, seen, key_mask, segment_ids, causal) -> Array | None:
    """What queries start..stop may see of keys 0..seen: bool, broadcastable to [B K G T S], or None for everything."""
    parts = []
    if causal:
        parts.append((jnp.arange(start, stop)[:, None] >= jnp.arange(seen)[None, :])[None, None, None])
    if key_mask is not None:
        parts.append(key_mask[:, None, None, None, :seen])
    if segment_ids is not None:
        queries, keys = segment_ids[:, start:stop, None], segment_ids[:, None, :seen]
        parts.append(((queries == keys) & (keys != 0))[:, None, None])
    if not parts:
        return None
    allowed = parts[0]
    for part in parts[1:]:
        allowed = allowed & part
    return allowed


def _softmax_attention(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """q [B N T H], k and v [B K S H], allowed broadcastable to [B K G T S] -> [B N T H]."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    groups = heads // kv_heads
    q = (q * jnp.asarray(head_dim**-0.5, q.dtype)).reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, keys)
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(batch, heads, length, 1)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, groups * length, keys)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    return (mixed.reshape(batch, heads, length, head_dim) / total).astype(q.dtype)


def _attend_cudnn(q, k, v, key_mask, causal) -> Array:
    mask = (
        None
        if key_mask is None
        else jnp.broadcast_to(key_mask[:, None, None, :], (q.shape[0], 1, q.shape[2], k.shape[2]))
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(out, 1, 2)
