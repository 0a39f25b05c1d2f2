"""What can be known of a run before anything is written: better then than after hours."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from lfjax.config import Config, InputError
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import prompt_tokens, response_tokens
from lfjax.interop import hf
from lfjax.records import Record
from lfjax.run import starts
from lfjax.run.data import Data
from lfjax.run.stage import LANGUAGE_MODEL, SCORER, Stage
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


def unread(config: Config, stages: Stages) -> list[tuple[str, str]]:
    """(stage, what to know of it): it trains a model of scores, and a later stage takes its score from elsewhere."""
    found = []
    for place, name in enumerate(config.stages):
        later = config.stages[place + 1 :]
        read = any(name in stages[stage].models(config, stages).values() for stage in later)
        raisers = [stage for stage in later if stages[stage].scored_by(config[stage])]
        if stages[name].makes == SCORER and raisers and not read:
            without = ",".join(stage for stage in config.stages if stage != name)
            by = f'"{raisers[0]}" takes its score from a {stages[raisers[0]].scored_by(config[raisers[0]])}'
            found.append((name, f"no later stage reads its model: {by}; leave it out with --config.stages={without}"))
    return found


def check_data(config: Config, stages: Stages, data: Data) -> None:
    """Every stage can learn from the splits that it reads. Raises InputError."""
    for stage in config.stages:
        for split in stages[stage].splits if stages[stage].learns_from else ():
            teaches = stages[stage].teaches
            if not any(map(teaches, data.records[split])):
                count = sum(teaches(record) for name in SPLITS for record in data.records[name])
                larger = data.larger(split, lambda records, teaches=teaches: any(map(teaches, records)))
                others = _taught_by_feedback(stages, data.records[split])
                hint = f"; it holds {others[0].learns_from}, for the stage {others[0].name}" if others else ""
                raise InputError(
                    f"stage {stage}: {data.file(split)}: the {split} split holds no {stages[stage].learns_from} to"
                    f" learn from ({count} record{'s' * (count != 1)} of all splits {'does' if count == 1 else 'do'}"
                    f'{hint}); add some{larger}, or leave "{stage}" out of config.stages'
                )
    for stage in config.stages:
        stages[stage].check_data(config, data)


def _taught_by_feedback(stages: Stages, records: Sequence[Record]) -> list[Stage]:
    """The stages that learn from the feedback on some of the records, and not from the bare texts."""

    def taught(stage: Stage, record: Record) -> bool:
        return stage.teaches(record) and not stage.teaches(dataclasses.replace(record, feedback=[]))

    return [stage for stage in stages.values() if any(taught(stage, record) for record in records)]


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
        if config.data.too_long == "error":
            check_lengths(config, stage, data, tokenizer)
        stage.check_texts(config, data, tokenizer)


def check_lengths(config: Config, stage: Stage, data: Data, tokenizer) -> None:
    """No text that the stage learns from would be cut; raises InputError. A text that it builds a model on never is."""
    own = config[stage.name]
    if "seq_len" not in own or stage.builds:
        return
    most = own.seq_len + ("buckets" not in own)  # a packed row holds a token more: its first one is no target
    for record in (record for split in stage.splits for record in data.records[split]):
        texts = stage.texts(record)
        before = len(prompt_tokens(record, tokenizer)) if texts else 0
        for text in texts:
            tokens = before + len(response_tokens(record, text, tokenizer))
            if tokens > most:
                raise InputError(
                    f"{record.where}: prompt and response have {tokens} tokens; allowed: at most {most}"
                    f" (config.{stage.name}.seq_len); raise it, shorten the text, or set config.data.too_long=cut"
                )
