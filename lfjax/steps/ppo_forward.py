"""What PPO computes of a response with a full forward pass; experience and update share it, so their ratio is 1."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from lfjax.losses.lm import TokenStats, chunked_token_stats


class PPOModels(NamedTuple):
    """The networks of PPO. The reference is the policy's architecture with frozen parameters."""

    policy: object
    value: object
    reference: object = None


def _sequences(prompts, prompt_mask, responses, mask):
    """All tokens but the last [B P+R-1] and their mask: position P-1+t predicts response token t."""
    tokens = jnp.concatenate([prompts, responses], axis=1)[:, :-1]
    return tokens, jnp.concatenate([prompt_mask, mask], axis=1)[:, :-1]


def response_stats(
    model, params, prompts, prompt_mask, responses, mask, *, temperature: float, chunk_size: int
) -> TokenStats:
    """Log-probability and entropy [B R] of each response token under softmax(logits / temperature)."""
    tokens, attend = _sequences(prompts, prompt_mask, responses, mask)
    hidden = model.apply({"params": params}, tokens, attention_mask=attend, method="hidden")  # [B P+R-1 D]
    hidden = hidden[:, prompts.shape[1] - 1 :]  # [B R D]
    return chunked_token_stats(hidden, model.unembed(params), responses, chunk_size=chunk_size, temperature=temperature)


def response_values(model, params, prompts, prompt_mask, responses, mask):
    """Value [B R] of the state before each response token."""
    tokens, attend = _sequences(prompts, prompt_mask, responses, mask)
    values = model.apply({"params": params}, tokens, attention_mask=attend, method="values")  # [B P+R-1 1]
    return values[:, prompts.shape[1] - 1 :, 0]
