"""The PPO stage: rollout -> score -> experience -> update, each one compiled program, dispatched without waiting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import Config, InputError, at_least, one_of, optim_section, sampling_section, section
from lfjax.models import lora
from lfjax.models.flops import step_work
from lfjax.modules import is_named
from lfjax.report.catalogue import Figure
from lfjax.run import training, writing
from lfjax.run.data import Data, say
from lfjax.run.devices import Devices
from lfjax.run.parts import optimizer, parameters, passes, total_steps, trained_part
from lfjax.run.rewards import LearnedReward
from lfjax.run.run import Run
from lfjax.run.sections import check_sampling, optim_overrides, sampling_overrides
from lfjax.run.sections import training as training_section
from lfjax.run.stage import LANGUAGE_MODEL, Stage, Step
from lfjax.run.values import measure_norm, no_values, value_network
from lfjax.run.writing import Policy
from lfjax.sharding import global_batch, jit_step, place
from lfjax.stages.rollouts import STEPS, policy_of, reward_of, rollout_rows, writable
from lfjax.state import LMState, PPOState, RewardNorm, ValueState
from lfjax.steps.ppo_forward import PPOModels
from lfjax.tokenizers import stop_ids
from lfjax.types import Rollout

MOVED = {f"ppo.{key}": f"sampling.{key}" for key in ("prompt_buckets", "stop", "prompt_min", "prompt_max")}
MOVED |= {f"ppo.rollout_step.{k}": f"sampling.{k}" for k in ("max_new_tokens", "temperature", "top_k", "top_p")}


def ppo_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # the policy's start and the frozen reference; as reward.init_from
        reward="reward",  # stage, model folder, or "module:function" f(prompts, responses, records) -> scores
        value_init="reward",  # "reward" | "policy" | a model folder
        batch_size=128,  # episodes an update
        optim=optim_overrides(eps=1e-5),
        steps=40,  # updates
        sampling=sampling_overrides(),
        norm_samples=512,  # reference samples that fix the score's mean and deviation; 0: scores as they are
        kl_coef=0.1,
        reference_dtype="auto",  # "auto": bfloat16 on accelerators, float32 on CPU
        value_optim=optim_overrides(eps=1e-5),
        samples_every=10,  # updates between rows in samples.jsonl
        rollout_step=section(),  # what a fork takes besides `sampling`
        experience_step=section(
            gamma=1.0,
            lam=0.95,
            kl_kind="k1",  # "k1" | "k2" | "k3" | "abs"
            whiten_rewards=False,
            whiten_advantages=True,
            min_length=0,  # a response of fewer tokens, or without EOS, scores min(score, 0) - penalty
            require_eos=True,
            penalty=1.0,
            chunk_size=64,
        ),
        update_step=section(
            epochs=4,
            minibatches=1,
            clip_low=0.2,
            clip_high=0.2,
            value_clip=0.2,
            value_coef=1.0,
            entropy_coef=0.0,
            kl_target=0.0,  # nats a sequence; above 0 the KL coefficient adapts to it
            kl_horizon=10000.0,
            num_microbatches=1,
            chunk_size=64,
        ),
    )


def check(config: Config) -> None:
    """Raises InputError where a value cannot be."""
    ppo = config.ppo
    one_of(config, "ppo.experience_step.kl_kind", ("k1", "k2", "k3", "abs"))
    one_of(config, "ppo.reference_dtype", ("auto", "float32", "bfloat16"))
    check_sampling(config, "ppo", whole=True)
    at_least(config, 1, "ppo.update_step.epochs", "ppo.update_step.chunk_size", "ppo.experience_step.chunk_size")
    at_least(config, 0, "ppo.norm_samples", "ppo.kl_coef", "ppo.samples_every", "ppo.experience_step.penalty")
    at_least(config, 0, "ppo.experience_step.min_length")
    at_least(config, 0, "ppo.update_step.value_clip", "ppo.update_step.value_coef", "ppo.update_step.kl_target")
    at_least(config, 1, "ppo.update_step.kl_horizon")
    longest = sampling_section(config, "ppo").max_new_tokens
    if ppo.experience_step.get("min_length", 0) > longest:
        raise InputError(
            f"config.ppo.experience_step.min_length: {ppo.experience_step.min_length}; allowed: at most"
            f" sampling.max_new_tokens = {longest}"
        )
    for key in ("clip_low", "clip_high"):
        if not 0.0 < ppo.update_step.get(key, 0.2) < 1.0:
            raise InputError(f"config.ppo.update_step.{key}: {ppo.update_step[key]}; allowed: between 0 and 1")
    for key in ("gamma", "lam"):
        if not 0.0 <= ppo.experience_step.get(key, 1.0) <= 1.0:
            raise InputError(f"config.ppo.experience_step.{key}: {ppo.experience_step[key]}; allowed: 0 to 1")
    if ppo.value_init == "reward" and is_named(ppo.reward):
        raise InputError('config.ppo.value_init: "reward" needs a learned reward; use "policy" or a model folder')


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """Prompts fit the buckets, and what stops a response is a token each. Raises InputError."""
    writing.check_texts(sampling_section(config, "ppo"), data.records, "train", tokenizer, config.data.too_long)


def check_encoders(config: Config, encoders: Mapping[str, str]) -> None:
    """An encoder gives no value a token: known before its reward model is trained. Raises InputError."""
    reward, value = config.ppo.reward, config.ppo.value_init
    learned = "ppo.reward" in encoders or (reward == "reward" and "reward.init_from" in encoders)
    if "ppo.value_init" in encoders or (value == "reward" and learned):
        raise InputError(no_values("ppo.value_init", value))


def sources(config: Config) -> dict[str, str]:
    """The policy's start, and the models of the reward and of the value network where they are named."""
    found = {"ppo.init_from": config.ppo.init_from}
    found |= {} if is_named(config.ppo.reward) else {"ppo.reward": config.ppo.reward}
    return found | ({} if config.ppo.value_init in ("reward", "policy") else {"ppo.value_init": config.ppo.value_init})


