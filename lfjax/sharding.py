"""Where arrays live: a mesh, a table from parameter paths to partition specs, and steps compiled once per shape."""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lfjax.config import InputError
from lfjax.types import leaf_name, map_named

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch's rows are spread over both

# (regex on the parameter path, one mesh axis or "" per dimension); the first match wins; () is replicated.
DEFAULT_RULES = (
    (r"embed/tokens$", ("tensor", "fsdp")),
    (r"embed/positions$", ("", "fsdp")),
    (r"attention/[qkv]$", ("", "fsdp", "tensor", "")),
    (r"attention/[qkv]_bias$", ("", "tensor", "")),
    (r"attention/o$", ("", "tensor", "", "fsdp")),
    (r"mlp/(up|gate)$", ("", "fsdp", "tensor")),
    (r"mlp/(up|gate)_bias$", ("", "tensor")),
    (r"mlp/down$", ("", "tensor", "fsdp")),
    (r"lstm/(input|recurrent)$", ("", "fsdp", "")),
    (r"unembed/kernel$", ("fsdp", "tensor")),
    (r"", ()),
)

# What the model calls its activations -> spec. B rows, N heads, T positions, D width, F mlp, V vocabulary.
ACTIVATIONS = {
    "residual": P(BATCH, None, None),  # [B T D]
    "heads": P(BATCH, "tensor", None, None),  # [B N T H]
    "mlp": P(BATCH, None, "tensor"),  # [B T F]
    "logits": P(BATCH, None, "tensor"),  # [B T V]
    "next_logits": P(BATCH, "tensor"),  # [B V]
    "rows": P((*BATCH, "tensor"), None),  # [B V]: a sampler needs rows whole, so tensor splits the rows
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh; one axis may be -1 and takes what is left.

    Devices are in process order, tensor innermost; on TPUs an axis lies along the torus' links, and one of the torus'
    axes is shared by two of the mesh's only where these sizes leave no other way.

    Raises:
      InputError: the sizes don't multiply to the number of devices, or these are of several TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(f"config.mesh.{axis}: {size}; allowed: a positive size, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise InputError(f"config.mesh: {', '.join(free)} are all -1; only one axis can take what is left")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not multiply to {len(devices)} devices;"
            " change one of them, or set one to -1"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":  # jax.make_mesh refuses the GPUs of several hosts
        return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES, axis_types=types)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        raise InputError(f"config.mesh: the devices are of {len(slices)} TPU slices; a run takes the devices of one")
    try:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
    except NotImplementedError:
        layout = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(layout, AXES, axis_types=types)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, rules=DEFAULT_RULES) -> P:
    """The spec of one leaf by the first rule whose regex is found in its path.

    An axis that does not divide its dimension (8 kv heads over tensor=16, say) is left out, and a leaf whose rank
    differs from the rule's (factored second moments) is replicated.
    """
    axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
    if len(axes) != len(shape):
        return P()
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    return P(*fits)


