"""Whether a run's config fits the models that its stages start from, by their config.json and tokenizer alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax

from lfjax import config as configs
from lfjax.config import Config, InputError
from lfjax.interop import hf
from lfjax.models import lora, presets
from lfjax.models.lora import LoRA
from lfjax.sharding import check_rules
from lfjax.types import leaf_name

Shapes = dict[str, tuple[int, ...]]  # path of a parameter -> shape


@contextlib.contextmanager
def naming(key: str | None):
    """Puts the config key before what is wrong with the file or folder that it names; None: the run's own."""
    try:
        yield
    except InputError as error:
        raise InputError(f"config.{key}: {error}" if key else str(error)) from error


def start_of(config: Config, stage: str) -> tuple[str, str | None]:
    """(config key, stage or folder) of the model that a stage starts from; None: it makes a new one."""
    if stage == "pretrain":
        return "model.init_from", config.model.init_from
    return f"{stage}.init_from", configs.init_from(config, stage)


def check_models(config: Config, vocab_size: int) -> None:
    """Reads config.json and the tokenizer of each model that a stage starts from, no tensor.

    Args:
      vocab_size: of the run's tokenizer.

    Raises:
      InputError: one cannot be read; LoRA has no matrix in it or too large a rank; `mesh.rules` are for another model.
    """
    read = functools.cache(lambda key, folder: _form(key, folder))

    def form_of(key: str, name: str | None):
        if name is None:
            return presets.described(config.model, vocab_size=vocab_size, vocab_multiple=config.model.vocab_multiple)
        return form_of(*start_of(config, name)) if name in configs.STAGES else read(key, name)

    found: list[tuple[str, tuple[int, ...]]] = []
    for stage, key, name in _starts(config):
        form = form_of(key, name)
        found += _shapes(form.parameters()).items()
        if stage in ("reward", "classify", "ppo"):
            found += _shapes(dataclasses.replace(form, num_labels=1).parameters()).items()
        if configs.uses_lora(config, stage) and (key != "ppo.reward" or config.ppo.value_init == "reward"):
            lora.targets(form, LoRA(**config.model.lora.to_dict()))
    if config.mesh.rules and found:
        check_rules(tuple(config.mesh.rules), found)


def _starts(config: Config) -> Iterator[tuple[str, str, str | None]]:
    """(stage, config key, stage or folder) of every model that a training stage starts from."""
    for stage in config.stages:
        if stage == "pretrain":
            yield stage, *start_of(config, stage)
        else:
            yield from ((stage, key, name) for key, name in configs.model_sources(config, stage).items())


def _form(key: str, folder: str):
    with naming(key):
        return hf.load_form(folder)[0]


def _shapes(table: dict) -> Shapes:
    """Of a table of (shape, init)."""
    leaves = jax.tree_util.tree_leaves_with_path(table, is_leaf=lambda x: isinstance(x, tuple))
    return {leaf_name(path): shape for path, (shape, _) in leaves}
