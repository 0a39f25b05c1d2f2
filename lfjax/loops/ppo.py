"""The PPO stage: rollout -> score -> experience -> update, each one compiled program, dispatched without waiting."""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import InputError, cause_of, is_function
from lfjax.data.batching import PromptBatches
from lfjax.loops.run import Run
from lfjax.loops.supervised import compute_settings, passes, total_steps, training_parts
from lfjax.loops.training import train
from lfjax.models import lora
from lfjax.models.encoder import EncoderConfig
from lfjax.models.flops import forward_flops
from lfjax.sharding import global_batch, jit_step, replicated, shardings_for
from lfjax.state import LMState, PPOState, RewardNorm, ValueState
from lfjax.steps.ppo_forward import PPOModels
from lfjax.tokenizers import response_text
from lfjax.types import Generation, Rollout


class Policy:
    """A language model that writes: its parameters on the mesh and one rollout program a prompt length.

    With a `stage` that trains adapters, `params` are these and `base` the model; else `params` are the model.
    """

    def __init__(self, run: Run, key: str, name: str, *, temperature: float | None = None, stage: str | None = None):
        self.run = run
        loaded = run.load_model(key, name, language=True)
        self.model = run.network(compute_settings(run, loaded.model.config, dropout=0.0))
        self.params, self.base, how = loaded.params, None, None
        if stage is not None:
            how = run.lora_of(stage)
            self.params, self.base = run.trained_part(stage, loaded.params, self.model.config, f"{stage}-lora")
        options = run.config.ppo.rollout_step.to_dict()
        if temperature is not None:
            options["temperature"] = temperature

        def rollout(params, prompts, key, index, base):
            function = functools.partial(
                run.steps["ppo_rollout"],
                model=lora.bind(self.model, base, how),
                eos_ids=run.stop_ids,
                pad_id=run.tokenizer.pad_id,
                **options,
            )
            return function(params, prompts, jax.random.fold_in(key, index))

        self._step = run.program(
            ("ppo_rollout", self.model.config, *sorted(options.items()), how),
            lambda: jit_step(rollout, name="ppo_rollout", shapes=prompt_shapes(run)),
        )

    def rollout(self, params, prompts, key, index) -> Generation:
        """Responses to a batch of prompts; `index` is folded into the key."""
        return self._step(params, prompts, key, index, self.base)


class LearnedReward:
    """Scores by a reward model, on the device."""

    def __init__(self, run: Run, name: str):
        loaded = run.load_model("ppo.reward", name)
        if loaded.model.config.num_labels != 1:
            raise InputError(f"config.ppo.reward: {name!r} is no reward model: it has no head with one score")
        self.config = compute_settings(run, loaded.model.config, dropout=0.0)
        self.params = loaded.params
        model = run.network(self.config)
        function = functools.partial(run.steps["ppo_score"], model=model)
        self.step = run.program(
            ("ppo_score", self.config), lambda: jit_step(function, name="ppo_score", shapes=prompt_shapes(run))
        )

    def __call__(self, generation: Generation, records) -> jax.Array:
        """Raw scores [B]; `records` are not read."""
        return self.step(self.params, generation)


class FunctionReward:
    """Scores by any Python function f(prompts, responses, records) -> one number a response."""

    def __init__(self, run: Run, dotted: str):
        self.run, self.dotted = run, dotted
        self.function = run.resolve("ppo.reward", dotted)

    def __call__(self, generation: Generation, records) -> jax.Array:
        """Raw scores [B].

        Raises:
          InputError: the function fails, or gave another number of scores than responses, or one that is not finite.
        """
        prompts, responses = texts(self.run, fetch(self.run, generation))
        try:
            scores = np.asarray(self.function(prompts, responses, records), np.float32)
        except (Exception, SystemExit) as error:  # whatever a user's function does wrong is theirs to mend
            cause = cause_of(error, inspect.getsourcefile(inspect.unwrap(self.function)) or "")
            raise InputError(f"config.ppo.reward: {self.dotted} fails: {cause}; mend it") from error
        if scores.shape != (len(responses),):
            raise InputError(
                f"config.ppo.reward: {self.dotted} gave scores of shape {list(scores.shape)} for {len(responses)}"
                " responses; return one number a response"
            )
        if not np.all(np.isfinite(scores)):
            row = int(np.argmin(np.isfinite(scores)))
            raise InputError(
                f"config.ppo.reward: {self.dotted} gave {scores[row]} for the response {responses[row]!r};"
                " return finite numbers"
            )
        return global_batch(scores, self.run.mesh)


def make_reward(run: Run) -> LearnedReward | FunctionReward:
    """The reward that `config.ppo.reward` names."""
    name = run.config.ppo.reward
    return FunctionReward(run, name) if is_function(name) else LearnedReward(run, name)


def texts(run: Run, generation: Generation | Rollout) -> tuple[list[str], list[str]]:
    """Prompts and responses of host arrays as text."""
    tokens = generation.tokens if isinstance(generation, Generation) else generation.responses
    prompts, responses = [], []
    rows = zip(generation.prompts, generation.prompt_mask, tokens, generation.mask, strict=True)
    for prompt, prompt_mask, response, mask in rows:
        prompt, response = prompt[prompt_mask].tolist(), response[mask].tolist()
        prompts.append(run.tokenizer.decode(prompt))
        responses.append(response_text(run.tokenizer, prompt, response))
    return prompts, responses


