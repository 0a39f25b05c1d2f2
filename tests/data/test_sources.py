import json

import pytest
from ml_collections import ConfigDict

from lfjax.config import InputError
from lfjax.data.duplicates import SPLITS, merge_rated_duplicates, record_key, split_of, text_key
from lfjax.data.sources import label_scale, load_records, rating_scale, read_text
from lfjax.data.table import table, told
from lfjax.records import Label, Preference, Rating, Record, write_records


def section(**changes):
    defaults = {"source": "jsonl", "path": None, "validation_path": None, "test_path": None}
    defaults |= {"validation_fraction": 0.2, "test_fraction": 0.2, "max_records": 0, "seed": 0}
    return ConfigDict(defaults | changes)


def rated(text, value=1.0, prompt="", **fields):
    return Record(prompt, [text], [Rating(0, value, (-4.0, 4.0))], **fields)


def write(path, texts):
    write_records(path, [rated(text) for text in texts])
    return str(path)


TEXTS = [f"Sentence number {i} is here." for i in range(200)]


def test_a_jsonl_file_is_split_whole_and_the_same_for_every_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    splits = load_records(section(path=path))
    found = [record.responses[0] for name in SPLITS for record in splits[name]]
    assert sorted(found) == sorted(TEXTS)
    assert [len(splits[name]) for name in SPLITS] == [120, 40, 40]
    assert splits.counts["rows"] == 200 and splits.counts["train/records"] == len(splits.train)
    assert load_records(section(path=path, seed=7)).test == splits.test


def test_adding_records_moves_those_alone_whose_hash_lies_between_two_splits(tmp_path):
    few = load_records(section(path=write(tmp_path / "a.jsonl", TEXTS[:100])))
    many = load_records(section(path=write(tmp_path / "b.jsonl", TEXTS)))
    assert [len(few[name]) for name in SPLITS] == [60, 20, 20] and [len(many[name]) for name in SPLITS] == [120, 40, 40]
    stayed = [{r.responses[0] for r in few[name]} & {r.responses[0] for r in many[name]} for name in SPLITS]
    moved = 100 - sum(map(len, stayed))
    assert 0 < moved <= few.counts["moved"] + many.counts["moved"] < 40
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    for name in SPLITS:
        assert many.counts["moved"] >= sum(split_of(record_key(r), **fractions) != name for r in many[name])


def test_the_nominal_shares_are_the_fractions():
    fractions = {"validation_fraction": 0.1, "test_fraction": 0.05}
    names = [split_of(str(i), **fractions) for i in range(20_000)]
    assert abs(names.count("validation") / 20_000 - 0.1) < 0.01 and abs(names.count("test") / 20_000 - 0.05) < 0.01


def test_near_identical_texts_share_a_key_and_different_words_do_not():
    assert text_key("It's GREAT!!") == text_key("its great") == "itsgreat"
    assert text_key("की") != text_key("का")  # vowel signs are marks, not letters, and decide the word
    assert text_key(":-)") != text_key(":-(")
    assert text_key(" \n") == ""
    one_prompt = [Record("Why?", ["because"]), Record("why", ["no idea"])]
    assert record_key(one_prompt[0]) == record_key(one_prompt[1])


def test_duplicates_become_one_record_with_the_mean_rating():
    texts = ("Caf\u00e9!\nBon", "other", "Cafe\u0301!\r\nBon", "Caf\u00e9!\nBon \n")
    records = [
        rated(text, value, id=i) for i, text, value in zip(range(1, 5), texts, (1.0, 0.0, 4.0, 1.0), strict=True)
    ]
    merged, removed, gap = merge_rated_duplicates(records)
    assert [record.responses[0] for record in merged] == list(texts[:2])
    assert merged[0].feedback == [Rating(0, 2.0, (-4.0, 4.0))] and merged[0].extra == {"duplicates": 2}
    assert merged[0].id == 1 and (removed, gap) == (2, 3.0)
    assert merged[1] is records[1] and records[0].feedback[0].value == 1.0


