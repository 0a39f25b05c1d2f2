from collections import Counter

import numpy as np
import pytest

from lfjax.config import InputError
from lfjax.data.batching import PackedRows, PromptBatches, RewardBatches, best_fit
from lfjax.data.examples import RewardExample

PAD = 3


def documents(count, seed=0, low=3, high=40):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(4, 1000, rng.integers(low, high) - 2).tolist(), 2] for _ in range(count)]


def epoch(batches, number=0):
    start = number * batches.steps_per_epoch
    return [batches.batch_at(step) for step in range(start, start + batches.steps_per_epoch)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def targets(batch):
    """Counter of (everything before it in its document, target) for every target that counts."""
    found = Counter()
    for tokens, mask, segments in zip(*batch, strict=True):
        for t in np.flatnonzero(mask):
            start = t
            while start > 0 and segments[start - 1] == segments[t]:
                start -= 1
            found[(*tokens[start : t + 1].tolist(), "->", int(tokens[t + 1]))] += 1
    return found


def expected(docs):
    return Counter((*doc[:t], "->", doc[t]) for doc in docs for t in range(1, len(doc)))


# ---- packed rows


@pytest.mark.parametrize("packed", [True, False])
def test_every_target_is_seen_once_with_its_own_document_before_it(packed):
    docs = documents(100)
    rows = PackedRows(docs, seq_len=48, batch_size=4, seed=0, pad_id=PAD, packed=packed)
    found = sum((targets(batch) for batch in rows.evaluation()), Counter())
    assert found == expected(docs)
    assert rows.targets == sum(found.values())


def test_packed_and_padded_rows_hold_the_same_targets():
    docs = [(doc, [i > 4 for i in range(len(doc))]) for doc in documents(60, low=3, high=90)]
    rows = [PackedRows(docs, seq_len=32, batch_size=4, seed=0, pad_id=PAD, packed=packed) for packed in (True, False)]
    packed, padded = (sum((targets(batch) for batch in r.evaluation()), Counter()) for r in rows)
    assert packed == padded and rows[0].targets == rows[1].targets == sum(packed.values())


def test_no_document_is_cut_that_fits_and_longer_ones_lose_no_target():
    docs = documents(30, low=3, high=150)
    rows = PackedRows(docs, seq_len=64, batch_size=2, seed=0, pad_id=PAD)
    found = sum((targets(batch) for batch in rows.evaluation()), Counter())
    short = [doc for doc in docs if len(doc) <= 65]
    assert 0 < len(short) < len(docs)
    assert all(found[key] >= count for key, count in expected(short).items())
    assert sum(found.values()) == sum(len(doc) - 1 for doc in docs)


def test_every_segment_of_an_evaluation_is_of_the_document_that_is_named():
    docs = [[100 + i] * length for i, length in enumerate((5, 40, 3, 9, 17, 2, 30))]  # the second and last are split
    rows = PackedRows(docs, seq_len=16, batch_size=4, seed=0, pad_id=PAD)
    named = zip(rows.evaluation(), rows.evaluation_documents(), strict=True)
    pairs = [(batch.tokens[i, :-1], batch.segment_ids[i], owners[i]) for batch, owners in named for i in range(4)]
    for tokens, segments, owners in pairs:
        assert tokens[segments > 0].tolist() == [100 + owners[s - 1] for s in segments[segments > 0]]
    assert {int(i) for _, _, owners in pairs for i in owners} == {*range(7)}


def test_flags_decide_what_counts():
    rows = PackedRows(
        [([1, 7, 8, 9, 2], [False, False, False, True, True])], seq_len=8, batch_size=1, seed=0, pad_id=PAD
    )
    batch = rows.batch_at(0)
    assert batch.tokens.tolist() == [[1, 7, 8, 9, 2, PAD, PAD, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, False, False, False, False]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_has_a_target_however_long_the_prompts_and_none_is_lost(packed):
    long = [([1, *range(4, 104), 200 + i, 2], [i > 100 for i in range(103)]) for i in range(20)]
    short = [([1, 4, 300 + i, 2], [False, False, True, True]) for i in range(4)]
    rows = PackedRows([*long, *short], seq_len=16, batch_size=2, seed=0, pad_id=PAD, packed=packed)
    assert rows.cut == 20
    batches = [*epoch(rows), *rows.evaluation()]
    assert all(batch.loss_mask.any(axis=1)[batch.segment_ids.any(axis=1)].all() for batch in batches)
    assert all(batch.loss_mask.any() for batch in batches)
    counted = [int(t) for b in rows.evaluation() for t in b.tokens[:, 1:][b.loss_mask]]
    assert sorted(counted) == sorted([*range(200, 220), *range(300, 304), *[2] * 24])


def test_rows_of_33_token_sentences_are_more_than_99_percent_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(2.6, 13.5, 8000), 4, 65).astype(int)
    docs = [[5] * n for n in lengths]
    rows = PackedRows(docs, seq_len=64, batch_size=16, seed=0, pad_id=PAD)
    assert 33 < lengths.mean() < 36 and rows.fill > 0.99
    held = sum(int((batch.tokens != PAD).sum()) for batch in rows.evaluation())
    count = sum(int((batch.tokens != PAD).any(axis=1).sum()) for batch in rows.evaluation())
    assert held / (count * 65) == pytest.approx(rows.fill)


def test_best_fit_places_every_item_once_and_never_overfills():
    lengths = np.random.default_rng(1).integers(1, 65, 500).tolist()
    rows = best_fit(lengths, 64, window=100)
    assert sorted(item for row in rows for item in row) == list(range(500))
    assert all(sum(lengths[item] for item in row) <= 64 for row in rows)
    assert best_fit([60, 30, 30, 4], 64) == [[0, 3], [1, 2]]


def test_every_epoch_has_its_own_order_and_nearly_all_documents():
    docs = documents(400)
    rows = PackedRows(docs, seq_len=48, batch_size=8, seed=0, pad_id=PAD)
    all_targets = expected(docs)
    first, second = (sum((targets(batch) for batch in epoch(rows, e)), Counter()) for e in (0, 1))
    assert not same(rows.batch_at(0), rows.batch_at(rows.steps_per_epoch))
    for found in (first, second):
        assert sum(found.values()) > 0.9 * rows.targets
        assert all(count <= 2 * all_targets[key] for key, count in found.items())


# ---- reward batches


def rated(length, value, record=0):
    return RewardExample([[1, *[9] * (length - 2), 2]], [value], [None], 0.0, record)


def pair(length, margin=0.0, candidates=2):
    tokens = [[1, *[20 + i] * (length - 2), 2] for i in range(candidates)]
    return RewardExample(tokens, [None] * candidates, list(range(candidates)), margin)


def mixed():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 33, 150)
    examples = [rated(n, float(i), i) for i, n in enumerate(lengths[:100])]
    examples += [pair(n, 0.5) for n in lengths[100:130]]
    return examples + [pair(n, candidates=3 + i % 3) for i, n in enumerate(lengths[130:])]


