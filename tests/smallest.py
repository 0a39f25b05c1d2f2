"""The smallest run through every stage, on made-up sentences that are rated by their words: a config, and its data.

lfjax train --config=tests/smallest.py --workdir=W --config.data.path=RECORDS, with RECORDS made by `write_records`.
"""

import json
import pathlib
import random

from lfjax.config import base_config

PATH = pathlib.Path(__file__)
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
SUBJECTS = ("the film", "a meal", "this room", "our walk", "the song", "my phone", "that book", "the game")
WORDS = {True: ("lovely", "bright", "happy", "warm", "gentle"), False: ("awful", "cold", "broken", "grey", "sad")}


def get_config():
    config = base_config()
    config.stages = STAGES
    config.data.update(source="jsonl", validation_fraction=0.2, test_fraction=0.2)
    config.tokenizer.vocab_size = 310
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, context=64)
    training = {"steps": 10, "batch_size": 8, "log_every": 3, "save_every": 4}
    config.pretrain.update(seq_len=32, **training)
    config.pretrain.optim.update(learning_rate=1e-2, warmup_steps=2)
    config.sft.update(seq_len=32, **{**training, "steps": 4})
    config.reward.update(seq_len=48, buckets=(24, 48), init_from="sft", dropout=0.1, max_candidates=2, **training)
    config.reward.keep_best = "pair_accuracy"
    config.ppo.update(init_from="sft", samples_every=3, norm_samples=16, **{**training, "steps": 6, "log_every": 1})
    config.ppo.update_step.update(epochs=2, minibatches=2)
    config.sampling.max_new_tokens = 8
    config.evaluate.update(prompts=16, batch_size=8, samples=4, judges=("lexicon",))
    config.run.update(trackers=(), compile_cache=False)
    return config


def records(count: int = 120, seed: int = 0) -> list[dict]:
    """Rated sentences; every third comes with a person's edit of it."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        value = rng.choice((-3, -2, -1, 1, 2, 3))
        subject, (first, second) = rng.choice(SUBJECTS), rng.sample(WORDS[value > 0], 2)
        text = f"{subject} was {first} and {second} on day {number}"
        feedback = [{"kind": "rating", "response": 0, "value": value, "scale": [-4, 4]}]
        if number % 3 == 0:
            feedback.append({"kind": "edit", "response": 0, "text": f"{subject} was {first} on day {number}"})
        rows.append({"id": number, "prompt": "", "responses": [text], "feedback": feedback})
    return rows


def write_records(path: pathlib.Path, rows: list[dict] | None = None) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (records() if rows is None else rows)))
    return path
