"""The conformance checks bite: each known mistake, edited into a copy of lfjax's own step, fails its check."""

import inspect
import types

import checks
import jax
import jax.numpy as jnp
import pytest

from lfjax.steps import ppo_experience, ppo_rollout, ppo_score, ppo_update, reward, sft

pytestmark = pytest.mark.slow  # each mutant compiles programs of its own


def averaged_micro_means(loss_fn, params, batch, num_microbatches=1, *, rng=None, has_aux=False):
    """`weighted_grads` as many trainers have it: the mean of the microbatches' mean losses."""

    def mean_loss(params, micro, index):
        out = loss_fn(params, micro) if rng is None else loss_fn(params, micro, jax.random.fold_in(rng, index))
        return (out[0].value, out) if has_aux else (out.value, out)

    pieces = [jax.tree.map(lambda x, i=i: x[i::num_microbatches], batch) for i in range(num_microbatches)]
    results = [jax.grad(mean_loss, has_aux=True)(params, piece, i) for i, piece in enumerate(pieces)]
    grads = jax.tree.map(lambda *g: sum(g) / num_microbatches, *[g for g, _ in results])
    return jax.tree.map(lambda *x: sum(x), *[out for _, out in results]), grads


def one_longer(mask):
    """The mask with one more token at its end."""
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


MUTANTS = {
    "score one token late": (
        ppo_experience,
        "== last[:, None]) & mask",
        "== last[:, None] + 1)",
        checks.score_sits_at_the_last_response_token,
    ),
    "score in an integer buffer": (
        ppo_experience,
        "jnp.where(at_last, final[:, None], 0.0)",
        "jnp.where(at_last, final[:, None].astype(jnp.int32), 0)",
        checks.score_sits_at_the_last_response_token,
    ),
    "temperature forgotten in the reference": (
        ppo_experience,
        "ref_params, *rows, **stats)",
        "ref_params, *rows, **(stats | {'temperature': 1.0}))",
        checks.a_policy_equal_to_its_reference_has_no_kl,
    ),
    "temperature forgotten in old and reference": (
        ppo_experience,
        '"temperature": temperature,',
        '"temperature": 1.0,',
        checks.one_temperature_divides_logits_everywhere,
    ),
    "temperature forgotten in the update": (
        ppo_update,
        "*rows, temperature=temperature",
        "*rows, temperature=1.0",
        checks.one_temperature_divides_logits_everywhere,
    ),
    "temperature forgotten in the rollout": (
        ppo_rollout,
        "temperature=temperature",
        "temperature=1.0",
        checks.one_temperature_divides_logits_everywhere,
    ),
    "old log-probabilities from the sampler": (
        ppo_experience,
        "old_logprobs=old,",
        "old_logprobs=generation.logprobs,",
        checks.old_logprobs_are_the_updates_own,
    ),
    "whitening over padding": (
        ppo_experience,
        "masked_whiten(advantages, mask)",
        "masked_whiten(advantages, jnp.ones_like(mask))",
        checks.advantages_are_whitened_over_the_batchs_response_tokens,
    ),
    "experience's mask from the pad id": (
        ppo_experience,
        "mask = generation.mask\n",
        "mask = generation.tokens != 0\n",
        checks.masks_never_come_from_the_pad_id,
    ),
    "update's mask from the pad id": (
        ppo_update,
        "    size = rollout.mask.shape[0]\n",
        "    size = rollout.mask.shape[0]\n    rollout = rollout._replace(mask=rollout.responses != 0)\n",
        checks.masks_never_come_from_the_pad_id,
    ),
    "KL paid instead of punished": (
        ppo_experience,
        "rewards = -kl_coef * kl",
        "rewards = kl_coef * kl",
        checks.kl_is_a_penalty_on_every_token,
    ),
    "KL only at the end": (
        ppo_experience,
        "rewards = -kl_coef * kl",
        "rewards = -kl_coef * jnp.where(at_last, jnp.sum(kl, axis=1, keepdims=True), 0.0)",
        checks.kl_is_a_penalty_on_every_token,
    ),
    "GAE runs on over the padding": (
        ppo_experience,
        "gae(shaped, values, mask,",
        "gae(shaped, jnp.where(mask, values, 1.0), jnp.ones_like(mask),",
        checks.gae_ends_at_the_last_response_token,
    ),
    "returns from whitened values": (
        ppo_experience,
        "gae(shaped, values, mask,",
        "gae(shaped, masked_whiten(values, mask), mask,",
        checks.gae_ends_at_the_last_response_token,
    ),
    "value mask one longer": (
        ppo_update,
        "Mean.over(value_coef * losses, micro.mask)",
        "Mean.over(value_coef * losses, one_longer(micro.mask))",
        checks.one_mask_for_policy_and_value,
    ),
    "micro-means averaged in PPO": (
        ppo_update,
        "    size = rollout.mask.shape[0]\n",
        "    size, weighted_grads = rollout.mask.shape[0], averaged_micro_means\n",
        checks.losses_are_means_over_all_counted_tokens,
    ),
    "micro-means averaged in SFT": (
        sft,
        "weighted_grads(loss_fn",
        "averaged_micro_means(loss_fn",
        checks.sft_loss_is_the_mean_over_all_counted_tokens,
    ),
    "no clipping above": (
        ppo_update,
        "clip_high=clip_high",
        "clip_high=1e9",
        checks.ratios_and_values_are_clipped,
    ),
    "values not clipped": (
        ppo_update,
        "clip=value_clip",
        "clip=1e9",
        checks.ratios_and_values_are_clipped,
    ),
    "score read at the last column": (
        ppo_score,
        "attention_mask=mask)[:, 0]",
        "attention_mask=mask, method='values')[:, -1, 0]",
        checks.reward_is_read_at_the_last_real_token,
    ),
    "reward trained at the last column": (
        reward,
        "last_true_index(batch.mask)[..., None]",
        "jnp.full(batch.mask.shape[:2], batch.mask.shape[2] - 1)[..., None]",
        checks.reward_is_read_at_the_last_real_token,
    ),
    "EOS dropped where it is the pad": (
        ppo_rollout,
        "    return generate(",
        "    return without_pads(pad_id, generate)(",
        checks.eos_counts_even_where_it_is_the_pad_id,
    ),
}


