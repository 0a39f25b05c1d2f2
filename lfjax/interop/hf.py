"""Models in the Hugging Face layout: a folder with config.json, model.safetensors and tokenizer files, in and out.

Which tensor is which parameter is said by the tables of `lfjax.interop.families`; importing and exporting gives the
same tensors bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.interop.families import Family, family_of, read_config, same_function, task_of, write_config
from lfjax.interop.tensors import SINGLE, Tensor, TensorFolder, lossless_dtype, read_json, write_safetensors
from lfjax.models.network import Network
from lfjax.models.transformer import CHOICES, TransformerConfig
from lfjax.sharding import DEFAULT_RULES, place, shardings_for

CONFIG = "config.json"
WRITTEN = {CONFIG, SINGLE, *tokenizers.NAMES}  # all that `save` may find in a folder that it replaces
TASKS = ("lm", "sequence", "token")


class Loaded(NamedTuple):
    """A model ready to use: `model.apply({"params": params}, tokens)`.

    `params` are float32; `config` is config.json as a dict, with the keys that lfjax does not use; `tokenizer` is None
    where the folder has no tokenizer.
    """

    model: Network
    params: Any
    config: dict[str, Any]
    tokenizer: Any = None


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    task: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules=None,
    vocab_multiple: int | None = None,
) -> Loaded:
    """Reads a model folder. Only safetensors are read, one file or several with an index; never pickle.

    Args:
      path: the folder.
      dtype: of the computation; parameters are float32.
      task: "lm", "sequence" (a head on the last real token) or "token" (a head with a bias on every position); None
        takes it from `architectures`.
      mesh, rules: where each parameter lives (`lfjax.sharding`); rules None are the default ones.
      vocab_multiple: the embedding gets zero rows up to a multiple of it; None is 1 without a mesh, and
        lcm(128, tensor axis) on a mesh that splits the vocabulary.

    Raises:
      InputError: naming the file and the key or tensor that is missing, superfluous, of a wrong shape, not finite, or
        of a kind that is not computed here.
    """
    folder = pathlib.Path(path)
    for name, value, allowed in (("dtype", dtype, CHOICES["dtype"]), ("task", task, (None, *TASKS))):
        if value not in allowed:
            raise InputError(f"{folder}: {name}={value!r}; allowed are {', '.join(map(str, allowed))}")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a model is a folder with {CONFIG} and {SINGLE}")
    config = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    if vocab_multiple is None:
        split = 1 if mesh is None else mesh.shape.get("tensor", 1)
        vocab_multiple = math.lcm(128, split) if split > 1 else 1
    shape = dataclasses.replace(read_config(config, where, task), dtype=dtype, vocab_multiple=vocab_multiple)
    tokenizer = _load_tokenizer(folder, shape.vocab_size)
    params = _import_params(TensorFolder(folder), family_of(config, where), shape, mesh, rules)
    return Loaded(shape.build(), params, config, tokenizer)


def check_language_model(loaded: Loaded, name: object) -> None:
    """Raises InputError, with this name of the model, where it gives scores."""
    if loaded.model.config.num_labels:
        raise InputError(f"{name} is a model of scores, not a language model; name another")


def loaded_from(model: Network, params, tokenizer=None, *, config: dict[str, Any] | None = None) -> Loaded:
    """A model trained here, with the config.json that describes it; `save` writes it.

    Args:
      model, params: a transformer in a form that one of the families has.
      tokenizer: gives the ids of BOS, EOS and padding.
      config: further keys to keep, such as those of the model it was trained from; what describes the model wins.

    Raises:
      InputError: no family has this form (the message says which switch), or the tokenizer has more pieces than the
        model has rows.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"tokenizer: found {tokenizer.vocab_size} pieces; the model's vocab_size is {model.config.vocab_size}"
        )
    kept = {key: value for key, value in (config or {}).items() if key not in ("id2label", "label2id", "num_labels")}
    ids = {name: getattr(tokenizer, name.replace("token_", "")) for name in _SPECIAL_IDS} if tokenizer else {}
    absent = {name: None for name in _SPECIAL_IDS if name not in kept}
    dtypes = {"dtype": "float32", "torch_dtype": "float32"}  # the second name is read by transformers 4
    written = write_config(model.config, kept.get("model_type"))
    return Loaded(model, params, kept | absent | written | ids | dtypes, tokenizer)


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(path: str | os.PathLike[str], loaded: Loaded) -> None:
    """Writes a model folder: first whole beside `path`, then renamed, so that no half-written model is ever seen.

    Tensors are written in the config's dtype where that holds every value exactly, else in float32. A folder that is
    already there is replaced if it holds only such a model. What a killed save left beside `path` (`.NAME.new-PID`,
    `.NAME.old-PID`) is removed, an older model only once this one is in its place. With several processes all call it
    (parameters may be spread over them) and process 0 writes; whoever reads the folder next synchronises first.

    Raises:
      InputError: `path` holds other files, or `loaded.config` describes another model than `loaded.model`.
    """
    target = pathlib.Path(path).resolve()
    found = read_config(loaded.config, CONFIG, task_of(loaded.model.config))
    if not same_function(found, loaded.model.config):
        raise InputError(f"{target}: the model is not the one its config describes; make it with loaded_from(...)")
    tensors = _export_tensors(loaded)
    if jax.process_index() != 0:
        return
    _check_replaceable(target)
    dtype = lossless_dtype(tensors, str(loaded.config.get("dtype") or loaded.config.get("torch_dtype")))
    config = loaded.config | {key: dtype for key in ("dtype", "torch_dtype") if key in loaded.config}
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target, "new")
    fresh = target.parent / f".{target.name}.new-{os.getpid()}"
    fresh.mkdir()
    try:
        write_safetensors(fresh / SINGLE, tensors, dtype)
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_replaceable(target: pathlib.Path) -> None:
    """Refuses to replace anything but an empty folder or a model folder that `save` could have written."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; give the folder that the model is to become")
    held = {entry.name for entry in target.iterdir()}
    if held and (CONFIG not in held or held - WRITTEN):
        other = ", ".join(sorted(held - WRITTEN)[:3]) or f"no {CONFIG}"
        raise InputError(f"{target}: holds other files ({other}); give a new folder, or remove this one first")


def _swap(fresh: pathlib.Path, target: pathlib.Path) -> None:
    """Puts the folder `fresh` in the place of `target`; on the same file system, by renaming alone."""
    if target.exists():
        _remove_leftovers(target, "old")
        target.rename(target.parent / f".{target.name}.old-{os.getpid()}")
    fresh.rename(target)
    _remove_leftovers(target, "old")


def _remove_leftovers(target: pathlib.Path, kind: str) -> None:
    """Removes the folders of `kind` ("new" or "old") that saves of `target` have left, of this process or a killed one.

    One process at a time saves a model: whatever is there belongs to nobody.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+")
    for entry in target.parent.iterdir():
        if name.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _load_tokenizer(folder: pathlib.Path, vocab_size: int):
    tokenizer = tokenizers.find(folder)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; 'vocab_size' in {CONFIG} is {vocab_size}"
        )
    return tokenizer


