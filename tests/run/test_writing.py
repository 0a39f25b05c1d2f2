"""Which prompts a stage writes to, by how long they are."""

import types

import pytest

from lfjax.config import InputError
from lfjax.data.sources import Splits
from lfjax.data.table import table
from lfjax.records import Record
from lfjax.run import writing

SECTION = types.SimpleNamespace(prompt_min=1, prompt_max=1, prompt_buckets=(4, 6), stop=())
RECORDS = [Record(text, [], where=f"a.jsonl:{i}") for i, text in enumerate(("abc", "abcdef", "abcde"))]  # and BOS


class Letters:
    """One id a character; 1 is BOS."""

    bos_id, eos_id, eos_ids, pad_id, template = 1, 2, (2,), 3, None

    def encode_prompt(self, text):
        return [self.bos_id, *map(ord, text)]


def test_prompts_that_are_too_long_are_left_out_cut_or_refused():
    kept, longer = writing.fitting(SECTION, RECORDS, Letters(), "skip")
    assert (kept, longer) == ([RECORDS[0], RECORDS[2]], 1)
    kept, longer = writing.fitting(SECTION, RECORDS, Letters(), "cut")
    assert (kept, longer) == (RECORDS, 1)
    batches = writing.prompt_batches(SECTION, kept, Letters(), batch_size=3, seed=0, cut=True)
    assert batches.prompts == [[1, *map(ord, text)] for text in ("abc", "bcdef", "abcde")]
    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'prompt': found 7 tokens with BOS; allowed: at most 6"):
        writing.fitting(SECTION, RECORDS, Letters(), "error")
    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'prompt'"):  # nothing would be left
        writing.fitting(SECTION, RECORDS[1:2], Letters(), "skip")


def test_the_table_of_the_data_counts_prompts_that_are_too_long_by_split():
    splits = Splits(RECORDS[:1], [], RECORDS, {"rows": 4, "train/records": 1, "test/records": 3})
    for split in ("train", "test"):
        writing.check_texts(SECTION, splits, split, Letters(), "skip")
    head, train, _, test, *_ = table(splits.counts)
    assert head.split() == ["data", "records", "too", "long"]
    assert (train.split(), test.split()) == (["train", "1", "0"], ["test", "3", "1"])
