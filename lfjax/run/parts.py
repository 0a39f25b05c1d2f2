"""What every training stage is put together from: optimiser, state, compiled step, adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lfjax.config import Config
from lfjax.models import lora
from lfjax.models.lora import LoRA
from lfjax.optim import make_optimizer, schedule
from lfjax.run.devices import Devices
from lfjax.sharding import abstract, global_batch, jit_step


def compute_settings(section: Config, config, **changes):
    """A loaded model's config with a run's ways of computing it, which `config.model` says."""
    ways = {name: section[name] for name in ("dtype", "remat", "unroll") if hasattr(config, name)}
    return dataclasses.replace(config, **ways, **changes)


def optimizer(options: dict[str, Any], total: int, model):
    """(optimizer, learning-rate schedule) of `optim_section`'s options, for parameters of the model."""
    options = dict(options)
    rate = schedule(
        options.pop("schedule"),
        learning_rate=options.pop("learning_rate"),
        total_steps=total,
        warmup_steps=options.pop("warmup_steps"),
        end_factor=options.pop("end_factor"),
    )
    return make_optimizer(rate, **options, vocab_size=model.config.vocab_size), rate


def total_steps(section: Config, steps_per_epoch: int) -> int:
    """`steps` where given, else as many as the epochs have."""
    return section.steps or max(1, round(section.epochs * steps_per_epoch))


def create_state(devices: Devices, kind, params, tx):
    """A fresh sharded state of class `kind`, and its shardings."""
    shardings = devices.shardings(jax.eval_shape(lambda p: kind.create(p, tx), params))
    return jax.jit(lambda p: kind.create(p, tx), out_shardings=shardings)(params), shardings


def compiled_step(
    devices: Devices, name: str, function: Callable, model, base, state, shardings, batches, *, adapters: LoRA | None
):
    """The step as (state, host batch) -> (state, metrics): compiled for every bucket before its first use.

    Args:
      name: of the program, and of the purpose of its key.
      function: a step without its model. base: what of the model stays frozen; None: nothing.
      batches: one for each shape that batches come in.
    """
    key = devices.key(name)

    def with_key(state, batch, key, base):
        return function(state, batch, jax.random.fold_in(key, state.step), model=lora.bind(model, base, adapters))

    step = jit_step(with_key, name=name, donate=(0,), out_shardings=(shardings, devices.replicated))
    for batch in batches:
        step.compile(state, abstract(global_batch(batch, devices.mesh)), key, base)
    return lambda state, batch: step(state, global_batch(batch, devices.mesh), key, base)


def passes(adapters: LoRA | None) -> int:
    """What training costs in forward passes: the backward pass two, but one where no matrix has a gradient."""
    return 3 if adapters is None else 2


def trained_part(devices: Devices, adapters: LoRA | None, params, model_config, purpose: str) -> tuple[Any, Any]:
    """(what a stage trains of a model, what it keeps frozen): all and None; with LoRA, adapters and head, rest.

    `lfjax.models.lora.bind` makes a model of the first from the second. `purpose` is that of the adapters' key.
    """
    if adapters is None:
        return params, None
    init = functools.partial(lora.init, config=model_config, lora=adapters)
    shardings = devices.shardings({"lora": jax.eval_shape(init, devices.key(purpose))})
    low = jax.jit(init, out_shardings=shardings["lora"])(devices.key(purpose))
    head = {group: tree for group, tree in params.items() if group == "head"}
    return {**head, "lora": low}, {group: tree for group, tree in params.items() if group != "head"}
