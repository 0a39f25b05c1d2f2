"""Peak memory of loading a model onto a mesh: slice by slice, and whole first.

    python benchmarks/load.py [--layers=12] [--width=768] [--mlp=2048] [--vocab=16000] [--json=FILE]

A Llama form is written into a temporary folder, then loaded in fresh processes onto the mesh (1, 8, 1) of 8 virtual CPU
devices. "sliced" is `hf.load(path, mesh=...)`; "whole" loads all of it in one place, then spreads it.
Peaks are `ru_maxrss` above what the process had when jax was ready; what the devices hold is in this memory too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

WAYS = ("sliced", "whole")


def peak() -> int:
    """Bytes of memory that this process has had at most (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: str, layers: int, width: int, mlp: int, vocab: int) -> None:
    import jax
    import numpy as np

    from lfjax.interop import hf
    from lfjax.models import presets
    from lfjax.models.transformer import Transformer, parameter_table

    config = presets.llama(vocab_size=vocab, width=width, layers=layers, heads=width // 64, mlp_width=mlp, tied=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda entry: rng.standard_normal(entry[0], np.float32),
        parameter_table(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    hf.save(folder, hf.loaded_from(Transformer(config), params))


def load(folder: str, way: str) -> None:
    """Prints bytes of parameters, peak bytes above the start, and seconds."""
    from lfjax.cli import spare_threads

    spare_threads()
    import jax
    import jax.numpy as jnp

    from lfjax.interop import hf
    from lfjax.sharding import make_mesh, place, shardings_for

    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    jax.block_until_ready(place(jnp.ones((8, 8)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))))
    before, began = peak(), time.perf_counter()
    if way == "sliced":
        params = hf.load(folder, mesh=mesh).params
    else:
        params = hf.load(folder).params
        params = place(params, shardings_for(params, mesh))
    jax.block_until_ready(params)
    seconds, above = time.perf_counter() - began, peak() - before
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(x.nbytes for x in jax.tree.leaves(params["layers"])) // params["layers"]["mlp"]["up"].shape[0]
    print(json.dumps({"parameters": size, "layer_tensor": largest, "above_start": above, "seconds": seconds}))


def fresh(*arguments: object) -> str:
    """What this file prints as another process. (This one stays small: a child inherits its parent's peak.)"""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, *map(str, arguments)]
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"layers": 12, "width": 768, "mlp": 2048, "vocab": 16000}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, folder, *rest = arguments.child
        return write(folder, *map(int, rest)) if what == "write" else load(folder, what)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        fresh("--child", "write", folder, *(getattr(arguments, name) for name in sizes))
        found = {way: json.loads(fresh("--child", way, folder)) for way in WAYS}
    print(f"{machine()}, 8 virtual devices, mesh (1, 8, 1)")
    print(
        f"{'':8s} {'parameters':>12s} {'above start':>12s} {'ratio':>7s} {'largest layer tensor':>23s} {'seconds':>8s}"
    )
    for way, row in found.items():
        held = f"{row['parameters'] / 1e6:9.1f} MB {row['above_start'] / 1e6:9.1f} MB"
        ratio = row["above_start"] / row["parameters"]
        print(f"{way:8s} {held} {ratio:7.2f} {row['layer_tensor'] / 1e6:20.1f} MB {row['seconds']:8.1f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
