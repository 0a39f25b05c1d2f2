"""PEFT's adapters, read onto the models that they were trained on: of LoRA the one merged model, W + scale B A.

An adapter folder has adapter_config.json and adapter_model.safetensors. Its base is the model beside it in the same
folder, or the folder that `base_model_name_or_path` says; that one may be an adapter of another base in its turn.

Source: Hu et al. 2021, arXiv:2106.09685; the format is that of the library `peft`.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lfjax.bounded import Breach, Child
from lfjax.config import InputError
from lfjax.interop import peft
from lfjax.interop.families import Family, Form, active, family_of, input_output_axes, read_config, stored_name
from lfjax.interop.tensors import INDEX, SINGLE, Tensor, TensorFolder, Tensors, read_json
from lfjax.models.transformer import TransformerConfig

CONFIG = "config.json"
PICKLED = "adapter_model.bin"
TASKS = {name: task for task, name in peft.TASKS.items()} | {"FEATURE_EXTRACTION": None, None: None}
# Starts of A and B from the base's own matrices, which are changed along: the file alone does not say the model.
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
SECONDS = 2.0  # of processor time, for the regexes of one key
_CHILD = Child()
# Keys of adapter_config.json that do not change what is computed, or that name where the base is.
NEUTRAL = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
    *("velora_config", "auto_map", "trust_remote_code"),  # a cheaper backward pass; code, which is not run here
}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(type(x) is str for x in value))


def _layers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(x) is int for x in value))


def _pattern(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(right(x) for x in value.values()))


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is x or (value == x and type(value) is type(x)) for x in values)


# key -> (what stands for its absence, whether a value is right, what is allowed)
COMPUTED: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, _one_of("LORA"), '"LORA"'),
    "task_type": (None, _one_of(*TASKS), ", ".join(map(str, TASKS))),
    "r": (8, _rank, "a positive integer"),
    "lora_alpha": (8, _number, "a number"),
    "use_rslora": (False, _one_of(True, False), "true or false"),
    "rank_pattern": ({}, _pattern(_rank), "an object from names of modules to positive integers"),
    "alpha_pattern": ({}, _pattern(_number), "an object from names of modules to numbers"),
    "target_modules": (None, _names, "a regex or names of modules"),
    "exclude_modules": (None, _names, "a regex or names of modules"),
    "modules_to_save": (None, _names, "names of modules"),
    "layers_to_transform": (None, _layers, "one or several numbers of layers"),
    "layers_pattern": (None, _names, "names of the list of layers"),
    "bias": ("none", _one_of("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "init_lora_weights": (True, _one_of(*STARTS), ", ".join(map(str, STARTS))),
    "ensure_weight_tying": (False, _one_of(True, False), "true or false"),
}


class Adapter:
    """An adapter folder, opened: its config is one that is computed here, of its tensors only headers are read."""

    def __init__(self, folder: pathlib.Path):
        """Raises InputError naming the file and the key or tensor that is wrong or not computed here."""
        self.folder, self.where = folder, folder / peft.CONFIG
        if not os.path.lexists(self.where):
            fix = "fetch that too, or take the adapter's tensors away"
            raise InputError(f"{folder}: holds tensors of an adapter and no {peft.CONFIG}; {fix}")
        self.config = _checked(read_json(self.where), self.where)
        self.tensors = TensorFolder(folder, peft.TENSORS, f"{peft.CONFIG} and the base ask")
        self.pairs: dict[str, dict[str, str]] = {}  # module -> "lora_A" and "lora_B", or an embedding's -> tensor
        self.saved: dict[str, str] = {}  # the base's tensor -> the one in its place
        self.unties = False  # whether the base's one matrix for tokens in and out becomes two; `describe` finds out
        for key in sorted(self.tensors.names()):
            name = key.removeprefix(peft.PREFIX)
            found = re.fullmatch(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight)?", name)
            if name == key or (found is None and "lora_" in name):
                raise self.no_place(key)
            if found:
                self.pairs.setdefault(found[1], {})[found[2]] = key
            else:
                self.saved[name.replace(".base_layer.", ".")] = key

    def no_place(self, key: str, name: str = "", family: Family | None = None) -> InputError:
        """What is said of a tensor that is not used; its name in the family's table may be a head's."""
        said = f"{self.tensors.file}: tensor {key!r} has no place in the model of its base"
        heads = family.heads.items() if family is not None and self.task is None else ()
        for task, (_, tensors) in heads:
            if name in [tensor.name for tensor in tensors]:
                return InputError(f"{said}, but in one with a head: say --task={task} (in Python, task={task!r})")
        return InputError(said)

    @property
    def task(self) -> str | None:
        """The head that it was trained with; None: that of its base."""
        return TASKS[self.config["task_type"]]

    def base(self) -> pathlib.Path:
        """The folder of its base: its own, or the one that the config names, from the current folder or its own."""
        if any((self.folder / name).is_file() for name in (SINGLE, INDEX)):
            return self.folder
        name = self.config.get("base_model_name_or_path")
        if isinstance(name, str) and name and "\0" not in name:
            for place in (pathlib.Path(name), self.folder / name):
                if any((place / file).is_file() for file in (CONFIG, peft.CONFIG)):
                    return place
        fix = f"give that model's folder: lfjax import {self.folder} NEW_FOLDER --base=FOLDER (in Python, base=)"
        raise InputError(
            f"{self.where}: field 'base_model_name_or_path': found {name!r}; no such model folder here; {fix}"
        )

    def describe(self, config: dict[str, Any], family: Family, where: str, head: str | None = None) -> dict[str, Any]:
        """config.json of the base -> of the merged model: its head, and as many labels and tokens as it has rows.

        Args:
          head: the task of an adapter that names none.
        """
        task = self.task or head
        rows = {canonical(name, family): self.tensors.shape(key)[0] for name, key in self.saved.items()}
        if task in family.heads:
            architecture, tensors = family.heads[task]
            config = config | {"architectures": [architecture]}
            labels = config.get("id2label")
            known = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
            found = [rows[tensor.name] for tensor in tensors if tensor.paths == "head/kernel" and tensor.name in rows]
            if found and found[0] != known:
                config = {key: value for key, value in config.items() if key != "num_labels"}
                config["id2label"] = {str(i): f"LABEL_{i}" for i in range(found[0])}
                config["label2id"] = {f"LABEL_{i}": i for i in range(found[0])}
        embedding, head = _tied_names(family)
        if embedding in rows:
            config = config | {"vocab_size": rows[embedding]}
        form = read_config(config, where, task)
        if _is_tied(form):
            changed = {canonical(f"{module}.weight", family) for module in self.pairs} & {embedding, head}
            if changed:
                raise InputError(
                    f"{self.where}: field 'target_modules': {min(changed)!r} is tied, one matrix for tokens in and out,"
                    " which PEFT itself merges to another function than it trains; merge it where it was trained"
                )
            if rows.keys() & {embedding, head} and not self.config["ensure_weight_tying"]:
                self.unties = True
                config = config | {next(field.theirs for field in family.fields if field.ours == "tied"): False}
        return config

    def targets(self, modules: Sequence[str]) -> set[str]:
        """Those of the modules that the config says to adapt, as PEFT reads it ("all-linear" but for the head)."""
        excluded, saved = self._named("exclude_modules", modules), self.config["modules_to_save"] or ()
        saved = [saved] if isinstance(saved, str) else saved
        kept = self._first([rf"(^|.*\.){part}($|\..*)" for part in saved], modules, "modules_to_save")
        rest = [name for name, match in zip(modules, kept, strict=True) if match is None and name not in excluded]
        given, layers = self.config["target_modules"], self.config["layers_to_transform"]
        if given is None or (isinstance(given, str) and given.lower() == "all-linear"):
            return set(rest)
        found = self._named("target_modules", rest)
        if isinstance(given, str) or layers in (None, []):
            return found
        within = [name for name in rest if name in found and name not in set(given)]
        lists = self.config["layers_pattern"] or ()
        lists = [rf"(?:^|.*?\.){part}" for part in ([lists] if isinstance(lists, str) else lists)] or [r".*?\.[^.]*"]
        numbers = self._first([rf"{part}\.(?P<idx>\d{{1,9}})\." for part in lists], within, "layers_pattern")
        wanted = set(layers if isinstance(layers, list) else [layers])
        of_layers = zip(within, numbers, strict=True)
        return found - {name for name, match in of_layers if not (match and match[1] and int(match[1]) in wanted)}

    def low_ranks(self, modules: Sequence[str], most: int) -> list[tuple[int, float]]:
        """(rank, what B A is multiplied by) of each module; `most`: of patterns."""

        def of(key: str, default: str) -> list:
            pattern = self.config[key] or {}
            if len(pattern) > most:
                raise InputError(f"{self.where}: field {key!r}: found {len(pattern)} names; allowed: at most {most}")
            matches = self._first([rf"(.*\.)?({name})$" for name in pattern], modules, key)
            values = list(pattern.values())
            return [self.config[default] if match is None else values[match[0]] for match in matches]

        ranks, alphas = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        by_root = self.config["use_rslora"]
        return [
            (rank, alpha / (math.sqrt(rank) if by_root else rank)) for rank, alpha in zip(ranks, alphas, strict=True)
        ]

    def _named(self, key: str, modules: Sequence[str]) -> set[str]:
        """Those of the modules that a key gives: by a regex of their whole name, or by names that they end in."""
        given = self.config[key]
        if isinstance(given, str):
            matches = self._first([rf"(?:{given})\Z"] if given else [], modules, key)
            return {name for name, match in zip(modules, matches, strict=True) if match is not None}
        parts = set(given or ())
        return {name for name in modules if not parts.isdisjoint(_ends(name))}

    def _first(self, patterns: Sequence[str], names: Sequence[str], key: str) -> list[tuple[int, str | None] | None]:
        """For each name the first of the patterns that matches it, and what its group "idx" is."""
        if not patterns or not names:
            return [None] * len(names)
        try:
            answer = _CHILD.ask({"patterns": list(patterns), "names": list(names)}, seconds=SECONDS)
        except Breach as breach:
            raise InputError(f"{self.where}: field {key!r}: matching its regexes {breach}; simplify them") from None
        if "wrong" in answer:
            index, message = answer["wrong"]
            raise InputError(
                f"{self.where}: field {key!r}: {patterns[index][:60]!r} is no regex ({message}); correct it"
            )
        return answer["found"]


def _ends(name: str) -> Iterator[str]:
    """The name, and what stands behind each of its dots."""
    yield name
    yield from (name[i + 1 :] for i, character in enumerate(name) if character == ".")


def _checked(config: dict[str, Any], where: pathlib.Path) -> dict[str, Any]:
    """The config with its defaults; raises InputError naming the key that is wrong or not computed here."""
    found = dict(config)
    for key, (default, right, allowed) in COMPUTED.items():
        found[key] = config.get(key, default)
        if not right(found[key]):
            raise InputError(
                f"{where}: field {key!r}: found {str(found[key])[:60]!r}; computed here: {allowed}; merge other kinds"
                " with PEFT where they were trained"
            )
    for key, value in config.items():
        neutral = value in (None, False, "none") or value == [] or value == {}
        if key not in COMPUTED and key not in NEUTRAL and not neutral:
            fix = "merge it with PEFT where it was trained, and give that model"
            raise InputError(f"{where}: field {key!r}: found {str(value)[:60]!r}; not computed here: {fix}")
    return found


def canonical(name: str, family: Family) -> str:
    """A tensor's name as the family's table has it: adapters of the bare trunk leave the prefix out."""
    lines = {tensor.name for tensor in (*family.tensors, *(x for _, head in family.heads.values() for x in head))}
    whole = family.base + name
    return whole if _line(name) not in lines and _line(whole) in lines else name


def _line(name: str) -> str:
    """The table's line of a tensor: the first number is the layer."""
    return re.sub(r"\.\d+\.", ".{i}.", name, count=1)


