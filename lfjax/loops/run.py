"""A run: what its stages share, and the chain of stages, which can be killed anywhere and goes on."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from lfjax import config as configs
from lfjax import terminal, tokenizers
from lfjax.checkpoint import FINISHED, Checkpoints
from lfjax.config import Config, InputError
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import (
    class_labels,
    class_names,
    prompt_tokens,
    prompts_from_records,
    read_texts,
    response_tokens,
    reward_examples,
    teaches,
)
from lfjax.data.sources import label_scale, left_out, load_records, ordinal_bounds, rating_scale
from lfjax.files import read_json, write_json
from lfjax.interop import hf, peft
from lfjax.loops import starts
from lfjax.loops.workdir import Workdir, forks_of
from lfjax.metrics import RunLog
from lfjax.models import lora
from lfjax.models.flops import cpu_matmul_rate, peak_flops
from lfjax.models.lora import LoRA
from lfjax.models.network import Network
from lfjax.records import Edit, Preference, Ranking, mean_values
from lfjax.sharding import DEFAULT_RULES, Step, batch_shards, constrainer, make_mesh, place, replicated, shardings_for
from lfjax.signals import handled
from lfjax.tokenizers import least_rows, stop_ids

# What the losses of the reward step learn from: the values of ratings, pairs by either, the order of answers.
RATING_LOSSES = ("regression", "every_token", "ordinal")
PAIR_LOSSES = ("bradley_terry", "hinge")
ORDER_LOSSES = ("listwise_hinge", "plackett_luce", "softmax")

# The keywords of a step that are not in its config section.
FROM_THE_LOOP = {
    "model", "models", "tx", "txs", "eos_ids", "pad_id", "temperature", "minibatches", "kl_coef", "reward_norm"
}  # fmt: skip


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. Exit code 130."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (non-finite updates in a row, say). Exit code 1."""


class Meter:
    """What a stage has cost over all the processes that worked on it."""

    def __init__(self):
        self._began, self._compiled, self._compiling = time.perf_counter(), Counter(Step.compiled), Step.seconds
        self._seconds, self._parts, self._programs = 0.0, defaultdict(float), Counter()

    @contextlib.contextmanager
    def part(self, name: str):
        """Adds the time inside, but for that of compiling, to a part: "train", "evaluate" or "save"."""
        began, compiling = time.perf_counter(), Step.seconds
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - began - (Step.seconds - compiling)

    def seconds(self, name: str) -> float:
        """Of a part, so far."""
        return self._parts[name]

    def restore(self, reading: Mapping[str, Any]) -> None:
        """Adds what earlier processes had read."""
        self._seconds, self._programs = reading["seconds"], Counter(reading["programs"])
        for name, seconds in reading["parts"].items():
            self._parts[name] += seconds

    def read(self) -> dict[str, Any]:
        """{"seconds", "parts": {name: seconds, "compile" among them}, "programs": {name: times compiled}}.

        A program counts once, however many processes compiled it again.
        """
        compiled = Counter(Step.compiled) - self._compiled
        compiling = self._parts.get("compile", 0.0) + Step.seconds - self._compiling
        return {
            "seconds": self._seconds + time.perf_counter() - self._began,
            "parts": {**self._parts, "compile": compiling},
            "programs": dict(sorted((self._programs | compiled).items())),
        }


