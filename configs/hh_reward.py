"""A reward model on a published model from people's preferences: HH pairs (Bai et al. 2022, arXiv:2204.05862).

Sized for stories260K, a Llama of 260,032 parameters (llama2.c, MIT), on 2 CPU cores; `model.init_from` is its folder.
So small a model learns little of what people prefer in dialogues: the run shows the way (53 % of 91 held-out pairs in
people's order, where a coin has 50). The pairs hold offensive text.

    lfjax feedback convert hh test.jsonl.gz hh.jsonl --max-chars=600
    lfjax train --config=configs/hh_reward.py --workdir=runs/hh --config.data.path=hh.jsonl
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "reward")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.model.init_from = "stories260K_hf"
    config.reward.update(epochs=2.0, batch_size=16, seq_len=512, buckets=(128, 256, 512), head_init="zero")
    config.reward.optim.update(learning_rate=1e-3, warmup_steps=10, weight_decay=0.1, end_factor=0.1)
    config.reward.step.update(regression=0.0, every_token=0.0, bradley_terry=1.0)
    return config
