"""The evaluation stage: the model before and after, on the same held-out prompts with the same noise."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lfjax.config import Config, InputError, at_least, sampling_section, section
from lfjax.records import Record
from lfjax.rewards import diversity, lexicon
from lfjax.run import writing
from lfjax.run.data import Data, texts_of
from lfjax.run.devices import fetch
from lfjax.run.run import Run
from lfjax.run.sections import check_sampling, sampling_overrides
from lfjax.run.stage import Stage
from lfjax.run.writing import Policy, texts
from lfjax.sharding import Step, global_batch, jit_step
from lfjax.stages import ppo
from lfjax.steps.ppo_forward import response_stats
from lfjax.tokenizers import stop_ids
from lfjax.types import Generation


def evaluate_section() -> Config:
    """The keys of the stage."""
    return section(
        prompts=512,  # of the test split; where it has fewer they come again, with other noise
        batch_size=128,
        samples=24,  # rows of samples.jsonl a model
        sampling=sampling_overrides(),
    )


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """Prompts fit the buckets, and what stops a response is a token each. Raises InputError."""
    writing.check_texts(sampling_section(config, "evaluate"), data.records.test, tokenizer)


def check(config: Config) -> None:
    """There is something to compare. Raises InputError."""
    at_least(config, 0, "evaluate.samples")
    at_least(config, 1, "evaluate.prompts", "evaluate.batch_size")
    if not {"sft", "ppo"} & {*config.stages[: config.stages.index("evaluate")]}:
        raise InputError(
            'config.stages: "evaluate" compares before and after; it needs an "sft" or "ppo" stage before it'
        )
    check_sampling(config, "evaluate", whole=False)


def evaluate_stage(run: Run) -> dict[str, float]:
    """Figures named x_before and x_after, on `evaluate.prompts` prompts of the test split.

    The judge (the VADER lexicon) reads prompt + response, as it reads people's own sentences for
    judge/positive_human; `judge/positive_response_*` are of the response alone. Scores are the reward's own, raw.
    """
    before = run.stages[: run.stages.index("evaluate")]
    after = "ppo" if "ppo" in before else "sft"  # the config was checked for one of them
    key, start = run.start(after)
    policies = {
        which: ppo.policy_of(run, key, name, "evaluate") for which, name in (("before", start), ("after", after))
    }
    measure = _logprobs(run.config, policies["before"].model)
    reward = ppo.reward_of(run) if after == "ppo" else None
    figures: dict[str, float] = {}
    rows = {}
    run.log.cut(run.stages, "evaluate", -1)
    for which, policy in policies.items():
        found = _write(run, policy, policies["before"].params, measure, reward)
        rows[which] = found["rows"]
        figures |= {name.replace("*", which): value for name, value in found["figures"].items()}
    figures["ppo/kl"] = figures.pop("ppo/kl_after")
    figures.pop("ppo/kl_before")
    figures["judge/positive_human"] = lexicon.positive_share(texts_of(run.records.test))
    run.log.metrics("evaluate", 0, figures)
    for which in ("before", "after"):
        shown = rows[which][: run.config.evaluate.samples]
        run.log.samples("evaluate", 0, [{**row, "set": which} for row in shown])
    return figures


def held_out_records(records: Sequence[Record], count: int) -> list[Record]:
    """So many records in the order of a hash, so that every source has its share.

    Where there are fewer, they come again, each time with noise of their own.
    """
    order = sorted(records, key=lambda r: hashlib.sha256(repr((r.prompt_text, r.responses)).encode()).digest())
    return [order[i % len(order)] for i in range(count)]


def _logprobs(config: Config, model) -> Step:
    """(params, reference params, generation) -> log-probabilities [B R] under both, 0 beyond the response."""
    stats = functools.partial(
        response_stats,
        model,
        temperature=sampling_section(config, "evaluate").temperature,
        chunk_size=config.ppo.update_step.get("chunk_size", 64),
    )

    def logprobs(params, ref_params, g: Generation):
        fields = (g.prompts, g.prompt_mask, g.tokens, g.mask)
        own, ref = (stats(p, *fields).logprobs for p in (params, ref_params))
        return jnp.where(g.mask, own, 0.0), jnp.where(g.mask, ref, 0.0)

    return jit_step(logprobs, name="evaluate logprobs", shapes=ppo.prompt_shapes(config))


def _write(run: Run, policy: Policy, reference, measure: Step, reward) -> dict[str, Any]:
    """Samples of one model on the held-out prompts, and what can be said of them; looks after a stop every batch."""
    records = held_out_records(run.records.test, run.config.evaluate.prompts)
    key = run.devices.key("evaluate")
    rows: list[dict[str, Any]] = [{}] * len(records)
    sampling = sampling_section(run.config, "evaluate")
    options = {"batch_size": run.config.evaluate.batch_size, "seed": run.config.seed}
    stops = stop_ids(run.tokenizer, sampling.stop, "config.sampling.stop")
    for indices, whole in writing.prompt_batches(sampling, records, run.tokenizer, **options).evaluation():
        prompts = global_batch(whole, run.devices.mesh)
        # the same key for every batch: row ids are global, so no two rows share their noise
        generation = policy.rollout(policy.params, prompts, key, np.int32(0))
        own, ref = measure(policy.params, reference, generation)
        scores = reward(generation, [records[i] for i in indices]) if reward else own[:, 0]
        part = _rows(run.tokenizer, stops, *fetch((generation, own, ref, scores)))
        for index, row in zip(indices, part, strict=True):
            if index >= 0:
                rows[index] = row if reward else {**row, "score": None}
        run.leave_if_asked("evaluate")
    return {"figures": _figures(rows), "rows": rows}


def _rows(tokenizer, stops: tuple[int, ...], generation: Generation, own, ref, scores) -> list[dict[str, Any]]:
    """A row of samples.jsonl for each response; logprob and kl are sums over the response, in nats."""
    length = np.asarray(generation.mask).sum(axis=1)
    last = np.take_along_axis(np.asarray(generation.tokens), np.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    prompts, responses = texts(tokenizer, generation)
    return [
        {
            "prompt": prompt,
            "response": response,
            "score": float(scores[i]),
            "logprob": float(own[i].sum()),
            "kl": float((own[i] - ref[i]).sum()),
            "length": int(length[i]),
            "ended": int(last[i]) in stops,
            "judge": float(lexicon.compound_scores([prompt + response])[0]),
        }
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows, and what can only be said of all of them together."""
    responses = [row["response"] for row in rows]
    figures = {
        "judge/positive_*": lexicon.positive_share([row["prompt"] + row["response"] for row in rows]),
        "judge/positive_response_*": lexicon.positive_share(responses),
        "diversity/distinct2_*": diversity.matched_distinct2(responses),
        "diversity/unique_*": diversity.unique_share(responses),
    }
    means = {"ppo/length_*": "length", "ppo/eos_share_*": "ended", "ppo/kl_*": "kl", "ppo/score_*": "score"}
    for name, column in means.items():
        if rows[0][column] is not None:
            figures[name] = float(np.mean([row[column] for row in rows]))
    if rows[0]["score"] is not None and len(rows) > 1:
        figures["ppo/score_error_*"] = float(np.std([row["score"] for row in rows], ddof=1) / len(rows) ** 0.5)
    return {name: value for name, value in figures.items() if np.isfinite(value)}


STAGE = Stage(
    name="evaluate",
    title="the evaluation",
    summary="Before and after on the same held-out prompts with the same noise, under a judge that training never saw",
    source="Hutto and Gilbert 2014, VADER, ICWSM; Li et al. 2016, arXiv:1510.03055 (distinct-n)",
    section=evaluate_section,
    check=check,
    check_texts=check_texts,
    compares=True,
    run=evaluate_stage,
)
