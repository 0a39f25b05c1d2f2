"""BERT and RoBERTa in float64 NumPy, from tensors as Hugging Face names them and not from lfjax."""

import numpy as np
from reference.decoder import gelu, layer_norm


def hidden(t, tokens, *, base, heads, eps, first=0, types=None):
    """Final hidden states of one text without padding: [T D]. `first`: row of the first position."""
    t = {name.removeprefix(base): x.astype(np.float64) for name, x in t.items()}
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]  # noqa: E731
    norm = lambda x, name: layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)  # noqa: E731
    types = np.zeros(len(tokens), int) if types is None else types
    rows = {"word": tokens, "position": first + np.arange(len(tokens)), "token_type": types}
    x = sum(t[f"embeddings.{name}_embeddings.weight"][index] for name, index in rows.items())
    x = norm(x, "embeddings.LayerNorm")
    for i in range(sum(name.endswith("attention.self.query.weight") for name in t)):
        layer = f"encoder.layer.{i}."
        parts = (linear(x, f"{layer}attention.self.{n}") for n in ("query", "key", "value"))
        q, k, v = (part.reshape(len(x), heads, -1).swapaxes(0, 1) for part in parts)  # [N T H]
        weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(x), -1)
        x = norm(x + linear(mixed, f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm")
        inner = gelu(linear(x, f"{layer}intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    return x


def scores(t, states, dense, out):
    """What a classification head says of hidden states [... D]: out(tanh(dense(x))), or out(x) without a dense."""
    x = states.astype(np.float64)
    for name in (dense, out):
        if name:
            x = x @ t[f"{name}.weight"].T.astype(np.float64) + t[f"{name}.bias"]
            x = np.tanh(x) if name == dense else x
    return x
