"""The reward stage: a model that predicts what people say of a text."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import numpy as np
from ml_collections.config_dict import placeholder

from lfjax.config import Config, InputError, at_least, leaf, one_of, optim_section, section
from lfjax.data.batching import RewardBatches
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import is_judged, judged_texts, reward_examples
from lfjax.data.sources import label_scale
from lfjax.losses.ratings import least_gap
from lfjax.models.flops import step_work
from lfjax.records import Edit, Preference, Ranking, Record, mean_values
from lfjax.report.catalogue import Figure
from lfjax.rewards.intervals import prompt_keys
from lfjax.rewards.points import (
    Points,
    gap_of,
    rating_deviation,
    rating_mean,
    scaled_head,
    shifted,
    told_in_points,
)
from lfjax.run import training
from lfjax.run.data import Data, note
from lfjax.run.devices import Devices
from lfjax.run.heads import one_of_each, scorer, with_head
from lfjax.run.parts import compiled_step, create_state, optimizer, passes, total_steps, trained_part
from lfjax.run.run import Run
from lfjax.run.sections import training as training_section
from lfjax.run.stage import SCORER, Stage, Step, start_from
from lfjax.stages.reward_figures import beside_baselines, pair_estimates, reward_baselines, told
from lfjax.state import RewardState
from lfjax.steps.reward import model_params

# What the losses of the reward step learn from: the values of ratings, pairs by either, the order of answers.
RATING_LOSSES = ("regression", "every_token", "ordinal")
PAIR_LOSSES = ("bradley_terry", "hinge")
ORDER_LOSSES = ("listwise_hinge", "plackett_luce", "softmax")
LOSSES = ("regression", "every_token", *PAIR_LOSSES, *ORDER_LOSSES, "ordinal")
STEP = "lfjax.steps.reward:reward_step"
MOST_BOUNDS = 1000  # between classes of ratings


def reward_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # stage or model folder; "auto": the last earlier stage that makes a language model
        seq_len=128,
        buckets=(32, 64, 128),  # sequence lengths, each compiled once
        max_candidates=0,  # answers a record that are read, the best ranked first; 0: as many as there are
        dropout=0.0,
        center_ratings=True,  # learn ratings less the training mean (reward/rating_mean): the head has no bias
        rating_nats=1.65,  # nats of score that the ratings' deviation is in training (that of the rated sentences)
        min_gap=placeholder(float),  # figures: rating points between the held-out answers of a pair; as step.min_gap
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
            min_gap=placeholder(float),  # training: rating points between two answers of a pair; none: 1/8 of the scale
            margin_scale=0.0,  # margin = this x rating gap
            num_microbatches=1,
        ),
    )


def check(config: Config) -> None:
    """Weights and gaps are at least 0, a loss is on, bounds of classes increase. Raises InputError."""
    one_of(config, "reward.head_init", ("normal", "zero"))
    at_least(config, 1e-3, "reward.rating_nats")
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
    """Ratings are on one scale and differ, a loss learns from what training holds, and every split has a pair."""
    train, step = data.records.train, config.reward.step
    bounds = ordinal_bounds(step, scale_of(data))
    check_pairs(config, data)
    if config.steps.reward != STEP:
        return
    values, orders = values_of(train, scale_of(data)), any(map(has_orders, train))
    if bounds and values and len(set(np.searchsorted(bounds, values))) == 1:
        raise InputError(
            f"config.reward.step.ordinal_bounds: {bounds}; every rating of the training split lies in one class, from"
            f" {min(values):g} to {max(values):g}: give bounds between them"
        )
    fit = {*PAIR_LOSSES, *(RATING_LOSSES if values else ()), *(ORDER_LOSSES if orders else ())}
    if not any(step.get(name) for name in fit):
        held = " and ".join(["ratings"] * bool(values) + ["orders of answers"] * orders)
        raise InputError(
            f"config.reward.step: no loss of weight above 0 learns from {held}, and {data.file('train')} holds"
            f" nothing else for training; set one of {', '.join(sorted(fit))} above 0"
        )


def check_pairs(config: Config, data: Data) -> None:
    """Training ratings differ, and in every split two lie so far apart that they make a pair. Raises InputError."""
    own, scale = config.reward, scale_of(data)
    across = own.step.get("across_records") and any(own.step.get(name) for name in PAIR_LOSSES)
    gaps = {"train": ("step.min_gap", own.step.get("min_gap"), across)}
    gaps |= {split: ("min_gap", own.min_gap, True) for split in ("validation", "test")}

    def differ(records: list[Record]) -> bool:
        return any(map(has_orders, records)) or len(set(values_of(records, scale))) > 1

    for split, (key, given, needed) in gaps.items():
        values, gap = values_of(data.records[split], scale), gap_of(given, scale)
        if not values or any(map(has_orders, data.records[split])):
            continue
        spread = max(values) - min(values)
        if spread == 0:
            more = "texts that people rate differently" if split == "train" else "more records"
            raise InputError(
                f"stage reward: {data.file(split)}: all ratings of the {split} split ({len(values)}) are {values[0]:g},"
                f" so that there is nothing to {'learn' if split == 'train' else 'judge by'}; give {more}"
                f'{data.larger(split, differ)}, or leave "reward" out of config.stages'
            )
        if needed and spread < least_gap(gap):
            why = " (an eighth of the scale)" if given is None else ""
            raise InputError(
                f"config.reward.{key}: {gap:g}{why}; the ratings of the {split} split lie at most {spread:g} apart, so"
                f" that no two make a pair: set it to {spread / 2:.2g}, say"
            )


def scale_of(data: Data) -> tuple[float, float]:
    """The scale of the ratings, or that of the labels where nothing is rated."""
    return data.rating_scale or label_scale(data.records.train)


def rating_classes(scale: tuple[float, float]) -> tuple[float, ...]:
    """The bounds between the classes of a rating: midway between neighbouring whole points of its scale."""
    low, high = math.ceil(scale[0]), math.floor(scale[1])
    if not 1 <= high - low <= MOST_BOUNDS:
        raise InputError(
            f"config.reward.step.ordinal_bounds: (); the rating scale {list(scale)} has {max(high - low + 1, 0)} whole"
            f" points, and 2 to {MOST_BOUNDS + 1} can be classes; give the bounds between classes, in rating points"
        )
    return tuple(point + 0.5 for point in range(low, high))


def ordinal_bounds(step: Config, scale: tuple[float, float]) -> tuple[float, ...]:
    """The bounds that `config.reward.step` gives, or those of the scale; none where it has no ordinal loss."""
    if not step.get("ordinal") or "ordinal_bounds" not in step:
        return ()
    return tuple(step.ordinal_bounds) or rating_classes(scale)


def values_of(records: list[Record], scale: tuple[float, float]) -> list[float]:
    """The mean rating (or label) of every answer that has one."""
    return [value for record in records for value in mean_values(record, scale).values()]


def has_orders(record: Record) -> bool:
    """Whether somebody put answers into an order."""
    return any(isinstance(entry, (Ranking, Preference, Edit)) for entry in record.feedback)


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
    has no bias that could learn it. Gaps, pairs and their figures are the same. While it learns, a score is in nats,
    `rating_nats` for the deviation of the ratings, so that no loss depends on their scale; what is judged and saved
    is in the file's points.
    """
    section, devices, adapters = run.config.reward, run.devices, run.adapters("reward")
    sets, points, said = batches_of(run)
    batches, gap = sets["train"], said["reward/min_gap"]
    total = total_steps(section, batches.steps_per_epoch)

    loaded = run.load_model(*run.start("reward"))
    head = {"dropout": section.dropout, "zero": section.head_init != "normal"}
    model, params = with_head(devices, run.config.model, loaded, "reward", 1, **head)
    if loaded.model.config.num_labels == 1:  # a reward model's own head, whose scores are in points
        params = scaled_head(params, 1.0 / points.unit)
    keywords = step_keywords(section.step, scale_of(run.data), points)
    if keywords.get("ordinal_bounds"):
        params = with_cutpoints(devices, params, keywords["ordinal_bounds"])
    recipe = optimizer(optim_section(run.config, "reward"), total, model)
    trained, base = trained_part(devices, adapters, params, model.config, "reward-lora")
    state, shardings = create_state(devices, RewardState, trained, recipe)
    learn = told_in_points(run.steps["reward"], "reward/mse", points.unit)
    function = functools.partial(learn, **keywords)
    first = one_of_each(batches)
    step = compiled_step(
        devices, "reward", function, recipe, model, base, state, shardings, first.values(), adapters=adapters
    )
    leave = functools.partial(run.leave_if_asked, "reward")
    score = scorer(devices, model, base, adapters=adapters, name="reward score", leave=leave)

    def estimates(state, split: str):
        scores = score(scaled_head(model_params(state.params), points.unit), sets[split], last=split == "test")
        return pair_estimates(scores, sets[split].examples, gap, prompt_keys(run.records[split]), unit=points.unit)

    state, out = training.train(
        run, "reward", state, lambda state, index: step(state, batches.batch_at(index)), total=total,
        work=lambda index: step_work(model.config, batches.shape_at(index), passes(adapters)),
        evaluate=lambda state: told(*estimates(state, "validation"), "reward/validation_"), learning_rate=recipe.rate,
    )  # fmt: skip
    run.save_model("reward", model, scaled_head(model_params(state.params), points.unit), base)
    if "reward/pair_accuracy" in out:
        out["reward/train_pair_accuracy"] = out.pop("reward/pair_accuracy")
    found, pairs = estimates(state, "test")
    rivals = reward_baselines(run.records, gap)
    return out | said | told(found, pairs, "reward/") | beside_baselines(found.get("pair_accuracy"), rivals)


