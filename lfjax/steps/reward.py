"""Reward model training on ratings, preferences and rankings, all in one batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lfjax.losses import ranking, ratings
from lfjax.masking import last_true_index
from lfjax.optim import Optimizer, coupled_grads
from lfjax.state import RewardState
from lfjax.types import Mean, RewardBatch


def reward_step(
    state: RewardState,
    batch: RewardBatch,
    rng: jax.Array,
    *,
    model,
    tx: Optimizer,
    regression: float = 1.0,
    every_token: float = 0.0,
    bradley_terry: float = 1.0,
    hinge: float = 0.0,
    listwise_hinge: float = 0.0,
    plackett_luce: float = 0.0,
    softmax: float = 0.0,
    centering: float = 0.0,
    ordinal: float = 0.0,
    ordinal_bounds: tuple = (),
    across_records: bool = True,
    min_gap: float = 1.0,
    margin_scale: float = 0.0,
    num_microbatches: int = 1,
):
    """One optimiser step on a weighted sum of reward losses, each the mean over what it applies to.

    Pair losses couple the rows of a batch; `coupled_grads` keeps microbatches equal to one big batch.

    Args:
      regression .. centering: weights of the losses (`reward_terms`); 0 leaves one out.
      ordinal: weight of the proportional-odds loss; above 0, `state.params["head"]["cutpoints"]` [K-1] are learnt with
        the model, which is applied without them (`model_params`). They count sorted, so they never cross.
      ordinal_bounds: K - 1 increasing values in units of the batch's ratings, between its classes.
      across_records: pair answers of different records by their ratings, where these lie `min_gap` points apart.
      margin_scale: a pair's margin is this times its rating gap (or its stated margin).
    Returns:
      (state, metrics): reward/loss, reward/pair_accuracy of the batch's pairs, reward/mse (squared rating points).
    """
    weights = {
        "regression": regression, "every_token": every_token, "bradley_terry": bradley_terry, "hinge": hinge,
        "listwise_hinge": listwise_hinge, "plackett_luce": plackett_luce, "softmax": softmax, "centering": centering,
        "ordinal": ordinal,
    }  # fmt: skip
    cutpoints = state.params["head"]["cutpoints"] if ordinal else None

    def forward(params, rows, key):
        return values_at_tokens(model, model_params(params) if ordinal else params, rows[0], rows[1], key)

    def batch_loss(values, cutpoints=cutpoints):
        pairs = {"across_records": across_records, "min_gap": min_gap, "margin_scale": margin_scale}
        terms, metrics = reward_terms(values, batch, **pairs, cutpoints=cutpoints, ordinal_bounds=ordinal_bounds)
        loss, counted = weighted_sum(terms, weights)
        return loss, ({"reward/loss": Mean.over(loss, counted > 0), **metrics}, values, counted)

    (loss, (metrics, values, counted)), grads = coupled_grads(
        forward, batch_loss, state.params, (batch.tokens, batch.mask), num_microbatches, rng=rng
    )
    if ordinal:  # no row's forward pass holds the cutpoints: their gradient is that of the loss at these values
        by_cutpoints = jax.grad(lambda c: batch_loss(values, c)[0])(cutpoints)
        grads = {**grads, "head": {**grads["head"], "cutpoints": by_cutpoints}}
    metrics["optim/grad_norm"] = Mean.of(optax.tree.norm(grads))
    return state.apply_gradients(grads, tx, loss=loss, weight=counted), metrics


def weighted_sum(terms: dict[str, Mean], weights: dict[str, float]):
    """(the weighted sum of the terms' means, the number of values that they count); terms of weight 0 are left out."""
    used = {name: mean for name, mean in terms.items() if weights[name]}
    loss = sum((weights[name] * mean.value for name, mean in used.items()), jnp.float32(0.0))
    return loss, sum((mean.weight for mean in used.values()), jnp.float32(0.0))


def values_at_tokens(model, params, tokens, mask, key):
    """The head's value at each token [B C T] of the candidates, with dropout where the model has some."""
    rngs = {"dropout": key} if model.config.dropout else None
    flat, attend = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))  # [B*C T]
    values = model.apply({"params": params}, flat, attention_mask=attend, rngs=rngs, method="values")
    return values.reshape(tokens.shape)


def model_params(params):
    """The parameters that the model itself has: all but the ordinal loss's cutpoints."""
    return {**params, "head": {name: leaf for name, leaf in params["head"].items() if name != "cutpoints"}}


