"""The reward stage: a model that predicts what people say of a text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import init_from
from lfjax.data.batching import RewardBatches
from lfjax.data.examples import RewardExample, reward_examples
from lfjax.data.sources import label_scale, ordinal_bounds
from lfjax.loops.run import Run
from lfjax.loops.supervised import (
    compiled_step,
    compute_settings,
    create_state,
    passes,
    total_steps,
    training_parts,
)
from lfjax.loops.training import train
from lfjax.models import lora
from lfjax.models.encoder import EncoderConfig
from lfjax.models.flops import forward_flops
from lfjax.models.network import initialise
from lfjax.records import mean_ratings
from lfjax.rewards import baselines, calibration, lexicon
from lfjax.sharding import abstract, global_batch, jit_step, replicated
from lfjax.state import RewardState
from lfjax.steps.reward import model_params
from lfjax.types import RewardBatch


def reward_stage(run: Run) -> dict[str, float]:
    """Trains from the language model; figures are on held-out answers at least `min_gap` rating points apart.

    Where `center_ratings`, a score says rating points above the training split's mean, reward/rating_mean: the head
    has no bias that could learn it. Gaps, pairs and their figures are the same.
    """
    section = run.config.reward
    rows = {
        "batch_size": section.batch_size,
        "buckets": tuple(section.buckets),
        "pad_id": run.tokenizer.pad_id,
        "seed": run.config.seed,
    }
    options = {"max_length": section.seq_len, "scale": run.rating_scale or (0.0, 1.0)}
    splits = ("train", "validation", "test")
    counts = {split: Counter() for split in splits}
    sets = {s: reward_examples(run.records[s], run.tokenizer, **options, counts=counts[s]) for s in splits}
    if equal := counts["train"]["equal_pairs"]:
        run.note("reward", f"{equal} pairs of training answers are equal, or equal once cut, and are left out")
    cut_share = run.cut_share("reward", counts["train"]["cut"], counts["train"]["answers"])
    mean = rating_mean(sets["train"]) if section.center_ratings else None
    sets = {split: shifted(found, mean or 0.0) for split, found in sets.items()}
    most = section.max_candidates or max(len(e.candidates) for found in sets.values() for e in found)
    sets = {split: RewardBatches(found, max_candidates=most, **rows) for split, found in sets.items()}
    batches = sets["train"]
    total = total_steps(section, batches.steps_per_epoch)

    model, params = reward_model(run)
    keywords = section.step.to_dict()
    if bounds := ordinal_bounds(section.step, run.rating_scale or label_scale(run.records.train)):
        keywords["ordinal_bounds"] = tuple(bound - (mean or 0.0) for bound in bounds)
        params = with_cutpoints(run, params, keywords["ordinal_bounds"])
    tx, rate = training_parts(run, "reward", total, model)
    trained, base = run.trained_part("reward", params, model.config, "reward-lora")
    state, shardings = create_state(run, RewardState, trained, tx)
    function = functools.partial(run.steps["reward"], tx=tx, **keywords)
    first = one_of_each(batches)
    step = compiled_step(run, "reward", function, model, base, state, shardings, first.values())
    score = scorer(run, model, base)

    def figures(state, split: str = "validation", prefix: str = "reward/validation_") -> dict[str, float]:
        scores = score(model_params(state.params), sets[split], last=split == "test")
        return pair_figures(scores, sets[split].examples, section.min_gap, prefix)

    state, out = train(
        run,
        "reward",
        state,
        lambda state, index: step(state, batches.batch_at(index)),
        total=total,
        tokens_per_step=float(np.mean([np.prod(shape) for shape in first])),
        flops_per_step=passes(run, "reward")
        * float(np.mean([np.prod(s) * forward_flops(model.config, s[-1]) for s in first])),
        evaluate=figures,
        learning_rate=rate,
    )
    run.save_model("reward", model, model_params(state.params), base)
    out["reward/train_pair_accuracy"] = out.pop("reward/pair_accuracy", 0.0)
    out["reward/cut_share"] = cut_share
    for split, prefix in zip(splits, ("train_", "validation_", ""), strict=True):
        out[f"reward/{prefix}equal_pairs"] = float(counts[split]["equal_pairs"])
    if mean is not None:
        out["reward/rating_mean"] = mean
    return out | figures(state, "test", "reward/") | reward_baselines(run)


def one_of_each(batches: RewardBatches) -> dict[tuple[int, ...], RewardBatch]:
    """For every shape of an epoch's batches the first of it: what a step is compiled for."""
    first: dict[tuple[int, ...], RewardBatch] = {}
    for index in range(batches.steps_per_epoch):
        batch = batches.batch_at(index)
        first.setdefault(batch.tokens.shape, batch)
        if len(first) == len(batches.bucket_shapes):
            break
    return first


def rating_mean(examples: list[RewardExample]) -> float | None:
    """The mean over every rated answer; None where nothing is rated."""
    ratings = [r for example in examples for r in example.ratings if r is not None]
    return math.fsum(ratings) / len(ratings) if ratings else None


def shifted(examples: list[RewardExample], mean: float) -> list[RewardExample]:
    """The examples with `mean` taken from every rating; the given ones are not changed."""
    return [
        dataclasses.replace(example, ratings=[None if r is None else r - mean for r in example.ratings])
        for example in examples
    ]


def with_cutpoints(run: Run, params, bounds: tuple[float, ...]):
    """The parameters with the ordinal loss's cutpoints in the head, at the bounds: scores start as rating points."""
    cutpoints = run.place({"head": {"cutpoints": np.asarray(bounds, np.float32)}})["head"]
    return {**params, "head": {**params["head"], **cutpoints}}


