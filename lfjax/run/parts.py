"""What every training stage is put together from: optimiser, state, compiled step, adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lfjax.config import Config
from lfjax.models import lora
from lfjax.models.lora import LoRA
from lfjax.optim import Optimizer, make_optimizer, schedule
from lfjax.run.data import say
from lfjax.run.devices import Devices
from lfjax.sharding import abstract, global_batch, jit_step, place


def compute_settings(section: Config, config, **changes):
    """A loaded model's config with a run's ways of computing it, which `config.model` says."""
    ways = {name: section[name] for name in ("dtype", "remat", "unroll") if hasattr(config, name)}
    return dataclasses.replace(config, **ways, **changes)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimiser whose rate, schedule, decay and clipping are arguments of the programs that update with it.

    A program is then the same for other values of them: it is compiled once, and comes from the cache in other runs.

    Attributes:
      numbers: these arguments, scalars; a decay or a clipping of 0 is not among them, and not in the program.
      fixed: all else that is in the program, as (name, value).
    """

    numbers: Mapping[str, Any]
    fixed: tuple[tuple[str, Any], ...]

    def rate(self, step, numbers: Mapping[str, Any] | None = None):
        """The learning rate at a step."""
        found, kind = self.numbers if numbers is None else numbers, dict(self.fixed)["schedule"]
        return schedule(kind, **{name: found[name] for name in _RATE})(step)

    def make(self, numbers: Mapping[str, Any]) -> Optimizer:
        """The optimiser: inside of a compiled function that takes `numbers`, of traced ones."""
        plain = {name: value for name, value in self.fixed if name != "schedule"}
        terms = {name: value for name, value in numbers.items() if name not in _RATE}
        return make_optimizer(functools.partial(self.rate, numbers=numbers), **plain, **terms)

    @property
    def tx(self) -> Optimizer:
        """With its own numbers: to make a state, say."""
        return self.make(self.numbers)


_RATE = ("learning_rate", "total_steps", "warmup_steps", "end_factor")


def optimizer(options: dict[str, Any], total: int, model) -> Recipe:
    """The recipe of `optim_section`'s options, for parameters of the model and so many steps."""
    options = {**options, "total_steps": total, "groups": tuple(map(tuple, options["groups"]))}
    numbers = {name: np.int32(options.pop(name)) for name in ("total_steps", "warmup_steps")}
    numbers |= {name: np.float32(options.pop(name)) for name in ("learning_rate", "end_factor")}
    numbers |= {name: np.float32(options.pop(name)) for name in ("weight_decay", "clip_norm") if options[name]}
    return Recipe(numbers, tuple(sorted({**options, "vocab_size": model.config.vocab_size}.items())))


def total_steps(section: Config, steps_per_epoch: int) -> int:
    """`steps` where given, else as many as the epochs have."""
    return section.steps or max(1, round(section.epochs * steps_per_epoch))


def create_state(devices: Devices, kind, params, recipe: Recipe):
    """A fresh sharded state of class `kind`, and its shardings."""
    tx = recipe.tx
    shardings = devices.shardings(jax.eval_shape(lambda p: kind.create(p, tx), params))
    return jax.jit(lambda p: kind.create(p, tx), out_shardings=shardings)(params), shardings


def compiled_step(
    devices: Devices, name: str, function: functools.partial, recipe: Recipe, model, base, state, shardings, batches, *,
    adapters: LoRA | None, purpose: str = "",
):  # fmt: skip
    """The step as (state, host batch) -> (state, metrics): compiled for every bucket before its first use.

    Stages that train alike, but for their numbers, share the program.

    Args:
      name: of the program. purpose: of its key; "": as the name.
      function: a step with its keywords, but for model and optimiser. base: what of the model stays frozen, or None.
      batches: one for each shape that batches come in.
    """
    more = devices.key(purpose or name), base, place(dict(recipe.numbers), devices.replicated)

    def with_key(state, batch, key, base, numbers):
        rng, bound = jax.random.fold_in(key, state.step), lora.bind(model, base, adapters)
        return function(state, batch, rng, model=bound, tx=recipe.make(numbers))

    keywords = tuple(sorted(function.keywords.items()))
    same = (function.func.__module__, function.func.__qualname__, keywords, model.config, recipe.fixed, adapters)
    outputs = (shardings, devices.replicated)
    step = devices.program(
        (name, function.func, repr(same)),
        lambda: jit_step(with_key, name=name, variant=repr(same), donate=(0,), out_shardings=outputs),
    )
    batches = list(batches)
    count, shapes = (
        parameters(state.params),
        " and ".join(str(list(jax.tree.leaves(batch)[0].shape)) for batch in batches),
    )
    say(purpose or name, f"{count:,} parameters to train; {counted(len(batches), 'program')}, for batches of {shapes}")
    for batch in batches:
        step.compile(state, abstract(global_batch(batch, devices.mesh)), *more)
    return lambda state, batch: step(state, global_batch(batch, devices.mesh), *more)


def parameters(tree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def counted(count: int, what: str) -> str:
    """ "1 program", "2 programs"."""
    return f"{count} {what}{'s' * (count != 1)}"


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
