"""Advantages in float64 NumPy: from the papers (gae, grpo, rloo), and as TRL's trainer computes them (trl_*)."""

import numpy as np


def gae(rewards, values, mask, gamma, lam):
    """By the sum of eq. 16 of arXiv:1506.02438, over the positions of `mask` moved together."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        r, v = rewards[b, places].astype(np.float64), np.append(values[b, places].astype(np.float64), 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for t, place in enumerate(places):
            advantages[b, place] = sum((gamma * lam) ** k * deltas[t + k] for k in range(len(places) - t))
            returns[b, place] = advantages[b, place] + v[t]
    return advantages, returns


def rloo(scores, size):
    out = np.zeros(len(scores))
    for i, score in enumerate(scores):
        group = range(i // size * size, i // size * size + size)
        out[i] = score - np.mean([scores[j] for j in group if j != i])
    return out


def grpo(scores, size, scale):
    out = np.zeros(len(scores))
    for i, score in enumerate(scores):
        group = np.asarray(scores[i // size * size : i // size * size + size], np.float64)
        deviation = {"group": group.std(ddof=1), "batch": np.std(np.float64(scores), ddof=1), "none": None}[scale]
        out[i] = (score - group.mean()) / (1.0 if deviation is None else deviation + 1e-4)
    return out


def trl_rewards_and_masks(kl, scores, lengths, kl_coef):
    """As TRL's ppo_trainer: the score one token after the response's last, the value mask one token longer.

    kl [B R] per token, lengths [B] response tokens with EOS. Returns (rewards [B R], value mask [B R]).
    """
    place = np.arange(kl.shape[1])[None, :]
    last = lengths - 1  # TRL's sequence_lengths
    padding = place > last[:, None]
    padding_p1 = place > (last + 1)[:, None]
    rewards = np.where(padding, 0.0, -kl_coef * kl)
    end = np.where(last + 1 < kl.shape[1], last + 1, last)
    rewards[np.arange(len(kl)), end] += scores
    return rewards, ~padding_p1


def trl_gae(rewards, values, value_mask, gamma, lam):
    """TRL's loop over the whole width, with values zeroed outside its mask."""
    values = np.where(value_mask, values, 0.0).astype(np.float64)
    last, reversed_advantages = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = np.stack(reversed_advantages[::-1], axis=1)
    return advantages, advantages + values


def trl_masked_whiten(x, mask):
    """TRL's masked_whiten(shift_mean=True) with its unbiased variance, then zeroed padding."""
    kept = x[mask].astype(np.float64)
    return np.where(mask, (x - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0.0)
