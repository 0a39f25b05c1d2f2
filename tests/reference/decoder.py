"""Logits of one document in float64 NumPy, from tensors as Hugging Face names them and not from lfjax."""

import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def frequencies(size, theta):
    """Radians a position turns each pair of `size` elements (arXiv:2104.09864, section 3.2)."""
    return np.array([theta ** (-2 * i / size) for i in range(size // 2)])


def llama3_frequencies(plain, factor, low, high, context):
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed by their wavelength."""
    out = []
    for frequency in plain:
        turns = context * frequency / (2 * math.pi)  # in the context the model was trained on
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        out.append((1 - share) * frequency / factor + share * frequency)
    return np.array(out)


def rotate(x, turns):
    """x [T N H]: element i < R with element i + R as one complex number, turned by position * turns[i], R turns."""
    r = len(turns)
    turned = (x[..., :r] + 1j * x[..., r : 2 * r]) * np.exp(1j * np.arange(len(x))[:, None, None] * turns)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * r :]], -1)


def attention(q, k, v, window, scale, cap):
    """q [T N H], k and v [T K H], causal, the last `window` keys alone: [T N H], query by query."""
    out = np.zeros(q.shape)
    for t, n in np.ndindex(q.shape[:2]):
        first = 0 if window is None else max(0, t - window + 1)
        group = n * k.shape[1] // q.shape[1]
        scores = k[first : t + 1, group] @ q[t, n] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ v[first : t + 1, group]
    return out


def llama_logits(
    t, tokens, *, head_dim, turns, windows, gemma=False, act=silu, scale=None, cap=None, final_cap=None, eps=1e-6
):
    """Llama, Mistral, Qwen and Gemma: t maps names to arrays; turns and windows hold one entry a layer -> [T V]."""
    t = {name: x.astype(np.float64) for name, x in t.items()}
    norm = lambda x, name: rms_norm(x, t[name] + gemma, eps)  # noqa: E731
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)  # noqa: E731
    x = t["model.embed_tokens.weight"][tokens]
    x = x * math.sqrt(x.shape[-1]) if gemma else x
    for i, (turn, window) in enumerate(zip(turns, windows, strict=True)):
        layer = f"model.layers.{i}."
        h = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (linear(h, f"{layer}self_attn.{n}_proj").reshape(len(x), -1, head_dim) for n in "qkv")
        if f"{layer}self_attn.q_norm.weight" in t:
            q, k = norm(q, f"{layer}self_attn.q_norm.weight"), norm(k, f"{layer}self_attn.k_norm.weight")
        q, k = rotate(q, turn), rotate(k, turn)
        mixed = attention(q, k, v, window, head_dim**-0.5 if scale is None else scale, cap)
        mixed = linear(mixed.reshape(len(x), -1), f"{layer}self_attn.o_proj")
        both_sides = f"{layer}pre_feedforward_layernorm.weight" in t
        x = x + (norm(mixed, f"{layer}post_attention_layernorm.weight") if both_sides else mixed)
        h = norm(x, f"{layer}{'pre_feedforward' if both_sides else 'post_attention'}_layernorm.weight")
        h = linear(act(linear(h, f"{layer}mlp.gate_proj")) * linear(h, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj")
        x = x + (norm(h, f"{layer}post_feedforward_layernorm.weight") if both_sides else h)
    logits = norm(x, "model.norm.weight") @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T
    return logits if final_cap is None else final_cap * np.tanh(logits / final_cap)


def neox_logits(t, tokens, *, heads, turns, parallel, eps=1e-5):
    """GPT-NeoX: every head's query, key and value lie together -> [T V]."""
    t = {name: x.astype(np.float64) for name, x in t.items()}
    norm = lambda x, name: layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)  # noqa: E731
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]  # noqa: E731
    x = t["gpt_neox.embed_in.weight"][tokens]
    for i, turn in enumerate(turns):
        layer = f"gpt_neox.layers.{i}."
        qkv = linear(norm(x, f"{layer}input_layernorm"), f"{layer}attention.query_key_value")
        q, k, v = np.split(qkv.reshape(len(x), heads, -1), 3, axis=-1)
        mixed = attention(rotate(q, turn), rotate(k, turn), v, None, q.shape[-1] ** -0.5, None)
        attended = x + linear(mixed.reshape(len(x), -1), f"{layer}attention.dense")
        h = norm(x if parallel else attended, f"{layer}post_attention_layernorm")
        x = attended + linear(gelu(linear(h, f"{layer}mlp.dense_h_to_4h")), f"{layer}mlp.dense_4h_to_h")
    return norm(x, "gpt_neox.final_layer_norm") @ t["embed_out.weight"].T
