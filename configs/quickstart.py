"""The main job: a language model learns from human ratings, on real data, from nothing, on a laptop CPU.

Trains a 0.9 M-parameter Llama-form language model on 21,000 rated sentences (film and product reviews, newspaper
editorials, tweets), a reward model on the ratings of 20 people a sentence, and steers the language model with PPO.

    lfjax train --config=configs/quickstart.py --workdir=runs/quickstart

Under five minutes on 2 CPU cores whose float32 matmul runs at 200 GFLOP/s; README.md has the figures.
"""

from lfjax.config import base_config

MUON = {
    "name": "muon",
    "b1": 0.95,
    "weight_decay": 0.1,
    "warmup_steps": 50,
    "end_factor": 0.05,
    # the layers' matrices, which Muon updates, at five times the rate of what Adam does (tables, norms, heads)
    "groups": ((r"layers/(attention|mlp)/[a-z]+$", 5.0, 1.0), (r"norm\d?/", 1.0, 0.0)),
}


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "pretrain", "reward", "ppo", "evaluate")
    config.tokenizer.vocab_size = 4000

    config.pretrain.update(epochs=1.75, batch_size=32, seq_len=64, log_every=25, save_every=250)
    config.pretrain.optim.update(learning_rate=6e-3, **MUON)

    config.reward.update(epochs=1.25, batch_size=64, seq_len=96, buckets=(24, 48, 96), dropout=0.1)
    config.reward.update(head_init="zero", log_every=25, save_every=250)
    config.reward.optim.update(learning_rate=1.5e-3, **MUON)
    config.reward.step.update(every_token=2.0, bradley_terry=0.5)

    config.ppo.update(steps=30, batch_size=128, log_every=1, save_every=10, kl_coef=0.1)
    config.ppo.optim.update(learning_rate=8e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.value_optim.update(learning_rate=8e-4, warmup_steps=4, end_factor=0.1, b2=0.95, eps=1e-8)
    config.ppo.experience_step.min_length = 8
    config.ppo.update_step.update(epochs=4, minibatches=2)
    config.evaluate.judges = ("lexicon",)
    return config
