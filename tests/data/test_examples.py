import dataclasses
from collections import Counter

import pytest

from lfjax.config import InputError
from lfjax.data.examples import (
    RewardExample,
    is_judged,
    pretraining_documents,
    prompts_from_records,
    reward_examples,
    sft_documents,
)
from lfjax.records import Critique, Edit, Implicit, Label, Preference, Ranking, Rating, Record


class Letters:
    """One id a character; 0 to 3 are special."""

    vocab_size, unk_id, bos_id, eos_id, pad_id = 256, 0, 1, 2, 3
    template = None

    def encode(self, text, *, first=False):
        return [ord(character) for character in text]

    def encode_prompt(self, text):
        return [self.bos_id, *self.encode(text, first=True)]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 3)

    def save(self, folder):
        raise NotImplementedError


LETTERS = Letters()


def ids(text):
    return LETTERS.encode(text)


def test_pretraining_learns_every_response_whole():
    records = [Record("Q:", ["ab", "", "c"]), Record("", ["d"])]
    assert pretraining_documents(records, LETTERS) == [
        [1, *ids("Q:ab"), 2],
        [1, *ids("Q:c"), 2],
        [1, *ids("d"), 2],
    ]


def test_fine_tuning_learns_edits_and_reference_answers_but_not_what_was_only_judged():
    records = [
        Record("Q:", ["bad"], [Edit(0, "ok"), Rating(0, 1.0, (0.0, 2.0))]),
        Record("Q:", ["answer"]),
        Record("Q:", ["judged"], [Rating(0, 2.0, (0.0, 2.0))]),
    ]
    documents = sft_documents(records, LETTERS)
    assert [tokens for tokens, _ in documents] == [[1, *ids("Q:ok"), 2], [1, *ids("Q:answer"), 2]]
    assert documents[0][1] == [False, False, False, True, True, True]  # BOS and prompt carry no loss, EOS does


def test_every_judgement_makes_one_reward_example():
    record = Record(
        "Q",
        ["a", "b", "c"],
        [
            Rating(0, 1.0, (0.0, 4.0)),
            Rating(0, 2.0, (0.0, 4.0)),
            Rating(2, 4.0, (0.0, 4.0)),
            Ranking([[2], [0, 1]]),
            Preference(1, 0, 0.5),
            Preference(2, 0),
            Edit(1, "B"),
            Edit(1, "b"),  # changes nothing
            Critique(0, "meh"),
            Label(1, "rude"),
            Implicit(0, "copied", True),
        ],
    )
    a, b, c, better = ([1, *ids("Q" + text), 2] for text in "abcB")
    assert reward_examples([Record("", ["skipped"]), record], LETTERS, max_length=8) == [
        RewardExample([a, c], [1.5, 4.0], [None, None], 0.0, 1),
        RewardExample([c, a, b], [None] * 3, [0, 1, 1], 0.0, 1),
        RewardExample([b, a], [None, None], [0, 1], 0.5, 1),
        RewardExample([c, a], [None, None], [0, 1], 0.0, 1),
        RewardExample([better, b], [None, None], [0, 1], 0.0, 1),
    ]


def test_true_and_false_labels_count_as_ratings_one_and_zero():
    record = Record("", ["a", "b"], [Label(0, True), Label(1, False)])
    (example,) = reward_examples([record], LETTERS, max_length=8)
    assert example.ratings == [1.0, 0.0]


@pytest.mark.parametrize("values", [(True, False, False), (False, False, True), (4.0, 1.0, 1.0), (1.0, True, 1.0)])
def test_several_labels_of_one_response_count_as_their_mean_in_any_order(values):
    record = Record(
        "", ["a", "b"], [*(Label(0, value) for value in values), Label(1, False), Rating(1, 3.0, (1.0, 4.0))]
    )
    (example,) = reward_examples([record], LETTERS, max_length=8, scale=(1.0, 4.0))
    assert dict(zip(map(tuple, example.candidates), example.ratings, strict=True)) == {
        (1, *ids("a"), 2): 2.0,
        (1, *ids("b"), 2): 3.0,  # its rating
    }


LONG = "the same begin"


def test_a_pair_of_equal_sequences_is_left_out_and_counted_also_where_only_the_cut_makes_them_equal():
    responses = [LONG + "ning", LONG + "ner", "same", "same", "other"]
    entries = [
        Preference(0, 1),
        Preference(2, 3),
        Preference(4, 0),
        Edit(1, LONG + "s"),
        Edit(2, "same"),
        Edit(2, "new"),
    ]
    for length, judged, equal in (
        (12, [[4, 0], ["new", 2]], 4),
        (40, [[0, 1], [4, 0], [LONG + "s", 1], ["new", 2]], 2),
    ):
        counts = Counter()
        found = reward_examples([Record("", responses, entries)], LETTERS, max_length=length, counts=counts)
        texts = [[responses[i] if isinstance(i, int) else i for i in pair] for pair in judged]
        assert [e.candidates for e in found] == [[[1, *ids(t)[: length - 2], 2] for t in pair] for pair in texts]
        assert counts["equal_pairs"] == equal and all(e.ranks == [0, 1] for e in found)
        assert (counts["answers"], counts["cut"]) == (12, 5 if length == 12 else 0)


