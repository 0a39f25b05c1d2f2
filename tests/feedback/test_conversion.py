"""Published feedback becomes records: what is said by whom, what follows a prompt, what is left out and why."""

import collections
import gzip
import json

import pytest

from lfjax import cli
from lfjax.config import InputError
from lfjax.feedback.conversion import FORMATS, convert
from lfjax.records import Critique, Edit, Preference, read_records

DIALOGUE = "\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: Why?\n\nAssistant:"


def pair(chosen=" Because.", rejected=" No idea.", start=DIALOGUE):
    return {"chosen": DIALOGUE + chosen, "rejected": start + rejected}


def program(before="def f():\n", written="    return 1\n", edited="    return 2", prompt="def f():\r\n"):
    whole = {"original_model_completion": before + written, "unedited_annotator_completion": before + edited}
    return {"prompt": prompt, "Feedback": "It is 2.", **whole}


def converted(tmp_path, name, *rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = collections.Counter()
    return list(convert(file, name, left_out, **options)), left_out


def test_a_pair_of_dialogues_is_a_prompt_of_turns_and_a_preference(tmp_path):
    (record,), left_out = converted(tmp_path, "hh", pair())
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "user"]
    assert record.prompt[2]["content"] == "Why?"
    assert list(record.responses) == ["Because.", "No idea."]
    (entry,) = record.feedback
    assert isinstance(entry, Preference) and (entry.chosen, entry.rejected) == (0, 1)
    assert record.source == "hh" and not left_out


