"""The evaluation stage: the model before and after, on the same held-out prompts with the same noise."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lfjax.config import Config, InputError, at_least, sampling_section, section
from lfjax.modules import is_named
from lfjax.records import Record
from lfjax.rewards.intervals import SHARE, without
from lfjax.rewards.judges import FEWEST, RatingJudge, fit_rating_judge, judged_text
from lfjax.run import writing
from lfjax.run.data import Data, say
from lfjax.run.devices import fetch
from lfjax.run.rewards import FunctionReward
from lfjax.run.run import Run
from lfjax.run.sections import check_sampling, sampling_overrides
from lfjax.run.stage import LANGUAGE_MODEL, SCORER, Stage
from lfjax.run.writing import Policy, texts
from lfjax.sharding import Step, global_batch, jit_step
from lfjax.stages.comparison import LEXICON, figures_of, judged, people_positive
from lfjax.stages.rollouts import STEPS, policy_of, prompt_shapes, reward_of, writable
from lfjax.steps.ppo_forward import response_stats
from lfjax.tokenizers import stop_ids
from lfjax.types import Generation

RIDGE = "ridge"  # the judge that is fitted to held-out ratings
Judge = Callable[[Generation, Sequence[Record]], Any]  # (responses, what they answer) -> scores [B]


def evaluate_section() -> Config:
    """The keys of the stage."""
    return section(
        prompts=512,  # of the test split; where it has fewer they come again, with other noise
        batch_size=128,
        chunk_size=64,  # positions of a row at which log-probabilities are computed at once
        samples=24,  # rows of samples.jsonl a model
        judges=(),  # "lexicon", "ridge", a scorer's stage or folder, "module:function"; (): what training never saw
        sampling=sampling_overrides(),
    )


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """Prompts fit the buckets, and what stops a response is a token each. Raises InputError."""
    writing.check_texts(sampling_section(config, "evaluate"), data.records, "test", tokenizer, config.data.too_long)


def check(config: Config) -> None:
    """There is something to compare, by judges of different names. Raises InputError."""
    at_least(config, 0, "evaluate.samples")
    at_least(config, 1, "evaluate.prompts", "evaluate.batch_size", "evaluate.chunk_size")
    if len(compared(config)) < 2:
        raise InputError(
            'config.stages: "evaluate" compares before and after; it needs a stage before it that makes a language'
            " model of another"
        )
    judges = config.evaluate.judges
    if not all(isinstance(judge, str) and judge for judge in judges) or len({*map(slug, judges)}) < len(judges):
        raise InputError(f'config.evaluate.judges: {judges}; give names that differ, such as ("lexicon",)')
    check_sampling(config, "evaluate", whole=False)


def compared(config: Config) -> dict[str, tuple[str, str]]:
    """(config key, stage or folder) of every language model: "before", each stage's between, "after".

    "before" is what the run's first language model started from, or that model itself where it was made new.
    """
    from lfjax.stages import declared

    stages = declared(config.outside)
    chain = config.stages[: config.stages.index("evaluate")]
    made = [stages[name] for name in chain if stages[name].makes == LANGUAGE_MODEL]
    found = [(stage.start(config, stages)[0] or "stages", stage.name) for stage in made]
    if made and (start := made[0].start(config, stages))[1]:
        found.insert(0, (start[0], str(start[1])))
    names = ["before", *(name for _, name in found[1:-1]), "after"]
    return dict(zip(names, found, strict=False))


def own_starts(config: Config, models: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Which of the models each one was made of, where that is another than the run's start."""
    from lfjax.stages import declared

    stages, places = declared(config.outside), {name: which for which, (_, name) in models.items()}
    starts = {which: stages[name].start(config, stages)[1] for which, (_, name) in models.items() if name in stages}
    found = {which: places.get(str(start), "before") for which, start in starts.items() if which != "before"}
    return {which: start for which, start in found.items() if start != "before"}


def judges_named(config: Config) -> tuple[str, ...]:
    """`evaluate.judges`; where none is named, the scorers of the chain that training was not towards, and "ridge".

    "ridge" is fitted to the held-out ratings; without any, it judges only where a config names it, which is an error.
    """
    from lfjax.stages import declared

    if config.evaluate.judges or "evaluate" not in config.stages:
        return tuple(config.evaluate.judges)
    stages, chain = declared(config.outside), config.stages[: config.stages.index("evaluate")]
    towards = config.ppo.reward if "ppo" in config.stages else ""
    return (*(s for s in chain if stages[s].makes == SCORER and s != towards), RIDGE)


