"""Every stage that a config can name. To add a method, write a file beside this one and a line in the table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lfjax.config import InputError, shared_sections
from lfjax.modules import resolve
from lfjax.run.stage import Stage, Step
from lfjax.stages import classify, evaluate, kto, ppo, preference, pretrain, reward, sft, tokenizer

TABLE = (
    tokenizer.STAGE,
    pretrain.STAGE,
    sft.STAGE,
    preference.STAGE,
    kto.STAGE,
    reward.STAGE,
    classify.STAGE,
    ppo.STAGE,
    evaluate.STAGE,
)
CHAIN = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")  # what runs where a config does not say
# What no stage can be called: further keys of a config, models of an evaluation, and what other figures begin with.
RESERVED = ("stages", "outside", "steps", "before", "after", "judge", "diversity", "time", "compile")


def declared(outside: Sequence[str] = (), *, key: str = "base_config") -> dict[str, Stage]:
    """Name -> declaration: lfjax's own, then those "module:STAGE" from outside.

    Args:
      key: what names those from outside, for the message.
    Raises:
      InputError: no such declaration, or a name that is taken or cannot be one.
    """
    found = {stage.name: stage for stage in TABLE}
    for dotted in outside:
        stage = resolve(key, dotted, kind=Stage)
        taken = stage.name in found or stage.name in {*shared_sections(), *RESERVED} or hasattr(ConfigDict, stage.name)
        if taken or not re.fullmatch(r"[a-z][a-z0-9_]*", stage.name):
            why = "is taken" if taken else "is none: small letters, digits and _ are allowed"
            raise InputError(f"{key}: {dotted}: the name {stage.name!r} {why}; give the stage another one")
        _check_declared(f"{key}: {dotted}", stage)
        for name, step in stage.steps.items():
            own = next((s.steps[name] for s in found.values() if name in s.steps), step)
            if own.path != step.path:
                raise InputError(
                    f"{key}: {dotted}: the step {name!r} is {own.path} in another stage; give yours another name"
                )
        found[stage.name] = stage
    return found


def _check_declared(where: str, stage: Stage) -> None:
    """Raises InputError where a declaration from outside gives no section, or a step that is none."""
    try:
        section = stage.section()
    except Exception as error:  # whatever a user's declaration does wrong is theirs to mend
        raise InputError(f"{where}: its section fails: {type(error).__name__}: {error}; mend it") from error
    if not isinstance(section, ConfigDict):
        raise InputError(f"{where}: its section gives {type(section).__name__}; return lfjax.config.section(...)")
    for name, step in stage.steps.items():
        if not isinstance(step, Step):
            raise InputError(f'{where}: its step {name!r} is {step!r}; write Step("module:function", ...)')


def described(config: Mapping[str, Any], stages: Sequence[Stage] = TABLE) -> dict[str, Any]:
    """What a report has to know of stages, by name: of a run's config as plain values, complete or not."""
    sections = {stage.name: config.get(stage.name) for stage in stages}
    return {s.name: s.described(found if isinstance(found := sections[s.name], Mapping) else {}) for s in stages}
