"""The value network of an actor and critic: where it starts, and the scale of the scores that it learns."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from lfjax.config import Config, InputError
from lfjax.data.batching import PromptBatches
from lfjax.models.encoder import EncoderConfig
from lfjax.run.devices import Devices, fetch
from lfjax.run.parts import compute_settings
from lfjax.run.rewards import LearnedReward
from lfjax.run.writing import Policy
from lfjax.sharding import global_batch
from lfjax.state import RewardNorm


def value_network(
    devices: Devices,
    settings: Config,
    policy: Policy,
    reward,
    norm: RewardNorm,
    *,
    start: str,
    key: str,
    loaded: Any = None,
):
    """(model, parameters) that start as the reward model's scores, normalised, or as the policy with a zero head.

    Args:
      settings: `config.model`.
      start: "reward", "policy" or a folder; `key` is where the config says so, `loaded` the model in the folder.
    Raises:
      InputError: the start gives no value a token.
    """
    learned = isinstance(reward, LearnedReward)
    if start == "reward" and not learned:
        raise InputError(f'config.{key}: "reward" needs a learned reward; use "policy" or a model folder')
    if start == "reward":
        config, params = reward.config, dict(reward.params)
    elif start == "policy":
        config, whole = policy.model.config, policy.params if policy.base is None else policy.base
        params = {group: leaves for group, leaves in whole.items() if group != "unembed"}
    else:
        config, params = loaded.model.config, loaded.params
    if isinstance(config, EncoderConfig):
        raise InputError(no_values(key, start))
    if start == "policy":
        head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}
    elif config.num_labels != 1:
        raise InputError(f'config.{key}: {start!r} has no head with one value; use "reward" or "policy"')
    else:
        head = {"kernel": params["head"]["kernel"], "bias": params["head"].get("bias", jnp.zeros(1))}
    if start == "reward":
        head = {"kernel": head["kernel"] / norm.std, "bias": (head["bias"] - norm.mean) / norm.std}
    config = compute_settings(settings, config, num_labels=1, head_bias=True, dropout=0.0)
    return devices.network(config), devices.place({**params, "head": head})


def measure_norm(devices: Devices, policy: Policy, reward, batches: PromptBatches, records, key, *, wanted: int):
    """Mean and deviation of the raw score over so many samples of the reference, as a `RewardNorm`."""
    if wanted == 0:
        return RewardNorm.identity()
    scores = []
    for index in range(-(-wanted // batches.batch_size)):
        prompts = global_batch(batches.batch_at(index), devices.mesh)
        generation = policy.rollout(policy.params, prompts, key, np.int32(index))
        scores.append(reward(generation, [records[i] for i in batches.indices_at(index)]))
    values = np.concatenate([np.asarray(s, np.float64) for s in fetch(scores)])[:wanted]
    differ = values.std() > 1e-6 * np.abs(values).max()  # whatever their scale, by more than rounding
    return RewardNorm(mean=jnp.float32(values.mean()), std=jnp.float32(values.std() if differ else 1.0))


def no_values(key: str, name: str) -> str:
    """What is said where a value network would have to be an encoder."""
    return f'config.{key}: "{name}" is an encoder, which scores whole texts and gives no value a token; use "policy"'