class Run:
    """What the stages of one run share. Everything costly is made on first use."""

    def __init__(
        self,
        config: Config,
        workdir: str | os.PathLike,
        *,
        search: tuple[Path, ...] = (),
        profile: int = 0,
        follow_links: bool = False,
    ):
        configs.validate(config)
        self.profile = profile  # steps of every training stage to trace
        self.config = config
        self._directory = Workdir(workdir, follow_links=follow_links)
        self.workdir = self._directory.path
        self.search = search
        self.stages = tuple(config.stages)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.rules = tuple(config.mesh.rules) or DEFAULT_RULES
        self.steps = {name: self.resolve(f"steps.{name}", dotted) for name, dotted in config.steps.items()}
        self._check_batches()
        self._check_keywords()
        self._check_sources()
        self._directory.open(config, self._forks(), fits=self._check_models, check=self._check_data)
        self.log = RunLog(self.workdir, process=jax.process_index(), tensorboard=config.run.tensorboard)
        self.stop_requested = False
        self.began = 0.0  # time.perf_counter() when its stages began
        self.meter = Meter()
        self._programs: dict[Any, Step] = {}

    def _check_models(self) -> None:
        """The tokenizer and the models that stages start from can be read, and fit the config."""
        given = self.config.tokenizer.path or self.config.model.init_from
        starts.check_models(self.config, self.tokenizer.vocab_size if given else self.config.tokenizer.vocab_size)

    def _check_batches(self) -> None:
        shards = batch_shards(self.mesh)
        for stage in ("pretrain", "sft", "reward", "classify", "ppo", "evaluate"):
            rows = self.config[stage].batch_size
            if stage in self.stages and rows % shards:
                raise InputError(
                    f"config.{stage}.batch_size: {rows} rows do not divide over mesh data x fsdp = {shards};"
                    f" use a multiple of {shards}"
                )

    def _check_keywords(self) -> None:
        """A step's config section holds keywords that the step takes, and all that it cannot do without."""
        for name, sections in configs.STEP_SECTIONS.items():
            parameters = inspect.signature(self.steps[name]).parameters
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            needed = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
            for section in sections:
                stage, _, part = section.partition(".")
                given = self.config[stage][part]
                dotted = self.config.steps[name]
                for key in given:
                    if key not in parameters:
                        near = difflib.get_close_matches(key, parameters, n=1)
                        hint = f"; did you mean config.{section}.{near[0]}?" if near else ""
                        raise InputError(f"config.{section}.{key}: {dotted} takes no keyword {key!r}{hint}")
                missing = sorted(needed - set(given) - FROM_THE_LOOP)
                if missing and stage in self.stages:
                    raise InputError(f"config.{section}.{missing[0]}: not set; {dotted} needs this keyword")

    def _check_sources(self) -> None:
        """Model folders, the tokenizer and the reward function exist: better known now than after hours."""
        for stage in self.stages:
            for key, name in configs.model_sources(self.config, stage).items():
                if name not in configs.STAGES:
                    self.source(key, name)
        self._check_encoders()
        for key in ("model.init_from", "tokenizer.path"):
            section, _, part = key.partition(".")
            path = self.config[section][part]
            if path and not Path(path).exists():
                raise InputError(f"config.{key}: {path}: no such file or folder; correct the path")
        if "ppo" in self.stages and configs.is_function(self.config.ppo.reward):
            self.resolve("ppo.reward", self.config.ppo.reward)

    def _check_encoders(self) -> None:
        """An encoder neither writes nor gives a value a token: known before its reward model is trained."""
        encoders = {}
        for stage in self.stages:
            for key, name in configs.model_sources(self.config, stage).items():
                if name not in configs.STAGES:
                    with starts.naming(key):
                        encoders |= {key: name} if hf.names_encoder(name) else {}
        for key in ("model.init_from", "sft.init_from", "ppo.init_from"):
            if key in encoders:
                raise InputError(f"config.{key}: {encoders[key]} is an encoder, not a language model; name another")
        if "ppo" not in self.stages:
            return
        reward, value = self.config.ppo.reward, self.config.ppo.value_init
        learned = "ppo.reward" in encoders or (reward == "reward" and "reward.init_from" in encoders)
        if "ppo.value_init" in encoders or (value == "reward" and learned):
            raise InputError(self.no_values(value))

    @staticmethod
    def no_values(name: str) -> str:
        """What is said where a value network would have to be an encoder."""
        return (
            f'config.ppo.value_init: "{name}" is an encoder, which scores whole texts and gives no value a token; use'
            ' "policy"'
        )

    def _forks(self) -> dict[str, Path]:
        """The source files of steps, and of a reward function, that are not lfjax's own; `steps/` keeps copies."""
        functions = dict(self.steps)
        if "ppo" in self.stages and configs.is_function(self.config.ppo.reward):
            functions["reward_function"] = self.resolve("ppo.reward", self.config.ppo.reward)
        return forks_of(functions)

    def _check_data(self) -> None:
        """Every stage can learn from the splits that it reads, and a given tokenizer makes of them what it can use."""
        reads = {"pretrain": "text", "sft": "`edit` feedback, and no record without feedback,"}
        reads["reward"] = "rating, ranking, preference, edit or label"
        reads["classify"] = "`label` feedback"
        if "reward" in self.stages:  # ratings are on one scale, with classes for an ordinal loss
            ordinal_bounds(self.config.reward.step, self.rating_scale or label_scale(self.records.train))
        for stage, what in reads.items():
            for split in ("train", "validation", *(("test",) if stage in ("reward", "classify") else ())):
                if stage in self.stages and not any(teaches(r, stage) for r in self.records[split]):
                    raise InputError(
                        f"stage {stage}: {self.data_file(split)}: the {split} split holds no {what} to learn from; add"
                        f' some, or leave "{stage}" out of config.stages'
                    )
        if "reward" in self.stages:
            self._check_losses()
        if "classify" in self.stages:
            self._check_classes()
        if self.config.tokenizer.path or self.config.model.init_from:
            self.check_texts(self.tokenizer)

    def _check_losses(self) -> None:
        """lfjax's own reward step has a loss that learns from what training holds: values, or orders of answers."""
        if self.config.steps.reward != configs.base_config().steps.reward:
            return
        values = any(mean_values(record, (0.0, 1.0)) for record in self.records.train)
        orders = any(isinstance(e, (Ranking, Preference, Edit)) for r in self.records.train for e in r.feedback)
        fit = {*PAIR_LOSSES, *(RATING_LOSSES if values else ()), *(ORDER_LOSSES if orders else ())}
        if not any(self.config.reward.step.get(name) for name in fit):
            held = " and ".join(["ratings"] * values + ["orders of answers"] * orders)
            raise InputError(
                f"config.reward.step: no loss of weight above 0 learns from {held}, and {self.data_file('train')} holds"
                f" nothing else for training; set one of {', '.join(sorted(fit))} above 0"
            )

    def _check_classes(self) -> None:
        """Training has two classes or more, and all those of the other splits."""
        names = class_names(self.records.train)
        if len(names) < 2:
            raise InputError(
                f"stage classify: {self.data_file('train')}: every label of the training split is {', '.join(names)!r};"
                " give records of a second class"
            )
        for split in ("validation", "test"):
            deque(class_labels(self.records[split], names), maxlen=0)

    @property
    def data_figures(self) -> dict[str, float]:
        """data/*: how many records were found, merged and left out."""
        return {f"data/{name}": float(value) for name, value in self.records.counts.items()}

    def check_texts(self, tokenizer) -> None:
        """What stages could not use of the records once they are tokens: better known before anything is trained.

        Raises:
          InputError: a chat template refuses a prompt or an answer, a prompt of PPO or the evaluation is too long,
            `ppo.stop` is no token, or all pairs of answers that the reward stage could learn from are equal once cut.
        """
        for split in SPLITS:
            for record in self.records[split]:
                if not isinstance(record.prompt, str):
                    prompt_tokens(record, tokenizer)
                    for text in dict.fromkeys(text for stage in self.stages for text in read_texts(record, stage)):
                        response_tokens(record, text, tokenizer)
        if {"ppo", "evaluate"} & {*self.stages}:
            self.prompts([*self.records.train, *self.records.test], tokenizer)
            stop_ids(tokenizer, self.config.ppo.stop, "config.ppo.stop")
        length = self.config.reward.seq_len
        for split in SPLITS if "reward" in self.stages else ():
            if not any(reward_examples([record], tokenizer, max_length=length) for record in self.records[split]):
                raise InputError(
                    f"config.reward.seq_len: {length}; cut to so many tokens the answers of every pair of the {split}"
                    " split are equal; raise it (with config.reward.buckets and config.model.context)"
                )

    def prompts(self, records, tokenizer=None) -> list[list[int]]:
        """The prompts of PPO and the evaluation, one a record.

        Raises:
          InputError: one is longer than the largest of `config.ppo.prompt_buckets`.
        """
        section = self.config.ppo
        return prompts_from_records(
            records,
            tokenizer or self.tokenizer,
            min_tokens=section.prompt_min,
            max_tokens=section.prompt_max,
            max_length=max(section.prompt_buckets),
            remedy="raise config.ppo.prompt_buckets (with config.model.context), or shorten the prompt",
        )

    def close(self) -> None:
        """Closes the logs and leaves the directory to others."""
        self.log.close()
        self._directory.close()

    def resolve(self, key: str, dotted: str) -> Callable:
        """The function behind "module:function" of `config.<key>`; the config's folder is searched too."""
        return resolve(f"config.{key}", dotted, self.search)

    @functools.cached_property
    def config_hash(self) -> str:
        """Short hash of the resolved config."""
        text = json.dumps(configs.to_plain(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def records(self):
        """The feedback records: train, validation, test, and counts of what was left out."""
        found = load_records(self.config.data)
        for line in left_out(found.counts):
            self.note("data", line)
        return found

    @functools.cached_property
    def rating_scale(self) -> tuple[float, float] | None:
        """The one scale of all the ratings; None where there are none."""
        return rating_scale([*self.records.train, *self.records.validation, *self.records.test])

    def data_file(self, split: str) -> str:
        """Where the records of a split come from, for messages."""
        data = self.config.data
        own = None if split == "train" else data[f"{split}_path"]
        return f"config.data.path {own or data.path}" if data.path else f"config.data.source {data.source!r}"

    @functools.cached_property
    def tokenizer(self):
        """The run's tokenizer: that of the model it starts from, the one configured, or the one it trained."""
        keys = {"tokenizer.path": self.config.tokenizer.path, "model.init_from": self.config.model.init_from}
        given = next((key for key, path in keys.items() if path), None)
        with starts.naming(given):
            return tokenizers.load(self.tokenizer_folder)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a response: EOS and `config.ppo.stop`."""
        return stop_ids(self.tokenizer, self.config.ppo.stop, "config.ppo.stop")

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is read from."""
        if self.config.model.init_from and not self.config.tokenizer.path:
            return hf.tokenizer_folder(self.config.model.init_from)
        return Path(self.config.tokenizer.path or self.models("tokenizer"))

    def models(self, stage: str) -> Path:
        """models/<stage>: the stage's result in Hugging Face layout."""
        return self.workdir / "models" / stage

    def start_of(self, stage: str) -> tuple[str, Any]:
        """(config key, stage or folder) of the model that a stage starts from; None: it makes a new one."""
        return starts.start_of(self.config, stage)

    def source(self, key: str, name: str) -> Path:
        """The folder of a model named by a stage or by a path."""
        if name in configs.STAGES:
            folder = self.models(name)
            if name == "pretrain" and self.config.model.init_from and "pretrain" not in self.stages:
                folder = Path(self.config.model.init_from)
            if not folder.is_dir():
                finished = self.checkpoint_folder(name) / FINISHED
                made = f"delete {finished}, and it is made again from the last checkpoint"
                fix = made if finished.exists() else "put it before in config.stages, or name a model folder"
                raise InputError(f'config.{key}: stage "{name}" has no model in {folder}; {fix}')
            return folder
        if not Path(name).is_dir():
            near = difflib.get_close_matches(name, configs.STAGES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name a stage or a model folder"
            raise InputError(f"config.{key}: no such stage or folder: {name!r}; {hint}")
        return Path(name)

    @property
    def vocab_multiple(self) -> int:
        """Embedding rows are padded to a multiple of this, so that the tensor axis divides them."""
        tensor = self.mesh.shape["tensor"]
        return math.lcm(self.config.model.vocab_multiple, 128 if tensor > 1 else 1, tensor)

    def load_model(self, key: str, name: str, *, language: bool = False) -> hf.Loaded:
        """Reads a stage's (or a folder's) model onto the mesh.

        Raises:
          InputError: it gives scores where `language` is asked for, the stage's sequences are longer than its context,
            or token ids do not mean the same to the model as to the run's tokenizer.
        """
        folder = self.source(key, name)
        given = key if name not in configs.STAGES else None if name in self.stages else "model.init_from"
        with starts.naming(given):
            loaded = hf.load(folder, mesh=self.mesh, rules=self.rules, vocab_multiple=self.vocab_multiple)
        if language:
            hf.check_language_model(loaded, f"config.{key}: {folder}")
        stage = "pretrain" if key.startswith("model.") else key.partition(".")[0]
        configs.check_room(self.config, stage, loaded.model.config.context, f"the context of {folder}")
        size, own, other = loaded.model.config.vocab_size, self.tokenizer, loaded.tokenizer
        if size < least_rows(own):
            raise InputError(
                f"config.{key}: {folder} has {size} tokens, the run's tokenizer ({self.tokenizer_folder})"
                f" {own.vocab_size}; use a model trained with that tokenizer"
            )
        ids = range(own.vocab_size)
        if other is not None and (other.vocab_size != own.vocab_size or other.pieces(ids) != own.pieces(ids)):
            raise InputError(
                f"config.{key}: {folder} has another vocabulary than the run's tokenizer ({self.tokenizer_folder});"
                " set config.tokenizer.path to that folder, or use a model trained with the run's tokenizer"
            )
        return loaded

    def lora_of(self, stage: str) -> LoRA | None:
        """How a stage trains adapters; None where it trains the whole model."""
        return LoRA(**self.config.model.lora.to_dict()) if configs.uses_lora(self.config, stage) else None

    def trained_part(self, stage: str, params, model_config, purpose: str) -> tuple[Any, Any]:
        """(what the stage trains of a model, what it keeps frozen): all and None; with LoRA, adapters and head, rest.

        `lfjax.models.lora.bind` makes a model of the first from the second.
        """
        how = self.lora_of(stage)
        if how is None:
            return params, None
        init = functools.partial(lora.init, config=model_config, lora=how)
        shardings = shardings_for({"lora": jax.eval_shape(init, self.key(purpose))}, self.mesh, self.rules)
        adapters = jax.jit(init, out_shardings=shardings["lora"])(self.key(purpose))
        head = {group: tree for group, tree in params.items() if group == "head"}
        return {**head, "lora": adapters}, {group: tree for group, tree in params.items() if group != "head"}

    def save_model(self, stage: str, model, trained, base=None, *, labels: tuple[str, ...] = ()) -> None:
        """Writes models/<stage>, whole or not at all; all processes call it, process 0 writes. `labels` name scores.

        With LoRA the model is merged, and the adapter is in models/<stage>/adapter, in PEFT's format.
        """
        how, params, adapter = self.lora_of(stage), trained, None
        if how is not None:
            merge = functools.partial(lora.merge, lora=how)
            shapes = jax.eval_shape(merge, base, trained)
            params = jax.jit(merge, out_shardings=shardings_for(shapes, self.mesh, self.rules))(base, trained)
        key, name = self.start_of(stage)
        start = self.source(key, name) if name else None  # its family and further keys are kept
        config = None if start is None else hf.describe(start)
        loaded = hf.loaded_from(model, params, self.tokenizer, config=config, labels=labels)
        if how is not None:
            host = jax.tree.map(np.asarray, jax.jit(lambda x: x, out_shardings=replicated(self.mesh))(trained))
            adapter = peft.export(model.config, loaded.config, host, how, str(start))
        try:
            hf.save(self.models(stage), loaded, adapter=adapter)
        except SafetensorError as error:
            raise InputError(
                f"{self.models(stage)}: cannot write the model: {error}; free some space, then start the same command"
                " again"
            ) from error
        self.sync(f"saved {stage}")

    def sync(self, what: str) -> None:
        """Returns once every process is here: what process 0 has written before can be read by all."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(what)

    def network(self, model_config) -> Network:
        """A model whose activations are pinned to the run's mesh."""
        return model_config.build(constrain=constrainer(self.mesh, self.rules))

    def cut_share(self, stage: str, cut: int, whole: int) -> float:
        """The share of a stage's training texts that are longer, with their prompt, than its seq_len; also a note."""
        if cut:
            length = f"config.{stage}.seq_len = {self.config[stage].seq_len}"
            self.note(
                stage, f"{cut} of {whole} training texts are longer, with their prompt, than {length} and are cut"
            )
        return cut / whole

    @staticmethod
    def note(stage: str, what: str) -> None:
        """One line on what a stage makes of its data."""
        if jax.process_index() == 0:
            terminal.note(f"note: stage {stage}: {what}")

    def place(self, tree):
        """Host arrays onto the mesh by the run's rules."""
        return place(tree, shardings_for(tree, self.mesh, self.rules))

    @functools.cached_property
    def peak_flops(self) -> float:
        """FLOP/s that the mesh could reach; NaN where the device is not known."""
        return self.mesh.size * peak_flops(self.mesh.devices.flat[0])

    def program(self, key, make: Callable[[], Step]) -> Step:
        """The step made for this hashable key, once: stages that run the same program share it."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def key(self, purpose: str):
        """The key of one purpose, on every device; fold the step in."""

        def make():
            return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(purpose.encode()) & 0x7FFFFFFF)

        return jax.jit(make, out_shardings=replicated(self.mesh))()

    def checkpoint_folder(self, stage: str) -> Path:
        """checkpoints/<stage>."""
        return self.workdir / "checkpoints" / stage

    def checkpoints(self, stage: str) -> Checkpoints:
        """The stage's checkpoints."""
        return Checkpoints(self.checkpoint_folder(stage), keep=self.config[stage].keep, check=_check_extra)

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
        wrong = [key for key, fits in {"figures": _are_figures, **_READING}.items() if not fits(done.get(key))]
        if wrong:
            raise InputError(f"{path}: not what a finished stage leaves: no {' and no '.join(wrong)} in it; {fix}")
        return done

    def stopping(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.stop_requested
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.stop_requested))))

    def leave_if_asked(self, stage: str) -> None:
        """Ends an evaluation that nothing is lost by: it is made again. All processes call it.

        Raises:
          Interrupted: any process was asked to stop.
        """
        if self.stopping():
            raise Interrupted(f"stage {stage} stopped in its evaluation, which will be made again")


