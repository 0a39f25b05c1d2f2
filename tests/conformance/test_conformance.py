"""What decides the sign and the place of things in RLHF, as tests that any fork of a step has to pass.

`pytest tests/conformance --step ppo_update=my_module:my_step`
"""

import checks


def test_masks_never_come_from_the_pad_id(steps):
    """`ids != pad` drops the EOS wherever pad and EOS share an id, and any real token that has the pad's id: the reward
    lands one token early and the policy never learns to stop.
    """
    checks.masks_never_come_from_the_pad_id(steps)


def test_eos_counts_even_where_it_is_the_pad_id(steps):
    """Many tokenizers have no pad and use EOS: the mask has to come from the first EOS's position."""
    checks.eos_counts_even_where_it_is_the_pad_id(steps)


def test_one_temperature_divides_logits_everywhere(steps):
    """A temperature that is forgotten in one of the four places makes ratios that are not 1 at the start (exactly 2 was
    seen at temperature 0.6), or a KL that is not one.
    """
    checks.one_temperature_divides_logits_everywhere(steps)


def test_a_policy_equal_to_its_reference_has_no_kl(steps):
    """With reference and old log-probabilities at different temperatures, an untouched policy is punished for a
    distance it does not have (or rewarded: negative KL).
    """
    checks.a_policy_equal_to_its_reference_has_no_kl(steps)


def test_old_logprobs_are_the_updates_own(steps):
    """The sampler's cached decoding is another computation than the update's forward pass; their difference grows with
    training until ratios mean nothing. Recomputed by the update's own function, the ratio starts at 1 within 1e-6.
    """
    checks.old_logprobs_are_the_updates_own(steps)


def test_reward_is_read_at_the_last_real_token(steps):
    """Position -1 of a right-padded row is padding: the reward model would score noise that batch shapes decide."""
    checks.reward_is_read_at_the_last_real_token(steps)


def test_kl_is_a_penalty_on_every_token(steps):
    """-beta (log pi - log pi_ref) with this sign: the other one pays the policy for leaving its reference."""
    checks.kl_is_a_penalty_on_every_token(steps)


def test_score_sits_at_the_last_response_token(steps):
    """The action that ended the episode earned the score. One token later it lies outside the policy's mask and reaches
    the policy only through the value function; in an integer buffer 0.7 becomes 0 and 1.9 becomes 1.
    """
    checks.score_sits_at_the_last_response_token(steps)


def test_advantages_are_whitened_over_the_batchs_response_tokens(steps):
    """Padding in the mean and variance makes the size of the step depend on how long the longest answer is."""
    checks.advantages_are_whitened_over_the_batchs_response_tokens(steps)


def test_gae_ends_at_the_last_response_token(steps):
    """The episode is over there, also where the length limit stopped it: no value is bootstrapped from padding. Values
    are trained to the returns of the unwhitened values; whitened ones would chase their own scale.
    """
    checks.gae_ends_at_the_last_response_token(steps)


def test_one_mask_for_policy_and_value(steps):
    """A value mask one token longer trains the value of a state that no action is taken in; and values at padding are
    arbitrary, so they must not reach exp, a square or a mean: inf * 0 is NaN.
    """
    checks.one_mask_for_policy_and_value(steps)


def test_losses_are_means_over_all_counted_tokens(steps):
    """Averaging the means of microbatches weighs the tokens of short answers more: another loss for each device count
    and accumulation setting.
    """
    checks.losses_are_means_over_all_counted_tokens(steps)


def test_sft_loss_is_the_mean_over_all_counted_tokens(steps):
    """The same failure in supervised training: gradients were off by 0.5 to 4 times in other libraries."""
    checks.sft_loss_is_the_mean_over_all_counted_tokens(steps)


def test_ratios_and_values_are_clipped(steps):
    """The pessimistic bound: a min or max the wrong way round clips what should move and moves what should stop."""
    checks.ratios_and_values_are_clipped(steps)


def test_a_log_ratio_of_a_thousand_stays_finite(steps):
    """One token whose probability collapsed must not end a run in NaN."""
    checks.a_log_ratio_of_a_thousand_stays_finite(steps)
