"""Speed of the steps on this machine: the 12 M-parameter GPT-2 form, float32, or another.

    python benchmarks/steps.py [--form=12m|124m] [--dtype=float32|bfloat16] [--sft-rows=16] [--sft-length=256]
                               [--rows=32] [--attention=auto|xla] [--repeats=5] [--json=FILE]
                               [sft generate ppo]

SFT step: 16 rows of 256 tokens. Generation: 32 rows, 64 + 64 tokens, no early stop. PPO: 32 prompts, 64 + 64 tokens, 1
epoch of 4 minibatches, separate reward, value and reference networks. Every program is compiled before it is timed;
medians. The FLOP rule is that of `lfjax.models.flops`.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import machine

from lfjax.cli import huge_pages
from lfjax.models import attention, presets
from lfjax.models.flops import forward_flops, peak_flops
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.state import LMState, PPOState, RewardNorm, ValueState
from lfjax.steps.ppo_experience import ppo_experience
from lfjax.steps.ppo_forward import PPOModels
from lfjax.steps.ppo_rollout import ppo_rollout
from lfjax.steps.ppo_score import ppo_score
from lfjax.steps.ppo_update import ppo_update
from lfjax.steps.sft import sft_step
from lfjax.types import PromptBatch, SftBatch

KEY = jax.random.key(1)
FORMS = {"12m": presets.gpt2_12m, "124m": presets.gpt2_124m}
SFT_SHAPE = (16, 256)  # rows, tokens
ROWS, PROMPT, RESPONSE = 32, 64, 64
MATMUL = {"cpu": 1536}  # a size at which the matmul runs at its best


def median_seconds(function, repeats: int) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def parameters(model):
    return jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(KEY)


def matmul_peak(repeats: int, dtype: str = "float32") -> float:
    """FLOP/s of XLA's matmul of two square matrices: what the steps' FLOP/s are compared to."""
    size = MATMUL.get(jax.default_backend(), 8192)
    x = jax.random.normal(KEY, (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / min(median_seconds(lambda: product(x, x), 3) for _ in range(repeats))


def sft_run(model, params, shape: tuple[int, int] = SFT_SHAPE):
    """A function that makes one SFT step of `shape` rows and tokens and returns its metrics."""
    tx = make_optimizer(1e-4, clip_norm=1.0)
    rows, length = shape
    tokens = jax.random.randint(KEY, (rows, length + 1), 0, model.config.vocab_size)
    ones = jnp.ones((rows, length), bool)
    data = SftBatch(tokens, ones, ones.astype(jnp.int32))
    step = jax.jit(functools.partial(sft_step, model=model, tx=tx), donate_argnums=0)
    state = LMState.create(jax.tree.map(jnp.copy, params), tx)

    def run():
        nonlocal state
        state, metrics = step(state, data, KEY)
        return metrics

    return run


def sft_flops(model, shape: tuple[int, int] = SFT_SHAPE) -> float:
    """Model FLOPs of an SFT step."""
    rows, length = shape
    return 3 * rows * length * forward_flops(model.config, length)


def prompt_batch(model, rows: int):
    tokens = jax.random.randint(KEY, (rows, PROMPT), 0, model.config.vocab_size)
    return PromptBatch(tokens, jnp.ones((rows, PROMPT), bool), jnp.arange(rows))


def generate_run(model, params, rows: int = ROWS):
    """A function that samples a batch."""
    rollout = jax.jit(functools.partial(ppo_rollout, model=model, eos_ids=(), max_new_tokens=RESPONSE))
    prompts = prompt_batch(model, rows)
    return lambda: rollout(params, prompts, KEY)


def ppo_run(model, params, rows: int = ROWS):
    """A function that makes one PPO update, rollout and scoring included, and returns its metrics."""
    value_model = Transformer(dataclasses.replace(model.config, num_labels=1, head_bias=True))
    value_params, reward_params = parameters(value_model), parameters(value_model)
    models, tx = PPOModels(model, value_model, model), make_optimizer(1e-5)
    prompts = prompt_batch(model, rows)
    rollout = jax.jit(functools.partial(ppo_rollout, model=model, eos_ids=(), max_new_tokens=RESPONSE))
    score = jax.jit(functools.partial(ppo_score, model=value_model))
    experience = jax.jit(functools.partial(ppo_experience, models=models, eos_ids=(0,), kl_coef=0.1, minibatches=4))
    update = jax.jit(
        functools.partial(ppo_update, models=models, txs=(tx, tx), epochs=1, minibatches=4), donate_argnums=0
    )
    copies = jax.tree.map(jnp.copy, (params, value_params))
    state = PPOState(
        policy=LMState.create(copies[0], tx),
        value=ValueState.create(copies[1], tx),
        kl_coef=jnp.float32(0.1),
        reward_norm=RewardNorm.identity(),
        step=jnp.zeros((), jnp.int32),
    )

    def run():
        nonlocal state
        written = rollout(state.policy.params, prompts, KEY)
        scores = score(reward_params, written)
        made = experience(state.policy.params, state.value.params, params, written, scores)
        state, metrics = update(state, made, KEY)
        return metrics

    return run


def figures(arguments, model, params):
    """Yields names and values as they are measured."""
    shape, rows, repeats = (arguments.sft_rows, arguments.sft_length), arguments.rows, arguments.repeats
    if "sft" in arguments.tasks:
        peak = matmul_peak(repeats, arguments.dtype)
        yield "matmul/flop_per_s", peak
        seconds = median_seconds(sft_run(model, params, shape), repeats)
        yield "sft/tokens_per_s", math.prod(shape) / seconds
        rate = sft_flops(model, shape) / seconds
        yield "sft/flop_per_s", rate
        yield "sft/flop_utilisation", rate / peak
        if jax.default_backend() != "cpu":
            yield "sft/mfu", rate / peak_flops(jax.devices()[0])
    if "generate" in arguments.tasks:
        yield "generate/tokens_per_s", rows * RESPONSE / median_seconds(generate_run(model, params, rows), repeats)
    if "ppo" in arguments.tasks:
        yield "ppo/episodes_per_s", rows / median_seconds(ppo_run(model, params, rows), repeats)


def main():
    huge_pages()  # as the lfjax command does
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", default=["sft", "generate", "ppo"], help="sft, generate, ppo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", choices=FORMS, default="12m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--sft-rows", type=int, default=SFT_SHAPE[0])
    parser.add_argument("--sft-length", type=int, default=SFT_SHAPE[1])
    parser.add_argument("--rows", type=int, default=ROWS, help="of generation and PPO")
    parser.add_argument("--attention", choices=("auto", "xla"), default="auto", help="auto: cuDNN's on a GPU")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{machine()}, {device.platform} {device.device_kind}", flush=True)
    attend = {"auto": attention.attend, "xla": attention.attend_blocked}[arguments.attention]
    model = Transformer(FORMS[arguments.form](dtype=arguments.dtype), attend=attend)
    found = {}
    for name, value in figures(arguments, model, parameters(model)):
        found[name] = value
        print(f"{name:24s} {value:12.4g}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