def ppo_stage(run: Run) -> dict[str, float]:
    """Trains the policy against the reward, held near its start by the KL term.

    With LoRA the policy and the value network are adapters on models that are held once: the policy's is the reference
    too, and the value network's is that of the reward or the policy, whichever it starts from.
    """
    section, devices = run.config.ppo, run.devices
    sampling = sampling_section(run.config, "ppo")
    records, too_long = writable(run, "ppo", "train")
    options = {"batch_size": section.batch_size, "seed": run.config.seed, "cut": run.config.data.too_long == "cut"}
    batches = writing.prompt_batches(sampling, records, run.tokenizer, **options)
    policy = policy_of(run, *run.start("ppo"), "ppo", adapters=run.adapters("ppo"), purpose="ppo-lora")
    reward = reward_of(run, "ppo.reward", section.reward)
    keys = {p: devices.key(f"ppo-{p}") for p in ("rollout", "update", "norm")}
    norm = measure_norm(devices, policy, reward, batches, records, keys["norm"], wanted=section.norm_samples)
    value_model, value_params, value_base = value_of(run, policy, reward, norm)
    bases = (policy.base, value_base)
    reference = policy.base
    if reference is None:
        reference = jax.tree.map(lambda x: x.astype(reference_dtype(section)), policy.params)

    total = total_steps(section, batches.steps_per_epoch)
    both = {"optim": policy.model, "value_optim": value_model}
    recipes = [optimizer(optim_section(run.config, "ppo", key), total, model) for key, model in both.items()]
    state, shardings = create(devices, policy, value_params, recipes, section.kl_coef, norm)
    models = PPOModels(policy.model, value_model, policy.model)
    experience, update = programs(run, models, recipes, shardings)
    latest: dict[str, Rollout] = {}

    def one(state: PPOState, index: int):
        every = run.config.run.breakdown_every
        timed = training.Stopwatch(state, on=every > 0 and (index + 1) % every == 0)
        prompts = global_batch(batches.batch_at(index), devices.mesh)
        generation = timed("rollout", policy.rollout(state.policy.params, prompts, keys["rollout"], state.step))
        scores = timed("score", reward(generation, [records[i] for i in batches.indices_at(index)]))
        params = (state.policy.params, state.value.params, reference)
        made = experience(*params, generation, scores, state.kl_coef, state.reward_norm, bases)
        latest["rollout"] = timed("experience", made)
        out = timed("update", update(state, made, keys["update"], bases))
        if timed.seconds:
            run.log.timing("ppo", index + 1, **timed.seconds)
        return out

    def sample_rows(state, done: int) -> None:
        if section.samples_every and done % section.samples_every == 0:
            run.log.samples("ppo", done, rollout_rows(run.tokenizer, latest["rollout"], limit=8))

    work = update_work(run, batches, policy.model.config, value_model.config, reward)
    state, out = training.train(
        run, "ppo", state, one, total=total, work=work, learning_rate=recipes[0].rate, after=sample_rows,
        shown="raw_score",
    )  # fmt: skip
    run.save_model("ppo", policy.model, state.policy.params, policy.base)
    return out | too_long


def update_work(run: Run, batches, policy, value, reward) -> training.Work:
    """(index) -> (tokens, model FLOPs) of that update: every token is written, read by all models, and learnt from."""
    section, added = run.config.ppo, sampling_section(run.config, "ppo").max_new_tokens
    read = [policy] * 3 + [value]  # rollout, old and reference; values
    read += [reward.config] if isinstance(reward, LearnedReward) else []
    learned = [policy, value] * section.update_step.get("epochs", 1)
    passed = [(config, 1) for config in read] + [(config, passes(run.adapters("ppo"))) for config in learned]

    def work(index: int) -> tuple[float, float]:
        shape = (section.batch_size, batches.length_at(index) + added)
        parts = [step_work(config, shape, count) for config, count in passed]
        return parts[0][0], sum(flops for _, flops in parts)

    return work


