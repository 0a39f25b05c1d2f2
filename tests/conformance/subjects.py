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
    "shared_sections": "lfjax.config:shared_sections",
    "training_section": "lfjax.run.sections:training",
    "reward_section": "lfjax.stages.reward:reward_section",
    "ppo_section": "lfjax.stages.ppo:ppo_section",
    "make_optimizer": "lfjax.optim:make_optimizer",
    "schedule": "lfjax.optim:schedule",
    "reward_model": "lfjax.run.heads:with_head",
    "scorer": "lfjax.run.heads:scorer",
    "pair_figures": "lfjax.stages.reward_figures:pair_figures",
    "policy": "lfjax.run.writing:Policy",
    "value_network": "lfjax.run.values:value_network",
    "measure_norm": "lfjax.run.values:measure_norm",
}
