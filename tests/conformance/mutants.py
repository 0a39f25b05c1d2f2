"""Known mistakes, each as an edit of lfjax's own source, with tests that it must fail and one that it must pass."""

import inspect
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from subjects import LIBRARY, STEPS

from lfjax.losses.policy_gradient import clipped_policy_losses
from lfjax.optim import coupled_grads


class Mutant(NamedTuple):
    """An edit of the module that holds `subject`, a name of subjects.py's tables; tests are named without "test_"."""

    subject: str
    old: str  # occurs once in the module
    new: str
    fails: tuple[str, ...]
    passes: str  # another test of the subject, which shows that it still runs; "" where there is no other


# What the edits below call


def averaged_micro_means(loss_fn, params, batch, num_microbatches=1, *, rng=None, has_aux=False):
    """`weighted_grads` as many trainers have it: the mean of the microbatches' mean losses."""

    def mean_loss(params, micro, index):
        out = loss_fn(params, micro) if rng is None else loss_fn(params, micro, jax.random.fold_in(rng, index))
        return (out[0].value, out) if has_aux else (out.value, out)

    pieces = [jax.tree.map(lambda x, i=i: x[i::num_microbatches], batch) for i in range(num_microbatches)]
    results = [jax.grad(mean_loss, has_aux=True)(params, piece, i) for i, piece in enumerate(pieces)]
    grads = jax.tree.map(lambda *g: sum(g) / num_microbatches, *[g for g, _ in results])
    return jax.tree.map(lambda *x: sum(x), *[out for _, out in results]), grads


def averaged_coupled_grads(forward, loss_fn, params, batch, num_microbatches=1, *, rng=None):
    """`coupled_grads` whose microbatches are averaged where they should be added up."""
    out, grads = coupled_grads(forward, loss_fn, params, batch, num_microbatches, rng=rng)
    return out, jax.tree.map(lambda g: g / num_microbatches, grads)


def one_longer(mask):
    """The mask with one more token at its end."""
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def without_pads(pad_id, sampler):
    """A sampler whose mask is `!= pad_id`."""

    def sample(*args, **kwargs):
        out = sampler(*args, **kwargs)
        return out._replace(mask=out.tokens != pad_id)

    return sample


def fixed_key(*_):
    return jax.random.key(0)


def in_type_of(model, tree):
    """Floats with the bits of the model's activations."""

    def shorten(x):
        return x.astype(model.config.dtype).astype(x.dtype) if x.dtype == jnp.float32 else x

    return jax.tree.map(shorten, tree)


class Changed:
    """A model whose `apply` takes further arguments."""

    def __init__(self, model, change):
        self.model, self.change, self.config, self.unembed = model, change, model.config, model.unembed

    def apply(self, variables, tokens, **options):
        return self.model.apply(variables, tokens, **options, **self.change(tokens))


def by_column(models):
    """Positions from the first column on, padding or not."""
    return models._replace(
        policy=Changed(models.policy, columns),
        value=Changed(models.value, columns),
        reference=Changed(models.reference or models.policy, columns),
    )


def columns(tokens):
    return {"positions": jnp.arange(tokens.shape[1])[None]}


def dropping(models, *names):
    """The named networks with their dropout on."""
    return models._replace(**{name: Changed(getattr(models, name), lambda _: DROPOUT) for name in names})


DROPOUT = {"rngs": {"dropout": jax.random.key(0)}}


