"""Splits of whole groups: their sizes, the kinds of feedback in each, and what does not decide."""

import random

import pytest

from lfjax.data.duplicates import SPLITS, record_key
from lfjax.data.splits import cut, equal_pairs, kinds_of
from lfjax.records import Edit, Preference, Ranking, Rating, Record

TENTHS = {"validation_fraction": 0.1, "test_fraction": 0.1}


def grouped(sizes, kinds=lambda group: ()):
    """So many records of each prompt, rated, and with what `kinds` gives for the prompt's number."""
    return [
        Record(f"Question {group}?", [f"answer {i}"], [Rating(0, 1.0, (0.0, 1.0)), *kinds(group)])
        for group, size in enumerate(sizes)
        for i in range(size)
    ]


def sizes_of(found):
    return {name: len(found.splits[name]) for name in SPLITS}


def keys_of(found):
    return {name: {record_key(record) for record in found.splits[name]} for name in SPLITS}


@pytest.mark.parametrize("count", [37, 405, 1000])
def test_records_of_their_own_are_split_to_the_record(count):
    found = cut(grouped([1] * count), **TENTHS)
    assert sizes_of(found) == {"test": round(count / 10), "validation": round(count / 10),
                               "train": count - 2 * round(count / 10)}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_few_prompts_of_many_records_come_as_near_as_they_can_and_stay_whole(seed):
    """No prompt less or more, where it is free to go, brings a split nearer to its fraction."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 60) for _ in range(14)]
    records = grouped(sizes)
    found = cut(records, **TENTHS)
    keys = keys_of(found)
    assert sum(map(len, keys.values())) == 14 and all(keys.values())
    for name in ("test", "validation"):
        missing = round(len(records) / 10) - len(found.splits[name])
        free = [size for group, size in enumerate(sizes) if f"question{group}" in keys["train"]]
        assert abs(missing) <= min(abs(missing - size) for size in free)


def test_the_order_of_the_records_decides_nothing():
    records = grouped([1, 30, 7, 7, 20, 3, 3, 3, 12, 5])
    shuffled = random.Random(0).sample(records, len(records))
    assert keys_of(cut(records, **TENTHS)) == keys_of(cut(shuffled, **TENTHS))


@pytest.mark.parametrize("holders, held", [(1, {"train"}), (2, {"train", "validation"}), (3, set(SPLITS))])
def test_a_kind_that_few_prompts_hold_is_in_every_split_or_first_in_training(holders, held):
    for first in range(0, 200, 23):
        group = range(first, first + holders)
        records = grouped([1] * 200, lambda number, group=group: [Edit(0, "better")] * (number in group))
        found = cut(records, **TENTHS)
        assert {name for name in SPLITS if any("edit" in kinds_of(r) for r in found.splits[name])} == held
        assert sizes_of(found) == {"train": 160, "validation": 20, "test": 20}


def test_no_split_is_emptied_for_a_kind_and_three_prompts_make_three_splits():
    records = grouped([1, 1, 100], lambda group: [Edit(0, "better")] * (group < 2))
    assert all(cut(records, **TENTHS).splits.values())


def test_what_moved_from_where_its_hash_puts_it_is_counted():
    records = grouped([1] * 100)
    assert cut(records, validation_fraction=0.0, test_fraction=0.0).moved == 0
    assert 0 < cut(records, **TENTHS).moved < 20
    assert cut(grouped([50] * 4), **TENTHS).moved >= 50


def test_pairs_of_equal_answers_are_those_that_somebody_put_into_an_order():
    texts = ["a", "a", "b", "a"]
    assert equal_pairs(Record("", texts, [Preference(0, 1), Preference(0, 2), Edit(2, "b"), Edit(2, "c")])) == 2
    assert equal_pairs(Record("", texts, [Ranking([[0, 1], [2], [3]])])) == 2  # 0 and 1 are tied