def reference_dtype(section) -> Any:
    """bfloat16 on accelerators, float32 on CPU, unless the config says."""
    if section.reference_dtype != "auto":
        return jnp.dtype(section.reference_dtype)
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def value_of(run: Run, policy: Policy, reward, norm: RewardNorm):
    """(model, what is trained of it, what is not) of the value network that `config.ppo.value_init` names."""
    start = run.config.ppo.value_init
    loaded = None if start in ("reward", "policy") else run.load_model("ppo.value_init", start)
    model, params = value_network(
        run.devices, run.config.model, policy, reward, norm, start=start, key="ppo.value_init", loaded=loaded
    )
    params, base = trained_part(run.devices, run.adapters("ppo"), params, model.config, "ppo-value-lora")
    return model, jax.tree.map(jnp.copy, params), base  # the state is donated, the reward's parameters are not


def create(devices: Devices, policy: Policy, value_params, recipes, kl_coef: float, norm: RewardNorm):
    """The state before the first update, and its shardings."""
    txs = [recipe.tx for recipe in recipes]
    own, values = parameters(policy.params), parameters(value_params)
    say("ppo", f"{own:,} parameters of the policy to train, {values:,} of the values; 4 programs a length of prompts")

    def make(policy_params, value_params, kl_coef, norm):
        return PPOState(
            policy=LMState.create(policy_params, txs[0]),
            value=ValueState.create(value_params, txs[1]),
            kl_coef=kl_coef,
            reward_norm=norm,
            step=jnp.zeros((), jnp.int32),
        )

    given = (policy.params, value_params, *place((np.float32(kl_coef), norm), devices.replicated))
    shardings = devices.shardings(jax.eval_shape(make, *given))
    return jax.jit(make, out_shardings=shardings)(*given), shardings


def programs(run: Run, models: PPOModels, recipes, state_shardings):
    """(experience, update), each compiled once a prompt length."""
    section, sampling, adapters = run.config.ppo, sampling_section(run.config, "ppo"), run.adapters("ppo")
    update_step = section.update_step.to_dict()
    pieces = update_step.get("minibatches", 1) * update_step.get("num_microbatches", 1)

    def bound(bases) -> PPOModels:
        policy, value = (lora.bind(m, b, adapters) for m, b in zip((models.policy, models.value), bases, strict=True))
        return models._replace(policy=policy, value=value)

    make = functools.partial(
        run.steps["ppo_experience"],
        eos_ids=stop_ids(run.tokenizer, sampling.stop, "config.sampling.stop"),
        temperature=sampling.temperature,
        minibatches=pieces,
        **section.experience_step.to_dict(),
    )
    learn = functools.partial(run.steps["ppo_update"], temperature=sampling.temperature, **update_step)
    experience = jit_step(
        lambda policy, value, ref, generation, scores, kl_coef, norm, bases: make(
            policy, value, ref, generation, scores, models=bound(bases), kl_coef=kl_coef, reward_norm=norm
        ),
        name="ppo_experience",
        shapes=len(sampling.prompt_buckets),
    )
    numbers = place([dict(recipe.numbers) for recipe in recipes], run.devices.replicated)

    def updated(state, rollout, key, bases, numbers):
        txs = tuple(recipe.make(given) for recipe, given in zip(recipes, numbers, strict=True))
        return learn(state, rollout, jax.random.fold_in(key, state.step), models=bound(bases), txs=txs)

    update = jit_step(
        updated,
        name="ppo_update",
        donate=(0,),
        out_shardings=(state_shardings, run.devices.replicated),
        shapes=len(sampling.prompt_buckets),
    )
    return experience, lambda state, rollout, key, bases: update(state, rollout, key, bases, numbers)


STAGE = Stage(
    name="ppo",
    title="PPO",
    summary="Proximal policy optimisation towards a reward, near the model that it starts from",
    source="Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593",
    section=ppo_section,
    moved=MOVED,
    check=check,
    check_encoders=check_encoders,
    check_texts=check_texts,
    steps={
        **STEPS,
        "ppo_experience": Step(
            "lfjax.steps.ppo_experience:ppo_experience",
            "ppo.experience_step",
            ("models", "eos_ids", "temperature", "minibatches", "kl_coef", "reward_norm"),
        ),
        "ppo_update": Step("lfjax.steps.ppo_update:ppo_update", "ppo.update_step", ("models", "txs", "temperature")),
    },
    sources=sources,
    reads_only=lambda config: () if config.ppo.value_init == "reward" else ("ppo.reward",),
    scorers=lambda config: ("ppo.reward",),
    functions=lambda config: {"ppo.reward": config.ppo.reward} if is_named(config.ppo.reward) else {},
    heads=True,
    longest=lambda config: writing.longest(sampling_section(config, "ppo")),
    makes=LANGUAGE_MODEL,
    figures={
        "ppo/raw_score": Figure("Score", "as the reward says it", "higher"),
        "ppo/score": Figure("Normalised score", "what PPO learns from: after the rules on length and end", "higher"),
        "ppo/kl": Figure("KL from the start", "nats a sequence", marks=((15.0, "limit 15"),)),
        "ppo/length": Figure("Length", "tokens a response", marks=((8.0, "limit 8"),)),
    },
    scored_by=lambda section: "reward function" if is_named(str(section.get("reward"))) else "reward model",
    unit="updates",
    run=ppo_stage,
)
