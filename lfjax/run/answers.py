"""What a language model says of given answers: the references of preference losses, and their held-out figures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lfjax import files
from lfjax.config import InputError
from lfjax.data.answer_batches import answer_rows, by_length
from lfjax.data.answers import Answer
from lfjax.models import lora
from lfjax.models.lora import LoRA
from lfjax.run.devices import Devices, any_process, fetch, sync
from lfjax.sharding import global_batch, jit_step
from lfjax.steps.answers import answer_logprobs
from lfjax.types import Answers


class AnswerScorer:
    """Sums of the log-probabilities of answers, in nats, under a model; one program a length.

    Args:
      model: without dropout. adapters: how `params` are adapters of a `base`; None: they are the model.
      buckets: lengths in targets. chunk_size: positions of a row whose logits are held at a time.
      leave: called after each batch; raises where the run is asked to stop.
    """

    def __init__(
        self, devices: Devices, model, *, adapters: LoRA | None, buckets: Sequence[int], batch_size: int,
        chunk_size: int, pad_id: int, leave: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self._devices, self._buckets, self._rows, self._pad_id = devices, sorted(buckets), batch_size, pad_id
        self._leave = leave

        def score(params, base, rows):
            bound = lora.bind(model, base, adapters)
            return answer_logprobs(bound, params, rows.tokens, rows.loss_mask, rows.mask, chunk_size=chunk_size)

        self._step = devices.program(
            ("answer logprobs", model.config, chunk_size, adapters),
            lambda: jit_step(score, name="answer logprobs", shapes=len(self._buckets)),
        )

    def __call__(self, params, base, answers: Sequence[Answer]) -> np.ndarray:
        """[N] float32, in the order of the answers."""
        found = np.zeros(len(answers), np.float32)
        lengths = [len(answer.tokens) - 1 for answer in answers]
        for length, places in by_length(lengths, self._buckets, self._rows):
            filled = [*places, *[-1] * (self._rows - len(places))]
            rows = global_batch(answer_rows(answers, filled, length, self._pad_id), self._devices.mesh)
            found[places] = fetch(self._step(params, base, rows))[: len(places)]
            self._leave()
        return found

    def of_rows(self, params, base, rows: Answers) -> np.ndarray:
        """float32 in the shape of the rows' leading axes, of the answers of a batch."""
        shape = rows.loss_mask.shape[:-1]
        fields: list[Any] = [np.asarray(x).reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.loss_mask, rows.mask)]
        fields.append(np.zeros(math.prod(shape), np.float32))
        whole = global_batch(Answers(*fields), self._devices.mesh)
        return np.asarray(fetch(self._step(params, base, whole)), np.float32).reshape(shape)


def kept(path: Path, count: int, make) -> np.ndarray:
    """The array [count] that a file holds; made, and kept there, where there is none.

    Raises:
      InputError: the file holds anything else.
    """
    if any_process(path.exists()):
        content = files.read_bytes(path)
        try:
            found = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{path}: cannot be read: {error}; delete it, and it is made again") from error
        if found.shape != (count,) or found.dtype != np.float32 or not np.isfinite(found).all():
            raise InputError(f"{path}: not {count} finite log-probabilities; delete it, and it is made again")
        return found
    found = make()
    content = io.BytesIO()
    np.save(content, found)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content.getvalue())
    sync(f"kept {path.name}")
    return found
