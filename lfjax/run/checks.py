"""What can be known of a run before anything is written: better then than after hours."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from jax.sharding import Mesh

from lfjax.config import Config, InputError
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import prompt_tokens, response_tokens
from lfjax.interop import hf
from lfjax.run import starts
from lfjax.run.data import Data
from lfjax.run.stage import LANGUAGE_MODEL, Stage
from lfjax.sharding import batch_shards

Stages = Mapping[str, Stage]


def check_batches(config: Config, stages: Stages, mesh: Mesh) -> None:
    """Every batch divides over the mesh. Raises InputError."""
    shards = batch_shards(mesh)
    for stage in config.stages:
        rows = config[stages[stage].name].get("batch_size", shards)
        if rows % shards:
            raise InputError(
                f"config.{stage}.batch_size: {rows} rows do not divide over mesh data x fsdp = {shards};"
                f" use a multiple of {shards}"
            )


def check_keywords(config: Config, stages: Stages, steps: Mapping[str, Callable]) -> None:
    """A step's section holds keywords that the step takes, and all that it cannot do without. Raises InputError."""
    declared = [(stage.name, name, step) for stage in stages.values() for name, step in stage.steps.items()]
    for stage, name, step in declared:
        parameters = inspect.signature(steps[name]).parameters
        if not step.section or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        needed = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
        head, _, part = step.section.partition(".")
        given, dotted = config[head][part], config.steps[name]
        for key in given:
            if key not in parameters:
                near = difflib.get_close_matches(key, parameters, n=1)
                hint = f"; did you mean config.{step.section}.{near[0]}?" if near else ""
                raise InputError(f"config.{step.section}.{key}: {dotted} takes no keyword {key!r}{hint}")
        missing = sorted(needed - set(given) - set(step.given))
        if missing and stage in config.stages:
            raise InputError(f"config.{step.section}.{missing[0]}: not set; {dotted} needs this keyword")


def check_sources(config: Config, stages: Stages, source: Callable[[str, str], Path]) -> None:
    """Model folders and the tokenizer exist, and no encoder is where none can be. Raises InputError.

    Args:
      source: (config key, folder) raises where there is no such folder.
    """
    chain = [stages[stage] for stage in config.stages]
    folders = {k: v for stage in chain for k, v in stage.models(config, stages).items() if v not in stages}
    encoders = {}
    for key, name in folders.items():
        source(key, name)
        with starts.naming(key):
            encoders |= {key: name} if hf.names_encoder(name) else {}
    for stage in chain:
        key, _ = stage.start(config, stages)
        if stage.makes == LANGUAGE_MODEL and key in encoders:
            raise InputError(f"config.{key}: {encoders[key]} is an encoder, not a language model; name another")
    for stage in chain:
        stage.check_encoders(config, encoders)
    for key, path in (("model.init_from", config.model.init_from), ("tokenizer.path", config.tokenizer.path)):
        if path and not Path(path).exists():
            raise InputError(f"config.{key}: {path}: no such file or folder; correct the path")


def check_data(config: Config, stages: Stages, data: Data) -> None:
    """Every stage can learn from the splits that it reads. Raises InputError."""
    for stage in config.stages:
        for split in stages[stage].splits if stages[stage].learns_from else ():
            teaches = stages[stage].teaches
            if not any(map(teaches, data.records[split])):
                count = sum(teaches(record) for name in SPLITS for record in data.records[name])
                larger = data.larger(split, lambda records, teaches=teaches: any(map(teaches, records)))
                raise InputError(
                    f"stage {stage}: {data.file(split)}: the {split} split holds no {stages[stage].learns_from} to"
                    f" learn from ({count} record{'s' * (count != 1)} of all splits {'does' if count == 1 else 'do'});"
                    f' add some{larger}, or leave "{stage}" out of config.stages'
                )
    for stage in config.stages:
        stages[stage].check_data(config, data)


def check_texts(config: Config, stages: Stages, data: Data, tokenizer) -> None:
    """What stages could not use of the records once they are tokens.

    Raises:
      InputError: a chat template refuses a prompt or an answer, or what a stage's `check_texts` finds.
    """
    chain = [stages[stage] for stage in config.stages]
    for split in SPLITS:
        for record in data.records[split]:
            if not isinstance(record.prompt, str):
                prompt_tokens(record, tokenizer)
                for text in dict.fromkeys(text for stage in chain for text in stage.texts(record)):
                    response_tokens(record, text, tokenizer)
    for stage in chain:
        stage.check_texts(config, data, tokenizer)
