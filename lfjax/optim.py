"""Optimisers: a plain optax chain from plain numbers, schedules on the state's step, gradients by sums and weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lfjax.types import Mean, map_named, split_rows

Optimizer = optax.GradientTransformationExtraArgs
Schedule = Callable[[Any], Any]
Number = float | Array  # of the latter a scalar, traced perhaps: an argument of the compiled program

# (regex on the parameter path, learning-rate multiplier, weight-decay multiplier); the first match wins, else (1, 1).
DEFAULT_GROUPS = ((r"norm\d?/|bias$|positions$|token_types$|cutpoints$", 1.0, 0.0),)

# Matrices of hidden layers: (regex, input axes, output axes); axis 0 stacks the layers.
MUON_MATRICES = (
    (r"layers/attention/[qkv]$", (1,), (2, 3)),
    (r"layers/attention/o$", (1, 2), (3,)),
    (r"layers/mlp/(up|gate|down)$", (1,), (2,)),
)
_STACKED = re.compile(r"(^|/)layers/")  # leaves [L ...]
_BIAS = re.compile(r"bias$")  # a vector a layer, also where it is [L N H]
_VOCABULARY = ((re.compile(r"embed/tokens$"), 0), (re.compile(r"unembed/(kernel|bias)$"), -1))  # and the axis of tokens


def weighted_grads(
    loss_fn: Callable, params, batch, num_microbatches: int = 1, *, rng=None, has_aux: bool = False
) -> tuple[Any, Any]:
    """Gradient of a weighted mean, the same whether the batch is taken whole or in microbatches.

    Sums of losses and of their gradients are added over microbatches in float32 and divided once, by the weight of
    the whole batch: averaging the microbatches' means instead is wrong whenever their weights differ.

    Args:
      loss_fn: (params, micro) -> Mean, or (params, micro, key) -> Mean where `rng` is given;
        with `has_aux` it returns (Mean, dict of Mean).
      batch: tree of arrays [B ...]; B is a multiple of `num_microbatches`.
      num_microbatches: microbatch i holds rows i, i + n, i + 2n, ...
      rng: folded with the microbatch's index.
    Returns:
      (Mean, gradients), or ((Mean, aux), gradients).
    """

    def total(params, micro, key):
        out = loss_fn(params, micro) if rng is None else loss_fn(params, micro, key)
        mean, aux = out if has_aux else (out, {})
        return mean.sum, (mean, aux)

    gradient = jax.grad(total, has_aux=True)
    if num_microbatches == 1:
        grads, (mean, aux) = gradient(params, batch, rng)
    else:

        def micro_grads(index, micro):
            key = None if rng is None else jax.random.fold_in(rng, index)
            return gradient(params, micro, key)

        def body(total, indexed):
            return jax.tree.map(jnp.add, total, micro_grads(*indexed)), None

        micros = split_rows(batch, num_microbatches)
        indices = jnp.arange(num_microbatches)
        shapes = jax.eval_shape(micro_grads, indices[0], jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, (mean, aux)), _ = jax.lax.scan(body, zeros, (indices, micros))
    scale = 1.0 / jnp.where(mean.weight > 0, mean.weight, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    return ((mean, aux) if has_aux else mean), grads


def coupled_grads(forward: Callable, loss_fn: Callable, params, batch, num_microbatches: int = 1, *, rng=None):
    """Gradient of a loss that couples the rows of a batch, with one microbatch's activations in memory at a time.

    The outputs of all rows come first; the loss's gradient by these outputs is then carried back through one
    microbatch after the other: the same gradient as one big batch. Source: Gao et al. 2021, arXiv:2101.06983.

    Args:
      forward: (params, micro, key) -> outputs [b ...] of its rows.
      loss_fn: outputs [B ...] of the whole batch -> (scalar loss, aux).
      batch, num_microbatches, rng: as in `weighted_grads`.
    Returns:
      ((loss, aux), gradients).
    """
    if num_microbatches == 1:
        return jax.value_and_grad(lambda p: loss_fn(forward(p, batch, rng)), has_aux=True)(params)
    n = num_microbatches

    def outputs_of(indexed):
        index, rows = indexed
        key = None if rng is None else jax.random.fold_in(rng, index)  # the key weighted_grads will use
        return forward(params, rows, key)

    outputs = jax.lax.map(outputs_of, (jnp.arange(n), split_rows(batch, n)))  # [n B/n ...]
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(-1, *outputs.shape[2:])  # back in the batch's order
    (loss, aux), by_output = jax.value_and_grad(loss_fn, has_aux=True)(outputs)

    def surrogate(params, micro, key=None):
        rows, cotangents = micro
        return Mean(jnp.sum(forward(params, rows, key) * cotangents), jnp.float32(1.0 / n))

    _, grads = weighted_grads(surrogate, params, (batch, by_output), n, rng=rng)
    return (loss, aux), grads


def schedule(
    kind: str,
    *,
    learning_rate: Number,
    total_steps: int | Array,
    warmup_steps: int | Array = 0,
    end_factor: Number = 0.0,
) -> Schedule:
    """Learning rate as a function of the step: linear warm-up, then "constant", "linear" or "cosine" to end_factor.

    The first step's rate is learning_rate / warmup_steps, never 0. All but the kind may be traced scalars.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule: {kind!r}; allowed: constant, linear, cosine")

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(warmup_steps, jnp.maximum(total_steps - 1, 0))
        progress = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1), 0.0, 1.0)
        if kind == "linear":
            decayed = 1.0 - (1.0 - end_factor) * progress
        elif kind == "cosine":
            decayed = end_factor + (1.0 - end_factor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            decayed = jnp.float32(1.0)
        rising = (step + 1.0) / jnp.maximum(warmup, 1)
        return jnp.float32(learning_rate) * jnp.where(step < warmup, rising, decayed)

    return rate


def make_optimizer(
    rate: Schedule | Number,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    clip_norm: Number = 0.0,
    groups: tuple = DEFAULT_GROUPS,
    vocab_size: int | None = None,
) -> Optimizer:
    """Clip -> precondition -> decoupled weight decay -> minus the learning rate at the state's step.

    `update(grads, opt_state, params, step=state.step)`: the schedule reads the training step, so a chain that is
    called several times a step (PPO's epochs and minibatches) does not run ahead of it.

    Args:
      rate: learning rate, or a schedule of the step.
      name: "adamw", "adafactor", "lion" or "muon" (Muon on the layers' matrices, Adam on all else).
      weight_decay, clip_norm: a plain 0 leaves decay and clipping out of the program; the latter is a global norm.
      groups: (regex, learning-rate multiplier, weight-decay multiplier) rows; a multiplier of 0 freezes.
      vocab_size: rows of the vocabulary's tables from here on are padding, in no mean; None: there are none.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    precondition = {
        "adamw": lambda: adam,
        "adafactor": lambda: _adafactor(vocab_size),
        "lion": lambda: optax.scale_by_lion(b1=b1, b2=b2),
        "muon": lambda: _muon(adam, beta=b1),
    }
    if name not in precondition:
        raise ValueError(f"optimizer {name!r}; allowed: {', '.join(precondition)}")
    for pattern, *_ in groups:
        re.compile(pattern)
    decays, clips = (isinstance(number, Array) or number != 0 for number in (weight_decay, clip_norm))

    def multiplier(leaf: str, column: int) -> float:
        return next((row[column] for row in groups if re.search(row[0], leaf)), 1.0)

    def finish(updates, params, step):
        lr = rate(step) if callable(rate) else jnp.float32(rate)

        def leaf(name, update, param):
            decayed = update + weight_decay * multiplier(name, 2) * param if decays else update
            return (-lr * multiplier(name, 1) * decayed).astype(param.dtype)

        return map_named(leaf, updates, params)

    def update(updates, state, params=None, **extra):
        return finish(updates, params, extra["step"]), state

    links = [optax.clip_by_global_norm(clip_norm)] if clips else []
    last = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return optax.chain(*links, precondition[name](), last)


def _adafactor(vocab_size: int | None):
    """Adafactor of each layer's matrices [inputs, outputs] and vectors alone, as if no leaf were stacked over layers.

    Padding in the vocabulary's tables does not count in clipping and parameter scale (of the factored moments its zeros
    cancel). Second moments that are not factored have their parameter's shape, and so its sharding.
    Source: Shazeer and Stern 2018, arXiv:1804.04235.
    """
    each = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    shared: Any = None
    axes = optax.FactoredState(count=shared, v_row=0, v_col=0, v=0), optax.EmptyState(), optax.EmptyState()

    def by_layer(params):
        def shaped(name, x):
            if _BIAS.search(name):
                return x.reshape(x.shape[0], -1)
            sizes = [math.prod(x.shape[axis] for axis in axes) for axes in _matrix(name) if axes]
            return x.reshape(x.shape[0], *sizes) if sizes else x

        return map_named(shaped, params)

    def shaped_as(tree, like):
        return jax.tree.map(lambda x, y: x.reshape(y.shape) if x.size == y.size else x, tree, like)

    def with_moments_as(state, like):
        return (state[0]._replace(v=shaped_as(state[0].v, like)), *state[1:])

    def layers(params) -> int:
        return next((x.shape[0] for x in jax.tree.leaves(params)), 1)

    def init(params):
        state = jax.vmap(each.init, out_axes=axes, axis_size=layers(params))(by_layer(params))
        return with_moments_as(state, params)

    def update(updates, state, params=None):
        flat = by_layer(params)
        apply = jax.vmap(each.update, in_axes=(0, axes, 0), out_axes=(0, axes), axis_size=layers(params))
        updates, state = apply(shaped_as(updates, flat), with_moments_as(state, flat), flat)
        return shaped_as(updates, params), with_moments_as(state, params)

    def clip(updates, params=None):
        del params
        return map_named(lambda name, u: u / jnp.maximum(1.0, _rms(name, u, vocab_size)), updates)

    def scale(updates, params):
        return map_named(lambda name, u, p: u * jnp.maximum(_rms(name, p, vocab_size), 1e-3), updates, params)

    single = optax.chain(optax.scale_by_factored_rms(), optax.stateless(clip), optax.stateless(scale))
    return optax.partition(
        {"stacked": optax.GradientTransformation(init, update), "single": single},
        lambda params: map_named(lambda n, _: "stacked" if _STACKED.search(n) else "single", params),
    )


def _rms(leaf: str, x, vocab_size: int | None):
    """Root of the mean square, without the padding of a vocabulary's table."""
    axis = next((axis % x.ndim for pattern, axis in _VOCABULARY if pattern.search(leaf)), None)
    if axis is None or vocab_size is None or x.shape[axis] <= vocab_size:
        return jnp.sqrt(jnp.mean(jnp.square(x)))
    counts = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < vocab_size
    return jnp.sqrt(jnp.mean(jnp.square(x), where=counts))


