import gzip
import json
import pathlib

import pytest

from lfjax.config import BadLines, InputError
from lfjax.records import (
    Critique,
    Edit,
    Implicit,
    Label,
    Preference,
    Ranking,
    Rating,
    Record,
    mean_ratings,
    parse_record,
    read_records,
    write_records,
)

EVERY_KIND = {
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "responses": ["red", {"text": "blue", "source": "model-7", "temperature": 0.7}, "Grün 🙂"],
    "feedback": [
        {"kind": "rating", "response": 0, "value": 3, "scale": [1, 5], "rater": "r1"},
        {"kind": "ranking", "order": [2, [0, 1]]},
        {"kind": "preference", "chosen": 2, "rejected": 0, "margin": 0.5},
        {"kind": "edit", "response": 1, "text": "Blue."},
        {"kind": "critique", "response": 1, "text": "No capital letter.", "tone": "kind"},
        {"kind": "label", "response": 0, "value": True},
        {"kind": "implicit", "response": 2, "signal": "dwell_s", "value": 4.5},
    ],
    "id": "q1",
    "source": "survey",
    "license": "MIT",
    "time": "2024-05-01",
    "batch": {"number": 4},
}


def lines(*objects):
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def minimal(**changes):
    record = {"prompt": "p", "responses": ["a", "b"], "feedback": []} | changes
    return {name: value for name, value in record.items() if value is not ...}


def feedback(**entry):
    return minimal(feedback=[{name: value for name, value in entry.items() if value is not ...}])


def rating(**changes):
    return feedback(**({"kind": "rating", "response": 0, "value": 1, "scale": [0, 2]} | changes))


def test_every_kind_of_feedback_is_read():
    record = parse_record(EVERY_KIND)
    assert record.responses == ["red", "blue", "Grün 🙂"]
    assert record.response_fields == [{}, {"source": "model-7", "temperature": 0.7}, {}]
    assert record.feedback == [
        Rating(0, 3.0, (1.0, 5.0), "r1"),
        Ranking([[2], [0, 1]]),
        Preference(2, 0, 0.5),
        Edit(1, "Blue."),
        Critique(1, "No capital letter.", {"tone": "kind"}),
        Label(0, True),
        Implicit(2, "dwell_s", 4.5),
    ]
    assert (record.id, record.source, record.license, record.time) == ("q1", "survey", "MIT", "2024-05-01")
    assert record.extra == {"batch": {"number": 4}}
    assert record.prompt_text == "user: Name a colour.\nassistant: "


