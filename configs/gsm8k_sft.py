"""Supervised fine-tuning of a published model on worked answers: GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

Loss on the answers alone. Sized for stories260K, a Llama of 260,032 parameters (llama2.c, MIT), on 2 CPU cores: it
learns the form of an answer, no arithmetic. `model.init_from` is the model's folder; for a larger one change
`seq_len` and the learning rate. From the first 1,000 problems: held-out perplexity 1,259 before, 5.6 after 300 steps,
in 3 minutes (2 cores of an AMD EPYC with other work on them, jax 0.10.2).

    lfjax feedback convert gsm8k train.jsonl gsm8k.jsonl
    lfjax train --config=configs/gsm8k_sft.py --workdir=runs/gsm8k --config.data.path=gsm8k.jsonl
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "sft")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.model.init_from = "stories260K_hf"
    config.sft.update(epochs=4.0, batch_size=8, seq_len=512, eval_every=100, save_every=100)
    config.sft.optim.update(learning_rate=2e-3, warmup_steps=20, end_factor=0.1)
    return config
