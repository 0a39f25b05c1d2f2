"""Speed of the steps on this machine: the 12 M-parameter GPT-2 form, float32, or another.

    python benchmarks/steps.py [--repeats=5] [--form=12m|124m] [--dtype=float32|bfloat16] [--json=FILE]

SFT step: B=16 T=256. Generation: B=32, 64 + 64 tokens, no early stop. PPO: 32 prompts, 64 + 64 tokens, 1 epoch of 4
minibatches, separate reward, value and reference networks. Every program is compiled before it is timed; medians.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import machine

from lfjax.cli import huge_pages
from lfjax.models import presets
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
SFT_ROWS, SFT_LENGTH = 16, 256
ROWS, PROMPT, RESPONSE = 32, 64, 64


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


def matmul_peak(repeats: int) -> float:
    """FLOP/s of XLA's float32 matmul, 1536 x 1536: what the steps' FLOP/s are compared to."""
    x = jax.random.normal(KEY, (1536, 1536))
    product = jax.jit(jnp.matmul)
    return 2 * 1536**3 / min(median_seconds(lambda: product(x, x), 3) for _ in range(repeats))


def sft_run(model, params):
    """A function that makes one SFT step and returns its metrics."""
    tx = make_optimizer(1e-4, clip_norm=1.0)
    tokens = jax.random.randint(KEY, (SFT_ROWS, SFT_LENGTH + 1), 0, model.config.vocab_size)
    ones = jnp.ones((SFT_ROWS, SFT_LENGTH), bool)
    data = SftBatch(tokens, ones, ones.astype(jnp.int32))
    step = jax.jit(functools.partial(sft_step, model=model, tx=tx), donate_argnums=0)
    state = LMState.create(jax.tree.map(jnp.copy, params), tx)

    def run():
        nonlocal state
        state, metrics = step(state, data, KEY)
        return metrics

    return run


def sft_flops(model, params) -> int:
    """FLOPs of an SFT step: 6 a parameter and token, positions apart, and causal attention (half of 12 L D T)."""
    count = sum(x.size for x in jax.tree.leaves(params)) - params["embed"]["positions"].size
    c = model.config
    return SFT_ROWS * SFT_LENGTH * (6 * count + 6 * c.layers * c.width * SFT_LENGTH)


def prompt_batch(model):
    tokens = jax.random.randint(KEY, (ROWS, PROMPT), 0, model.config.vocab_size)
    return PromptBatch(tokens, jnp.ones((ROWS, PROMPT), bool), jnp.arange(ROWS))


def generate_run(model, params):
    """A function that samples a batch."""
    rollout = jax.jit(functools.partial(ppo_rollout, model=model, eos_ids=(), max_new_tokens=RESPONSE))
    return lambda: rollout(params, prompt_batch(model), KEY)


def ppo_run(model, params):
    """A function that makes one PPO update, rollout and scoring included, and returns its metrics."""
    value_model = Transformer(dataclasses.replace(model.config, num_labels=1, head_bias=True))
    value_params, reward_params = parameters(value_model), parameters(value_model)
    models, tx = PPOModels(model, value_model, model), make_optimizer(1e-5)
    prompts = prompt_batch(model)
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


def main():
    huge_pages()  # as the lfjax command does
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", choices=FORMS, default="12m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model = Transformer(FORMS[arguments.form](dtype=arguments.dtype))
    params = parameters(model)
    figures = {"matmul/flop_per_s": matmul_peak(arguments.repeats)}
    seconds = median_seconds(sft_run(model, params), arguments.repeats)
    figures["sft/tokens_per_s"] = SFT_ROWS * SFT_LENGTH / seconds
    figures["sft/flop_per_s"] = sft_flops(model, params) / seconds
    figures["sft/flop_utilisation"] = figures["sft/flop_per_s"] / figures["matmul/flop_per_s"]
    seconds = median_seconds(generate_run(model, params), arguments.repeats)
    figures["generate/tokens_per_s"] = ROWS * RESPONSE / seconds
    figures["ppo/episodes_per_s"] = ROWS / median_seconds(ppo_run(model, params), arguments.repeats)
    device = jax.devices()[0]
    print(f"{machine()}, {device.platform} {device.device_kind}")
    for name, value in figures.items():
        print(f"{name:24s} {value:12.4g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
