"""What a run's figures are shown with while it runs: TensorBoard, Weights & Biases, or a class of the user's own.

The run's own files (`lfjax.metrics.RunLog`) hold everything; a tracker only gets a copy, and only in process 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfjax import files
from lfjax.config import InputError
from lfjax.modules import is_named, resolve

KEY = "config.run.trackers"
SHOWN = 4  # samples of a log that trackers get; samples.jsonl has all


class Tracker:
    """Takes a copy of what a run logs. One of your own is a subclass that defines what it has a use for.

    Args:
      workdir: the run directory, which is there.
      config: the resolved config as plain values.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        self.workdir, self.config = workdir, config

    @classmethod
    def check(cls) -> None:
        """Raises InputError where it cannot start; called before anything is written."""

    def cut(self, stage: str, step: int, dropped: Sequence[str]) -> None:
        """A stage begins, or goes on, after `step`; what was logged of it beyond will be logged again.

        Args:
          dropped: the stages of which nothing counts any more: later ones, and the stage itself where it begins.
        """

    def metrics(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """What was learned, name -> value, NaN and infinity among them."""

    def timing(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """How fast it went: seconds, tokens_per_s, mfu, seconds of parts (rollout_s)."""

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl, at most `SHOWN`: prompt, response, score, logprob, kl."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures of the stages that have ended."""

    def close(self, *, finished: bool) -> None:
        """The run ends here; `finished` says whether all of its stages are done."""


class TensorBoard(Tracker):
    """Event files in tensorboard/<stage>/: every stage counts its own steps, and a purge must not reach into another.

    Written here and now: tensorboardX's own writer does it in a thread, which cannot say that a disk is full.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        super().__init__(workdir, config)
        self._events: dict[str, Path] = {}  # stage -> the file of this process
        self._purge: dict[str, int] = {}

    def cut(self, stage: str, step: int, dropped: Sequence[str]) -> None:
        """Goes on in a new file, with `purge_step` = step + 1."""
        self._events = {}
        for gone in dropped:
            shutil.rmtree(self.workdir / "tensorboard" / gone, ignore_errors=True)
        self._purge = {stage: step + 1}

    def metrics(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """One scalar a figure."""
        from tensorboardX.summary import scalar

        self._write(stage, step, [scalar(name, float(value)) for name, value in figures.items()])

    def timing(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Scalars time/<name>."""
        self.metrics(stage, step, {f"time/{name}": value for name, value in figures.items()})

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in the text plugin."""
        from tensorboardX.proto import summary_pb2
        from tensorboardX.summary import text

        proto: Any = summary_pb2
        names = _columns(rows)
        cells = [names, *([_verbatim(row.get(name, "")) for name in names] for row in rows)]
        (value,) = text("", "").value
        value.tag = f"{stage}/samples"
        del value.tensor.string_val[:], value.tensor.tensor_shape.dim[:]
        value.tensor.string_val.extend(cell.encode() for row in cells for cell in row)
        for size in (len(cells), len(names)):
            value.tensor.tensor_shape.dim.add(size=size)
        self._write(stage, step, [proto.Summary(value=[value])])

    def close(self, *, finished: bool) -> None:
        """Ends its files; what is written later goes to new ones."""
        self._events = {}

    def _write(self, stage: str, step: int, summaries: Sequence[Any]) -> None:
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2  # protobuf makes its classes when it is imported, which no checker can follow
        events, now = [], time.time()
        if stage not in self._events:
            folder = self.workdir / "tensorboard" / stage
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part = sum(1 for _ in folder.iterdir())  # the rest of the name only tells seconds apart
            except OSError as error:
                raise files.cannot_write(folder, error) from error
            self._events[stage] = folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{part}"
            events.append(proto.Event(wall_time=now, file_version="brain.Event:2"))
            if stage in self._purge:
                start = proto.SessionLog(status=proto.SessionLog.START)
                events.append(proto.Event(wall_time=now, step=self._purge[stage], session_log=start))
        events += [proto.Event(wall_time=now, step=int(step), summary=summary) for summary in summaries]
        files.append(self._events[stage], b"".join(_event_record(event.SerializeToString()) for event in events))


class WandB(Tracker):
    """Weights & Biases: one run of theirs a run directory, whose files are in wandb/.

    Their own step can only grow, so every stage has a step of its own, `<stage>/step`, on the horizontal axis. A run
    that goes on logs some steps again, at the same place with the same values. WANDB_MODE, WANDB_PROJECT, WANDB_NAME,
    WANDB_RUN_ID and the rest of their settings count.
    """

    WAIT = 60.0  # seconds for the last figures to be sent; what is left stays in wandb/, for `wandb sync`
    FIX = "set WANDB_MODE=offline (`wandb sync` sends it later), or run `wandb login`"

    @classmethod
    def check(cls) -> None:
        """It is installed, and knows an account or stays offline; it never asks at a terminal."""
        if importlib.util.find_spec("wandb") is None:
            raise InputError(f'{KEY}: "wandb" is not installed; pip install wandb')
        wandb: Any = importlib.import_module("wandb")
        try:
            online = wandb.setup().settings.mode in ("online", "run", "shared")
            known = not online or wandb.login(prompt=False, verify=False)
        except Exception as error:  # theirs are of many kinds
            raise cls._cannot_start(error) from error
        if not known:
            raise InputError(f"{KEY}: wandb knows no account here; {cls.FIX}")

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        super().__init__(workdir, config)
        wandb: Any = importlib.import_module("wandb")
        self._wandb, self._stages = wandb, set()
        (workdir / "wandb").mkdir(exist_ok=True)
        kept = workdir / "wandb" / "run_id"
        if not kept.exists():
            files.write_bytes(kept, os.environ.get("WANDB_RUN_ID", secrets.token_hex(4)).encode())
        try:
            self._run = wandb.init(
                dir=str(workdir),
                id=kept.read_text(),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "lfjax"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                config=dict(config),
                settings=wandb.Settings(console="off", finish_timeout=self.WAIT),
            )
        except Exception as error:
            raise self._cannot_start(error) from error

    @classmethod
    def _cannot_start(cls, error: Exception) -> InputError:
        return InputError(f"{KEY}: wandb cannot start: {' '.join(str(error).split())[:200]}; {cls.FIX}")

    def metrics(self, stage: str, step: int, figures: Mapping[str, Any]) -> None:
        """A row of their history; names begin with the stage's."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        named = {name if name.startswith(f"{stage}/") else f"{stage}/{name}": x for name, x in figures.items()}
        self._run.log({f"{stage}/step": int(step), **named})

    def timing(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """<stage>/time/<name>."""
        self.metrics(stage, step, {f"time/{name}": value for name, value in figures.items()})

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, <stage>/samples."""
        names = _columns(rows)
        cells = [[x if isinstance(x := row.get(n), float) else _text(row.get(n, "")) for n in names] for row in rows]
        self.metrics(stage, step, {"samples": self._wandb.Table(columns=names, data=cells)})

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Their summary has the run's."""
        self._run.summary.update(dict(figures))

    def close(self, *, finished: bool) -> None:
        """Waits `WAIT` seconds at most for what is not sent yet."""
        self._run.finish(exit_code=0 if finished else 1)


NAMED: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def find(names: Sequence[str], search: tuple[Path, ...] = ()) -> list[type[Tracker]]:
    """The classes behind `config.run.trackers`: names of lfjax's own, or "module:Class".

    Args:
      search: folders in which modules are looked for, besides the current one.
    Raises:
      InputError: no such tracker.
    """
    found = []
    for name in names:
        kind = NAMED.get(name) or (is_named(str(name)) and resolve(KEY, name, search, kind=type))
        if not kind:
            raise InputError(f'{KEY}: {name!r}; allowed: {", ".join(NAMED)}, "module:Class", or () for none')
        if not issubclass(kind, Tracker):
            raise InputError(f"{KEY}: {name}: is no lfjax.trackers.Tracker; make it a subclass of that")
        found.append(kind)
    return found


def start(kinds: Sequence[type[Tracker]], workdir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """One of each.

    Raises:
      InputError: one cannot start.
    """
    started: list[Tracker] = []
    for kind in kinds:
        try:
            started.append(kind(workdir, config))
        except InputError:
            raise
        except Exception as error:  # of a class of the user's
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{KEY}: {kind.__module__}:{kind.__name__} cannot start: {cause}; mend it") from error
    return started


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _text(value: Any) -> str:
    """Text that can be encoded, whatever a model wrote."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown.encode("utf-8", "backslashreplace").decode()


def _verbatim(value: Any) -> str:
    """Markdown that shows a text as it is."""
    return "    " + _text(value).replace("\n", "\n    ")


def _event_record(data: bytes) -> bytes:
    """A TFRecord: the length, its checksum, the data, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
