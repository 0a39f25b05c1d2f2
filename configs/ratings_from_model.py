"""Your own ratings and a model that writes already: adapters on it for every stage, then PPO.

For some hundred records or more that are to change how a pretrained model writes, and not what it knows: fine-tuning on
people's edits and on answers without feedback, a reward model from the ratings, and PPO towards it, each as low-rank
adapters at a small rate. `--config.model.init_from` is the model's folder (Hugging Face layout with its tokenizer). A
file that holds neither edits nor bare answers gives nothing to fine-tune on: leave `sft` out of `config.stages`.

    lfjax train --config=configs/ratings_from_model.py --workdir=runs/mine --config.data.path=ratings.jsonl
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "sft", "reward", "ppo", "evaluate")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.model.init_from = "stories260K_hf"  # 260,032 parameters, llama2.c, MIT
    config.model.lora.update(rank=8, alpha=16.0)
    config.optim.update(learning_rate=1e-3, warmup_steps=10, end_factor=0.1)

    config.sft.update(epochs=3.0, batch_size=8, seq_len=128, save_every=500)
    config.reward.update(epochs=4.0, batch_size=16, seq_len=128, buckets=(32, 64, 128), save_every=500)
    config.reward.update(head_init="zero", keep_best="pair_accuracy")

    config.sampling.update(prompt_buckets=(16, 48), max_new_tokens=32)
    config.ppo.update(steps=20, batch_size=64, norm_samples=256, log_every=1, save_every=10)
    config.ppo.experience_step.min_length = 4  # tokens; without it responses shrink to a word of praise
    config.ppo.update_step.update(epochs=4, minibatches=2)
    return config
