"""Stages that train a language model on documents: the loop that pretraining and fine-tuning share."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import Config, optim_section
from lfjax.data.batching import PackedRows
from lfjax.metrics import Window
from lfjax.models import lora, presets
from lfjax.models.flops import step_work
from lfjax.models.lora import LoRA
from lfjax.rewards.intervals import Bootstrap, Resampled
from lfjax.run import training
from lfjax.run.data import note
from lfjax.run.devices import Devices
from lfjax.run.parts import compiled_step, compute_settings, create_state, optimizer, passes, total_steps, trained_part
from lfjax.run.run import Run
from lfjax.sharding import global_batch, jit_step
from lfjax.state import LMState
from lfjax.types import leaf_name

HELD_OUT = ("loss", "perplexity")  # figures of every validation here

POSITIVE = (0.0, math.inf)  # bounds of a loss and of a perplexity


def train_language_model(
    run: Run,
    stage: str,
    documents: Mapping[str, Any],
    *,
    step: str,
    tuned: bool = False,
    further: Callable[[Resampled, float], dict[str, float]] = lambda nll, tokens: {},
) -> dict[str, float]:
    """Trains on packed documents of "train" and "validation", saves the model, and gives its figures.

    Args:
      documents: split -> token lists, or (tokens, which of them are targets).
      step: the name of the step in `config.steps`; its metrics step/leaf become stage/leaf.
      tuned: also say how the model did before, and how many documents were cut.
      further: (held-out nats per target, number of targets) -> more figures beside them.
    """
    section, devices, adapters = run.config[stage], run.devices, run.adapters(stage)
    rows = {"seq_len": section.seq_len, "batch_size": section.batch_size, "pad_id": run.tokenizer.pad_id}
    packed, validation = (PackedRows(documents[s], seed=run.config.seed, **rows) for s in ("train", "validation"))
    total = total_steps(section, packed.steps_per_epoch)

    config, params = start_of(run, stage)
    model = devices.network(dataclasses.replace(config, dropout=section.dropout))
    recipe = optimizer(optim_section(run.config, stage), total, model)
    trained, base = trained_part(devices, adapters, params, config, f"{stage}-lora")
    if adapters is None:
        check_rate(run, stage, params, config, float(recipe.numbers["learning_rate"]))
    state, shardings = create_state(devices, LMState, trained, recipe)
    function = functools.partial(run.steps[step], **section.step.to_dict())
    learn = compiled_step(
        devices, step, function, recipe, model, base, state, shardings, [packed.batch_at(0)], adapters=adapters,
        purpose=stage,
    )  # fmt: skip
    evaluate = held_out(devices, run.steps["evaluate"], model, base, validation, adapters)
    start, before = None, {}
    if tuned:
        start = perplexities(evaluate(trained)[0])
        before = start.figures(f"{stage}/perplexity_before", POSITIVE)
        before[f"{stage}/cut_share"] = run.cut_share(stage, packed.cut, len(documents["train"]))
    del params, trained  # the state has its own

    def figures(state) -> dict[str, float]:
        nll, tokens = evaluate(state.params)
        found = nll.figures(f"{stage}/validation_loss", POSITIVE)
        found |= perplexities(nll).figures(f"{stage}/perplexity", POSITIVE)
        change = {} if start is None else (perplexities(nll) - start).figures(f"{stage}/perplexity_change")
        return found | change | further(nll, tokens)

    def one(state, index):
        state, metrics = learn(state, packed.batch_at(index))
        return state, {name.replace(f"{step}/", f"{stage}/"): value for name, value in metrics.items()}

    work = step_work(config, (section.batch_size, section.seq_len), passes(adapters))
    state, out = training.train(
        run, stage, state, one, total=total, work=lambda index: work, evaluate=figures, learning_rate=recipe.rate
    )
    run.save_model(stage, model, state.params, base)
    return {**out, **before}


def check_rate(run: Run, stage: str, params, config, rate: float) -> None:
    """A note where a stage would train a model from outside of the run at a rate that may wreck it."""
    key, name = run.start(stage)
    if not name or name in run.stages:
        return
    key = "model.init_from" if name in run.declared else key
    highest = gentle_rate(params, config.width)
    if rate > highest:
        own = run.config[stage].optim.learning_rate is not None
        place = f"config.{stage}.optim" if own else "config.optim"
        what = f"is above {highest:.1g}, what weights of their size bear: the model may forget what it knows; lower it"
        note(stage, f"{place}.learning_rate = {rate:g} for a pretrained start (config.{key}) {what}")


def gentle_rate(params, width: int) -> float:
    """The rate at which a step moves what a layer makes of an input by a fifth at most.

    Adam moves every weight by about the rate, all together an output by width x rate where an input's signs agree with
    the step's; weights of a root mean square r make outputs of sqrt(width) x r. So rate <= r / sqrt(width) / 5, of the
    median of the layers' matrices. Source: Yang et al. 2022, arXiv:2203.03466, which sets rates by width alike.
    """
    leaves = {leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    matrices = {name: x for name, x in leaves.items() if re.search(r"(^|/)(layers|lstm)/", name) and x.ndim > 2}
    sizes = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.sqrt(jnp.mean(jnp.square(x))), tree))(matrices)
    return float(np.median(list(jax.device_get(sizes).values()))) / math.sqrt(width) / 5 if sizes else math.inf


def start_of(run: Run, stage: str):
    """(model config, parameters on the mesh) that a language-model stage starts from."""
    key, name = run.start(stage)
    if name:
        loaded = run.load_model(key, name, language=True)
        return compute_settings(run.config.model, loaded.model.config), loaded.params
    sizes = {"vocab_size": run.tokenizer.vocab_size, "vocab_multiple": run.vocab_multiple}
    return new_model(run.devices, run.config.model, **sizes)


def new_model(devices: Devices, section: Config, **sizes: int):
    """(model config, fresh parameters on the mesh) of `config.model`."""
    config = presets.described(section, **sizes)

    def init(key):
        return devices.network(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    shapes = jax.eval_shape(init, devices.key("init"))
    return config, jax.jit(init, out_shardings=devices.shardings(shapes))(devices.key("init"))


def perplexities(nll: Resampled) -> Resampled:
    """exp of the mean nats a token."""
    return nll.map(lambda mean: np.exp(np.minimum(mean, 700.0)))


def held_out(devices: Devices, function: Callable, model, base, rows: PackedRows, adapters: LoRA | None):
    """params -> (mean nats per target token, number of target tokens) over every row once.

    Args:
      function: (params, batch, *, model) -> metrics with `evaluate/nll`. With `evaluate/document_nll` too, as of
        `lfjax.steps.evaluate`, the mean has an interval, clustered by document.
    """

    def measure(params, batch, base):
        return function(params, batch, model=lora.bind(model, base, adapters))

    step = devices.program(
        ("evaluate", dataclasses.replace(model.config, dropout=0.0), adapters),
        lambda: jit_step(measure, name="evaluate", out_shardings=devices.replicated, shapes=2),  # of two stages
    )

    def evaluate(params) -> tuple[Resampled, float]:
        window, parts = Window(), []
        for whole, owners in zip(rows.evaluation(), rows.evaluation_documents(), strict=True):
            metrics = step(params, global_batch(whole, devices.mesh), base)
            window.add({name: value for name, value in metrics.items() if value.sum.ndim == 0})
            parts.append((owners, metrics.get("evaluate/document_nll")))
        total, weight = window.pending()["evaluate/nll"]
        return by_document(total / weight, jax.device_get(parts)), weight

    return evaluate


def by_document(nll: float, parts) -> Resampled:
    """The mean nats a target with the draws of its documents; `parts`: (documents of each row's segments, Mean)."""
    owners, sums, weights = [], [], []
    for rows, found in parts:
        if found is None:
            return Resampled(nll, sum(len({*np.concatenate(r).tolist()}) for r, _ in parts), np.zeros(0), 0)
        for row, total, weight in zip(rows, found.sum, found.weight, strict=True):
            owners.append(row)
            sums.append(total[1 : len(row) + 1])  # segment 0 is padding
            weights.append(weight[1 : len(row) + 1])
    keys, sums, weights = (np.concatenate(column) for column in (owners, sums, weights))
    documents, keys = np.unique(keys, return_inverse=True)
    sums, weights = np.bincount(keys, sums), np.bincount(keys, weights)
    draws = Bootstrap(range(len(documents)))
    return draws.mean(range(len(documents)), sums / weights, weights)._replace(value=nll)
