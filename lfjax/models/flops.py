"""Model FLOPs: what a step has to compute at least, for model FLOP utilisation (MFU).

The rule: a multiply and an add are two; matrix products alone count; a token passes every layer's matrices and the
head once; causal attention reads half of the positions, within a window those alone; the backward pass costs twice the
forward, or once where LoRA has frozen the matrices, which then have no gradient (the adapters' own products are not
counted). Recomputation (remat) is work but no use, so it lowers the MFU; padded positions are counted as tokens.
Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from lfjax.models.encoder import EncoderConfig
from lfjax.models.lstm import LSTMConfig
from lfjax.models.transformer import TransformerConfig

# Dense bfloat16 FLOP/s of one device as jax counts devices, by a part of its device_kind. Source: vendors' data sheets.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def forward_flops(config: TransformerConfig | EncoderConfig | LSTMConfig, length: int, *, head: bool = True) -> float:
    """FLOPs of one token's forward pass in a sequence of `length`; three times that with its backward pass.

    Args:
      head: whether the vocabulary head (or the score head) is computed at every position.
    """
    c = config
    if isinstance(c, LSTMConfig):
        return 2.0 * (c.layers * 8 * c.width**2 + (c.width * (c.num_labels or c.vocab_size) if head else 0))
    if isinstance(c, EncoderConfig):  # every token reads all of them; the pooler and its scores come once a text
        last = (c.pooler * c.width**2 + c.width * c.num_labels) / (length if c.pooler else 1) if head else 0
        return 2.0 * (c.layers * (4 * c.width**2 + 2 * c.width * c.mlp_width + 2 * c.width * length) + last)
    projections = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mlp = (3 if c.gated else 2) * c.width * c.mlp_width
    last = c.width * (c.num_labels or c.vocab_size) if head else 0
    reach = [min(c.window, length) if windowed else length for windowed in c.window_layers]
    keys = sum(w - w * w / (2 * length) for w in reach)  # that a query reads on average, over all layers
    return 2.0 * (c.layers * (projections + mlp) + 2 * c.heads * c.head_dim * keys + last)


def step_work(
    config: TransformerConfig | EncoderConfig | LSTMConfig, shape: tuple[int, ...], passes: int
) -> tuple[float, float]:
    """(tokens, FLOPs) of a step on a batch [... T] that costs so many forward passes; padding counts."""
    tokens = float(math.prod(shape))
    return tokens, tokens * passes * forward_flops(config, shape[-1])


def peak_flops(device) -> float:
    """FLOP/s that one device could reach: from its data sheet, or for a CPU the measured rate of a float32 matmul."""
    if device.platform == "cpu":
        return cpu_matmul_rate() / max(1, sum(other.platform == "cpu" for other in jax.local_devices()))
    kind = device.device_kind
    return next((rate for name, rate in PEAK.items() if name in kind), float("nan"))


def cpu_matmul_rate(size: int = 1024) -> float:
    """FLOP/s now: the best of a few float32 products of two [size size] matrices, over all cores."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()  # compiles
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