def _tied_names(family: Family) -> tuple[str, str]:
    """The embedding of tokens, and the head that may be the same matrix ("" of an encoder)."""
    return family.tensors[0].name, family.heads["lm"][1][0].name if "lm" in family.heads else ""


def _is_tied(form: Form) -> bool:
    return isinstance(form, TransformerConfig) and form.num_labels == 0 and form.tied


class _LowRank(NamedTuple):
    """Tensors A [r D_in] and B [D_out r] of an adapter; `swapped`: of a matrix that is stored [D_in D_out]."""

    a: str
    b: str
    rank: int
    scale: float
    swapped: bool

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B, where the matrix has this shape."""
        d_out, d_in = reversed(shape) if self.swapped else shape
        return (self.rank, d_in), (d_out, self.rank)


class Merged(Tensors):
    """The tensors of a base with an adapter in them; no more than one whole matrix of change is held in memory."""

    def __init__(self, base: Tensors, adapter: Adapter, family: Family, form: Form):
        """Checks names and shapes, reads no values.

        Args:
          form: of the merged model.

        Raises:
          InputError: the adapter does not fit the base, or its tensors are not those that its config names.
        """
        self._base, self._adapter, self.file = base, adapter, base.file
        self._low_rank: dict[str, _LowRank] = {}
        self._saved: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] | None = None
        self._lines = {tensor.name: (tensor, sizes) for tensor, sizes in active(family, form)}
        embedding, head = _tied_names(family)
        embedding = stored_name(embedding, family, base.names()) or embedding
        names = base.names()
        if head and isinstance(form, TransformerConfig) and form.num_labels:
            names.discard(head)  # of a language model that became a model of scores
        self._same = {head: embedding} if adapter.unties else {}  # what the base has as one begins equal
        for name, key in adapter.saved.items():
            name = canonical(name, family)
            found = stored_name(name, family, names) or name
            copy = name == head and _is_tied(form)  # which has to be equal
            if _line(name) not in self._lines and not copy:
                raise adapter.no_place(key, name, family)
            self._saved[found] = key
        found, held = {}, names | self._saved.keys() | self._same.keys()
        for module, pair in adapter.pairs.items():
            name = canonical(f"{module}.weight", family)
            found[module] = stored_name(name, family, held)
            if found[module] is None or _line(name) not in self._lines:
                raise adapter.no_place(min(pair.values()))
        for (module, pair), low_rank in zip(
            adapter.pairs.items(), adapter.low_ranks(list(found), max(len(names), 1000)), strict=True
        ):
            self._add(canonical(f"{module}.weight", family), module, pair, found[module], low_rank)
        self._check_targets(found, names, family)
        self.changed = base.changed | self._saved.keys() | self._low_rank.keys()
        self._names = frozenset(names | self._saved.keys() | self._same.keys())

    def _shape_of(self, name: str) -> tuple[Tensor, tuple[int, ...]]:
        tensor, sizes = self._lines[_line(name)]
        return tensor, tensor.their_shape(sizes)

    def _add(self, name: str, module: str, pair: dict[str, str], stored: str, low_rank: tuple[int, float]) -> None:
        key = min(pair.values())
        tensor, shape = self._shape_of(name)
        embeds = "embedding_" if tensor.ours[0].startswith("embed/") else ""
        kinds = (f"lora_{embeds}A", f"lora_{embeds}B")
        if len(shape) != 2:
            raise self._adapter.no_place(key)
        if set(pair) != set(kinds):
            missing = f"{peft.PREFIX}{module}.{next((kind for kind in kinds if kind not in pair), kinds[0])}"
            raise InputError(f"{self._adapter.tensors.file}: tensor {missing!r} is missing, which {key!r} goes with")
        swapped = input_output_axes(tensor)[2]
        change = _LowRank(pair[kinds[0]], pair[kinds[1]], *low_rank, swapped)
        for part, part_shape in zip(change[:2], change.shapes(shape), strict=True):
            self._adapter.tensors.check(part, part_shape)
        self._low_rank[stored] = change

    def _check_targets(self, found: dict[str, str | None], names: set[str], family: Family) -> None:
        """The modules with tensors are those that the config names: PEFT would leave others out without a word."""
        adapter = self._adapter
        if adapter.config["target_modules"] is None:
            return
        bare = not any(module.startswith(family.base) for module in found)
        linear = str(adapter.config["target_modules"]).lower() == "all-linear"
        modules = {}
        for stored in names:
            name = canonical(stored, family)
            tensor, sizes = self._lines.get(_line(name), (None, {}))
            if tensor is None or not name.endswith(".weight") or len(tensor.their_shape(sizes)) != 2:
                continue
            if linear and tensor.ours[0].split("/")[0] in ("embed", "unembed", "head"):
                continue
            module = name.removesuffix(".weight")
            modules[module.removeprefix(family.base) if bare else module] = stored
        targets = adapter.targets(list(modules))
        for module in sorted(found.keys() - targets):
            key = min(adapter.pairs[module].values())
            raise InputError(
                f"{adapter.tensors.file}: tensor {key!r}: 'target_modules' in {peft.CONFIG} does not name its module;"
                " correct that key, or take the tensor out"
            )
        for module in sorted(targets - found.keys()):
            raise InputError(
                f"{adapter.tensors.file}: no tensors of {module!r}, which 'target_modules' in {peft.CONFIG} names;"
                " fetch or save the adapter again"
            )

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._names)

    def _source(self, name: str) -> tuple[Tensors, str]:
        """Where the values are, before what is added to them."""
        if name in self._saved:
            return self._adapter.tensors, self._saved[name]
        return self._base, self._same.get(name, name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError if the tensor has another shape; reads nothing."""
        source, key = self._source(name)
        source.check(key, shape)

    def dtypes(self) -> set[str]:
        """The types that the tensors of the base are stored in."""
        return self._base.dtypes()

    def read(
        self, name: str, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """As `Tensors.read`, of W + scale B A in float32."""
        source, key = self._source(name)
        x = source.read(key, shape, part)
        if name not in self._low_rank:
            return x
        change = self._change(name, shape)
        return x + (change if part is None else part(change))

    def _change(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """scale B A, as the matrix is stored; that of the last name is kept, for its other slices."""
        if self._last is None or self._last[0] != name:
            change, tensors = self._low_rank[name], self._adapter.tensors
            a, b = (tensors.read(key, size) for key, size in zip(change[:2], change.shapes(shape), strict=True))
            with np.errstate(over="ignore", invalid="ignore"):
                product = np.float32(change.scale) * (b @ a)
            if not np.isfinite(product).all():
                raise InputError(f"{tensors.file}: tensors {change.a!r} and lora_B: their product is beyond float32")
            self._last = name, product.T if change.swapped else product
        return self._last[1]


class Place(NamedTuple):
    """Where a model is: the folder of config.json and tensors, and the adapters to merge into it, one after another."""

    folder: pathlib.Path
    adapters: tuple[Adapter, ...] = ()

    @property
    def folders(self) -> list[pathlib.Path]:
        """All that is read, the base first."""
        return list(dict.fromkeys((self.folder, *(adapter.folder for adapter in self.adapters))))

    def describe(self, head: str | None = None) -> tuple[dict[str, Any], str | None]:
        """(config.json of the model, the head that the last adapter has or None).

        Args:
          head: that of the last adapter, where it names none.
        """
        file = self.folder / CONFIG
        config, task = read_json(file), None
        for adapter in self.adapters:
            own = head if adapter is self.adapters[-1] else None
            config = adapter.describe(config, family_of(config, str(file)), str(file), own)
            task = adapter.task or task
        return config, task

    def open(self, family: Family, form: Form) -> Tensors:
        """The tensors of the model, which has this form."""
        tensors: Tensors = TensorFolder(self.folder)
        for adapter in self.adapters:
            tensors = Merged(tensors, adapter, family, form)
        return tensors


def locate(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Place:
    """Finds out whether a folder holds a model or an adapter, and of what.

    Args:
      base: the folder of an adapter's base; None: as the module says.

    Raises:
      InputError: a base is not there or goes round in a circle, or an adapter is not of a kind that is computed here.
    """
    folder, adapters = pathlib.Path(path), []
    if not os.path.lexists(folder / CONFIG) and not is_adapter(folder):
        named = [place for place in sorted(folder.glob(f"*/{peft.CONFIG}"))[:3] if place.is_file()]
        if named:
            shown = ", ".join(str(place.parent) for place in named)
            raise InputError(f"{folder}: holds no model, but adapters in folders of their own; give one: {shown}")
    while is_adapter(folder):
        if any(os.path.samefile(folder, adapter.folder) for adapter in adapters):
            raise InputError(f"{folder / peft.CONFIG}: field 'base_model_name_or_path': goes round in a circle")
        adapters.append(Adapter(folder))
        following = adapters[-1].base() if base is None else pathlib.Path(base)
        if following == folder:
            break
        folder, base = following, None
    if base is not None and not adapters:
        raise InputError(f"{folder}: no adapter (no {peft.CONFIG} in it), but base={base} is given; leave that out")
    if adapters and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the model that {adapters[-1].folder} is an adapter of")
    return Place(folder, tuple(reversed(adapters)))


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter, with a model beside it or alone."""
    return any(os.path.lexists(folder / name) for name in (peft.CONFIG, peft.TENSORS, PICKLED))
