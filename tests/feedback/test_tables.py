"""Rows of data sets for TRL, and tables, become records."""

import collections
import gzip
import json

import pytest

from lfjax import cli
from lfjax.config import BadLines, InputError
from lfjax.feedback.conversion import convert
from lfjax.records import Preference, read_records, record_json

USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PREFERRED = [{"kind": "preference", "chosen": 0, "rejected": 1}]
LABEL = {"kind": "label", "response": 0, "value": False}
START = "Q: why?\nA:"
ROWS = {  # a row -> prompt, responses, feedback of each of its records
    "unpaired": ({"prompt": "q", "completion": "a", "label": False}, [("q", ["a"], [LABEL])]),
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("q", ["a", "b"], PREFERRED)]),
    "pair of chats": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        [([SYSTEM, USER], ["good", "bad"], PREFERRED)],
    ),
    "whole chats": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [([USER], ["good", "bad"], PREFERRED)]),
    "whole texts": (
        {"chosen": f"{START} so it is", "rejected": f"{START} since"}, [(START, [" so it is", " since"], PREFERRED)]
    ),
    "turns": ({"messages": [USER, GOOD, USER, BAD]}, [([USER], ["good"], []), ([USER, GOOD, USER], ["bad"], [])]),
    "completion": ({"prompt": [USER], "completion": [GOOD]}, [([USER], ["good"], [])]),
    "prompt": ({"prompt": [USER]}, [([USER], [], [])]),
    "text": ({"text": "a b"}, [("", ["a b"], [])]),
}  # fmt: skip


def converted(path, name="trl", **options):
    left_out = collections.Counter()
    return list(convert(path, name, left_out, **options)), left_out


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_for_trl_is_the_records_that_it_says(kind, tmp_path):
    row, wanted = ROWS[kind]
    records, left_out = converted(written(tmp_path / "rows.jsonl", json.dumps(row | {"id": 7, "score_chosen": 8.5})))
    made = [record_json(record) for record in records]
    assert [(m["prompt"], m["responses"], m["feedback"]) for m in made] == wanted and not left_out
    assert all(record.extra == {"score_chosen": 8.5} and record.source == "trl" for record in records)
    assert [record.id for record in records] == ([7] if len(records) == 1 else ["7-0", "7-1"])


