"""LoRA: a frozen model whose matrices get trained low-rank changes, W + scale A B.

What is trained is a tree of its own, {"lora": adapters} with a model of scores' "head" beside it; gradients, optimiser
state and checkpoints are of that tree alone. The frozen rest, `base`, is an argument of the compiled function, inside
of which `bind` makes the model that a step gets: steps know nothing of it.

Source: Hu et al. 2021, arXiv:2106.09685; scale alpha / sqrt(rank): Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from lfjax.config import InputError
from lfjax.losses.lm import Unembed
from lfjax.models.blocks import LowRank
from lfjax.models.network import NetworkConfig
from lfjax.models.transformer import Decoder, Transformer, TransformerConfig
from lfjax.optim import MUON_MATRICES
from lfjax.types import leaf_name


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The fields of `config.model.lora`. A matrix is a target where one of the regexes is found in its path."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"layers/",)
    rslora: bool = False
    dropout: float = 0.0  # on the adapters' input, in steps of 1/256

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def matrices(config: TransformerConfig) -> dict[str, tuple[int, int, int]]:
    """The matrices that can have an adapter, those of the layers: path -> (L, D_in, D_out), heads counted flat."""
    found = {}
    entries = jax.tree_util.tree_leaves_with_path(config.parameters(), is_leaf=lambda x: isinstance(x, tuple))
    for path, (shape, _) in entries:
        for pattern, inputs, outputs in MUON_MATRICES:
            if re.search(pattern, leaf_name(path)):
                sizes = (math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs))
                found[leaf_name(path)] = (shape[0], *sizes)
    return found


def targets(config: NetworkConfig, lora: LoRA) -> dict[str, tuple[int, int, int]]:
    """Those of `matrices` that get an adapter.

    Raises:
      InputError: a regex is found in none of them, or the rank is larger than a side of one.
    """
    possible = matrices(config) if isinstance(config, TransformerConfig) else {}
    for pattern in lora.targets:
        if not any(re.search(pattern, name) for name in possible):
            raise InputError(
                f"config.model.lora.targets: {pattern!r} is found in no matrix of the model; they are"
                f" {', '.join(possible) or 'those of decoders, which it is not'}"
            )
    found = {name: shape for name, shape in possible.items() if any(re.search(t, name) for t in lora.targets)}
    for name, (_, d_in, d_out) in found.items():
        if lora.rank > min(d_in, d_out):
            raise InputError(
                f"config.model.lora.rank: {lora.rank}; {name} is {d_in} x {d_out}: allowed: at most {min(d_in, d_out)},"
                " or leave it out of config.model.lora.targets"
            )
    return found


def init(key: Array, config: TransformerConfig, lora: LoRA) -> dict:
    """Fresh adapters: {path: {"a": [L D_in r], "b": [L r D_out]}}, float32, as nested dicts.

    A is uniform in +-1/sqrt(D_in), as in the authors' code, and B is 0: the model starts as the base.
    """
    flat = {}
    for name, (layers, d_in, d_out) in targets(config, lora).items():
        own = jax.random.fold_in(key, _number(name))
        bound = d_in**-0.5
        flat[f"{name}/a"] = jax.random.uniform(own, (layers, d_in, lora.rank), jnp.float32, -bound, bound)
        flat[f"{name}/b"] = jnp.zeros((layers, lora.rank, d_out), jnp.float32)
    return unflatten_dict(flat, sep="/")


def merge(base, trained, lora: LoRA) -> dict:
    """The parameters of a plain model that computes the same, W + scale A B in place of W; a trained head as it is."""

    def kernel(target: LowRank):
        change = jnp.einsum("lir,lro->lio", target.a, target.b, precision="highest")
        return target.kernel + change.reshape(target.kernel.shape)

    is_target = lambda x: isinstance(x, LowRank)  # noqa: E731
    return jax.tree.map(lambda x: kernel(x) if is_target(x) else x, _adapted(base, trained, lora), is_leaf=is_target)


@dataclasses.dataclass(frozen=True)
class LoRAModel:
    """A frozen model as a function of what is trained, for steps: `params` below is {"lora": ...} (and "head").

    Made inside a compiled function, by `bind`. Dropout, the model's and the adapters', acts iff `rngs` are passed.
    """

    model: Transformer
    base: Any
    lora: LoRA

    @property
    def config(self) -> TransformerConfig:
        """The model's; its dropout is above 0 where the adapters' is, so that steps pass `rngs`."""
        config = self.model.config
        return dataclasses.replace(config, dropout=max(config.dropout, self.lora.dropout))

    def apply(self, variables, *args, rngs=None, **options):
        """As `Transformer.apply`, with variables {"params": params}."""
        key = rngs["dropout"] if rngs and self.lora.dropout else None
        params = _adapted(self.base, variables["params"], self.lora, key)
        whole = {"params": {**params, "layers": self.base["layers"]}, "adapted": {"layers": params["layers"]}}
        return self.model.apply(whole, *args, rngs=rngs, **options)

    def unembed(self, params) -> Unembed:
        """As `Transformer.unembed`."""
        return self.model.unembed(_adapted(self.base, params, self.lora))

    def decoder(self, params) -> Decoder:
        """As `Transformer.decoder`."""
        return self.model.decoder(_adapted(self.base, params, self.lora))


def bind(model, base, lora: LoRA | None) -> Any:
    """What a step gets as its model: a `LoRAModel`, or the model itself where nothing is frozen (base None)."""
    return model if base is None or lora is None else LoRAModel(model, base, lora)


def _adapted(base, trained, lora: LoRA, key: Array | None = None) -> dict:
    """All parameters, a target's matrix as a `LowRank` with the scale in its B and a dropout key a layer."""
    flat: dict[str, Any] = dict(flatten_dict(base, sep="/"))
    adapters: dict[str, Any] = dict(flatten_dict(trained["lora"], sep="/"))
    for name in sorted({path.rpartition("/")[0] for path in adapters}):
        a, b = adapters[f"{name}/a"], adapters[f"{name}/b"]
        keys = None
        if key is not None:
            own = jax.random.fold_in(jax.random.fold_in(key, _number("lora")), _number(name))
            keys = jax.random.key_data(jax.random.split(own, a.shape[0]))
        flat[name] = LowRank(flat[name], a, lora.scale * b, keys, lora.dropout)
    return {**unflatten_dict(flat, sep="/"), **{group: x for group, x in trained.items() if group != "lora"}}


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
