"""Run configs: ml_collections sections with documented defaults; load, override, lock, validate, dump.

A config file holds one `get_config()` that starts from `base_config()` and sets what differs. Every leaf can be
overridden on the command line as `--config.section.key=value`; the dict is locked, so a misspelt key is an error. The
sections here are those that stages share; each stage's declaration (`lfjax.run.stage.Stage`) brings its own.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

Config = Any  # an ml_collections ConfigDict: its leaves get their types from `base_config`, which no checker can follow
MOVED = {"run.tensorboard": "run.trackers"}  # keys of shared sections: before -> now


class InputError(ValueError):
    """Bad input: one line that names the file, line and field, or the config key, and the fix. Exit code 2."""


class BadLines(InputError):
    """Several lines of a file are wrong: what is said of the first of them, and how many more there are.

    Attributes:
      lines: a message each.
    """

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


def section(**fields) -> Config:
    """A section with these keys and defaults."""
    return ConfigDict(fields)


def _stages() -> Any:
    """The stages, which are above this module; read only once a config is made, and never on import."""
    from lfjax import stages

    return stages


def base_config(*outside: str) -> Config:
    """Every section with its defaults. Fields are scalars or tuples; optional ones are typed placeholders.

    Args:
      outside: methods that are not lfjax's own, each the "module:STAGE" of its declaration; modules beside the config
        file are found.
    Raises:
      InputError: no such declaration, or a name that is taken.
    """
    config = shared_sections()
    config.stages = _stages().CHAIN  # what runs, in this order; "module:STAGE" is a method from outside
    config.outside = outside  # what this function was given
    config.steps = section()  # swap any of these for a fork: "my_module:my_step"
    for stage in _stages().declared(outside).values():
        config[stage.name] = stage.section()
        config.steps.update({name: step.path for name, step in stage.steps.items()})
    return config


def shared_sections() -> Config:
    """What is no stage's own."""
    config: Config = ConfigDict()
    config.seed = 0
    config.data = section(
        source="vader",  # "vader": rated sentences fetched with pip; "jsonl": feedback records; "text": paragraphs
        path=placeholder(str),  # jsonl, text: the file (or its training split)
        validation_path=placeholder(str),  # given splits; else split by hash of the text
        test_path=placeholder(str),
        validation_fraction=0.05,
        test_fraction=0.05,
        heading_records=20,  # a prompt of so many records is a heading: with given splits prompt and response decide
        max_records=0,  # 0: all
        # what has more tokens than its stage takes: a prompt to write from is left out ("skip"), or loses its start
        # ("cut"); a text to learn from is cut to seq_len either way; "error": any stops the run before it trains
        too_long="skip",
        seed=0,
    )
    config.tokenizer = section(
        path=placeholder(str),  # a tokenizer's folder or file, of any kind; else a sentencepiece model is trained
        model_type="unigram",  # or "bpe"
        vocab_size=2000,
    )
    config.model = section(
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
        lora=section(  # stages that start from a model train adapters (and a head) alone, the model stays as it is
            rank=0,  # 0: off
            alpha=16.0,  # the change is A B x alpha / rank
            targets=("layers/",),  # regexes on the paths of the layers' matrices; ("attention/[qv]$",), say
            rslora=False,  # alpha / sqrt(rank) instead
            dropout=0.0,  # on the adapters' input, in the sft and reward stages
        ),
    )
    config.mesh = section(data=-1, fsdp=1, tensor=1, rules=())  # rules: () is lfjax.sharding.DEFAULT_RULES
    config.optim = section(
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
    config.sampling = section(  # of every stage that writes; a stage's own values come before these
        prompt_buckets=(8,),  # prompt lengths in tokens with BOS, each compiled once
        prompt_min=4,  # tokens of a record without prompt that start a continuation
        prompt_max=6,
        stop=(),  # texts of one token each that end a response, besides EOS
        max_new_tokens=28,
        temperature=1.0,
        min_new_tokens=0,  # tokens before which nothing ends a response
        top_k=0,  # 0: off. What trains on its samples takes them from the whole distribution, and refuses these three
        top_p=1.0,  # 1: off
        min_p=0.0,  # 0: off; else tokens less probable than this x the most probable one are left out
    )
    config.run = section(
        matmul_precision="highest",  # on CPU free; "default" is faster on accelerators
        breakdown_every=10,  # PPO updates between those whose parts are timed one by one, in timing.jsonl; 0: never
        max_skipped=10,  # non-finite updates in a row before the run stops
        trackers=("tensorboard",),  # "tensorboard", "wandb", or "module:Class" of your own; (): none
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
    with on_path((path.resolve().parent, Path.cwd())):
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
        outside: Any = config.get("outside", ())
        stages = _stages().declared(outside)
        moved = moved_keys(stages)
        _check_keys(config, base_config(*outside), str(path), _step_sections(stages), moved)
        chains = [item for item in overrides if item.startswith("--config.stages=")]
        for item in chains:  # first: it may name a method whose keys the others set
            apply_override(config, item, moved)
        moved = moved_keys(_add_named(config))
        for item in overrides:
            if item not in chains:
                apply_override(config, item, moved)
    config.lock()
    return config


def moved_keys(stages: Mapping[str, Any]) -> dict[str, str]:
    """What keys were called before -> what they are called now, of shared sections and of these stages'."""
    return MOVED | {old: new for stage in stages.values() for old, new in stage.moved.items()}


def _add_named(config: Config) -> dict[str, Any]:
    """Puts the methods that `config.stages` names by "module:STAGE" into the config, as `base_config` would have.

    Returns:
      name -> declaration, of all that there are.
    """
    given = tuple(config.outside)
    named = (name for name in config.stages if isinstance(name, str) and ":" in name)
    outside = tuple(dict.fromkeys((*given, *named)))
    stages = _stages().declared(outside, key="config.stages")
    names = dict(zip(outside, list(stages)[len(stages) - len(outside) :], strict=True))
    with config.unlocked():
        for stage in (stages[names[dotted]] for dotted in outside[len(given) :]):
            config[stage.name] = stage.section()
            config.steps.update({name: step.path for name, step in stage.steps.items() if name not in config.steps})
        config.outside, config.stages = outside, tuple(names.get(name, name) for name in config.stages)
    return stages


@contextlib.contextmanager
def on_path(folders: Iterable[Path]) -> Iterator[None]:
    """Modules in these folders can be imported inside, and are found first."""
    added = [name for name in map(str, folders) if name not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        sys.path[:] = [name for name in sys.path if name not in added]


def cause_of(error: BaseException, source: str | Path) -> str:
    """What went wrong in a user's file, in one line: kind, message, and the last line of `source` that was running."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(source)), None)
    return f"{type(error).__name__}: {' '.join(text.split())}" + (f" (line {line})" if line else "")


def _step_sections(stages: Mapping[str, Any]) -> set[str]:
    """Those that hold a step's keywords: a fork may take others, which its config file adds or deletes there."""
    return {step.section for stage in stages.values() for step in stage.steps.values() if step.section}


def _check_keys(
    config: Config, base: Config, where: str, of_steps: set[str], moved: Mapping[str, str], prefix: str = "config"
) -> None:
    """A config file may not invent keys (they would be read by nobody) nor lose any."""
    for key in config:
        if f"{prefix}.{key}".removeprefix("config.") in moved:
            raise InputError(f"{where}: {_moved(f'{prefix}.{key}'.removeprefix('config.'), moved)}")
        if key not in base:
            raise InputError(f"{where}: {_unknown_key(f'{prefix}.{key}', key, list(base))}")
        if isinstance(config[key], ConfigDict) != isinstance(base[key], ConfigDict):
            kind = "a section" if isinstance(base[key], ConfigDict) else "a value, not a section"
            raise InputError(f"{where}: {prefix}.{key}: has to be {kind}; start from base_config() and set its keys")
        if isinstance(base[key], ConfigDict):
            own = config[key] if f"{prefix}.{key}".removeprefix("config.") in of_steps else base[key]
            _check_keys(config[key], own, where, of_steps, moved, f"{prefix}.{key}")
    missing = [key for key in base if key not in config]
    if missing:
        raise InputError(f"{where}: {prefix}.{missing[0]}: missing; start from lfjax.config.base_config()")


def _moved(key: str, moved: Mapping[str, str]) -> str:
    return f"config.{key}: is called config.{moved[key]} now; set that"


def apply_override(config: Config, item: str, moved: Mapping[str, str] | None = None) -> None:
    """Applies one "--config.a.b=value"; "none" empties an optional leaf.

    Args:
      moved: what a key was called before -> what it is called now, for the message.
    """
    match = re.fullmatch(r"--config\.([\w.]+)=(.*)", item, re.DOTALL)
    if not match:
        raise InputError(f"{item}: not an override; write --config.section.key=value")
    dotted, text = match.groups()
    if dotted in (moved or {}):
        raise InputError(_moved(dotted, moved or {}))
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
    return {**config.optim.to_dict(), **_set(config[stage][name])}


def sampling_section(config: Config, stage: str) -> Config:
    """How a stage writes: `config.sampling` with the stage's own values on top."""
    return ConfigDict({**config.sampling.to_dict(), **_set(config[stage].sampling)})


def _set(section: Config) -> dict[str, Any]:
    """What is not left to the shared section."""
    return {key: value for key, value in section.items() if value is not None}


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
    return difference_of(flatten(old), flatten(new))


def difference_of(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """As `difference`, of what `flatten` gives."""
    missing = "(absent)"
    return [
        f"{key}: {json.dumps(a.get(key, missing))} -> {json.dumps(b.get(key, missing))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def leaf(config: Config, key: str) -> Any:
    """The value of "section.key"; None where a fork's config has deleted a step's keyword."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part)
    return value


def at_least(config: Config, low: float, *keys: str) -> None:
    """Raises InputError for the first of the keys ("section.key") whose value is smaller."""
    for key in keys:
        value = leaf(config, key)
        if value is not None and value < low:
            raise InputError(f"config.{key}: {value}; allowed: at least {low:g}")


def one_of(config: Config, key: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError where the value of "section.key" is none of these."""
    value = leaf(config, key)
    if value is not None and value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
        raise InputError(f"config.{key}: {value!r}; {hint}")


def validate(config: Config, stages: Mapping[str, Any]) -> None:
    """Everything that can be said about a config without reading data or starting a device.

    Args:
      stages: name -> declaration, as `lfjax.stages.declared` gives them.
    Raises:
      InputError: naming the key, what was found, and what is allowed.
    """
    _check_values(config)
    _check_stages(config, stages)
    one_of(config, "data.source", ("vader", "jsonl", "text"))
    one_of(config, "data.too_long", ("skip", "cut", "error"))
    if config.data.source != "vader" and not config.data.path:
        raise InputError(f'config.data.path: not set; data.source="{config.data.source}" needs the file\'s path')
    _check_fixed_splits(config)
    one_of(config, "tokenizer.model_type", ("unigram", "bpe"))
    one_of(config, "model.form", ("llama", "gpt2", "lstm"))
    one_of(config, "model.dtype", ("float32", "bfloat16"))
    one_of(config, "model.remat", ("none", "dots", "full"))
    one_of(config, "run.matmul_precision", ("default", "high", "highest"))
    at_least(config, 1, "model.width", "model.layers", "model.heads", "model.kv_heads", "model.mlp_width")
    at_least(config, 2, "model.context", "tokenizer.vocab_size")
    at_least(config, 0, "seed", "data.seed", "model.unroll", "data.max_records", "run.breakdown_every")
    at_least(config, 1, "run.max_skipped", "model.vocab_multiple")
    _check_model(config)
    _check_lora(config)
    if config.model.lora.rank and not any(stages[stage].uses_lora(config) for stage in config.stages):
        raise InputError(
            f"config.model.lora.rank: {config.model.lora.rank}; no stage of this run starts from a model: set"
            " config.model.init_from or add a stage after pretrain, or set the rank to 0"
        )
    _check_rules(config.mesh.rules)
    for fraction in ("validation_fraction", "test_fraction"):
        if not 0.0 < config.data[fraction] < 0.5:
            raise InputError(f"config.data.{fraction}: {config.data[fraction]}; allowed: between 0 and 0.5")
    for stage in config.stages:
        stages[stage].validate(config)


def _check_values(config: Config) -> None:
    """No leaf that has a default may be empty, no text "" or hold a NUL, no number infinite, NaN or beyond 32 bits."""
    required = flatten(to_plain(base_config(*config.outside)))
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
        default = shared_sections().data
        for key in ("path", "validation_path", "test_path", "validation_fraction", "test_fraction"):
            if config.data[key] != default[key]:
                raise InputError(
                    f'config.data.{key}: {config.data[key]}; data.source="vader" has fixed splits and reads no file of'
                    f" yours: leave it at {default[key]}, or set data.source to jsonl or text"
                )


def _check_stages(config: Config, stages: Mapping[str, Any]) -> None:
    """Known stages, each once, and each after the stages whose results it takes."""
    for stage in config.stages:
        if stage not in stages:
            near = difflib.get_close_matches(str(stage), stages, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"config.stages: unknown stage {stage!r}; {hint}allowed: {', '.join(stages)}")
    if not config.stages or len(set(config.stages)) != len(config.stages):
        raise InputError(f"config.stages: {config.stages}; name one or more stages, each once")
    vocabularies = [name for name, stage in stages.items() if stage.makes == "tokenizer"]
    given, _ = vocabulary(config, stages)
    for place, stage in enumerate(config.stages):
        before = config.stages[:place]
        if not given and not {stage, *before} & {*vocabularies}:
            raise InputError(
                f'config.stages: "{stage}" needs a vocabulary; put "{vocabularies[0]}" before it, set'
                " config.tokenizer.path, or start from a model folder"
            )
        for key, name in stages[stage].models(config, stages).items():
            if name not in stages:
                continue
            if stages[name].makes in ("", "tokenizer"):
                raise InputError(f'config.{key}: stage "{name}" makes no model; name another, or a model folder')
            wanted, made = stages[stage].wanted(config, key), stages[name].makes
            if wanted and made != wanted:
                raise InputError(
                    f'config.{key}: stage "{name}" makes a {made}, and this is for a {wanted}; name another, or a model'
                    " folder"
                )
            if name not in before and not (name not in config.stages and stages[name].stand_in(config)):
                raise InputError(
                    f'config.{key}: stage "{name}" does not come before "{stage}" in config.stages; put it there,'
                    " or name a model folder"
                )


def vocabulary(config: Config, stages: Mapping[str, Any]) -> tuple[str, str]:
    """(config key, file or folder) of the vocabulary that a run is given; ("", ""): it learns one.

    That is `tokenizer.path`, else that of the model that the run starts from: `model.init_from`, or where no stage of
    the run makes a vocabulary the folder that its first stage starts from.
    """
    for key in ("tokenizer.path", "model.init_from"):
        if leaf(config, key):
            return key, leaf(config, key)
    if any(stages[stage].makes == "tokenizer" for stage in config.stages):
        return "", ""
    key, name = stages[config.stages[0]].start(config, stages)
    return (key, name) if name and name not in stages else ("", "")


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


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    at_least(config, 0, "model.lora.rank")
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


def check_group(row) -> None:
    """A row of `optim.groups`. Raises InputError."""
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


def check_buckets(config: Config, key: str, low: int) -> None:
    """Lengths in tokens, each at least `low`. Raises InputError."""
    lengths = leaf(config, key)
    if not lengths or not all(type(length) is int and length >= low for length in lengths):
        raise InputError(f"config.{key}: {lengths}; give lengths in tokens, such as (32, 64), each at least {low}")
