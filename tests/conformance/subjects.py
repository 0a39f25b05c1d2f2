"""What is under test: name -> "module:function"."""

# What a fork may replace: the names of config.steps.
STEPS = {
    "sft": "lfjax.steps.sft:sft_step",
    "reward": "lfjax.steps.reward:reward_step",
    "classify": "lfjax.steps.classify:classify_step",
    "ppo_rollout": "lfjax.steps.ppo_rollout:ppo_rollout",
    "ppo_score": "lfjax.steps.ppo_score:ppo_score",
    "ppo_experience": "lfjax.steps.ppo_experience:ppo_experience",
    "ppo_update": "lfjax.steps.ppo_update:ppo_update",
    "evaluate": "lfjax.steps.evaluate:evaluate_step",
}

# What no step decides: tested as it is in the library.
LIBRARY = {
    "base_config": "lfjax.config:base_config",
    "make_optimizer": "lfjax.optim:make_optimizer",
    "schedule": "lfjax.optim:schedule",
    "reward_model": "lfjax.loops.reward:reward_model",
    "scorer": "lfjax.loops.reward:scorer",
    "pair_figures": "lfjax.loops.reward:pair_figures",
    "policy": "lfjax.loops.ppo:Policy",
    "value_network": "lfjax.loops.ppo:value_network",
    "measure_norm": "lfjax.loops.ppo:measure_norm",
}