def prompt_batches(run: Run, records, batch_size: int) -> PromptBatches:
    """One prompt a record; a batch's rows are `indices_at(step)` into the records."""
    options = {"buckets": run.config.ppo.prompt_buckets, "seed": run.config.seed, "pad_id": run.tokenizer.pad_id}
    return PromptBatches(run.prompts(records), batch_size=batch_size, **options)


def prompt_shapes(run: Run) -> int:
    """How many shapes prompts come in: every length, in PPO's batches and in the evaluation's."""
    return len(run.config.ppo.prompt_buckets) * len({run.config.ppo.batch_size, run.config.evaluate.batch_size})


def value_network(run: Run, policy: Policy, reward, norm: RewardNorm):
    """(model, parameters) that start as the reward model's scores, normalised, or as the policy with a zero head."""
    name = run.config.ppo.value_init
    if name == "reward" and isinstance(reward, LearnedReward) and isinstance(reward.config, EncoderConfig):
        raise InputError(run.no_values(name))
    if name == "reward" and isinstance(reward, LearnedReward):
        config, params = reward.config, dict(reward.params)
        head = {
            "kernel": params["head"]["kernel"] / norm.std,
            "bias": (params["head"].get("bias", jnp.zeros(1)) - norm.mean) / norm.std,
        }
    elif name == "policy":
        config = policy.model.config
        whole = policy.params if policy.base is None else policy.base
        params = {group: leaves for group, leaves in whole.items() if group != "unembed"}
        head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}
    else:
        if name == "reward":
            raise InputError('config.ppo.value_init: "reward" needs a learned reward; use "policy" or a model folder')
        loaded = run.load_model("ppo.value_init", name)
        config, params = loaded.model.config, loaded.params
        if isinstance(config, EncoderConfig):
            raise InputError(run.no_values(name))
        if config.num_labels != 1:
            raise InputError(f'config.ppo.value_init: {name!r} has no head with one value; use "reward" or "policy"')
        head = {"kernel": params["head"]["kernel"], "bias": params["head"].get("bias", jnp.zeros(1))}
    config = compute_settings(run, config, num_labels=1, head_bias=True, dropout=0.0)
    params = {**params, "head": head}
    return run.network(config), run.place(params)


