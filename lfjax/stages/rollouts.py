"""What stages share that have a model write and something score: their steps, the policies, the rewards."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lfjax.config import Config, sampling_section
from lfjax.modules import is_named
from lfjax.records import Record
from lfjax.run import writing
from lfjax.run.data import note
from lfjax.run.devices import fetch
from lfjax.run.rewards import FunctionReward, LearnedReward
from lfjax.run.run import Run
from lfjax.run.stage import Step
from lfjax.run.writing import Policy, texts
from lfjax.tokenizers import stop_ids
from lfjax.types import Rollout

STEPS = {
    "ppo_rollout": Step(
        "lfjax.steps.ppo_rollout:ppo_rollout",
        "ppo.rollout_step",
        ("model", "eos_ids", "pad_id", *writing.KEYWORDS),
    ),
    "ppo_score": Step("lfjax.steps.ppo_score:ppo_score"),
}


def policy_of(run: Run, key: str, name: str, stage: str, **adapters) -> Policy:
    """The language model that `config.<key>` names, writing as `stage` does.

    Args:
      adapters: and `purpose`, as of `Policy`.
    """
    step, own = run.steps["ppo_rollout"], run.config.ppo.rollout_step.to_dict()
    sampling = sampling_section(run.config, stage)
    return Policy(
        run.devices,
        run.load_model(key, name, language=True),
        step,
        name="ppo_rollout",
        settings=run.config.model,
        shapes=prompt_shapes(run.config),
        eos_ids=stop_ids(run.tokenizer, sampling.stop, "config.sampling.stop"),
        pad_id=run.tokenizer.pad_id,
        **writing.keywords(sampling, step, own),
        **own,
        **adapters,
    )


def reward_of(run: Run, key: str, name: str) -> LearnedReward | FunctionReward:
    """The reward or judge that `config.<key>` names: a function, or a scorer's stage or folder."""
    if is_named(name):
        function = run.resolve(key, name)
        return FunctionReward(run.devices, run.tokenizer, function, where=f"config.{key}: {name}")
    return LearnedReward(
        run.devices,
        run.load_model(key, name),
        run.steps["ppo_score"],
        name="ppo_score",
        settings=run.config.model,
        shapes=prompt_shapes(run.config),
        where=f"config.{key}: {name!r}",
    )


def writable(run: Run, stage: str, split: str) -> tuple[list[Record], dict[str, float]]:
    """(the records of a split that a stage writes to, how many have prompts that are too long); also a note of these.

    See `writing.fitting`.
    """
    sampling, rule = sampling_section(run.config, stage), run.config.data.too_long
    records, longer = writing.fitting(sampling, run.records[split], run.tokenizer, rule)
    if longer:
        done = "cut" if rule == "cut" else "left out"
        most = f"the largest of config.sampling.prompt_buckets = {max(sampling.prompt_buckets)}"
        note(stage, f"{longer} of {len(run.records[split])} {split} prompts are longer than {most} and are {done}")
    return records, {f"data/{split}/too_long": float(longer)}


def prompt_shapes(config: Config) -> int:
    """How many shapes prompts come in: every length, in the batches of every stage of the run that writes."""
    writers = [stage for stage in config.stages if "sampling" in config[stage]]
    return len({(config[s].batch_size, n) for s in writers for n in sampling_section(config, s).prompt_buckets})


def rollout_rows(tokenizer, rollout: Rollout, limit: int) -> list[dict[str, Any]]:
    """The first rows of a rollout for samples.jsonl; logprob and kl are sums over the response, in nats.

    `score` is what the reward said, as in the evaluation's rows; `normalised_score` what PPO learns from.
    """
    host = jax.tree.map(lambda x: np.asarray(x[:limit]), fetch(rollout))
    prompts, responses = texts(tokenizer, host)
    return [
        {
            "prompt": prompts[i],
            "response": responses[i],
            "score": float(host.raw_scores[i]),
            "normalised_score": float(host.scores[i]),
            "logprob": float(host.old_logprobs[i].sum()),
            "kl": float((host.old_logprobs[i] - host.ref_logprobs[i]).sum()),
        }
        for i in range(len(prompts))
    ]
