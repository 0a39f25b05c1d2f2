"""A PPO rollout's rewards and advantages in float64 NumPy, token by token, from the papers and not from lfjax."""

import math

import numpy as np
from reference import rl


def log_softmax(logits, temperature):
    """log softmax(logits / temperature) over the last axis."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def kl(old, ref, kind):
    """One token's estimate of KL(policy || reference) (Schulman 2020)."""
    gap = old - ref
    return {"k1": gap, "k2": gap * gap / 2, "k3": math.exp(-gap) - 1 + gap, "abs": abs(gap)}[kind]


def whiten(x, mask, *, shift_mean):
    """Over the counted elements of the whole batch, biased variance (Ziegler et al. 2019)."""
    kept = x[mask]
    scaled = (x - kept.mean()) / math.sqrt(kept.var() + 1e-8)
    return np.where(mask, scaled if shift_mean else scaled + kept.mean(), 0.0)


def final_scores(raw, tokens, mask, *, eos_ids, mean=0.0, std=1.0, min_length=0, require_eos=True, penalty=1.0):
    """(scores, ended) [B]: normalised, then lowered where the response is too short or has no EOS."""
    scores, ended = np.zeros(len(raw)), np.zeros(len(raw), bool)
    for b, row in enumerate(tokens):
        words = [token for token, counts in zip(row, mask[b], strict=True) if counts]
        ended[b] = bool(words) and words[-1] in eos_ids
        score = (float(raw[b]) - mean) / std
        if len(words) < min_length or (require_eos and not ended[b]):
            score = min(score, 0.0) - penalty
        scores[b] = score
    return scores, ended


def rewards(old, ref, scores, mask, *, kl_coef, kl_kind="k1"):
    """[B R]: -kl_coef * kl a token, and the score at each response's last one."""
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        for t in places:
            out[b, t] = -kl_coef * kl(float(old[b, t]), float(ref[b, t]), kl_kind)
        if len(places):
            out[b, places[-1]] += scores[b]
    return out


def advantages(rewards, values, mask, *, gamma, lam, whiten_rewards, whiten_advantages):
    """(advantages, returns) [B R]; returns come from advantages before they are whitened."""
    shaped = whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
    found, returns = rl.gae(shaped, values, mask, gamma, lam)
    return (whiten(found, mask, shift_mean=True) if whiten_advantages else found), returns