def batches_of(run: Run) -> tuple[dict[str, RewardBatches], Points, dict[str, float]]:
    """(split -> batches, ratings of training in nats, of the others in points above the mean; `Points`; figures)."""
    section = run.config.reward
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    options = {"max_length": section.seq_len, "scale": run.data.rating_scale or (0.0, 1.0)}
    said = {"reward/min_gap": gap_of(section.min_gap, scale_of(run.data))}
    counts = {split: Counter() for split in SPLITS}
    found = {s: reward_examples(run.records[s], run.tokenizer, **options, counts=counts[s]) for s in SPLITS}
    if equal := counts["train"]["equal_pairs"]:
        note("reward", f"{equal} pairs of training answers are equal, or equal once cut, and are left out")
    said |= {"reward/cut_share": run.cut_share("reward", counts["train"]["cut"], counts["train"]["answers"])}
    for split, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "")):
        said[f"reward/{prefix}equal_pairs"] = float(counts[split]["equal_pairs"])
    mean = rating_mean(found["train"]) if section.center_ratings else None
    if mean is not None:
        said["reward/rating_mean"] = mean
    spread = rating_deviation(found["train"])
    if spread is not None:
        said["reward/rating_deviation"] = spread
    points = Points(mean or 0.0, spread / section.rating_nats if spread else 1.0)
    found = {s: shifted(examples, points.mean, points.unit if s == "train" else 1.0) for s, examples in found.items()}
    most = section.max_candidates or max(len(e.candidates) for examples in found.values() for e in examples)
    rows |= {"max_candidates": most, "pad_id": run.tokenizer.pad_id}
    return {split: RewardBatches(examples, **rows) for split, examples in found.items()}, points, said


def step_keywords(section: Config, scale: tuple[float, float], points: Points) -> dict:
    """The step's keywords, with what is in rating points in nats."""
    keywords = section.to_dict()
    if "min_gap" in keywords:
        keywords["min_gap"] = gap_of(section.min_gap, scale) / points.unit
    if bounds := ordinal_bounds(section, scale):
        keywords["ordinal_bounds"] = tuple((bound - points.mean) / points.unit for bound in bounds)
    return keywords


def with_cutpoints(devices: Devices, params, bounds: tuple[float, ...]):
    """The parameters with the ordinal loss's cutpoints in the head, at the bounds."""
    cutpoints = devices.place({"head": {"cutpoints": np.asarray(bounds, np.float32)}})["head"]
    return {**params, "head": {**params["head"], **cutpoints}}


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
