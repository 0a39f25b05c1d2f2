"""The reward stage: a model that predicts what people say of a text."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter

import numpy as np

from lfjax.config import Config, InputError, at_least, leaf, one_of, optim_section, section
from lfjax.data.batching import RewardBatches
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import RewardExample, is_judged, judged_texts, reward_examples
from lfjax.data.sources import label_scale, ordinal_bounds
from lfjax.models.flops import forward_flops
from lfjax.records import Edit, Preference, Ranking, mean_ratings, mean_values
from lfjax.report.catalogue import Figure
from lfjax.rewards import baselines, calibration, lexicon
from lfjax.run import training
from lfjax.run.data import Data, note
from lfjax.run.devices import Devices
from lfjax.run.heads import one_of_each, scorer, with_head
from lfjax.run.parts import compiled_step, create_state, optimizer, passes, total_steps, trained_part
from lfjax.run.run import Run
from lfjax.run.sections import training as training_section
from lfjax.run.stage import SCORER, Stage, Step, start_from
from lfjax.state import RewardState
from lfjax.steps.reward import model_params

# What the losses of the reward step learn from: the values of ratings, pairs by either, the order of answers.
RATING_LOSSES = ("regression", "every_token", "ordinal")
PAIR_LOSSES = ("bradley_terry", "hinge")
ORDER_LOSSES = ("listwise_hinge", "plackett_luce", "softmax")
LOSSES = ("regression", "every_token", *PAIR_LOSSES, *ORDER_LOSSES, "ordinal")
STEP = "lfjax.steps.reward:reward_step"


def reward_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # stage or model folder; "auto": the last earlier stage that makes a language model
        seq_len=128,
        buckets=(32, 64, 128),  # sequence lengths, each compiled once
        max_candidates=0,  # answers a record that are read, the best ranked first; 0: as many as there are
        dropout=0.0,
        center_ratings=True,  # learn ratings less the training mean (reward/rating_mean): the head has no bias
        min_gap=1.0,  # figures: rating points between the held-out answers of a pair that counts; as step.min_gap
        head_init="normal",  # "normal": std 1/sqrt(D+1); "zero"
        step=section(
            regression=1.0,  # weights of the losses; 0 leaves one out
            every_token=0.0,
            bradley_terry=1.0,
            hinge=0.0,
            listwise_hinge=0.0,
            plackett_luce=0.0,
            softmax=0.0,
            centering=0.0,
            ordinal=0.0,  # above 0: classes of ratings, with learnt cutpoints
            ordinal_bounds=(),  # rating points between the classes; (): midway between the scale's whole points
            across_records=True,  # also pair answers of different records by their ratings
            min_gap=1.0,  # training: rating points between two answers that the pair losses take as a pair
            margin_scale=0.0,  # margin = this x rating gap
            num_microbatches=1,
        ),
    )


def check(config: Config) -> None:
    """Weights and gaps are at least 0, a loss is on, bounds of classes increase. Raises InputError."""
    one_of(config, "reward.head_init", ("normal", "zero"))
    at_least(config, 0, "reward.max_candidates", "reward.min_gap", "reward.step.min_gap", "reward.step.margin_scale")
    at_least(config, 0, *(f"reward.step.{name}" for name in (*LOSSES, "centering")))
    if config.steps.reward == STEP and not any(leaf(config, f"reward.step.{name}") for name in LOSSES):
        raise InputError(f"config.reward.step: every loss has weight 0; set one of {', '.join(LOSSES)} above 0")
    bounds = config.reward.step.get("ordinal_bounds", ())
    numbers = all(type(bound) in (int, float) and math.isfinite(bound) for bound in bounds)
    if not numbers or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise InputError(
            f"config.reward.step.ordinal_bounds: {bounds}; give increasing numbers in rating points, such as (1.5, 2.5)"
        )


def check_data(config: Config, data: Data) -> None:
    """Ratings are on one scale, with classes for an ordinal loss, and a loss learns from what training holds."""
    train, step = data.records.train, config.reward.step
    ordinal_bounds(step, data.rating_scale or label_scale(train))
    if config.steps.reward != STEP:
        return
    values = any(mean_values(record, (0.0, 1.0)) for record in train)
    orders = any(isinstance(e, (Ranking, Preference, Edit)) for r in train for e in r.feedback)
    fit = {*PAIR_LOSSES, *(RATING_LOSSES if values else ()), *(ORDER_LOSSES if orders else ())}
    if not any(step.get(name) for name in fit):
        held = " and ".join(["ratings"] * values + ["orders of answers"] * orders)
        raise InputError(
            f"config.reward.step: no loss of weight above 0 learns from {held}, and {data.file('train')} holds"
            f" nothing else for training; set one of {', '.join(sorted(fit))} above 0"
        )


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """In each split a pair of answers differs once cut. Raises InputError."""
    length = config.reward.seq_len
    for split in SPLITS:
        if not any(reward_examples([record], tokenizer, max_length=length) for record in data.records[split]):
            raise InputError(
                f"config.reward.seq_len: {length}; cut to so many tokens the answers of every pair of the {split}"
                " split are equal; raise it (with config.reward.buckets and config.model.context)"
            )


def reward_stage(run: Run) -> dict[str, float]:
    """Trains from the language model; figures are on held-out answers at least `min_gap` rating points apart.

    Where `center_ratings`, a score says rating points above the training split's mean, reward/rating_mean: the head
    has no bias that could learn it. Gaps, pairs and their figures are the same.
    """
    section, devices, adapters = run.config.reward, run.devices, run.adapters("reward")
    sets, mean, said = batches_of(run)
    batches = sets["train"]
    total = total_steps(section, batches.steps_per_epoch)

    loaded = run.load_model(*run.start("reward"))
    head = {"dropout": section.dropout, "zero": section.head_init != "normal"}
    model, params = with_head(devices, run.config.model, loaded, "reward", 1, **head)
    keywords = section.step.to_dict()
    if bounds := ordinal_bounds(section.step, run.data.rating_scale or label_scale(run.records.train)):
        keywords["ordinal_bounds"] = tuple(bound - (mean or 0.0) for bound in bounds)
        params = with_cutpoints(devices, params, keywords["ordinal_bounds"])
    recipe = optimizer(optim_section(run.config, "reward"), total, model)
    trained, base = trained_part(devices, adapters, params, model.config, "reward-lora")
    state, shardings = create_state(devices, RewardState, trained, recipe)
    function = functools.partial(run.steps["reward"], **keywords)
    first = one_of_each(batches)
    step = compiled_step(
        devices, "reward", function, recipe, model, base, state, shardings, first.values(), adapters=adapters
    )
    leave = functools.partial(run.leave_if_asked, "reward")
    score = scorer(devices, model, base, adapters=adapters, name="reward score", leave=leave)

    def figures(state, split: str = "validation", prefix: str = "reward/validation_") -> dict[str, float]:
        scores = score(model_params(state.params), sets[split], last=split == "test")
        return pair_figures(scores, sets[split].examples, section.min_gap, prefix)

    sizes = [(np.prod(shape), forward_flops(model.config, shape[-1])) for shape in first]
    state, out = training.train(
        run, "reward", state, lambda state, index: step(state, batches.batch_at(index)), total=total,
        tokens_per_step=float(np.mean([tokens for tokens, _ in sizes])),
        flops_per_step=passes(adapters) * float(np.mean([tokens * flops for tokens, flops in sizes])),
        evaluate=figures, learning_rate=recipe.rate,
    )  # fmt: skip
    run.save_model("reward", model, model_params(state.params), base)
    out["reward/train_pair_accuracy"] = out.pop("reward/pair_accuracy", 0.0)
    return out | said | figures(state, "test", "reward/") | reward_baselines(run.records, section.min_gap)


def batches_of(run: Run) -> tuple[dict[str, RewardBatches], float | None, dict[str, float]]:
    """(split -> batches, the mean taken from every rating, what is said of the data); mean None: nothing was taken."""
    section = run.config.reward
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    options = {"max_length": section.seq_len, "scale": run.data.rating_scale or (0.0, 1.0)}
    counts = {split: Counter() for split in SPLITS}
    found = {s: reward_examples(run.records[s], run.tokenizer, **options, counts=counts[s]) for s in SPLITS}
    if equal := counts["train"]["equal_pairs"]:
        note("reward", f"{equal} pairs of training answers are equal, or equal once cut, and are left out")
    said = {"reward/cut_share": run.cut_share("reward", counts["train"]["cut"], counts["train"]["answers"])}
    for split, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "")):
        said[f"reward/{prefix}equal_pairs"] = float(counts[split]["equal_pairs"])
    mean = rating_mean(found["train"]) if section.center_ratings else None
    if mean is not None:
        said["reward/rating_mean"] = mean
    found = {split: shifted(examples, mean or 0.0) for split, examples in found.items()}
    most = section.max_candidates or max(len(e.candidates) for examples in found.values() for e in examples)
    rows |= {"max_candidates": most, "pad_id": run.tokenizer.pad_id}
    return {split: RewardBatches(examples, **rows) for split, examples in found.items()}, mean, said


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


def with_cutpoints(devices: Devices, params, bounds: tuple[float, ...]):
    """The parameters with the ordinal loss's cutpoints in the head, at the bounds: scores start as rating points."""
    cutpoints = devices.place({"head": {"cutpoints": np.asarray(bounds, np.float32)}})["head"]
    return {**params, "head": {**params["head"], **cutpoints}}


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


