"""Run configs: ml_collections sections with documented defaults; load, override, lock, validate, dump.

A config file holds one `get_config()` that starts from `base_config()` and sets what differs. Every leaf can be
overridden on the command line as `--config.section.key=value`; the dict is locked, so a misspelt key is an error.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import math
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

Config = Any  # an ml_collections ConfigDict: its leaves get their types from `base_config`, which no checker can follow

STAGES = ("tokenizer", "pretrain", "sft", "reward", "classify", "ppo", "evaluate")


class InputError(ValueError):
    """Bad input: one line that names the file, line and field, or the config key, and the fix. Exit code 2."""


def _section(**fields) -> Config:
    return ConfigDict(fields)


def _optim_overrides(**set_here) -> Config:
    """A stage's own values; what is None is taken from `config.optim`."""
    types = {"name": str, "learning_rate": float, "schedule": str, "warmup_steps": int, "end_factor": float,
             "b1": float, "b2": float, "eps": float, "weight_decay": float, "clip_norm": float}  # fmt: skip
    section = ConfigDict({name: placeholder(kind) for name, kind in types.items()})
    section.update(set_here)
    return section


def _training(**differs) -> dict[str, Any]:
    """What every training stage has."""
    return {
        "steps": 0,  # optimiser steps; 0: as many as `epochs` say
        "epochs": 1.0,
        "batch_size": 16,  # rows of the global batch, over all devices and processes
        "log_every": 10,  # steps a row of metrics.jsonl
        "eval_every": 0,  # steps; 0: only at the end
        "save_every": 100,  # steps between checkpoints
        "keep": 2,  # checkpoints kept
        "optim": _optim_overrides(),
        **differs,
    }