@pytest.mark.parametrize(
    "order, kept, ranks, equal",
    [
        ([[0], [1], [2]], [0, 2], [0, 1], 1),  # the equal ones are neighbours: one of them stays
        ([[0, 1], [2], [3]], [0, 2, 3], [0, 1, 2], 0),  # they tie
        ([[0], [2], [1], [3]], [2, 3], [0, 1], 1),  # both above and below another one
        ([[0, 2], [1], [3]], [2, 3], [0, 1], 1),  # tied with one and below it
        ([[0], [2], [1]], [], [], 1),
        ([[2], [0], [1], [3]], [2, 0, 3], [0, 1, 2], 1),
    ],
)
def test_a_ranking_keeps_the_candidates_that_are_not_equal(order, kept, ranks, equal):
    record, counts = Record("", [LONG + "ning", LONG + "ner", "b", "c"], [Ranking(order)]), Counter()
    found = reward_examples([record], LETTERS, max_length=12, counts=counts)
    expected = [[1, *ids(record.responses[i])[:10], 2] for i in kept]
    assert [(e.candidates, e.ranks) for e in found] == ([(expected, ranks)] if kept else [])
    assert counts["equal_pairs"] == equal


def test_equal_responses_of_one_record_are_one_candidate_with_their_mean_rating():
    ratings = [Rating(i, value, (0.0, 4.0)) for i, value in enumerate((4.0, 0.0, 3.0))]
    (example,) = reward_examples([Record("Q", ["a", "a", "b"], ratings)], LETTERS, max_length=8)
    assert example == RewardExample([[1, *ids("Qa"), 2], [1, *ids("Qb"), 2]], [2.0, 3.0], [None, None])


def test_equal_sequences_of_several_records_are_one_example_with_their_mean_rating():
    def rated(text, value):
        return Record("", [text], [Rating(0, value, (1.0, 5.0))])

    records, counts = [rated(LONG + "ning", 5.0), rated("b", 4.0), rated(LONG + "ner", 1.0), rated("b", 4.0)], Counter()
    found = reward_examples(records, LETTERS, max_length=12, counts=counts)
    assert [(e.candidates, e.ratings) for e in found] == [
        ([[1, *ids(LONG)[:10], 2]], [3.0]),
        ([[1, *ids("b"), 2]], [4.0]),
    ]
    assert (counts["equal_pairs"], counts["answers"]) == (1, 4)  # of the two rated alike none is a pair


def test_what_compares_a_text_with_itself_or_ties_all_teaches_no_reward_model():
    record = Record("", ["a", "a", "b"], [Preference(0, 1), Edit(0, "a"), Ranking([[0], [2], [1]]), Ranking([[0, 2]])])
    assert not is_judged(record)
    assert is_judged(dataclasses.replace(record, feedback=[Ranking([[0], [1], [2]])]))


@pytest.mark.parametrize("length", range(3, 12))
def test_a_long_sequence_loses_its_prompts_start_then_its_responses_end_and_never_its_eos(length):
    record = Record("prompt", ["abc"], [Label(0, 1.0)], where="f:7")
    (example,) = reward_examples([record], LETTERS, max_length=length)
    (tokens,) = example.candidates
    assert len(tokens) == min(length, 11)
    assert tokens[0] == 1 and tokens[-1] == 2
    text = LETTERS.decode(tokens)
    assert text == ("promptabc"[-(length - 2) :] if length >= 5 else "abc"[: length - 2])
    if length < 11:
        with pytest.raises(InputError, match=rf"f:7: .* 11 tokens; at most {length}"):
            reward_examples([record], LETTERS, max_length=length, truncate=False)


def test_a_texts_prompt_is_bos_and_its_first_tokens_fixed_by_the_text_alone():
    texts = [f"sentence number {i}" for i in range(300)]
    prompts = prompts_from_records([Record("", [text]) for text in texts], LETTERS)
    for text, prompt in zip(texts, prompts, strict=True):
        assert prompt == [1, *ids(text)[: len(prompt) - 1]]
    lengths = [len(prompt) - 1 for prompt in prompts]
    assert all(60 < lengths.count(k) < 140 for k in (4, 5, 6)) and set(lengths) == {4, 5, 6}
    assert prompts_from_records([Record("", [texts[7]])], LETTERS) == [prompts[7]]


def test_a_records_own_prompt_is_used_whole():
    chat = [{"role": "user", "content": "Hi"}]
    records = [Record("What is 2+2?", ["4"]), Record(chat, ["Hello"])]
    assert prompts_from_records(records, LETTERS) == [[1, *ids("What is 2+2?")], [1, *ids("user: Hi\nassistant: ")]]


def test_a_prompt_that_is_too_long_names_its_record_or_is_cut_on_the_left():
    record = Record("abcdef", ["x"], where="data.jsonl:12")
    assert prompts_from_records([record], LETTERS, max_length=7) == [[1, *ids("abcdef")]]
    with pytest.raises(InputError, match=r"data.jsonl:12: field 'prompt': found 7 tokens with BOS; allowed: at most 4"):
        prompts_from_records([record], LETTERS, max_length=4)
    assert prompts_from_records([record], LETTERS, max_length=4, truncate=True) == [[1, *ids("def")]]
    assert prompts_from_records([record], LETTERS, max_length=1, truncate=True) == [[1]]


def test_prompt_lengths_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="found 6 to 4 first tokens"):
        prompts_from_records([Record("", ["x"])], LETTERS, min_tokens=6, max_tokens=4)
