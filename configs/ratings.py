"""Your own ratings: a small language model and a reward model from a file of feedback, then PPO towards it.

For a few hundred to a few thousand records (see "Your own file" in README.md) on a laptop CPU: 300
records of one line take 110 s of CPU time (281 s on 2 busy cores of an AMD EPYC, x86-64, jax 0.10.2); made-up slogans
rated 1 to 5 went from 0.4 points below the average rating to 1.4 above it, with less variety. The language model starts
from nothing and knows no more than your texts: for one that writes, start from a model folder
(`--config.model.init_from=FOLDER`, Hugging Face layout with its tokenizer).

    lfjax train --config=configs/ratings.py --workdir=runs/mine --config.data.path=ratings.jsonl
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "pretrain", "reward", "ppo", "evaluate")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.tokenizer.update(model_type="bpe", vocab_size=600)  # bpe: few texts fill it
    config.model.context = 128

    config.pretrain.update(epochs=10.0, batch_size=16, seq_len=64, dropout=0.1, save_every=500)
    config.pretrain.optim.update(learning_rate=4e-3, warmup_steps=20, weight_decay=0.1, end_factor=0.05)

    config.reward.update(epochs=8.0, batch_size=16, seq_len=128, buckets=(32, 64, 128), dropout=0.3)
    config.reward.update(head_init="zero", save_every=500)
    config.reward.optim.update(learning_rate=1e-3, warmup_steps=20, weight_decay=0.1, end_factor=0.05)
    config.reward.step.every_token = 1.0

    config.sampling.update(prompt_buckets=(16, 48), max_new_tokens=32)
    config.ppo.update(steps=20, batch_size=64, norm_samples=256, log_every=1, save_every=10)
    config.ppo.optim.update(learning_rate=6e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.value_optim.update(learning_rate=6e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.experience_step.min_length = 4  # tokens; without it responses shrink to a word of praise
    config.ppo.update_step.update(epochs=4, minibatches=2)
    return config