def base_config() -> Config:
    """Every section with its defaults. Fields are scalars or tuples; optional ones are typed placeholders."""
    config: Config = ConfigDict()
    config.seed = 0
    config.stages = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")  # what runs, in this order
    config.data = _section(
        source="vader",  # "vader": rated sentences fetched with pip; "jsonl": feedback records; "text": paragraphs
        path=placeholder(str),  # jsonl, text: the file (or its training split)
        validation_path=placeholder(str),  # given splits; else split by hash of the text
        test_path=placeholder(str),
        validation_fraction=0.05,
        test_fraction=0.05,
        heading_records=20,  # a prompt of so many records is a heading: with given splits prompt and response decide
        max_records=0,  # 0: all
        seed=0,
    )
    config.tokenizer = _section(
        path=placeholder(str),  # a tokenizer's folder or file, of any kind; else a sentencepiece model is trained
        model_type="unigram",  # or "bpe"
        vocab_size=2000,
    )
    config.model = _section(
        init_from=placeholder(str),  # a model folder (Hugging Face layout) to start from; its shape wins
        # "llama": RoPE, RMSNorm, SwiGLU; "gpt2": learned positions, LayerNorm, GELU, biases; "lstm": recurrent, of
        # width and layers alone
        form="llama",
        width=128,
        layers=2,
        heads=4,
        kv_heads=4,
        mlp_width=352,
        context=128,  # longest sequence, in tokens
        tied=True,
        dtype="float32",  # compute; parameters, softmax and losses are float32
        remat="none",  # "none" | "dots" | "full"
        unroll=0,  # layers unrolled in the scan; 0: all
        vocab_multiple=1,  # embedding rows are padded to a multiple of this and of mesh.tensor
        lora=_section(  # stages that start from a model train adapters (and a head) alone, the model stays as it is
            rank=0,  # 0: off
            alpha=16.0,  # the change is A B x alpha / rank
            targets=("layers/",),  # regexes on the paths of the layers' matrices; ("attention/[qv]$",), say
            rslora=False,  # alpha / sqrt(rank) instead
            dropout=0.0,  # on the adapters' input, in the sft and reward stages
        ),
    )
    config.mesh = _section(data=-1, fsdp=1, tensor=1, rules=())  # rules: () is lfjax.sharding.DEFAULT_RULES
    config.optim = _section(
        name="adamw",  # "adamw" | "adafactor" | "lion" | "muon"
        learning_rate=1e-3,
        schedule="cosine",  # "constant" | "linear" | "cosine"
        warmup_steps=0,
        end_factor=0.0,  # last learning rate / peak
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,  # 0: no clipping
        groups=((r"norm\d?/|bias$|positions$|token_types$|cutpoints$", 1.0, 0.0),),  # (regex, rate x, weight decay x)
    )
    lm = {"num_microbatches": 1, "chunk_size": 64, "z_loss": 0.0}
    config.pretrain = _section(**_training(seq_len=64, dropout=0.0, step=_section(**lm)))
    config.sft = _section(**_training(seq_len=64, dropout=0.0, init_from="auto", step=_section(**lm)))
    config.reward = _section(
        **_training(
            init_from="auto",  # stage or model folder; "auto": sft where that runs before, else pretrain
            seq_len=128,
            buckets=(32, 64, 128),  # sequence lengths, each compiled once
            max_candidates=0,  # answers a record that are read, the best ranked first; 0: as many as there are
            dropout=0.0,
            center_ratings=True,  # learn ratings less the training mean (reward/rating_mean): the head has no bias
            min_gap=1.0,  # figures: rating points between the held-out answers of a pair that counts; as step.min_gap
            head_init="normal",  # "normal": std 1/sqrt(D+1); "zero"
            step=_section(
                regression=1.0,  # weights of the losses; 0 leaves one out
                every_token=0.0,
                bradley_terry=1.0,
                hinge=0.0,
                listwise_hinge=0.0,
                plackett_luce=0.0,
                softmax=0.0,
                centering=0.0,
                ordinal=0.0,  # above 0: classes of ratings, with learnt cutpoints
                ordinal_bounds=(),  # rating points between the classes; (): midway between the scale's whole points
                across_records=True,  # also pair answers of different records by their ratings
                min_gap=1.0,  # training: rating points between two answers that the pair losses take as a pair
                margin_scale=0.0,  # margin = this x rating gap
                num_microbatches=1,
            ),
        )
    )
    config.classify = _section(
        **_training(
            init_from="auto",  # as reward.init_from
            seq_len=128,
            buckets=(32, 64, 128),  # sequence lengths, each compiled once
            dropout=0.0,
            step=_section(label_smoothing=0.0, num_microbatches=1),
        )
    )
    config.ppo = _section(
        **_training(
            init_from="auto",  # the policy's start and the frozen reference; as reward.init_from
            reward="reward",  # stage, model folder, or "module:function" f(prompts, responses, records) -> scores
            value_init="reward",  # "reward" | "policy" | a model folder
            batch_size=128,  # episodes an update
            optim=_optim_overrides(eps=1e-5),
            steps=40,  # updates
            prompt_buckets=(8,),  # prompt lengths in tokens with BOS, each compiled once
            stop=(),  # texts of one token each that end a response, besides EOS
            prompt_min=4,  # tokens of a record without prompt that start a continuation
            prompt_max=6,
            norm_samples=512,  # reference samples that fix the score's mean and deviation; 0: scores as they are
            kl_coef=0.1,
            reference_dtype="auto",  # "auto": bfloat16 on accelerators, float32 on CPU
            value_optim=_optim_overrides(eps=1e-5),
            samples_every=10,  # updates between rows in samples.jsonl
            rollout_step=_section(max_new_tokens=28, temperature=1.0, top_k=0, top_p=1.0),
            experience_step=_section(
                gamma=1.0,
                lam=0.95,
                kl_kind="k1",  # "k1" | "k2" | "k3" | "abs"
                whiten_rewards=False,
                whiten_advantages=True,
                min_length=0,  # a response of fewer tokens, or without EOS, scores min(score, 0) - penalty
                require_eos=True,
                penalty=1.0,
                chunk_size=64,
            ),
            update_step=_section(
                epochs=4,
                minibatches=1,
                clip_low=0.2,
                clip_high=0.2,
                value_clip=0.2,
                value_coef=1.0,
                entropy_coef=0.0,
                kl_target=0.0,  # nats a sequence; above 0 the KL coefficient adapts to it
                kl_horizon=10000.0,
                num_microbatches=1,
                chunk_size=64,
            ),
        )
    )
    config.evaluate = _section(prompts=512, batch_size=128, samples=24)
    config.steps = _section(  # swap any of these for a fork: "my_module:my_step"
        sft="lfjax.steps.sft:sft_step",
        reward="lfjax.steps.reward:reward_step",
        classify="lfjax.steps.classify:classify_step",
        ppo_rollout="lfjax.steps.ppo_rollout:ppo_rollout",
        ppo_score="lfjax.steps.ppo_score:ppo_score",
        ppo_experience="lfjax.steps.ppo_experience:ppo_experience",
        ppo_update="lfjax.steps.ppo_update:ppo_update",
        evaluate="lfjax.steps.evaluate:evaluate_step",
    )
    config.run = _section(
        matmul_precision="highest",  # on CPU free; "default" is faster on accelerators
        breakdown_every=10,  # PPO updates between those whose parts are timed one by one, in timing.jsonl; 0: never
        max_skipped=10,  # non-finite updates in a row before the run stops
        tensorboard=True,
        compile_cache=True,  # keep compiled programs in ~/.cache/lfjax/xla
    )
    return config


