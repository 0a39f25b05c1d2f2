"""DPO on a published model from people's preferences: HH pairs (Bai et al. 2022, arXiv:2204.05862).

Sized for stories260K, a Llama of 260,032 parameters (llama2.c, MIT), on 2 CPU cores; `model.init_from` is its folder.
So small a model learns little of what people prefer in dialogues: after one epoch on 736 pairs the implicit rewards put
61 % (51 to 71) of 92 held-out pairs in people's order, where a coin has 50, at KL 3.3 (5 minutes on 2 busy cores of an
AMD EPYC, x86-64, jax 0.10.2). The pairs hold offensive text.

    lfjax feedback convert hh test.jsonl.gz hh.jsonl --max-chars=600
    lfjax train --config=configs/hh_preference.py --workdir=runs/hh --config.data.path=hh.jsonl

`--config.preference.step.loss=ipo` (simpo, orpo, ...) is another loss; `--config.stages=kto,evaluate` learns from the
same answers without pairs.
"""

from lfjax.config import base_config


def get_config():
    config = base_config()
    config.stages = ("preference", "evaluate")
    config.data.update(source="jsonl", validation_fraction=0.1, test_fraction=0.1)
    config.model.init_from = "stories260K_hf"
    for stage in (config.preference, config.kto):
        stage.update(epochs=1.0, batch_size=16, seq_len=511, buckets=(128, 256, 511))
        stage.optim.update(learning_rate=3e-4, warmup_steps=10, end_factor=0.1)
    config.sampling.update(prompt_buckets=(128, 448), max_new_tokens=32)
    config.evaluate.update(prompts=64, batch_size=32)
    return config
