"""The evaluation stage: the model before and after, on the same held-out prompts with the same noise."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import init_from
from lfjax.loops.ppo import Policy, fetch, make_reward, prompt_batches, texts
from lfjax.loops.run import Run
from lfjax.loops.supervised import texts_of
from lfjax.rewards import diversity, lexicon
from lfjax.sharding import Step, batch_sharding, jit_step, place
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
    policies["after"].rollout = policies["before"].rollout  # of the same shape: one program writes for both
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
        temperature=run.config.ppo.rollout_step.temperature,
        chunk_size=run.config.ppo.update_step.chunk_size,
    )

    def logprobs(params, ref_params, g: Generation):
        fields = (g.prompts, g.prompt_mask, g.tokens, g.mask)
        own, ref = (stats(p, *fields).logprobs for p in (params, ref_params))
        return jnp.where(g.mask, own, 0.0), jnp.where(g.mask, ref, 0.0)

    return jit_step(logprobs, name="evaluate logprobs")


def _write(run: Run, policy: Policy, reference, measure: Step, reward) -> dict[str, Any]:
    """Samples of one model on the held-out prompts, and what can be said of them."""
    section = run.config.evaluate
    records = held_out_records(run)
    batches = prompt_batches(run, records, section.batch_size)
    key = run.key("evaluate")
    parts = []
    for indices, whole in batches.evaluation():
        prompts = place(whole, batch_sharding(run.mesh))
        # the same key for every batch: row ids are global, so no two rows share their noise
        generation = policy.rollout.fixed(policy.params, prompts, key, np.int32(0))
        own, ref = measure.fixed(policy.params, reference, generation)
        scores = None if reward is None else reward(generation, [records[i] for i in indices])
        parts.append((generation, own, ref, own[:, 0] * 0 if scores is None else scores))
    generation, own, ref, scores = jax.tree.map(
        lambda *x: np.concatenate([np.asarray(y) for y in x])[: section.prompts], *fetch(run, parts)
    )
    return _describe(run, generation, own, ref, scores if reward is not None else None)


def _describe(run: Run, generation: Generation, own, ref, scores) -> dict[str, Any]:
    prompts, responses = texts(run, generation)
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    kl = (own - ref).sum(axis=1)
    length = generation.mask.sum(axis=1)
    last = np.take_along_axis(np.asarray(generation.tokens), np.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    figures = {
        "judge/positive_*": lexicon.positive_share(whole),
        "judge/positive_response_*": lexicon.positive_share(responses),
        "diversity/distinct2_*": diversity.matched_distinct2(responses),
        "diversity/unique_*": diversity.unique_share(responses),
        "ppo/length_*": float(length.mean()),
        "ppo/eos_share_*": float((last == run.tokenizer.eos_id).mean()),
        "ppo/kl_*": float(kl.mean()),
    }
    if scores is not None:
        figures["ppo/score_*"] = float(np.mean(scores))
    compound = lexicon.compound_scores(whole)
    rows = [
        {
            "prompt": prompts[i],
            "response": responses[i],
            "score": None if scores is None else float(scores[i]),
            "logprob": float(own[i].sum()),
            "kl": float(kl[i]),
            "length": int(length[i]),
            "judge": float(compound[i]),
        }
        for i in range(len(prompts))
    ]
    return {"figures": {name: value for name, value in figures.items() if np.isfinite(value)}, "rows": rows}
