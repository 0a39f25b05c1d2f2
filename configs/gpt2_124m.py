"""GPT-2's 124 M form in bfloat16 on one GPU: pretraining on a text file.

On one H100 (80 GB, jax 0.11.2), with a vocabulary of 8,000 learnt from 1.1 MB of Shakespeare and 60 steps, it made
442,000 tokens/s, 27 % MFU; packed rows go through cuDNN's attention. `python benchmarks/steps.py --form=124m
--dtype=bfloat16` times its step alone.

    lfjax train --config=configs/gpt2_124m.py --workdir=runs/gpt2 --config.data.path=corpus.txt
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "pretrain")
    config.data.source = "text"
    config.tokenizer.update(model_type="bpe", vocab_size=32000)
    config.model.update(form="gpt2", width=768, layers=12, heads=12, kv_heads=12, mlp_width=3072, context=1024)
    config.model.update(dtype="bfloat16", remat="dots", vocab_multiple=128)
    config.pretrain.update(epochs=1.0, batch_size=32, seq_len=1024, save_every=1000, eval_every=1000)
    config.pretrain.optim.update(learning_rate=6e-4, warmup_steps=200, weight_decay=0.1, b2=0.95, end_factor=0.1)
    config.run.matmul_precision = "default"
    return config
