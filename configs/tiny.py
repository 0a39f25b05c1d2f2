"""The whole chain of configs/quickstart.py on a few hundred sentences, in under a minute: for tests and first looks.

lfjax train --config=configs/tiny.py --workdir=runs/tiny
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "pretrain", "reward", "ppo", "evaluate")
    config.data.max_records = 600
    config.tokenizer.vocab_size = 400
    config.model.update(width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, context=64)
    config.pretrain.update(steps=40, batch_size=8, seq_len=48, log_every=5, save_every=10)
    config.pretrain.optim.update(learning_rate=1e-2, warmup_steps=5)
    config.reward.update(steps=30, batch_size=8, seq_len=64, buckets=(32, 64), log_every=5, save_every=10)
    config.ppo.update(steps=6, batch_size=16, log_every=1, save_every=2, samples_every=2, norm_samples=32)
    config.sampling.max_new_tokens = 16
    config.ppo.update_step.update(epochs=2, minibatches=2)
    config.evaluate.update(prompts=32, batch_size=16, samples=8, judges=("lexicon",))
    return config
