"""Whether a run's config fits the models that its stages start from, by their config.json and tokenizer alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import jax

from lfjax.config import Config, InputError
from lfjax.interop import hf
from lfjax.models import lora, presets
from lfjax.models.lora import LoRA
from lfjax.run.stage import Stage
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


def check_models(config: Config, stages: Mapping[str, Stage], vocab_size: int) -> None:
    """Reads config.json and the tokenizer of each model that a stage starts from, no tensor.

    Args:
      stages: name -> declaration.
      vocab_size: of the run's tokenizer.

    Raises:
      InputError: one cannot be read; LoRA has no matrix in it or too large a rank; `mesh.rules` are for another model.
    """
    read = functools.cache(_form)

    def form_of(key: str, name: str | None):
        if name is None:
            return presets.described(config.model, vocab_size=vocab_size, vocab_multiple=config.model.vocab_multiple)
        return form_of(*stages[name].start(config, stages)) if name in stages else read(key, name)

    found: list[tuple[str, tuple[int, ...]]] = []
    for stage in (stages[name] for name in config.stages):
        starts = stage.models(config, stages).items() or [stage.start(config, stages)] * stage.trains(config)
        for key, name in starts:
            form = form_of(key, name)
            found += _shapes(form.parameters()).items()
            if stage.heads:
                found += _shapes(dataclasses.replace(form, num_labels=1).parameters()).items()
            if stage.uses_lora(config) and key not in stage.reads_only(config):
                lora.targets(form, LoRA(**config.model.lora.to_dict()))
    if config.mesh.rules and found:
        check_rules(tuple(config.mesh.rules), found)


def _form(key: str, folder: str):
    with naming(key):
        return hf.load_form(folder)[0]


def _shapes(table: dict) -> Shapes:
    """Of a table of (shape, init)."""
    leaves = jax.tree_util.tree_leaves_with_path(table, is_leaf=lambda x: isinstance(x, tuple))
    return {leaf_name(path): shape for path, (shape, _) in leaves}
