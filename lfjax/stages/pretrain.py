"""Pretraining: a language model of whole texts."""

from __future__ import annotations

import functools
import math

import numpy as np

from lfjax.config import Config, at_least, section
from lfjax.data.examples import answers, pretraining_documents
from lfjax.rewards.intervals import Resampled
from lfjax.run.data import texts_of
from lfjax.run.language import HELD_OUT, POSITIVE, train_language_model
from lfjax.run.run import Run
from lfjax.run.sections import training
from lfjax.run.stage import LANGUAGE_MODEL, Stage, Step


def pretrain_stage(run: Run) -> dict[str, float]:
    """Learns every token of every text; figures are on the validation split."""
    documents = {split: pretraining_documents(run.records[split], run.tokenizer) for split in ("train", "validation")}
    text_bytes = sum(len(text.encode()) for text in texts_of(run.records.validation))

    @functools.cache
    def guess() -> float:
        return unigram_nll(documents["train"], documents["validation"], run.tokenizer.vocab_size)

    def further(nll: Resampled, tokens: float) -> dict[str, float]:
        bits = nll.map(lambda nats: nats * tokens / math.log(2) / text_bytes)
        return bits.figures("pretrain/bits_per_byte", POSITIVE) | {"pretrain/unigram_perplexity": math.exp(guess())}

    return train_language_model(run, "pretrain", documents, step="sft", further=further)


def unigram_nll(train, validation, vocab_size: int) -> float:
    """Mean nats per target token of the best constant guess: training frequencies, add-one smoothed."""
    counts = 1.0 + np.bincount([t for tokens in train for t in tokens[1:]], minlength=vocab_size)
    logprobs = np.log(counts / counts.sum())
    return -float(np.mean(logprobs[[t for tokens in validation for t in tokens[1:]]]))


def text_section(**differs) -> Config:
    """The keys of a stage that learns from documents."""
    step = section(num_microbatches=1, chunk_size=64, z_loss=0.0)
    return training(seq_len=64, dropout=0.0, step=step, **differs)


def check_text(config: Config, stage: str) -> None:
    """Raises InputError where a keyword of the step cannot be."""
    at_least(config, 1, f"{stage}.step.chunk_size")
    at_least(config, 0, f"{stage}.step.z_loss")


def text_steps(stage: str) -> dict[str, Step]:
    """The steps of a stage that learns from documents: to learn, and to measure."""
    return {
        "sft": Step("lfjax.steps.sft:sft_step", f"{stage}.step"),
        "evaluate": Step("lfjax.steps.evaluate:evaluate_step"),
    }


STAGE = Stage(
    name="pretrain",
    title="training",
    summary="A language model of whole texts: next-token cross-entropy over every token",
    source="Bengio et al. 2003, JMLR 3; Radford et al. 2019, Language models are unsupervised multitask learners",
    section=text_section,
    check=functools.partial(check_text, stage="pretrain"),
    steps=text_steps("pretrain"),
    learns_from="text",
    teaches=lambda record: any(record.responses),
    texts=answers,
    sources=lambda config: {"model.init_from": config.model.init_from} if config.model.init_from else {},
    builds=True,
    held_out=(*HELD_OUT, "bits_per_byte"),
    makes=LANGUAGE_MODEL,
    told="training of {model}",
    run=pretrain_stage,
)
