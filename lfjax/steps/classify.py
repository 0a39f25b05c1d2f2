"""Classification: which class people gave a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lfjax.losses import lm
from lfjax.optim import Optimizer, weighted_grads
from lfjax.state import RewardState
from lfjax.types import ClassBatch, Mean


def classify_step(
    state: RewardState,
    batch: ClassBatch,
    rng: jax.Array,
    *,
    model,
    tx: Optimizer,
    label_smoothing: float = 0.0,
    num_microbatches: int = 1,
):
    """One optimiser step on the mean cross-entropy of the classes, over the rows that count.

    Args:
      rng: key of the dropout; unused where the model has none.
      label_smoothing: share of the target that is spread over all classes.
    Returns:
      (state, metrics): loss in nats a text, accuracy on the batch, gradient norm before clipping.
    """

    def loss_fn(params, micro: ClassBatch, key):
        rngs = {"dropout": key} if model.config.dropout else None
        scores = model.apply({"params": params}, micro.tokens, attention_mask=micro.mask, rngs=rngs)  # [B classes]
        losses = lm.cross_entropy_losses(scores[:, None], micro.labels[:, None], label_smoothing=label_smoothing)
        right = jnp.argmax(scores, axis=-1) == micro.labels
        return Mean.over(losses[:, 0], micro.counts), {"classify/accuracy": Mean.over(1.0 * right, micro.counts)}

    (loss, metrics), grads = weighted_grads(loss_fn, state.params, batch, num_microbatches, rng=rng, has_aux=True)
    metrics = {"classify/loss": loss, **metrics, "optim/grad_norm": Mean.of(optax.tree.norm(grads))}
    return state.apply_gradients(grads, tx, loss=loss.value, weight=loss.weight), metrics
