"""The classification stage: a model that tells which `label` people give a text."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np

from lfjax.config import init_from
from lfjax.data.batching import RewardBatches
from lfjax.data.examples import class_examples, class_names
from lfjax.loops.reward import one_of_each, scorer, with_head
from lfjax.loops.run import Run
from lfjax.loops.supervised import compiled_step, create_state, passes, total_steps, training_parts
from lfjax.loops.training import train
from lfjax.models.flops import forward_flops
from lfjax.state import RewardState
from lfjax.types import ClassBatch, RewardBatch

MOST_SHOWN = 10  # classes whose own figures are in the summary


def classify_stage(run: Run) -> dict[str, float]:
    """Trains on the labels of the training split, whose values are the classes; figures are on the test split."""
    section, records = run.config.classify, run.records
    names = class_names(records.train)
    splits = ("train", "validation", "test")
    found = {s: class_examples(getattr(records, s), run.tokenizer, names, max_length=section.seq_len) for s in splits}
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    sets = {s: RewardBatches(found[s], max_candidates=1, pad_id=run.tokenizer.pad_id, **rows) for s in splits}
    batches = sets["train"]
    cut_share = run.cut_share("classify", sum(example.cut for example in found["train"]), len(found["train"]))
    total = total_steps(section, batches.steps_per_epoch)

    loaded = run.load_model("classify.init_from", init_from(run.config, "classify"))
    model, params = with_head(run, loaded, "classify", len(names), dropout=section.dropout)
    tx, rate = training_parts(run, "classify", total, model)
    trained, base = run.trained_part("classify", params, model.config, "classify-lora")
    state, shardings = create_state(run, RewardState, trained, tx)
    function = functools.partial(run.steps["classify"], tx=tx, **section.step.to_dict())
    first = {batch.tokens.shape: batch for batch in map(labelled, one_of_each(batches).values())}
    step = compiled_step(run, "classify", function, model, base, state, shardings, first.values())
    guess = scorer(run, model, base, stage="classify", each=len(names))

    def figures(state, split: str = "validation", prefix: str = "classify/validation_") -> dict[str, float]:
        scores = guess(state.params, sets[split], last=split == "test")
        return class_figures(classes_of(found[split]), [int(np.argmax(row)) for row in scores], names, prefix)

    state, out = train(
        run,
        "classify",
        state,
        lambda state, index: step(state, labelled(batches.batch_at(index))),
        total=total,
        tokens_per_step=float(np.mean([np.prod(shape) for shape in first])),
        flops_per_step=passes(run, "classify")
        * float(np.mean([np.prod(s) * forward_flops(model.config, s[-1]) for s in first])),
        evaluate=figures,
        learning_rate=rate,
    )
    run.save_model("classify", model, state.params, base, labels=names)
    out["classify/train_accuracy"] = out.pop("classify/accuracy", 0.0)
    out["classify/cut_share"] = cut_share
    truth = classes_of(found["test"])
    often = int(np.bincount(classes_of(found["train"])).argmax())
    always = class_figures(truth, [often] * len(truth), names, "")
    out |= {f"classify/majority_{name}": always[name] for name in ("accuracy", "f1")}
    return out | figures(state, "test", "classify/")


def labelled(batch: RewardBatch) -> ClassBatch:
    """The batch of `class_examples`: one candidate a record, its rating the class."""
    labels = np.asarray(batch.ratings)[:, 0].astype(np.int32)
    fields: tuple = (batch.tokens[:, 0], batch.mask[:, 0], labels, batch.rated[:, 0])
    return ClassBatch(*fields)


def classes_of(examples) -> list[int]:
    """The class of every example."""
    return [int(example.ratings[0]) for example in examples]


def class_figures(truth: list[int], guesses: list[int], names: tuple[str, ...], prefix: str) -> dict[str, float]:
    """Accuracy; precision, recall and F1 as means over the classes (macro), and of each class where they are few.

    A ratio whose denominator is 0 counts as 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    parts = precision_recall_fscore_support(truth, guesses, labels=range(len(names)), zero_division=0.0)[:3]  # type: ignore[arg-type]
    out = {f"{prefix}accuracy": float(np.mean(np.equal(truth, guesses)))}
    for name, values in zip(("precision", "recall", "f1"), np.asarray(parts), strict=True):
        out[f"{prefix}{name}"] = float(values.mean())
        if len(names) <= MOST_SHOWN:
            out |= {f"{prefix}{name}_{c}": float(v) for c, v in zip(slugs(names), values, strict=True)}
    return out


def slugs(names: tuple[str, ...]) -> list[str]:
    """Each class as part of a figure's name; where two would be the same, a number follows in the later one.

    A class that needs no change keeps its name.
    """
    found: dict[str, str] = {}
    for name, plain in sorted(((n, re.sub(r"[^\w.+-]+", "_", n)) for n in names), key=lambda pair: pair[0] != pair[1]):
        free = (f"{plain}_{i}" if i > 1 else plain for i in itertools.count(1))
        found[name] = next(slug for slug in free if slug not in found.values())
    return [found[name] for name in names]
