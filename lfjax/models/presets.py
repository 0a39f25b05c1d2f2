"""Usual configurations: the GPT-2 form, the Llama form, and named sizes of each."""

from __future__ import annotations

from typing import Any

from lfjax.models.lstm import LSTMConfig
from lfjax.models.transformer import TransformerConfig


def described(section: Any, *, vocab_size: int, vocab_multiple: int) -> TransformerConfig | LSTMConfig:
    """The new language model that `config.model` describes, for a vocabulary."""
    c = section
    if c.form == "lstm":
        return LSTMConfig(vocab_size, c.width, c.layers, tied=c.tied, dtype=c.dtype, vocab_multiple=vocab_multiple)
    vocabulary = {"vocab_size": vocab_size, "vocab_multiple": vocab_multiple}
    size = {"width": c.width, "layers": c.layers, "heads": c.heads, "mlp_width": c.mlp_width, "context": c.context}
    ways = {"tied": c.tied, "dtype": c.dtype, "remat": c.remat, "unroll": c.unroll}
    if c.form == "gpt2":
        return gpt2(**vocabulary, **size, **ways)
    return llama(**vocabulary, **size, **ways, kv_heads=c.kv_heads)


def gpt2(*, vocab_size: int, width: int, layers: int, heads: int, context: int = 1024, **changes) -> TransformerConfig:
    """GPT-2: learned positions, LayerNorm, GELU (tanh), biases everywhere, tied embedding. `changes`: other fields."""
    form = {
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu_tanh",
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "tied": True,
    }
    size = {"vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "context": context}
    return TransformerConfig(**{**form, **size, **changes})


def llama(
    *, vocab_size: int, width: int, layers: int, heads: int, mlp_width: int, context: int = 2048, **changes
) -> TransformerConfig:
    """Llama: rotary positions, RMSNorm, SwiGLU, no biases, untied. `changes`: other fields, `kv_heads` for GQA."""
    form = {
        "position": "rope",
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "silu",
        "gated": True,
        "attention_bias": False,
        "mlp_bias": False,
        "tied": False,
    }
    size = {"vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "context": context}
    return TransformerConfig(**{**form, **size, "mlp_width": mlp_width, **changes})


def gpt2_12m(**changes) -> TransformerConfig:
    """12 M parameters in GPT-2's form: 6 layers, 384 wide, 6 heads, vocabulary 4096. The benchmarks' model."""
    return gpt2(**{"vocab_size": 4096, "width": 384, "layers": 6, "heads": 6, **changes})


def gpt2_124m(**changes) -> TransformerConfig:
    """GPT-2 small: 12 layers, 768 wide, 12 heads, vocabulary 50257."""
    return gpt2(**{"vocab_size": 50257, "width": 768, "layers": 12, "heads": 12, **changes})


def llama_tiny(**changes) -> TransformerConfig:
    """The quickstart's Llama form: 2 layers, 128 wide, 4 heads, SwiGLU 352, tied."""
    size = {"vocab_size": 2000, "width": 128, "layers": 2, "heads": 4, "mlp_width": 352, "context": 256}
    return llama(**{**size, "tied": True, **changes})
