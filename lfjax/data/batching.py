"""Batches as a pure function of (seed, step): packed rows, reward buckets, prompts. NumPy only.

Every class has `steps_per_epoch` (the same in every epoch) and `batch_at(step)`, the whole global batch, which every
process can make. Epoch e = step // steps_per_epoch is shuffled by `np.random.default_rng((seed, e))`; only the current
epoch's order is kept.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lfjax.config import InputError
from lfjax.data.examples import Document, RewardExample
from lfjax.types import PromptBatch, RewardBatch, SftBatch

PACKING_WINDOW = 4096  # documents packed together; a few thousand fill rows to more than 99 %


class _Epochs:
    """Remembers the last epoch's order, so that consecutive steps do not compute it again."""

    def __init__(self, seed: int):
        self._seed = seed
        self._epoch = -1
        self._order: list[np.ndarray] = []

    def order(self, epoch: int, make: Callable[[np.random.Generator], list[np.ndarray]]) -> list[np.ndarray]:
        if epoch != self._epoch:
            self._order = make(np.random.default_rng((self._seed, epoch)))
            self._epoch = epoch
        return self._order


class PackedRows:
    """Documents packed into rows of `seq_len` targets, none cut that fits, no target across two documents.

    A document longer than seq_len + 1 tokens is split into pieces that share one token, so each of its targets counts
    once; pieces without a target (of a long prompt) are left out, so every row has one. Packing is best-fit inside
    windows of the epoch's shuffled documents; the rows are then shuffled too. The number of batches is the first
    epoch's; in every epoch the rows beyond the last full batch sit out, other ones each time, and rows that are missing
    to fill it (another packing may have one fewer) are repeated.

    Args:
      documents: token lists, or (tokens, flags): a flag says whether the token counts as a target.
      seq_len: T; rows hold T + 1 tokens.
      packed: False puts one document (or piece) in each row: the padded form, with the same targets.
    Attributes:
      cut: how many documents are split.
    """

    def __init__(
        self,
        documents: Sequence[list[int]] | Sequence[Document],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        pad_id: int,
        packed: bool = True,
    ):
        self.seq_len, self.batch_size, self.pad_id, self._packed = seq_len, batch_size, pad_id, packed
        self._tokens, self._flags, self._starts, self._lengths, self._owners = _flatten(documents, seq_len)
        self.cut = sum(len(_ids(document)) > seq_len + 1 for document in documents)
        self._epochs = _Epochs(seed)
        self.targets = int(np.count_nonzero(self._flags))  # of an epoch that leaves no row out
        rows = len(self._epochs.order(0, self._pack))
        self.steps_per_epoch = max(1, rows // batch_size)
        self.fill = int(self._lengths.sum()) / (rows * (seq_len + 1))  # share of the rows' places that hold a token

    def _pack(self, rng: np.random.Generator) -> list[np.ndarray]:
        shuffled = rng.permutation(len(self._lengths))
        lengths = self._lengths[shuffled].tolist()
        rows = best_fit(lengths, self.seq_len + 1) if self._packed else [[i] for i in range(len(lengths))]
        order = rng.permutation(len(rows))
        return [shuffled[rows[i]] for i in order]

    def batch_at(self, step: int) -> SftBatch:
        """The step's rows: tokens [B T+1], loss_mask [B T], segment_ids [B T]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._epochs.order(epoch, self._pack)
        first = index * self.batch_size
        return self._build([rows[place % len(rows)] for place in range(first, first + self.batch_size)])

    def _build(self, rows: Sequence[np.ndarray]) -> SftBatch:
        shape = (len(rows), self.seq_len + 1)
        tokens = np.full(shape, self.pad_id, np.int32)
        segments = np.zeros(shape, np.int32)
        flags = np.zeros(shape, bool)
        for i, row in enumerate(rows):
            place = 0
            for number, piece in enumerate(row, 1):
                start, length = self._starts[piece], self._lengths[piece]
                here, there = slice(place, place + length), slice(start, start + length)
                tokens[i, here], flags[i, here], segments[i, here] = self._tokens[there], self._flags[there], number
                place += length
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        fields: tuple[Any, ...] = (tokens, flags[:, 1:] & same, segments[:, :-1])
        return SftBatch(*fields)

    def evaluation(self) -> Iterator[SftBatch]:
        """Every row of the first epoch once; the last batch is filled up with rows of padding, which count nowhere."""
        rows = list(self._epochs.order(0, self._pack))
        rows += [np.zeros(0, np.int64)] * (-len(rows) % self.batch_size)
        for start in range(0, len(rows), self.batch_size):
            yield self._build(rows[start : start + self.batch_size])

    def evaluation_documents(self) -> Iterator[list[np.ndarray]]:
        """For every batch of `evaluation` and each of its rows, which document each segment is of."""
        rows = [self._owners[row] for row in self._epochs.order(0, self._pack)]
        rows += [np.zeros(0, np.int64)] * (-len(rows) % self.batch_size)
        return (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))


def _ids(document: list[int] | Document) -> list[int]:
    return document[0] if isinstance(document, tuple) else document


def _flatten(documents, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All tokens in one array, which of them are targets, and the start, length and document of each piece."""
    if not documents:
        raise InputError("no document to train on: the records hold no text of the kind that this stage learns from")
    tokens: list[int] = []
    flags: list[bool] = []
    starts, lengths, owners = [], [], []
    for number, document in enumerate(documents):
        ids, counts = document if isinstance(document, tuple) else (document, [True] * len(document))
        for first in range(0, len(ids) - 1, seq_len):
            if any(counts[first + 1 : first + seq_len + 1]):
                starts.append(len(tokens) + first)
                lengths.append(min(seq_len + 1, len(ids) - first))
                owners.append(number)
        tokens.extend(ids)
        flags.extend([False, *counts[1:]])  # the first token is nobody's target
    if not starts:
        raise InputError("no document to train on: each has fewer than 2 tokens, or none that counts")
    return np.array(tokens, np.int32), np.array(flags, bool), np.array(starts), np.array(lengths), np.array(owners)


def best_fit(lengths: Sequence[int], capacity: int, window: int = PACKING_WINDOW) -> list[list[int]]:
    """Items packed into rows: indices of the items by row. No item may be longer than `capacity`.

    Each window of consecutive items is packed by itself, longest first, each into the row where it leaves the least
    room (best-fit decreasing): deterministic, and linear in the number of windows.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        room: list[tuple[int, int]] = []  # (free places, row) of this window's rows, sorted
        items = range(start, min(start + window, len(lengths)))
        for item in sorted(items, key=lambda i: -lengths[i]):
            fit = bisect.bisect_left(room, (lengths[item], -1))
            if fit < len(room):
                free, row = room.pop(fit)
            else:
                free, row = capacity, len(rows)
                rows.append([])
            rows[row].append(item)
            bisect.insort(room, (free - lengths[item], row))
    return rows


class Bucket(NamedTuple):
    """The shape of a batch's sequences."""

    candidates: int  # C
    length: int  # T


class _Buckets:
    """Items arranged into full batches of one shape each.

    Each epoch is shuffled, then cut into full batches inside each bucket; what is left over moves to the next length,
    and from the largest length to that of the next candidate count, always in the same number. At the end fewer than
    a batch are left and sit out the epoch, other ones each time. With fewer items than one batch, they repeat to fill
    it.

    Args:
      places: of every item, its bucket.
      lengths: of the buckets, ascending.
    """

    def __init__(self, places: Sequence[Bucket], lengths: Sequence[int], *, batch_size: int, seed: int):
        self._batch_size = batch_size
        counts = sorted({count for count, _ in places})
        self.shapes = [Bucket(count, length) for count in counts for length in lengths]
        number = {shape: i for i, shape in enumerate(self.shapes)}
        numbers = np.array([number[place] for place in places])
        self.members = [np.flatnonzero(numbers == i) for i in range(len(self.shapes))]
        self._epochs = _Epochs(seed)
        first = self._epochs.order(0, self._arrange)
        self.steps_per_epoch = len(first)
        self.used = [self.shapes[i] for i in sorted({batch[0] for batch in first})]  # the same in every epoch

    def at(self, step: int) -> tuple[Bucket, np.ndarray]:
        """The step's shape, and which items [B] make its batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        batch = self._epochs.order(epoch, self._arrange)[index]
        return self.shapes[batch[0]], batch[1:]

    def once(self) -> Iterator[tuple[Bucket, np.ndarray]]:
        """Every item once, in order inside its bucket; -1 fills a last batch."""
        for shape, members in zip(self.shapes, self.members, strict=True):
            indices = np.concatenate([members, np.full(-len(members) % self._batch_size, -1)])
            for start in range(0, len(indices), self._batch_size):
                yield shape, indices[start : start + self._batch_size]

    def _arrange(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Rows [B + 1] of the epoch: the bucket's number, then the items."""
        batches = []
        longer = wider = np.zeros(0, np.int64)  # left over, for the next length and for the next candidate count
        for number, shape in enumerate(self.shapes):
            longest = shape.length == self.shapes[-1].length
            members = np.concatenate([longer, self.members[number], wider if longest else wider[:0]])
            members = members[rng.permutation(len(members))]
            full = len(members) // self._batch_size * self._batch_size
            batches += [np.r_[number, batch] for batch in members[:full].reshape(-1, self._batch_size)]
            longer = members[full:]
            if longest:
                longer, wider = longer[:0], longer
        if not batches:
            batches = [np.r_[len(self.shapes) - 1, np.resize(wider, self._batch_size)]]
        return [batches[i] for i in rng.permutation(len(batches))]


class RewardBatches:
    """Reward examples in batches of a few fixed shapes [B C T], right-padded; see `_Buckets` for their order.

    A bucket's candidate count is the smallest of 1, 2 and `max_candidates` that holds the example, its length the
    smallest of `buckets` that holds its longest candidate. `left_out` examples sit out an epoch.

    Args:
      examples: of `examples.reward_examples`.
      buckets: lengths in tokens.
      max_candidates: examples with more keep their first ones (a ranking's best); `cut_candidates` counts the rest.
    Raises:
      InputError: no example, or a candidate longer than the largest bucket.
    """

    def __init__(
        self,
        examples: Sequence[RewardExample],
        *,
        batch_size: int,
        buckets: Sequence[int],
        seed: int,
        pad_id: int,
        max_candidates: int = 4,
    ):
        if not examples:
            raise InputError(
                "no record has feedback that a reward model can learn from: rating, ranking, preference, edit or label"
            )
        self.batch_size, self.pad_id = batch_size, pad_id
        self.cut_candidates = sum(max(0, len(example.candidates) - max_candidates) for example in examples)
        self.examples = examples = [example.first(max_candidates) for example in examples]
        lengths = sorted(buckets)
        counts = sorted({min(count, max_candidates) for count in (1, 2, max_candidates)})
        places = [self._bucket(example, counts, lengths) for example in examples]
        self._buckets = _Buckets(places, lengths, batch_size=batch_size, seed=seed)
        self.steps_per_epoch = self._buckets.steps_per_epoch
        self.left_out = max(0, len(examples) - self.steps_per_epoch * batch_size)
        self.bucket_shapes = [(batch_size, *shape) for shape in self._buckets.used]

    @staticmethod
    def _bucket(example: RewardExample, counts: list[int], lengths: list[int]) -> Bucket:
        longest = max(len(candidate) for candidate in example.candidates)
        if longest > lengths[-1]:
            raise InputError(
                f"record {example.record}: a sequence of {longest} tokens; the largest bucket holds {lengths[-1]}"
            )
        count = counts[bisect.bisect_left(counts, len(example.candidates))]
        return Bucket(count, lengths[bisect.bisect_left(lengths, longest)])

    def shape_at(self, step: int) -> tuple[int, int, int]:
        """(B, C, T) of the step's batch."""
        shape = self._buckets.at(step)[0]
        return self.batch_size, shape.candidates, shape.length

    def batch_at(self, step: int) -> RewardBatch:
        """The step's rows; fields as in `types.RewardBatch`."""
        shape, indices = self._buckets.at(step)
        return self._build(indices, shape)

    def evaluation(self) -> Iterator[tuple[np.ndarray, RewardBatch]]:
        """Every example exactly once, in a few shapes: (indices [B] into `examples`, -1 for a row of padding; batch).

        Rows of padding are masked out everywhere.
        """
        for shape, indices in self._buckets.once():
            yield indices, self._build(indices, shape)

    def _build(self, rows: np.ndarray, bucket: Bucket) -> RewardBatch:
        shape = (len(rows), bucket.candidates)
        tokens = np.full((*shape, bucket.length), self.pad_id, np.int32)
        mask = np.zeros((*shape, bucket.length), bool)
        ratings, rated = np.zeros(shape, np.float32), np.zeros(shape, bool)
        ranks, ranked = np.zeros(shape, np.int32), np.zeros(shape, bool)
        margin = np.zeros(len(rows), np.float32)
        for i, index in enumerate(rows):
            if index < 0:
                continue
            example = self.examples[index]
            margin[i] = example.margin
            for j, candidate in enumerate(example.candidates[: bucket.candidates]):
                tokens[i, j, : len(candidate)], mask[i, j, : len(candidate)] = candidate, True
                if example.ratings[j] is not None:
                    ratings[i, j], rated[i, j] = example.ratings[j], True
                if example.ranks[j] is not None:
                    ranks[i, j], ranked[i, j] = example.ranks[j], True
        fields: tuple[Any, ...] = (tokens, mask, ratings, rated, ranks, ranked, margin)
        return RewardBatch(*fields)


class PromptBatches:
    """Left-padded prompts in batches of a few lengths; see `_Buckets` for their order.

    `row_ids` are step * batch_size + row, so no two rows of a run share their noise.

    Args:
      prompts: token lists.
      buckets: lengths in tokens; a prompt goes to the smallest that holds it.
    Raises:
      InputError: no prompt, an empty one, or one longer than the largest bucket.
    """

    def __init__(
        self, prompts: Sequence[list[int]], *, batch_size: int, buckets: Sequence[int], seed: int, pad_id: int
    ):
        if not prompts:
            raise InputError("no prompt to sample from: the records are empty")
        lengths = sorted(buckets)
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= lengths[-1]:
                raise InputError(f"prompt {i}: found {len(prompt)} tokens; allowed: 1 to {lengths[-1]}")
        self.prompts, self.batch_size, self.pad_id = prompts, batch_size, pad_id
        places = [Bucket(1, lengths[bisect.bisect_left(lengths, len(prompt))]) for prompt in prompts]
        self._buckets = _Buckets(places, lengths, batch_size=batch_size, seed=seed)
        self.steps_per_epoch = self._buckets.steps_per_epoch
        self.lengths = [shape.length for shape in self._buckets.used]  # P of the batches that occur

    def length_at(self, step: int) -> int:
        """P of the step's batch."""
        return self._buckets.at(step)[0].length

    def indices_at(self, step: int) -> np.ndarray:
        """Which prompts make the step's global batch: [B] indices into `prompts`."""
        return self._buckets.at(step)[1]

    def batch_at(self, step: int) -> PromptBatch:
        """The step's rows: tokens [B P], mask [B P], row_ids [B]."""
        shape, indices = self._buckets.at(step)
        row_ids = (step * self.batch_size + np.arange(self.batch_size)) % 2**31
        return self._build(indices, row_ids, shape.length)

    def evaluation(self) -> Iterator[tuple[np.ndarray, PromptBatch]]:
        """Every prompt once: (indices [B], -1 for a row that only fills a batch; batch).

        Filling rows repeat the batch's first prompt; a prompt's row id is its index.
        """
        for shape, indices in self._buckets.once():
            yield indices, self._build(np.where(indices < 0, indices[0], indices), indices % 2**31, shape.length)

    def _build(self, indices: np.ndarray, row_ids: np.ndarray, length: int) -> PromptBatch:
        tokens = np.full((len(indices), length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, index in enumerate(indices):
            prompt = self.prompts[index]
            tokens[i, length - len(prompt) :], mask[i, length - len(prompt) :] = prompt, True
        fields: tuple[Any, ...] = (tokens, mask, row_ids.astype(np.int32))
        return PromptBatch(*fields)