def reward_batches(examples=None, **options):
    defaults = {"batch_size": 8, "buckets": (16, 32), "seed": 0, "pad_id": PAD, "max_candidates": 4}
    return RewardBatches(mixed() if examples is None else examples, **(defaults | options))


def seen(batches, number):
    """Ratings seen in an epoch: every rated example of `mixed` has its own."""
    return Counter(value for b in epoch(batches, number) for value in b.ratings[b.rated].tolist())


def test_batches_have_the_declared_shapes_only():
    batches = reward_batches()
    shapes = {batch.tokens.shape for e in range(3) for batch in epoch(batches, e)}
    assert shapes == set(batches.bucket_shapes)
    assert all(batches.shape_at(step) == batches.batch_at(step).tokens.shape for step in range(20))
    assert shapes <= {(8, c, t) for c in (1, 2, 4) for t in (16, 32)}


def test_an_epoch_shows_every_example_once_but_for_the_few_left_out():
    batches = reward_batches()
    left_out = set()
    for number in range(20):
        counts = seen(batches, number)
        assert set(counts.values()) == {1}
        assert sum(int(b.mask.any(axis=(1, 2)).sum()) for b in epoch(batches, number)) == 150 - batches.left_out
        left_out |= {float(i) for i in range(100)} - set(counts)
    assert batches.left_out == 150 % 8
    assert len(seen(batches, 0)) >= 100 - batches.left_out


