"""The classification stage: a model that tells which `label` people give a text."""

from __future__ import annotations

import functools
import itertools
import re
from collections import deque
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from lfjax.config import Config, InputError, optim_section, section
from lfjax.data.batching import RewardBatches
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import class_examples, class_labels, class_names, labelled_texts
from lfjax.models.flops import step_work
from lfjax.records import Record
from lfjax.report.catalogue import Figure
from lfjax.rewards.intervals import SHARE, Bootstrap, Resampled, prompt_keys
from lfjax.run import training
from lfjax.run.data import Data
from lfjax.run.heads import one_of_each, scorer, with_head
from lfjax.run.parts import compiled_step, create_state, optimizer, passes, total_steps, trained_part
from lfjax.run.run import Run
from lfjax.run.sections import training as training_section
from lfjax.run.stage import CLASSIFIER, Stage, Step, start_from
from lfjax.state import RewardState
from lfjax.types import ClassBatch, RewardBatch

MOST_SHOWN = 10  # classes whose own figures are in the summary


def classify_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # as reward.init_from
        seq_len=128,
        buckets=(32, 64, 128),  # sequence lengths, each compiled once
        dropout=0.0,
        step=section(label_smoothing=0.0, num_microbatches=1),
    )


def check(config: Config) -> None:
    """Raises InputError where the smoothing cannot be."""
    found = config.classify.step.get("label_smoothing", 0.0)
    if not 0.0 <= found < 1.0:
        raise InputError(f"config.classify.step.label_smoothing: {found}; allowed: 0 up to, not including, 1")


def check_data(config: Config, data: Data) -> None:
    """Training has two classes or more, and all those of the other splits. Raises InputError."""
    names = class_names(data.records.train)
    if len(names) < 2:
        raise InputError(
            f"stage classify: {data.file('train')}: every label of the training split is {', '.join(names)!r};"
            " give records of a second class"
        )
    for split in ("validation", "test"):
        deque(class_labels(data.records[split], names), maxlen=0)


def classify_stage(run: Run) -> dict[str, float]:
    """Trains on the labels of the training split, whose values are the classes; figures are on the test split."""
    section, devices, adapters = run.config.classify, run.devices, run.adapters("classify")
    names = class_names(run.records.train)
    found = {s: class_examples(run.records[s], run.tokenizer, names, max_length=section.seq_len) for s in SPLITS}
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    sets = {s: RewardBatches(found[s], max_candidates=1, pad_id=run.tokenizer.pad_id, **rows) for s in SPLITS}
    batches = sets["train"]
    cut_share = run.cut_share("classify", sum(example.cut for example in found["train"]), len(found["train"]))
    total = total_steps(section, batches.steps_per_epoch)

    loaded = run.load_model(*run.start("classify"))
    model, params = with_head(devices, run.config.model, loaded, "classify", len(names), dropout=section.dropout)
    recipe = optimizer(optim_section(run.config, "classify"), total, model)
    trained, base = trained_part(devices, adapters, params, model.config, "classify-lora")
    state, shardings = create_state(devices, RewardState, trained, recipe)
    function = functools.partial(run.steps["classify"], **section.step.to_dict())
    first = {batch.tokens.shape: batch for batch in map(labelled, one_of_each(batches).values())}
    step = compiled_step(
        devices, "classify", function, recipe, model, base, state, shardings, first.values(), adapters=adapters
    )
    leave = functools.partial(run.leave_if_asked, "classify")
    guess = scorer(devices, model, base, adapters=adapters, name="classify score", each=len(names), leave=leave)

    def estimates(state, split: str) -> dict[str, Resampled]:
        guesses = [int(np.argmax(row)) for row in guess(state.params, sets[split], last=split == "test")]
        return class_estimates(classes_of(found[split]), guesses, names, prompts_of(run.records[split], found[split]))

    state, out = training.train(
        run, "classify", state, lambda state, index: step(state, labelled(batches.batch_at(index))), total=total,
        work=lambda index: step_work(model.config, batches.shape_at(index), passes(adapters)),
        evaluate=lambda state: told(estimates(state, "validation"), "classify/validation_"), learning_rate=recipe.rate,
    )  # fmt: skip
    run.save_model("classify", model, state.params, base, labels=names)
    if "classify/accuracy" in out:
        out["classify/train_accuracy"] = out.pop("classify/accuracy")
    out["classify/cut_share"] = cut_share
    often = int(np.bincount(classes_of(found["train"])).argmax())
    truth, prompts = classes_of(found["test"]), prompts_of(run.records["test"], found["test"])
    always = class_estimates(truth, [often] * len(truth), names, prompts)
    own = estimates(state, "test")
    return out | told(own, "classify/") | beside_majority(own, always)


