"""Models in the Hugging Face layout: a folder with config.json, model.safetensors and tokenizer files, in and out.

Which tensor is which parameter is said by the tables of `lfjax.interop.families`; importing and exporting gives the
same tensors bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.files import MOST_BYTES, write_json, write_tensors
from lfjax.interop import merge, peft
from lfjax.interop.families import (
    Family,
    Form,
    active,
    as_stored,
    family_of,
    flat_shapes,
    is_encoder,
    read_config,
    same_function,
    stored_name,
    task_of,
    write_config,
)
from lfjax.interop.tensors import (
    INDEX,
    NAMES,
    SHARD,
    SINGLE,
    Tensor,
    TensorFolder,
    Tensors,
    lossless_dtype,
    read_json,
    write_safetensors,
)
from lfjax.models.network import Network
from lfjax.models.transformer import CHOICES, TransformerConfig
from lfjax.sharding import DEFAULT_RULES, shardings_for
from lfjax.terminal import note

CONFIG, ADAPTER, ADAPTER_CONFIG = "config.json", "adapter", peft.CONFIG
GENERATION = "generation_config.json"
# all that `save` may find in a folder that it replaces, beside the files that an index names, and in the folders there
WRITTEN = {CONFIG, SINGLE, INDEX, GENERATION, *tokenizers.NAMES}
WRITTEN_ADAPTER = {peft.CONFIG, peft.TENSORS, GENERATION, *tokenizers.NAMES}
TASKS = ("lm", "sequence", "token")
TOKENIZER, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
# Keys by which transformers finds code of the model's own, and those that may name kernels to fetch.
CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"}
KERNELS = {
    f"{prefix}{kind}_implementation{suffix}"
    for prefix in ("", "_")
    for kind in ("attn", "experts")
    for suffix in ("", "_internal")
}


class Loaded(NamedTuple):
    """A model ready to use: `model.apply({"params": params}, tokens)`, with `method="values"` scores at every position.

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
    base: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    task: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules=None,
    vocab_multiple: int | None = None,
) -> Loaded:
    """Reads a model folder. Only safetensors are read, one file or several with an index; never pickle.

    Of a LoRA adapter in PEFT's format, alone or beside its base, the merged model is read (`lfjax.interop.merge`).

    Args:
      path: the folder.
      base: the folder of an adapter's base; None: the model beside it, or the folder that its config names.
      dtype: of the computation; parameters are float32.
      task: "lm", "sequence" (a head on the last real token) or "token" (a head with a bias on every position); None
        takes it from `architectures`. Of an encoder without labels the trunk is read, whatever head it has.
      mesh, rules: where each parameter lives (`lfjax.sharding`); rules None are the default ones. Each device's slice
        is read straight from the files, for a large model a layer at a time.
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
    place = merge.locate(folder, base)
    shape, config, tokenizer = _read_form(place, task)
    if vocab_multiple is None:
        split = 1 if mesh is None else mesh.shape.get("tensor", 1)
        vocab_multiple = math.lcm(128, split) if split > 1 else 1
    shape = dataclasses.replace(shape, dtype=dtype, vocab_multiple=vocab_multiple)
    family = family_of(config, str(place.folder / CONFIG))
    tensors = place.open(family, shape)
    config, shape = as_stored(config, shape, tensors.names(), family)
    params = _import_params(tensors, family, shape, mesh, rules)
    return Loaded(shape.build(), params, config, tokenizer)


def load_form(path: str | os.PathLike[str], task: str | None = None) -> tuple[Form, dict[str, Any], Any]:
    """(form, config.json, tokenizer or None) of a model folder: what `load` reads but for the tensors, and raises."""
    return _read_form(merge.locate(path), task)


def _read_form(place: merge.Place, task: str | None) -> tuple[Form, dict[str, Any], Any]:
    config, own = place.describe(task)
    form = read_config(config, str(place.folder / CONFIG), task or own)
    return form, config, _load_tokenizer(place, form.vocab_size)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a model folder; of an adapter that of the merged model."""
    return merge.locate(path).describe()[0]


