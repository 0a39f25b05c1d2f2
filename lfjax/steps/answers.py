"""Log-probabilities of given answers with a full forward pass: what preference losses, and their references, are of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lfjax.losses.lm import chunked_token_stats


def token_logprobs(model, params, tokens: jax.Array, mask: jax.Array, *, chunk_size: int, key=None) -> jax.Array:
    """Log-probability [... T] of each token but the first, in nats, given those before it.

    Args:
      tokens: [... T+1], right-padded.
      mask: [... T] bool: the targets that are real; elsewhere the result means nothing.
      chunk_size: positions of a row whose logits are held at a time.
      key: of the dropout, where the model has some; None: none.
    """
    flat, real = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
    attend = jnp.pad(real[:, :-1], ((0, 0), (1, 0)), constant_values=True)  # a target that is real has a real input
    rngs = {"dropout": key} if key is not None and model.config.dropout else None
    hidden = model.apply({"params": params}, flat[:, :-1], attention_mask=attend, method="hidden", rngs=rngs)
    stats = chunked_token_stats(hidden, model.unembed(params), flat[:, 1:], chunk_size=chunk_size)
    return stats.logprobs.reshape(mask.shape)


def answer_logprobs(model, params, tokens: jax.Array, loss_mask: jax.Array, mask: jax.Array, *, chunk_size: int):
    """Sum [...] of an answer's log-probabilities, its EOS included and its prompt not: what a reference says of it.

    Args:
      loss_mask: [... T] bool: the targets that are the answer's. Others as of `token_logprobs`.
    """
    logprobs = token_logprobs(model, params, tokens, mask, chunk_size=chunk_size)
    return jnp.sum(jnp.where(loss_mask, logprobs, 0.0), axis=-1)