@pytest.mark.parametrize(
    "one, other",
    [("a + b", "a - b"), ("5", "-5"), ("1.5", "15"), ("x < y", "x > y"), (":)", ":("), ("\U0001f44d", "\U0001f44e"),
     ("do NOT", "do not"), ("  return 1", "return 1"), ("if x:\n  y", "if x:\n    y"), ("'a  b'", "'a b'")],
)  # fmt: skip
def test_texts_that_differ_in_a_sign_in_case_or_in_an_indent_keep_their_own_ratings(one, other):
    records = [rated(f"{one} end", 4.0), rated(f"{other} end", -4.0)]
    records += [rated("yes", 4.0, prompt=f"{one} end"), rated("yes", -4.0, prompt=f"{other} end")]
    assert merge_rated_duplicates(records) == (records, 0, 0.0)


def test_what_says_different_things_is_not_merged():
    chat = [{"role": "user", "content": "Hi"}]
    same_words = [rated("good", prompt=chat), rated("good", prompt="user: Hi\nassistant: ")]
    assert merge_rated_duplicates(same_words) == (same_words, 0, 0.0)  # a chat template writes one of them otherwise
    other_scale = Record("", ["good"], [Rating(0, 1.0, (0.0, 5.0))])
    labelled = Record("", ["good"], [Label(0, True)])
    records = [rated("good"), rated("good", prompt="Is it?"), other_scale, labelled, Record("", ["good", "good"])]
    assert merge_rated_duplicates(records) == (records, 0, 0.0)


def test_explicit_splits_are_kept_and_training_loses_what_is_held_out(tmp_path):
    paths = {
        "path": write(tmp_path / "train.jsonl", [*TEXTS[:50], "held  out\n", "Held out"]),
        "validation_path": write(tmp_path / "validation.jsonl", TEXTS[60:70]),
        "test_path": write(tmp_path / "test.jsonl", ["held out", *TEXTS[70:75]]),
    }
    splits = load_records(section(**paths))
    assert [record.responses[0] for record in splits.train] == [*TEXTS[:50], "Held out"]
    assert (len(splits.validation), len(splits.test)) == (10, 6)
    assert splits.counts["train_also_held_out"] == 1


def test_what_validation_and_test_file_share_stays_in_the_test_file_alone(tmp_path):
    paths = {
        "path": write(tmp_path / "train.jsonl", [*TEXTS[:50], "in both"]),
        "validation_path": write(
            tmp_path / "validation.jsonl", ["in both", *TEXTS[60:70], "in both, twice", "in both"]
        ),
        "test_path": write(tmp_path / "test.jsonl", ["in both", *TEXTS[70:75], "in both,  twice"]),
    }
    splits = load_records(section(**paths))
    assert [record.responses[0] for record in splits.validation] == TEXTS[60:70]
    assert len(splits.test) == 7 and splits.counts["validation_also_test"] == 2  # the copy in its own file was merged
    assert len(splits.train) == 50 and splits.counts["train_also_held_out"] == 1


def test_a_validation_file_that_is_the_test_file_is_said(tmp_path):
    paths = {"path": write(tmp_path / "a.jsonl", TEXTS[:50]), "test_path": write(tmp_path / "b.jsonl", TEXTS[60:70])}
    message = r"validation split is empty: 10 records of data.validation_path=.*b.jsonl .* test ones have the same"
    with pytest.raises(InputError, match=message):
        load_records(section(**paths, validation_path=paths["test_path"]))
    message = r"train split is empty: 50 records of data.path=.*a.jsonl .* held-out ones have the same prompt"
    with pytest.raises(InputError, match=message):
        load_records(section(**(paths | {"test_path": paths["path"]})))


def one_prompt(path, texts, prompts=("Describe rain.",)):
    write_records(path, [rated(text, prompt=prompts[i % len(prompts)]) for i, text in enumerate(texts)])
    return str(path)