def measure_norm(run: Run, policy: Policy, reward, batches, records, key) -> RewardNorm:
    """Mean and deviation of the raw score over `norm_samples` samples of the reference."""
    wanted = run.config.ppo.norm_samples
    if wanted == 0:
        return RewardNorm.identity()
    scores = []
    for index in range(-(-wanted // run.config.ppo.batch_size)):
        prompts = global_batch(batches.batch_at(index), run.mesh)
        generation = policy.rollout(policy.params, prompts, key, np.int32(index))
        scores.append(reward(generation, [records[i] for i in batches.indices_at(index)]))
    values = np.concatenate([np.asarray(s, np.float64) for s in fetch(run, scores)])[:wanted]
    return RewardNorm(mean=jnp.float32(values.mean()), std=jnp.float32(values.std() if values.std() > 1e-4 else 1.0))


def fetch(run: Run, tree) -> Any:
    """Device arrays, sharded or not, as host arrays on every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def ppo_stage(run: Run) -> dict[str, float]:
    """Trains the policy against the reward, held near its start by the KL term.

    With LoRA the policy and the value network are adapters on models that are held once: the policy's is the reference
    too, and the value network's is that of the reward or the policy, whichever it starts from.
    """
    section, records = run.config.ppo, run.records.train
    batches = prompt_batches(run, records, section.batch_size)
    policy, reward = Policy(run, *run.start_of("ppo"), stage="ppo"), make_reward(run)
    keys = {p: run.key(f"ppo-{p}") for p in ("rollout", "update", "norm")}
    norm = measure_norm(run, policy, reward, batches, records, keys["norm"])
    value_model, value_params = value_network(run, policy, reward, norm)
    value_params, value_base = run.trained_part("ppo", value_params, value_model.config, "ppo-value-lora")
    value_params = jax.tree.map(jnp.copy, value_params)  # the state is donated, the reward's parameters are not
    models, bases = PPOModels(policy.model, value_model, policy.model), (policy.base, value_base)
    ref_params = policy.base
    if ref_params is None:
        ref_params = jax.tree.map(lambda x: x.astype(reference_dtype(section)), policy.params)

    total = total_steps(section, batches.steps_per_epoch)
    policy_tx, rate = training_parts(run, "ppo", total, policy.model)
    value_tx, _ = training_parts(run, "ppo", total, value_model, "value_optim")

    def create(policy_params, value_params):
        return PPOState(
            policy=LMState.create(policy_params, policy_tx),
            value=ValueState.create(value_params, value_tx),
            kl_coef=jnp.float32(section.kl_coef),
            reward_norm=norm,
            step=jnp.zeros((), jnp.int32),
        )

    shapes = jax.eval_shape(create, policy.params, value_params)
    shardings = shardings_for(shapes, run.mesh, run.rules)
    state = jax.jit(create, out_shardings=shardings)(policy.params, value_params)
    experience, update = _programs(run, models, (policy_tx, value_tx), shardings)
    latest: dict[str, Rollout] = {}

    def one(state: PPOState, index: int):
        every = run.config.run.breakdown_every
        timed = Stopwatch(state, on=every > 0 and (index + 1) % every == 0)
        prompts = global_batch(batches.batch_at(index), run.mesh)
        generation = timed("rollout", policy.rollout(state.policy.params, prompts, keys["rollout"], state.step))
        scores = timed("score", reward(generation, [records[i] for i in batches.indices_at(index)]))
        args = (
            state.policy.params,
            state.value.params,
            ref_params,
            generation,
            scores,
            state.kl_coef,
            state.reward_norm,
            bases,
        )
        rollout = latest["rollout"] = timed("experience", experience(*args))
        out = timed("update", update(state, rollout, keys["update"], bases))
        if timed.seconds:
            run.log.timing("ppo", index + 1, **timed.seconds)
        return out

    def sample_rows(state, done: int) -> None:
        if section.samples_every and done % section.samples_every == 0:
            run.log.samples("ppo", done, rollout_rows(run, latest["rollout"], limit=8))

    tokens = section.batch_size * (float(np.mean(batches.lengths)) + section.rollout_step.max_new_tokens)
    scored = [reward.config] if isinstance(reward, LearnedReward) else []
    read = [policy.model.config] * 3 + [value_model.config, *scored]  # rollout, old and reference; values; scores
    learned = [policy.model.config, value_model.config] * (passes(run, "ppo") * section.update_step.get("epochs", 1))
    flops = sum(forward_flops(config, int(tokens / section.batch_size)) for config in read + learned)
    state, out = train(
        run,
        "ppo",
        state,
        one,
        total=total,
        tokens_per_step=tokens,
        flops_per_step=tokens * flops,
        learning_rate=rate,
        after=sample_rows,
        shown="score",
    )
    run.save_model("ppo", policy.model, state.policy.params, policy.base)
    return out


class Stopwatch:
    """Seconds of the parts of one update: if on, `timed(name, outputs)` waits for the outputs; it returns them."""

    def __init__(self, before, *, on: bool):
        self.seconds: dict[str, float] = {}
        self._on, self._last = on, 0.0
        self("before", before)
        self.seconds.clear()

    def __call__(self, name: str, outputs):
        """Adds the time since the call before."""
        if self._on:
            jax.block_until_ready(outputs)
            now = time.perf_counter()
            self.seconds[f"{name}_s"], self._last = now - self._last, now
        return outputs


def reference_dtype(section) -> Any:
    """bfloat16 on accelerators, float32 on CPU, unless the config says."""
    if section.reference_dtype != "auto":
        return jnp.dtype(section.reference_dtype)
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _programs(run: Run, models: PPOModels, txs, state_shardings):
    section = run.config.ppo
    temperature = section.rollout_step.get("temperature", 1.0)  # a fork may have deleted what it does not take
    update_step = section.update_step.to_dict()
    pieces = update_step.get("minibatches", 1) * update_step.get("num_microbatches", 1)
    how = run.lora_of("ppo")

    def bound(bases) -> PPOModels:
        policy, value = bases
        return models._replace(policy=lora.bind(models.policy, policy, how), value=lora.bind(models.value, value, how))

    make = functools.partial(
        run.steps["ppo_experience"],
        eos_ids=run.stop_ids,
        temperature=temperature,
        minibatches=pieces,
        **section.experience_step.to_dict(),
    )
    learn = functools.partial(run.steps["ppo_update"], txs=txs, temperature=temperature, **update_step)
    experience = jit_step(
        lambda policy, value, ref, generation, scores, kl_coef, norm, bases: make(
            policy, value, ref, generation, scores, models=bound(bases), kl_coef=kl_coef, reward_norm=norm
        ),
        name="ppo_experience",
        shapes=len(section.prompt_buckets),
    )
    update = jit_step(
        lambda state, rollout, key, bases: learn(
            state, rollout, jax.random.fold_in(key, state.step), models=bound(bases)
        ),
        name="ppo_update",
        donate=(0,),
        out_shardings=(state_shardings, replicated(run.mesh)),
        shapes=len(section.prompt_buckets),
    )
    return experience, update


def rollout_rows(run: Run, rollout: Rollout, limit: int) -> list[dict[str, Any]]:
    """The first rows of a rollout for samples.jsonl; logprob and kl are sums over the response, in nats."""
    host = jax.tree.map(lambda x: np.asarray(x[:limit]), fetch(run, rollout))
    prompts, responses = texts(run, host)
    return [
        {
            "prompt": prompts[i],
            "response": responses[i],
            "score": float(host.scores[i]),
            "logprob": float(host.old_logprobs[i].sum()),
            "kl": float((host.old_logprobs[i] - host.ref_logprobs[i]).sum()),
        }
        for i in range(len(prompts))
    ]
