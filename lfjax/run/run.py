"""A run: what its stages share. Everything costly is made on first use."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from lfjax import config as configs
from lfjax import tokenizers, trackers
from lfjax.checkpoint import FINISHED, Checkpoints
from lfjax.config import Config, InputError
from lfjax.files import read_json
from lfjax.interop import hf, peft
from lfjax.metrics import RunLog
from lfjax.models import lora
from lfjax.models.lora import LoRA
from lfjax.modules import resolve
from lfjax.run import checks, starts
from lfjax.run.data import Data, note
from lfjax.run.devices import Devices, any_process, sync
from lfjax.run.directory import Workdir, covered, forks_of
from lfjax.run.meter import READING, Meter, are_figures, check_extra
from lfjax.run.stage import Stage
from lfjax.sharding import DEFAULT_RULES, make_mesh


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. Exit code 130."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (non-finite updates in a row, say). Exit code 1."""


class Run:
    """What the stages of one run share.

    Args:
      stages: name -> declaration, of all that there are.
      search: folders in which modules that the config names are looked for, besides the current one.
      profile: steps of every training stage to trace.
    """

    def __init__(
        self,
        config: Config,
        workdir: str | os.PathLike,
        stages: Mapping[str, Stage],
        *,
        search: tuple[Path, ...] = (),
        profile: int = 0,
        follow_links: bool = False,
    ):
        configs.validate(config, stages)
        self.config, self.declared, self.profile, self.search = config, stages, profile, search
        self.stages = tuple(config.stages)
        self._directory = Workdir(workdir, stages, follow_links=follow_links)
        self.workdir = self._directory.path
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.devices = Devices(mesh, tuple(config.mesh.rules) or DEFAULT_RULES, config.seed)
        self.data = Data(config.data)
        self._form_of = functools.cache(starts.form_of)
        self.steps = {name: self.resolve(f"steps.{name}", dotted) for name, dotted in config.steps.items()}
        checks.check_batches(config, stages, mesh)
        checks.check_keywords(config, stages, self.steps)
        checks.check_sources(config, stages, self.source)
        functions = {k: self.resolve(k, v) for s in self.stages for k, v in stages[s].functions(config).items()}
        kinds = trackers.find(config.run.trackers, search)
        forks = forks_of(config, stages, self.steps, functions, kinds)
        self.log = self._open(forks, kinds if jax.process_index() == 0 else [])
        if self.tokenizer_folder.exists():  # else once there is a vocabulary, and with it all that is left out
            self.data.tell()
        self.stop_requested = False
        self.began = 0.0  # time.perf_counter() when its stages began
        self.meter = Meter()

    def _open(self, forks: Mapping[str, Path], kinds: list[type[trackers.Tracker]]) -> RunLog:
        """Holds the directory and starts the trackers."""
        for kind in kinds:
            kind.check()
        self._directory.open(self.config, forks, fits=self._check_models, check=self._check_data)
        try:
            started = trackers.start(kinds, self.workdir, configs.to_plain(self.config))
        except BaseException:
            self._directory.close()
            raise
        return RunLog(self.workdir, process=jax.process_index(), trackers=started)

    def _check_models(self) -> None:
        """The tokenizer and the models that stages start from can be read, and fit the config."""
        size = self.tokenizer.vocab_size if self._vocabulary[0] else self.config.tokenizer.vocab_size
        starts.check_models(self.config, self.declared, size, self._form_of)

    def _check_data(self) -> None:
        """Every stage can learn from the splits that it reads, and a given tokenizer makes of them what it can use."""
        checks.check_data(self.config, self.declared, self.data)
        if self._vocabulary[0]:
            self.check_tokenizer(self.tokenizer)

    def check_tokenizer(self, tokenizer) -> None:
        """Raises InputError where models that stages read have another, or stages cannot use records as its tokens."""
        starts.check_vocabularies(self.config, self.declared, tokenizer, self.tokenizer_folder, self._form_of)
        checks.check_texts(self.config, self.declared, self.data, tokenizer)

    def stage(self, name: str) -> Stage:
        """The declaration."""
        return self.declared[name]

    def start(self, stage: str) -> tuple[str, Any]:
        """(config key, stage or folder) of the model that a stage starts from; ("", None): it makes a new one."""
        return self.declared[stage].start(self.config, self.declared)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the logs and leaves the directory to others."""
        try:
            self.log.close(finished=kind is None)
        finally:
            self._directory.close()

    def resolve(self, key: str, dotted: str) -> Callable:
        """The function behind "module:function" of `config.<key>`; the config's folder is searched too."""
        return resolve(f"config.{key}", dotted, self.search)

    @functools.cached_property
    def config_hash(self) -> str:
        """Short hash of the resolved config."""
        text = json.dumps(covered(self.config, self.declared), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def records(self):
        """The feedback records: train, validation, test."""
        return self.data.records

    @functools.cached_property
    def tokenizer(self):
        """The run's tokenizer: that of the model it starts from, the one configured, or the one it trained."""
        with starts.naming(self._vocabulary[0]):
            return tokenizers.load(self.tokenizer_folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is read from."""
        key, path = self._vocabulary
        if key in ("", "tokenizer.path"):
            return Path(path or self.models("tokenizer"))
        return hf.tokenizer_folder(path)

    @property
    def _vocabulary(self) -> tuple[str, str]:
        return configs.vocabulary(self.config, self.declared)

    def models(self, stage: str) -> Path:
        """models/<stage>: the stage's result in Hugging Face layout."""
        return self.workdir / "models" / stage

    def source(self, key: str, name: str) -> Path:
        """The folder of a model named by a stage or by a path."""
        if name in self.declared:
            stand_in = None if name in self.stages else self.declared[name].stand_in(self.config)
            folder = Path(stand_in or self.models(name))
            if not folder.is_dir():
                finished = self.checkpoint_folder(name) / FINISHED
                made = f"delete {finished}, and it is made again from the last checkpoint"
                fix = made if finished.exists() else "put it before in config.stages, or name a model folder"
                raise InputError(f'config.{key}: stage "{name}" has no model in {folder}; {fix}')
            return folder
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, self.declared, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name a stage or a model folder"
            raise InputError(f"config.{key}: no such stage or folder: {name!r}; {hint}")
        return Path(name)

    @property
    def vocab_multiple(self) -> int:
        """Embedding rows are padded to a multiple of this, so that the tensor axis divides them."""
        tensor = self.devices.mesh.shape["tensor"]
        return math.lcm(self.config.model.vocab_multiple, 128 if tensor > 1 else 1, tensor)

    def load_model(self, key: str, name: str, *, language: bool = False) -> hf.Loaded:
        """Reads a stage's (or a folder's) model onto the mesh.

        Raises:
          InputError: it gives scores where `language` is asked for, the stage's sequences are longer than its context,
            or token ids do not mean the same to the model as to the run's tokenizer.
        """
        folder = self.source(key, name)
        given = key if name not in self.declared else None if name in self.stages else "model.init_from"
        with starts.naming(given):
            loaded = hf.load(
                folder, mesh=self.devices.mesh, rules=self.devices.rules, vocab_multiple=self.vocab_multiple
            )
        if language:
            hf.check_language_model(loaded, f"config.{key}: {folder}")
        reader = next((s for s in self.stages if key in self.declared[s].sources(self.config)), None)
        if reader is not None:
            self.declared[reader].check_room(self.config, loaded.model.config.context, f"the context of {folder}")
        size, place = loaded.model.config.vocab_size, f"config.{key}: {folder}"
        starts.check_vocabulary(place, size, loaded.tokenizer, self.tokenizer, self.tokenizer_folder)
        return loaded

    def adapters(self, stage: str) -> LoRA | None:
        """How a stage trains adapters; None where it trains the whole model."""
        return LoRA(**self.config.model.lora.to_dict()) if self.declared[stage].uses_lora(self.config) else None

    def save_model(self, stage: str, model, trained, base=None, *, labels: tuple[str, ...] = ()) -> None:
        """Writes models/<stage>, whole or not at all; all processes call it, process 0 writes. `labels` name scores.

        With LoRA the model is merged, and the adapter is in models/<stage>/adapter, in PEFT's format.
        """
        how, params, adapter = self.adapters(stage), trained, None
        if how is not None:
            merge = functools.partial(lora.merge, lora=how)
            shapes = jax.eval_shape(merge, base, trained)
            params = jax.jit(merge, out_shardings=self.devices.shardings(shapes))(base, trained)
        key, name = self.start(stage)
        start = self.source(key, name) if name else None  # its family and further keys are kept
        config = None if start is None else hf.describe(start)
        loaded = hf.loaded_from(model, params, self.tokenizer, config=config, labels=labels)
        if how is not None:
            host = jax.tree.map(np.asarray, jax.jit(lambda x: x, out_shardings=self.devices.replicated)(trained))
            adapter = peft.export(model.config, loaded.config, host, how, str(start))
        try:
            hf.save(self.models(stage), loaded, adapter=adapter)
        except SafetensorError as error:
            raise InputError(
                f"{self.models(stage)}: cannot write the model: {error}; free some space, then start the same command"
                " again"
            ) from error
        sync(f"saved {stage}")

    def cut_share(self, stage: str, cut: int, whole: int) -> float:
        """The share of a stage's training texts that are longer, with their prompt, than its seq_len; also a note."""
        if cut:
            length = f"config.{stage}.seq_len = {self.config[stage].seq_len}"
            note(stage, f"{cut} of {whole} training texts are longer, with their prompt, than {length} and are cut")
        return cut / whole

    def checkpoint_folder(self, stage: str) -> Path:
        """checkpoints/<stage>."""
        return self.workdir / "checkpoints" / stage

    def checkpoints(self, stage: str) -> Checkpoints:
        """The stage's checkpoints."""
        return Checkpoints(self.checkpoint_folder(stage), keep=self.config[stage].keep, check=check_extra)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left: figures, a `Meter` reading and the config's hash; None while it is not done.

        Raises:
          InputError: the file holds anything else.
        """
        path = self.checkpoint_folder(stage) / FINISHED
        if not path.exists():
            return None
        fix = f'delete it: stage "{stage}" goes on from its last checkpoint'
        done = read_json(path, dict, fix=fix)
        wrong = [key for key, fits in {"figures": are_figures, **READING}.items() if not fits(done.get(key))]
        if wrong:
            raise InputError(f"{path}: not what a finished stage leaves: no {' and no '.join(wrong)} in it; {fix}")
        return done

    def stopping(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        return any_process(self.stop_requested)

    def leave_if_asked(self, stage: str) -> None:
        """Ends an evaluation that nothing is lost by: it is made again. All processes call it.

        Raises:
          Interrupted: any process was asked to stop.
        """
        if self.stopping():
            raise Interrupted(f"stage {stage} stopped in its evaluation, which will be made again")
