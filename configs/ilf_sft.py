"""Supervised fine-tuning of a published model on people's corrections of programs: ILF (arXiv:2303.16749).

The method of Chen et al. 2023. Loss on the corrections alone; the critiques stay in the records. Sized for stories260K,
a Llama of 260,032 parameters (llama2.c, MIT), on 2 CPU cores: it learns how such programs look, not how to mend one. Of
the first 150 rows 145 make records; 138 of them fit in the model's 512 tokens, the 7 longer ones are cut into pieces.
108 steps on 121 records took 26 s on 2 cores of an AMD EPYC (167 s while other jobs had them too); loss on 13 held-out
records 7.431 -> 2.446 nats a token of the correction.

    lfjax feedback convert ilf surge_annotations.jsonl ilf.jsonl
    lfjax train --config=configs/ilf_sft.py --workdir=runs/ilf --config.data.path=ilf.jsonl
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("tokenizer", "sft")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.model.init_from = "stories260K_hf"
    config.sft.update(epochs=6.0, batch_size=4, seq_len=512, eval_every=20, save_every=100)
    config.sft.optim.update(learning_rate=2e-3, warmup_steps=10, end_factor=0.1)
    return config