def optimistic_losses(logprobs, old_logprobs, advantages, *, clip_low, clip_high):
    """max where it should be min."""
    ratio = jnp.exp(jnp.clip(logprobs - jax.lax.stop_gradient(old_logprobs), -20.0, 20.0))
    return -jnp.maximum(ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def unbounded_losses(logprobs, old_logprobs, advantages, *, clip_low, clip_high):
    """exp of whatever comes."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def unclipped_kl_controller(coef, kl, n, *, target, horizon):
    return coef * (1.0 + (kl / target - 1.0) * n / horizon)


NAMES = (
    averaged_micro_means, averaged_coupled_grads, one_longer, without_pads, fixed_key, in_type_of, by_column, columns,
    dropping, optimistic_losses, unbounded_losses, unclipped_kl_controller, clipped_policy_losses,
)  # fmt: skip


def fork(mutant: Mutant):
    """The subject after the edit of its module's source: what a researcher's copy would be."""
    module_name, _, function = (STEPS | LIBRARY)[mutant.subject].partition(":")
    source = inspect.getsource(sys.modules[module_name])
    count = source.count(mutant.old)
    assert count == 1, f"{module_name} holds {count} times {mutant.old!r}: edit this mutant"
    copy = types.ModuleType(f"mutant_of_{module_name}")
    names = {name.__name__: name for name in NAMES}
    copy.__dict__.update(names, DROPOUT=DROPOUT)
    exec(compile(source.replace(mutant.old, mutant.new), copy.__name__, "exec", dont_inherit=True), copy.__dict__)
    return getattr(copy, function)


UPDATE_START = '    size, clip = rollout.mask.shape[0], {"clip_low": clip_low, "clip_high": clip_high}\n'
FORWARD = "    def forward(rows):\n"

MUTANTS = {
    # rollout
    "temperature forgotten in the rollout": Mutant(
        "ppo_rollout",
        "temperature=temperature",
        "temperature=1.0",
        ("one_temperature_divides_logits_everywhere",),
        "noise_belongs_to_the_key_and_the_row",
    ),
    "mask from the pad id in the rollout": Mutant(
        "ppo_rollout",
        "    return generate(",
        "    return without_pads(pad_id, generate)(",
        (
            "eos_counts_even_where_it_is_the_pad_id",
            "tokens_after_the_first_eos_count_nowhere",
            "a_stop_token_ends_the_text_that_is_scored",
        ),
        "noise_belongs_to_the_key_and_the_row",
    ),
    "only the first of several stop tokens": Mutant(
        "ppo_rollout",
        "eos_ids=eos_ids",
        "eos_ids=eos_ids[:1]",
        (
            "eos_counts_even_where_it_is_the_pad_id",
            "tokens_after_the_first_eos_count_nowhere",
            "a_stop_token_ends_the_text_that_is_scored",
        ),
        "noise_belongs_to_the_key_and_the_row",
    ),
    "prompts' padding is read": Mutant(
        "ppo_rollout",
        "prompts.mask,",
        "prompts.tokens >= 0,",
        ("prompts_are_left_padded_and_positions_count_real_tokens",),
        "noise_belongs_to_the_key_and_the_row",
    ),
    "top-k and top-p let through": Mutant(
        "ppo_rollout",
        "if top_k or top_p != 1.0:",
        "if False:",
        ("rollouts_come_from_the_whole_distribution",),
        "noise_belongs_to_the_key_and_the_row",
    ),
    "top-p inside the rollout": Mutant(
        "ppo_rollout",
        "temperature=temperature,\n",
        "temperature=temperature,\n        top_p=0.9,\n",
        ("every_token_is_sampled_at_its_rate",),
        "rollouts_come_from_the_whole_distribution",
    ),
    "top-k inside the rollout": Mutant(
        "ppo_rollout",
        "temperature=temperature,\n",
        "temperature=temperature,\n        top_k=20,\n",
        ("every_token_is_sampled_at_its_rate",),
        "rollouts_come_from_the_whole_distribution",
    ),
    "key not passed on": Mutant(
        "ppo_rollout",
        "        rng,\n",
        "        fixed_key(),\n",
        ("noise_belongs_to_the_key_and_the_row",),
        "one_temperature_divides_logits_everywhere",
    ),
    "noise by place in the batch": Mutant(
        "ppo_rollout",
        "row_ids=prompts.row_ids",
        "row_ids=None",
        ("noise_belongs_to_the_key_and_the_row",),
        "one_temperature_divides_logits_everywhere",
    ),
    "noise shared by all rows": Mutant(
        "ppo_rollout",
        "row_ids=prompts.row_ids",
        "row_ids=0 * prompts.row_ids",
        ("noise_belongs_to_the_key_and_the_row",),
        "one_temperature_divides_logits_everywhere",
    ),
    # score
    "score read at the last column": Mutant(
        "ppo_score",
        "attention_mask=mask)[:, 0]",
        "attention_mask=mask, method='values')[:, -1, 0]",
        ("reward_is_read_at_the_last_real_token",),
        "half_precision_ends_at_the_hidden_states",
    ),
    "score reads on after the stop token": Mutant(
        "ppo_score",
        "generation.prompt_mask, generation.mask]",
        "generation.prompt_mask, generation.mask | True]",
        ("a_stop_token_ends_the_text_that_is_scored", "reward_is_read_at_the_last_real_token"),
        "half_precision_ends_at_the_hidden_states",
    ),
    "score's positions count padding": Mutant(
        "ppo_score",
        "attention_mask=mask)",
        "attention_mask=mask, **columns(tokens))",
        ("prompts_are_left_padded_and_positions_count_real_tokens",),
        "reward_is_read_at_the_last_real_token",
    ),
    "dropout on in the score": Mutant(
        "ppo_score",
        "attention_mask=mask)",
        "attention_mask=mask, **DROPOUT)",
        ("dropout_is_off_in_every_part_of_ppo",),
        "reward_is_read_at_the_last_real_token",
    ),
    # experience
    "positions count padding in the experience": Mutant(
        "ppo_experience",
        FORWARD,
        f"    models = by_column(models)\n\n{FORWARD}",
        ("prompts_are_left_padded_and_positions_count_real_tokens",),
        "score_sits_at_the_last_response_token",
    ),
    "mask from the pad id in the experience": Mutant(
        "ppo_experience",
        "mask = generation.mask\n",
        "mask = generation.tokens != 0\n",
        ("masks_never_come_from_the_pad_id", "score_sits_at_the_last_response_token"),
        "a_policy_equal_to_its_reference_has_no_kl",
    ),
    "EOS looked for beyond the mask": Mutant(
        "ppo_experience",
        "jnp.isin(token, jnp.asarray(eos_ids)) & jnp.any(generation.mask, axis=1)",
        "jnp.any(jnp.isin(generation.tokens, jnp.asarray(eos_ids)), axis=1)",
        ("tokens_after_the_first_eos_count_nowhere",),
        "score_sits_at_the_last_response_token",
    ),
    "only the first of several stop tokens ends a text": Mutant(
        "ppo_experience",
        "has_ended(generation, eos_ids)  #",
        "has_ended(generation, eos_ids[:1])  #",
        ("a_response_without_eos_is_punished", "length_is_limited_and_stands_beside_the_score"),
        "score_sits_at_the_last_response_token",
    ),
    "a penalty of its own": Mutant(
        "ppo_experience",
        "jnp.minimum(normalised, 0.0) - penalty",
        "jnp.minimum(normalised, 0.0) - 1.0",
        ("a_response_without_eos_is_punished", "length_is_limited_and_stands_beside_the_score"),
        "score_sits_at_the_last_response_token",
    ),
    "EOS rule ignored": Mutant(
        "ppo_experience",
        "| (~ended & require_eos)",
        "",
        ("a_response_without_eos_is_punished",),
        "length_is_limited_and_stands_beside_the_score",
    ),
    "a good ramble keeps its score": Mutant(
        "ppo_experience",
        "jnp.minimum(normalised, 0.0) - penalty",
        "normalised - penalty",
        ("a_response_without_eos_is_punished", "length_is_limited_and_stands_beside_the_score"),
        "score_sits_at_the_last_response_token",
    ),
    "length rule ignored": Mutant(
        "ppo_experience",
        "(jnp.sum(mask, axis=1) < min_length) | ",
        "",
        ("length_is_limited_and_stands_beside_the_score",),
        "a_response_without_eos_is_punished",
    ),
    "temperature forgotten in the reference": Mutant(
        "ppo_experience",
        "ref_params, *rows, **stats)",
        "ref_params, *rows, **(stats | {'temperature': 1.0}))",
        ("one_temperature_divides_logits_everywhere", "a_policy_equal_to_its_reference_has_no_kl"),
        "score_sits_at_the_last_response_token",
    ),
    "temperature forgotten in old and reference": Mutant(
        "ppo_experience",
        '"temperature": temperature,',
        '"temperature": 1.0,',
        ("one_temperature_divides_logits_everywhere",),
        "a_policy_equal_to_its_reference_has_no_kl",
    ),
    "old log-probabilities from the sampler": Mutant(
        "ppo_experience",
        "old_logprobs=old,",
        "old_logprobs=generation.logprobs,",
        ("old_logprobs_are_the_updates_own",),
        "score_sits_at_the_last_response_token",
    ),
    "dropout on in the policy": Mutant(
        "ppo_experience",
        FORWARD,
        f"    models = dropping(models, 'policy')\n\n{FORWARD}",
        ("dropout_is_off_in_every_part_of_ppo",),
        "score_sits_at_the_last_response_token",
    ),
    "score not normalised": Mutant(
        "ppo_experience",
        "- norm.mean) / norm.std",
        "- 0.0) / 1.0",
        ("scores_are_normalised_before_the_rules",),
        "score_sits_at_the_last_response_token",
    ),
    "score normalised after the rules": Mutant(
        "ppo_experience",
        "final = jnp.where(short, jnp.minimum(normalised, 0.0) - penalty, normalised)",
        "final = (jnp.where(short, jnp.minimum(scores, 0.0) - penalty, scores) - norm.mean) / norm.std",
        ("scores_are_normalised_before_the_rules",),
        "a_response_without_eos_is_punished",
    ),
    "KL paid instead of punished": Mutant(
        "ppo_experience",
        "rewards = -kl_coef * kl",
        "rewards = kl_coef * kl",
        ("kl_is_a_penalty_on_every_token",),
        "score_sits_at_the_last_response_token",
    ),
    "KL only at the end": Mutant(
        "ppo_experience",
        "rewards = -kl_coef * kl",
        "rewards = -kl_coef * jnp.where(at_last, jnp.sum(kl, axis=1, keepdims=True), 0.0)",
        ("kl_is_a_penalty_on_every_token",),
        "score_sits_at_the_last_response_token",
    ),
    "another KL than asked for": Mutant(
        "ppo_experience",
        "kind=kl_kind",
        "kind='k3'",
        ("kl_is_a_penalty_on_every_token",),
        "score_sits_at_the_last_response_token",
    ),
    "k1 whatever KL is asked for": Mutant(
        "ppo_experience",
        "kind=kl_kind",
        "kind='k1'",
        ("kl_is_a_penalty_on_every_token",),
        "score_sits_at_the_last_response_token",
    ),
    "score one token late": Mutant(
        "ppo_experience",
        "== last_true_index(mask)[:, None]) & mask",
        "== last_true_index(mask)[:, None] + 1)",
        ("score_sits_at_the_last_response_token",),
        "kl_is_a_penalty_on_every_token",
    ),
    "score at the last column": Mutant(
        "ppo_experience",
        "== last_true_index(mask)[:, None]) & mask",
        "== mask.shape[1] - 1)",
        ("score_sits_at_the_last_response_token",),
        "kl_is_a_penalty_on_every_token",
    ),
    "score in an integer buffer": Mutant(
        "ppo_experience",
        "jnp.where(at_last, final[:, None], 0.0)",
        "jnp.where(at_last, final[:, None].astype(jnp.int32), 0)",
        ("score_sits_at_the_last_response_token",),
        "kl_is_a_penalty_on_every_token",
    ),
    "reward whitening shifts the mean": Mutant(
        "ppo_experience",
        "mask, shift_mean=False)",
        "mask)",
        ("reward_whitening_keeps_the_mean",),
        "score_sits_at_the_last_response_token",
    ),
    "reward whitening over padding": Mutant(
        "ppo_experience",
        "(rewards, mask, shift_mean=False)",
        "(rewards, mask | True, shift_mean=False)",
        ("reward_whitening_keeps_the_mean",),
        "score_sits_at_the_last_response_token",
    ),
    "advantage whitening over padding": Mutant(
        "ppo_experience",
        "masked_whiten(advantages, mask)",
        "masked_whiten(advantages, mask | True)",
        ("advantages_are_whitened_over_the_batchs_response_tokens",),
        "score_sits_at_the_last_response_token",
    ),
    "advantage whitening of each minibatch": Mutant(
        "ppo_experience",
        "masked_whiten(advantages, mask)",
        "jnp.moveaxis(jax.vmap(masked_whiten)(*split_rows((advantages, mask), minibatches)), 0, 1).reshape(mask.shape)",
        ("advantages_are_whitened_over_the_batchs_response_tokens",),
        "score_sits_at_the_last_response_token",
    ),
    "advantage whitening with the unbiased variance": Mutant(
        "ppo_experience",
        "masked_whiten(advantages, mask)",
        "masked_whiten(advantages, mask, ddof=1)",
        ("advantages_are_whitened_over_the_batchs_response_tokens",),
        "score_sits_at_the_last_response_token",
    ),
    "GAE runs on over the padding": Mutant(
        "ppo_experience",
        "gae(shaped, values, mask,",
        "gae(shaped, jnp.where(mask, values, 1.0), mask | True,",
        ("gae_ends_at_the_last_response_token",),
        "score_sits_at_the_last_response_token",
    ),
    "gamma forgotten": Mutant(
        "ppo_experience",
        "mask, gamma=gamma,",
        "mask, gamma=1.0,",
        ("gae_ends_at_the_last_response_token",),
        "score_sits_at_the_last_response_token",
    ),
    "gamma and lambda swapped": Mutant(
        "ppo_experience",
        "gamma=gamma, lam=lam",
        "gamma=lam, lam=gamma",
        ("gae_ends_at_the_last_response_token",),
        "score_sits_at_the_last_response_token",
    ),
    "returns from whitened values": Mutant(
        "ppo_experience",
        "gae(shaped, values, mask,",
        "gae(shaped, masked_whiten(values, mask), mask,",
        ("gae_ends_at_the_last_response_token",),
        "score_sits_at_the_last_response_token",
    ),
    "log-probabilities in half precision": Mutant(
        "ppo_experience",
        "        return old, ref,",
        "        return in_type_of(models.policy, old), ref,",
        ("half_precision_ends_at_the_hidden_states",),
        "score_sits_at_the_last_response_token",
    ),
    # update
    "positions count padding in the update": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    models = by_column(models)\n",
        ("prompts_are_left_padded_and_positions_count_real_tokens",),
        "ratios_and_values_are_clipped",
    ),
    "mask from the pad id in the update": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    rollout = rollout._replace(mask=rollout.responses != 0)\n",
        ("masks_never_come_from_the_pad_id",),
        "a_log_ratio_of_a_thousand_stays_finite",
    ),
    "temperature forgotten in the update": Mutant(
        "ppo_update",
        "*rows, temperature=temperature",
        "*rows, temperature=1.0",
        ("one_temperature_divides_logits_everywhere",),
        "a_log_ratio_of_a_thousand_stays_finite",
    ),
    "dropout on in the update's policy": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    models = dropping(models, 'policy')\n",
        ("dropout_is_off_in_every_part_of_ppo",),
        "ratios_and_values_are_clipped",
    ),
    "dropout on in the update's values": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    models = dropping(models, 'value')\n",
        ("dropout_is_off_in_every_part_of_ppo",),
        "ratios_and_values_are_clipped",
    ),
    "KL coefficient by the KL of a token": Mutant(
        "ppo_update",
        'metrics["ppo/kl"].value, size',
        'metrics["ppo/kl"].value * size / jnp.sum(rollout.mask), size',
        ("the_kl_coefficient_adapts_to_the_kl_of_a_sequence",),
        "ratios_and_values_are_clipped",
    ),
    "KL coefficient by the rows of a minibatch": Mutant(
        "ppo_update",
        'metrics["ppo/kl"].value, size',
        'metrics["ppo/kl"].value, size // minibatches',
        ("the_kl_coefficient_adapts_to_the_kl_of_a_sequence",),
        "ratios_and_values_are_clipped",
    ),
    "KL coefficient by rows used in all epochs": Mutant(
        "ppo_update",
        'metrics["ppo/kl"].value, size',
        'metrics["ppo/kl"].value, size * epochs',
        ("the_kl_coefficient_adapts_to_the_kl_of_a_sequence",),
        "ratios_and_values_are_clipped",
    ),
    "KL coefficient not clipped": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    adaptive_kl = unclipped_kl_controller\n",
        ("the_kl_coefficient_adapts_to_the_kl_of_a_sequence",),
        "ratios_and_values_are_clipped",
    ),
    "KL coefficient by tokens seen": Mutant(
        "ppo_update",
        'metrics["ppo/kl"].value, size',
        'metrics["ppo/kl"].value, jnp.sum(rollout.mask)',
        ("the_kl_coefficient_adapts_to_the_kl_of_a_sequence",),
        "ratios_and_values_are_clipped",
    ),
    "value mask one longer": Mutant(
        "ppo_update",
        "Mean.over(value_coef * losses, micro.mask)",
        "Mean.over(value_coef * losses, one_longer(micro.mask))",
        ("one_mask_for_policy_and_value",),
        "a_log_ratio_of_a_thousand_stays_finite",
    ),
    "micro-means averaged in PPO": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    weighted_grads = averaged_micro_means\n",
        ("losses_are_means_over_all_counted_tokens", "accumulation_is_the_big_batch"),
        "ratios_and_values_are_clipped",
    ),
    "no clip above": Mutant(
        "ppo_update",
        '"clip_high": clip_high}',
        '"clip_high": 1e9}',
        ("ratios_and_values_are_clipped",),
        "one_mask_for_policy_and_value",
    ),
    "one clip for both sides": Mutant(
        "ppo_update",
        '"clip_low": clip_low,',
        '"clip_low": clip_high,',
        ("ratios_and_values_are_clipped",),
        "one_mask_for_policy_and_value",
    ),
    "values not clipped": Mutant(
        "ppo_update",
        "clip=value_clip",
        "clip=1e9",
        ("ratios_and_values_are_clipped",),
        "a_log_ratio_of_a_thousand_stays_finite",
    ),
    "max for min in the policy loss": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    clipped_policy_losses = optimistic_losses\n",
        ("ratios_and_values_are_clipped",),
        "one_mask_for_policy_and_value",
    ),
    "log-ratio not bounded": Mutant(
        "ppo_update",
        UPDATE_START,
        f"{UPDATE_START}    clipped_policy_losses = unbounded_losses\n",
        ("a_log_ratio_of_a_thousand_stays_finite",),
        "ratios_and_values_are_clipped",
    ),
    "advantages whitened in the minibatch": Mutant(
        "ppo_update",
        "micro.old_logprobs, micro.advantages,",
        "micro.old_logprobs, jnp.where(micro.mask, micro.advantages - masked_mean(micro.advantages, micro.mask), 0.0),",
        ("one_mask_for_policy_and_value", "ratios_and_values_are_clipped"),
        "a_log_ratio_of_a_thousand_stays_finite",
    ),
    "entropy punished": Mutant(
        "ppo_update",
        "losses - entropy_coef",
        "losses + entropy_coef",
        ("the_entropy_bonus_keeps_the_policy_open",),
        "ratios_and_values_are_clipped",
    ),
    "entropy of the padding": Mutant(
        "ppo_update",
        "return Mean.over(losses - entropy_coef * stats.entropy, micro.mask), metrics",
        "loss = losses * micro.mask - entropy_coef * stats.entropy\n"
        "        return Mean(jnp.sum(loss), 1.0 * jnp.sum(micro.mask)), metrics",
        ("the_entropy_bonus_keeps_the_policy_open",),
        "ratios_and_values_are_clipped",
    ),
    "gradients at the weights from before the update": Mutant(
        "ppo_update",
        "weighted_grads(policy_loss, policy.params,",
        "weighted_grads(policy_loss, state.policy.params,",
        ("every_step_moves_the_weights_that_the_last_one_left",),
        "ratios_and_values_are_clipped",
    ),
    "values by the policy's optimiser": Mutant(
        "ppo_update",
        "value.apply_gradients(v_grads, txs[1],",
        "value.apply_gradients(v_grads, txs[0],",
        ("every_step_moves_the_weights_that_the_last_one_left",),
        "ratios_and_values_are_clipped",
    ),
    "the same order in each epoch": Mutant(
        "ppo_update",
        "jax.random.split(rng, epochs)",
        "jnp.stack([rng] * epochs)",
        ("every_epoch_takes_every_row_in_an_order_of_its_own",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "rows not shuffled": Mutant(
        "ppo_update",
        "jax.random.permutation(key, size)",
        "jnp.arange(size)",
        ("every_epoch_takes_every_row_in_an_order_of_its_own",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "rows drawn with replacement": Mutant(
        "ppo_update",
        "jax.random.permutation(key, size)",
        "jax.random.randint(key, (size,), 0, size)",
        ("every_epoch_takes_every_row_in_an_order_of_its_own",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "key of the order not passed on": Mutant(
        "ppo_update",
        "jax.random.split(rng, epochs)",
        "jax.random.split(fixed_key(), epochs)",
        ("every_epoch_takes_every_row_in_an_order_of_its_own",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "learning rate steps with the minibatch": Mutant(
        "ppo_update",
        "loss=loss.value, step=state.step)",
        "loss=loss.value)",
        ("learning_rates_count_updates_and_end_at_zero",),
        "every_epoch_takes_every_row_in_an_order_of_its_own",
    ),
    "updates not counted": Mutant(
        "ppo_update",
        "step=state.step + 1), metrics",
        "step=state.step), metrics",
        ("learning_rates_count_updates_and_end_at_zero",),
        "every_epoch_takes_every_row_in_an_order_of_its_own",
    ),
    "entropy not logged": Mutant(
        "ppo_update",
        '"ppo/entropy": Mean.over(stats.entropy, micro.mask), ',
        "",
        ("what_shows_a_run_going_wrong_is_logged",),
        "ratios_and_values_are_clipped",
    ),
    "the last minibatch logged for all": Mutant(
        "ppo_update",
        "jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)",
        "jax.tree.map(lambda x: x[-1], metrics)",
        ("logged_figures_are_their_formulas",),
        "what_shows_a_run_going_wrong_is_logged",
    ),
    "KL logged as a mean over tokens": Mutant(
        "ppo_update",
        '"ppo/kl": Mean.of(jnp.sum(change, axis=1))',
        '"ppo/kl": Mean.over(change, mask)',
        ("logged_figures_are_their_formulas",),
        "ratios_and_values_are_clipped",
    ),
    "length logged with padding": Mutant(
        "ppo_update",
        "Mean.of(jnp.sum(mask, axis=1))",
        "Mean.of(jnp.sum(mask | True, axis=1))",
        ("length_is_limited_and_stands_beside_the_score", "logged_figures_are_their_formulas"),
        "ratios_and_values_are_clipped",
    ),
    "clip fraction over padding": Mutant(
        "ppo_update",
        "return {name: Mean.over(value, micro.mask)",
        "return {name: Mean.over(value, micro.mask | True)",
        ("logged_figures_are_their_formulas",),
        "ratios_and_values_are_clipped",
    ),
    "weights in half precision": Mutant(
        "ppo_update",
        "return (policy, value), metrics",
        "low = in_type_of(models.policy, policy.params)\n        return (policy.replace(params=low), value), metrics",
        ("half_precision_ends_at_the_hidden_states",),
        "ratios_and_values_are_clipped",
    ),
    # supervised and reward training, evaluation
    "micro-means averaged in SFT": Mutant(
        "sft",
        "weighted_grads(loss_fn",
        "averaged_micro_means(loss_fn",
        ("sft_loss_is_the_mean_over_all_counted_tokens", "accumulation_is_the_big_batch"),
        "steps_averaged_by_multisteps_are_the_big_batch_only_at_equal_weights",
    ),
    "padding in the SFT loss": Mutant(
        "sft",
        "micro.loss_mask)",
        "micro.loss_mask | True)",
        (
            "sft_loss_is_the_mean_over_all_counted_tokens",
            "steps_averaged_by_multisteps_are_the_big_batch_only_at_equal_weights",
        ),
        "accumulation_is_the_big_batch",
    ),
    "prompts in the SFT loss": Mutant(
        "sft",
        "micro.loss_mask)",
        "micro.segment_ids > 0)",
        ("sft_loss_is_the_mean_over_all_counted_tokens",),
        "accumulation_is_the_big_batch",
    ),
    "attention across packed documents": Mutant(
        "sft",
        "segment_ids=micro.segment_ids,",
        "attention_mask=micro.segment_ids > 0,",
        ("packed_documents_do_not_see_each_other",),
        "sft_loss_is_the_mean_over_all_counted_tokens",
    ),
    "positions run on over packed documents": Mutant(
        "sft",
        "segment_ids=micro.segment_ids,",
        "segment_ids=micro.segment_ids, **columns(micro.inputs),",
        ("packed_documents_do_not_see_each_other",),
        "sft_loss_is_the_mean_over_all_counted_tokens",
    ),
    "no dropout in SFT": Mutant(
        "sft",
        '{"dropout": key} if model.config.dropout else None',
        "None",
        ("dropout_is_on_in_training_with_noise_of_each_step",),
        "sft_loss_is_the_mean_over_all_counted_tokens",
    ),
    "the same dropout in every step of SFT": Mutant(
        "sft",
        '{"dropout": key}',
        '{"dropout": fixed_key()}',
        ("dropout_is_on_in_training_with_noise_of_each_step",),
        "sft_loss_is_the_mean_over_all_counted_tokens",
    ),
    "SFT's weights in half precision": Mutant(
        "sft",
        "state.apply_gradients(grads, tx, loss=loss.value, weight=loss.weight)",
        "in_type_of(model, state.apply_gradients(grads, tx, loss=loss.value, weight=loss.weight))",
        ("half_precision_ends_at_the_hidden_states",),
        "sft_loss_is_the_mean_over_all_counted_tokens",
    ),
    "reward trained at the last column": Mutant(
        "reward",
        "last_true_index(batch.mask)[..., None]",
        "jnp.full(batch.mask.shape[:2], batch.mask.shape[2] - 1)[..., None]",
        ("reward_is_read_at_the_last_real_token",),
        "accumulation_is_the_big_batch",
    ),
    "microbatches averaged in reward training": Mutant(
        "reward",
        "= coupled_grads(",
        "= averaged_coupled_grads(",
        ("accumulation_is_the_big_batch",),
        "the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",
    ),
    "rejected and chosen swapped": Mutant(
        "reward",
        "ranking.bradley_terry_losses(chosen, rejected,",
        "ranking.bradley_terry_losses(rejected, chosen,",
        ("what_people_prefer_scores_higher", "a_margin_asks_for_a_wider_gap"),
        "the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",
    ),
    "rejected and chosen swapped in the hinge": Mutant(
        "reward",
        "ranking.pairwise_hinge_losses(chosen, rejected,",
        "ranking.pairwise_hinge_losses(rejected, chosen,",
        ("what_people_prefer_scores_higher",),
        "a_margin_asks_for_a_wider_gap",
    ),
    "pairs of ranks the wrong way round": Mutant(
        "reward",
        "rank[:, None] < rank[None, :]",
        "rank[:, None] > rank[None, :]",
        ("what_people_prefer_scores_higher", "a_margin_asks_for_a_wider_gap"),
        "the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",
    ),
    "rankings read upside down": Mutant(
        "reward",
        "ranking.plackett_luce_losses(scores, batch.ranks,",
        "ranking.plackett_luce_losses(scores, -batch.ranks,",
        ("what_people_prefer_scores_higher",),
        "a_margin_asks_for_a_wider_gap",
    ),
    "rankings read upside down in the hinge": Mutant(
        "reward",
        "ranking.listwise_hinge_losses(scores, batch.ranks,",
        "ranking.listwise_hinge_losses(scores, -batch.ranks,",
        ("what_people_prefer_scores_higher",),
        "a_margin_asks_for_a_wider_gap",
    ),
    "the worst answer taken for the best": Mutant(
        "reward",
        "best = batch.ranked & (batch.ranks == 0)",
        "best = batch.ranked & (batch.ranks == jnp.max(batch.ranks, axis=-1, keepdims=True))",
        ("what_people_prefer_scores_higher",),
        "a_margin_asks_for_a_wider_gap",
    ),
    "margin with the wrong sign": Mutant(
        "reward",
        "margins = margin_scale * ",
        "margins = -margin_scale * ",
        ("a_margin_asks_for_a_wider_gap",),
        "what_people_prefer_scores_higher",
    ),
    "no dropout in reward training": Mutant(
        "reward",
        '{"dropout": key} if model.config.dropout else None',
        "None",
        ("dropout_is_on_in_training_with_noise_of_each_step",),
        "reward_is_read_at_the_last_real_token",
    ),
    "pair accuracy of the wrong order": Mutant(
        "reward",
        "0.5 * (chosen > rejected) + 0.5 * (chosen >= rejected)",
        "0.5 * (chosen < rejected) + 0.5 * (chosen <= rejected)",
        ("the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",),
        "reward_is_read_at_the_last_real_token",
    ),
    "no dropout in classification": Mutant(
        "classify",
        '{"dropout": key} if model.config.dropout else None',
        "None",
        ("dropout_is_on_in_training_with_noise_of_each_step",),
        "a_class_is_read_at_the_last_real_token",
    ),
    "padding is read by the classifier": Mutant(
        "classify",
        "attention_mask=micro.mask",
        "attention_mask=micro.mask | True",
        ("a_class_is_read_at_the_last_real_token", "class_loss_and_accuracy_are_means_over_the_rows_that_count"),
        "",
    ),
    "micro-means averaged in classification": Mutant(
        "classify",
        "weighted_grads(loss_fn",
        "averaged_micro_means(loss_fn",
        ("class_loss_and_accuracy_are_means_over_the_rows_that_count",),
        "",
    ),
    "rows that fill a batch are classified": Mutant(
        "classify",
        "Mean.over(losses[:, 0], micro.counts)",
        "Mean.of(losses[:, 0])",
        ("class_loss_and_accuracy_are_means_over_the_rows_that_count",),
        "",
    ),
    "rows that fill a batch in the accuracy": Mutant(
        "classify",
        "Mean.over(1.0 * right, micro.counts)",
        "Mean.of(1.0 * right)",
        ("class_loss_and_accuracy_are_means_over_the_rows_that_count",),
        "a_class_is_read_at_the_last_real_token",
    ),
    "padding in the held-out loss": Mutant(
        "evaluate",
        "Mean.over(-stats.logprobs, batch.loss_mask)",
        "Mean.of(-stats.logprobs)",
        ("held_out_loss_is_the_mean_over_all_counted_tokens",),
        "half_precision_ends_at_the_hidden_states",
    ),
    "attention across packed documents in the evaluation": Mutant(
        "evaluate",
        "segment_ids=batch.segment_ids",
        "attention_mask=batch.segment_ids > 0",
        ("packed_documents_do_not_see_each_other",),
        "held_out_loss_is_the_mean_over_all_counted_tokens",
    ),
    "dropout on in the evaluation": Mutant(
        "evaluate",
        'method="hidden")',
        'method="hidden", **DROPOUT)',
        ("held_out_loss_is_the_mean_over_all_counted_tokens",),
        "half_precision_ends_at_the_hidden_states",
    ),
    # library
    "top-p on by default": Mutant(
        "shared_sections",
        "top_p=1.0,  # 1: off",
        "top_p=0.9,  # 1: off",
        ("rollouts_come_from_the_whole_distribution",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "one epoch of PPO by default": Mutant(
        "ppo_section",
        "epochs=4,",
        "epochs=1,",
        ("every_epoch_takes_every_row_in_an_order_of_its_own",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "three epochs of reward training by default": Mutant(
        "training_section",
        '"epochs": 1.0,',
        '"epochs": 3.0,',
        ("the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",),
        "the_reward_head_starts_at_one_over_root_width",
    ),
    "no samples kept by default": Mutant(
        "ppo_section",
        "samples_every=10,",
        "samples_every=0,",
        ("what_shows_a_run_going_wrong_is_logged",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "reward head at zero by default": Mutant(
        "reward_section",
        'head_init="normal",',
        'head_init="zero",',
        ("the_reward_head_starts_at_one_over_root_width",),
        "the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",
    ),
    "learning rate does not end at zero": Mutant(
        "shared_sections",
        "end_factor=0.0,",
        "end_factor=0.1,",
        ("learning_rates_count_updates_and_end_at_zero",),
        "adam_has_the_epsilon_of_ppo",
    ),
    "Adam's own epsilon in PPO": Mutant(
        "ppo_section",
        " optim=optim_overrides(eps=1e-5)",
        " optim=optim_overrides()",
        ("adam_has_the_epsilon_of_ppo",),
        "learning_rates_count_updates_and_end_at_zero",
    ),
    "epsilon under the root": Mutant(
        "make_optimizer",
        "scale_by_adam(b1=b1, b2=b2, eps=eps)",
        "scale_by_adam(b1=b1, b2=b2, eps=0.0, eps_root=eps)",
        ("adam_has_the_epsilon_of_ppo",),
        "",
    ),
    "linear schedule that is not": Mutant(
        "schedule",
        "decayed = 1.0 - (1.0 - end_factor) * progress",
        "decayed = 1.0 - (1.0 - end_factor) * progress**2",
        ("learning_rates_count_updates_and_end_at_zero",),
        "",
    ),
    "reward head of deviation 0.02": Mutant(
        "reward_model", "/ np.sqrt(config.width + 1)", "* 0.02", ("the_reward_head_starts_at_one_over_root_width",), ""
    ),
    "held-out pairs the other way round": Mutant(
        "pair_figures",
        "draws.pair_accuracy(keys, values, ratings, min_gap)",
        "draws.pair_accuracy(keys, -values, ratings, min_gap)",
        ("the_reward_model_reads_the_ratings_once_and_is_judged_on_pairs",),
        "",
    ),
    "the same key in every update": Mutant(
        "policy",
        "write(params, prompts, jax.random.fold_in(key, index))",
        "write(params, prompts, key)",
        ("every_update_has_noise_of_its_own",),
        "dropout_is_off_in_every_part_of_ppo",
    ),
    "the policy keeps the dropout it was trained with": Mutant(
        "policy",
        "compute_settings(settings, loaded.model.config, dropout=0.0))",
        "compute_settings(settings, loaded.model.config))",
        ("dropout_is_off_in_every_part_of_ppo",),
        "every_update_has_noise_of_its_own",
    ),
    "dropout on where texts are scored": Mutant(
        "scorer",
        '.apply({"params": params}, tokens, attention_mask=mask)',
        '.apply({"params": params}, tokens, attention_mask=mask, **DROPOUT)',
        ("dropout_is_off_where_texts_are_scored_or_classified",),
        "",
    ),
    "value head at random": Mutant(
        "value_network",
        '"kernel": jnp.zeros((config.width, 1))',
        '"kernel": jnp.full((config.width, 1), 0.1)',
        ("the_value_network_starts_at_zero_or_as_the_reward_model",),
        "",
    ),
    "value network in raw points": Mutant(
        "value_network",
        '"kernel": head["kernel"] / norm.std',
        '"kernel": head["kernel"]',
        ("the_value_network_starts_at_zero_or_as_the_reward_model",),
        "",
    ),
    "norm by the variance": Mutant(
        "measure_norm",
        "jnp.float32(values.std() if",
        "jnp.float32(values.var() if",
        ("the_norm_is_measured_on_the_references_samples",),
        "",
    ),
    "norm over more samples than asked": Mutant(
        "measure_norm",
        "fetch(scores)])[:wanted]",
        "fetch(scores)])",
        ("the_norm_is_measured_on_the_references_samples",),
        "",
    ),
}
