"""configs/hh_ppo.py with low-rank adapters: reward model, policy and value network train adapters on one frozen base.

lfjax feedback convert hh test.jsonl.gz hh.jsonl --max-chars=600
lfjax train --config=configs/hh_lora_ppo.py --workdir=runs/hh_lora --config.data.path=hh.jsonl
"""

from pathlib import Path

from lfjax.config import load


def get_config():
    config = load(Path(__file__).with_name("hh_ppo.py")).unlock()
    config.model.lora.update(rank=8, alpha=16.0)
    for optim in (config.reward.optim, config.ppo.optim, config.ppo.value_optim):
        optim.learning_rate = 3 * optim.learning_rate
    return config