def folders(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The folders that a model is read from: its own, of an adapter its base's before it."""
    return merge.locate(path).folders


def tokenizer_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder that a model's tokenizer is read from: of an adapter its own, or where it has none its base's."""
    *bases, last = merge.locate(path).folders
    return next((folder for folder in (last, *bases[::-1]) if tokenizers.find(folder) is not None), last)


def names_encoder(path: str | os.PathLike[str]) -> bool:
    """Whether the folder's config.json (of an adapter its base's) is there and an encoder's; reads nothing else."""
    file = merge.locate(path).folder / CONFIG
    return file.is_file() and is_encoder(read_json(file))


def check_language_model(loaded: Loaded, name: object) -> None:
    """Raises InputError, with this name of the model, where it gives scores or is an encoder."""
    if is_encoder(loaded.config):
        kind = loaded.config["model_type"]
        raise InputError(f"{name} is an encoder ({kind}), not a language model: it scores texts; name another")
    if loaded.model.config.num_labels:
        raise InputError(f"{name} is a model of scores, not a language model; name another")


def loaded_from(
    model: Network, params, tokenizer=None, *, config: dict[str, Any] | None = None, labels: Sequence[str] = ()
) -> Loaded:
    """A model trained here, with the config.json that describes it; `save` writes it.

    Args:
      model, params: a transformer in a form that one of the families has.
      tokenizer: gives the ids of BOS, EOS and padding.
      config: further keys to keep, such as those of the model it was trained from; what describes the model wins.
      labels: what the scores are called, in their order.

    Raises:
      InputError: no family has this form (the message says which switch), or the tokenizer has more pieces than the
        model has rows.
    """
    if tokenizer is not None and tokenizers.least_rows(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"tokenizer: found {tokenizer.vocab_size} pieces; the model's vocab_size is {model.config.vocab_size}"
        )
    kept = {key: value for key, value in (config or {}).items() if key not in ("id2label", "label2id", "num_labels")}
    ids = {name: getattr(tokenizer, name.replace("token_", "")) for name in _SPECIAL_IDS} if tokenizer else {}
    if tokenizer is not None and tokenizer.pad_id >= model.config.vocab_size:
        ids["pad_token_id"] = None  # transformers refuses one that has no row
    absent = {name: None for name in _SPECIAL_IDS if name not in kept}
    dtypes = {"dtype": "float32", "torch_dtype": "float32"}  # the second name is read by transformers 4
    written = write_config(model.config, kept.get("model_type"))
    if labels:
        written["id2label"] = {str(i): label for i, label in enumerate(labels)}
        written["label2id"] = {label: i for i, label in enumerate(labels)}
    # a family that writes one of the ids needs it: RoBERTa's positions begin after that of padding
    return Loaded(model, params, kept | absent | ids | written | dtypes, tokenizer)


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(
    path: str | os.PathLike[str],
    loaded: Loaded,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    generation: dict[str, Any] | None = None,
    adapter: peft.Adapter | None = None,
) -> None:
    """Writes a model folder: first whole beside `path`, then renamed, so that no half-written model is ever seen.

    A folder that is already there is replaced if it holds only such a model. What a killed save left beside `path`
    (`.NAME.new-PID`, `.NAME.old-PID`) is removed, an older model only once this one is in its place. With several
    processes all call it (parameters may be spread over them) and process 0 writes; whoever reads the folder next
    synchronises first. Settings that make other tools fetch or run code are left out, with a note on stderr.

    Args:
      dtype: of the stored tensors, rounded to it; None is the config's where that holds every value exactly, else
        float32.
      shard_bytes: most bytes of tensors in a file; None writes one file.
      generation: generation_config.json; None is what the tokenizer came with, where it names all that ends a response
        (`tokenizers.stop_ids`), else that and the rest of it, or, for a language model without, what begins, ends and
        pads a text.
      adapter: what the model was merged from; goes into `path`/adapter, with the tokenizer where its files say by
        themselves how they are read.

    Raises:
      InputError: `path` holds other files, `loaded.config` describes another model than `loaded.model`, or a value is
        beyond what `dtype` holds.
    """
    target = pathlib.Path(path).resolve()
    found = read_config(loaded.config, CONFIG, task_of(loaded.model.config))
    if not same_function(found, loaded.model.config):
        raise InputError(f"{target}: the model is not the one its config describes; make it with loaded_from(...)")
    tensors = _export_tensors(loaded)
    if jax.process_index() != 0:
        return
    _check_replaceable(target)
    if dtype is None:
        dtype = lossless_dtype(tensors, str(loaded.config.get("dtype") or loaded.config.get("torch_dtype")))
        config = loaded.config | {key: dtype for key in ("dtype", "torch_dtype") if key in loaded.config}
    else:
        config = loaded.config | {"dtype": dtype, "torch_dtype": dtype}
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target, "new")
    fresh = target.parent / f".{target.name}.new-{os.getpid()}"
    fresh.mkdir()
    try:
        write_safetensors(fresh, tensors, dtype, most_bytes=shard_bytes)
        write_json(fresh / CONFIG, config)
        _save_tokenizer(fresh, loaded)
        if generation is None and loaded.model.config.num_labels == 0:
            generation = _generation(loaded, fresh / GENERATION)
        if generation:
            write_json(fresh / GENERATION, generation)
        _leave_out_code(fresh, target)
        if adapter is not None:
            (fresh / ADAPTER).mkdir()
            write_json(fresh / ADAPTER / peft.CONFIG, adapter.config)
            write_tensors(fresh / ADAPTER / peft.TENSORS, adapter.tensors, {"format": "pt"})
            if _names_its_class(fresh):
                _save_tokenizer(fresh / ADAPTER, loaded)
            if generation:
                write_json(fresh / ADAPTER / GENERATION, generation)
            _leave_out_code(fresh / ADAPTER, target)
        _swap(fresh, target)
    except InputError as error:
        raise InputError(str(error).replace(str(fresh), str(target))) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _save_tokenizer(folder: pathlib.Path, loaded: Loaded) -> None:
    """Writes the tokenizer's files; a pad id of the tokenizer's that config.json gives is named in them."""
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(folder)
        if loaded.config.get("pad_token_id") == loaded.tokenizer.pad_id:
            tokenizers.name_pad(folder, loaded.tokenizer)
        by_place = getattr(loaded.model.config, "position", "learned") == "learned"  # transformers counts padding too
        if by_place and loaded.model.config.num_labels and _pads_left(folder):
            tokenizers.add_keys(folder, {"padding_side": "right"})