def check_data(config: Config, data: Data) -> None:
    """Raises InputError where a judge that the config names has too little to learn from."""
    if RIDGE in config.evaluate.judges and rating_judge(data) is None:
        raise InputError(
            f'config.evaluate.judges: "{RIDGE}" is fitted to the ratings of the validation and test splits, of which it'
            f" needs {FEWEST} that are not all equal; leave it out, or hold out more records"
        )


def rating_judge(data: Data) -> RatingJudge | None:
    """The judge that is fitted to the held-out ratings; None where they are too few."""
    records = [*data.records.validation, *data.records.test]
    return fit_rating_judge(records, data.rating_scale) if data.rating_scale else None


def sources(config: Config) -> dict[str, str]:
    """The judges that are models."""
    named = {f"evaluate.judges[{i}]": judge for i, judge in enumerate(judges_named(config))}
    return {key: judge for key, judge in named.items() if judge not in (LEXICON, RIDGE) and not is_named(judge)}


def functions(config: Config) -> dict[str, str]:
    """The judges that are Python functions."""
    return {f"evaluate.judges[{i}]": judge for i, judge in enumerate(config.evaluate.judges) if is_named(judge)}


def slug(judge: str) -> str:
    """A judge's name in figures."""
    return re.sub(r"[^\w.+-]+", "_", judge.rstrip("/").rpartition("/")[2])


def evaluate_stage(run: Run) -> dict[str, float]:
    """Figures named x_before, x_<stage> and x_after, on `evaluate.prompts` prompts of the test split.

    x_change is after less before, and judge/<judge>_won, ppo/score_won the share of prompts whose answer after has the
    higher score, ties half; both are paired. Judges of texts read prompt + response, but a chat's response alone, as
    they read people's own sentences for judge/positive_human; `judge/positive_response_*` are of the response alone.
    Scores are PPO's reward's own, raw; another judge's mean is judge/<judge>_*. KL is from the run's start,
    `ppo/kl_own*` from the model that the stage itself started from.
    """
    models = compared(run.config)
    policies = {which: policy_of(run, key, name, "evaluate") for which, (key, name) in models.items()}
    starts = own_starts(run.config, models)
    reward = (
        reward_of(run, "ppo.reward", run.config.ppo.reward)
        if "ppo" in run.stages[: run.stages.index("evaluate")]
        else None
    )
    judges, figures = judges_of(run)
    named = [*(LEXICON for judge in judges_named(run.config) if judge == LEXICON), *judges]
    records, too_long = writable(run, "evaluate", "test")
    records = held_out_records(records, run.config.evaluate.prompts)
    rows = {}
    run.log.cut(run.stages, "evaluate", -1)
    for which, policy in policies.items():
        run.stage("evaluate").check_room(run.config, policy.model.config.context, f"the context of {models[which][1]}")
        say("evaluate", f"{models[which][1]} ({which}) writes {run.config.evaluate.prompts} answers")
        references = {"kl": policies["before"]} | ({"kl_own": policies[starts[which]]} if which in starts else {})
        rows[which] = _write(run, records, policy, references, reward, judges, named)
    figures |= figures_of(rows, records, named)
    figures |= {f"judge/{name}_trained_on": 1.0 for name in trained_on(run.config, run.source)}
    figures |= people_positive(run.records.test) if LEXICON in named else {}
    run.log.metrics("evaluate", 0, without(figures))
    for which in ("before", *(which for which in models if which not in ("before", "after")), "after"):
        shown = rows[which][: run.config.evaluate.samples]
        run.log.samples("evaluate", 0, [{**row, "set": which} for row in shown])
    return figures | too_long


def judges_of(run: Run) -> tuple[dict[str, Judge], dict[str, float]]:
    """(name in figures -> what scores, of all but the lexicon; how well the judge that is fitted here does)."""
    named = functions(run.config) | sources(run.config)
    found: dict[str, Judge] = {slug(judge): reward_of(run, key, judge) for key, judge in named.items()}
    judge = rating_judge(run.data) if RIDGE in judges_named(run.config) else None
    if judge is None:
        return found, {}

    def ratings(prompts, responses, records):
        texts = [judged_text(*row) for row in zip(records, prompts, responses, strict=True)]
        return judge.ratings_of(texts)

    found[RIDGE] = FunctionReward(run.devices, run.tokenizer, ratings, where=f"the judge {RIDGE!r}")
    told = judge.accuracy.figures(f"judge/{RIDGE}_pair_accuracy", SHARE)
    return found, {**told, f"judge/{RIDGE}_min_gap": judge.gap}


def trained_on(config: Config, source: Callable[[str, str], Path]) -> set[str]:
    """Names in figures of the judges that training has learnt to please: PPO's reward, by whatever path it is named.

    Args:
      source: (config key, stage or folder) -> the model's folder.
    """
    if "ppo" not in config.stages:
        return set()
    reward = config.ppo.reward
    found = {judge for judge in functions(config).values() if judge == reward}
    if not is_named(reward):
        folder = source("ppo.reward", reward)
        found |= {judge for key, judge in sources(config).items() if source(key, judge).samefile(folder)}
    return {*map(slug, found)}


