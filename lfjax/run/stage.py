"""A method as one declaration: all that the house has to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lfjax.config import Config, InputError
from lfjax.records import Record
from lfjax.report.catalogue import Figure
from lfjax.run.sections import check_training

LANGUAGE_MODEL, SCORER, CLASSIFIER, TOKENIZER = "language model", "scorer", "classifier", "tokenizer"


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that `config.steps` names.

    Attributes:
      path: its default, "module:function".
      section: of the config, with its keywords; "": it has none.
      given: the keywords that the stage gives it.
    """

    path: str
    section: str = ""
    given: tuple[str, ...] = ("model", "tx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. What a field's default says is what most stages need not say.

    Attributes:
      name: of its section in the config, of its folders in the run directory, before the "/" of its figures.
      title: what a report calls it in a sentence: "before fine-tuning and after".
      summary, source: what it is, in a line, and where it was published.
      section: its keys with their defaults; `lfjax.run.sections.training` has what all training stages have.
      moved: what a key was called before -> what it is called now.
      run: (run) -> final figures, "name/leaf" -> value.
      steps: name in `config.steps` -> step; stages that share a step give it the same default.
      makes: what models/<name>/ holds; "": it makes nothing that others start from.
      learns_from: the records that `teaches` says yes to, in words; every one of `splits` has to hold one.
      texts: (record) -> the responses that it makes tokens of.
      sources: (config) -> {config key: stage, folder or "auto"} of the models that it starts from or reads, its start
        first; `models` says what "auto" is.
      builds: it makes a new model of `config.model`, or starts from `model.init_from`, which stands for its model in
        runs without it.
      reads_only: (config) -> the keys of `sources` whose models it does not train.
      scorers: (config) -> the keys of `sources` whose models have to give a score.
      functions: (config) -> {config key: "module:function"} of Python functions that it calls.
      heads: it trains a head of scores on the models that it starts from.
      longest: (config) -> (key and what else counts, tokens) of its longest sequence.
      check: (config) raises InputError where the config alone is wrong.
      check_encoders: (config, {key of a source: folder of an encoder}) raises where these do not fit.
      check_data: (config, data) raises where the records do not fit.
      check_texts: (config, data, tokenizer) raises where the records do not fit once they are tokens.
      held_out: leaves of its validation's figures, that which tells its models best first; `keep_best` names one.
      figures: metric -> what it is called; leaves that methods share need none (`lfjax.report.catalogue`).
      scored_by: (its section) -> what gives the score that it raises, "reward model"; "": it raises none.
      unit: what one of its steps is called.
      compares: it compares models before and after.
      told: what a run of it is, where it has no score: "fine-tuning on given answers".
    """

    name: str
    title: str
    summary: str
    source: str
    section: Callable[[], Config]
    run: Callable[[Any], dict[str, float]]
    steps: Mapping[str, Step] = dataclasses.field(default_factory=dict)
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    makes: str = ""
    learns_from: str = ""
    teaches: Callable[[Record], bool] = lambda record: True
    splits: tuple[str, ...] = ("train", "validation")
    texts: Callable[[Record], list[str]] = lambda record: []
    sources: Callable[[Config], dict[str, str]] = lambda config: {}
    builds: bool = False
    reads_only: Callable[[Config], tuple[str, ...]] = lambda config: ()
    scorers: Callable[[Config], tuple[str, ...]] = lambda config: ()
    functions: Callable[[Config], dict[str, str]] = lambda config: {}
    heads: bool = False
    longest: Callable[[Config], tuple[str, int]] | None = None
    check: Callable[[Config], None] = lambda config: None
    check_encoders: Callable[[Config, Mapping[str, str]], None] = lambda config, encoders: None
    check_data: Callable[[Config, Any], None] = lambda config, data: None
    check_texts: Callable[[Config, Any, Any], None] = lambda config, data, tokenizer: None
    held_out: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    scored_by: Callable[[Mapping[str, Any]], str] = lambda section: ""
    unit: str = "steps"
    compares: bool = False
    told: str = ""

    def described(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """What a report has to know of it, for `stages.json`."""
        plain = {name: getattr(self, name) for name in ("title", "makes", "builds", "unit", "compares", "told")}
        figures = {name: dataclasses.asdict(figure) for name, figure in self.figures.items()}
        return {**plain, "scored_by": self.scored_by(section), "figures": figures}

    def models(self, config: Config, stages: Mapping[str, Stage]) -> dict[str, str]:
        """`sources`, "auto" being the last earlier stage that makes a language model; else the one that builds one."""
        chain = tuple(config.stages)
        before = chain[: chain.index(self.name)] if self.name in chain else chain
        made = [name for name in before if stages[name].makes == LANGUAGE_MODEL]
        auto = made[-1] if made else next(name for name, stage in stages.items() if stage.builds)
        return {key: auto if name == "auto" else name for key, name in self.sources(config).items()}

    def start(self, config: Config, stages: Mapping[str, Stage]) -> tuple[str, str | None]:
        """(config key, stage or folder) of the model that it starts from; ("", None): it makes a new one."""
        return next(iter(self.models(config, stages).items()), ("", None))

    def wanted(self, config: Config, key: str) -> str:
        """What the model of a key of `sources` has to be: a scorer, a language model, or "": any."""
        if key in self.scorers(config):
            return SCORER
        return LANGUAGE_MODEL if self.makes == LANGUAGE_MODEL and key == next(iter(self.sources(config))) else ""

    def stand_in(self, config: Config) -> str | None:
        """The folder that stands for its model in a run without it; None: nothing does."""
        return config.model.init_from if self.builds else None

    def trains(self, config: Config) -> bool:
        """Whether it takes optimiser steps."""
        return "optim" in config[self.name]

    def uses_lora(self, config: Config) -> bool:
        """Whether it trains adapters: LoRA is on, and the stage starts from a model."""
        return config.model.lora.rank > 0 and self.trains(config) and bool(self.sources(config))

    def validate(self, config: Config) -> None:
        """What every stage's section is checked for, then `check`. Raises InputError."""
        if self.trains(config):
            check_training(config, self.name, [step.section for step in self.steps.values()])
            if (leaf := config[self.name].get("keep_best")) is not None and leaf not in self.held_out:
                allowed = f"one of {', '.join(self.held_out)}" if self.held_out else "none: it has no validation"
                raise InputError(f"config.{self.name}.keep_best: {leaf!r}; allowed: {allowed}")
        self.check(config)
        known = not config.model.init_from  # else that model's context counts, once it is read
        if known and (self.trains(config) or self.longest):
            self.check_room(config, config.model.context, "model.context")

    def check_room(self, config: Config, context: int, whose: str) -> None:
        """Raises InputError where its longest sequences do not fit a model's context."""
        key, longest = (self.longest or self._longest)(config)
        if longest > context:
            key, _, more = key.partition(" ")
            counted = f"{longest} tokens {more}".rstrip()
            raise InputError(f"config.{key}: {counted}; allowed: at most {whose} = {context}")

    def _longest(self, config: Config) -> tuple[str, int]:
        own = config[self.name]
        key = "buckets" if "buckets" in own else "seq_len"
        return f"{self.name}.{key}", max(own.buckets) if key == "buckets" else own.get(key, 0)


def start_from(stage: str) -> Callable[[Config], dict[str, str]]:
    """The `sources` of a stage that starts from the model in its `init_from` and reads no other."""
    return lambda config: {f"{stage}.init_from": config[stage].init_from}
