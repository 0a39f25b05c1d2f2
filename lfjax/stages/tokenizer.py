"""The tokenizer stage: a vocabulary."""

from __future__ import annotations

import jax
import numpy as np

from lfjax.config import shared_sections
from lfjax.run.data import texts_of
from lfjax.run.devices import sync
from lfjax.run.run import Run
from lfjax.run.stage import TOKENIZER, Stage
from lfjax.tokenizers import sentencepiece


def tokenizer_stage(run: Run) -> dict[str, float]:
    """Learns a vocabulary from the training texts, unless the config names one."""
    options = run.config.tokenizer
    if run.config.model.init_from or options.path:
        tokenizer = run.tokenizer
    else:
        tokenizer = sentencepiece.train(
            texts_of(run.records.train),
            run.models("tokenizer") if jax.process_index() == 0 else None,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
        )
        run.check_tokenizer(tokenizer)
        run.data.tell()
    sync("saved tokenizer")
    lengths = [len(tokenizer.encode(text)) for text in texts_of(run.records.validation)]
    return {
        "tokenizer/vocab_size": float(tokenizer.vocab_size),
        "tokenizer/tokens_per_text": float(np.mean(lengths)) if lengths else 0.0,
    }


STAGE = Stage(
    name="tokenizer",
    title="the tokenizer",
    summary="A vocabulary learnt from the training texts, unless one is given",
    source="Kudo and Richardson 2018, arXiv:1808.06226; Kudo 2018, arXiv:1804.10959",
    section=lambda: shared_sections().tokenizer,  # every stage reads it
    run=tokenizer_stage,
    makes=TOKENIZER,
)
