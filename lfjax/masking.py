"""Means, whitening and positions over the part of an array that counts.

Masks are bool and True means "counts". What masked-out elements hold never matters: they are replaced before any
arithmetic, so they change neither values nor gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def masked_mean(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Mean of `x` where `mask`, over `axis` (all axes by default); 0 where nothing counts. float32."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis, dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask, axis=axis, dtype=jnp.float32), 1.0)


def masked_whiten(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, shift_mean: bool = True, ddof: int = 0
) -> Float[Array, "*S"]:
    """Scales `x` to variance 1 over everything `mask` counts; 0 where it does not.

    Args:
      x: values; padding may hold anything.
      mask: which elements count.
      shift_mean: True moves the mean to 0; False keeps it (rewards, whose sign means something).
      ddof: 0 divides the variance by n (Ziegler et al. 2019), 1 by n - 1 (TRL).
    Source: Ziegler et al. 2019, arXiv:1909.08593, code `whiten`; variance + 1e-8 under the root.
    """
    mean = masked_mean(x, mask)
    count = jnp.sum(mask, dtype=jnp.float32)
    offset = jnp.where(mask, x - mean, 0.0)
    variance = jnp.sum(jnp.square(offset), dtype=jnp.float32) / jnp.maximum(count - ddof, 1.0)
    whitened = offset * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def last_true_index(mask: Bool[Array, "*B T"]) -> Int[Array, "*B"]:
    """Index of the last True along the last axis; 0 where there is none."""
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return jnp.max(jnp.where(mask, index, 0), axis=-1)
