"""Tensor files (safetensors only, never pickle) and named-axis layouts between two tensor forms."""

from __future__ import annotations

import abc
import math
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from lfjax import files
from lfjax.config import InputError
from lfjax.files import inside, json_value, open_regular, write_json, write_tensors

STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {kind: dtype.name for kind, dtype in STORED.items()}  # as config.json calls them
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCH = "fetch or export it again"
MOST_HEADER, MOST_TENSORS = 100_000_000, 200_000  # bytes of a header, as the format has it; tensors of a folder
MOST_CONFIG = 4 * 2**20  # bytes of a config.json and the like
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
BLOCK = 1 << 22  # values compared at a time


class Tensor(NamedTuple):
    """One line of a family's table: their tensor, our parameters, and how the axes move.

    Attributes:
      name: their name; `{i}` stands for the layer, which is our leading axis.
      paths: our parameter path, or several separated by spaces when theirs holds them stacked on the axis `J`.
      axes: "theirs -> ours", e.g. "(N H) D -> D N H": parentheses are merged axes. `V` is the vocabulary: ours may
        have more rows than theirs (padding), zeros on import and left out on export.
    """

    name: str
    paths: str
    axes: str

    @property
    def ours(self) -> tuple[str, ...]:
        """Our parameter paths."""
        return tuple(self.paths.split())

    @property
    def stacked(self) -> bool:
        """Whether theirs is one tensor per layer and ours one array with a leading layer axis."""
        return "{i}" in self.name

    def sizes(self, shape: Sequence[int], vocab_size: int) -> dict[str, int]:
        """The size of every axis in *their* form, from the shape of our (first) parameter without its layer axis."""
        axes = [a for a in self.axes.split("->")[1].split() if a != "J"]
        return dict(zip(axes, shape, strict=True)) | {"V": vocab_size, "J": len(self.ours)}

    def their_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape their tensor must have."""
        return tuple(math.prod(sizes[a] for a in group) for group in _groups(self.axes))

    def to_ours(self, x: np.ndarray, sizes: dict[str, int]) -> list[np.ndarray]:
        """Their tensor -> one array (a view where possible) for each of our paths."""
        flat = [a for group in _groups(self.axes) for a in group]
        target = self.axes.split("->")[1].split()
        x = x.reshape([sizes[a] for a in flat]).transpose([flat.index(a) for a in target])
        return list(x) if "J" in target else [x]

    def to_theirs(self, arrays: Sequence[np.ndarray], sizes: dict[str, int]) -> np.ndarray:
        """Our arrays (one for each path) -> their tensor; the inverse of `to_ours`."""
        flat = [a for group in _groups(self.axes) for a in group]
        source = self.axes.split("->")[1].split()
        x = np.stack(arrays) if "J" in source else arrays[0]
        x = x[tuple(slice(sizes[a]) for a in source)].transpose([source.index(a) for a in flat])
        return np.ascontiguousarray(x.reshape(self.their_shape(sizes)))


def _groups(axes: str) -> list[list[str]]:
    """The left side of "(N H) D -> D N H" as [["N", "H"], ["D"]]."""
    groups: list[list[str]] = []
    merged = False
    for word in axes.split("->")[0].replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            merged = word == "("
            groups += [[]] if merged else []
        elif merged:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


class Tensors(abc.ABC):
    """The tensors of a model, by name.

    Attributes:
      file: where they are, for messages.
      changed: names of those that are not as the model's own files hold them; each has to be of use.
    """

    file: pathlib.Path
    changed: frozenset[str] = frozenset()

    @abc.abstractmethod
    def names(self) -> set[str]:
        """All tensor names."""

    @abc.abstractmethod
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError if the tensor has another shape; reads nothing."""

    @abc.abstractmethod
    def dtypes(self) -> set[str]:
        """The types that the tensors are stored in, as safetensors calls them."""

    @abc.abstractmethod
    def read(
        self, name: str, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """The tensor as float32, or of it what `part` (views alone) takes.

        Raises:
          InputError: it has another shape, an unsupported type, or NaN or infinity in this part.
        """

    def equal(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        """Whether two tensors of this shape hold the same values; a block of rows of each is read at a time."""
        rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
        for begin in range(0, shape[0], rows):
            x, y = (self.read(n, shape, lambda t, begin=begin: t[begin : begin + rows]) for n in (name, other))
            if not np.array_equal(x, y):
                return False
        return True


class TensorFolder(Tensors):
    """The tensors of a folder, memory-mapped: those of one file, or of the files that its index names."""

    def __init__(self, folder: pathlib.Path, single: str = SINGLE, shapes: str = "config.json asks"):
        """Opens and checks the headers.

        Args:
          single: the one file; its index is called SINGLE.index.json.
          shapes: who asks for a tensor's shape, for messages.

        Raises:
          InputError: a file is absent, damaged or a link out of the folder; a tensor is not where the index says.
        """
        self._tensors: dict[str, tuple[pathlib.Path, mmap.mmap, int, dict]] = {}
        self._shapes = shapes
        index: dict[str, str] = {}
        one, several = inside(folder, single), inside(folder, f"{single}.index.json")
        if one.is_file():
            found = [one]
        elif several.is_file():
            index = _read_index(several)
            found = [inside(folder, name) for name in sorted(set(index.values()))]
        else:
            pickled = "".join(f" (a pickled {file.name} is never read)" for file in sorted(folder.glob("*.bin"))[:1])
            raise InputError(f"{folder}: no {single} and no {several.name}{pickled}; save the model as safetensors")
        for file in found:
            for name, entry in _open_safetensors(file):
                if name in self._tensors:
                    raise InputError(f"{file}: tensor {name!r} is also in {self._tensors[name][0].name}")
                self._tensors[name] = (file, *entry)
            if len(self._tensors) > MOST_TENSORS:
                raise InputError(f"{folder}: holds more than {MOST_TENSORS} tensors; {FETCH}")
        for name, file in index.items():
            if name not in self._tensors:
                raise InputError(f"{folder / file}: tensor {name!r} is missing, which {several.name} says is here")
            place = self._tensors[name][0].name
            if place != file:
                fix = "fetch or export the model again"
                raise InputError(f"{several}: tensor {name!r}: said to be in {file}, found in {place}; {fix}")
        self.file = found[0] if len(found) == 1 else several

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; (0,) of a single number."""
        return tuple(self._tensors[name][3]["shape"]) or (0,)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError if the tensor has another shape; reads nothing."""
        file, _, _, entry = self._tensors[name]
        if tuple(entry["shape"]) != shape:
            found = f"found shape {entry['shape']}; {self._shapes} for {list(shape)}"
            raise InputError(f"{file}: tensor {name!r}: {found}")

    def dtypes(self) -> set[str]:
        """The types that the tensors are stored in, as safetensors calls them."""
        return {entry["dtype"] for *_, entry in self._tensors.values()}

    def read(
        self, name: str, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """The tensor as float32, or of it what `part` (views alone) takes; no more than that is held in memory.

        Raises:
          InputError: it has another shape, an unsupported type, or NaN or infinity in this part.
        """
        stored = self._stored(name, shape)
        x = (stored if part is None else part(stored)).astype(np.float32, order="C")
        self._release(name)
        if not np.isfinite(x).all():
            where = f"{self._tensors[name][0]}: tensor {name!r}"
            raise InputError(f"{where}: holds NaN or infinity; the file is damaged or its training diverged")
        return x

    def _stored(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the file."""
        self.check(name, shape)
        file, mapped, offset, entry = self._tensors[name]
        if entry["dtype"] not in STORED:
            raise InputError(f"{file}: tensor {name!r}: stored as {entry['dtype']}; allowed are {', '.join(STORED)}")
        begin, end = entry["data_offsets"]
        data = np.frombuffer(mapped, np.uint8, end - begin, offset + begin)
        return data.view(STORED[entry["dtype"]]).reshape(shape)

    def _release(self, name: str) -> None:
        """Gives the file's pages back: they would count as this process's memory until it is short."""
        _, mapped, offset, entry = self._tensors[name]
        begin, end = (offset + place for place in entry["data_offsets"])
        begin -= begin % mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _read_index(file: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(file, most=files.MOST_BYTES).get("weight_map")
    plain = isinstance(weight_map, dict) and all(
        isinstance(name, str) and name.isprintable() and name == pathlib.PurePath(name).name
        for name in weight_map.values()
    )
    if not plain or not weight_map:
        raise InputError(f"{file}: field 'weight_map': must give the file, beside this one, of each tensor")
    return weight_map


def _open_safetensors(file: pathlib.Path) -> Iterator[tuple[str, tuple[mmap.mmap, int, dict]]]:
    if not os.path.lexists(file):
        raise InputError(f"{file}: not there, though the index names it; fetch or export it again")
    try:
        with open_regular(file, fix=FETCH) as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= MOST_HEADER else b""
            if length > MOST_HEADER or text.count(b'"data_offsets"') > MOST_TENSORS:
                raise InputError(f"{file}: its header has more than 100 MB or {MOST_TENSORS} tensors; {FETCH}")
            header = json_value(text)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        with safetensors.safe_open(file, framework="np"):  # checks sizes, offsets and types of the whole header
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a whole safetensors file ({error}); {FETCH}") from error
    header.pop("__metadata__", None)
    if not header:
        raise InputError(f"{file}: holds no tensor")
    for name, entry in header.items():
        yield name, (mapped, 8 + length, entry)


def read_json(file: pathlib.Path, *, most: int = MOST_CONFIG) -> dict[str, Any]:
    """A JSON object from a file of a model folder, of at most so many bytes.

    Raises:
      InputError: naming the file, and the line where it is damaged; also where it is a link out of its folder.
    """
    if not file.exists():
        raise InputError(f"{file}: not found; a model folder holds config.json and {SINGLE}")
    return files.read_json(inside(file.parent, file.name), dict, most=most, fix=FETCH)


def lossless_dtype(tensors: dict[str, np.ndarray], dtype: str) -> str:
    """`dtype` if it holds every (float32) value exactly, else "float32"."""
    if dtype not in ("bfloat16", "float16"):
        return "float32"
    with np.errstate(over="ignore"):
        exact = all(np.array_equal(x.astype(dtype).astype(np.float32), x) for x in tensors.values())
    return dtype if exact else "float32"


def write_safetensors(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str, *, most_bytes: int | None = None
) -> None:
    """Writes all tensors, converted to `dtype`: model.safetensors, or files of at most `most_bytes` with an index.

    A tensor larger than `most_bytes` gets a file of its own.

    Raises:
      InputError: a value is beyond what `dtype` holds; names the tensor.
    """
    shards: list[list[str]] = [[]]
    most = room = math.inf if most_bytes is None else most_bytes
    size = {name: x.size * np.dtype(dtype).itemsize for name, x in tensors.items()}
    for name in tensors:
        if shards[-1] and size[name] > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size[name]
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for file, shard in zip(names, shards, strict=True):
        converted = {name: _converted(name, tensors[name], dtype) for name in shard}
        write_tensors(folder / file, converted, {"format": "pt"})


def _converted(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = x.astype(dtype, copy=False)
    if dtype != "float32" and not np.array_equal(np.isfinite(converted), np.isfinite(x)):
        raise InputError(f"tensor {name!r}: holds values beyond the range of {dtype}; use bfloat16 or float32")
    return converted