def reward_baselines(records, min_gap: float) -> dict[str, float]:
    """What a lexicon and a ridge regression on words reach on the same test pairs."""
    split = {
        name: [(r.prompt_text + r.responses[i], v) for r in records[name] for i, v in mean_ratings(r).items()]
        for name in ("train", "test")
    }
    if not all(split.values()):
        return {}
    (texts, ratings), (test_texts, test_ratings) = (tuple(zip(*split[name], strict=True)) for name in ("train", "test"))
    truth = np.asarray(test_ratings)
    guesses = {
        "lexicon": lexicon.compound_scores(test_texts),
        "ridge": baselines.ridge_scores(texts, ratings, test_texts),
    }
    return {
        f"reward/pair_accuracy_{name}": baselines.pair_accuracy(guess, truth, min_gap)[0]
        for name, guess in guesses.items()
    }


STAGE = Stage(
    name="reward",
    title="the reward model",
    summary="A reward model from ratings, preferences, rankings, edits and labels, all in one batch",
    source="Bradley and Terry 1952, Biometrika 39; Ziegler et al. 2019, arXiv:1909.08593",
    section=reward_section,
    check=check,
    check_data=check_data,
    check_texts=check_texts,
    steps={"reward": Step(STEP, "reward.step")},
    learns_from="rating, ranking, preference, edit or label (true, false or a number)",
    teaches=is_judged,
    splits=SPLITS,
    texts=judged_texts,
    sources=start_from("reward"),
    heads=True,
    makes=SCORER,
    held_out=("pair_accuracy", "ranked_pair_accuracy", "mse", "calibration_error"),
    figures={
        "reward/loss": Figure("Loss", "sum of the losses on ratings and pairs", "lower", log=True),
        "reward/mse": Figure("Squared error", "rating points, squared", "lower"),
    },
    told="a reward model's training",
    run=reward_stage,
)