def without_pads(pad_id, sampler):
    def sample(*args, **kwargs):
        out = sampler(*args, **kwargs)
        return out._replace(mask=out.tokens != pad_id)

    return sample


FUNCTIONS = {sft: "sft_step", reward: "reward_step"}


def fork(module, old: str, new: str):
    """The module's step after an edit of its source: what a researcher's copy would be."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} holds {source.count(old)} times {old!r}: edit this mutant"
    copy = types.ModuleType(f"mutant_of_{module.__name__}")
    names = {"averaged_micro_means": averaged_micro_means, "one_longer": one_longer, "without_pads": without_pads}
    copy.__dict__.update(names)
    exec(compile(source.replace(old, new), copy.__name__, "exec", dont_inherit=True), copy.__dict__)
    return getattr(copy, FUNCTIONS.get(module, module.__name__.rpartition(".")[2]))


@pytest.mark.parametrize("module, old, new, check", MUTANTS.values(), ids=MUTANTS)
def test_a_known_mistake_fails_its_check(module, old, new, check):
    own = {m.__name__.rpartition(".")[2]: m for m in (sft, reward, ppo_rollout, ppo_score, ppo_experience, ppo_update)}
    table = {name: getattr(m, FUNCTIONS.get(m, name)) for name, m in own.items()}
    table[module.__name__.rpartition(".")[2]] = fork(module, old, new)
    with pytest.raises(AssertionError):
        check(table)