def test_two_turns_running_of_one_speaker_are_one_turn(tmp_path):
    start = "\n\nHuman: Hello.\n\nHuman: Still there?\n\nAssistant: \n\nAssistant: Hi!\n\nHuman: Why?"
    start += "\n\nAssistant:"
    row = {"chosen": start + " Because.", "rejected": start + " No idea."}
    (record,), left_out = converted(tmp_path, "hh", row)
    said = ["Hello.\n\nStill there?", "Hi!", "Why?"]
    assert record.prompt == [
        {"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), said, strict=True)
    ]
    assert list(record.responses) == ["Because.", "No idea."] and not left_out


@pytest.mark.parametrize(
    "row, reason",
    [
        (pair(start=DIALOGUE.replace("Hi!", "Hey!")), "differ before their last turn"),
        (pair(chosen=" "), "does not end in an answer"),
        (pair(chosen=" Because.\n\nHuman: Oh.", rejected=" No.\n\nHuman: Oh."), "differ before their last turn"),
        (pair(rejected=" Because."), "the two answers are the same"),
        ({"chosen": "Hi!", "rejected": "Hey!"}, "not a dialogue"),
        (
            {name: "\n\nAssistant: Hi!" + DIALOGUE + name for name in ("chosen", "rejected")},
            "begin and end with the human",
        ),
        (
            {name: DIALOGUE + f" So.\n\nAssistant: {name}" for name in ("chosen", "rejected")},
            "begin and end with the human",
        ),
        ({"chosen": "So:" + DIALOGUE + " a", "rejected": "So:" + DIALOGUE + " b"}, "not a dialogue"),
    ],
)
def test_a_pair_that_gives_no_preference_is_counted_by_its_reason(tmp_path, row, reason):
    records, left_out = converted(tmp_path, "hh", row, pair())
    assert len(records) == 1
    ((found, count),) = left_out.items()
    assert reason in found and count == 1


def test_a_question_and_its_worked_answer_are_a_prompt_and_a_response_to_learn(tmp_path):
    (record,), _ = converted(tmp_path, "gsm8k", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"})
    assert record.prompt == "1 + 1?\n" and not record.feedback
    assert list(record.responses) == ["It is 2.\n#### 2"]


def test_a_corrected_program_is_a_critique_and_an_edit_that_go_on_from_the_prompt(tmp_path):
    (record,), _ = converted(tmp_path, "ilf", program())
    critique, edit = record.feedback
    assert isinstance(critique, Critique) and critique.text == "It is 2."
    assert isinstance(edit, Edit) and record.prompt + edit.text == "def f():\n    return 2"
    assert record.prompt + record.responses[0] == "def f():\n    return 1\n"


@pytest.mark.parametrize(
    "row, reason",
    [
        (program(before="import os\ndef f():\n"), "a program does not begin with the prompt"),
        (program(edited=""), "nothing follows the prompt"),
    ],
)
def test_a_program_that_does_not_go_on_from_the_prompt_is_left_out(tmp_path, row, reason):
    records, left_out = converted(tmp_path, "ilf", row, program())
    assert len(records) == 1 and left_out == {reason: 1}


def test_long_records_are_left_out_on_request(tmp_path):
    rows = [{"question": "q" * n, "answer": "a"} for n in (3, 4)]
    records, left_out = converted(tmp_path, "gsm8k", *rows, max_chars=5)  # the question ends in a line feed
    assert [record.prompt for record in records] == ["qqq\n"] and left_out == {"more than 5 characters": 1}


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("hh", {"chosen": DIALOGUE}, ":1: field 'rejected': found nothing; the format 'hh' has a text there"),
        ("gsm8k", {"question": "q", "answer": 3}, ":1: field 'answer': found int"),
        ("ilf", [1], ":1: found list; allowed: a JSON object with prompt"),
        ("xyz", {}, "format 'xyz': not known; allowed: hh, gsm8k, ilf, trl, csv"),
    ],
)
def test_what_is_not_in_the_format_gives_one_line(tmp_path, name, row, message):
    with pytest.raises(InputError) as caught:
        converted(tmp_path, name, row)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_writes_records_that_can_be_read_and_says_what_it_left_out(tmp_path, capsys):
    source, output = tmp_path / "pairs.jsonl", tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (pair(), pair(chosen=""), pair())))
    assert cli.main(["feedback", "convert", "hh", str(source), str(output)]) == 0
    assert len(list(read_records(output))) == 2
    said = capsys.readouterr().out
    assert f"{output}: 2 records" in said and "left out: 1: a dialogue does not end in an answer" in said
    for arguments in (["csv", str(source), str(tmp_path / "x")], ["hh", str(source), str(tmp_path / "no" / "x")]):
        assert cli.main(["feedback", "convert", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_name_in_gz_is_written_gzipped_with_the_same_bytes_each_time(tmp_path, capsys):
    source, plain, packed = tmp_path / "pairs.jsonl", tmp_path / "records.jsonl", tmp_path / "records.jsonl.gz"
    source.write_text("".join(json.dumps(row) + "\n" for row in (pair(), pair(chosen=" Caf\u00e9."))))
    for output in (plain, packed):
        assert cli.main(["feedback", "convert", "hh", str(source), str(output)]) == 0
    content = packed.read_bytes()
    assert gzip.decompress(content) == plain.read_bytes()
    assert content[3:8] == bytes(5)  # no name, no time
    assert list(read_records(packed)) == list(read_records(plain))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "records.jsonl", "records.jsonl.gz"]


def test_published_files_are_read(shared):
    files = {
        "hh": "hh_rlhf_harmless_base/test.first1800.jsonl.gz",
        "gsm8k": "gsm8k/train.first1000.jsonl",
        "ilf": "ilf_code_surge/surge_annotations.first150.jsonl",
    }
    rows = {"hh": 1800, "gsm8k": 1000, "ilf": 150}
    for name in FORMATS:
        left_out = collections.Counter()
        records = list(convert(shared / "data" / files[name], name, left_out))
        assert len(records) + sum(left_out.values()) == rows[name] and len(records) > 0.95 * rows[name]
        for record in records if name == "hh" else ():  # what chat templates ask for
            roles = [message["role"] for message in record.prompt]
            assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))] and roles[-1] == "user"


def test_a_file_of_which_nothing_can_be_made_writes_nothing(tmp_path, capsys):
    source, output = tmp_path / "pairs.jsonl", tmp_path / "records.jsonl"
    source.write_text(json.dumps({"question": "q", "answer": " "}) + "\n")
    for target, options in ((output, []), (source, []), (output, ["--max-chars=-1"])):
        assert cli.main(["feedback", "convert", "gsm8k", str(source), str(target), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    found = ("no record can be made of it (1 x no question or no answer)", "is the file to read as well", "-chars: -1")
    assert len(lines) == 3 and all(part in line for part, line in zip(found, lines, strict=True))
    assert not output.exists() and [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
