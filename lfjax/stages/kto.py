"""The KTO stage: a language model learns from answers that people called good or bad, without pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from ml_collections.config_dict import placeholder

from lfjax.config import Config, InputError, at_least, section
from lfjax.data.answer_batches import KtoBatches
from lfjax.data.answers import Judged, is_called, judged_answers
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import judged_texts
from lfjax.report.catalogue import Figure
from lfjax.rewards.intervals import SHARE, Bootstrap
from lfjax.run.data import Data, note
from lfjax.run.run import Run
from lfjax.run.sections import training as training_section
from lfjax.run.stage import LANGUAGE_MODEL, Stage, Step
from lfjax.stages.answers import reads_only, sources, train_on_answers
from lfjax.types import KtoBatch


def kto_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # stage or model folder; "auto": the last earlier stage that makes a language model
        reference=placeholder(str),  # stage or model folder; none: the model that it starts from
        keep_reference=True,  # ask the reference once, before training; else at every step, and hold it in memory
        seq_len=128,
        buckets=(32, 64, 128),  # sequence lengths, each compiled once
        dropout=0.0,
        threshold=placeholder(float),  # rating points above which an answer is good, below which bad; none: the middle
        step=section(
            beta=0.1,  # how strongly the reference holds
            weight_desirable=1.0,  # of good answers
            weight_undesirable=1.0,  # of bad answers
            num_microbatches=1,
            chunk_size=64,
        ),
    )


def check(config: Config) -> None:
    """Raises InputError where a value cannot be."""
    at_least(config, 1e-6, "kto.step.beta")
    at_least(config, 0, "kto.step.weight_desirable", "kto.step.weight_undesirable")
    at_least(config, 1, "kto.step.chunk_size")


def calls_of(run_section: Config, records, tokenizer, scale: tuple[float, float]) -> Judged:
    """What a split holds."""
    given = run_section.threshold
    threshold = sum(scale) / 2 if given is None else given
    return judged_answers(records, tokenizer, max_length=run_section.seq_len + 1, threshold=threshold, scale=scale)


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """Each split holds good answers and bad ones. Raises InputError."""
    scale = data.rating_scale or (0.0, 1.0)
    for split in SPLITS:
        calls = {good for _, good in calls_of(config.kto, data.records[split], tokenizer, scale).calls}
        if len(calls) < 2:
            held = "no good answer" if True not in calls else "no bad one"
            raise InputError(
                f"config.kto.threshold: {data.file(split)}: the {split} split holds {held}; set the rating between good"
                f" and bad answers (none: the middle of the scale, {sum(scale) / 2:g}), or add answers of that kind"
            )


def kto_stage(run: Run) -> dict[str, float]:
    """Trains from a language model; figures are of held-out answers, on which side of no change their rewards lie."""
    sets, said = batches_of(run)
    figures = functools.partial(call_figures, run.config.kto.step)
    return train_on_answers(run, "kto", sets, figures_of=figures, with_reference=with_reference) | said


def with_reference(batch: KtoBatch, ask: Callable) -> KtoBatch:
    """The batch with what the reference says of its answers and of the mismatched ones."""
    own, other = (rows._replace(ref_logprobs=ask(rows)) for rows in (batch.answers, batch.mismatched))
    return batch._replace(answers=own, mismatched=other)


def batches_of(run: Run) -> tuple[dict[str, KtoBatches], dict[str, float]]:
    """(split -> batches, what is said of the data)."""
    section, scale = run.config.kto, run.data.rating_scale or (0.0, 1.0)
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    found = {s: calls_of(section, run.records[s], run.tokenizer, scale) for s in SPLITS}
    train = found["train"]
    if left := train.counts["undecided"] + train.counts["empty"]:
        note("kto", f"{left} training answers are empty, or rated at the threshold, and are left out")
    good = sum(good for _, good in train.calls)
    return {s: KtoBatches(judged, pad_id=run.tokenizer.pad_id, **rows) for s, judged in found.items()}, {
        "kto/cut_share": run.cut_share("kto", train.counts["cut"], train.counts["answers"]),
        "kto/train_desirable": float(good),
        "kto/train_undesirable": float(len(train.calls) - good),
    }


def call_figures(step: Config, batches: KtoBatches, sums: np.ndarray, prefix: str) -> dict[str, float]:
    """Of held-out answers: the share whose reward lies on the right side of the baseline, and rewards by class.

    Args:
      sums: of the log-probabilities of `batches.answers` under the policy.
    """
    ratios = np.float64(sums) - np.asarray(batches.ref)
    own, other, good = (np.array(column) for column in zip(*batches.calls, strict=True))
    baseline = max(0.0, float(ratios[other].mean()))
    keys = [batches.answers[i].tokens[: batches.answers[i].start] for i in own]
    draws, rewards = Bootstrap(keys), step.get("beta", 1.0) * ratios[own]
    right = 1.0 * ((ratios[own] > baseline) == good)
    out = {f"{prefix}baseline": baseline} | draws.mean(keys, right).figures(f"{prefix}accuracy", SHARE)
    for name, weights in (("reward_desirable", good), ("reward_undesirable", ~good)):
        out |= draws.mean(keys, rewards, weights).figures(f"{prefix}{name}")
    return out


STAGE = Stage(
    name="kto",
    title="KTO",
    summary="Kahneman-Tversky optimisation: learning from answers called good or bad, without pairs",
    source="Ethayarajh et al. 2024, arXiv:2402.01306",
    section=kto_section,
    check=check,
    check_texts=check_texts,
    steps={"kto": Step("lfjax.steps.kto:kto_step", "kto.step")},
    learns_from="label (true, false or a number), rating, preference, ranking or edit",
    teaches=is_called,
    splits=SPLITS,
    texts=judged_texts,
    sources=functools.partial(sources, stage="kto"),
    reads_only=functools.partial(reads_only, stage="kto"),
    makes=LANGUAGE_MODEL,
    held_out=("accuracy", "reward_desirable"),
    figures={
        "kto/loss": Figure("Loss", "of answers", "lower"),
        "kto/accuracy": Figure("Implicit accuracy", "held-out answers on their side of the baseline", "higher",
                               form="percent"),
    },
    told="learning from answers called good or bad",
    run=kto_stage,
)  # fmt: skip