def test_evaluation_covers_every_example_exactly_once_and_masks_what_fills_up():
    batches = reward_batches()
    covered = []
    for indices, batch in batches.evaluation():
        covered += indices[indices >= 0].tolist()
        fill = indices < 0
        assert batch.tokens.shape[0] == 8
        assert not (batch.mask[fill].any() or batch.rated[fill].any() or batch.ranked[fill].any())
        for row, index in enumerate(indices):
            if index >= 0:
                example = batches.examples[index]
                for j, candidate in enumerate(example.candidates[: batch.tokens.shape[1]]):
                    assert batch.tokens[row, j][batch.mask[row, j]].tolist() == candidate
                    assert batch.rated[row, j] == (example.ratings[j] is not None)
                    assert batch.ranked[row, j] == (example.ranks[j] is not None)
    assert sorted(covered) == list(range(150))


def test_a_batch_says_what_the_record_said():
    examples = [rated(4, -1.5), pair(5, 0.25)]
    batches = {b.tokens.shape[1]: (i, b) for i, b in reward_batches(examples, batch_size=1).evaluation()}
    _, one = batches[1]
    assert one.ratings.tolist() == [[-1.5]] and one.rated.tolist() == [[True]] and one.ranked.tolist() == [[False]]
    assert one.mask[0, 0].tolist() == [True] * 4 + [False] * 12 and one.tokens[0, 0, 3:5].tolist() == [2, PAD]
    _, two = batches[2]
    assert two.ranks.tolist() == [[0, 1]] and two.ranked.tolist() == [[True, True]] and two.margin.tolist() == [0.25]
    assert not two.rated.any() and np.isfinite(two.ratings).all()


def test_few_examples_repeat_to_fill_one_batch():
    batches = reward_batches([rated(4, 0.0), rated(20, 1.0), pair(4)])
    assert batches.steps_per_epoch == 1 and batches.left_out == 0
    assert batches.batch_at(5).tokens.shape == (8, 2, 32)
    assert set(batches.batch_at(5).ratings[batches.batch_at(5).rated].tolist()) == {0.0, 1.0}


def test_candidates_beyond_the_most_are_cut_and_counted():
    batches = reward_batches([pair(4, candidates=6)] * 8)
    assert batches.bucket_shapes == [(8, 4, 16)] and batches.cut_candidates == 16
    assert batches.batch_at(0).ranks[0].tolist() == [0, 1, 2, 3]


def test_what_makes_no_reward_batch_is_refused():
    with pytest.raises(InputError, match="no record has feedback"):
        reward_batches([])
    with pytest.raises(InputError, match="record 4: a sequence of 33 tokens; the largest bucket holds 32"):
        reward_batches([rated(33, 0.0, record=4)])


# ---- prompts


def prompt_batches(count=50, **options):
    prompts = [[1, *[10 + i] * (i % 5 + 1)] for i in range(count)]
    return PromptBatches(prompts, **({"batch_size": 8, "buckets": (7,), "seed": 0, "pad_id": PAD} | options))


def test_prompts_are_left_padded():
    batches = prompt_batches()
    for index, tokens, mask in zip(batches.indices_at(3), *batches.batch_at(3)[:2], strict=True):
        prompt = batches.prompts[index]
        assert tokens.tolist() == [PAD] * (7 - len(prompt)) + prompt
        assert mask.tolist() == [False] * (7 - len(prompt)) + [True] * len(prompt)


