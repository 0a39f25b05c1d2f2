"""What gives scores to written responses: a model on the devices, or any Python function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import numpy as np

from lfjax.config import Config, InputError, cause_of
from lfjax.run.devices import Devices, fetch
from lfjax.run.parts import compute_settings
from lfjax.run.writing import texts
from lfjax.sharding import global_batch, jit_step
from lfjax.tokenizers import Tokenizer
from lfjax.types import Generation


class LearnedReward:
    """Scores by a model with a head of one score.

    Args:
      function: the scoring step. name: of its program. settings: `config.model`.
      shapes: how many shapes prompts come in. where: what named the model, for the message.
    Raises:
      InputError: the model has no such head.
    """

    def __init__(
        self, devices: Devices, loaded, function: Callable, *, name: str, settings: Config, shapes: int, where: str
    ):
        if loaded.model.config.num_labels != 1:
            raise InputError(f"{where} is no reward model: it has no head with one score")
        self.config = compute_settings(settings, loaded.model.config, dropout=0.0)
        self.params = loaded.params
        step = functools.partial(function, model=devices.network(self.config))
        self.step = devices.program((name, self.config), lambda: jit_step(step, name=name, shapes=shapes))

    def __call__(self, generation: Generation, records) -> jax.Array:
        """Raw scores [B]; `records` are not read."""
        return self.step(self.params, generation)


class FunctionReward:
    """Scores by a Python function f(prompts, responses, records) -> one number a response.

    All three are lists of one length. `prompts` and `responses` are str: of a record without a prompt the former is
    how its response begins, of chat messages what the template makes of them. `records` are `lfjax.records.Record`, of
    which the prompts are: `prompt` (str, or list of {"role", "content"}), `responses` (list of str), `feedback` (list
    of Rating, Ranking, Preference, Edit, ... with the fields of their kinds), `id`, `source`, `license` and `time`
    (None where not given), and `extra` (dict of the fields that the schema does not know: a reference answer, say).

    Args:
      where: the config key and the function's name, for messages.
    """

    def __init__(self, devices: Devices, tokenizer: Tokenizer, function: Callable, *, where: str):
        self.devices, self.tokenizer, self.function, self.where = devices, tokenizer, function, where

    def __call__(self, generation: Generation, records) -> jax.Array:
        """Raw scores [B].

        Raises:
          InputError: the function fails, or gave another number of scores than responses, or one that is not finite.
        """
        prompts, responses = texts(self.tokenizer, fetch(generation))
        try:
            scores = np.asarray(self.function(prompts, responses, records), np.float32)
        except (Exception, SystemExit) as error:  # whatever a user's function does wrong is theirs to mend
            cause = cause_of(error, inspect.getsourcefile(inspect.unwrap(self.function)) or "")
            raise InputError(f"{self.where} fails: {cause}; mend it") from error
        if scores.shape != (len(responses),):
            raise InputError(
                f"{self.where} gave scores of shape {list(scores.shape)} for {len(responses)} responses; return one"
                " number a response"
            )
        if not np.all(np.isfinite(scores)):
            row = int(np.argmin(np.isfinite(scores)))
            raise InputError(
                f"{self.where} gave {scores[row]} for the response {responses[row]!r}; return finite numbers"
            )
        return global_batch(scores, self.devices.mesh)
