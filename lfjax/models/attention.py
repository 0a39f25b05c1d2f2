"""Attention over [B N T H] arrays: one choice of implementation, a blocked causal form, and one query against a cache.

Notation: B batch, N query heads, K key/value heads (N = K * G), T query positions, S key positions, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lfjax.models import blocks

MASKED = -1e30  # finite: a row that may see nothing gets a uniform softmax instead of NaN
QUERY_BLOCK = {"cpu": 128}  # queries handled at once; larger elsewhere, where every block is a launch
OTHER_QUERY_BLOCK = 512


def choose_implementation(
    backend: str, dtype, q_shape: tuple, k_shape: tuple, *, masked: bool = False, capped: bool = False
) -> str:
    """Names the attention implementation for one call: "cudnn" or "xla".

    Args:
      backend: "cpu", "gpu" (or "cuda", "rocm") or "tpu".
      dtype: of queries, keys and values.
      q_shape, k_shape: [B N T H] and [B K S H].
      masked: whether padding, segment ids or a window hide keys (cuDNN takes these as a bias, of even lengths alone).
      capped: whether scores are capped (cuDNN has no cap).
    Returns:
      "cudnn" on NVIDIA GPUs for bfloat16/float16, head dim a multiple of 8 up to 128, as many queries as keys, an even
      number of them where masked, and no cap; "xla" otherwise. TPUs use "xla" too: there is no splash kernel here yet.
    """
    if backend not in ("gpu", "cuda") or capped:
        return "xla"
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    length, head_dim = q_shape[2:]
    fits = head_dim % 8 == 0 and head_dim <= 128 and length == k_shape[2] and not (masked and length % 2)
    return "cudnn" if half and fits else "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal: bool = True,
    window: int | Array | None = None,
    softcap: float = 0.0,
) -> Array:
    """Softmax attention, softmax(q k' / sqrt(H)) v, by the implementation that fits the backend.

    Args:
      q: [B N T H]. k, v: [B K T H], K divides N; keys are not repeated for grouped queries.
      key_mask: [B T] bool, False = no query sees this key.
      segment_ids: [B T] int; a query sees keys of its own segment alone, and never those of segment 0.
      causal: query t sees keys 0..t alone.
      window: query t sees keys above t - window alone (an array where it differs by layer under a scan); None: all.
      softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
    Returns:
      [B N T H] in q's dtype; softmax in float32. Queries that see no key get finite, meaningless values.
    """
    if isinstance(window, int) and causal and window >= k.shape[2]:
        window = None
    masks = {"key_mask": key_mask, "segment_ids": segment_ids, "window": window}
    masked = any(mask is not None for mask in masks.values())
    fit = choose_implementation(jax.default_backend(), q.dtype, q.shape, k.shape, masked=masked, capped=softcap > 0.0)
    if fit == "cudnn":
        return _attend_cudnn(q, k, v, causal=causal, **masks)
    return attend_blocked(q, k, v, causal=causal, softcap=softcap, **masks)


def attend_blocked(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    causal: bool = True,
    window: int | Array | None = None,
    softcap: float = 0.0,
    block: int | None = None,
) -> Array:
    """`attend` in plain XLA, `block` queries at a time (None: as fits); keys that none may see are not computed.

    Those are causal keys beyond a block's last query, and keys before a window that is known at compile time.
    """
    length = q.shape[2]
    block = block or QUERY_BLOCK.get(jax.default_backend(), OTHER_QUERY_BLOCK)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = slice(max(0, start - window + 1) if isinstance(window, int) else 0, stop if causal else length)
        allowed = _allowed(slice(start, stop), seen, key_mask, segment_ids, causal, window)
        outputs.append(_softmax_attention(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], allowed, softcap))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def attend_cached(q: Array, k: Array, v: Array, key_mask: Array, softcap: float = 0.0) -> Array:
    """One new query a row against its cache: q [B N 1 H], k and v [B K S H], key_mask [B S] -> [B N 1 H]."""
    return _softmax_attention(q, k, v, key_mask[:, None, None, None, :], softcap)


def rope_frequencies(head_dim: int, theta: float, *, share: float = 1.0, scaling: tuple = ()) -> np.ndarray:
    """Radians a position turns each pair of a head: float32 [ceil(D/2)], D = int(head_dim * share).

    Args:
      theta: base; pair i of D/2 turns by theta^(-2i/D).
      share: leading share of the head that is rotated.
      scaling: () none; ("linear", factor) divides all by factor; ("llama3", factor, low, high, context) divides those
        whose wavelength exceeds context / low, keeps those below context / high, and goes smoothly between.
    Source: Su et al. 2021, arXiv:2104.09864; Chen et al. 2023, arXiv:2306.15595; Llama 3.1 as in transformers, whose
    float32 operations these are, one by one: at far positions another rounding would be another angle.
    """
    size = int(head_dim * share)
    frequencies = np.float32(1.0) / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    if not scaling:
        return frequencies
    kind, factor, *rest = scaling
    if kind == "linear":
        return frequencies / np.float32(factor)
    low, high, context = rest
    wavelengths = np.float32(2 * math.pi) / frequencies
    slowed = frequencies / np.float32(factor)
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1.0) - smooth) * slowed + smooth * frequencies
    ends = np.where(wavelengths > context / low, slowed, frequencies)
    return np.where((wavelengths >= context / high) & (wavelengths <= context / low), between, ends)


def rope_tables(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines of rotary angles: positions [B T], frequencies [R] -> two float32 [B 1 T R]."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates [B N T H] by `rope_tables` of R pairs, element i < R with element i + R; what lies beyond 2 R stays.

    Computed in float32, returned in x's dtype. The order of pairs is Hugging Face's.
    """
    cos, sin = tables
    pairs = cos.shape[-1]
    both, rest = jnp.split(x.astype(jnp.float32), (2 * pairs,), axis=-1)
    # Rolled whole: two halves put together again cost XLA's CPU backend an eighth of a training step.
    other = jnp.roll(both, pairs, axis=-1)
    turned = both * jnp.concatenate([cos, cos], axis=-1) + other * jnp.concatenate([-sin, sin], axis=-1)
    return (jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned).astype(x.dtype)


def _allowed(rows: slice, seen: slice, key_mask, segment_ids, causal, window) -> Array | None:
    """What queries `rows` may see of keys `seen`: bool, broadcastable to [B K G T S], or None for everything."""
    parts = []
    distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(seen.start, seen.stop)[None, :]
    if causal:
        parts.append((distance >= 0)[None, None, None])
    if window is not None:
        parts.append((distance < window)[None, None, None])
    if key_mask is not None:
        parts.append(key_mask[:, None, None, None, seen])
    if segment_ids is not None:
        queries, keys = segment_ids[:, rows, None], segment_ids[:, None, seen]
        parts.append(((queries == keys) & (keys != 0))[:, None, None])
    if not parts:
        return None
    allowed = parts[0]
    for part in parts[1:]:
        allowed = allowed & part
    return allowed


def _softmax_attention(q: Array, k: Array, v: Array, allowed: Array | None, softcap: float) -> Array:
    """q [B N T H], k and v [B K S H], allowed broadcastable to [B K G T S] -> [B N T H]."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    groups = heads // kv_heads
    q = blocks.scale(q, head_dim**-0.5).reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, keys)
    if softcap > 0.0:
        scores = softcap * jnp.tanh(scores / softcap)
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(batch, heads, length, 1)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, groups * length, keys)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    return (mixed.reshape(batch, heads, length, head_dim) / total).astype(q.dtype)


def _attend_cudnn(q, k, v, *, key_mask, segment_ids, window, causal) -> Array:
    """By cuDNN's fused kernel, which leaves keys after a query out itself; whatever else hides keys is one mask."""
    every = slice(0, q.shape[2])
    mask = _allowed(every, every, key_mask, segment_ids, False, window)  # [B or 1, 1, 1, T or 1, S]
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, :, 0], (mask.shape[0], 1, q.shape[2], k.shape[2]))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(out, 1, 2)
