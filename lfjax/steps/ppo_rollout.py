"""PPO, part 1: the policy writes."""

from __future__ import annotations

from lfjax.sampling.generate import generate
from lfjax.types import Generation, PromptBatch


def ppo_rollout(
    params,
    prompts: PromptBatch,
    rng,
    *,
    model,
    eos_ids: tuple[int, ...],
    pad_id: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
) -> Generation:
    """Samples one response [B R] to each prompt [B P] from the whole distribution at `temperature`.

    Args:
      rng: one key an update; a token's noise is this folded with its row's global id and its index.
    Raises:
      ValueError: top-k or top-p is on: the ratios would be those of another distribution.
    """
    if top_k or top_p != 1.0:
        raise ValueError(f"ppo_rollout: top_k={top_k}, top_p={top_p}; PPO samples from the whole distribution (0, 1.0)")
    return generate(
        model,
        params,
        prompts.tokens,
        prompts.mask,
        rng,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        min_new_tokens=min_new_tokens,
        eos_ids=eos_ids,
        row_ids=prompts.row_ids,
        pad_id=pad_id,
    )