def held_out_records(records: Sequence[Record], count: int) -> list[Record]:
    """So many records in the order of a hash, so that every source has its share.

    Where there are fewer, they come again, each time with noise of their own.
    """
    order = sorted(records, key=lambda r: hashlib.sha256(repr((r.prompt_text, r.responses)).encode()).digest())
    return [order[i % len(order)] for i in range(count)]


def _logprobs(run: Run, own: Policy, other: Policy) -> Step:
    """(params, the other's params, generation) -> log-probabilities [B R] under both, 0 beyond the response."""
    config = run.config
    options = {
        "temperature": sampling_section(config, "evaluate").temperature,
        "chunk_size": config.evaluate.chunk_size,
    }

    def logprobs(params, other_params, g: Generation):
        fields = (g.prompts, g.prompt_mask, g.tokens, g.mask)
        pairs = ((own.model, params), (other.model, other_params))
        found = (response_stats(model, p, *fields, **options).logprobs for model, p in pairs)
        return tuple(jnp.where(g.mask, x, 0.0) for x in found)

    return run.devices.program(
        ("evaluate logprobs", own.model.config, other.model.config),
        lambda: jit_step(logprobs, name="evaluate logprobs", shapes=prompt_shapes(config)),
    )


def _write(
    run: Run, records: list[Record], policy: Policy, references: Mapping[str, Policy], reward, judges,
    named: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Samples of one model on the records' prompts, as rows of samples.jsonl; looks after a stop every batch.

    Args:
      references: column -> the model from which the KL in it is. named: `judges` and the lexicon, in their order.
    """
    key = run.devices.key("evaluate")
    rows: list[dict[str, Any]] = [{}] * len(records)
    sampling = sampling_section(run.config, "evaluate")
    options = {"batch_size": run.config.evaluate.batch_size, "seed": run.config.seed}
    options["cut"] = run.config.data.too_long == "cut"
    stops = stop_ids(run.tokenizer, sampling.stop, "config.sampling.stop")
    measures = {column: _logprobs(run, policy, other) for column, other in references.items()}
    for indices, whole in writing.prompt_batches(sampling, records, run.tokenizer, **options).evaluation():
        prompts = global_batch(whole, run.devices.mesh)
        # the same key for every batch: row ids are global, so no two rows share their noise
        generation = policy.rollout(policy.params, prompts, key, np.int32(0))
        logprobs = {c: measure(policy.params, references[c].params, generation) for c, measure in measures.items()}
        asked = [records[i] for i in indices]
        scores = {name: judge(generation, asked) for name, judge in judges.items()}
        scores |= {"score": reward(generation, asked)} if reward else {}
        part = _rows(run.tokenizer, stops, *fetch((generation, logprobs, scores)))
        part = [judged(row, record, named) for row, record in zip(part, asked, strict=True)]
        for index, row in zip(indices, part, strict=True):
            if index >= 0:
                rows[index] = row
        run.leave_if_asked("evaluate")
    return rows


def _rows(tokenizer, stops: tuple[int, ...], generation: Generation, logprobs, scores) -> list[dict[str, Any]]:
    """A row of samples.jsonl for each response; logprob and kl are sums over the response, in nats.

    Args:
      logprobs: column of a KL -> log-probabilities [B R] under the model and under the other.
      scores: column -> [B].
    """
    length = np.asarray(generation.mask).sum(axis=1)
    last = np.take_along_axis(np.asarray(generation.tokens), np.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    prompts, responses = texts(tokenizer, generation)
    return [
        {
            "prompt": prompt,
            "response": response,
            "score": None,
            **{column: float(values[i]) for column, values in scores.items()},
            "logprob": float(logprobs["kl"][0][i].sum()),
            **{column: float((own[i] - other[i]).sum()) for column, (own, other) in logprobs.items()},
            "length": int(length[i]),
            "ended": int(last[i]) in stops,
        }
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


STAGE = Stage(
    name="evaluate",
    title="the evaluation",
    summary="Before and after on the same held-out prompts with the same noise, under a judge that training never saw",
    source="Hutto and Gilbert 2014, VADER, ICWSM; Li et al. 2016, arXiv:1510.03055 (distinct-n)",
    section=evaluate_section,
    check=check,
    check_data=check_data,
    check_texts=check_texts,
    steps=STEPS,
    sources=sources,
    scorers=lambda config: tuple(sources(config)),
    functions=functions,
    longest=lambda config: writing.longest(sampling_section(config, "evaluate")),
    compares=True,
    run=evaluate_stage,
)
