"""The stages by name."""

from __future__ import annotations

import functools

from lfjax.loops.classify import classify_stage
from lfjax.loops.evaluate import evaluate_stage
from lfjax.loops.ppo import ppo_stage
from lfjax.loops.reward import reward_stage
from lfjax.loops.supervised import lm_stage, tokenizer_stage

STAGE_FUNCTIONS = {
    "tokenizer": tokenizer_stage,
    "pretrain": functools.partial(lm_stage, stage="pretrain"),
    "sft": functools.partial(lm_stage, stage="sft"),
    "reward": reward_stage,
    "classify": classify_stage,
    "ppo": ppo_stage,
    "evaluate": evaluate_stage,
}
