"""The evaluation stage: the model before and after, on the same held-out prompts with the same noise."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from lfjax.config import init_from
from lfjax.loops.ppo import Policy, fetch, make_reward, prompt_batches, prompt_shapes, texts
from lfjax.loops.run import Run
from lfjax.loops.supervised import texts_of
from lfjax.rewards import diversity, lexicon
from lfjax.sharding import Step, global_batch, jit_step
from lfjax.steps.ppo_forward import response_stats
from lfjax.types import Generation


def evaluate_stage(run: Run) -> dict[str, float]:
    """Figures named x_before and x_after, on `evaluate.prompts` prompts of the test split.

    The judge (the VADER lexicon) reads prompt + response, as it reads people's own sentences for
    judge/positive_human; `judge/positive_response_*` are of the response alone. Scores are the reward's own, raw.
    """
    before = run.stages[: run.stages.index("evaluate")]
    after = "ppo" if "ppo" in before else "sft"  # the config was checked for one of them
    names = {"before": init_from(run.config, after), "after": after}
    policies = {which: Policy(run, f"{after}.init_from", name) for which, name in names.items()}
    measure = _logprobs(run, policies["before"].model)
    reward = make_reward(run) if after == "ppo" else None
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


def held_out_records(run: Run) -> list:
    """`evaluate.prompts` test records in the order of a hash, so that every source has its share.

    Where there are fewer, they come again, each time with noise of their own.
    """
    order = sorted(run.records.test, key=lambda r: hashlib.sha256(repr((r.prompt_text, r.responses)).encode()).digest())
    return [order[i % len(order)] for i in range(run.config.evaluate.prompts)]


def _logprobs(run: Run, model) -> Step:
    """(params, reference params, generation) -> log-probabilities [B R] under both, 0 beyond the response."""
    stats = functools.partial(
        response_stats,
        model,
        temperature=run.config.ppo.rollout_step.get("temperature", 1.0),
        chunk_size=run.config.ppo.update_step.get("chunk_size", 64),
    )

    def logprobs(params, ref_params, g: Generation):
        fields = (g.prompts, g.prompt_mask, g.tokens, g.mask)
        own, ref = (stats(p, *fields).logprobs for p in (params, ref_params))
        return jnp.where(g.mask, own, 0.0), jnp.where(g.mask, ref, 0.0)

    return jit_step(logprobs, name="evaluate logprobs", shapes=prompt_shapes(run))


def _write(run: Run, policy: Policy, reference, measure: Step, reward) -> dict[str, Any]:
    """Samples of one model on the held-out prompts, and what can be said of them; looks after a stop every batch."""
    records = held_out_records(run)
    key = run.key("evaluate")
    rows: list[dict[str, Any]] = [{}] * len(records)
    for indices, whole in prompt_batches(run, records, run.config.evaluate.batch_size).evaluation():
        prompts = global_batch(whole, run.mesh)
        # the same key for every batch: row ids are global, so no two rows share their noise
        generation = policy.rollout(policy.params, prompts, key, np.int32(0))
        own, ref = measure(policy.params, reference, generation)
        scores = reward(generation, [records[i] for i in indices]) if reward else own[:, 0]
        part = _rows(run, *fetch(run, (generation, own, ref, scores)))
        for index, row in zip(indices, part, strict=True):
            if index >= 0:
                rows[index] = row if reward else {**row, "score": None}
        run.leave_if_asked("evaluate")
    return {"figures": _figures(rows), "rows": rows}


def _rows(run: Run, generation: Generation, own, ref, scores) -> list[dict[str, Any]]:
    """A row of samples.jsonl for each response; logprob and kl are sums over the response, in nats."""
    length = np.asarray(generation.mask).sum(axis=1)
    last = np.take_along_axis(np.asarray(generation.tokens), np.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    prompts, responses = texts(run, generation)
    return [
        {
            "prompt": prompt,
            "response": response,
            "score": float(scores[i]),
            "logprob": float(own[i].sum()),
            "kl": float((own[i] - ref[i]).sum()),
            "length": int(length[i]),
            "ended": int(last[i]) in run.stop_ids,
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