@pytest.mark.parametrize("prompts", [("A",), ("A", "B")])
def test_answers_to_fewer_prompts_than_splits_are_split_by_the_answers_and_that_is_said(prompts, tmp_path):
    splits = load_records(section(path=one_prompt(tmp_path / "a.jsonl", TEXTS[:60], prompts)))
    assert [len(splits[name]) for name in SPLITS] == [36, 12, 12]
    assert splits.counts["split_by_response"] == 1 and any("split by response" in line for line in told(splits.counts))


def test_answers_to_one_prompt_in_three_files_are_compared_by_the_answers(tmp_path):
    paths = {
        "path": one_prompt(tmp_path / "train.jsonl", [*TEXTS[:50], f" {TEXTS[60]}", TEXTS[70]]),
        "validation_path": one_prompt(tmp_path / "validation.jsonl", [*TEXTS[60:70], TEXTS[71]]),
        "test_path": one_prompt(tmp_path / "test.jsonl", TEXTS[70:75]),
    }
    splits = load_records(section(**paths))
    assert [len(splits[name]) for name in SPLITS] == [50, 10, 5]
    assert (splits.counts["train_also_held_out"], splits.counts["validation_also_test"]) == (2, 1)


def test_with_several_prompts_files_are_compared_by_the_prompt(tmp_path):
    """Seven answers a question: it stays a question."""
    asked = ["What is 2 + 3?", "What is 2 - 3?"]
    paths = {
        "path": one_prompt(tmp_path / "train.jsonl", TEXTS[:14], asked),
        "validation_path": one_prompt(tmp_path / "validation.jsonl", TEXTS[60:65], ("C",)),
        "test_path": one_prompt(tmp_path / "test.jsonl", TEXTS[70:75], ("D", asked[1])),
    }
    splits = load_records(section(**paths))
    assert [len(splits[name]) for name in SPLITS] == [7, 5, 5]
    assert {record.prompt for record in splits.train} == {asked[0]} and splits.counts["train_also_held_out"] == 7


def test_under_each_heading_that_many_records_share_files_are_compared_by_the_answers(tmp_path):
    headings, texts = ("Film review: ", "Hotel review: "), [*TEXTS[:60], TEXTS[100], TEXTS[110], TEXTS[111]]
    records = [rated(text, prompt=headings[i % 2]) for i, text in enumerate(texts)]
    write_records(tmp_path / "train.jsonl", [*records, rated("x", prompt="Why?"), rated("y", prompt="Where?")])
    held_out = [rated("z", prompt="Why?"), *(rated(text, prompt=headings[0]) for text in TEXTS[100:110])]
    write_records(tmp_path / "validation.jsonl", [*held_out, rated(TEXTS[110], prompt=headings[0])])
    paths = {name: str(tmp_path / f"{name.removesuffix('_path')}.jsonl") for name in ("validation_path", "test_path")}
    one_prompt(tmp_path / "test.jsonl", TEXTS[110:120], headings[1:])
    splits = load_records(section(path=str(tmp_path / "train.jsonl"), **paths))
    left_out = {(headings[0], TEXTS[100]), (headings[1], TEXTS[110]), ("Why?", "x")}
    kept = [(record.prompt, record.responses[0]) for record in [*records, rated("y", prompt="Where?")]]
    assert [(record.prompt, record.responses[0]) for record in splits.train] == [k for k in kept if k not in left_out]
    assert [len(splits[name]) for name in SPLITS] == [62, 12, 10] and splits.counts["train_also_held_out"] == 3