def test_written_records_read_back_equal_with_their_unknown_fields(tmp_path):
    records = [
        parse_record(EVERY_KIND),
        Record("", ["plain\r\n\u2028text"], [Rating(0, -1.5, (-4.0, 4.0))], extra={"x": None}),
    ]
    assert write_records(tmp_path / "out.jsonl", records) == 2
    assert list(read_records(tmp_path / "out.jsonl")) == records
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    with pytest.raises(ValueError):
        write_records(file, [Record("", ["a"], extra={"x": float("nan")})])
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "data, field, found, allowed",
    [
        (minimal(prompt=...), "prompt", "nothing", "required"),
        (minimal(prompt=3), "prompt", "3", "a string or a list of chat messages"),
        (minimal(prompt=[]), "prompt", "[]", "chat messages"),
        (minimal(prompt=[{"role": "user"}]), "prompt[0].content", "nothing", "required"),
        (minimal(prompt=[{"role": "robot", "content": ""}]), "prompt[0].role", "robot", "user"),
        (minimal(responses=..., respones=["a"]), "responses", "respones", "required"),
        (minimal(prompt="", responses=[]), "responses", "[]", "one or more"),
        (minimal(responses=..., feedback=[{"kind": "label"}]), "responses", "nothing", "required"),
        (minimal(responses=..., feedback=..., feedbck=[]), "responses", "nothing", "required"),
        (minimal(responses=["a", 1]), "responses[1]", "1", "a string"),
        (minimal(responses=[{"txt": "a"}]), "responses[0].text", "txt", "required"),
        (minimal(responses=["\ud800"]), "responses[0]", "surrogate", "Unicode"),
        (minimal(feedback=...), "feedback", "nothing", "required"),
        (minimal(feedback={}), "feedback", "{}", "a list"),
        (minimal(feedback=["good"]), "feedback[0]", "good", "an object"),
        (minimal(id=[1]), "id", "[1]", "a string or a number"),
        (minimal(source=7), "source", "7", "a string"),
        (feedback(response=0), "feedback[0].kind", "nothing", "required"),
        (feedback(kind="star"), "feedback[0].kind", "star", "rating | ranking"),
        (rating(response=2), "feedback[0].response", "2", "0 to 1"),
        (rating(response=-1), "feedback[0].response", "-1", "0 to 1"),
        (rating(response=True), "feedback[0].response", "true", "index"),
        (rating(response=...), "feedback[0].response", "nothing", "required"),
        (rating(value="3"), "feedback[0].value", '"3"', "a number"),
        (rating(value=10**400), "feedback[0].value", "1000", "finite"),
        (rating(value=2.5), "feedback[0].value", "2.5", "scale [0, 2]"),
        (rating(scale=[2, 0]), "feedback[0].scale", "[2, 0]", "lo < hi"),
        (rating(scale=5), "feedback[0].scale", "5", "[lo, hi]"),
        (feedback(kind="ranking", order="01"), "feedback[0].order", "01", "best first"),
        (feedback(kind="ranking", order=[0, 0]), "feedback[0].order", "[0, 0]", "at most once"),
        (feedback(kind="ranking", order=[0, [0, 1]]), "feedback[0].order", "[0, [0, 1]]", "at most once"),
        (feedback(kind="ranking", order=[1]), "feedback[0].order", "[1]", "at least two"),
        (feedback(kind="ranking", order=[0, []]), "feedback[0].order", "[0, []]", "not empty"),
        (feedback(kind="ranking", order=[0, 2]), "feedback[0].order", "2", "0 to 1"),
        (feedback(kind="preference", chosen=1, rejected=1), "feedback[0].rejected", "1", "another"),
        (feedback(kind="preference", chosen=0, rejected=1, margin=-1), "feedback[0].margin", "-1", "0 or more"),
        (feedback(kind="edit", response=0, text=None), "feedback[0].text", "null", "a string"),
        (feedback(kind="critique", response=0), "feedback[0].text", "nothing", "required"),
        (feedback(kind="label", response=0, value=None), "feedback[0].value", "null", "true, false"),
        (feedback(kind="implicit", response=0, signal=1, value=1), "feedback[0].signal", "1", "a string"),
    ],
)
def test_a_wrong_field_is_named_with_its_line_what_was_found_and_what_is_allowed(tmp_path, data, field, found, allowed):
    file = tmp_path / "bad.jsonl"
    file.write_text(lines(minimal()) + json.dumps(data) + "\n")
    with pytest.raises(InputError) as error:
        list(read_records(file))
    message = str(error.value)
    assert message.startswith(f"{file}:2: field '{field}': found ")
    assert "\n" not in message and len(message) < len(str(file)) + 200
    seen, rule = message.split(": found ")[1].split("; allowed: ")
    assert found in seen and allowed in rule


def test_a_gzipped_file_holds_the_same_records(tmp_path):
    lines = "".join(json.dumps(minimal(id=i)) + "\n" for i in ("a", "b")).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    plain, packed = (list(read_records(tmp_path / name)) for name in ("plain.jsonl", "packed.jsonl.gz"))
    assert [(r.id, r.prompt, r.responses) for r in plain] == [(r.id, r.prompt, r.responses) for r in packed]
    assert [r.id for r in packed] == ["a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b'{"prompt": "p", "completion": "a", "label": true}',
            ":1: field 'responses': found completion, label, prompt; make records of such rows",
        ),
        (b'{"chosen": [], "rejected": []}\n' * 2, ":1: field 'responses': found chosen, rejected; make records"),
        (b'[\n {"prompt": "p"}]', ": no JSON lines; make records of such rows: lfjax feedback convert trl"),
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b'{"prompt": "p"', ":1: not JSON"),
        (b'{"prompt": "p", \r\n', ":1: not JSON: Expecting property name enclosed in double quotes at column 16;"),
        (b"[1]\n", ":1: found [1]; a record is a JSON object"),
        (b'{"prompt": "p", "responses": ["a"], "feedback": [], "x": NaN}', ":1: not JSON: NaN"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'\n{"prompt": "caf\xe9"}', ":2: not UTF-8 (byte 0xe9 at position 16)"),
        (json.dumps(minimal()).encode("utf-16"), ":1: not UTF-8"),
        (gzip.compress(b'{"prompt": 1}', mtime=0), ":1: field 'prompt'"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-12], ": damaged gzip data ("),
        (b"\x1f\x8b\x08 no more", ": damaged gzip data ("),
    ],
)
def test_a_file_that_is_no_jsonl_gives_one_line(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_records(file))
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