def _pads_left(folder: pathlib.Path) -> bool:
    file = folder / TOKENIZER
    return file.exists() and read_json(file, most=MOST_BYTES).get("padding_side") == "left"


def _names_its_class(folder: pathlib.Path) -> bool:
    """Whether other tools read the tokenizer's files without a config.json beside them."""
    file = folder / TOKENIZER
    return (folder / "tokenizer.json").exists() or (
        file.exists() and "tokenizer_class" in read_json(file, most=MOST_BYTES)
    )


_told: set[tuple[str, str]] = set()  # (file, key) of what `_leave_out_code` has told this process's user


def _leave_out_code(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Takes out of a folder's settings what makes transformers fetch or run code; says so, of a key once."""
    found = []
    for name in (CONFIG, GENERATION, TOKENIZER, SPECIALS):
        if (folder / name).is_file():
            value = read_json(folder / name, most=MOST_BYTES)
            kept, keys = _without_code(value)
            if keys:
                write_json(folder / name, kept)
                found += [(name, key) for key in sorted(keys) if (name, key) not in _told]
    if found:
        _told.update(found)
        shown = ", ".join(f"{key} ({name})" for name, key in found)
        note(f"note: {target}: left out what makes other tools fetch or run code: {shown}")


def _without_code(value: Any) -> tuple[Any, set[str]]:
    """A JSON value without such keys, at any depth, and the keys."""
    if isinstance(value, list):
        parts = [_without_code(item) for item in value]
        return [item for item, _ in parts], {key for _, keys in parts for key in keys}
    if not isinstance(value, dict):
        return value, set()
    # a kernel of the hub is named as owner/repository, where transformers' own are single words
    found = {key for key, x in value.items() if key in CODE or (key in KERNELS and "/" in json.dumps(x))}
    parts = {key: _without_code(x) for key, x in value.items() if key not in found}
    return {key: x for key, (x, _) in parts.items()}, found.union(*(keys for _, keys in parts.values()))


def _generation(loaded: Loaded, file: pathlib.Path) -> dict[str, Any]:
    """What begins, ends (a turn of a chat as well) and pads a text, as far as tokenizer or config.json say.

    Of a `file` that came with the tokenizer all is kept, and what else lfjax stops at joins the ids that end a text;
    {} where the file says all of it.
    """
    if file.exists():
        kept = read_json(file)
        found = kept.get("eos_token_id")
        named = found if isinstance(found, list) else [] if found is None else [found]
        ends = list(dict.fromkeys([*named, *tokenizers.stop_ids(loaded.tokenizer, (), "")]))
        if set(ends) == set(named):
            return {}
        kept.pop("_from_model_config", None)  # it no longer is config.json's
        return kept | {"eos_token_id": ends}
    ids = {name: loaded.config.get(name) for name in _SPECIAL_IDS}
    if loaded.tokenizer is not None:
        ends = list(tokenizers.stop_ids(loaded.tokenizer, (), ""))
        ids |= {"bos_token_id": loaded.tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
        if loaded.tokenizer.pad_id < loaded.model.config.vocab_size:
            ids["pad_token_id"] = loaded.tokenizer.pad_id
    return {name: value for name, value in ids.items() if value is not None}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    task: str | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
) -> Loaded:
    """Reads a model folder whole and writes it as `save` does, with its tokenizer and generation_config.json.

    Tensors keep the type they are stored in where all have one and config.json names none.

    Args:
      base, task, dtype, shard_bytes: as in `load` (the first two) and `save`.
    Returns:
      The model.
    Raises:
      InputError: what `load` and `save` refuse, the same folder twice, or no room to write.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if source.resolve() == target.resolve():
        raise InputError(f"{target}: is the folder to read as well; name another to write")
    _check_replaceable(target.resolve())
    loaded = load(source, base=base, task=task)
    place = merge.locate(source, base)
    config = dict(loaded.config)
    stored = TensorFolder(place.folder).dtypes()
    if not (config.get("dtype") or config.get("torch_dtype")) and len(stored) == 1:
        config |= {"dtype": NAMES[min(stored)], "torch_dtype": NAMES[min(stored)]}
    if task is not None:
        config["architectures"] = [family_of(config, CONFIG).heads[task][0]]
    files = [folder / GENERATION for folder in reversed(place.folders)]  # an adapter's own, or its base's
    generation = next((read_json(file) for file in files if file.is_file()), None)
    if place.adapters and loaded.tokenizer is not None and config.get("pad_token_id") is None:
        spare = loaded.tokenizer.pad_id
        config["pad_token_id"] = spare if spare < loaded.model.config.vocab_size else None
    try:
        save(target, loaded._replace(config=config), dtype=dtype, shard_bytes=shard_bytes, generation=generation)
    except SafetensorError as error:
        raise InputError(f"{target}: cannot write the model: {error}; free some space, then try again") from error
    return loaded


def _check_replaceable(target: pathlib.Path) -> None:
    """Refuses to replace anything but an empty folder or a model folder that `save` could have written."""
    if not target.exists():
        stands = next(parent for parent in target.parents if parent.exists())
        if not stands.is_dir():
            raise InputError(f"{target}: {stands} is a file, in which no folder can be made; name another folder")
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; give the folder that the model is to become")
    held = {entry.name for entry in target.iterdir()}
    other = sorted(str(entry.relative_to(target)) for entry in _not_written(target))
    if held and (other or CONFIG not in held):
        shown = ", ".join(other[:3]) or f"no {CONFIG}"
        raise InputError(f"{target}: holds other files ({shown}); give a new folder, or remove this one first")


def _not_written(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """What a folder holds that `save` does not write: other names, and folders in place of files."""
    for entry in target.iterdir():
        if entry.name in (ADAPTER, tokenizers.TEMPLATES) and _is_folder(entry):
            yield from _others(entry, WRITTEN_ADAPTER if entry.name == ADAPTER else ())
        elif not (_is_file(entry) and (entry.name in WRITTEN or SHARD.fullmatch(entry.name))):
            yield entry


def _others(folder: pathlib.Path, names: Container[str]) -> Iterator[pathlib.Path]:
    """Of a folder that holds files of these names, or is one of templates (of an adapter it holds one)."""
    templates = folder.name == tokenizers.TEMPLATES
    for entry in folder.iterdir():
        if entry.name == tokenizers.TEMPLATES and not templates and _is_folder(entry):
            yield from _others(entry, ())
        elif not (_is_file(entry) and (entry.name in names or (templates and entry.suffix == ".jinja"))):
            yield entry


def _is_file(entry: pathlib.Path) -> bool:
    return entry.is_symlink() or entry.is_file()


def _is_folder(entry: pathlib.Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


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


def _load_tokenizer(place: merge.Place, vocab_size: int):
    for folder in place.folders[::-1]:
        tokenizer = tokenizers.find(folder)
        if tokenizer is not None and tokenizers.least_rows(tokenizer) > vocab_size:
            raise InputError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; 'vocab_size' in {CONFIG} is {vocab_size}"
            )
        if tokenizer is not None:
            return tokenizer
    return None


def _unflatten(flat: dict[str, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def _import_params(folder: Tensors, family: Family, config: Form, mesh, rules) -> dict:
    """Their tensors -> our parameter tree; every tensor of the folder must be used, and all are checked first."""
    shapes = flat_shapes(config)
    sharding = {}
    if mesh is not None:
        abstract = _unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
        tree = shardings_for(abstract, mesh, DEFAULT_RULES if rules is None else rules)
        sharding = {path: _at(tree, path) for path in shapes}
    unused, sources = folder.names(), {}
    for tensor, sizes in active(family, config):
        their_shape = tensor.their_shape(sizes)
        last = _stored_name(tensor.name.format(i=config.layers - 1), family, folder)
        folder.check(last, their_shape)  # before so many names are gone through as config.json says
        names = []
        for i in range(config.layers) if tensor.stacked else (None,):
            names.append(_stored_name(tensor.name.format(i=i), family, folder))
            folder.check(names[-1], their_shape)
        unused.difference_update(names)
        for place, path in enumerate(tensor.ours):
            sources[path] = _Source(folder, tensor, sizes, tuple(names), place)
    _check_unused(unused, folder, family, config)
    assert sources.keys() == shapes.keys(), f"{family.model_type}: the table misses {shapes.keys() - sources.keys()}"
    flat = {path: _filled(source, shapes[path], sharding.get(path)) for path, source in sources.items()}
    return _unflatten(flat)


class _Source(NamedTuple):
    """Where one of our parameters is read from: a tensor, or where ours is stacked one for each layer."""

    folder: Tensors
    tensor: Tensor
    sizes: dict[str, int]
    names: tuple[str, ...]
    place: int  # among the parameters that theirs holds

    def layer(self, i: int, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Of layer `i` (0 where nothing is stacked) the part `index` of our array of `shape`, float32.

        Only the rows and columns asked for are read; rows beyond theirs are padding, zeros.
        """

        def part(theirs: np.ndarray) -> np.ndarray:
            return self.tensor.to_ours(theirs, self.sizes)[self.place][index]

        x = self.folder.read(self.names[i], self.tensor.their_shape(self.sizes), part)
        whole = tuple(len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True))
        return x if x.shape == whole else np.pad(x, [(0, n - m) for n, m in zip(whole, x.shape, strict=True)])

    def read(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The part `index` of our whole array of `shape`, layers stacked."""
        if not self.tensor.stacked:
            return self.layer(0, index, shape)
        layers = range(*index[0].indices(shape[0]))
        first = self.layer(layers[0], index[1:], shape[1:])
        stack = np.empty((len(layers), *first.shape), np.float32)
        for row, i in enumerate(layers):
            stack[row] = self.layer(i, index[1:], shape[1:]) if row else first
        return stack


AT_ONCE = 1 << 24  # values; a larger stack of layers is filled a layer at a time, which costs two compilations


def _filled(source: _Source, shape: tuple[int, ...], sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    """The parameter on its devices, each of which gets its own slice.

    Beside what the devices hold, memory has the slices of one layer (or of a parameter that has none), or where the
    whole is small (AT_ONCE) of all layers.
    """
    if sharding is None:
        return jnp.array(source.read((slice(None),) * len(shape), shape))
    if not source.tensor.stacked or math.prod(shape) <= AT_ONCE:
        return _from_slices(shape, sharding, lambda index: source.read(index, shape))
    per_layer = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    empty, put = _stacking(shape, sharding)
    stack = empty()
    for i in range(shape[0]):
        row = _from_slices(shape[1:], per_layer, lambda index, i=i: source.layer(i, index, shape[1:]))
        stack = jax.block_until_ready(put(stack, row, np.int32(i)))
    return stack


@functools.cache
def _stacking(shape: tuple[int, ...], sharding: jax.sharding.NamedSharding):
    """Programs that make an empty stack of layers, and that put a layer into it in place."""
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return (
        jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding),
        jax.jit(update, donate_argnums=0, out_shardings=sharding),
    )


def _from_slices(shape: tuple[int, ...], sharding, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """`jax.make_array_from_callback` that reads a slice once for all the devices of this process that hold it."""
    known: dict[tuple, np.ndarray] = {}

    def once(index) -> np.ndarray:
        key = tuple(cut.indices(size) for cut, size in zip(index, shape, strict=True))
        if key not in known:
            known[key] = read(index)
        return known[key]

    return jax.make_array_from_callback(shape, sharding, once)


def _stored_name(name: str, family: Family, folder: Tensors) -> str:
    found = stored_name(name, family, folder.names())
    if found is None:
        raise InputError(f"{folder.file}: tensor {name!r} is missing, which config.json asks for")
    return found


def _check_unused(unused: set[str], folder: Tensors, family: Family, config: Form) -> None:
    """Refuses tensors that no parameter took, but for buffers and a second copy of a tied embedding."""
    left = {name for name in unused if name in folder.changed or not name.endswith(family.ignored)}
    head = family.heads["lm"][1][0].name if "lm" in family.heads else ""
    if head in left and isinstance(config, TransformerConfig) and config.num_labels == 0 and config.tied:
        embedding = _stored_name(family.tensors[0].name, family, folder)
        if not folder.equal(head, embedding, (config.vocab_size, config.width)):
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
    shapes = flat_shapes(config)
    family = family_of(loaded.config, CONFIG)
    bare = family.base if task_of(config) == "trunk" else ""  # a file without a head has no prefix
    for tensor, sizes in active(family, config):
        arrays = [_host(_at(loaded.params, path)) for path in tensor.ours]
        for path, array in zip(tensor.ours, arrays, strict=True):
            if array.shape != shapes[path]:
                raise InputError(f"parameter {path!r}: found shape {array.shape}; the model has {shapes[path]}")
        for i in range(config.layers) if tensor.stacked else (None,):
            rows = arrays if i is None else [array[i] for array in arrays]
            name = tensor.name.format(i=i)
            tensors[name.removeprefix(bare)] = tensor.to_theirs(rows, sizes)
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