def _flat_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters: path -> shape."""
    flat: dict[str, tuple[int, ...]] = {}

    def visit(prefix: str, node: dict) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}/", value)
            else:
                flat[prefix + name] = value[0]

    visit("", config.parameters())
    return flat


def _unflatten(flat: dict[str, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def _active(family: Family, config: TransformerConfig) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """The lines of the family's table whose parameters this model has, each with the sizes of its axes."""
    shapes = _flat_shapes(config)
    for tensor in (*family.tensors, *family.heads[task_of(config)][1]):
        if all(path in shapes for path in tensor.ours):
            shape = shapes[tensor.ours[0]]
            yield tensor, tensor.sizes(shape[1:] if tensor.stacked else shape, config.vocab_size)


def _import_params(folder: TensorFolder, family: Family, config: TransformerConfig, mesh, rules) -> dict:
    """Their tensors -> our parameter tree, one parameter at a time; every tensor of the folder must be used."""
    shapes = _flat_shapes(config)
    unused = folder.names()
    sharding = {}
    if mesh is not None:
        abstract = _unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
        tree = shardings_for(abstract, mesh, DEFAULT_RULES if rules is None else rules)
        sharding = {path: _at(tree, path) for path in shapes}
    flat = {}
    for tensor, sizes in _active(family, config):
        last = _stored_name(tensor.name.format(i=config.layers - 1), family, folder)
        folder.check(last, tensor.their_shape(sizes))  # before memory is taken for what config.json says
        arrays = [np.zeros(shapes[path], np.float32) for path in tensor.ours]
        for i in range(config.layers) if tensor.stacked else (None,):
            name = _stored_name(tensor.name.format(i=i), family, folder)
            pieces = tensor.to_ours(folder.read(name, tensor.their_shape(sizes)), sizes)
            unused.discard(name)
            for array, piece in zip(arrays, pieces, strict=True):
                rows = array if i is None else array[i]
                rows[tuple(slice(size) for size in piece.shape)] = piece  # rows beyond are padding
        for path, array in zip(tensor.ours, arrays, strict=True):
            flat[path] = place(array, sharding[path]) if mesh is not None else jnp.array(array)
    _check_unused(unused, folder, family, config)
    assert flat.keys() == shapes.keys(), f"{family.model_type}: the table misses {shapes.keys() - flat.keys()}"
    return _unflatten(flat)