def _is_number(value: Any, low: float = -1e300) -> bool:
    """Sums of such are finite."""
    return isinstance(value, (int, float)) and low <= value <= 1e300


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_counts(value: Any) -> bool:
    return _are_numbers(value) and all(type(count) is int and count >= 0 for count in value.values())


def _are_figures(value: Any) -> bool:
    """Of a step or a stage: numbers that may be NaN, texts, and null where there is none."""
    kinds = (str, float, type(None))
    return isinstance(value, dict) and all(isinstance(x, kinds) or _is_number(x) for x in value.values())


def _are_pending(value: Any) -> bool:
    """What `Window.pending` gives."""
    pairs = value.values() if isinstance(value, dict) else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, float) or _is_number(x) for x in pair)
        for pair in pairs
    )


# What a `Meter` reads.
_READING = {"seconds": functools.partial(_is_number, low=0.0), "parts": _are_numbers, "programs": _are_counts}


def _is_reading(value: Any) -> bool:
    return isinstance(value, dict) and all(fits(value.get(key)) for key, fits in _READING.items())


def _check_extra(step: int, extra: Mapping[str, Any]) -> None:
    """Raises ValueError where what is beside a checkpoint is not what training leaves there."""
    kinds = {"figures": _are_figures, "row": _are_figures, "pending": _are_pending, "meter": _is_reading}
    wrong = [key for key, fits in kinds.items() if not fits(extra.get(key))]
    if type(extra.get("step")) is not int or extra["step"] != step:
        wrong.insert(0, "step")
    if wrong:
        raise ValueError(f"beside/metadata: not what training leaves: no {' and no '.join(wrong)} in it")


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
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"{key}: {dotted!r} imports {error.name!r}, which is not installed") from error
        raise InputError(
            f"{key}: no module {module_name!r}; tried {', '.join(folders)} and the installed packages; correct the name"
        ) from error
    except (Exception, SystemExit) as error:  # the user's module fails, or ends the program, while it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{key}: importing {module_name!r} fails: {cause}; mend that file") from error
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        raise InputError(f"{key}: {module.__file__ or module_name} has no function {name!r}; {hint}")
    return function