def test_how_many_records_make_a_heading_is_the_users_choice_and_what_is_left_out_is_told(tmp_path):
    asked = ["Topic 1: ", "Topic 2: "]
    paths = {
        "path": one_prompt(tmp_path / "train.jsonl", TEXTS[:14], asked),
        "validation_path": one_prompt(tmp_path / "validation.jsonl", TEXTS[60:65], ("C",)),
        "test_path": one_prompt(tmp_path / "test.jsonl", TEXTS[70:75], ("D", asked[1])),
    }
    found = load_records(section(**paths))
    line = told(found.counts)[0]
    assert line.startswith("7 training records are left out: ") and "config.data.heading_records" in line
    headings = load_records(section(**paths, heading_records=9))
    assert len(headings.train) == 14 and not any("left out" in line for line in told(headings.counts))
    with pytest.raises(InputError, match=r"data\.heading_records: found 1; allowed: 2 or more"):
        load_records(section(**paths, heading_records=1))


def test_one_explicit_split_leaves_the_other_to_be_cut_from_the_training_file(tmp_path):
    test = write(tmp_path / "test.jsonl", ["held out"])
    splits = load_records(section(path=write(tmp_path / "train.jsonl", TEXTS), test_path=test))
    assert len(splits.test) == 1 and len(splits.validation) > 20
    assert len(splits.train) + len(splits.validation) == 200


def test_max_records_keeps_every_splits_share_in_order(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    everything = load_records(section(path=path))
    some = load_records(section(path=path, max_records=50))
    for name in SPLITS:
        assert abs(len(some[name]) - len(everything[name]) / 4) <= 1
        positions = [everything[name].index(record) for record in some[name]]
        assert positions == sorted(positions)
    assert load_records(section(path=path, max_records=50, seed=1)).train != some.train
    assert some.counts["beyond_max_records"] == 200 - sum(len(some[name]) for name in SPLITS) > 140
    assert any("beyond config.data.max_records" in line for line in table(some.counts))


def test_empty_texts_and_duplicates_are_counted(tmp_path):
    splits = load_records(section(path=write(tmp_path / "a.jsonl", [*TEXTS, "", " ", f"{TEXTS[0]}\n"])))
    assert (splits.counts["rows"], splits.counts["empty"], splits.counts["duplicates"]) == (203, 2, 1)
    assert sum(len(splits[name]) for name in SPLITS) == 200
    with pytest.raises(InputError, match=r"split is empty \(3 records in all, 3 of them empty\)"):
        load_records(section(path=write(tmp_path / "b.jsonl", ["", " ", "\n"])))


def test_the_table_says_what_was_read_merged_and_left_out_by_split_and_kind(tmp_path):
    """The rows are the splits; a sum over them is the file, less what is named below them."""
    records = [rated(text) for text in (*TEXTS[:30], TEXTS[0], " ")]
    records += [Record(f"Why {i}?", ["yes", "no"], [Preference(0, 1)]) for i in range(9)]
    records += [Record("Why?", ["yes", "yes"], [Preference(0, 1)]), Record("What?", ["this"])]
    write_records(tmp_path / "a.jsonl", records)
    write_records(tmp_path / "test.jsonl", [rated(TEXTS[1]), rated("new")])
    counts = load_records(section(path=str(tmp_path / "a.jsonl"), test_path=str(tmp_path / "test.jsonl"))).counts
    lines = table(counts)
    assert lines[0].split() == ["data", "records", "no", "feedback", "preference", "rating"]
    cells = {line.split()[0]: [int(cell) for cell in line.split()[1:]] for line in lines[1:4]}
    assert set(cells) == set(SPLITS) and cells["test"] == [2, 0, 0, 2]
    assert [sum(column) for column in zip(cells["train"], cells["validation"], strict=True)] == [40, 1, 10, 29]
    assert "read 45" in lines[4] and "merged 1 " in lines[4] and "1 without text" in lines[4]
    assert "1 of training that are held out as well" in lines[4] and counts["equal_pairs"] == 1
    assert any(line.startswith("1 pairs of answers are equal") for line in lines[5:])


def test_plain_text_is_one_record_a_paragraph(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfFirst line\r\nsecond  line\r\n\r\n \t\r\nThird\n\n\n\n  Fourth\n")
    records = list(read_text(str(file)))
    assert [record.responses[0] for record in records] == ["First line\nsecond  line", "Third", "  Fourth"]
    assert [record.where for record in records] == [f"{file}:1", f"{file}:5", f"{file}:9"]
    assert all(record.feedback == [] for record in records)


def test_plain_text_loads_as_splits(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(TEXTS))
    splits = load_records(section(source="text", path=str(file)))
    assert sum(len(splits[name]) for name in SPLITS) == 200


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "csv"}, r"data.source: found 'csv'; allowed: vader \| jsonl \| text"),
        ({}, "data.path: found nothing"),
        ({"path": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"path": "a.jsonl", "test_fraction": 0.9}, "data.test_fraction: found 0.9; allowed"),
        ({"path": "a.jsonl", "max_records": -1}, "data.max_records: found -1"),
        ({"path": "one.jsonl"}, "config.data: the .* split is empty"),
        ({"path": "a.jsonl", "validation_path": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"source": "text", "path": "absent.txt"}, "absent.txt: no such file"),
        ({"source": "text", "path": "blank.txt"}, "is empty"),
        ({"source": "text", "path": "latin.txt"}, r"latin.txt:2: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", TEXTS)
    write("one.jsonl", ["only one"])
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(InputError, match=message) as error:
        load_records(section(**changes))
    assert "\n" not in str(error.value)