def reward_model(run: Run):
    """The language model's (or encoder's) trunk with a fresh head, or a reward model to go on from."""
    section = run.config.reward
    loaded = run.load_model("reward.init_from", init_from(run.config, "reward"))
    return with_head(run, loaded, "reward", 1, dropout=section.dropout, zero=section.head_init != "normal")


def with_head(run: Run, loaded, stage: str, num_labels: int, *, dropout: float, zero: bool = False):
    """(model, parameters on the mesh): the loaded trunk with a head of so many scores, fresh where it has none such.

    An encoder's head gets a pooler below it. Source of the head's init: Stiennon et al. 2020, appendix B.
    """
    config = compute_settings(run, loaded.model.config, num_labels=num_labels, dropout=dropout)
    if isinstance(config, EncoderConfig) and loaded.model.config.num_labels == 0:
        config = dataclasses.replace(config, pooler=True)
    model, table = run.network(config), config.parameters()
    params = {name: group for name, group in loaded.params.items() if name != "unembed"}
    if "head" not in params or params["head"]["kernel"].shape[-1] != num_labels:
        kernel = jax.random.normal(run.key(f"{stage}-head"), (config.width, num_labels)) / np.sqrt(config.width + 1)
        params["head"] = {name: np.zeros(shape, np.float32) for name, (shape, _) in table["head"].items()}
        params["head"]["kernel"] = np.asarray(jnp.zeros_like(kernel) if zero else kernel)
    if "pooler" in table and "pooler" not in params:
        params["pooler"] = jax.tree.map(np.asarray, initialise(run.key(f"{stage}-pooler"), table["pooler"]))
    return model, run.place(params)


def scorer(run: Run, model, base=None, *, stage: str = "reward", each: int = 1):
    """(params, RewardBatches) -> per example a float array of its candidates' scores, `each` a candidate in a row.

    With `last` (an evaluation after the last checkpoint of the stage) a stop is looked after every batch.
    """
    how = run.lora_of(stage)

    def scores_of(params, tokens, mask, base):
        return lora.bind(model, base, how).apply({"params": params}, tokens, attention_mask=mask)

    step = jit_step(scores_of, name=f"{stage} score", out_shardings=replicated(run.mesh))

    def score(params, batches: RewardBatches, *, last: bool = False) -> list[np.ndarray]:
        pieces = []
        for indices, batch in batches.evaluation():
            flat = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask)]
            tokens, mask = global_batch(flat, run.mesh)
            step.compile(*abstract((params, tokens, mask, base)))
            pieces.append((indices, step(params, tokens, mask, base)))
            if last:
                jax.block_until_ready(pieces[-1][1])
                run.leave_if_asked(stage)
        scores = [np.zeros(0)] * len(batches.examples)
        for indices, values in jax.device_get(pieces):
            for index, row in zip(indices, values.reshape(len(indices), -1), strict=True):
                if index >= 0:
                    scores[index] = row[: each * len(batches.examples[index].candidates)]
        return scores

    return score


def pair_figures(scores, examples, min_gap: float, prefix: str) -> dict[str, float]:
    """Pair accuracy by ratings over all examples, and within records by ranks where people gave any.

    calibration_error is that of the pairs by ratings, or by ranks where there are none; so is pair_accuracy.
    """
    rated = [
        (s, r)
        for row, e in zip(scores, examples, strict=True)
        for s, r in zip(row, e.ratings, strict=True)
        if r is not None
    ]
    out = {}
    if rated:
        values, ratings = (np.asarray(column, np.float64) for column in zip(*rated, strict=True))
        accuracy, pairs = baselines.pair_accuracy(values, ratings, min_gap)
        out |= {f"{prefix}pair_accuracy": accuracy, f"{prefix}pairs": float(pairs)}
        out[f"{prefix}mse"] = float(np.mean((values - ratings) ** 2))
        out[f"{prefix}rating_slope"] = calibration.rating_slope(values, ratings)
        apart = calibration.rated_differences(values, ratings, min_gap)
        out[f"{prefix}calibration_error"] = calibration.calibration_error(apart)
    ranked = [(row, [np.nan if r is None else r for r in e.ranks]) for row, e in zip(scores, examples, strict=True)]
    differences = [
        float(row[i] - row[j])
        for row, ranks in ranked
        for i in range(len(ranks))
        for j in range(len(ranks))
        if ranks[i] < ranks[j]
    ]
    if differences:
        accuracy = float(np.mean(np.heaviside(differences, 0.5)))  # equal scores are half right
        out |= {f"{prefix}ranked_pair_accuracy": accuracy, f"{prefix}ranked_pairs": float(len(differences))}
        if not out.get(f"{prefix}pairs"):
            out[f"{prefix}pair_accuracy"] = accuracy
            out[f"{prefix}calibration_error"] = calibration.calibration_error(np.array(differences))
    return out


def reward_baselines(run: Run) -> dict[str, float]:
    """What a lexicon and a ridge regression on words reach on the same test pairs."""
    split = {
        name: [
            (r.prompt_text + r.responses[i], v) for r in getattr(run.records, name) for i, v in mean_ratings(r).items()
        ]
        for name in ("train", "test")
    }
    if not all(split.values()):
        return {}
    (texts, ratings), (test_texts, test_ratings) = (tuple(zip(*split[name], strict=True)) for name in ("train", "test"))
    truth = np.asarray(test_ratings)
    gap = run.config.reward.min_gap
    guesses = {
        "lexicon": lexicon.compound_scores(test_texts),
        "ridge": baselines.ridge_scores(texts, ratings, test_texts),
    }
    return {
        f"reward/pair_accuracy_{name}": baselines.pair_accuracy(guess, truth, gap)[0] for name, guess in guesses.items()
    }
