"""The main job: a language model learns from human ratings, on real data, from nothing, on a laptop CPU.

Trains a 0.9 M-parameter Llama-form language model on 21,000 rated sentences (film and product reviews, newspaper
editorials, tweets), a reward model on the ratings of 20 people a sentence, and steers the language model with PPO.

    lfjax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "pretrain", "reward", "ppo", "evaluate")
    config.tokenizer.vocab_size = 4000

    config.pretrain.update(epochs=4.0, batch_size=16, seq_len=64, log_every=50, save_every=500)
    config.pretrain.optim.update(learning_rate=4e-3, warmup_steps=100, weight_decay=0.1, end_factor=0.05)

    config.reward.update(epochs=4.0, batch_size=32, seq_len=96, buckets=(24, 48, 96), dropout=0.3)
    config.reward.update(head_init="zero", log_every=50, save_every=500, eval_every=650)
    config.reward.optim.update(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1, end_factor=0.05)
    config.reward.step.update(every_token=2.0, bradley_terry=0.5)

    config.ppo.update(steps=40, batch_size=128, log_every=1, save_every=10, kl_coef=0.075)
    config.ppo.optim.update(learning_rate=6e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.value_optim.update(learning_rate=6e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.experience_step.min_length = 8
    config.ppo.update_step.update(epochs=4, minibatches=2)
    return config