def _matrix(leaf: str) -> tuple:
    """Input and output axes by MUON_MATRICES; none where the leaf is not one of them."""
    return next((row[1:] for row in MUON_MATRICES if re.search(row[0], leaf)), ((), ()))


def _muon(adam, beta: float):
    """Muon for MUON_MATRICES, Adam for the rest.

    Source: Jordan 2024, Muon; updates scaled by sqrt(max(1, out / in)). Norms, biases, embeddings and heads are
    not matrices of a hidden layer and stay with Adam.
    """

    def dimension_numbers(params):
        return map_named(
            lambda name, p: p if isinstance(p, optax.MaskedNode) else MuonDimensionNumbers(*_matrix(name)),
            params,
        )

    def scale(updates, params=None):
        del params

        def leaf(name, u):
            fan_in, fan_out = (math.prod(u.shape[axis] for axis in axes) for axes in _matrix(name))
            return u * max(1.0, fan_out / fan_in) ** 0.5

        return map_named(leaf, updates)

    muon = optax.chain(scale_by_muon(beta=beta, weight_dimension_numbers=dimension_numbers), optax.stateless(scale))
    return optax.partition(
        {"muon": muon, "adam": adam}, lambda params: map_named(lambda n, _: "muon" if _matrix(n)[0] else "adam", params)
    )
