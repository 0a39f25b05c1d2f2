"""Where a run computes, as one small value: the parts of a stage take it instead of the run."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lfjax.models.flops import peak_flops
from lfjax.models.network import Network
from lfjax.sharding import DEFAULT_RULES, Step, constrainer, place, replicated, shardings_for


class Devices:
    """A mesh, the rules by which parameters lie on it, keys of a seed, and the programs compiled so far."""

    def __init__(self, mesh: Mesh, rules=DEFAULT_RULES, seed: int = 0):
        self.mesh, self.rules, self.seed = mesh, rules, seed
        self._programs: dict[Any, Step] = {}
        self.peak_flops = float("nan")

    def network(self, model_config) -> Network:
        """A model whose activations are pinned to the mesh."""
        return model_config.build(constrain=constrainer(self.mesh, self.rules))

    def shardings(self, tree):
        """A sharding for each leaf of arrays or shapes."""
        return shardings_for(tree, self.mesh, self.rules)

    @property
    def replicated(self):
        """The sharding of what every device holds whole."""
        return replicated(self.mesh)

    def place(self, tree):
        """Host arrays onto the mesh by the rules."""
        return place(tree, self.shardings(tree))

    def key(self, purpose: str):
        """The key of one purpose, on every device; fold the step in."""

        numbers = np.uint32(self.seed), np.uint32(zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
        return self._fold(*place(numbers, self.replicated))

    @functools.cached_property
    def _fold(self) -> Callable:
        """One program for the keys of all seeds and purposes."""

        def fold(seed, purpose):
            return jax.random.fold_in(jax.random.key(seed), purpose)

        return jax.jit(fold, out_shardings=self.replicated)

    def program(self, key, make: Callable[[], Step]) -> Step:
        """The step made for this hashable key, once: stages that run the same program share it."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def measure_peak(self) -> None:
        """Sets `peak_flops`, the FLOP/s that the mesh could reach; NaN where the device is not known.

        A CPU's is measured, and the best so far counts: one that others keep busy gives less for a while.
        """
        self.peak_flops = np.fmax(self.peak_flops, self.mesh.size * peak_flops(self.mesh.devices.flat[0])).item()


def fetch(tree) -> Any:
    """Device arrays, sharded or not, as host arrays on every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def any_process(value: bool) -> bool:
    """Whether it holds in any process; all of them call this, and get the same answer."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def sync(what: str) -> None:
    """Returns once every process is here: what process 0 has written before can be read by all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
