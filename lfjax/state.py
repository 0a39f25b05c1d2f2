"""Train states: pure pytrees. A step takes one and returns the next."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array


class TrainState(struct.PyTreeNode):
    """Parameters, optimiser state and the step, which is also the position in the data."""

    step: Array  # int32 []
    params: Any
    opt_state: Any
    skipped: Array  # int32 []: updates in a row left out because loss or gradient was not finite

    @classmethod
    def create(cls, params, tx: optax.GradientTransformation) -> Self:
        """A state at step 0 with fresh optimiser state."""
        return cls(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), skipped=jnp.zeros((), jnp.int32)
        )

    def apply_gradients(
        self,
        grads,
        tx: optax.GradientTransformation,
        *,
        loss: Array | None = None,
        weight: Array | float = 1.0,
        step=None,
    ) -> Self:
        """The state after one optimiser update; a non-finite loss or gradient changes neither parameters nor moments.

        Args:
          loss: scalar; when given it has to be finite as well.
          weight: scalar, of what the loss is a mean over: where nothing counts, nothing is changed or skipped either.
          step: what the learning-rate schedule sees and the new state's step follows; `self.step` unless given.
        """
        finite = jnp.isfinite(optax.tree.norm(grads))
        if loss is not None:
            finite &= jnp.isfinite(loss)
        grads = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads)
        at = self.step if step is None else step
        updates, opt_state = optax.with_extra_args_support(tx).update(grads, self.opt_state, self.params, step=at)

        learns = finite & (jnp.asarray(weight) > 0)

        def if_it_learns(new, old):
            return jax.tree.map(lambda n, o: jnp.where(learns, n, o), new, old)

        return self.replace(
            step=at + 1,
            params=if_it_learns(optax.apply_updates(self.params, updates), self.params),
            opt_state=if_it_learns(opt_state, self.opt_state),
            skipped=jnp.where(finite, 0, self.skipped + 1),
        )


class LMState(TrainState):
    """A language model in training."""


class RewardState(TrainState):
    """A reward model in training."""


class ValueState(TrainState):
    """A value network in training."""


class RewardNorm(struct.PyTreeNode):
    """Scores are used as (raw - mean) / std, measured on samples of the reference policy (Ziegler et al. 2019)."""

    mean: Array  # float32 []
    std: Array  # float32 []

    @classmethod
    def identity(cls) -> Self:
        """Scores used as they are."""
        return cls(mean=jnp.zeros((), jnp.float32), std=jnp.ones((), jnp.float32))


class PPOState(struct.PyTreeNode):
    """Everything PPO carries from update to update; the frozen reference and reward models are not part of it."""

    policy: LMState
    value: ValueState
    kl_coef: Array  # float32 []
    reward_norm: RewardNorm
    step: Array  # int32 []: updates done
