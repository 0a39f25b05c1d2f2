import itertools
from collections import Counter

import numpy as np
import pytest
from test_examples import LETTERS

from lfjax.data.answer_batches import KtoBatches, PairBatches
from lfjax.data.answers import Paired, drawn_pairs, judged_answers, paired_answers
from lfjax.records import Critique, Edit, Label, Preference, Ranking, Rating, Record

SCALE = (1.0, 5.0)
BUCKETS = (8, 16)


def text(answer) -> str:
    return LETTERS.decode(answer.tokens[answer.start :])


def said(paired: Paired, pairs=None) -> list[tuple[str, str, float]]:
    found = paired.given if pairs is None else pairs
    return [(text(paired.answers[p.chosen]), text(paired.answers[p.rejected]), p.margin) for p in found]


def test_preferences_rankings_and_edits_are_pairs_ties_are_none():
    records = [
        Record("Q ", ["good", "bad"], [Preference(0, 1, 2.0)]),
        Record("Q ", ["a", "b", "c", "d"], [Ranking([[2], [0, 3], [1]])]),
        Record("Q ", ["rough"], [Edit(0, "fine"), Critique(0, "too short")]),
    ]
    every = paired_answers(records, LETTERS, max_length=20)
    ranked = [("c", "a", 0.0), ("c", "d", 0.0), ("c", "b", 0.0), ("a", "b", 0.0), ("d", "b", 0.0)]
    assert Counter(said(every)) == Counter([("good", "bad", 2.0), *ranked, ("fine", "rough", 0.0)])
    near = paired_answers(records, LETTERS, max_length=20, neighbours=True)
    assert Counter(said(near)) == Counter(said(every)) - Counter([("c", "b", 0.0)])
    assert every.rated == []


def test_the_answer_begins_behind_the_prompt_and_ends_in_eos():
    answer, _ = paired_answers([Record("Q ", ["yes", "no"], [Preference(0, 1)])], LETTERS, max_length=20).answers
    assert answer.tokens == (1, *map(ord, "Q yes"), 2) and answer.start == 3
    cut = paired_answers([Record("Question ", ["yes", "no"], [Preference(0, 1)])], LETTERS, max_length=7).answers[0]
    assert cut.tokens == (1, *map(ord, "n yes"), 2) and text(cut) == "yes"


def test_equal_empty_and_cut_to_equal_answers_are_left_out_and_counted():
    records = [
        Record("Q ", ["same", "same"], [Preference(0, 1)]),
        Record("Q ", ["long enough to cut x", "long enough to cut y"], [Preference(0, 1)]),
        Record("Q ", ["", "other"], [Preference(1, 0)]),
    ]
    found = paired_answers(records, LETTERS, max_length=12)
    assert found.given == []
    assert found.counts == Counter(answers=6, empty=1, cut=2, equal_pairs=2)


def rated(values, prompt="Q "):
    return [Record(prompt, [f"answer {i}"], [Rating(0, float(v), SCALE)]) for i, v in enumerate(values)]


def test_answers_of_one_prompt_are_rated_together_across_records():
    found = paired_answers([*rated([1, 5, 3]), *rated([2, 4], "Other ")], LETTERS, max_length=20)
    assert [[value for _, value in group] for group in found.rated] == [[1, 5, 3], [2, 4]]
    assert not found.given


@pytest.mark.parametrize("min_gap", [0.0, 1.0, 2.0])
def test_drawn_pairs_are_those_far_enough_apart_each_as_likely_as_another(min_gap):
    values = [1.0, 2.0, 2.0, 4.0, 5.0]
    group = [list(enumerate(values))]
    pairs = drawn_pairs(group, np.random.default_rng(0), min_gap=min_gap, per_answer=3000)
    allowed = {(i, j) for i, j in itertools.permutations(range(5), 2) if values[i] - values[j] >= max(min_gap, 1e-9)}
    found = Counter((p.chosen, p.rejected) for p in pairs)
    assert set(found) == allowed and all(p.margin == values[p.chosen] - values[p.rejected] for p in pairs)
    partners = Counter(i for pair in allowed for i in pair)
    assert len(pairs) == 3000 * len(partners)
    for (i, j), count in found.items():
        expected = 3000 * (1 / partners[i] + 1 / partners[j])
        assert abs(count - expected) < 6 * expected**0.5


def test_of_many_answers_the_square_is_never_made():
    group = [[(i, float(i % 17)) for i in range(200_000)]]
    assert len(drawn_pairs(group, np.random.default_rng(0), min_gap=1.0, per_answer=1)) == 200_000


