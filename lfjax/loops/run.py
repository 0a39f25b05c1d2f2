"""A run: its directory, what its stages share, and the chain of stages, which can be killed anywhere and goes on."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lfjax import config as configs
from lfjax.checkpoint import FINISHED, Checkpoints
from lfjax.config import InputError
from lfjax.data.sources import load_records
from lfjax.interop import hf
from lfjax.metrics import RunLog, read_json, write_json
from lfjax.models.transformer import Transformer
from lfjax.sharding import DEFAULT_RULES, Step, batch_shards, constrainer, make_mesh, place, shardings_for
from lfjax.tokenizers import sentencepiece


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. Exit code 130."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (non-finite updates in a row, say). Exit code 1."""


class Run:
    """What the stages of one run share. Everything costly is made on first use."""

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike, *, search: tuple[Path, ...] = ()):
        configs.validate(config)
        self.config = config
        self.workdir = Path(workdir)
        self.stages = tuple(config.stages)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.rules = tuple(config.mesh.rules) or DEFAULT_RULES
        self.steps = {name: resolve(f"config.steps.{name}", dotted, search) for name, dotted in config.steps.items()}
        self._check_batches()
        self._open_workdir()
        self.log = RunLog(self.workdir, process=jax.process_index(), tensorboard=config.run.tensorboard)
        self.stop_requested = False

    def _check_batches(self) -> None:
        shards = batch_shards(self.mesh)
        for stage in ("pretrain", "sft", "reward", "ppo"):
            rows = self.config[stage].batch_size
            if stage in self.stages and rows % shards:
                raise InputError(
                    f"config.{stage}.batch_size: {rows} rows do not divide over mesh data x fsdp = {shards};"
                    f" use a multiple of {shards}"
                )

    def _open_workdir(self) -> None:
        """Writes config.json, or refuses a directory that belongs to another config."""
        resolved = configs.to_plain(self.config)
        path = self.workdir / "config.json"
        if self.workdir.exists() and not self.workdir.is_dir():
            raise InputError(f"--workdir={self.workdir}: a file, not a folder; choose another --workdir")
        if path.exists():
            differs = configs.difference(read_json(path), resolved)
            if differs:
                shown = "; ".join(differs[:5]) + (f"; and {len(differs) - 5} more" if len(differs) > 5 else "")
                raise InputError(f"{path}: the run was started with another config ({shown}); use another --workdir")
            return
        if jax.process_index() == 0:
            try:
                self.workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"--workdir={self.workdir}: {error.strerror}; choose a folder you may write"
                ) from error
            write_json(path, resolved)
            self._keep_forks()

    def _keep_forks(self) -> None:
        """Copies the source of steps that are not lfjax's own into the run directory."""
        for name, step in self.steps.items():
            source = inspect.getsourcefile(step)
            if source and not step.__module__.startswith("lfjax."):
                (self.workdir / "steps").mkdir(exist_ok=True)
                shutil.copyfile(source, self.workdir / "steps" / f"{name}.py")

    @functools.cached_property
    def config_hash(self) -> str:
        """Short hash of the resolved config."""
        text = json.dumps(configs.to_plain(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def records(self):
        """The feedback records: train, validation, test, and counts of what was left out."""
        return load_records(self.config.data)

    @functools.cached_property
    def tokenizer(self):
        """The run's tokenizer: that of the model it starts from, the one configured, or the one it trained."""
        return sentencepiece.load(self.tokenizer_folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is read from."""
        return Path(self.config.tokenizer.path or self.config.model.init_from or self.models("tokenizer"))

    def models(self, stage: str) -> Path:
        """models/<stage>: the stage's result in Hugging Face layout."""
        return self.workdir / "models" / stage

    def source(self, key: str, name: str) -> Path:
        """The folder of a model named by a stage or by a path."""
        if name in configs.STAGES:
            folder = self.models(name)
            if name == "pretrain" and self.config.model.init_from and "pretrain" not in self.stages:
                folder = Path(self.config.model.init_from)
            if not folder.is_dir():
                raise InputError(
                    f'config.{key}: stage "{name}" has no model in {folder}; put it before in config.stages,'
                    " or name a model folder"
                )
            return folder
        if not Path(name).is_dir():
            raise InputError(f"config.{key}: no such stage or folder: {name!r}")
        return Path(name)

    @property
    def vocab_multiple(self) -> int:
        """Embedding rows are padded to a multiple of this, so that the tensor axis divides them."""
        tensor = self.mesh.shape["tensor"]
        return math.lcm(self.config.model.vocab_multiple, 128 if tensor > 1 else 1, tensor)

    def load_model(self, key: str, name: str) -> hf.Loaded:
        """Reads a stage's (or a folder's) model onto the mesh."""
        return hf.load(self.source(key, name), mesh=self.mesh, rules=self.rules, vocab_multiple=self.vocab_multiple)

    def save_model(self, stage: str, model, params) -> None:
        """Writes models/<stage>, whole or not at all; all processes call it, process 0 writes."""
        hf.save(self.models(stage), hf.loaded_from(model, params, self.tokenizer))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"saved {stage}")

    def transformer(self, model_config) -> Transformer:
        """A model whose activations are pinned to the run's mesh."""
        return Transformer(model_config, constrain=constrainer(self.mesh))

    def place(self, tree):
        """Host arrays onto the mesh by the run's rules."""
        return place(tree, shardings_for(tree, self.mesh, self.rules))

    def key(self, purpose: str):
        """The key of one purpose; fold the step in."""
        return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(purpose.encode()) & 0x7FFFFFFF)

    def checkpoint_folder(self, stage: str) -> Path:
        """checkpoints/<stage>."""
        return self.workdir / "checkpoints" / stage

    def checkpoints(self, stage: str) -> Checkpoints:
        """The stage's checkpoints."""
        return Checkpoints(self.checkpoint_folder(stage), keep=self.config[stage].keep)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left: {"figures", "seconds", "programs", "config"}; None while it is not done."""
        path = self.checkpoint_folder(stage) / FINISHED
        return read_json(path) if path.exists() else None

    def stopping(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.stop_requested
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.stop_requested))))


def resolve(key: str, dotted: str, search: tuple[Path, ...] = ()) -> Callable:
    """The function behind "module:function"; the current folder and `search` are on the path.

    Raises:
      InputError: not of that form, no such module (with the paths tried) or no such function in it.
    """
    module_name, _, name = dotted.partition(":")
    if not module_name or not name:
        raise InputError(f'{key}: {dotted!r}; write "module:function"')
    folders = [str(folder) for folder in (Path.cwd(), *search)]
    added = [folder for folder in folders if folder not in sys.path]
    sys.path[:0] = added
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise InputError(f"{key}: {dotted!r} imports {error.name!r}, which is not installed") from error
        raise InputError(
            f"{key}: no module {module_name!r}; tried {', '.join(folders)} and the installed packages"
        ) from error
    except Exception as error:  # the user's module fails while it is imported
        raise InputError(f"{key}: importing {module_name!r} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{key}: {module.__file__} has no function {name!r}")
    return function


def run_stages(run: Run, stages: Mapping[str, Callable[[Run], dict[str, float]]]) -> dict[str, float]:
    """Runs every stage that is not finished, in order; a stage returns its final figures for summary.json.

    The same command on the same directory goes on where it was. Figures of all finished stages are in summary.json.
    """
    previous = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def ask_to_stop(signum, frame):
        if run.stop_requested:  # a second one means now
            raise KeyboardInterrupt
        run.stop_requested = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    try:
        for stage in run.stages:
            done = run.finished(stage)
            if done is None:
                done = _run_stage(run, stage, stages[stage])
            run.log.summary(done["figures"])
            if run.stopping():
                raise Interrupted(f"stopped after stage {stage}")
        totals = [run.finished(stage) for stage in run.stages]
        run.log.summary(
            {
                "time/total_s": sum(done["seconds"] for done in totals),
                "compile/count": sum(done["programs"] for done in totals),
            }
        )
    finally:
        signal.signal(signal.SIGTERM, previous[0])
        signal.signal(signal.SIGINT, previous[1])
        run.log.close()
    return read_json(run.workdir / "summary.json")


def _run_stage(run: Run, stage: str, function: Callable[[Run], dict[str, float]]) -> dict[str, Any]:
    started, programs = time.perf_counter(), Step.compiled_total
    figures = dict(function(run))
    seconds = time.perf_counter() - started + figures.pop("seconds_before", 0.0)
    done = {
        "figures": figures,
        "seconds": seconds,
        "programs": Step.compiled_total - programs,
        "config": run.config_hash,
    }
    if jax.process_index() == 0:
        run.checkpoint_folder(stage).mkdir(parents=True, exist_ok=True)
        write_json(run.checkpoint_folder(stage) / FINISHED, done)
    return done
