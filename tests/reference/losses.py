"""Losses in float64 NumPy, one loop at a time, written from the papers and not from lfjax."""

import itertools
import math

import numpy as np


def softmax(x):
    weights = np.exp(np.asarray(x, np.float64) - np.max(x))
    return weights / weights.sum()


def token_stats(hidden, weight, targets, *, bias=None, softcap=None, vocab_size=None, temperature=1.0):
    """(logprobs, entropy, logsumexp), each [B T]."""
    out = np.zeros((3, *targets.shape))
    for place in np.ndindex(*targets.shape):
        logits = hidden[place].astype(np.float64) @ weight.astype(np.float64)
        logits = logits if bias is None else logits + bias
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        logits = (logits / temperature)[:vocab_size]
        probs = softmax(logits)
        out[(0, *place)] = math.log(probs[targets[place]])
        out[(1, *place)] = -sum(p * math.log(p) for p in probs)
        out[(2, *place)] = math.log(sum(math.exp(z) for z in logits))
    return out


def cross_entropy(logits, targets, label_smoothing, z_loss):
    out = np.zeros(targets.shape)
    for place in np.ndindex(*targets.shape):
        probs = softmax(logits[place])
        wanted = np.full(len(probs), label_smoothing / len(probs))
        wanted[targets[place]] += 1 - label_smoothing
        log_z = math.log(np.exp(logits[place].astype(np.float64)).sum())
        out[place] = -sum(wanted * np.log(probs)) + z_loss * log_z**2
    return out


def bradley_terry(chosen, rejected, margin):
    return -math.log(1 / (1 + math.exp(-(chosen - rejected - margin))))


def listwise_hinge(scores, ranks, margin):
    losses = [
        max(0.0, margin - (scores[i] - scores[j]))
        for i, j in itertools.permutations(range(len(scores)), 2)
        if ranks[i] < ranks[j]
    ]
    return sum(losses) / len(losses) if losses else 0.0


def plackett_luce(scores, ranks):
    """With Breslow's ties: every candidate is drawn from all that are not ranked above it."""
    loss = 0.0
    for i in range(len(scores)):
        pool = [j for j in range(len(scores)) if ranks[j] >= ranks[i]]
        loss -= math.log(math.exp(scores[i]) / sum(math.exp(scores[j]) for j in pool))
    return loss


def ordinal_probs(score, cutpoints):
    """P(rating = k) for every class of the proportional-odds model."""
    at_most = [1 / (1 + math.exp(-(c - score))) for c in cutpoints]
    return np.diff([0.0, *at_most, 1.0])


def clipped_policy(logprob, old_logprob, advantage, low, high):
    ratio = math.exp(logprob - old_logprob)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def clipped_value(value, old_value, target, clip):
    clipped = min(max(value, old_value - clip), old_value + clip)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def preference(kind, policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, smoothing=0.0, gamma=0.0):
    """One pair's loss, from sums of log-probabilities (ipo, simpo, orpo: from means)."""
    up, down = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    prefers = sigmoid(beta * (up - down))
    free = policy_chosen - policy_rejected
    odds = [math.exp(x) / (1.0 - math.exp(x)) if x < 0 else math.inf for x in (policy_chosen, policy_rejected)]
    kept, flipped = -math.log(prefers), -math.log(1.0 - prefers)
    return {
        "sigmoid": lambda: (1 - smoothing) * kept + smoothing * flipped,
        "robust": lambda: ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing),
        "hinge": lambda: max(0.0, 1.0 - beta * (up - down)),
        "ipo": lambda: (up - down - 0.5 / beta) ** 2,
        "apo_zero": lambda: 1.0 - sigmoid(beta * up) + sigmoid(beta * down),
        "apo_down": lambda: sigmoid(beta * up) + 1.0 - prefers,
        "cpo": lambda: -math.log(sigmoid(beta * free)),
        "simpo": lambda: -math.log(sigmoid(beta * free - gamma)),
        "orpo": lambda: -beta * math.log(sigmoid(math.log(odds[0] / odds[1]))),
    }[kind]()


def kto(policy, ref, desirable, kl, beta, weight_desirable, weight_undesirable):
    value = sigmoid(beta * (policy - ref - kl)) if desirable else sigmoid(beta * (kl - (policy - ref)))
    return (weight_desirable if desirable else weight_undesirable) * (1.0 - value)
