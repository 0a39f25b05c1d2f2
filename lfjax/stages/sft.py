"""Supervised fine-tuning: demonstrations, and people's edits of what a model wrote."""

from __future__ import annotations

import functools

from lfjax.data.examples import sft_documents, sft_texts
from lfjax.run.language import HELD_OUT, train_language_model
from lfjax.run.run import Run
from lfjax.run.stage import LANGUAGE_MODEL, Stage, start_from
from lfjax.stages.pretrain import check_text, text_section, text_steps


def sft_stage(run: Run) -> dict[str, float]:
    """Learns responses and edits, the prompt without loss; figures are on the validation split."""
    documents = {split: sft_documents(run.records[split], run.tokenizer) for split in ("train", "validation")}
    return train_language_model(run, "sft", documents, step="sft", tuned=True)


STAGE = Stage(
    name="sft",
    title="fine-tuning",
    summary="Supervised fine-tuning on people's edits, and on answers without feedback",
    source="Ouyang et al. 2022, arXiv:2203.02155; Scheurer et al. 2023, arXiv:2303.16755",
    section=functools.partial(text_section, init_from="auto"),
    check=functools.partial(check_text, stage="sft"),
    steps=text_steps("sft"),
    learns_from="`edit` feedback or record without feedback",
    teaches=lambda record: bool(sft_texts(record)),
    texts=sft_texts,
    sources=start_from("sft"),
    makes=LANGUAGE_MODEL,
    held_out=HELD_OUT,
    told="fine-tuning on given answers",
    run=sft_stage,
)
