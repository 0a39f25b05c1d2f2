"""Whether a run's config fits the models that its stages start from, by their config.json and tokenizer alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from lfjax.config import Config, InputError
from lfjax.interop import hf
from lfjax.models import lora, presets
from lfjax.models.lora import LoRA
from lfjax.run.stage import LANGUAGE_MODEL, SCORER, Stage
from lfjax.sharding import check_rules
from lfjax.tokenizers import Tokenizer, least_rows
from lfjax.types import leaf_name

Shapes = dict[str, tuple[int, ...]]  # path of a parameter -> shape
Read = Callable[[str, str], tuple[Any, Tokenizer | None]]  # as `form_of`


@contextlib.contextmanager
def naming(key: str | None):
    """Puts the config key before what is wrong with the file or folder that it names; None: the run's own."""
    try:
        yield
    except InputError as error:
        raise InputError(f"config.{key}: {error}" if key else str(error)) from error


def form_of(key: str, folder: str) -> tuple[Any, Tokenizer | None]:
    """(form, tokenizer or None) of the model folder that `config.<key>` names; reads no tensor."""
    with naming(key):
        form, _, tokenizer = hf.load_form(folder)
    return form, tokenizer


def check_models(config: Config, stages: Mapping[str, Stage], vocab_size: int, read: Read = form_of) -> None:
    """Reads config.json and the tokenizer of each model that a stage starts from, no tensor.

    Args:
      stages: name -> declaration.
      vocab_size: of the run's tokenizer.

    Raises:
      InputError: one cannot be read; LoRA has no matrix in it or too large a rank; `mesh.rules` are for another model.
    """

    def form(key: str, name: str | None):
        if name is None:
            return presets.described(config.model, vocab_size=vocab_size, vocab_multiple=config.model.vocab_multiple)
        return form(*stages[name].start(config, stages)) if name in stages else read(key, name)[0]

    found: list[tuple[str, tuple[int, ...]]] = []
    for stage in (stages[name] for name in config.stages):
        starts = stage.models(config, stages).items() or [stage.start(config, stages)] * stage.trains(config)
        for key, name in starts:
            shape = form(key, name)
            if name and name not in stages:
                check_kind(f"config.{key}: {name}", stage.wanted(config, key), shape.num_labels)
            found += _shapes(shape.parameters()).items()
            if stage.heads:
                found += _shapes(dataclasses.replace(shape, num_labels=1).parameters()).items()
            if stage.uses_lora(config) and key not in stage.reads_only(config):
                lora.targets(shape, LoRA(**config.model.lora.to_dict()))
    if config.mesh.rules and found:
        check_rules(tuple(config.mesh.rules), found)


def check_kind(model: str, wanted: str, num_labels: int) -> None:
    """Raises InputError, which begins with `model`, where one of so many scores is not what is wanted."""
    if wanted == SCORER and num_labels != 1:
        raise InputError(f"{model} is no reward model: it has no head with one score; name another")
    if wanted == LANGUAGE_MODEL and num_labels:
        raise InputError(f"{model} is a model of scores, not a language model; name another")


def check_vocabularies(
    config: Config, stages: Mapping[str, Stage], own: Tokenizer, where: Path, read: Read = form_of
) -> None:
    """Token ids mean the same to the run's tokenizer, read from `where`, as to every model folder that stages read.

    Raises InputError.
    """
    for stage in (stages[name] for name in config.stages):
        for key, name in stage.models(config, stages).items():
            if name not in config.stages:
                key, folder = (key, name) if name not in stages else stages[name].start(config, stages)
                form, other = read(key, str(folder))
                check_vocabulary(f"config.{key}: {folder}", form.vocab_size, other, own, where)


def check_vocabulary(model: str, size: int, tokenizer: Tokenizer | None, own: Tokenizer, where: Path) -> None:
    """Token ids mean the same to a model of so many, with its tokenizer, as to the run's own from the folder `where`.

    Raises InputError, which begins with `model`.
    """
    if size < least_rows(own):
        raise InputError(
            f"{model} has {size} tokens, the run's tokenizer ({where}) {own.vocab_size}; use a model trained with that"
            " tokenizer"
        )
    ids = range(own.vocab_size)
    if tokenizer is not None and (tokenizer.vocab_size != own.vocab_size or tokenizer.pieces(ids) != own.pieces(ids)):
        raise InputError(
            f"{model} has another vocabulary than the run's tokenizer ({where}); set config.tokenizer.path to that"
            " folder, or use a model trained with the run's tokenizer"
        )


def _shapes(table: dict) -> Shapes:
    """Of a table of (shape, init)."""
    leaves = jax.tree_util.tree_leaves_with_path(table, is_leaf=lambda x: isinstance(x, tuple))
    return {leaf_name(path): shape for path, (shape, _) in leaves}