def test_the_pages_examples_are_records_of_every_kind(tmp_path):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "records.md").read_text()
    (tmp_path / "page.jsonl").write_text(page.partition("```json\n")[2].partition("```")[0])
    kinds = {entry.kind for record in read_records(tmp_path / "page.jsonl") for entry in record.feedback}
    assert kinds == {"rating", "preference", "ranking", "edit", "critique", "label", "implicit"}


def test_a_table_is_no_records(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tresponse\n")
    with pytest.raises(InputError, match=r"a\.tsv: no JSON lines; .* lfjax feedback convert csv"):
        list(read_records(tmp_path / "a.tsv"))


def test_a_record_that_is_only_a_prompt_says_no_more(tmp_path):
    for value in ({"prompt": "p", "topic": 1}, {"prompt": "p", "responses": [], "feedback": []}):
        record = parse_record(value)
        assert (record.prompt, record.responses, record.feedback) == ("p", [], [])
        write_records(tmp_path / "p.jsonl", [record])
        assert list(read_records(tmp_path / "p.jsonl")) == [record]
    with pytest.raises(InputError, match="record: field 'responses'"):
        parse_record({"prompt": "p"}, responses=True)  # for who reads responses alone
    with pytest.raises(InputError, match="field 'responses'"):
        parse_record(minimal(responses=[], feedback=[{"kind": "label", "response": 0, "value": 1}]))


def test_the_first_bad_lines_are_told_at_once_and_how_many_more_there_are(tmp_path):
    file = tmp_path / "bad.jsonl"
    bad = lines(minimal(prompt=1)) + "{\n\n"  # two wrong lines, and an empty one
    file.write_text(lines(minimal()) + bad * 12 + lines(minimal()))
    with pytest.raises(BadLines) as error:
        list(read_records(file))
    assert len(error.value.lines) == 21 and error.value.lines[-1] == f"{file}: 4 more lines are wrong"
    assert error.value.lines[0].startswith(f"{file}:2: field 'prompt'")
    assert error.value.lines[3].startswith(f"{file}:6: not JSON")
    file.write_text("{}\n" * 20_000)
    with pytest.raises(BadLines, match="at least 9980 more"):
        list(read_records(file))


def test_no_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_records(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_records(tmp_path))


def test_an_id_that_comes_twice_names_both_lines(tmp_path):
    file = tmp_path / "twice.jsonl"
    file.write_text(lines(minimal(id="a"), minimal(id="b"), minimal(id="a")))
    with pytest.raises(InputError, match=r"twice.jsonl:3: field 'id': found \"a\", as on line 1"):
        list(read_records(file))


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path):
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines(minimal(), minimal(prompt="ü")).replace("\n", "\r\n\r\n").encode())
    records = list(read_records(file))
    assert [record.prompt for record in records] == ["p", "ü"]
    assert records[1].where == f"{file}:3"


def test_records_stream(tmp_path):
    """The first record comes before the last line is looked at."""
    file = tmp_path / "long.jsonl"
    file.write_text(lines(minimal(id=1)) + "not JSON\n")
    records = read_records(file)
    assert next(records).id == 1
    with pytest.raises(InputError, match=":2: not JSON"):
        next(records)


def test_several_raters_of_a_response_are_averaged():
    entries = [Rating(0, 1.0, (0, 4)), Rating(1, 2.0, (0, 4)), Rating(0, 4.0, (0, 4)), Label(2, True)]
    assert mean_ratings(Record("", ["a", "b", "c"], entries)) == {0: 2.5, 1: 2.0}


def test_records_without_feedback_are_read_where_none_is_asked_for(tmp_path):
    file = tmp_path / "completions.jsonl"
    file.write_text(json.dumps({"prompt": "p", "responses": ["r"]}) + "\n" + lines(EVERY_KIND))
    assert [len(record.feedback) for record in read_records(file, feedback=False)] == [0, len(EVERY_KIND["feedback"])]
    with pytest.raises(InputError, match=":1: field 'feedback': found nothing"):
        list(read_records(file))