def test_one_scale_for_a_run():
    records = [Record("", ["no rating"]), rated("a", where="f:1"), rated("b", where="f:2")]
    assert rating_scale(records) == (-4.0, 4.0) and rating_scale(records[:1]) is None
    records.append(Record("", ["c"], [Rating(0, 1.0, (1.0, 5.0))], where="f:3"))
    with pytest.raises(InputError, match=r"f:3: field 'scale': found \[1.0, 5.0\], but f:1 has \[-4.0, 4.0\]"):
        rating_scale(records)


def test_a_number_that_is_a_label_lies_on_the_ratings_scale_where_it_counts_as_one():
    records = [rated("a", where="f:1"), Record("", ["b", "c"], [Rating(0, 2.0, (-4.0, 4.0)), Label(0, 77.0)])]
    records.append(Record("", ["d"], [Label(0, True), Label(0, "word"), Label(0, 4.0)]))
    assert rating_scale(records) == (-4.0, 4.0)  # a response's rating comes before its labels
    message = r"^f:9: field 'feedback\[1\].value': found 77; allowed: .* a number in \[-4, 4\], .*\(f:1\)"
    with pytest.raises(InputError, match=message):
        rating_scale([*records, Record("", ["d"], [Label(0, True), Label(0, 77.0)], where="f:9")])
    assert rating_scale([Record("", ["d"], [Label(0, 77.0)])]) is None


def test_labels_without_ratings_are_on_a_scale_of_their_own():
    votes = [Record("", ["d"], [Label(0, True), Label(0, False), Label(0, False)])]
    assert label_scale(votes) == (0.0, 1.0)  # not that of their means
    assert label_scale([*votes, Record("", ["e"], [Label(0, 5.0), Label(0, "word")])]) == (0.0, 5.0)
    assert label_scale([Record("", ["f"], [Label(0, "word")])]) == (0.0, 1.0)


def test_a_file_of_somebody_s_own_ratings_loads_like_the_built_in_source(tmp_path, shared):
    file = next((shared / "data" / "vader_gt").glob("*_GroundTruth.txt"))
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.count("\t") == 2]
    records = [rated(text, float(value), id=identity) for identity, value, text in rows]
    write_records(tmp_path / "mine.jsonl", records)
    first = json.loads((tmp_path / "mine.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first["feedback"][0] == {"kind": "rating", "response": 0, "value": records[0].feedback[0].value,
                                    "scale": [-4.0, 4.0]}  # fmt: skip
    splits = load_records(section(path=str(tmp_path / "mine.jsonl")))
    assert sum(len(splits[name]) for name in SPLITS) + splits.counts["duplicates"] == len(rows) > 3000