def reward_terms(
    values,
    batch: RewardBatch,
    *,
    across_records: bool,
    min_gap: float,
    margin_scale: float,
    cutpoints=None,
    ordinal_bounds: tuple = (),
):
    """Every loss of `reward_step` by name, and metrics, from the head's value at each token [B C T].

    `every_token` is the squared error of the rating at each token, not the last alone (target replication, Dai and Le
    2015, arXiv:1511.01432): it makes the score of a beginning a forecast of the whole's, which is what a value network
    starts from. The ordinal loss is there where `cutpoints` [K-1] are; a rating's class, 0..K-1, is the number of
    bounds below it (it may be a mean of raters, between two points of the scale).
    """
    scores = jnp.take_along_axis(values, last_true_index(batch.mask)[..., None], axis=-1)[..., 0]  # [B C]
    chosen, rejected, margin, counts = reward_pairs(
        scores, batch, across_records=across_records, min_gap=min_gap, margin_scale=margin_scale
    )
    real = jnp.any(batch.mask, axis=-1)  # [B C]
    listed = jnp.sum(batch.ranked, axis=-1) >= 2  # [B]: a record that ranks its answers
    best = batch.ranked & (batch.ranks == 0)
    best = best / jnp.maximum(jnp.sum(best, axis=-1, keepdims=True), 1)
    at_tokens = ratings.regression_losses(values, batch.ratings[..., None])  # [B C T]
    in_list: Any = {"where": batch.ranked}
    terms = {
        "regression": Mean.over(ratings.regression_losses(scores, batch.ratings), batch.rated),
        "every_token": Mean.over(at_tokens, batch.mask & batch.rated[..., None]),
        "bradley_terry": Mean.over(ranking.bradley_terry_losses(chosen, rejected, margin=margin), counts),
        "hinge": Mean.over(ranking.pairwise_hinge_losses(chosen, rejected, margin=1.0 + margin), counts),
        "listwise_hinge": Mean.over(ranking.listwise_hinge_losses(scores, batch.ranks, **in_list), listed),
        "plackett_luce": Mean.over(ranking.plackett_luce_losses(scores, batch.ranks, **in_list), listed),
        "softmax": Mean.over(ranking.softmax_feedback_losses(scores, best, **in_list), listed),
        "centering": Mean.over(ranking.center_penalty(jnp.where(real, scores, 0.0)), jnp.any(real, axis=-1)),
    }
    if cutpoints is not None:
        classes = jnp.searchsorted(jnp.asarray(ordinal_bounds, jnp.float32), batch.ratings)  # bounds below the rating
        losses = ratings.ordinal_losses(scores, jnp.sort(cutpoints), classes)
        terms["ordinal"] = Mean.over(losses, batch.rated)
    return terms, {
        "reward/mse": Mean.over((scores - batch.ratings) ** 2, batch.rated),
        "reward/pair_accuracy": Mean.over(0.5 * (chosen > rejected) + 0.5 * (chosen >= rejected), counts),
    }


def reward_pairs(scores, batch: RewardBatch, *, across_records: bool, min_gap: float, margin_scale: float):
    """(chosen, rejected, margin, counts), each [M M] over the M = B C answers: entry (i, j) pairs i as better than j.

    Within a record ranks decide where both answers have one; otherwise ratings at least `min_gap` points apart.
    """
    flat = scores.reshape(-1)
    record = jnp.repeat(jnp.arange(scores.shape[0]), scores.shape[1])
    rating, rated = batch.ratings.reshape(-1), batch.rated.reshape(-1)
    rank, ranked = batch.ranks.reshape(-1), batch.ranked.reshape(-1)
    margin = jnp.repeat(batch.margin, scores.shape[1])
    same = record[:, None] == record[None, :]
    by_rank = same & ranked[:, None] & ranked[None, :]
    gap = rating[:, None] - rating[None, :]
    apart = (gap > 0) & (gap >= ratings.least_gap(min_gap))  # an answer and itself are no pair
    by_rating = ~by_rank & rated[:, None] & rated[None, :] & apart & (same | across_records)
    better = (by_rank & (rank[:, None] < rank[None, :])) | by_rating
    margins = margin_scale * jnp.where(by_rank, margin[:, None], jnp.maximum(gap, 0.0))
    shape = better.shape
    return jnp.broadcast_to(flat[:, None], shape), jnp.broadcast_to(flat[None, :], shape), margins, better
