"""PPO of a published model against a reward model learned from people's preferences, both from the same folder.

As configs/hh_reward.py, with PPO and its evaluation behind it: a few updates that show the way, not a better assistant.
From 920 pairs of the harmless-base test file: the reward model puts 53 % of 91 held-out pairs in people's order (a coin
does as well, and the report says so); its score went from 0.17 to 0.32 at a KL of 5.6 nats, in 4 minutes (2 cores of an
AMD EPYC with other work on them, jax 0.10.2).

    lfjax feedback convert hh test.jsonl.gz hh.jsonl --max-chars=600
    lfjax train --config=configs/hh_ppo.py --workdir=runs/hh_ppo --config.data.path=hh.jsonl
"""

from pathlib import Path

from lfjax.config import load


def get_config():
    config = load(Path(__file__).with_name("hh_reward.py")).unlock()
    config.stages = ("tokenizer", "reward", "ppo", "evaluate")
    config.sampling.update(prompt_buckets=(128, 256, 384), max_new_tokens=32)
    config.ppo.update(steps=12, batch_size=32, norm_samples=128, log_every=1, save_every=6)
    config.ppo.experience_step.require_eos = False  # the model ends no answer within so few tokens
    config.ppo.update_step.update(epochs=2, minibatches=2)
    for optim in (config.ppo.optim, config.ppo.value_optim):
        optim.update(learning_rate=3e-4, warmup_steps=2, end_factor=0.1, b2=0.95)
    config.evaluate.update(prompts=64, batch_size=32)
    return config
