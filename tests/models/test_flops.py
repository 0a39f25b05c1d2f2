"""Model FLOPs against what XLA counts in the compiled forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lfjax.models import presets
from lfjax.models.flops import forward_flops, peak_flops
from lfjax.models.transformer import Transformer

SHAPE = {"vocab_size": 256, "width": 64, "layers": 2, "heads": 4, "mlp_width": 128, "context": 128}
LLAMA = presets.llama(**SHAPE, kv_heads=2)


@pytest.mark.parametrize("config", [presets.gpt2(**SHAPE), LLAMA, dataclasses.replace(LLAMA, num_labels=1)])
def test_the_rule_is_what_xla_counts_but_for_elementwise_work(config):
    """XLA computes attention over whole blocks of keys; a short sequence keeps that difference small."""
    model, rows, length = Transformer(config), 4, 16
    tokens = jnp.zeros((rows, length), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    method = "values" if config.num_labels else None
    forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method=method))
    counted = forward.lower(params, tokens).compile().cost_analysis()["flops"]
    assert 1.0 <= counted / (rows * length * forward_flops(config, length)) < 1.12


def test_what_costs_more_counts_more():
    base = forward_flops(LLAMA, 16)
    assert forward_flops(LLAMA, 32) - base == 2 * 2 * 64 * 16  # per layer q k and p v over half of 16 more keys
    assert base - forward_flops(LLAMA, 16, head=False) == 2 * 64 * 256
    assert forward_flops(dataclasses.replace(LLAMA, kv_heads=4), 16) - base == 2 * 2 * 2 * 2 * 64 * 16
    assert forward_flops(dataclasses.replace(LLAMA, window=16), 16) == base
    mixed = dataclasses.replace(LLAMA, window=4, windowed=(True, False))
    keys = (0.5 + 1.5 + 2.5 + 3.5 + 12 * 4) / 16
    assert forward_flops(mixed, 16) - base == 2 * 2 * 64 * (keys - 8)  # one of two layers; q k and p v


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_virtual_devices():
    assert 1e8 < peak_flops(jax.devices()[0]) < 1e13


class Accelerator:
    platform = "gpu"
    device_kind = "NVIDIA H100 80GB HBM3"


def test_the_peak_of_an_accelerator_is_its_data_sheets():
    assert peak_flops(Accelerator()) == 989e12
    unknown = Accelerator()
    unknown.device_kind = "something new"
    assert peak_flops(unknown) != peak_flops(unknown)  # NaN