def beside_majority(own: Mapping[str, Resampled], always: Mapping[str, Resampled]) -> dict[str, float]:
    """What a guess that is always the most frequent class of training reaches, and how far the model is above it."""
    out = told({f"majority_{name}": always[name] for name in ("accuracy", "f1")}, "classify/")
    return out | (own["accuracy"] - always["accuracy"]).figures("classify/accuracy_over_majority")


def labelled(batch: RewardBatch) -> ClassBatch:
    """The batch of `class_examples`: one candidate a record, its rating the class."""
    labels = np.asarray(batch.ratings)[:, 0].astype(np.int32)
    fields: tuple = (batch.tokens[:, 0], batch.mask[:, 0], labels, batch.rated[:, 0])
    return ClassBatch(*fields)


def classes_of(examples) -> list[int]:
    """The class of every example."""
    return [int(example.ratings[0]) for example in examples]


def prompts_of(records: Sequence[Record], examples) -> list[str]:
    """The prompt of every example's record, or its text where it has none."""
    keys = prompt_keys(records)
    return [keys[example.record] for example in examples]


def told(found: Mapping[str, Resampled], prefix: str) -> dict[str, float]:
    """Shares with their intervals."""
    return {k: v for name, share in found.items() for k, v in share.figures(f"{prefix}{name}", SHARE).items()}


def class_estimates(
    truth: list[int], guesses: list[int], names: tuple[str, ...], prompts: Sequence[Hashable]
) -> dict[str, Resampled]:
    """Accuracy; precision, recall and F1 as means over the classes (macro), and of each class where they are few.

    A ratio whose denominator is 0 counts as 0. Prompts are the clusters of the intervals.
    """
    classes, few = range(len(names)), slugs(names) if len(names) <= MOST_SHOWN else []
    real, guessed = np.equal.outer(truth, classes), np.equal.outer(guesses, classes)  # [N C] both
    counts = np.concatenate([real & guessed, guessed, real, np.ones((len(truth), 1))], axis=1)

    def figures(sums: np.ndarray) -> dict[str, np.ndarray]:
        both, told, there = np.split(sums[:, :-1], 3, axis=1)
        parts = {"precision": (both, told), "recall": (both, there), "f1": (2.0 * both, told + there)}
        found = {"accuracy": both.sum(axis=1) / sums[:, -1]}
        for name, (above, below) in parts.items():
            each = above / np.where(below > 0, below, 1.0)
            found |= {name: each.mean(axis=1), **{f"{name}_{c}": x for c, x in zip(few, each.T, strict=False)}}
        return found

    return Bootstrap(prompts).of_counts(prompts, counts, figures)


def slugs(names: tuple[str, ...]) -> list[str]:
    """Each class as part of a figure's name; where two would be the same, a number follows in the later one.

    A class that needs no change keeps its name.
    """
    found: dict[str, str] = {}
    for name, plain in sorted(((n, re.sub(r"[^\w.+-]+", "_", n)) for n in names), key=lambda pair: pair[0] != pair[1]):
        free = (f"{plain}_{i}" if i > 1 else plain for i in itertools.count(1))
        found[name] = next(slug for slug in free if slug not in found.values())
    return [found[name] for name in names]


STAGE = Stage(
    name="classify",
    title="the classifier",
    summary="A classifier of the labels that people give texts",
    source="Devlin et al. 2019, arXiv:1810.04805, section 4.1",
    section=classify_section,
    check=check,
    check_data=check_data,
    steps={"classify": Step("lfjax.steps.classify:classify_step", "classify.step")},
    learns_from="`label` feedback",
    teaches=lambda record: bool(labelled_texts(record)),
    splits=SPLITS,
    texts=labelled_texts,
    sources=start_from("classify"),
    heads=True,
    makes=CLASSIFIER,
    held_out=("f1", "accuracy", "precision", "recall"),
    figures={"classify/loss": Figure("Loss", "nats a text", "lower", log=True)},
    told="a classifier's training",
    run=classify_stage,
)