def test_calls_are_labels_ratings_by_a_threshold_and_ends_of_orders():
    records = [
        Record("Q ", ["liked", "hated", "word"], [Label(0, True), Label(1, False), Label(2, "spam")]),
        Record("Q ", ["five", "three", "one"], [Rating(0, 5.0, SCALE), Rating(1, 3.0, SCALE), Rating(2, 1.0, SCALE)]),
        Record("Q ", ["best", "middle", "worst"], [Ranking([[0], [1], [2]])]),
    ]
    found = judged_answers(records, LETTERS, max_length=20, threshold=3.0, scale=SCALE)
    calls = {(text(found.answers[place]), good) for place, good in found.calls}
    good, bad = {"liked", "five", "best"}, {"hated", "one", "worst"}
    assert calls == {(t, True) for t in good} | {(t, False) for t in bad}
    assert found.counts["undecided"] == 1


def pair_batches(seed=0, batch_size=4):
    records = [*rated(range(1, 6)), *(Record("P ", [f"{'x' * i}", f"y{i}"], [Preference(0, 1)]) for i in range(1, 7))]
    paired = paired_answers(records, LETTERS, max_length=17, scale=SCALE)
    return PairBatches(paired, batch_size=batch_size, buckets=BUCKETS, seed=seed, pad_id=3, min_gap=1.0)


def test_batches_are_a_function_of_seed_and_step_and_masks_count_the_answers_targets():
    batches, again = pair_batches(), pair_batches()
    again.batch_at(7)
    assert batches.steps_per_epoch == (5 + 6) // 4
    for step in (0, 1, 2, 5):
        batch = batches.batch_at(step)
        assert all(np.array_equal(a, b) for a, b in zip(batch, again.batch_at(step), strict=True))
        assert batch.tokens.shape[-1] - 1 in BUCKETS and batch.counts.all()
        for row, side in np.ndindex(4, 2):
            targets = batch.tokens[row, side, 1:]
            prompt = "Q " if batch.tokens[row, side, 1] == ord("Q") else "P "
            whole = LETTERS.decode(batch.tokens[row, side][: batch.mask[row, side].sum() + 1].tolist())
            counted = targets[batch.loss_mask[row, side]].tolist()
            assert prompt + LETTERS.decode(counted) == whole and counted[-1] == LETTERS.eos_id
    assert not np.array_equal(batches.batch_at(0).tokens, pair_batches(seed=1).batch_at(0).tokens)


def test_the_rated_pairs_of_another_epoch_are_others():
    batches = pair_batches()
    epochs = [
        {tuple(r) for s in range(2) for r in batches.batch_at(2 * e + s).tokens[:, :, :12].reshape(4, -1).tolist()}
        for e in range(3)
    ]
    assert len(set.union(*epochs)) > 8


def test_held_out_pairs_come_once_and_rows_that_fill_do_not_count():
    batches = pair_batches(batch_size=4)
    places = [place for found, batch in batches.evaluation() for place in found]
    assert sorted(places) == list(range(len(batches.pairs))) and len(places) == 11
    assert sum(int(batch.counts.sum()) for _, batch in batches.evaluation()) == 11


def test_references_stand_beside_their_answers():
    batches = pair_batches()
    batches.ref = np.arange(len(batches.answers), dtype=np.float32)
    index = {answer.tokens: place for place, answer in enumerate(batches.answers)}
    batch = batches.batch_at(0)
    for row, side in np.ndindex(4, 2):
        whole = tuple(batch.tokens[row, side][: batch.mask[row, side].sum() + 1].tolist())
        assert batch.ref_logprobs[row, side] == index[whole]


def test_a_mismatched_answer_is_to_another_prompt_and_always_the_same():
    records = [Record(f"{c} ", [f"of {c}"], [Label(0, c < "c")]) for c in "abcd"]
    judged = judged_answers(records, LETTERS, max_length=17, threshold=0.5)
    batches = KtoBatches(judged, batch_size=3, buckets=BUCKETS, seed=0, pad_id=3)
    for step in range(6):
        batch = batches.batch_at(step)
        for own, other, good in zip(batch.answers.tokens, batch.mismatched.tokens, batch.desirable, strict=True):
            own, other = LETTERS.decode(own.tolist()), LETTERS.decode(other.tolist())
            after = "abcda"["abcd".index(own[0]) + 1]
            assert own == f"{own[0]} of {own[0]}" and other == f"{own[0]} of {after}" and good == (own[0] < "c")