def _stored_name(name: str, family: Family, folder: TensorFolder) -> str:
    """The name in the file: files of the bare trunk (GPT-2's own, for one) leave the family's prefix out."""
    for candidate in (name, name.removeprefix(family.base)):
        if candidate in folder.names():
            return candidate
    raise InputError(f"{folder.file}: tensor {name!r} is missing, which config.json asks for")


def _check_unused(unused: set[str], folder: TensorFolder, family: Family, config: TransformerConfig) -> None:
    """Refuses tensors that no parameter took, but for buffers and a second copy of a tied embedding."""
    left = {name for name in unused if not name.endswith(family.ignored)}
    head = family.heads["lm"][1][0].name
    if head in left and config.num_labels == 0 and config.tied:
        embedding = _stored_name(family.tensors[0].name, family, folder)
        shape = (config.vocab_size, config.width)
        if not np.array_equal(folder.read(head, shape), folder.read(embedding, shape)):
            raise InputError(
                f"{folder.file}: tensor {head!r} differs from {embedding!r}; set 'tie_word_embeddings' to false"
            )
        left.discard(head)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(f"{folder.file}: tensor {min(left)!r}{more} has no place in the model of config.json")


def _export_tensors(loaded: Loaded) -> dict[str, np.ndarray]:
    """Our parameters -> their tensors, float32; the inverse of `_import_params`."""
    config, tensors = loaded.model.config, {}
    shapes = _flat_shapes(config)
    for tensor, sizes in _active(family_of(loaded.config, CONFIG), config):
        arrays = [_host(_at(loaded.params, path)) for path in tensor.ours]
        for path, array in zip(tensor.ours, arrays, strict=True):
            if array.shape != shapes[path]:
                raise InputError(f"parameter {path!r}: found shape {array.shape}; the model has {shapes[path]}")
        for i in range(config.layers) if tensor.stacked else (None,):
            rows = arrays if i is None else [array[i] for array in arrays]
            tensors[tensor.name.format(i=i)] = tensor.to_theirs(rows, sizes)
    return tensors


def _at(tree, path: str):
    for key in path.split("/"):
        if key not in tree:
            raise InputError(f"parameter {path!r}: missing")
        tree = tree[key]
    return tree


def _host(x) -> np.ndarray:
    """The whole array in this process's memory, float32."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.float32)
