"""The config section of a stage that trains: what all of them have, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lfjax.config import (
    Config,
    InputError,
    at_least,
    check_buckets,
    check_group,
    optim_section,
    sampling_section,
    section,
)


def optim_overrides(**set_here) -> Config:
    """A stage's own values; what is None is taken from `config.optim`."""
    types = {"name": str, "learning_rate": float, "schedule": str, "warmup_steps": int, "end_factor": float,
             "b1": float, "b2": float, "eps": float, "weight_decay": float, "clip_norm": float,
             "groups": tuple}  # fmt: skip
    found = ConfigDict({name: placeholder(kind) for name, kind in types.items()})
    found.update(set_here)
    return found


def sampling_overrides(**set_here) -> Config:
    """A stage's own values; what is None is taken from `config.sampling`."""
    types = {"prompt_buckets": tuple, "prompt_min": int, "prompt_max": int, "stop": tuple, "max_new_tokens": int,
             "temperature": float, "min_new_tokens": int, "top_k": int, "top_p": float, "min_p": float}  # fmt: skip
    found = ConfigDict({name: placeholder(kind) for name, kind in types.items()})
    found.update(set_here)
    return found


def check_sampling(config: Config, stage: str, *, whole: bool) -> None:
    """What prompts and responses of a stage are.

    Args:
      whole: it trains on its samples, which have to come from the whole distribution.
    Raises:
      InputError: a value cannot be; names the key that was set.
    """
    found = sampling_section(config, stage)

    def key(leaf: str) -> str:
        own = config[stage].sampling[leaf] is not None
        return f"config.{stage}.sampling.{leaf}" if own else f"config.sampling.{leaf}"

    if whole and (found.top_k or found.top_p != 1.0 or found.min_p):
        leaf = "top_k" if found.top_k else "top_p" if found.top_p != 1.0 else "min_p"
        raise InputError(
            f"{key(leaf)}: {found[leaf]}; what trains on its samples takes them from the whole distribution, or its"
            " ratios are wrong; set top_k=0, top_p=1.0 and min_p=0.0"
        )
    lengths = found.prompt_buckets
    if not lengths or not all(type(length) is int and length >= 1 for length in lengths):
        raise InputError(
            f"{key('prompt_buckets')}: {lengths}; give lengths in tokens, such as (32, 64), each at least 1"
        )
    if not all(isinstance(text, str) and text for text in found.stop):
        raise InputError(f"{key('stop')}: {found.stop!r}; give texts of one token each, such as ('.', '!')")
    lowest = {"temperature": 1e-6, "prompt_min": 1, "max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0}
    for leaf, low in lowest.items():
        if found[leaf] < low:
            raise InputError(f"{key(leaf)}: {found[leaf]}; allowed: at least {low:g}")
    if not 0.0 < found.top_p <= 1.0 or not 0.0 <= found.min_p <= 1.0:
        leaf = "min_p" if 0.0 < found.top_p <= 1.0 else "top_p"
        raise InputError(f"{key(leaf)}: {found[leaf]}; allowed: {'0' if leaf == 'min_p' else 'above 0, up'} to 1")
    if found.min_new_tokens > found.max_new_tokens:
        most = f"at most max_new_tokens = {found.max_new_tokens}"
        raise InputError(f"{key('min_new_tokens')}: {found.min_new_tokens}; allowed: {most}")
    most = max(lengths) - 1
    if not found.prompt_min <= found.prompt_max <= most:
        raise InputError(
            f"{key('prompt_max')}: {found.prompt_max}; allowed: from prompt_min {found.prompt_min} to the largest of"
            f" prompt_buckets less BOS = {most}"
        )


def training(**differs) -> Config:
    """What every training stage has, and what is its own."""
    return section(
        **{
            "steps": 0,  # optimiser steps; 0: as many as `epochs` say
            "epochs": 1.0,
            "batch_size": 16,  # rows of the global batch, over all devices and processes
            "log_every": 10,  # steps a row of metrics.jsonl
            "eval_every": 0,  # steps between validations; 0: four in the stage. There is one at the end, too
            "keep_best": placeholder(str),  # a held-out figure: the model that goes out is that of its best validation
            "save_every": 100,  # steps between checkpoints
            "keep": 2,  # checkpoints kept
            "optim": optim_overrides(),
            **differs,
        }
    )


def check_training(config: Config, name: str, steps: Iterable[str]) -> None:
    """The keys of `training` in section `name`, and those that several such sections have.

    Args:
      steps: the sections of the stage's steps.
    Raises:
      InputError: a value cannot be.
    """
    own = config[name]
    at_least(config, 0, f"{name}.steps", f"{name}.eval_every")
    at_least(config, 1, *(f"{name}.{key}" for key in ("batch_size", "log_every", "save_every", "keep")))
    if own.steps == 0 and own.epochs <= 0:
        raise InputError(f"config.{name}.epochs: {own.epochs}; give steps or epochs above 0")
    for key in own:
        if key.endswith("optim"):
            _check_optim(config, name, key)
    for part in steps:
        if part.startswith(f"{name}."):
            _check_pieces(config, name, part.removeprefix(f"{name}."))
    if "dropout" in own and not 0.0 <= own.dropout < 1.0:
        raise InputError(f"config.{name}.dropout: {own.dropout}; allowed: 0 up to, not including, 1")
    if "seq_len" in own and own.seq_len < 2:
        raise InputError(f"config.{name}.seq_len: {own.seq_len}; allowed: at least 2")
    if "buckets" in own:
        check_buckets(config, f"{name}.buckets", 2)
        if own.seq_len > max(own.buckets):
            most = f"at most the largest of {name}.buckets = {max(own.buckets)}"
            raise InputError(f"config.{name}.seq_len: {own.seq_len}; allowed: {most}")


def _check_pieces(config: Config, stage: str, part: str) -> None:
    """A batch divides into the pieces that a step takes it in."""
    given, rows = config[stage][part], config[stage].batch_size
    pieces = {f"{part}.{key}": given[key] for key in ("minibatches", "num_microbatches") if key in given}
    parts = math.prod(pieces.values())
    if pieces and (min(pieces.values()) < 1 or rows % parts):
        raise InputError(f"config.{stage}.batch_size: {rows} rows do not divide into {' x '.join(pieces)} = {parts}")


def _check_optim(config: Config, stage: str, name: str) -> None:
    optim, own = optim_section(config, stage, name), config[stage][name]

    def found(leaf: str) -> str:
        """The key that was set, in the stage's own section or in config.optim, and its value."""
        key = f"config.{stage}.{name}" if own.get(leaf) is not None else "config.optim"
        return f"{key}.{leaf}: {optim[leaf]!r}"

    if optim["name"] not in ("adamw", "adafactor", "lion", "muon"):
        raise InputError(f"{found('name')}; allowed: adamw, adafactor, lion, muon")
    if optim["schedule"] not in ("constant", "linear", "cosine"):
        raise InputError(f"{found('schedule')}; allowed: constant, linear, cosine")
    if optim["learning_rate"] <= 0:
        raise InputError(f"{found('learning_rate')}; allowed: above 0")
    for leaf in ("warmup_steps", "end_factor", "eps", "weight_decay", "clip_norm"):
        if optim[leaf] < 0:
            raise InputError(f"{found(leaf)}; allowed: at least 0")
    for leaf in ("b1", "b2"):
        if not 0.0 <= optim[leaf] < 1.0:
            raise InputError(f"{found(leaf)}; allowed: 0 up to, not including, 1")
    for row in optim["groups"]:
        check_group(row)