def run_stages(run: Run, stages: Mapping[str, Callable[[Run], dict[str, float]]]) -> dict[str, float]:
    """Runs every stage that is not finished, in order; a stage returns its final figures for summary.json.

    The same command on the same directory goes on where it was. Figures of all finished stages are in summary.json.
    """

    def ask_to_stop(signum, frame):
        if run.stop_requested:  # a second one means now
            raise KeyboardInterrupt
        run.stop_requested = True

    totals, run.began = [], time.perf_counter()
    with contextlib.closing(run), handled(ask_to_stop, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for stage in run.stages:
            done = run.finished(stage) or _run_stage(run, stage, stages[stage])
            totals.append(done)
            run.log.summary(run.data_figures | done["figures"])
            if run.stopping():
                raise Interrupted(f"stopped after stage {stage}")
        programs = functools.reduce(Counter.__or__, (Counter(done["programs"]) for done in totals))
        seconds = sum(done["seconds"] for done in totals)
        trained = sum(done["parts"].get("train", 0.0) for done in totals)
        goodput = trained / seconds if seconds else 0.0
        run.log.summary({"time/total_s": seconds, "time/goodput": goodput, "compile/count": programs.total()})
    return read_json(run.workdir / "summary.json", dict)


def _run_stage(run: Run, stage: str, function: Callable[[Run], dict[str, float]]) -> dict[str, Any]:
    run.meter = Meter()
    figures = function(run)
    done = {"figures": figures, **run.meter.read(), "config": run.config_hash}
    if jax.default_backend() == "cpu":  # what the machine gave, beside the seconds that it took
        done["matmul_gflops"] = cpu_matmul_rate() / 1e9
    if jax.process_index() == 0:
        run.checkpoint_folder(stage).mkdir(parents=True, exist_ok=True)
        write_json(run.checkpoint_folder(stage) / FINISHED, done)
    return done