def shipped() -> dict[str, Path]:
    """The configs that come with lfjax, name -> file: in the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    folder = next(filter(Path.is_dir, folders), folders[0])
    return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def summary(path: Path) -> str:
    """The first line of a config file's docstring, read without running the file; "" where it has none."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError) as error:
        return f"cannot be read: {error}"
    return (docstring or "").partition("\n")[0]


def find(name: str | Path) -> Path:
    """The file that `--config=` means: a path, or else the name of a config that comes with lfjax.

    Raises:
      InputError: neither; with the nearest names.
    """
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    found = "a folder" if path.is_dir() else "no such file"
    near = difflib.get_close_matches(path.stem, known, n=3)
    hint = f", or a config's name: did you mean {' or '.join(near)}?" if near else "; lfjax configs lists the names"
    raise InputError(f"--config={name}: {found}; give a Python file with a get_config() function{hint}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `get_config()` of a config file, applies `--config.key=value` overrides and locks the result.

    Args:
      path: a file, or the name of a config that comes with lfjax, such as "quickstart" (`lfjax configs` lists them).
      overrides: "--config.section.key=value" each.
    Raises:
      InputError: no such file, the file fails, an unknown key (with the nearest right one), a value of the wrong type.
    """
    path = find(path)
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:  # whatever a config file does wrong is the user's to mend
        raise InputError(f"{path}: mend the config file: {cause_of(error, path)}") from error
    if not callable(namespace.get("get_config")):
        raise InputError(f"{path}: no get_config() function; a config file defines one that returns a ConfigDict")
    try:
        config = namespace["get_config"]()
    except Exception as error:
        raise InputError(f"{path}: mend the config file: get_config() fails: {cause_of(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}; it has to return a ConfigDict")
    _check_keys(config, base_config(), str(path))
    for item in overrides:
        apply_override(config, item)
    config.lock()
    return config


def cause_of(error: BaseException, source: str | Path) -> str:
    """What went wrong in a user's file, in one line: kind, message, and the last line of `source` that was running."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(source)), None)
    return f"{type(error).__name__}: {' '.join(text.split())}" + (f" (line {line})" if line else "")


# Step -> the sections that hold its keywords: a fork may take others, which its config file adds or deletes there.
STEP_SECTIONS = {
    "sft": ("pretrain.step", "sft.step"),
    "reward": ("reward.step",),
    "classify": ("classify.step",),
    "ppo_rollout": ("ppo.rollout_step",),
    "ppo_experience": ("ppo.experience_step",),
    "ppo_update": ("ppo.update_step",),
}


def _check_keys(config: Config, base: Config, where: str, prefix: str = "config") -> None:
    """A config file may not invent keys (they would be read by nobody) nor lose any."""
    for key in config:
        if key not in base:
            raise InputError(f"{where}: {_unknown_key(f'{prefix}.{key}', key, list(base))}")
        if isinstance(config[key], ConfigDict) != isinstance(base[key], ConfigDict):
            kind = "a section" if isinstance(base[key], ConfigDict) else "a value, not a section"
            raise InputError(f"{where}: {prefix}.{key}: has to be {kind}; start from base_config() and set its keys")
        section = f"{prefix}.{key}".removeprefix("config.")
        of_a_step = any(section in sections for sections in STEP_SECTIONS.values())
        if isinstance(base[key], ConfigDict) and not of_a_step:
            _check_keys(config[key], base[key], where, f"{prefix}.{key}")
    missing = [key for key in base if key not in config]
    if missing:
        raise InputError(f"{where}: {prefix}.{missing[0]}: missing; start from lfjax.config.base_config()")


def apply_override(config: Config, item: str) -> None:
    """Applies one "--config.a.b=value"; "none" empties an optional leaf."""
    match = re.fullmatch(r"--config\.([\w.]+)=(.*)", item, re.DOTALL)
    if not match:
        raise InputError(f"{item}: not an override; write --config.section.key=value")
    dotted, text = match.groups()
    section: Any = config
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(section, ConfigDict) or part not in section:
            known = list(section) if isinstance(section, ConfigDict) else []
            raise InputError(_unknown_key(".".join(["config", *parts[: depth + 1]]), part, known))
        if depth < len(parts) - 1:
            section = section[part]
    name = parts[-1]
    held: Any = section[name]
    if isinstance(held, ConfigDict):
        inside = ", ".join(held)
        raise InputError(f"config.{dotted}: a section; set one of its keys: {inside}")
    optional = isinstance(dict(section.items(preserve_field_references=True))[name], FieldReference)
    empty = optional and text.lower() == "none"
    section[name] = None if empty else _parse(text, section.get_type(name), f"config.{dotted}")


def _unknown_key(dotted: str, part: str, known: list[str]) -> str:
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
    hint = (
        f"did you mean {dotted.rsplit('.', 1)[0]}.{near[0]}?" if near else f"known keys: {', '.join(known) or 'none'}"
    )
    return f"{dotted}: no such key; {hint}"


def _parse(text: str, kind: type, key: str):
    """A value of the leaf's own type."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if kind is tuple and isinstance(value, (int, float, str)):
        value = tuple(_scalar(part) for part in text.split(",") if part)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{key}: {text!r} is not {kind.__name__}; give a value such as {_example(kind)}")
    return value


def _scalar(text: str):
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _example(kind: type) -> str:
    return {int: "16", float: "1e-4", bool: "True", tuple: "(1, 2)"}.get(kind, "text")


def optim_section(config: Config, stage: str, name: str = "optim") -> dict[str, Any]:
    """A stage's optimiser settings: `config.optim` with the stage's own values on top."""
    own = {key: value for key, value in config[stage][name].items() if value is not None}
    return {**config.optim.to_dict(), **own}


def to_plain(config: Config) -> dict[str, Any]:
    """The resolved config as JSON-able values."""

    def plain(value) -> Any:
        if isinstance(value, (ConfigDict, dict)):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, FieldReference):
            return plain(value.get())
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def flatten(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    """{"config.optim.b1": 0.9, ...}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        flat |= flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One "key: old -> new" for each leaf that differs."""
    a, b = flatten(old), flatten(new)
    missing = "(absent)"
    return [
        f"{key}: {json.dumps(a.get(key, missing))} -> {json.dumps(b.get(key, missing))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _leaf(config: Config, key: str) -> Any:
    """The value of "section.key"; None where a fork's config has deleted a step's keyword."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part)
    return value


def _at_least(config: Config, low: float, *keys: str) -> None:
    for key in keys:
        value = _leaf(config, key)
        if value is not None and value < low:
            raise InputError(f"config.{key}: {value}; allowed: at least {low:g}")


def _one_of(config: Config, key: str, allowed: tuple[str, ...]) -> None:
    value = _leaf(config, key)
    if value is not None and value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
        raise InputError(f"config.{key}: {value!r}; {hint}")


def validate(config: Config) -> None:
    """Everything that can be said about a config without reading data or starting a device.

    Raises:
      InputError: naming the key, what was found, and what is allowed.
    """
    _check_values(config)
    _check_stages(config)
    _one_of(config, "data.source", ("vader", "jsonl", "text"))
    if config.data.source != "vader" and not config.data.path:
        raise InputError(f'config.data.path: not set; data.source="{config.data.source}" needs the file\'s path')
    _check_fixed_splits(config)
    _one_of(config, "tokenizer.model_type", ("unigram", "bpe"))
    _one_of(config, "model.form", ("llama", "gpt2", "lstm"))
    _one_of(config, "model.dtype", ("float32", "bfloat16"))
    _one_of(config, "model.remat", ("none", "dots", "full"))
    _one_of(config, "reward.head_init", ("normal", "zero"))
    _one_of(config, "run.matmul_precision", ("default", "high", "highest"))
    _one_of(config, "ppo.experience_step.kl_kind", ("k1", "k2", "k3", "abs"))
    _one_of(config, "ppo.reference_dtype", ("auto", "float32", "bfloat16"))
    _at_least(config, 1, "model.width", "model.layers", "model.heads", "model.kv_heads", "model.mlp_width")
    _at_least(config, 2, "model.context", "tokenizer.vocab_size")
    _at_least(config, 0, "seed", "data.seed", "model.unroll", "data.max_records", "evaluate.samples")
    _at_least(config, 0, "run.breakdown_every")
    _at_least(config, 1, "evaluate.prompts", "evaluate.batch_size", "run.max_skipped", "model.vocab_multiple")
    _check_model(config)
    _check_lora(config)
    _check_rules(config.mesh.rules)
    for fraction in ("validation_fraction", "test_fraction"):
        if not 0.0 < config.data[fraction] < 0.5:
            raise InputError(f"config.data.{fraction}: {config.data[fraction]}; allowed: between 0 and 0.5")
    for stage in ("pretrain", "sft", "reward", "classify", "ppo"):
        if stage in config.stages:
            _check_training(config, stage)
    if "ppo" in config.stages or "evaluate" in config.stages:  # the evaluation samples as PPO does
        _check_ppo(config)
    for stage in ("pretrain", "sft", "reward", "classify", "ppo"):
        if stage in config.stages and not config.model.init_from:  # else that model's context counts, once it is read
            check_room(config, stage, config.model.context, "model.context")


def _check_values(config: Config) -> None:
    """No leaf that has a default may be empty, no text "" or hold a NUL, no number infinite, NaN or beyond 32 bits."""
    required = flatten(to_plain(base_config()))
    for key, value in flatten(to_plain(config)).items():
        if value in (None, "") and required.get(key) is not None:
            raise InputError(f"{key}: {value!r}; give a value such as {required[key]!r}")
        if value == "":
            raise InputError(f"{key}: ''; give a value, or none")
        if isinstance(value, str) and "\0" in value:
            raise InputError(f"{key}: {value!r}; holds a NUL character, which no path or name can; take it out")
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{key}: {value}; allowed: finite numbers")
            if isinstance(number, int) and abs(number) >= 2**31:
                raise InputError(f"{key}: {value}; allowed: whole numbers below 2^31 in size")


def _numbers(value: Any) -> list[int | float]:
    """The numbers of a leaf: itself, or what its rows hold."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def _check_fixed_splits(config: Config) -> None:
    """The VADER sentences have splits of their own; what would be ignored is refused."""
    if config.data.source == "vader":
        default = base_config().data
        for key in ("path", "validation_path", "test_path", "validation_fraction", "test_fraction"):
            if config.data[key] != default[key]:
                raise InputError(
                    f'config.data.{key}: {config.data[key]}; data.source="vader" has fixed splits and reads no file of'
                    f" yours: leave it at {default[key]}, or set data.source to jsonl or text"
                )


def _check_stages(config: Config) -> None:
    """Known stages, each once, and each after the stages whose results it takes."""
    for stage in config.stages:
        if stage not in STAGES:
            near = difflib.get_close_matches(str(stage), STAGES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(STAGES)}"
            raise InputError(f"config.stages: unknown stage {stage!r}; {hint}")
    if not config.stages or len(set(config.stages)) != len(config.stages):
        raise InputError(f"config.stages: {config.stages}; name one or more stages, each once")
    for place, stage in enumerate(config.stages):
        before = config.stages[:place]
        if stage != "tokenizer" and "tokenizer" not in before and not (config.tokenizer.path or config.model.init_from):
            raise InputError(
                f'config.stages: "{stage}" needs a vocabulary; put "tokenizer" before it, or set config.tokenizer.path'
            )
        if stage == "evaluate" and not {"sft", "ppo"} & {*before}:
            raise InputError(
                'config.stages: "evaluate" compares before and after; it needs an "sft" or "ppo" stage before it'
            )
        for key, name in model_sources(config, stage).items():
            if name in ("tokenizer", "evaluate"):
                raise InputError(f'config.{key}: stage "{name}" makes no model; name another, or a model folder')
            given = name == "pretrain" and "pretrain" not in config.stages and config.model.init_from
            if name in STAGES and name not in before and not given:
                raise InputError(
                    f'config.{key}: stage "{name}" does not come before "{stage}" in config.stages; put it there,'
                    " or name a model folder"
                )


def init_from(config: Config, stage: str) -> str:
    """The stage or folder whose language model a stage starts from."""
    if config[stage].init_from != "auto":
        return config[stage].init_from
    stages = tuple(config.stages)
    before = stages[: stages.index(stage)] if stage in stages else stages
    return "sft" if "sft" in before else "pretrain"


def model_sources(config: Config, stage: str) -> dict[str, str]:
    """Which models a stage starts from, config key -> stage or folder."""
    keys = {
        "sft": ("init_from",),
        "reward": ("init_from",),
        "classify": ("init_from",),
        "ppo": ("init_from", "reward", "value_init"),
    }
    found = {f"{stage}.{key}": config[stage][key] for key in keys.get(stage, ())}
    if f"{stage}.init_from" in found:
        found[f"{stage}.init_from"] = init_from(config, stage)
    if stage == "pretrain" and config.model.init_from:
        found["model.init_from"] = config.model.init_from
    if is_function(config.ppo.reward):
        found.pop("ppo.reward", None)
    if config.ppo.value_init in ("reward", "policy"):
        found.pop("ppo.value_init", None)
    return found


def is_function(name: str) -> bool:
    """Whether a reward is "module:function", not a stage or a folder."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def _check_rules(rules: tuple) -> None:
    for row in rules:
        try:
            pattern, axes = row
            re.compile(pattern)
            known = (
                isinstance(pattern, str)
                and not isinstance(axes, str)
                and all(axis in ("", "data", "fsdp", "tensor") for axis in axes)
            )
            named = [axis for axis in axes if axis]
            known = known and len(set(named)) == len(named)
        except (TypeError, ValueError, re.error):
            known = False
        if not known:
            raise InputError(
                f"config.mesh.rules: {row!r}; a row is (regex on the parameter path, ('data' | 'fsdp' | 'tensor' | '',"
                " one a dimension, each axis once))"
            )


def _check_model(config: Config) -> None:
    model = config.model
    if model.width % model.heads:
        raise InputError(f"config.model.heads: {model.heads} does not divide model.width {model.width}")
    if model.heads % model.kv_heads:
        raise InputError(f"config.model.kv_heads: {model.kv_heads} does not divide model.heads {model.heads}")
    if model.form == "llama" and (model.width // model.heads) % 2:
        raise InputError(f"config.model.heads: a head is {model.width // model.heads} wide; RoPE needs an even width")
    if model.form == "gpt2" and model.kv_heads != model.heads:
        raise InputError(f"config.model.kv_heads: {model.kv_heads}; the gpt2 form has as many as heads ({model.heads})")


def uses_lora(config: Config, stage: str) -> bool:
    """Whether a stage trains adapters: LoRA is on, and the stage starts from a model."""
    starts = stage in ("sft", "reward", "classify", "ppo") or (stage == "pretrain" and bool(config.model.init_from))
    return config.model.lora.rank > 0 and starts


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    _at_least(config, 0, "model.lora.rank")
    if lora.alpha <= 0:
        raise InputError(f"config.model.lora.alpha: {lora.alpha}; allowed: above 0")
    if not 0.0 <= lora.dropout < 1.0:
        raise InputError(f"config.model.lora.dropout: {lora.dropout}; allowed: 0 up to, not including, 1")
    try:
        patterns = [re.compile(pattern + "") for pattern in lora.targets]  # "": text, not bytes
    except (TypeError, re.error):
        patterns = []
    if not patterns:
        raise InputError(
            f"config.model.lora.targets: {lora.targets!r}; give regexes on the paths of the layers' matrices, such as"
            ' ("attention/[qv]$",)'
        )
    if lora.rank and not any(uses_lora(config, stage) for stage in config.stages):
        raise InputError(
            f"config.model.lora.rank: {lora.rank}; no stage of this run starts from a model: set config.model.init_from"
            " or add a stage after pretrain, or set the rank to 0"
        )


def _check_training(config: Config, stage: str) -> None:
    section = config[stage]
    _at_least(config, 0, f"{stage}.steps", f"{stage}.eval_every")
    _at_least(config, 1, *(f"{stage}.{key}" for key in ("batch_size", "log_every", "save_every", "keep")))
    if section.steps == 0 and section.epochs <= 0:
        raise InputError(f"config.{stage}.epochs: {section.epochs}; give steps or epochs above 0")
    for name in ("optim", "value_optim") if stage == "ppo" else ("optim",):
        optim, own = optim_section(config, stage, name), section[name]

        def found(leaf: str, optim=optim, own=own, key=f"config.{stage}.{name}") -> str:
            """The key that was set, in the stage's own section or in config.optim, and its value."""
            return f"{key if own.get(leaf) is not None else 'config.optim'}.{leaf}: {optim[leaf]!r}"

        if optim["name"] not in ("adamw", "adafactor", "lion", "muon"):
            raise InputError(f"{found('name')}; allowed: adamw, adafactor, lion, muon")
        if optim["schedule"] not in ("constant", "linear", "cosine"):
            raise InputError(f"{found('schedule')}; allowed: constant, linear, cosine")
        if optim["learning_rate"] <= 0:
            raise InputError(f"{found('learning_rate')}; allowed: above 0")
        for leaf in ("warmup_steps", "end_factor", "eps", "weight_decay", "clip_norm"):
            if optim[leaf] < 0:
                raise InputError(f"{found(leaf)}; allowed: at least 0")
        for leaf in ("b1", "b2"):
            if not 0.0 <= optim[leaf] < 1.0:
                raise InputError(f"{found(leaf)}; allowed: 0 up to, not including, 1")
        for row in optim["groups"]:
            _check_group(row)
    step = section.update_step if stage == "ppo" else section.step
    pieces = [step.get("num_microbatches", 1), step.get("minibatches", 1)]
    parts = math.prod(pieces)
    if min(pieces) < 1 or section.batch_size % parts:
        what = "update_step.minibatches x update_step.num_microbatches" if stage == "ppo" else "step.num_microbatches"
        raise InputError(f"config.{stage}.batch_size: {section.batch_size} rows do not divide into {what} = {parts}")
    if "dropout" in section and not 0.0 <= section.dropout < 1.0:
        raise InputError(f"config.{stage}.dropout: {section.dropout}; allowed: 0 up to, not including, 1")
    if "seq_len" in section and section.seq_len < 2:
        raise InputError(f"config.{stage}.seq_len: {section.seq_len}; allowed: at least 2")
    if stage in ("pretrain", "sft"):
        _at_least(config, 1, f"{stage}.step.chunk_size")
        _at_least(config, 0, f"{stage}.step.z_loss")
    if stage in ("reward", "classify"):
        _check_lengths(config, stage)
    if stage == "reward":
        _check_reward(config)
    if stage == "classify" and not 0.0 <= section.step.get("label_smoothing", 0.0) < 1.0:
        found = section.step.label_smoothing
        raise InputError(f"config.classify.step.label_smoothing: {found}; allowed: 0 up to, not including, 1")


def check_room(config: Config, stage: str, context: int, whose: str) -> None:
    """Raises InputError where the stage's longest sequences do not fit a model's context."""
    section = config[stage]
    key, longest = {
        "reward": lambda: ("buckets", max(section.buckets)),
        "classify": lambda: ("buckets", max(section.buckets)),
        "ppo": lambda: ("prompt_buckets", max(section.prompt_buckets) + section.rollout_step.max_new_tokens),
    }.get(stage, lambda: ("seq_len", section.seq_len))()
    if longest > context:
        more = " with rollout_step.max_new_tokens" if stage == "ppo" else ""
        raise InputError(f"config.{stage}.{key}: {longest} tokens{more}; allowed: at most {whose} = {context}")


def _check_buckets(config: Config, key: str, low: int) -> None:
    lengths = _leaf(config, key)
    if not lengths or not all(type(length) is int and length >= low for length in lengths):
        raise InputError(f"config.{key}: {lengths}; give lengths in tokens, such as (32, 64), each at least {low}")


def _check_lengths(config: Config, stage: str) -> None:
    section = config[stage]
    _check_buckets(config, f"{stage}.buckets", 2)
    if section.seq_len > max(section.buckets):
        raise InputError(
            f"config.{stage}.seq_len: {section.seq_len}; allowed: at most the largest of {stage}.buckets ="
            f" {max(section.buckets)}"
        )


def _check_reward(config: Config) -> None:
    reward = config.reward
    _at_least(config, 0, "reward.max_candidates", "reward.min_gap", "reward.step.min_gap", "reward.step.margin_scale")
    losses = (
        "regression",
        "every_token",
        "bradley_terry",
        "hinge",
        "listwise_hinge",
        "plackett_luce",
        "softmax",
        "ordinal",
    )
    _at_least(config, 0, *(f"reward.step.{name}" for name in (*losses, "centering")))
    own = config.steps.reward == base_config().steps.reward
    if own and not any(reward.step.get(name) for name in losses):
        raise InputError(f"config.reward.step: every loss has weight 0; set one of {', '.join(losses)} above 0")
    bounds = reward.step.get("ordinal_bounds", ())
    numbers = all(type(bound) in (int, float) and math.isfinite(bound) for bound in bounds)
    if not numbers or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise InputError(
            f"config.reward.step.ordinal_bounds: {bounds}; give increasing numbers in rating points, such as (1.5, 2.5)"
        )


def _check_group(row) -> None:
    try:
        pattern, *multipliers = row
        re.compile(pattern)
        known = isinstance(pattern, str) and len(multipliers) == 2
        known = known and all(isinstance(x, (int, float)) and x >= 0 for x in multipliers)
    except (TypeError, ValueError, re.error):
        known = False
    if not known:
        raise InputError(
            f"config.optim.groups: {row!r}; a row is (regex, learning-rate multiplier, weight-decay multiplier)"
        )


def _check_ppo(config: Config) -> None:
    ppo = config.ppo
    if ppo.rollout_step.get("top_k", 0) or ppo.rollout_step.get("top_p", 1.0) != 1.0:
        raise InputError(
            "config.ppo.rollout_step.top_k/top_p: PPO samples from the whole distribution, or its ratios are wrong;"
            " set top_k=0 and top_p=1.0"
        )
    _at_least(config, 1e-6, "ppo.rollout_step.temperature")
    _check_buckets(config, "ppo.prompt_buckets", 1)
    if not all(isinstance(text, str) and text for text in ppo.stop):
        raise InputError(f"config.ppo.stop: {ppo.stop!r}; give texts of one token each, such as ('.', '!')")
    _at_least(config, 1, "ppo.prompt_min", "ppo.rollout_step.max_new_tokens")
    _at_least(config, 1, "ppo.update_step.epochs", "ppo.update_step.chunk_size", "ppo.experience_step.chunk_size")
    _at_least(config, 0, "ppo.norm_samples", "ppo.kl_coef", "ppo.samples_every", "ppo.experience_step.penalty")
    _at_least(config, 0, "ppo.experience_step.min_length")
    _at_least(config, 0, "ppo.update_step.value_clip", "ppo.update_step.value_coef", "ppo.update_step.kl_target")
    _at_least(config, 1, "ppo.update_step.kl_horizon")
    longest = ppo.rollout_step.max_new_tokens
    if ppo.experience_step.get("min_length", 0) > longest:
        raise InputError(
            f"config.ppo.experience_step.min_length: {ppo.experience_step.min_length}; allowed: at most"
            f" ppo.rollout_step.max_new_tokens = {longest}"
        )
    for key in ("clip_low", "clip_high"):
        if not 0.0 < ppo.update_step.get(key, 0.2) < 1.0:
            raise InputError(f"config.ppo.update_step.{key}: {ppo.update_step[key]}; allowed: between 0 and 1")
    for key in ("gamma", "lam"):
        if not 0.0 <= ppo.experience_step.get(key, 1.0) <= 1.0:
            raise InputError(f"config.ppo.experience_step.{key}: {ppo.experience_step[key]}; allowed: 0 to 1")
    if ppo.value_init == "reward" and is_function(ppo.reward):
        raise InputError('config.ppo.value_init: "reward" needs a learned reward; use "policy" or a model folder')
    most = max(ppo.prompt_buckets) - 1
    if not ppo.prompt_min <= ppo.prompt_max <= most:
        raise InputError(
            f"config.ppo.prompt_max: {ppo.prompt_max}; allowed: from prompt_min {ppo.prompt_min} to the largest of"
            f" prompt_buckets less BOS = {most}"
        )
