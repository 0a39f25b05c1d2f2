"""The last stage of a chain made longer on its directory: the one change of a config that a run goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfjax import files
from lfjax.checkpoint import FINISHED
from lfjax.config import Config
from lfjax.run.stage import Stage
from lfjax.terminal import note


def lengthened(
    config: Config, stages: Mapping[str, Stage], before: dict[str, Any], now: dict[str, Any], differs: Sequence[str]
) -> str:
    """The last stage that trains, where it has more steps or epochs, nothing else differs, and no model follows.

    Args:
      before, now: the plain config that the directory holds, and the new one.
      differs: "key: old -> new" of each difference.
    """
    stage = next((s for s in reversed(config.stages) if stages[s].trains(config)), "")
    follow = config.stages[config.stages.index(stage) + 1 :] if stage else ()
    lengths = {f"config.{stage}.steps", f"config.{stage}.epochs"}
    if any(stages[s].makes for s in follow) or not {line.partition(":")[0] for line in differs} <= lengths:
        return ""
    (steps, epochs), (more_steps, more_epochs) = (
        (c.get(stage, {}).get("steps", 0), c.get(stage, {}).get("epochs", 0.0)) for c in (before, now)
    )
    by_epochs = steps == more_steps == 0 and more_epochs > epochs
    return stage if more_steps > steps > 0 or by_epochs else ""


def lengthen(folder: Path, config: Config, stage: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """The stage goes on from its last checkpoint, and what follows it is made again; both configs are kept.

    The new config is written last: killed before, the same command does all of it again.
    """
    number = 1 + len(list(folder.glob("config-*.json")))
    if number > 1 and files.read_json(folder / f"config-{number - 1}.json", dict) == before:
        number -= 1  # by a process that was killed
    kept = folder / f"config-{number}.json"
    files.write_json(kept, before)
    for name in config.stages[config.stages.index(stage) :]:
        (folder / "checkpoints" / name / FINISHED).unlink(missing_ok=True)
    files.write_json(folder / "config.json", now)
    note(
        f"note: stage {stage} is made longer: from here on the rate follows the schedule of the new length, so that"
        f" this is not bit for bit a run that was so long from the start; the config before is {kept}"
    )