def test_row_ids_never_repeat_in_a_run():
    batches = prompt_batches()
    ids = np.concatenate([batches.batch_at(step).row_ids for step in range(40)])
    assert len(set(ids.tolist())) == 320 and ids.dtype == np.int32 and ids.min() >= 0
    assert (batches.batch_at(2**31 // 8 + 1).row_ids >= 0).all()


def test_an_epoch_asks_no_prompt_twice_and_other_epochs_ask_in_another_order():
    batches = prompt_batches()
    orders = [np.concatenate([batches.indices_at(e * 6 + i) for i in range(6)]) for e in (0, 1)]
    assert all(len(set(order.tolist())) == 48 for order in orders)
    assert not np.array_equal(*orders)


def test_few_prompts_repeat_to_fill_a_batch():
    batches = prompt_batches(3)
    assert batches.steps_per_epoch == 1 and sorted(set(batches.indices_at(4).tolist())) == [0, 1, 2]


def test_evaluation_asks_every_prompt_once_in_order():
    batches = prompt_batches(20)
    parts = list(batches.evaluation())
    indices = np.concatenate([i for i, _ in parts])
    assert indices.tolist() == [*range(20), -1, -1, -1, -1]
    assert np.concatenate([b.row_ids for _, b in parts])[:20].tolist() == list(range(20))
    assert all(batch.mask.any(axis=1).all() for _, batch in parts)  # a row that fills up is a real prompt


def test_prompts_go_to_the_smallest_bucket_that_holds_them():
    batches = prompt_batches(48, buckets=(6, 3))
    assert batches.lengths == [3, 6] and batches.steps_per_epoch == 6
    seen, narrow = [], 0
    for step in range(6):
        batch, indices = batches.batch_at(step), batches.indices_at(step)
        longest = max(len(batches.prompts[i]) for i in indices)
        assert batch.tokens.shape == (8, 3 if longest <= 3 else 6) == (8, batches.length_at(step))
        narrow += batch.tokens.shape[1] == 3
        assert [m.sum() for m in batch.mask] == [len(batches.prompts[i]) for i in indices]
        seen += indices.tolist()
    assert narrow == 2 and sorted(seen) == list(range(48))  # 20 prompts of at most 3 tokens: two full batches
    parts = list(batches.evaluation())
    assert sorted(i for indices, _ in parts for i in indices if i >= 0) == list(range(48))
    for indices, batch in parts:
        kept = indices >= 0
        assert batch.row_ids[kept].tolist() == indices[kept].tolist()
        assert all(
            row[mask].tolist() == batches.prompts[i]
            for i, row, mask in zip(indices, batch.tokens, batch.mask, strict=True)
            if i >= 0
        )


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"prompt 4: found 6 tokens; allowed: 1 to 5"):
        prompt_batches(buckets=(3, 5))
    with pytest.raises(InputError, match="no prompt"):
        prompt_batches(0)


# ---- what holds for all


def packed_rows(seed=0):
    return PackedRows(documents(100), seq_len=48, batch_size=8, seed=seed, pad_id=PAD)


def reward_batches_of(seed=0):
    return reward_batches(seed=seed)


def prompt_batches_of(seed=0):
    return prompt_batches(seed=seed)


KINDS = pytest.mark.parametrize("make", [packed_rows, reward_batches_of, prompt_batches_of])


@KINDS
def test_a_batch_depends_on_seed_and_step_alone(make):
    """Any order of calls, any epoch looked at in between: what resuming needs."""
    straight, jumping = make(), make()
    steps = [straight.steps_per_epoch * 2 + 1, 0, straight.steps_per_epoch, 1, 0]
    wanted = {step: straight.batch_at(step) for step in sorted(set(steps))}
    assert all(same(jumping.batch_at(step), wanted[step]) for step in steps)
    assert any(not same(make(1).batch_at(step), wanted[step]) for step in wanted)


@KINDS
def test_dtypes_are_those_of_the_model(make):
    for array in make().batch_at(0):
        assert array.dtype in (np.int32, np.float32, np.bool_)


def test_documents_without_a_target_are_no_documents():
    for nothing in ([], [[1]], [([1, 7, 2], [True, False, False])]):
        with pytest.raises(InputError, match="no document to train on"):
            PackedRows(nothing, seq_len=8, batch_size=1, seed=0, pad_id=PAD)


def test_prompts_of_several_lengths_are_each_asked_once_in_the_shortest_batch_that_holds_them():
    prompts = [[7] * length for length in (9, 2, 3, 7, 1)]  # the first is longer than the other bucket
    asked = {}
    for indices, batch in PromptBatches(prompts, buckets=(4, 10), batch_size=4, pad_id=PAD, seed=0).evaluation():
        for index, tokens, mask in zip(indices, batch.tokens, batch.mask, strict=True):
            if index >= 0:
                assert index not in asked and tokens[mask].tolist() == prompts[index]
                asked[int(index)] = batch.tokens.shape[1]
    assert asked == {0: 10, 1: 4, 2: 4, 3: 10, 4: 4}