def check_rules(rules, parameters: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Whether `config.mesh.rules` can be meant for these parameters, (path, shape) each.

    Raises:
      InputError: no row matches any, or one names more axes than a parameter that it matches has dimensions.
    """
    name, matched = "", False
    for name, shape in parameters:
        row = next((row for row in rules if re.search(row[0], name)), None)
        if row is not None and len(row[1]) > len(shape):
            raise InputError(
                f"config.mesh.rules: {row!r}: names {len(row[1])} axes, but matches {name}, whose shape is"
                f" {list(shape)}; give one axis a dimension, or a regex that does not match it"
            )
        matched = matched or row is not None
    if not matched:
        others = f" (and {len(rules) - 1} more)" if len(rules) > 1 else ""
        raise InputError(
            f"config.mesh.rules: {rules[0]!r}{others}: found in the path of no parameter; a path is such as {name}"
        )


def shardings_for(tree, mesh: Mesh, rules=DEFAULT_RULES):
    """A NamedSharding per leaf of `tree` (arrays or shapes); optimiser state follows its parameter's path."""
    return map_named(lambda name, leaf: NamedSharding(mesh, spec_for(name, np.shape(leaf), mesh, rules)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis spread over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards a batch's rows are spread: it has to divide the batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrainer(mesh: Mesh, rules=DEFAULT_RULES) -> Callable:
    """The `constrain(x, name)` that models take: pins arrays to the mesh; identity on one device.

    An activation's spec is in `ACTIVATIONS`; of a dimension's axes the first that divide it together are kept. Any
    other name is a parameter's path: gathered over fsdp where it is used, over tensor as its rule says. Left alone,
    XLA gathers other devices' rows of activations instead, and the vocabulary again for each chunk of a loss.
    """
    if mesh.size == 1:
        return lambda x, name: x

    def constrain(x, name: str):
        axes = ACTIVATIONS[name] if name in ACTIVATIONS else spec_for(name, x.shape, mesh, rules)
        if len(axes) != x.ndim:
            return x
        fits = []
        for axis, size in zip(axes, x.shape, strict=True):
            names = (axis,) if isinstance(axis, str) else axis or ()
            if name not in ACTIVATIONS:
                names = tuple(n for n in names if n != "fsdp")
            while size % math.prod(mesh.shape[n] for n in names):
                names = names[:-1]
            fits.append(names or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*fits)))

    return constrain


def place(tree, shardings):
    """Host arrays -> global arrays with these shardings (a tree, or one for all); every process holds all of `tree`."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def global_batch(batch, mesh: Mesh):
    """A whole host batch, the same on every process, as global arrays: its rows over data and fsdp."""
    return place(batch, batch_sharding(mesh))


def abstract(tree, shardings=None):
    """Shapes, dtypes and shardings of a tree: what a step is compiled for."""
    if shardings is None:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)), tree
        )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings)


def jit_step(
    fn: Callable,
    *,
    name: str,
    variant: str = "",
    donate: tuple[int, ...] = (),
    out_shardings=None,
    shapes: int = 0,
) -> Step:
    """A pure function as a `Step`: compiled for each declared set of shapes, before its first use, and never again.

    Args:
      variant: what tells it from other functions of its name, where programs are counted.
    """
    return Step(fn, name=name, variant=variant, donate=donate, out_shardings=out_shardings, shapes=shapes)


_cached: Counter[str] = Counter()  # programs that this process has read from the persistent cache
jax.monitoring.register_event_listener(
    lambda event, **_: _cached.update([event] if event == "/jax/compilation_cache/cache_hits" else ())
)


class Step:
    """A function with one compiled program per declared set of shapes.

    `compile(*args)` declares and compiles; a call looks the program up by its arguments' shapes and runs it. The first
    `shapes` sets that are called declare themselves. A call outside the declared shapes is an error that names the
    leaf and both shapes: nothing compiles by surprise.
    """

    seconds: ClassVar[float] = 0.0  # spent compiling in this process, over all steps
    told: ClassVar[Callable[[str, float, bool], None]] = lambda name, seconds, cached: None  # of each program made
    compiled: ClassVar[Counter[str]] = Counter()  # in this process: "name/hash of the shapes" -> how often

    def __init__(
        self,
        fn: Callable,
        *,
        name: str,
        variant: str = "",
        donate: tuple[int, ...] = (),
        out_shardings=None,
        shapes: int = 0,
    ):
        self.name, self._variant, self._shapes = name, variant, shapes
        kwargs = {} if out_shardings is None else {"out_shardings": out_shardings}
        self._jitted = jax.jit(fn, donate_argnums=donate, **kwargs)
        self.programs: dict = {}  # tree and shapes of the arguments -> compiled program
        self._declared: list[dict[str, str]] = []  # for error messages: leaf name -> shape, per program

    def compile(self, *args):
        """Compiles for these shapes (arrays or ShapeDtypeStructs, sharded as they will be); returns the program."""
        key = _signature(args)
        if key not in self.programs:
            began, hits = time.perf_counter(), _cached.total()
            self.programs[key] = self._jitted.lower(*args).compile()
            spent = time.perf_counter() - began
            Step.seconds += spent
            Step.told(self.name, spent, _cached.total() > hits)
            self._declared.append(_named_shapes(args))
            text = json.dumps(self._declared[-1], sort_keys=True) + self._variant
            Step.compiled[f"{self.name}/{zlib.crc32(text.encode()):08x}"] += 1
        return self.programs[key]

    def __call__(self, *args):
        """Runs the program compiled for these shapes.

        Raises:
          ValueError: none was; names the first leaf that differs from the nearest declared shapes.
        """
        program = self.programs.get(_signature(args))
        if program is None and len(self.programs) < self._shapes:
            program = self.compile(*abstract(args))
        if program is None:
            raise ValueError(f"step {self.name}: {self._mismatch(_named_shapes(args))}")
        return program(*args)

    def _mismatch(self, got: dict[str, str]) -> str:
        if not self._declared:
            return "called before compile() declared any shape"
        differing = [[n for n in got.keys() | known.keys() if got.get(n) != known.get(n)] for known in self._declared]
        nearest = min(range(len(differing)), key=lambda i: len(differing[i]))
        name = min(differing[nearest], default="(tree)")
        declared = self._declared[nearest].get(name, "nothing")
        return (
            f"argument {name} is {got.get(name, 'missing')}, compiled for {declared}; declare its bucket with compile()"
        )


def _signature(args):
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((np.shape(x), x.dtype) for x in leaves)


def _named_shapes(args) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return {leaf_name(path): f"{x.dtype.name}{list(np.shape(x))}" for path, x in leaves}
