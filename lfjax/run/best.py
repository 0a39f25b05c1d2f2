"""The best validation of a stage: when it was, and with `keep_best` the parameters of it, which then go out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lfjax.config import InputError
from lfjax.report import catalogue
from lfjax.rewards.intervals import without
from lfjax.run.data import note
from lfjax.run.run import Run

WORSE = 0.02  # of the best value: what the last may be worse by before it is worth a note


class Best:
    """What of a stage's validations was best so far, by the figure in its `keep_best`, else by its first.

    Attributes:
      step, value, figures: of the best; 0, None and {} before the first validation.
    """

    def __init__(self, run: Run, stage: str, state: Any):
        declared, self._stage = run.stage(stage), stage
        self._named = run.config[stage].keep_best
        self._leaf = self._named or next(iter(declared.held_out), "")
        self._lower = catalogue.entry(f"{stage}/{self._leaf}", declared.figures).better == "lower"
        self.step, self.value, self.figures = 0, None, {}
        self._params = jax.tree.map(jnp.copy, state.params) if self._named else None

    def seen(self, state: Any, done: int, figures: dict[str, float]) -> dict[str, float]:
        """Takes the figures of a validation after so many steps, of the state as it is then, and gives them back.

        Raises:
          InputError: the figure that `keep_best` names is not among them.
        """
        value = self._of(figures)
        if value is None and self._named:
            known = sorted({name.rpartition("/")[2].removeprefix("validation_") for name in without(figures)})
            key = f"config.{self._stage}.keep_best: {self._named!r}"
            raise InputError(f"{key}; this validation gives {', '.join(known)}: name one of these, or none")
        if value is None or math.isnan(value):
            return figures
        if self.value is None or (value < self.value if self._lower else value > self.value):
            self.step, self.value, self.figures = done, value, figures
            if self._named:
                self._params = jax.tree.map(jnp.copy, state.params)  # the step will take the state's own memory
        return figures

    def out(self, state: Any, figures: dict[str, float], total: int) -> tuple[Any, dict[str, float]]:
        """(state, figures) of the model that goes out: with `keep_best` the best, else the last.

        Says where they differ by more than a little, and where the best goes out.
        """
        last = self._of(figures)
        if self.value is None or last is None:
            return state, figures
        apart = last - self.value if self._lower else self.value - last
        what = f"held-out {self._leaf} {last:.4g} after {total} steps, {self.value:.4g} after {self.step}"
        if self._named:
            if self.step != total:
                note(self._stage, f"{what}: the latter model is kept")
            return state.replace(params=self._params), {**self.figures, f"{self._stage}/best_step": float(self.step)}
        if apart > WORSE * abs(self.value):
            note(self._stage, f"{what}; --config.{self._stage}.keep_best={self._leaf} keeps that model")
        return state, figures

    def saved(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """(what a checkpoint holds of arrays, and beside them): with `keep_best` the best parameters as well."""
        tree = {"state": state, "best": self._params} if self._named else state
        return tree, {"step": self.step, "value": self.value, "figures": self.figures}

    def restore(self, tree: Any, beside: Mapping[str, Any] | None) -> Any:
        """Goes on from what `saved` gave; returns the state. `beside` None: an older checkpoint, of no validation."""
        if beside is not None:
            self.step, self.value, self.figures = beside["step"], beside["value"], beside["figures"]
        if self._named:
            self._params = tree["best"]
            return tree["state"]
        return tree

    def _of(self, figures: Mapping[str, float]) -> float | None:
        names = (f"{self._stage}/validation_{self._leaf}", f"{self._stage}/{self._leaf}")
        return next((figures[name] for name in names if name in figures), None)
