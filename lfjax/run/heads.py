"""Models that give scores: a head on a trunk, and what they say of batches of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import Config
from lfjax.data.batching import RewardBatches
from lfjax.models import lora
from lfjax.models.encoder import EncoderConfig
from lfjax.models.lora import LoRA
from lfjax.models.network import initialise
from lfjax.run.devices import Devices
from lfjax.run.parts import compute_settings
from lfjax.sharding import abstract, global_batch, jit_step
from lfjax.types import RewardBatch


def with_head(
    devices: Devices, settings: Config, loaded, purpose: str, num_labels: int, *, dropout: float, zero: bool = False
):
    """(model, parameters on the mesh): the loaded trunk with a head of so many scores, fresh where it has none such.

    An encoder's head gets a pooler below it. Source of the head's init: Stiennon et al. 2020, appendix B.

    Args:
      settings: `config.model`. purpose: of the key that a fresh head and pooler are drawn with.
    """
    config = compute_settings(settings, loaded.model.config, num_labels=num_labels, dropout=dropout)
    if isinstance(config, EncoderConfig) and loaded.model.config.num_labels == 0:
        config = dataclasses.replace(config, pooler=True)
    model, table = devices.network(config), config.parameters()
    params = {name: group for name, group in loaded.params.items() if name != "unembed"}
    if "head" not in params or params["head"]["kernel"].shape[-1] != num_labels:
        key = devices.key(f"{purpose}-head")
        kernel = jax.random.normal(key, (config.width, num_labels)) / np.sqrt(config.width + 1)
        params["head"] = {name: np.zeros(shape, np.float32) for name, (shape, _) in table["head"].items()}
        params["head"]["kernel"] = np.asarray(jnp.zeros_like(kernel) if zero else kernel)
    if "pooler" in table and "pooler" not in params:
        params["pooler"] = jax.tree.map(np.asarray, initialise(devices.key(f"{purpose}-pooler"), table["pooler"]))
    return model, devices.place(params)


def scorer(
    devices: Devices,
    model,
    base=None,
    *,
    adapters: LoRA | None = None,
    name: str = "score",
    each: int = 1,
    leave: Callable[[], None] = lambda: None,
):
    """(params, RewardBatches) -> per example a float array of its candidates' scores, `each` a candidate in a row.

    Args:
      name: of the program.
      leave: called after every batch of an evaluation with `last`: one after the last checkpoint of the stage.
    """

    def scores_of(params, tokens, mask, base):
        return lora.bind(model, base, adapters).apply({"params": params}, tokens, attention_mask=mask)

    step = jit_step(scores_of, name=name, out_shardings=devices.replicated)

    def score(params, batches: RewardBatches, *, last: bool = False) -> list[np.ndarray]:
        pieces = []
        for indices, batch in batches.evaluation():
            flat = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask)]
            tokens, mask = global_batch(flat, devices.mesh)
            step.compile(*abstract((params, tokens, mask, base)))
            pieces.append((indices, step(params, tokens, mask, base)))
            if last:
                jax.block_until_ready(pieces[-1][1])
                leave()
        scores = [np.zeros(0)] * len(batches.examples)
        for indices, values in jax.device_get(pieces):
            for index, row in zip(indices, values.reshape(len(indices), -1), strict=True):
                if index >= 0:
                    scores[index] = row[: each * len(batches.examples[index].candidates)]
        return scores

    return score


def one_of_each(batches: RewardBatches) -> dict[tuple[int, ...], RewardBatch]:
    """For every shape of an epoch's batches the first of it: what a step is compiled for."""
    first: dict[tuple[int, ...], RewardBatch] = {}
    for index in range(batches.steps_per_epoch):
        batch = batches.batch_at(index)
        first.setdefault(batch.tokens.shape, batch)
        if len(first) == len(batches.bucket_shapes):
            break
    return first