def test_an_array_and_parquet_are_read_as_lines_are(tmp_path):
    rows = [{"prompt": "q", "completion": f"a{i}", "label": i % 2 == 0, "id": 3} for i in range(3)]
    records, _ = converted(written(tmp_path / "rows.json", json.dumps(rows, indent=1)))
    assert [record.responses for record in records] == [["a0"], ["a1"], ["a2"]]
    assert [(record.id, record.extra) for record in records] == [(3, {})] + [(None, {"row_id": 3})] * 2
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert converted(tmp_path / "rows.parquet")[0] == records
    bomb = pyarrow.chunked_array([pyarrow.array(["x" * 2_000_000] * 20)] * 4)
    parquet.write_table(pyarrow.table({"prompt": bomb}), tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(InputError, match=r"bomb\.parquet: Parquet that unpacks to more than"):
        converted(tmp_path / "bomb.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: damaged Parquet"):
        converted(written(tmp_path / "rows.parquet", (tmp_path / "rows.parquet").read_bytes()[:-20]))


LEFT_OUT = {
    "the same": {"prompt": "q", "chosen": "a", "rejected": "a"},
    "differ before": {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "no answer of the assistant": {"chosen": [USER], "rejected": [USER]},
    "something else than text": {"messages": [{"role": "user", "content": [{"type": "image"}]}, GOOD]},
    "more than 1000 messages": {"messages": [USER, GOOD] * 501},
    "neither true nor false": {"prompt": "q", "completion": "a", "label": "x"},
    "none of prompt": {"input_ids": [1, 2]},
}


def test_rows_of_which_no_record_can_be_made_are_counted_by_the_reason(tmp_path):
    rows = [*LEFT_OUT.values(), ROWS["pair"][0]]
    records, left_out = converted(written(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert len(records) == 1
    assert all(sum(reason in said for said in left_out) == 1 for reason in LEFT_OUT) and len(left_out) == len(LEFT_OUT)


TABLE = 'question;answer;score;who\n"a; ""b""\n\nc";d;4,5;x\né;f;;y\n;;;\nonly;;;z\n'
MAP = ("prompt=question,response=answer,rating=score:1..5",)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "bom.csv", "crlf.csv", "t.tsv"])
def test_a_table_is_read_by_its_map(name, tmp_path):
    text = TABLE.replace(";", "\t") if name == "t.tsv" else TABLE.replace("\n", "\r\n") if name == "crlf.csv" else TABLE
    content = (b"\xef\xbb\xbf" if name == "bom.csv" else b"") + text.encode()
    path = written(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    records, left_out = converted(path, "csv", columns=MAP)
    first, second, third = records
    assert (first.prompt.replace("\t", ";"), first.responses) == ('a; "b"\n\nc', ["d"])
    (rating,) = first.feedback
    assert (rating.value, rating.scale, first.extra, first.source) == (4.5, (1.0, 5.0), {"who": "x"}, "csv")
    assert (second.prompt, second.feedback, third.prompt, third.responses) == ("é", [], "only", [])
    assert not left_out  # an empty row is none


def test_columns_of_a_records_own_names_need_no_map_and_pairs_and_words_are_kinds_too(tmp_path):
    path = written(tmp_path / "a.csv", "prompt,chosen,rejected,id\nq,a,b,3\nq,a,a,4\nq,a,,5\n")
    (record,), left_out = converted(path, "csv")
    assert record.feedback == [Preference(0, 1)] and record.id == "3"
    assert left_out == {"the two answers are the same": 1, "one answer alone of a pair": 1}
    path = written(
        tmp_path / "b.csv", "prompt,response,label,edit,critique\nq,a,TRUE,better,why\nq,b,spam,,\nq,c,2,,\n"
    )
    records, _ = converted(path, "csv")
    assert [entry.kind for entry in records[0].feedback] == ["label", "edit", "critique"]
    assert [record.feedback[0].value for record in records] == [True, "spam", 2.0]


@pytest.mark.parametrize(
    "content, columns, found",
    [
        (TABLE, ("prompt=nobody",), "--map: prompt=nobody: .*has no such column; it has question, answer"),
        (TABLE, ("prompt=question,rating=score",), "a rating has a scale, lowest to highest"),
        (TABLE, ("prompt=question,rating=score:5..1",), "a rating has a scale"),
        (TABLE, ("text=question",), "--map: 'text=question'; write FIELD=COLUMN"),
        (TABLE, (), "which column is which"),
        ("prompt,answer\nq,a\n", (), "which column is which"),
        ("response,rating\nq,1\n", (), "'rating': which scale"),
        ("prompt,prompt\n", (), "two columns are called 'prompt'"),
        (TABLE.replace("4,5", "good"), MAP, r":4: column 'score': found 'good'; allowed: a number from 1 to 5"),
        ('prompt\n"never closed\n', (), ":2: no CSV: "),
        ("prompt,response\nq,a,b\n", (), ":2: 3 cells, but 2 columns"),
        (b"prompt\n\xff\n", (), ":2: not UTF-8"),
        ('prompt,response\n"' + ("x" * 999_999 + '\n","') * 17, (), ":18: a row of more than 16 million characters"),
        ("prompt,response\rq,a\r", (), ":1: its lines end in CR alone"),
        ("a," * 1000 + "\n", (), ":1: 1001 columns; at most 1000"),
        ("a," * 60_000 + "\n", (), ":1: the names of the columns have 120001 characters"),
        ("", (), "is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_line(content, columns, found, tmp_path):
    with pytest.raises(InputError, match=found) as error:
        converted(written(tmp_path / "t.csv", content), "csv", columns=columns)
    assert "\n" not in str(error.value)


def test_the_command_takes_a_map_and_writes_nothing_of_a_table_with_wrong_rows(tmp_path, capsys):
    path, output = written(tmp_path / "t.csv", TABLE), tmp_path / "out.jsonl"
    assert cli.main(["feedback", "convert", "csv", str(path), str(output), f"--map={MAP[0]}"]) == 0
    assert f"{output}: 3 records" in capsys.readouterr().out
    assert [record.prompt for record in read_records(output)][1:] == ["é", "only"]
    output.unlink()
    written(path, "prompt,response,rating\n" + "q,a,9\n" * 30 + "q,a,1\n")
    assert cli.main(["feedback", "convert", "csv", str(path), str(output), "--map=rating=rating:1..5"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 21 and "t.csv:2: column 'rating'" in err[0] and err[-1].endswith(": 10 more lines are wrong")
    assert not output.exists()
    with pytest.raises(BadLines):
        converted(path, "csv", columns=("rating=rating:1..5",))
