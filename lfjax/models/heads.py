"""What final hidden states become: vocabulary logits, or scores (reward, value, class)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lfjax.losses.lm import Unembed


def vocabulary_logits(hidden: Array, unembed: Unembed) -> Array:
    """hidden [... D] -> logits [... V] float32, V the true vocabulary: padded columns are cut off.

    The matmul runs in hidden's dtype and accumulates in float32, as in `lm.chunked_token_stats`.
    """
    weight = unembed.weight.astype(hidden.dtype)
    logits = jnp.einsum("...d,dv->...v", hidden, weight, preferred_element_type=jnp.float32)
    if unembed.bias is not None:
        logits = logits + unembed.bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,))
    if unembed.softcap is not None:
        logits = unembed.softcap * jnp.tanh(logits / unembed.softcap)
    return logits if unembed.vocab_size is None else logits[..., : unembed.vocab_size]


def scores(hidden: Array, params: dict) -> Array:
    """hidden [... D] -> [... num_labels] float32 by {"kernel": [D num_labels]} and an optional "bias" [num_labels]."""
    out = jnp.einsum("...d,dn->...n", hidden.astype(jnp.float32), params["kernel"])
    return out + params["bias"].reshape((1,) * (out.ndim - 1) + (-1,)) if "bias" in params else out
