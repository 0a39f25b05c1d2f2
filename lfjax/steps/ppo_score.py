"""PPO, part 2: a learned reward model reads the responses."""

from __future__ import annotations

import jax.numpy as jnp

from lfjax.types import Generation


def ppo_score(reward_params, generation: Generation, *, model):
    """Raw scores [B] of prompt + response, read at the last response token (the EOS where there is one)."""
    tokens = jnp.concatenate([generation.prompts, generation.tokens], axis=1)
    mask = jnp.concatenate([generation.prompt_mask, generation.mask], axis=1)
    return model.apply({"params": reward_params}, tokens, attention_mask=mask)[:, 0]
